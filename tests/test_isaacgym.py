"""IsaacGymEnvs' tasks, by real hydra and stand-ins. settings.json: all official settings files."""

import json
import os
import re
import shutil
import subprocess
import sys
import types

import pytest
from harness import ROOT, SCRIPT, Run, newest_run, refused, run, same_state

import train_ppo

pytest.importorskip("hydra")
from omegaconf import OmegaConf

FACTS = json.loads((ROOT / "tests" / "settings.json").read_text())


def facts(name):
    """{"config.gamma": 0.99, ...} of an official settings file; None: it has no such key."""
    return {**FACTS["usual"], **FACTS["files"][name]["settings"]}


def nested(flat):
    tree = OmegaConf.create()
    for path, value in flat.items():
        if value is not None:
            OmegaConf.update(tree, path, value)
    return tree


# SETTINGS =========================================================================================


@pytest.fixture
def parse(monkeypatch, capsys):
    """Settings -> (arguments that differ from the defaults, or None; what is printed)."""

    def parsed(settings):
        cfg = OmegaConf.create({"train": {"params": nested(settings)}})
        monkeypatch.setattr(train_ppo, "ISAACGYM_ERROR", "")
        monkeypatch.setattr(train_ppo, "compose_isaacgym_config", lambda *_: cfg)
        try:
            args, _, _ = train_ppo.parse_args(["--env-id=Task"])
        except SystemExit as exc:
            return None, "".join(capsys.readouterr()) + str(exc.code)
        usual = train_ppo.Args(env_id="Task", train_dir=args.train_dir)
        found = dict(vars(args).items() - vars(usual).items())
        return json.loads(json.dumps(found)), "".join(capsys.readouterr())

    return parsed


def unused(printed):
    """The settings that are named as not used."""
    (names,) = re.findall("settings of .* that are not used here: (.*)", printed)
    return names.split(", ")


@pytest.mark.parametrize("name", FACTS["files"])
def test_official_settings_become_these_arguments_or_are_refused(name, parse):
    found, printed = parse(facts(name))
    row = FACTS["files"][name]
    assert found == row.get("arguments"), printed
    if found is None:
        assert re.fullmatch("error: Task cannot be trained: .*", printed)
        assert [reason for reason in row["refused"] if reason not in printed] == []
    else:
        assert "score_to_win" in unused(printed)
        assert ("central.learning_rate" in unused(printed)) == ("critic_units" in found)


IMPOSSIBLE = {  # what this file does not do and no official file asks for
    "model.name": "continuous_a2c",
    "network.value_activation": "tanh",
    "network.space.continuous.fixed_sigma": False,
    "network.mlp.initializer.name": "orthogonal_initializer",
    "config.ppo": False,
    "config.reward_shaper.min_val": 0,
    "config.minibatch_size_per_env": 4,
}
CENTRAL = "config.central_value_config"
SEEING = {k: x for k, x in facts("ShadowHandPPOAsymm").items() if k.startswith(CENTRAL)}
# Changes to AntPPO.yaml, and what follows: arguments, or a part of the refusal.
CHANGES = [
    *(({path: value}, f"ask for {path} = {value}") for path, value in IMPOSSIBLE.items()),
    ({"network.mlp.activation": "mish"}, "invalid choice 'mish' for argument '--activation'"),
    ({"config.reward_shaper.scale_value": None}, {"reward_scale": 1.0}),
    ({"config.truncate_grads": True, "config.grad_norm": 0.5}, {"max_grad_norm": 0.5}),
    ({"config.lr_schedule": None}, {"lr_schedule": "fixed"}),
    ({"config.learning_rate": "5e-4"}, {"learning_rate": 5e-4}),  # so yaml reads 5e-4
    ({**SEEING, f"{CENTRAL}.network.mlp.activation": "relu"}, "network.mlp.activation = relu"),
    # What belongs to the command is not a task's to choose, and these belong to something else.
    ({"config.track": True, "config.checkpoint": "a.pth"}, {}),
    ({"config.player.seed": 7, "config.player.gamma": 0.5}, {}),
]
IDS = [" = ".join(map(str, list(changes.items())[-1])) for changes, _ in CHANGES]


