"""IsaacGymEnvs' tasks, by real hydra and by stand-ins of isaacgym and isaacgymenvs that do what
breaks naive trainers. settings.json has the facts of all official settings files."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap

import pytest
from harness import ROOT, SCRIPT, Run, same_state

import train_ppo

pytest.importorskip("hydra")
from omegaconf import OmegaConf

FACTS = json.loads((ROOT / "tests" / "settings.json").read_text())


def facts(name):
    """{"config.gamma": 0.99, ...} of an official settings file; None: it has no such key."""
    return {**FACTS["usual"], **FACTS["files"][name]["settings"]}


def nested(flat):
    tree = {}
    for path, value in flat.items():
        *folders, key = path.split(".")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        if value is not None:
            node[key] = value
    return tree


# SETTINGS =========================================================================================


@pytest.fixture
def parse(monkeypatch, capsys):
    """Settings -> (arguments that differ from the defaults, or the refusal; what is printed)."""

    def parsed(settings):
        cfg = OmegaConf.create({"train": {"params": nested(settings)}})
        monkeypatch.setattr(train_ppo, "ISAACGYM_ERROR", "")
        monkeypatch.setattr(train_ppo, "compose_isaacgym_config", lambda args, num_envs: cfg)
        train_ppo.warn.cache_clear()
        try:
            args, _, _ = train_ppo.parse_args(["--env-id=Task"])
        except train_ppo.UserError as exc:
            return exc.code, "".join(capsys.readouterr())
        args = dataclasses.replace(args, env_id="Cartpole", train_dir="runs")
        usual = vars(train_ppo.Args()).items()
        found = {name: vars(args)[name] for name, value in usual if vars(args)[name] != value}
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
    if "refused" in row:
        assert found.startswith("error: Task cannot be trained: "), found
        assert "\n" not in found and printed == ""
        assert [reason for reason in row["refused"] if reason not in found] == []
        return
    assert found == row["arguments"]
    assert "score_to_win" in unused(printed)
    assert ("max_frames" in unused(printed)) == (name == "AllegroKukaPPO")
    assert ("central.learning_rate" in unused(printed)) == ("critic_units" in row["arguments"])


ORTHOGONAL = {"name": "orthogonal_initializer", "gain": 0.01}
CENTRAL = "config.central_value_config"
SEEING = {f"{CENTRAL}.learning_rate": 5e-4, f"{CENTRAL}.network.name": "actor_critic"}
SEEING.update({f"{CENTRAL}.network.central_value": True, f"{CENTRAL}.normalize_input": True})
SEEING.update({f"{CENTRAL}.network.mlp.units": [48], f"{CENTRAL}.network.mlp.activation": "elu"})
# Changes to AntPPO.yaml, and what follows: arguments, or a part of the refusal.
CHANGES = [
    ({"network.mlp.initializer": ORTHOGONAL}, "network.mlp.initializer.gain = 0.01"),
    ({"network.space.continuous.mu_init": ORTHOGONAL}, "mu_init.name = orthogonal_initializer"),
    ({"network.value_activation": "tanh"}, "network.value_activation = tanh"),
    ({"network.value_activation": "None"}, {}),
    ({"network.min_sigma": 0.1}, "network.min_sigma = 0.1"),
    ({"network.space.continuous.fixed_sigma": False}, "fixed_sigma = False"),
    ({"network.space.continuous.sigma_init.name": "default"}, "sigma_init.name = default"),
    ({"network.mlp.d2rl": True}, "network.mlp.d2rl = True"),
    ({"network.rnn.name": "gru", "network.rnn.units": 8}, "network.rnn.name = gru"),
    ({"network.cnn.type": "conv2d"}, "network.cnn.type = conv2d"),
    ({"network.mlp.regularizer.name": "l1_regularizer"}, "network.mlp.regularizer.name"),
    ({"network.separate": True}, {"separate": True}),
    ({"network.mlp.activation": None}, {}),
    ({"network.mlp.activation": "None"}, "invalid choice 'None' for argument '--activation'"),
    ({"network.mlp.activation": "mish"}, "invalid choice 'mish' for argument '--activation'"),
    ({"network.mlp.units": []}, {"units": []}),
    ({"algo.name": "a2c_discrete"}, "algo.name = a2c_discrete"),
    ({"config.ppo": False}, "config.ppo = False"),
    ({"config.reward_shaper.min_val": 0}, "config.reward_shaper.min_val = 0"),
    ({"config.reward_shaper.shift_value": 0}, {}),
    ({"config.reward_shaper.scale_value": None}, {"reward_scale": 1.0}),
    ({"config.reward_shaper.scale_value": -2.0}, {"reward_scale": -2.0}),
    ({"config.minibatch_size_per_env": 4}, "config.minibatch_size_per_env = 4"),
    ({"config.normalize_rms_advantage": True}, "config.normalize_rms_advantage = True"),
    ({"config.bound_loss_type": "regularisation"}, "bound_loss_type = regularisation"),
    ({"config.weight_decay": 0.01}, "config.weight_decay = 0.01"),
    ({"config.truncate_grads": None}, {"max_grad_norm": 0.0}),
    ({"config.truncate_grads": True, "config.grad_norm": 0.5}, {"max_grad_norm": 0.5}),
    ({"config.lr_schedule": "constant"}, {"lr_schedule": "fixed"}),
    ({"config.lr_schedule": "None"}, {"lr_schedule": "fixed"}),
    ({"config.lr_schedule": None}, {"lr_schedule": "fixed"}),
    ({"config.schedule_type": "standard"}, {"schedule_type": "standard"}),
    ({"config.schedule_type": "standard_epoch"}, "invalid choice 'standard_epoch' for argument"),
    ({"config.learning_rate": "5e-4"}, {"learning_rate": 5e-4}),
    ({"config.max_epochs": "1e5"}, "Error parsing --max-epochs: invalid literal for int()"),
    ({"config.gamma": -1}, "--gamma must be >= 0, not -1.0"),
    ({"config.minibatch_size": 1000}, "--minibatch-size must be > 1 and divide"),
    (SEEING, {"critic_units": [48]}),
    ({**SEEING, f"{CENTRAL}.network.mlp.activation": "relu"}, "two activations"),
    ({**SEEING, f"{CENTRAL}.network.rnn.name": "lstm"}, "central.network.rnn.name = lstm"),
    # What belongs to the command is not a task's to choose, and these belong to something else.
    ({"config.track": True, "config.train_dir": "/", "config.checkpoint": "a.pth"}, {}),
    ({"config.player.seed": 7, "config.player.gamma": 0.5}, {}),
]
IDS = [" = ".join(map(str, list(changes.items())[-1])) for changes, _ in CHANGES]


@pytest.mark.parametrize("changes, expected", CHANGES, ids=IDS)
def test_a_setting_is_obeyed_or_refused_by_name(changes, expected, parse):
    found, printed = parse({**facts("AntPPO"), **changes})
    if isinstance(expected, str):
        assert str(found).startswith("error: ") and "\n" not in found
        assert expected in " ".join((printed + found).split())
    else:
        assert found == {**FACTS["files"]["AntPPO"]["arguments"], **expected}


# TASKS ============================================================================================

FILES = {
    "isaacgym/__init__.py": """
        import sys
        if "torch" in sys.modules:
            raise ImportError("PyTorch was imported before isaacgym modules.")
    """,
    "isaacgym/torch_utils.py": """
        import numpy as np
        def get_axis_params(value, axis_idx, dtype=np.float):
            return list(np.eye(3)[axis_idx].astype(dtype) * value)
    """,
    "isaacgymenvs/__init__.py": """
        import os
        from omegaconf import OmegaConf
        import isaacgym, torch
        from isaacgym.torch_utils import get_axis_params
        OmegaConf.register_new_resolver("eq", lambda x, y: x.lower() == y.lower())
        OmegaConf.register_new_resolver("contains", lambda x, y: x.lower() in y.lower())
        OmegaConf.register_new_resolver("if", lambda pred, a, b: a if pred else b)
        OmegaConf.register_new_resolver("resolve_default", lambda d, arg: d if arg == "" else arg)
        MADE = []
        def make(seed, task, num_envs, sim_device, rl_device, graphics_device_id=-1, headless=False,
                 multi_gpu=False, virtual_screen_capture=False, force_render=True, cfg=None):
            print("Importing module 'gym_38' (stand-in)")
            if MADE:
                raise RuntimeError("Failed to create sim: one simulation per process")
            MADE.append(1)
            import rl_games
            os.makedirs("files_of_the_simulator", exist_ok=True)
            os.chdir("files_of_the_simulator")
            cfg = OmegaConf.to_container(cfg.task, resolve=True)
            assert headless and not force_render and cfg["env"]["numEnvs"] == num_envs
            assert not cfg["sim"]["use_gpu_pipeline"] and not cfg["sim"]["physx"]["use_gpu"]
            assert torch.initial_seed() == int(seed), "make(seed) seeds nothing: the caller must"
            torch.rand(1 + ord(os.urandom(1)))  # any number of random numbers
            return Task(cfg["env"])
        class Task:
            # An env is reset by the step after its done. Only the observations and time_outs are
            # new tensors in each step.
            num_acts = property(lambda self: 2)
            num_obs = property(lambda self: 3)
            num_envs = property(lambda self: len(self.obs_buf))
            max_episode_length = 30
            clip_obs = float("inf")
            def __init__(self, env):
                n = env["numEnvs"]
                self.stiffness, self.num_states = env["stiffness"], env.get("numStates", 0)
                self.obs_buf, self.rew_buf = torch.zeros(n, 3), torch.zeros(n)
                self.reset_buf, self.progress_buf = torch.ones(n).long(), torch.zeros(n).long()
                self.extras, self.obs_dict, self.curriculum = {}, {}, 0
            def reset(self):
                self.obs_dict["obs"] = torch.clamp(self.obs_buf, -5, 5)
                if self.num_states > 0:
                    self.obs_dict["states"] = self.progress_buf.repeat(5, 1).t() / 30.0
                return self.obs_dict
            def step(self, actions):
                assert actions.abs().max() <= 1 and not actions.requires_grad
                self.rew_buf[:] = 1 - (actions - self.obs_buf[:, :2]).abs().mean(1)
                self.progress_buf += 1
                ids = self.reset_buf.nonzero().squeeze(-1)
                self.rew_buf[ids], self.reset_buf[ids], self.progress_buf[ids] = 0.0, 0, 0
                self.obs_buf.uniform_(-0.5, 0.5)
                late = self.progress_buf >= self.max_episode_length - 1
                self.reset_buf[:] = torch.where(late, 1, self.reset_buf)
                self.extras["time_outs"] = late & (self.reset_buf != 0)
                self.extras["episode"] = {"level": torch.tensor(float(self.curriculum))}
                self.extras["stiffness"] = self.stiffness
                return self.reset(), self.rew_buf, self.reset_buf, self.extras
            def set_train_info(self, env_frames, *args):
                self.curriculum += 1
            def get_env_state(self):
                return {"curriculum": self.curriculum}
            def set_env_state(self, env_state):
                self.curriculum = env_state["curriculum"]
    """,
}
CONFIG = dict(num_envs="", seed=42, max_iterations="", pipeline="gpu", sim_device="cuda:0")
CONFIG.update(rl_device="cuda:0", graphics_device_id=0, headless=False)
CONFIG["defaults"] = [{"task": "Ant"}, {"train": "${task}PPO"}, "_self_"]
ENV = {"numEnvs": "${resolve_default:64,${...num_envs}}", "stiffness": 1}
SIM = {"use_gpu_pipeline": '${eq:${...pipeline},"gpu"}'}
SIM["physx"] = {"use_gpu": '${contains:"cuda",${....sim_device}}'}
ANT = facts("AntPPO")
ANT.update({"seed": "${...seed}", "config.num_actors": "${....task.env.numEnvs}"})
ANT.update({"config.max_epochs": "${resolve_default:4,${....max_iterations}}"})
ANT.update({"config.horizon_length": 8, "config.minibatch_size": 256, "config.tau": 0.9})
ANT.update({"network.mlp.units": [16], "config.mini_epochs": 1})
ANT.update({"config.save_best_after": 2, "config.save_frequency": 2, "config.new": 1})
TASKS = {  # task: (additions to its env, changes to AntPPO.yaml)
    "Ant": ({}, {}),
    "Trifinger": ({}, {"config.minibatch_size": "${.num_actors}"}),
    "AllegroKuka": ({"numStates": 5}, {}),
    "Hand": ({"numStates": 5}, SEEING),
    "HandWithoutStates": ({}, SEEING),
}


def write_isaacgym(folder):
    files = {path: textwrap.dedent(text) for path, text in FILES.items()}
    cfg = "isaacgymenvs/cfg"
    files[f"{cfg}/config.yaml"] = json.dumps(CONFIG)
    for name, (env, changes) in TASKS.items():
        task = json.dumps({"name": name, "env": {**ENV, **env}, "sim": SIM})
        files[f"{cfg}/task/{name}.yaml"] = task
        files[f"{cfg}/train/{name}PPO.yaml"] = json.dumps({"params": nested({**ANT, **changes})})
    other = json.dumps({"params": nested({**ANT, "config.gamma": 0.9})})
    files[f"{cfg}/train/AntOther.yaml"] = files[f"{cfg}/train/AntSAC.yaml"] = other
    files[f"{cfg}/task/AntSAC.yaml"] = files[f"{cfg}/task/Ant.yaml"]
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


COMMANDS = {
    "train": "--env-id Ant --num-steps 16",
    "again": "--env-id Ant --num-steps 16 --max-epochs 2",
    "continue": "--checkpoint runs/train --max-epochs 5",
    "overrides": "--env-id Ant --max-epochs 1 --overrides train=AntOther task.env.stiffness=3",
    "Trifinger": "--env-id Trifinger --num-envs 32 --max-epochs 1",
    "AllegroKuka": "--env-id AllegroKuka --max-epochs 1",
    "Hand": "--env-id Hand --max-epochs 1",
    "sim torch": "--env-id Cartpole --sim torch --num-envs 32 --max-epochs 1",
}
REFUSED = {
    "HandWithoutStates": ("--env-id HandWithoutStates", "no states for its central value network"),
    "Anymal": ("--env-id Anymal", " AllegroKuka, Ant, Hand, HandWithoutStates, Trifinger"),
    "AntSAC": ("--env-id AntSAC", " AllegroKuka, Ant, Hand, HandWithoutStates, Trifinger"),
    "Cartpole": ("--env-id Cartpole", "Hand"),
    "settings file": ("--env-id Ant --overrides train=AntFastPPO", "train=AntFastPPO"),
    "task option": ("--env-id Ant --overrides task.env.stiffnes=3", "task.env.stiffnes"),
    "override": ("--env-id Ant --overrides task.env.stiffness", "--overrides task.env.stiffness"),
}
# Each command in a process of its own, without importing torch for each again.
FORKS = """
import json, os, runpy, sys
import train_ppo  # before anything that imports torch
import isaacgymenvs, hydra, torch._dynamo
for name, words in json.loads(sys.argv[1]).items():
    if os.fork() == 0:
        for number, end in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{name}.{end}", os.O_WRONLY | os.O_CREAT), number)
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
        sys.exit(0)
    status = os.wait()[1]
    with open(f"{name}.code", "w") as file:
        file.write(str(status >> 8))
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """name of a command -> its Run."""
    folder = tmp_path_factory.mktemp("isaacgym")
    write_isaacgym(folder)
    flags = {**COMMANDS, **{name: row[0] for name, row in REFUSED.items()}}
    words = {}
    for name, text in flags.items():
        experiment = ["--experiment", name] if name in COMMANDS and "runs/" not in text else []
        words[name] = [SCRIPT, *text.split(), *experiment]
    words["evaluate"] = [str(ROOT / "tools/evaluate.py"), "runs/train", "--num-envs", "5"]
    environ = dict(os.environ, PYTHONPATH=f"{folder}:{ROOT}", CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "-c", FORKS, json.dumps(words)]
    subprocess.run(command, cwd=str(folder), env=environ, check=True, timeout=600)

    def found(name):
        out, err, code = [(folder / f"{name}.{end}").read_text() for end in ("out", "err", "code")]
        return Run(out, err, int(code), folder / "runs" / name)

    return found


