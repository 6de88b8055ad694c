"""tools/evaluate.py says what a policy is worth, tools/export_policy.py puts it on a robot."""

import json
import math
import os
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from harness import ENV, ROOT, SMALL, refused, run, snapshot, torchscript
from PIL import Image

import train_ppo

EVALUATE = ROOT / "tools" / "evaluate.py"
EXPORT = ROOT / "tools" / "export_policy.py"


def evaluated(*words, env=None):
    """The JSON of an evaluation, which must be JSON: no NaN, no Infinity."""
    done = run(*words, "--json=result.json", env=env, script=EVALUATE)
    result = json.loads(Path("result.json").read_text(), parse_constant=pytest.fail)
    assert f"reward mean {result['mean']:.2f} std " in done.out and done.err == ""
    return result


def by_hand(state, obs):
    """The mean actions of a checkpoint, written out; obs (n, O)."""
    w = {name: x.double() for name, x in state["model"].items()}
    x = obs.double().clamp(-state["clip_obs"], state["clip_obs"])
    if "running_mean_std.running_mean" in w:
        x = x - w["running_mean_std.running_mean"]
        x = (x / (w["running_mean_std.running_var"] + 1e-5).sqrt()).clamp(-5, 5)
    name = {"swish": "silu"}.get(state["args"]["activation"], state["args"]["activation"])
    for i in (0, 2):
        x = x @ w[f"a2c_network.actor_mlp.{i}.weight"].t() + w[f"a2c_network.actor_mlp.{i}.bias"]
        x = getattr(torch.nn.functional, name)(x)
    x = x @ w["a2c_network.mu.weight"].t() + w["a2c_network.mu.bias"]
    return (x.clamp(-1, 1) if state["args"]["clip_actions"] else x).float()


# EVALUATION =======================================================================================


def numbered(env):
    """infos of an Env, which is half-way in its first episode when its evaluation begins. Rewards
    and metrics are 1 in the second episode and 101 in all others."""
    if env.steps == 1:  # the check of the env
        env.number = torch.zeros(env.num_envs)
        env.t[:] = env.lengths // 2
    env.reward[:] = 1.0 + 100.0 * (env.number != 1)
    infos = {"episode_cumulative": {"key": env.reward.clone()}, "speed": 2.0}
    ended = env.reward[env.done.bool()]
    if len(ended):
        infos["episode"] = {"key": ended, "nothing": torch.full_like(ended, math.nan)}
    env.number += env.done
    return infos


def test_exactly_the_second_episode_of_each_env_counts(here):
    """For the return and for the env's metrics. Envs with short episodes count no more."""
    env = dict(lengths=[2] * 5 + [10] * 5, infos=numbered)
    flags = ("--num-envs=10", "--num-steps=8", "--max-epochs=1", "--experiment=r")
    run(*flags, env=dict(env, num_states=3))  # for the critic, which is not needed here
    result = evaluated("runs/r", env=env)
    expected = dict(mean=6, std=4, min=2, max=10, length=6, count=10)
    assert {name: result[name] for name in expected} == expected
    assert result["metrics"] == {
        "Episode/key": 1.0,
        "Episode/nothing": None,
        "episode_cumulative/key": 6.0,
        "episode_cumulative_min/key_min": 2.0,
        "episode_cumulative_max/key_max": 10.0,
        "speed": 2.0,
    }


def test_actions_are_the_mean_ones_or_sampled_and_can_be_filmed(here, monkeypatch):
    state = run(*SMALL).state()
    state["model"]["a2c_network.sigma"] += 1.0
    state["model"]["a2c_network.mu.weight"] *= 100.0  # so that some actions are clipped
    torch.save(state, "noisy.pth")
    errors, step = [], train_ppo.Cartpole.step

    def compared_step(env, actions):
        errors.append((by_hand(state, env.reset()["obs"]) - actions).abs().max())
        return step(env, actions)

    monkeypatch.setattr(train_ppo.Cartpole, "step", compared_step)
    means = []
    for flags in ([], [], ["--stochastic", "--film=policy.gif", "--length=12"]):
        del errors[:]
        means.append(evaluated("noisy.pth", "--num-envs=8", *flags)["mean"])
        assert len(errors) > 20 and (max(errors) < 1e-3) == (not flags)
    assert means[0] == means[1] != means[2]
    with Image.open("policy.gif") as gif:
        assert (gif.format, gif.n_frames, gif.size) == ("GIF", 12, (600, 320))


def test_a_folder_means_its_best_policy_and_num_envs_its_own_or_64(here):
    flags = ("--num-envs=100", "--num-steps=4", "--max-epochs=1", "--experiment=r")
    state = run(*flags, env={}).state()
    assert evaluated("runs/r", env={})["checkpoint"].endswith("runs/r/nn/last.pth")
    torch.save(dict(state, epoch=0), "runs/r/nn/best.pth")
    before = snapshot("runs")
    result = evaluated("runs/r", env={})
    assert result["checkpoint"].endswith("runs/r/nn/best.pth") and result["epoch"] == 0
    assert (result["count"], evaluated("runs/r", "--num-envs=3", env={})["count"]) == (64, 3)
    assert snapshot("runs") == before, "it writes nothing there"


# EXPORT ===========================================================================================


