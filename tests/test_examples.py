"""examples/: each one does what its page says."""

import importlib.util
import json
import math
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
from harness import ROOT, SMALL, differences, finish, refused, run, same_state, start, wait_for
from PIL import Image
from PIL.ImageSequence import Iterator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from examples.record_video import RecordVideo

try:
    from examples import mujoco_ant as ant
except ImportError:
    ant = None
needs_mujoco = pytest.mark.skipif(ant is None, reason='needs pip install "mujoco>=3.3"')

# ENVIRONMENTS =====================================================================================


def test_own_env_is_learned(here):
    curves = run("--env-id=examples.own_env:make_env", "--max-epochs=20").curves
    names = ("rewards/iter", "distance/iter", "episode_lengths/iter")
    reward, distance, length = ([value for _, value in curves[name]] for name in names)
    assert reward[0] < 20 and reward[-1] > 75, "of at most 100"
    assert distance[-1] < distance[0] / 2
    assert length[0] < 50 and length[-1] > 99.9, "the first episodes start anywhere"


@pytest.mark.parametrize(
    "name, num_states",
    [pytest.param("mujoco_ant", 0, marks=needs_mujoco), ("privileged_critic", 4)],
)
def test_env_with_exact_state_continues_to_the_last_bit(name, num_states, here):
    flags = [f"--env-id=examples.{name}:make_env", "--num-envs=16", "--num-steps=8"]
    flags += ["--minibatch-size=64"]
    whole = run(*flags, "--max-epochs=4", "--experiment=whole").state()
    run(*flags, "--max-epochs=2", "--experiment=parts")
    done = run(flags[0], "--checkpoint=runs/parts", "--max-epochs=4")
    assert "exactly where it stopped" in done.out
    assert same_state(whole, done.state()) == []
    assert whole["num_states"] == num_states


@pytest.mark.skipif(not importlib.util.find_spec("mjlab"), reason="needs mjlab (Python >= 3.10)")
def test_mjlab_env_trains(here, monkeypatch):
    """On a Cartpole whose episodes end by the clock after 50 steps and, in every other environment,
    by a termination after 40."""
    from mjlab.managers.termination_manager import TerminationTermCfg
    from mjlab.tasks.registry import load_env_cfg, register_mjlab_task

    from examples import mjlab_env

    def even_and_late(env):
        return (torch.arange(env.num_envs) % 2 == 0) & (env.episode_length_buf >= 40)

    cfg = load_env_cfg(mjlab_env.TASK)
    cfg.episode_length_s = 2.5
    cfg.terminations["even"] = TerminationTermCfg(even_and_late)
    register_mjlab_task("Short", cfg, cfg, None)
    monkeypatch.setattr(mjlab_env, "TASK", "Short")
    env = mjlab_env.make_env(2, "cpu", seed=0)
    env.reset()
    ended = {}
    for t in range(1, 51):
        _, _, done, infos = env.step(torch.zeros(2, env.num_acts))
        if done.any():
            ended[t] = (done.tolist(), infos["time_outs"].tolist())
    assert ended == {40: ([True, False], [False, False]), 50: ([False, True], [False, True])}
    flags = "--num-envs=64 --minibatch-size=512 --num-steps=16 --max-epochs=4 --device=cpu"
    done = run("--env-id=examples.mjlab_env:make_env", *flags.split())
    assert "warning: " not in done.err
    curves, state = done.curves, done.state()
    assert curves["episode_lengths/iter"][0][1] < 20, "the first episodes start anywhere"
    assert {f"Episode/Episode_Termination/{x}" for x in ("time_out", "even")} < set(curves)
    assert state["num_states"] == 5, "mjlab's critic group"
    assert state["env_state"] == {"common_step_counter": 1 + 4 * 16}, "the first is check_env's"


# OBSERVERS ========================================================================================


def test_own_observer_runs_as_the_command_does(here):
    """With its flags and exit codes; its file has what TensorBoard has."""
    script = ROOT / "examples" / "own_observer.py"
    process = start(*SMALL[:2], "--experiment=r", "--max-epochs=1000000", script=script)
    path = Path("runs/r/metrics.jsonl")
    wait_for(lambda: path.exists() and path.read_text().count("\n") >= 3, process)
    process.terminate()
    done = finish(process, code=128 + signal.SIGTERM)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    epochs = range(1, done.state()["epoch"] + 1)
    assert [line.pop("epoch") for line in lines] == list(epochs)
    assert [line.pop("frame") for line in lines] == [256 * n for n in epochs]
    assert {"losses/a_loss", "rewards/iter"} <= set().union(*lines) == set(done.curves)
    for tag, points in done.curves.items():
        written = [line[tag] for line in lines if tag in line]
        assert written == pytest.approx([value for _, value in points], rel=1e-6), tag
    assert refused("--gamma=-1", script=script) == "error: --gamma must be >= 0, not -1.0"


