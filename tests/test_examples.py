"""examples/: each one does what its page says."""

import importlib.util
import json

import pytest
import torch
from harness import ROOT, SMALL, run, same_state
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.record_video import RecordVideo

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
    if name.startswith("mujoco"):
        robot = importlib.import_module("examples.mujoco_robot").MujocoRobot
        monkeypatch.setattr(robot, "max_episode_length", 10)  # new episodes draw noise
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