@pytest.mark.parametrize("changes, expected", CHANGES, ids=IDS)
def test_a_setting_becomes_an_argument_or_is_refused(changes, expected, parse):
    found, printed = parse({**facts("AntPPO"), **changes})
    if isinstance(expected, str):
        assert found is None and expected in " ".join(printed.split())
    else:
        assert found == {**FACTS["files"]["AntPPO"]["arguments"], **expected}


# TASKS ============================================================================================

ISAACGYM = """
import sys
if "torch" in sys.modules:
    raise ImportError("PyTorch was imported before isaacgym modules.")
"""
ISAACGYMENVS = """
import os
from omegaconf import OmegaConf
import isaacgym, numpy, torch
from harness import Env
numpy.float  # isaacgym.torch_utils uses it, gone since numpy 1.24
new = dict(replace=True)
OmegaConf.register_new_resolver("eq", lambda x, y: x.lower() == y.lower(), **new)
OmegaConf.register_new_resolver("resolve_default", lambda usual, x: usual if x == "" else x, **new)
MADE = []
def make(seed, task, num_envs, sim_device, rl_device, graphics_device_id, headless, force_render,
         cfg):
    MADE.append(task)
    assert len(MADE) == 1, "Failed to create sim: one simulation per process"
    cfg = OmegaConf.to_container(cfg.task, resolve=True)
    assert headless and not force_render and cfg["env"].pop("numEnvs") == num_envs
    assert sim_device == rl_device == "cpu" and not cfg["sim"]["use_gpu_pipeline"]
    assert torch.initial_seed() == int(seed), "make(seed) seeds nothing: the caller must"
    infos = lambda env: {"stiffness": env.stiffness, "level": env.level}
    env = Env(num_envs, rl_device, seed, level=0, infos=infos, lengths=30, **cfg["env"])
    torch.rand(1 + ord(os.urandom(1)))  # any number of random numbers
    return env
"""
CONFIG = dict(num_envs="", seed=42, pipeline="gpu", sim_device="cuda:0", rl_device="cuda:0")
CONFIG.update(graphics_device_id=0, headless=False)
CONFIG["defaults"] = [{"task": "Ant"}, {"train": "${task}PPO"}, "_self_"]
ANT = {**facts("AntPPO"), "config.num_actors": "${....task.env.numEnvs}", "config.new": 1}
ANT.update({"config.horizon_length": 8, "config.minibatch_size": 256, "config.tau": 0.9})
ANT.update({"network.mlp.units": [16], "config.mini_epochs": 1, "config.max_epochs": 4})
ANT.update({"config.save_best_after": 2, "config.save_frequency": 2})
TASKS = {  # task: (num_states, changes to AntPPO.yaml)
    "Ant": (0, {}),
    "Other": (0, {"config.minibatch_size": "${.num_actors}"}),
    "AllegroKuka": (4, {}),
    "Hand": (4, SEEING),
    "HandWithoutStates": (0, SEEING),
}


@pytest.fixture
def isaacgym(here, monkeypatch):
    """A working directory with the stand-ins, which this process has imported before torch."""
    cfg = "isaacgymenvs/cfg"
    files = {"isaacgym/__init__.py": ISAACGYM, "isaacgymenvs/__init__.py": ISAACGYMENVS}
    files[f"{cfg}/config.yaml"] = json.dumps(CONFIG)
    for name, (num_states, changes) in TASKS.items():
        env = {"numEnvs": "${resolve_default:64,${...num_envs}}", "num_states": num_states}
        sim = {"use_gpu_pipeline": '${eq:${...pipeline},"gpu"}'}
        files[f"{cfg}/task/{name}.yaml"] = json.dumps({"env": {**env, "stiffness": 1}, "sim": sim})
        params = nested({**ANT, **changes})
        files[f"{cfg}/train/{name}PPO.yaml"] = OmegaConf.to_yaml({"params": params})
    for name, text in files.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(text)
    sys.path.insert(0, str(here))
    monkeypatch.setitem(sys.modules, "isaacgym", types.ModuleType("isaacgym"))
    monkeypatch.setattr(train_ppo, "ISAACGYM_ERROR", "")
    yield
    sys.modules.pop("isaacgymenvs", None)


def command(words, call=run, **keywords):
    """`run` or `refused`, as in a process of its own, which has made no simulation yet."""
    sys.modules.pop("isaacgymenvs", None)
    return call(*words.split(), "--device=cpu", **keywords)