def exported_actions(folder, obs):
    """Those of both files, called as on a robot: without train_ppo."""
    session = pytest.importorskip("onnxruntime").InferenceSession(f"{folder}/policy.onnx")
    actions = session.run(None, {"obs": obs.numpy()})[0]
    return torch.from_numpy(actions), torch.jit.load(f"{folder}/policy.pt")(obs)


METADATA = {"joint_names": ["hip", "knee"], "control_hz": 60.0}
OWN_CRITIC = dict(num_states=3, policy_metadata=lambda: METADATA)
RAW = ["--no-normalize-input", "--no-clip-actions"]
POLICIES = {name: ([f"--activation={name}"], {}) for name in train_ppo.ActorCritic.ACTIVATIONS}
POLICIES["the built-in env"] = ([], None)
POLICIES["nothing is normalised or clipped"] = (RAW, {})
POLICIES["a critic that sees more"] = (["--critic-units", "8"], OWN_CRITIC)


@pytest.mark.parametrize("name", POLICIES)
def test_exported_policy_acts_as_the_checkpoint(name, here):
    flags, env = POLICIES[name]
    state = run(*SMALL[:2], "--max-epochs=1", *flags, env=env).state()
    state["model"]["a2c_network.mu.bias"] += 1.0  # so that some actions are clipped
    state["model"]["a2c_network.actor_mlp.0.weight"] *= 10.0  # so that large numbers overflow
    torch.save(state, "policy.pth")
    done = run("policy.pth", "out/policy", script=EXPORT)
    assert done.err == "" and os.listdir("out") == ["policy"]
    size = state["num_obs"]
    for n in (1, 7, 513):
        obs = torch.randn(n, size) * 10.0 ** torch.randint(-3, 3, (n, 1))
        for actions in exported_actions("out/policy", obs):
            torch.testing.assert_close(actions, by_hand(state, obs), atol=1e-4, rtol=1e-5)
    about = json.loads(Path("out/policy/policy.json").read_text(), parse_constant=pytest.fail)
    assert about["env_id"] == state["args"]["env_id"] and about["epoch"] == 1
    assert about["input"]["size"] == size and about["output"]["size"] == state["num_acts"]
    assert about["input"]["clip"] == (5.0 if env is None else None)
    assert about["output"]["clip"] == (None if flags == RAW else 1.0)
    metadata = METADATA if env is OWN_CRITIC else {}
    props = pytest.importorskip("onnx").load("out/policy/policy.onnx").metadata_props
    assert about["metadata"] == metadata == {x.key: json.loads(x.value) for x in props}


def test_lines_for_a_robot_work_as_printed_once_onnx_is_installed(here, capsys):
    """The best policy is exported; without onnx there is a warning and no policy.onnx."""
    pytest.importorskip("onnxruntime")
    run(*SMALL, "--experiment=r")
    os.rename("runs/r/nn/epoch_2.pth", "runs/r/nn/best.pth")
    state = train_ppo.load_checkpoint("runs/r/nn/best.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
        done = run("runs/r", "policy", script=EXPORT)
    assert re.fullmatch("warning: policy.onnx .* pip install onnx onnxruntime.*\n", done.err)
    assert sorted(os.listdir("policy")) == ["policy.json", "policy.pt"]
    assert run("runs/r", "policy", script=EXPORT).err == ""
    lines = EXPORT.read_text().split('"""')[1].split("On the robot:")[1]
    exec(textwrap.dedent(lines), {})
    printed = float(capsys.readouterr().out.strip("[]\n"))
    assert printed == pytest.approx(float(by_hand(state, torch.zeros(1, 4))), abs=1e-5)


def test_export_that_differs_from_the_checkpoint_leaves_no_file(here, monkeypatch):
    run(*SMALL, "--experiment=r")
    monkeypatch.setattr(torch.jit, "trace", lambda *_: torch.jit.script(torch.nn.Tanh()))
    assert re.search("differs .*'policy.pt': ", refused("runs/r", "out", script=EXPORT))


# REFUSALS =========================================================================================

OWN = "--env-id=harness:make_env"
REFUSED = {  # command: message
    f"evaluate runs/r {OWN} --json=no/x": "no/x cannot be written",
    f"evaluate runs/r {OWN} --film=x.gif": "no render.mode=.rgb_array",
    f"evaluate runs/r {OWN}": "no env has ended",
    "evaluate evil.pth": "evil.pth cannot be used",
    "export_policy evil.pth new": "evil.pth cannot be used",
    "from_rl_games evil.pth new.pth": "evil.pth",
    "export_policy runs/r mine": "mine exists already",
    "export_policy runs/r mine/file": "mine/file exists already",
}


@pytest.mark.parametrize("command", REFUSED)
def test_tool_refuses_in_one_line_writes_nothing_and_runs_no_code(command, here):
    run(*SMALL[:2], "--max-epochs=1", "--experiment=r", env={})
    ENV.update(lengths=999, max_episode_length=5)
    os.mkdir("mine")
    Path("mine/file").write_text("mine")
    torchscript("evil.pth")
    tool, *words = command.split()
    error = refused(*words, script=ROOT / "tools" / f"{tool}.py")
    assert re.search(REFUSED[command], error)