def test_a_task_trains_with_its_own_settings_and_flags_win(ran):
    done = ran("train")
    assert done.code == 0 and "epoch 4/4" in done.out, done.err
    expected = dict(num_envs=64, num_steps=16, minibatch_size=256, gae_lambda=0.9)
    expected.update(max_epochs=4, save_best_after=2, save_frequency=2, max_grad_norm=0.0)
    expected.update(units=[16], reward_scale=0.01, vf_coef=2.0, update_epochs=1)
    args = done.state("epoch_4.pth")["args"]
    assert {name: type(value)(args[name]) for name, value in expected.items()} == expected
    assert {"new", "score_to_win"} <= set(unused(done.out + done.err))
    assert done.files == ["best.pth", "epoch_2.pth", "epoch_4.pth", "last.pth"]
    levels = [value for _, value in done.curves["Episode/level"]]
    assert levels == [1, 2, 3, 4, 5], "it goes on when the run is continued"


def test_a_seed_repeats_a_run_whatever_the_simulator_draws(ran):
    assert same_state(*(ran(name).state("epoch_2.pth") for name in ("train", "again"))) == []


def test_a_task_continues_and_is_evaluated_without_its_flags(ran):
    done = ran("continue")
    assert done.code == 0 and "the env starts new episodes" in done.out, done.err
    assert ran("train").state()["epoch"] == 5
    done = ran("evaluate")
    assert done.code == 0 and "30.0" in done.out and "5 episodes" in done.out, done.err


