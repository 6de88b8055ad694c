"""tools/evaluate.py says what a policy is worth, tools/export_policy.py puts it on a robot."""

import copy
import json
import math
import os
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from harness import (
    ENV,
    ROOT,
    SMALL,
    Env,
    refused,
    run,
    snapshot,
    torchscript,
)
from PIL import Image

import train_ppo

EVALUATE = ROOT / "tools" / "evaluate.py"
EXPORT = ROOT / "tools" / "export_policy.py"
CONVERT = ROOT / "tools" / "from_rl_games.py"


def evaluated(*words):
    """The JSON of an evaluation, which must be JSON: no NaN, no Infinity."""
    run(*words, "--json=result.json", script=EVALUATE)
    return json.loads(Path("result.json").read_text(), parse_constant=pytest.fail)


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


class Numbered(Env):
    """The reward is 1 in the second episode, of which the first one is under way at reset(), and
    101 in all others; and so is what it reports."""

    def __init__(self, *args, first=0, **keywords):
        super().__init__(*args, **keywords)
        self.number = torch.zeros(self.num_envs)
        self.t += torch.as_tensor(first)  # where in its first episode an environment begins

    def reset(self):
        self.number.zero_()
        return super().reset()

    def step(self, actions):
        obs, reward, done, infos = super().step(actions)
        reward[:] = 1.0 + 100.0 * (self.number != 1)
        ended = reward[done.bool()]
        if len(ended):
            infos["episode"] = {"key": ended, "nothing": torch.full_like(ended, math.nan)}
        infos["episode_cumulative"] = {"key": reward.clone()}
        infos["speed"] = 2.0
        self.number += done
        return obs, reward, done, infos


def make_numbered(num_envs, device, seed):
    return Numbered(num_envs, device, seed, **ENV)


SECOND_EPISODES = {
    "short ones do not win": (
        dict(lengths=[1] * 5 + [9] * 5),
        dict(mean=5, std=4, min=1, max=9, length=5, count=10),
    ),
    "begun at different times": (
        dict(lengths=20, first=list(range(0, 20, 2))),
        dict(mean=20, std=0, min=20, max=20, length=20, count=10),
    ),
}


@pytest.mark.parametrize("env, expected", SECOND_EPISODES.values(), ids=SECOND_EPISODES)
def test_exactly_the_second_episode_of_each_env_counts(env, expected, here):
    """For the return and for the env's metrics."""
    ENV.clear()
    ENV.update(env)
    flags = ["--env-id=test_tools:make_numbered", "--num-envs=10"]
    run(*flags, "--num-steps=8", "--max-epochs=1", "--experiment=r")
    result = evaluated("runs/r", *flags)
    assert {name: result[name] for name in expected} == expected
    low, high = expected["min"], expected["max"]
    assert result["metrics"] == {
        "Episode/key": 1.0,
        "Episode/nothing": None,
        "episode_cumulative/key": expected["mean"],
        "episode_cumulative_min/key_min": low,
        "episode_cumulative_max/key_max": high,
        "speed": 2.0,
    }
    done = run("runs/r", *flags, script=EVALUATE)
    assert f"mean {expected['mean']:.2f} " in done.out and "Episode/key 1\n" in done.out
    assert done.err == ""


ACTIONS = []  # (observations, actions) of each step of the environment below


def make_recorded(num_envs, device, seed):
    env = train_ppo.Cartpole(num_envs, device)
    step = env.step

    def recorded_step(actions):
        ACTIONS.append((env.reset()["obs"].clone(), actions.clone()))
        return step(actions)

    env.step = recorded_step
    return env


def test_actions_are_the_mean_ones_or_sampled(here):
    env = "--env-id=test_tools:make_recorded"
    state = run(*SMALL, env).state()
    state["model"]["a2c_network.sigma"] += 1.0
    state["model"]["a2c_network.mu.weight"] *= 100.0  # so that some actions are clipped
    torch.save(state, "noisy.pth")
    results = []
    for flags in ([], [], ["--stochastic"]):
        del ACTIONS[:]
        results.append(evaluated("noisy.pth", "--num-envs=8", env, *flags)["mean"])
        errors = [(by_hand(state, obs) - actions).abs().max() for obs, actions in ACTIONS[1:]]
        assert len(errors) > 20 and (max(errors) < 1e-3) == (not flags)
    assert results[0] == results[1] != results[2]


