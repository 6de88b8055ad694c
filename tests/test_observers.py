"""Observers: what the environment reports reaches TensorBoard, and their hooks are rl_games'."""

import math
import os
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import ENV, SMALL, Run, run

import train_ppo


def values(done, tag):
    return [value for _, value in done.curves[tag]]


# WHAT THE ENVIRONMENT REPORTS =====================================================================


def reports(env):
    n = env.steps  # 2 to 9 in the first epoch, 10 to 17 in the second
    env.reused = getattr(env, "reused", torch.zeros(env.num_envs)).fill_(float(n))
    episode = {"number": n, "per_env": env.reused}
    episode["some"] = torch.tensor([math.nan, 1.0, math.inf, 2.0])
    infos = {"episode": episode, "episode_cumulative": {"steps": torch.ones(env.num_envs)}}
    infos.update(scalar=torch.tensor(float(n)), nested={"deep": n, "numpy": np.int64(n)})
    if n % 2:
        infos["comes and goes"] = n
    infos["nan later"] = 5.0 if n < 10 else math.nan
    return infos


REPORTED = {
    "Episode/number": [(1, 5.5), (2, 13.5)],
    "Episode/per_env": [(1, 5.5), (2, 13.5)],  # the env overwrites it
    "Episode/some": [(1, 1.5), (2, 1.5)],
    "scalar/frame": [(32, 5.5), (64, 13.5)],
    "scalar/iter": [(1, 5.5), (2, 13.5)],
    "nested/deep/iter": [(1, 5.5), (2, 13.5)],
    "nested/numpy/iter": [(1, 5.5), (2, 13.5)],
    "comes and goes/iter": [(1, 6.0), (2, 14.0)],
    "nan later/iter": [(1, 5.0)],
    "episode_cumulative_min/steps_min": [(32, 1.0), (64, 2.0)],
    "episode_cumulative_max/steps_max": [(32, 4.0), (64, 5.0)],
}


def test_what_the_env_reports_is_logged_and_cumulated_as_rl_games_does(here):
    """Episodes of 2 to 5 steps; the first step of the first ones was the check of the env."""
    flags = ("--num-envs=4", "--num-steps=8", "--max-epochs=2", "--games-to-track=3")
    done = run(*flags, env=dict(infos=reports, lengths=torch.arange(4) + 2))
    curves = done.curves
    assert {tag: curves[tag] for tag in REPORTED} == REPORTED
    meter = pytest.importorskip("rl_games.algos_torch.torch_ext").AverageMeter(1, 3)
    for lengths in ([1], [2], [2, 3], [4], [2, 3], [2, 4], [3]):  # that end in one step
        meter.update(torch.tensor(lengths, dtype=torch.float32).unsqueeze(1))
    mean = pytest.approx(meter.get_mean().item())
    assert curves["episode_cumulative/steps"][0] == (32, mean) and done.err == ""


def test_episode_cumulative_starts_anew_when_the_episodes_do(here):
    infos = {"episode_cumulative": {"steps": torch.ones(32)}}
    run(*SMALL, "--max-epochs=2", "--experiment=r", env=dict(infos=infos))
    done = run("--checkpoint=runs/r", "--max-epochs=5", env=dict(infos=infos))
    assert values(done, "episode_cumulative_max/steps_max") == [19.0], "after the env's check"