def test_overrides_and_num_envs_reach_the_settings_and_the_task(ran):
    done = ran("overrides")
    assert done.state()["args"]["gamma"] == 0.9, done.err
    assert [value for _, value in done.curves["stiffness/iter"]] == [3.0]
    args = ran("Trifinger").state()["args"]
    assert (args["num_envs"], args["minibatch_size"]) == (32, 32)


def test_critic_sees_the_states_only_with_a_central_value_network(ran):
    blind = ran("AllegroKuka").state()
    assert blind["num_states"] == 0 and "state_mean_std.running_mean" not in blind["model"]
    done = ran("Hand")
    seeing = done.state()
    assert "central.learning_rate" in unused(done.out + done.err)
    shapes = {name: tuple(value.shape) for name, value in seeing["model"].items()}
    assert shapes["a2c_network.actor_mlp.0.weight"] == (16, 3)
    assert shapes["a2c_network.critic_mlp.0.weight"] == (48, 5)
    assert shapes["a2c_network.value.weight"] == (1, 48)
    assert seeing["model"]["state_mean_std.running_mean"].abs().max() > 0.01


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_one_line(name, ran):
    done = ran(name)
    lines = [line for line in done.err.splitlines() if not line.startswith("warning: ")]
    assert (done.code, len(lines)) == (1, 1), done.err
    assert lines[0].startswith("error: ") and REFUSED[name][1] in lines[0]
    trained = {name for name in COMMANDS if name != "continue"}
    assert set(os.listdir(str(done.folder.parent))) == trained, "and nothing is written"


def test_isaacgym_imported_too_late_says_why(here):
    """Here torch has been imported before."""
    write_isaacgym(here)
    sys.path.insert(0, str(here))
    spec = importlib.util.spec_from_file_location("my_train_ppo", SCRIPT)
    module = sys.modules["my_train_ppo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit, match="error: .*PyTorch was imported before isaacgym"):
        module.main(["--env-id=Ant"])