def test_critic_that_sees_more_is_not_needed(here):
    run(*SMALL, "--experiment=r", env=dict(num_states=3))
    outputs = [run("runs/r", env=dict(num_states=n), script=EVALUATE).out for n in (3, 0)]
    assert outputs[0] == outputs[1] and "reward mean" in outputs[0]


def test_a_folder_means_its_best_policy_and_num_envs_its_own_or_64(here):
    flags = ["--num-envs=100", "--num-steps=4", "--max-epochs=1", "--experiment=r"]
    done = run(*flags)
    assert evaluated("runs/r")["checkpoint"].endswith("runs/r/nn/last.pth")
    state = done.state()
    torch.save(dict(state, epoch=0), "runs/r/nn/best.pth")
    before = snapshot("runs")
    result = evaluated("runs/r")
    assert result["checkpoint"].endswith("runs/r/nn/best.pth") and result["epoch"] == 0
    assert (result["count"], evaluated("runs/r", "--num-envs=3")["count"]) == (64, 3)
    assert snapshot("runs") == before, "it writes nothing there"


def test_film_is_a_gif_of_as_many_frames_as_asked_for(here):
    run(*SMALL, "--experiment=r")
    done = run("runs/r", "--film=policy.gif", "--length=12", script=EVALUATE)
    assert "wrote policy.gif" in done.out and done.err == ""
    with Image.open("policy.gif") as gif:
        assert (gif.format, gif.n_frames, gif.size) == ("GIF", 12, (600, 320))


def test_evaluation_says_at_once_what_it_does_and_then_how_far_it_is(here):
    run(*SMALL, "--experiment=r", env={})
    done = run("runs/r", env={"exit_at": 2}, code=1, script=EVALUATE)
    assert re.match("evaluating a whole episode of each env: runs/r/", done.out)
    done = run("runs/r", env={"lengths": 250}, script=EVALUATE)
    assert re.findall(r"^step (\d+)$", done.out, re.M) == ["200", "400"]


# EXPORT ===========================================================================================


def exported(folder):
    """{file: f(observations) -> actions}, as a robot would call them: without train_ppo."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(f"{folder}/policy.onnx")
    return {
        "policy.onnx": lambda obs: torch.from_numpy(session.run(None, {"obs": obs.numpy()})[0]),
        "policy.pt": torch.jit.load(f"{folder}/policy.pt"),
    }


METADATA = {"joint_names": ["hip", "knee"], "control_hz": 60.0}
OWN_CRITIC = dict(num_states=3, policy_metadata=lambda: METADATA)
RAW = ["--no-normalize-input", "--no-clip-actions"]
POLICIES = {name: ([f"--activation={name}"], {}) for name in train_ppo.ActorCritic.ACTIVATIONS}
POLICIES.update(
    {
        "the built-in env": ([], None),
        "nothing is normalised or clipped": (RAW, {}),
        "a critic that sees more": (["--critic-units", "8"], OWN_CRITIC),
    }
)


@pytest.mark.parametrize("flags, env", POLICIES.values(), ids=POLICIES)
def test_exported_policy_acts_as_the_checkpoint(flags, env, here):
    state = run(*SMALL[:2], "--max-epochs=1", *flags, env=env).state()
    state["model"]["a2c_network.mu.bias"] += 1.0  # so that some actions are clipped
    state["model"]["a2c_network.actor_mlp.0.weight"] *= 10.0  # so that large numbers overflow
    torch.save(state, "policy.pth")
    done = run("policy.pth", "out/policy", script=EXPORT)
    assert done.err == "" and "warn" not in done.out.lower()
    size = state["num_obs"]
    for n in (1, 7, 513):
        obs = torch.randn(n, size) * 10.0 ** torch.randint(-3, 3, (n, 1))
        for act in exported("out/policy").values():
            torch.testing.assert_close(act(obs), by_hand(state, obs), atol=1e-4, rtol=1e-5)
    about = json.loads(Path("out/policy/policy.json").read_text(), parse_constant=pytest.fail)
    assert sorted(about["largest_difference"]) == ["policy.onnx", "policy.pt"]
    assert about["env_id"] == state["args"]["env_id"] and about["epoch"] == 1
    assert about["input"]["size"] == size and about["output"]["size"] == state["num_acts"]
    assert about["input"]["clip"] == (5.0 if env is None else None)
    assert about["output"]["clip"] == (None if flags == RAW else 1.0)
    metadata = METADATA if env is OWN_CRITIC else {}
    props = pytest.importorskip("onnx").load("out/policy/policy.onnx").metadata_props
    assert about["metadata"] == metadata == {x.key: json.loads(x.value) for x in props}
    assert sorted(os.listdir("out")) == ["policy"]


def test_lines_for_a_robot_work_as_printed_with_the_best_policy(here, capsys):
    pytest.importorskip("onnxruntime")
    run(*SMALL, "--experiment=r")
    os.rename("runs/r/nn/epoch_2.pth", "runs/r/nn/best.pth")
    state = train_ppo.load_checkpoint("runs/r/nn/best.pth")
    run("runs/r", "policy", script=EXPORT)
    lines = EXPORT.read_text().split('"""')[1].split("On the robot:")[1]
    exec(textwrap.dedent(lines), {})
    printed = float(capsys.readouterr().out.strip("[]\n"))
    assert printed == pytest.approx(float(by_hand(state, torch.zeros(1, 4))), abs=1e-5)