def test_a_task_trains_with_its_own_settings_and_flags_win(isaacgym, here):
    """In a real process, in which only train_ppo.py sees to the order of the imports."""
    words = [sys.executable, SCRIPT, "--env-id=Ant", "--num-steps=16", "--experiment=r"]
    environ = dict(os.environ, PYTHONPATH=f"{here}:{ROOT}/tests", CUDA_VISIBLE_DEVICES="")
    out = subprocess.check_output(words, env=environ, timeout=300, universal_newlines=True)
    done = Run(out, "", 0, newest_run())
    assert "epoch 4/4" in out and {"new", "score_to_win"} <= set(unused(out))
    expected = dict(num_envs=64, num_steps=16, minibatch_size=256, gae_lambda=0.9)
    expected.update(max_epochs=4, max_grad_norm=0.0, reward_scale=0.01, update_epochs=1)
    assert expected.items() <= done.state("epoch_4.pth")["args"].items()
    assert done.files == ["best.pth", "epoch_2.pth", "epoch_4.pth", "last.pth"]


def test_a_task_continues_and_is_evaluated_without_its_flags(isaacgym):
    command("--env-id=Ant --experiment=r")
    done = command("--checkpoint=runs/r --max-epochs=5")
    assert done.state()["epoch"] == 5 and "the env starts new episodes" in done.out
    levels = [value for _, value in done.curves["level/iter"]]
    assert levels == sorted(set(levels)) and len(levels) == 5, "the curriculum goes on"
    done = command("runs/r --num-envs=5", script=ROOT / "tools" / "evaluate.py")
    assert "5 episodes of mean length 30.0\n" in done.out


def test_overrides_reach_the_task_and_a_seed_repeats_a_run_whatever_it_draws(isaacgym):
    overrides = "train=OtherPPO task.env.stiffness=3"
    words = f"--env-id=Ant --max-epochs=1 --num-envs=32 --overrides {overrides}"
    done, again = command(words), command(words)
    assert [value for _, value in done.curves["stiffness/iter"]] == [3.0]
    assert done.state()["args"]["minibatch_size"] == 32
    assert same_state(done.state(), again.state()) == [] and done.folder != again.folder


def test_critic_sees_the_states_only_with_a_central_value_network(isaacgym):
    blind = command("--env-id=AllegroKuka --max-epochs=1").state()
    assert blind["num_states"] == 0 and "state_mean_std.running_mean" not in blind["model"]
    seeing = command("--env-id=Hand --max-epochs=1").state()["model"]
    shapes = {name: tuple(value.shape) for name, value in seeing.items()}
    assert shapes["a2c_network.actor_mlp.0.weight"] == (16, 2)
    assert shapes["a2c_network.critic_mlp.0.weight"] == (512, 4)
    assert seeing["state_mean_std.count"] > 1, "they are normalised"


NAMES = "; tasks are AllegroKuka, Ant, Hand, HandWithoutStates, Other"
REFUSED = {
    "--env-id=HandWithoutStates": "no states for its central value network",
    "--env-id=Anymal": NAMES,
    "--env-id=Cartpole": NAMES,  # not the built-in one, if Isaac Gym is there
    "--env-id=Ant --overrides task.env.stiffnes=3": "task.env.stiffnes=3: ",
    "--env-id=Ant --overrides task.env.stiffness": "task.env.stiffness: ",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_trained_is_one_line(words, isaacgym):
    assert REFUSED[words] in command(words, call=refused)


def test_sim_torch_is_the_built_in_cartpole(isaacgym):
    assert command("--env-id=Cartpole --sim=torch --max-epochs=1").state()["num_obs"] == 4


def test_isaacgym_without_its_tasks_is_one_line(isaacgym):
    shutil.rmtree("isaacgymenvs")
    error = command("--env-id=Ant", call=refused, script=SCRIPT)
    assert "needs Isaac Gym, which fails: No module named 'isaacgymenvs'" in error


def test_isaacgym_imported_too_late_says_why(isaacgym):
    del sys.modules["isaacgym"]
    error = command("--env-id=Ant", call=refused, script=SCRIPT)
    assert "PyTorch was imported before isaacgym" in error