ODD = {  # infos, and whether the observer copes with them
    "text": ({"odd": "text", "episode": {"odd": "text"}}, True),
    "None": ({"odd": None, "episode": None}, True),
    "an object": ({"odd": object(), "episode": {"odd": {1, 2}}}, True),
    "an empty dict": ({"odd": {}, "episode": {}, "episode_cumulative": {}}, True),
    "not one number": ({"odd": torch.ones(32), "list": [1, 2], "array": np.ones(3)}, True),
    "a key that is a number": ({3: "text"}, True),
    "a sparse tensor": ({"episode": {"odd": torch.ones(32).to_sparse()}}, False),
    "a meta tensor": ({"odd": torch.zeros((), device="meta")}, False),
    "a huge number": ({"odd": 10**400}, False),
    "cumulative, a number": ({"episode_cumulative": {"odd": 1.0}}, False),
    "cumulative, of another shape": ({"episode_cumulative": {"odd": torch.zeros(3)}}, False),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_infos_are_left_out_and_cost_no_more_than_the_observer(name, here):
    infos, copes = ODD[name]
    done = run(*SMALL, "--max-epochs=2", env=dict(infos={**infos, "fine": 2.0}))
    curves = done.curves
    assert values(done, "info/epochs") == [1, 2]
    assert "odd" not in "".join(curves) and ("fine/iter" in curves) == copes
    assert done.err.count("warning: ") == done.err.count("without RLGPUAlgoObserver") == (not copes)


def test_missing_time_outs_are_warned_about_once(here):
    env = dict(time_outs=False, max_episode_length=20)
    assert run(*SMALL, "--max-epochs=9", env=env).err.count("without infos['time_outs']") == 1
    assert run(*SMALL, "--max-epochs=9", env=dict(max_episode_length=20)).err == ""


@pytest.mark.parametrize("metric", ["Episode/succes", "nan/iter"])
def test_a_best_metric_that_is_not_logged_is_named_once(metric, here):
    flags = ("--save-best-after=1", "--games-to-track=1", f"--best-metric={metric}")
    done = run(*SMALL, *flags, env=dict(infos={"nan": math.nan}, lengths=4))
    assert done.err.count("warning: ") == done.err.count(metric) == 1
    assert done.files == ["epoch_2.pth", "epoch_4.pth", "last.pth"]


# HOOKS ============================================================================================


class Recorder(train_ppo.AlgoObserver):
    def __init__(self):
        self.calls = []
        self.ended = 0

    def before_init(self, base_name, config, experiment_name):
        assert config["horizon_length"] == config["num_steps"] == 8
        assert experiment_name == config["name"] == os.path.basename(config["run_dir"]) == "r"
        self.calls.append("before_init")

    def after_init(self, algo):
        names = "writer device ppo_device games_to_track epoch_num frame model optimizer env"
        names += " mean_rewards last_mean_rewards num_agents config"
        assert [name for name in names.split() if not hasattr(algo, name)] == []
        self.algo = algo
        self.calls.append("after_init")

    def process_infos(self, infos, done_indices):
        assert done_indices.tolist() == self.algo.dones.nonzero().tolist()
        assert done_indices.shape[1:] == (1,) and "time_outs" in infos
        self.ended += len(done_indices)
        self.calls.append(self.algo.epoch_num)

    def after_steps(self):
        self.calls.append(f"after_steps {self.algo.epoch_num}")

    def after_clear_stats(self):
        self.calls.append("after_clear_stats")

    def after_print_stats(self, frame, epoch_num, total_time):
        assert frame == epoch_num * 256 and total_time > 0
        self.calls.append(f"after_print_stats {epoch_num} {self.algo.epoch_num}")

    def close(self):
        self.calls.append("close")


def test_hooks_are_called_in_rl_games_order_with_its_arguments(here):
    recorder = Recorder()
    flags = ("--experiment=r", "--max-epochs=2", "--strict-observers")
    run(*SMALL, *flags, env=dict(lengths=5), observers=[recorder])
    first = [1] * 8 + ["after_steps 1", "after_print_stats 1 1"]
    second = [2] * 8 + ["after_steps 2", "after_print_stats 2 2"]
    assert recorder.calls == ["before_init", "after_init", *first, *second, "close"]
    assert recorder.ended == 3 * 32, "16 steps, and the one that checks the env"


def test_rl_games_own_observers_run_unchanged(here):
    theirs = pytest.importorskip("rl_games.common.algo_observer")
    infos = {"scores": torch.full((32,), 7.0), "successes": 3.0}
    observers = [theirs.DefaultAlgoObserver(), theirs.IsaacAlgoObserver()]
    done = run(*SMALL, "--max-epochs=2", env=dict(infos=infos, lengths=2), observers=observers)
    assert done.curves["scores/iter"] == [(1, 7), (2, 7)]
    assert values(done, "successes/frame") == [3, 3, 3, 3], "ours logs it, too"
    assert done.err == ""


class Asks:
    def process_infos(self, infos, done_indices): ...


@pytest.mark.parametrize("observers, computed", [([], 0), ([Asks()], 8)], ids=["nobody", "one"])
def test_done_indices_are_computed_for_those_who_want_them(observers, computed, here, monkeypatch):
    handed = []
    call = train_ppo.MultiObserver.call

    def spy(self, hook, *args):
        if hook == "process_infos":
            handed.append(args[1])
        call(self, hook, *args)

    monkeypatch.setattr(train_ppo.MultiObserver, "call", spy)
    run(*SMALL, "--max-epochs=1", observers=[train_ppo.AlgoObserver(), *observers])
    assert len(handed) == 8 and sum(isinstance(x, torch.Tensor) for x in handed) == computed


class Broken(train_ppo.AlgoObserver):
    def __init__(self, hook):
        self.failed = 0

        def fail(*args):
            self.failed += 1
            raise ZeroDivisionError("oops")

        setattr(self, hook, fail)


HOOKS = ["before_init", "after_init", "process_infos", "after_steps", "after_print_stats", "close"]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_failing_observer_is_named_and_left_out(hook, here):
    flags, recorder = (*SMALL, "--max-epochs=2", "--experiment"), Recorder()
    broken = Broken(hook)
    done = run(*flags, "r", observers=[broken, recorder])
    assert done.err.count("warning: ") == done.err.count("ZeroDivisionError: oops") == 1
    assert "warning: going on without Broken:\nTraceback" in done.err and broken.failed == 1
    assert (len(recorder.calls), recorder.calls[-1]) == (23, "close")
    assert values(done, "info/epochs") == [1, 2] and done.state()["epoch"] == 2
    with pytest.raises(ZeroDivisionError, match="oops"):
        run(*flags, "strict", "--strict-observers", observers=[broken])


class Writes(train_ppo.AlgoObserver):
    def after_print_stats(self, frame, epoch_num, total_time):
        numbers = [2.0, 2, np.float32(2), np.full((1, 1), 2.0), torch.full((1,), 2.0)]
        for i, number in enumerate(numbers):
            self.writer.add_scalar(f"mine/{i}", number, frame)
        if epoch_num == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def test_an_observer_may_write_any_one_number_and_stop_the_run(here):
    done = run(*SMALL, "--max-epochs=99", observers=[Writes()], code=128 + signal.SIGTERM)
    assert [values(done, f"mine/{i}")[:2] for i in range(5)] == [[2.0, 2.0]] * 5
    assert done.state()["epoch"] in (2, 3) and done.err == ""


# A SCRIPT OF ONE'S OWN ============================================================================

OWN_SCRIPT = """
import train_ppo
class Mine(train_ppo.AlgoObserver):
    def after_print_stats(self, frame, epoch_num, total_time):
        self.writer.add_scalar("mine/frame", 3.0 * epoch_num, frame)
result = train_ppo.main(observers=[Mine()])
"""


@pytest.fixture
def script(here, monkeypatch):
    """Runs my_script.py with flags; returns its `result`."""
    ENV.clear()
    ENV.update(lengths=4)
    Path("my_script.py").write_text(OWN_SCRIPT)

    def started(*flags):
        monkeypatch.setattr(sys, "argv", ["my_script.py", "--env-id=harness:make_env", *flags])
        return runpy.run_path("my_script.py", run_name="__main__")["result"]

    return started


def test_a_script_with_an_observer_is_the_command(script, capsys):
    result = script(*SMALL, "--experiment=r", "--save-best-after=1", "--games-to-track=1")
    done = Run(*capsys.readouterr(), 0, Path("runs/r"))
    mean_reward, best = done.curves["rewards/step"][-1][1], done.state("best.pth")
    assert result.pop("mean_reward") == pytest.approx(mean_reward)
    expected = dict(run_dir=os.path.abspath("runs/r"), epoch=4, stop_signal=0)
    expected.update(best_score=best["last_mean_rewards"], best_epoch=best["epoch"])
    assert result == expected and done.err == ""
    assert f"mean reward {mean_reward:.2f}, best {best['last_mean_rewards']:.2f}" in done.out
    assert "continue  python my_script.py --checkpoint runs/r --max-epochs 8" in done.out
    assert values(done, "mine/frame") == [3.0, 6.0, 9.0, 12.0]
    with pytest.raises(SystemExit, match="error: .*nowhere.pth"):
        script("--checkpoint=nowhere.pth")
    with pytest.raises(SystemExit, match="2"):
        script("--no-such-flag")


def test_printed_commands_name_a_file_that_can_be_started(here, monkeypatch, capsys):
    """In a notebook sys.argv names the kernel's launcher."""
    monkeypatch.setattr(sys, "argv", ["/lib/ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    train_ppo.main([*SMALL, "--experiment=r"])
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("continue")]
    assert "train_ppo.py --checkpoint runs/r" in line and "ipykernel" not in line
