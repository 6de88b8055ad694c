"""Observers: what the environment reports reaches TensorBoard, and their hooks are rl_games'."""

import json
import math
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from harness import SMALL, run

import train_ppo


def values(done, tag):
    return [value for _, value in done.curves[tag]]


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
    env = dict(infos=reports, lengths=torch.arange(4) + 2)
    done = run(*flags, env=env)
    curves = done.curves
    assert {tag: curves[tag] for tag in REPORTED} == REPORTED
    meter = pytest.importorskip("rl_games.algos_torch.torch_ext").AverageMeter(1, 3)
    for lengths in ([1], [2], [2, 3], [4], [2, 3], [2, 4], [3]):  # that end in one step
        meter.update(torch.tensor(lengths, dtype=torch.float32).unsqueeze(1))
    mean = pytest.approx(meter.get_mean().item())
    assert curves["episode_cumulative/steps"][0] == (32, mean) and done.err == ""
    curves = run(f"--checkpoint={done.folder}", "--max-epochs=3", env=env).curves
    assert curves["episode_cumulative_max/steps_max"][2] == (96, 4.0), "new episodes, new sums"


ODD = {  # infos, and whether the observer copes with them
    "text": ({"odd": "text", "episode": {"odd": "text"}}, True),
    "an empty dict": ({"odd": {}, "episode": {}, "episode_cumulative": {}}, True),
    "not one number": ({"odd": torch.ones(32), "list": [1, 2], "array": np.ones(3)}, True),
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


BEST = ("--save-best-after=1", "--games-to-track=1")
WARNED = {  # flags, keywords of an Env, what the one warning names
    "no time_outs": ((), dict(time_outs=False, max_episode_length=4), "infos['time_outs']"),
    "an unknown metric": ((*BEST, "--best-metric=Episode/succes"), {}, "Episode/succes"),
    "a metric that is NaN": ((*BEST, "--best-metric=nan/iter"), {}, "nan/iter"),
}


@pytest.mark.parametrize("name", WARNED)
def test_what_is_missing_is_named_once(name, here):
    flags, env, missing = WARNED[name]
    done = run(*SMALL, *flags, env=dict(env, lengths=4, infos={"nan": math.nan}))
    assert done.err.count("warning: ") == done.err.count(missing) == 1
    assert done.files == ["epoch_2.pth", "epoch_4.pth", "last.pth"]


# HOOKS ============================================================================================


class Recorder(train_ppo.AlgoObserver):
    """Checks the arguments of rl_games' hooks, and notes the calls."""

    def __init__(self):
        self.calls = []

    def before_init(self, base_name, config, experiment_name):
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
        self.calls.append(self.algo.epoch_num)

    def after_steps(self):
        self.calls.append(f"after_steps {self.algo.epoch_num}")

    def after_print_stats(self, frame, epoch_num, total_time):
        assert frame == epoch_num * 256 and total_time > 0
        self.calls.append(f"after_print_stats {epoch_num} {self.algo.epoch_num}")

    def close(self):
        self.calls.append("close")


TWO = (*SMALL, "--max-epochs=2", "--experiment=r")
FIRST = [1] * 8 + ["after_steps 1", "after_print_stats 1 1"]
SECOND = [2] * 8 + ["after_steps 2", "after_print_stats 2 2"]
CALLS = ["before_init", "after_init", *FIRST, *SECOND, "close"]  # of TWO


HOOKS = ["before_init", "after_init", "process_infos", "after_steps", "after_print_stats", "close"]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_failing_observer_is_named_and_left_out(hook, here):
    """The others are called on, as rl_games does it."""
    broken, recorder = train_ppo.AlgoObserver(), Recorder()
    fails = mock.Mock(side_effect=ZeroDivisionError("oops"))
    setattr(broken, hook, fails)
    done = run(*TWO, env=dict(lengths=5), observers=[broken, recorder])
    assert done.err.count("warning: ") == done.err.count("ZeroDivisionError: oops") == 1
    assert "warning: going on without AlgoObserver:\nTraceback" in done.err
    assert fails.call_count == 1 and recorder.calls == CALLS
    assert values(done, "info/epochs") == [1, 2] and done.state()["epoch"] == 2
    with pytest.raises(ZeroDivisionError, match="oops"):
        run(*TWO, "--strict-observers", observers=[broken])


def test_a_script_of_ones_own_is_the_command_and_gets_the_result(here):
    script = "import json, train_ppo; json.dump(train_ppo.main(), open('result.json', 'w'))"
    Path("my_script.py").write_text(script)
    flags = (*SMALL, *BEST, "--experiment=r")
    done = run(*flags, script="my_script.py", env=dict(lengths=4))
    result, best = json.loads(Path("result.json").read_text()), done.state("best.pth")
    assert result.pop("mean_reward") == pytest.approx(values(done, "rewards/step")[-1])
    expected = dict(run_dir=os.path.abspath("runs/r"), epoch=4, stop_signal=0)
    expected.update(best_score=best["last_mean_rewards"], best_epoch=best["epoch"])
    assert result == expected
    assert "continue  python my_script.py --checkpoint runs/r --max-epochs 8" in done.out