def test_export_without_onnx_says_what_to_install_and_then_the_same_command_adds_it(here):
    pytest.importorskip("onnxruntime")
    run(*SMALL, "--experiment=r")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
        done = run("runs/r", "policy", script=EXPORT)
    assert re.fullmatch("warning: policy.onnx .* pip install onnx onnxruntime.*\n", done.err)
    assert sorted(os.listdir("policy")) == ["policy.json", "policy.pt"]
    assert run("runs/r", "policy", script=EXPORT).err == ""
    assert sorted(os.listdir("policy")) == ["policy.json", "policy.onnx", "policy.pt"]


def test_export_that_differs_leaves_no_file(here, monkeypatch):
    """It is compared with the checkpoint's policy, not with itself."""
    run(*SMALL, "--experiment=r")
    trace = torch.jit.trace

    def without_normaliser(policy, example):
        policy = copy.deepcopy(policy)
        policy.model.running_mean_std = torch.nn.Identity()
        return trace(policy, example)

    monkeypatch.setattr(torch.jit, "trace", without_normaliser)
    assert re.search("differs .*'policy.pt': ", refused("runs/r", "out", script=EXPORT))


# REFUSALS =========================================================================================

OWN = "--env-id=harness:make_env"
REFUSED = {
    "no such run": (EVALUATE, ["runs/none", OWN], "runs/none .*No such file"),
    "module:factory missing": (EVALUATE, ["runs/r"], "repeat --env-id harness:make_env"),
    "nowhere to write": (EVALUATE, ["runs/r", OWN, "--json=no/x"], "no/x cannot be written"),
    "no picture": (EVALUATE, ["runs/r", OWN, "--film=x.gif"], "no render.mode=.rgb_array"),
    "no end in sight": (EVALUATE, ["runs/r", OWN], "no env has ended"),
    "no envs": (EVALUATE, ["runs/r", OWN, "--num-envs=-1"], "--num-envs .* at least 1"),
    "evaluates TorchScript": (EVALUATE, ["evil.pth"], "evil.pth cannot be used"),
    "exports TorchScript": (EXPORT, ["evil.pth", "new"], "evil.pth cannot be used"),
    "converts TorchScript": (CONVERT, ["evil.pth", "new.pth"], "evil.pth"),
    "folder of other things": (EXPORT, ["runs/r", "mine"], "mine exists already"),
    "a file is there": (EXPORT, ["runs/r", "mine/file"], "mine/file exists already"),
    "no such file": (EXPORT, ["none.pth", "new"], "none.pth cannot be used: .*No such file"),
    "no run": (EXPORT, ["mine", "new"], "mine has no readable checkpoint"),
    "other network": (EXPORT, ["other.pth", "new"], "other.pth does not fit .*mu.bias"),
    "version 1": (EXPORT, ["old.pth", "new"], "old.pth is not a checkpoint of this version"),
}


@pytest.mark.parametrize("script, words, message", REFUSED.values(), ids=REFUSED)
def test_tool_refuses_in_one_line_writes_nothing_and_runs_no_code(script, words, message, here):
    state = run(*SMALL[:2], "--max-epochs=1", "--experiment=r", env={}).state()
    ENV.update(lengths=999, max_episode_length=5)
    torch.save(dict(state, format_version=2), "old.pth")
    del state["model"]["a2c_network.mu.bias"]
    torch.save(state, "other.pth")
    os.mkdir("mine")
    Path("mine/file").write_text("mine")
    torchscript("evil.pth")
    assert re.search(message, refused(*words, script=script))