def test_videos_are_real_and_shown_in_tensorboard_and_change_no_weight(here):
    flags = [*SMALL, "--max-epochs=5"]
    plain = run(*flags, "--experiment=plain").state()
    done = run(*flags, observers=[RecordVideo(every=3, length=20)])
    assert done.err == ""
    files = sorted((done.folder / "videos").iterdir())
    assert [path.name for path in files] == ["epoch_1.gif", "epoch_4.gif"]
    for path, length in zip(files, (20, 16)):  # training ends in the second one
        with Image.open(str(path)) as gif:  # equal pictures in a row are stored as one
            pages = [(page.info["duration"], page.convert("RGB")) for page in Iterator(gif)]
        assert [milliseconds for milliseconds, _ in pages] == [20] * length
        assert pages[0][1].size == (600, 320) and pages[0] != pages[-1]
    shown = [
        (event.step, value.tensor.string_val[2])
        for path in (done.folder / "summaries").glob("events*")
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.tag == "video"
    ]
    # The first one ends in epoch 3, after two of 256 frames.
    assert shown == [(n * 256, path.read_bytes()) for n, path in zip((2, 5), files)]
    for key in ("model", "optimizer", "env_state", "obs", "rng"):
        assert differences(plain[key], done.state()[key]) == [], key


@pytest.mark.parametrize("env, message", [(None, "No space left"), ({}, "the env has no render(")])
def test_video_trouble_is_one_warning(env, message, here, monkeypatch):
    if env is None:
        full_disk = mock.Mock(side_effect=OSError("No space left on device"))
        monkeypatch.setattr("PIL.Image.Image.save", full_disk)
    done = run(*SMALL, env=env, observers=[RecordVideo(every=1, length=99)])
    assert done.err.count("warning: going on without RecordVideo") == 1 and message in done.err
    assert done.state()["epoch"] == 4


# MUJOCO'S ANT =====================================================================================

E = 16


@pytest.fixture
def env():
    if ant is None:
        pytest.skip('needs pip install "mujoco>=3.3"')
    torch.manual_seed(0)
    env = ant.make_env(E, "cpu", seed=0)
    yield env
    env.close()


def test_ant_keeps_the_contract(env):
    assert torch.equal(env.reset()["obs"], env.reset()["obs"])  # reset() resets nothing
    assert len(ant.OBSERVATIONS) == env.num_obs == 60
    for _ in range(50):
        obs, reward, done, infos = env.step(2.0 * torch.rand(E, 8) - 1.0)
        assert (obs["obs"].shape, obs["obs"].dtype) == ((E, 60), torch.float32)
        assert obs["obs"].abs().max() <= env.clip_obs
        assert (reward.shape, reward.dtype) == ((E,), torch.float32)
        for flags in (done, infos["time_outs"]):
            assert (flags.shape, flags.dtype) == ((E,), torch.bool)
        assert ("episode" in infos) == bool(done.any())


def test_ant_episodes_end_by_the_clock_or_by_a_fall(env):
    env.clock[:] = 998
    assert not env.step(torch.zeros(E, 8))[2].any()
    state = {name: value.clone() for name, value in env.get_env_state().items()}
    state["physics"][:2, 4:8] = torch.tensor([0.0, 1.0, 0.0, 0.0])  # two of them upside down
    state["physics"][0, 1:4] = torch.tensor([7.0, 0.0, 0.30])
    state["physics"][1, 3] = 0.32  # low, but not fallen yet
    env.set_env_state(state)
    obs, reward, done, infos = env.step(torch.zeros(E, 8))
    assert done.all() and infos["time_outs"].tolist() == [False] + [True] * (E - 1)
    assert reward[0] == -2.0 and (reward[2:] > 0).all()
    assert infos["episode"]["falls"].tolist() == [1.0] + [0.0] * (E - 1)
    metres = infos["episode"]["metres"]
    assert metres[0].item() == pytest.approx(7.0, abs=0.1) and metres[1:].abs().max() < 0.5
    assert torch.allclose(obs["obs"][:, 0], torch.tensor(0.44))  # the next episode's first one
    assert not obs["obs"][:, 28:].any()  # neither contact nor action yet


