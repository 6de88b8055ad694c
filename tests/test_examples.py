"""examples/: each one does what its page says."""

import importlib.util
import json
import math

import pytest
import torch
from harness import ROOT, SMALL, run, same_state
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.record_video import RecordVideo

try:
    from examples import mujoco_ant as ant
except ImportError:
    ant = None  # needs pip install "mujoco>=3.3"

# ENVIRONMENTS =====================================================================================


def test_own_env_is_learned(here):
    curves = run("--env-id=examples.own_env:make_env", "--max-epochs=20").curves
    reward = [value for _, value in curves["rewards/iter"]]
    assert reward[0] < 20 and reward[-1] > 75, "of at most 100"
    length = [value for _, value in curves["episode_lengths/iter"]]
    assert length[0] < 50 and length[-1] > 99.9, "the first episodes start anywhere"


NUM_STATES = {"mujoco_ant": 0, "mujoco_robot": 59, "privileged_critic": 4}


@pytest.mark.parametrize("name", NUM_STATES)
def test_env_with_exact_state_continues_to_the_last_bit(name, here, monkeypatch):
    pytest.importorskip(f"examples.{name}")
    if ant is not None:
        monkeypatch.setattr(ant.MujocoRobot, "max_episode_length", 10)  # new episodes draw noise
    flags = [f"--env-id=examples.{name}:make_env", "--num-envs=16", "--num-steps=8"]
    whole = run(*flags, "--max-epochs=4", "--experiment=whole").state()
    run(*flags, "--max-epochs=2", "--experiment=parts")
    monkeypatch.setenv("MUJOCO_THREADS", "3")  # more than before
    done = run(flags[0], "--checkpoint=runs/parts", "--max-epochs=4")
    assert "exactly where it stopped" in done.out
    assert same_state(whole, done.state()) == []
    assert whole["num_states"] == NUM_STATES[name]


@pytest.mark.skipif(not importlib.util.find_spec("mjlab"), reason="needs mjlab (Python >= 3.10)")
def test_mjlab_env_trains(here, monkeypatch):
    """On a Cartpole in which every other env is terminated, after 40 steps; others last 50."""
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
    done = run("--env-id=examples.mjlab_env:make_env", *SMALL, "--device=cpu")
    (epoch, length), *_ = done.curves["episode_lengths/iter"]
    assert epoch == 1 and length < 10, "the first episodes start anywhere"
    assert "Episode/Episode_Termination/even" in done.curves
    assert done.state()["num_states"] == 5, "mjlab's critic group"
    assert done.state()["env_state"] == {"common_step_counter": 1 + 4 * 8}, "1 is check_env's"


# OBSERVERS ========================================================================================


def test_own_observer_runs_as_the_command_does_and_writes_what_tensorboard_has(here):
    done = run(*SMALL, script=ROOT / "examples" / "own_observer.py")
    text = (done.folder / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    numbers = [(line.pop("epoch"), line.pop("frame")) for line in lines]
    assert numbers == [(1, 256), (2, 512), (3, 768), (4, 1024)]
    assert set().union(*lines) == set(done.curves)
    for tag, points in done.curves.items():
        written = [line[tag] for line in lines if tag in line]
        assert written == pytest.approx([value for _, value in points], rel=1e-6), tag


def test_videos_are_real_and_shown_in_tensorboard_and_change_no_weight(here):
    flags = [*SMALL, "--max-epochs=5"]
    plain = run(*flags, "--experiment=plain").state()
    done = run(*flags, observers=[RecordVideo(every=3, length=20)])
    assert done.err == ""
    files = sorted((done.folder / "videos").iterdir())
    assert [path.name for path in files] == ["epoch_1.gif", "epoch_4.gif"]
    for path, length in zip(files, (20, 16)):  # training ends in the second one
        with Image.open(str(path)) as gif:  # equal pictures in a row would be stored as one
            assert (gif.n_frames, gif.info["duration"], gif.size) == (length, 20, (600, 320))
    events = EventAccumulator(str(done.folder / "summaries")).Reload().Images("video")
    shown = [(event.step, event.encoded_image_string) for event in events]
    # The first one ends in epoch 3, after two of 256 frames.
    assert shown == [(n * 256, path.read_bytes()) for n, path in zip((2, 5), files)]
    assert same_state(plain, done.state()) == []


# MUJOCO'S ANT =====================================================================================

E = 16


@pytest.fixture
def env():
    pytest.importorskip("examples.mujoco_ant")
    torch.manual_seed(0)
    env = ant.make_env(E, "cpu", seed=0)
    yield env
    env.close()


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
    assert infos["episode"]["metres"].tolist() == pytest.approx([7.0] + [0.0] * (E - 1), abs=0.5)
    assert torch.allclose(obs["obs"][:, 0], torch.tensor(0.44))  # the next episode's first one


def test_ant_observes_in_the_torsos_frame_and_is_rewarded_for_it(env):
    physics, yaw = env.physics[:1].clone(), 2.0
    physics[0, 1:4] = torch.tensor([1000.0, -1000.0, 0.5])  # so the target is at 90 degrees
    physics[0, 4:8] = torch.tensor([math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)])
    physics[0, 16:22] = torch.tensor([3 * math.cos(yaw), 3 * math.sin(yaw), 0.2, 0.1, 0.2, 0.3])
    physics[0, 8:16] = 0.0  # two of the ankles are beyond their upper limits
    physics[0, 22:30] = 2.0
    obs = ant.observe(physics, torch.ones(1, 24), torch.full((1, 8), 0.5), env.limits)[0]
    turn = math.pi / 2 - yaw
    expected = [0.5, 3.0, 0.0, 0.2, 0.1, 0.2, 0.3, yaw, 0.0, turn, 1.0, math.cos(turn)]
    assert obs[:12].tolist() == pytest.approx(expected, abs=1e-6)
    assert obs[28:52].tolist() == pytest.approx([0.1] * 24)
    reward = ant.compute_reward(obs.unsqueeze(0), torch.tensor([3.0]))
    parts = (3.0, 0.5, 0.1, 0.5, -0.005 * 8 * 0.25, -0.05 * 8 * 0.5 * 0.4, -0.1 * 2)
    assert float(reward) == pytest.approx(sum(parts), abs=1e-6)


def test_ant_says_what_a_robot_needs(env):
    metadata = env.policy_metadata()
    joints = [env.model.joint(j).name for j in env.model.actuator_trnid[:, 0]]
    assert metadata["action_names"] == joints
    assert len(metadata["observation_names"]) == env.num_obs
    assert (metadata["control_hz"], metadata["torque_per_action_nm"]) == (60.0, 15.0)