def test_ant_starts_as_the_original_does(env):
    low, high = env.limits.unbind(1)
    degrees = torch.tensor([0.0, 30.0, 0.0, -30.0, 0.0, -30.0, 0.0, 30.0], dtype=torch.float64)
    physics = env._new_episodes(1000)[0]
    angles = physics[:, 8:16]
    assert (angles >= low).all() and (angles <= high).all()
    assert 0.19 < (angles - degrees.deg2rad()).abs().max() <= 0.2 + 1e-9
    assert 0.09 < physics[:, 22:30].abs().max() <= 0.1
    start_pose = torch.tensor([0.0, 0.0, 0.44, 1.0, 0.0, 0.0, 0.0])
    assert torch.equal(physics[:, 1:8].float(), start_pose.expand(1000, 7))
    assert env.model.opt.timestep * 2 == pytest.approx(1 / 60)
    assert (env.model.actuator_gear[:, 0] == 15.0).all()
    assert env.model.body_mass.sum() == pytest.approx(0.91, abs=0.01)


def test_ant_reward_is_the_written_formula(env):
    for _ in range(20):
        env.step(2.0 * torch.rand(E, 8) - 1.0)
    before = env.physics
    _, reward, done, _ = env.step(torch.zeros(E, 8))
    after, running, low, high = env.physics, ~done, *env.limits.unbind(1)
    assert running.sum() > E // 2
    old, new = (torch.hypot(1000.0 - p[:, 1], p[:, 2]) for p in (before, after))
    x, y, (w, i, j, k) = after[:, 1], after[:, 2], after[:, 4:8].t()
    heading = ((1 - 2 * (j * j + k * k)) * (1000.0 - x) - 2 * (i * j + w * k) * y) / new
    expected = (old - new) * 60.0 + 0.5 + 0.1 * (1 - 2 * (i * i + j * j) > 0.93)
    expected += torch.where(heading > 0.8, 0.5, 0.5 * heading / 0.8)
    expected -= 0.1 * ((after[:, 8:16] - low) / (high - low) > 0.995).sum(1)
    torch.testing.assert_close(reward[running].double(), expected[running], atol=1e-4, rtol=0)
    obs = ant.observe(after, torch.zeros(E, 24), torch.ones(E, 8), env.limits)
    cost = ant.compute_reward(obs * (torch.arange(60) < 52), 0.0) - ant.compute_reward(obs, 0.0)
    expected = 0.005 * 8 + 0.05 * 0.2 * after[:, 22:30].abs().sum(1)
    assert torch.allclose(cost[running], expected[running])


def test_ant_observes_in_the_torsos_frame(env):
    physics, yaw = env.physics[:1].clone(), 2.0
    physics[0, 1:4] = torch.tensor([1000.0, -1000.0, 0.5])  # so the target is at 90 degrees
    physics[0, 4:8] = torch.tensor([math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)])
    physics[0, 16:22] = torch.tensor([3 * math.cos(yaw), 3 * math.sin(yaw), 0.2, 0.1, 0.2, 0.3])
    obs = ant.observe(physics, torch.ones(1, 24), torch.zeros(1, 8), env.limits)[0]
    turn = math.pi / 2 - yaw
    expected = [0.5, 3.0, 0.0, 0.2, 0.1, 0.2, 0.3, yaw, 0.0, turn, 1.0, math.cos(turn)]
    assert obs[:12].tolist() == pytest.approx(expected, abs=1e-6)
    assert obs[28:52].tolist() == pytest.approx([0.1] * 24)


def test_ant_goes_on_to_the_last_bit_with_any_number_of_threads(env, monkeypatch):
    env.clock[:3] = 995  # new episodes, which draw noise, are in the steps that are compared
    state, runs = {name: value.clone() for name, value in env.get_env_state().items()}, []
    monkeypatch.setenv("ANT_THREADS", str(len(env.datas) + 1))
    other = ant.make_env(E, "cpu", seed=1)
    assert len(other.datas) == len(env.datas) + 1
    for going_on in (env, other):
        going_on.set_env_state(state)
        torch.manual_seed(1)
        runs.append([going_on.step(2.0 * torch.rand(E, 8) - 1.0)[:3] for _ in range(10)])
    assert any(done.any() for _, _, done in runs[0])
    assert differences(*runs) == []


def test_ant_says_what_a_robot_needs_and_is_drawn(env):
    metadata = json.loads(json.dumps(env.policy_metadata()))
    assert metadata == env.policy_metadata(), "nothing that JSON does not know"
    joints = [env.model.joint(j).name for j in env.model.actuator_trnid[:, 0]]
    assert metadata["action_names"] == joints == ant.JOINTS
    assert metadata["observation_names"] == ant.OBSERVATIONS
    assert (metadata["control_hz"], metadata["torque_per_action_nm"]) == (60.0, 15.0)
    try:
        picture = env.render(mode="rgb_array")
    except RuntimeError as error:
        assert "MUJOCO_GL=egl" in str(error) and "\n" not in str(error)
        pytest.skip(str(error))
    assert picture.shape == (360, 480, 3) and picture.dtype.name == "uint8"
    assert picture.std() > 10
