"""What the README promises, shown by running it. A table is a kind of promise, a row is a case."""

import contextlib
import errno
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from unittest import mock

import pytest

TOP = Path(__file__).resolve().parent
sys.path.insert(0, str(TOP / "tests"))
import harness
import torch
from harness import SCRIPT, SMALL, Run, differences, finish, here, refused, run, same_state, start

import train_ppo
from train_ppo import Args, load_checkpoint

# Both are ignored where pytest itself runs in the background or under nohup.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
NAN, INF = math.nan, math.inf


class At(train_ppo.AlgoObserver):
    """Does something in one epoch: after its rollout, or in each of its steps."""

    def __init__(self, epoch, action, hook="after_steps"):
        setattr(self, hook, lambda *_: self.algo.epoch_num == epoch and action(self.algo))


def send(name):
    return lambda _: os.kill(os.getpid(), getattr(signal, name))


def kill_at(step, name):
    return dict(kill_at=step, kill=getattr(signal, name))


def scores(*values):
    """infos of an Env: a metric score/iter that has these values in epochs 1, 2, 3 ..."""
    return lambda env: {"score": values[(env.steps - 2) // 8]}  # step 1 is the check of the env


def last(name="r"):
    return load_checkpoint(f"runs/{name}/nn/last.pth")


def not_finite(state):
    return [name for name, x in state["model"].items() if not x.isfinite().all()]


# THE DEFAULT COMMAND ==============================================================================


@pytest.fixture(scope="session")
def default_run(tmp_path_factory):
    """`python train_ppo.py` in an empty folder, as a newcomer runs it."""
    folder = tmp_path_factory.mktemp("default")
    return finish(start(cwd=folder), timeout=600, cwd=folder)


def test_default_command_learns_cartpole_and_prints_lines_of_at_most_80_columns(default_run):
    rewards = [float(x) for x in re.findall(r"reward (\S+) length", default_run.out)]
    assert len(rewards) == 100 and rewards[19] < 250 < 480 < rewards[-1]
    names = "best epoch_100 epoch_25 epoch_50 epoch_75 last"
    assert default_run.files == [f"{name}.pth" for name in names.split()]
    highest, best = max(rewards[49:]), default_run.state("best.pth")
    assert rewards[best["epoch"] - 1] == highest, "of the epochs from 50 on"
    end = f"stopped after epoch 100 (done), mean reward {rewards[-1]:.2f}"
    assert f"\n{end}, best {highest:.2f} in epoch {best['epoch']}\n" in default_run.out
    whole = r"epoch \d+/100 reward -?\d+\.\d\d length \d+\.\d left \d:\d\d:\d\d "
    whole += r"lr \d\.\de-\d\d fps [\d,]+"
    lines = [line for line in default_run.out.splitlines() if line.startswith("epoch ")]
    assert [line for line in lines if not re.fullmatch(whole, line) or len(line) > 80] == []
    assert default_run.err == ""


TAGS = """
losses/a_loss losses/c_loss losses/entropy losses/bounds_loss losses/clipfrac
losses/explained_variance info/last_lr info/lr_mul info/e_clip info/kl info/epochs
performance/step_inference_rl_update_fps performance/step_inference_fps performance/step_fps
performance/rl_update_time performance/step_inference_time performance/step_time
"""


def test_tensorboard_has_rl_games_tags_over_the_right_steps(default_run):
    steps = {tag: [step for step, _ in points] for tag, points in default_run.curves.items()}
    epochs = list(range(1, 101))
    expected = {tag: [8192 * n for n in epochs] for tag in TAGS.split()}
    for name in ("rewards", "shaped_rewards", "episode_lengths"):
        expected[f"{name}/step"] = expected["losses/a_loss"]
        expected[f"{name}/iter"] = epochs
        times = steps.pop(f"{name}/time")
        assert times == sorted(times) and len(times) == 100
        assert times[-1] == int(default_run.state()["total_time"])
    assert steps == expected

    config = json.loads((default_run.folder / "config.json").read_text())
    assert set(config["args"]) == {field.name for field in fields(Args)}
    assert config["args"]["units"] == [32, 32]
    assert config["command"] == shlex.join([sys.executable, SCRIPT])
    assert (config["torch"], config["python"]) == (torch.__version__, sys.version)
    assert config["git_commit"] or not (TOP / ".git").exists()


def test_printed_continue_command_works(here, monkeypatch):
    """Also where a name must be quoted, and with an environment that must be named again."""
    monkeypatch.setattr(sys.modules["__main__"], "__file__", SCRIPT, raising=False)
    done = run(*SMALL, "--experiment=my run", env={})
    assert "\nfiles     'runs/my run'\n" in done.out
    python, script, *flags = shlex.split(re.search("^continue  (.*)$", done.out, re.M).group(1))
    assert (python, script) == ("python", SCRIPT)
    expected = ["--checkpoint", "runs/my run", "--max-epochs", "8", "--env-id", "harness:make_env"]
    assert flags == expected
    assert finish(start(*flags, script=script)).state()["epoch"] == 8
    assert os.listdir("runs") == ["my run"]


def test_file_copied_alone_trains_and_continues(here):
    shutil.copy(SCRIPT, "train_ppo.py")
    done = finish(start(*SMALL, "--experiment=r", script="train_ppo.py"))
    assert "evaluate" not in done.out and done.err == ""
    done = finish(start("--checkpoint=runs/r", "--max-epochs=5", script="train_ppo.py"))
    assert done.state()["epoch"] == 5 and sorted(os.listdir()) == ["runs", "train_ppo.py"]


# RUN FOLDERS ======================================================================================


def test_each_file_is_written_when_the_readme_says(here, monkeypatch):
    clock = itertools.count()  # best.pth waits for 5 seconds: here each look at it takes 6
    monkeypatch.setattr(time, "monotonic", lambda: 6.0 * next(clock))
    seen = []

    def look(_=None):
        paths = Path("runs/r/nn").glob("*.pth")
        seen.append({path.stem: load_checkpoint(str(path))["epoch"] for path in paths})

    flags = (*SMALL, "--games-to-track=9", "--save-best-after=3", "--best-metric=score/iter")
    env = dict(lengths=5, infos=scores(1, 2, 3, 4, 5))
    looks = [At(epoch, look) for epoch in range(1, 6)]
    run(*flags, "--max-epochs=5", "--experiment=r", env=env, observers=looks)
    look()
    assert seen == [
        dict(last=0),
        dict(last=0),
        dict(last=2, epoch_2=2),
        dict(last=2, epoch_2=2, best=3),
        dict(last=4, epoch_2=2, epoch_4=4, best=4),
        dict(last=5, epoch_2=2, epoch_4=4, best=5),
    ]


BY_SCORE = ("--best-metric=score/iter", "--games-to-track=1", "--save-best-after=1")
BEST = {  # flags, score of each epoch: epoch of best.pth
    "the first of the highest": ((), (1, 3, 3, 2), 2),
    "not before the mean is full": (["--games-to-track=64"], (9, 8, 7, 6), 2),
    "NaN in some epochs": ((), (NAN, 5, NAN, 6), 4),
}


@pytest.mark.parametrize("name", BEST)
def test_best_is(name, here):
    flags, values, epoch = BEST[name]
    done = run(*SMALL, *BY_SCORE, *flags, env=dict(infos=scores(*values), lengths=8))
    assert (done.state()["best_epoch"], done.state("best.pth")["epoch"]) == (epoch, epoch)


def test_best_is_written_now_and_then_and_as_it_was_in_its_epoch(here, monkeypatch):
    written, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (written.append(new), replace(old, new)))
    flags = [*SMALL, *BY_SCORE, "--save-frequency=0"]
    env = dict(infos=scores(1, 9, 5, 4), lengths=8)
    done = run(*flags, env=env)
    names = [os.path.basename(name) for name in written]
    assert names[-2:] == ["best.pth", "last.pth"] and len(names) <= 5
    best = done.state("best.pth")
    assert best["epoch"] == 2 != done.state()["epoch"]
    assert same_state(best, run(*flags, "--max-epochs=2", env=env).state()) == []


def test_a_folder_in_use_is_refused_until_its_process_is_gone(here):
    process = start(*SMALL, "--experiment=r", env=kill_at(20, "SIGSTOP"))
    harness.wait_for(Path("runs/r/nn/epoch_2.pth").exists, process)
    harness.wait_for(lambda: last()["epoch"] == 2, process)  # then it stops, but holds its lock
    error = refused("--checkpoint=runs/r", env={})
    process.kill()
    process.wait()
    assert error.endswith("runs/r is being trained by another process: stop it first")
    assert run("--checkpoint=runs/r", env={}).state()["epoch"] == 4


def test_a_folder_continues_and_a_file_or_a_name_that_is_taken_starts_a_new_one(here):
    """A folder keeps its best; a new run, or one by another metric, has none yet."""
    env = dict(exact=True, lengths=8, infos=scores(9, 8, 7, 6, 5, 4))
    run(*SMALL, *BY_SCORE, "--experiment=r", env=env)
    done = run("--checkpoint=runs/r", "--max-epochs=6", env=env)
    assert re.search(r"continuing runs/r/nn/\w+.pth at epoch 4, frame 1,024; exactly", done.out)
    assert done.curves["info/epochs"] == [(256 * n, n) for n in range(1, 7)]
    assert (done.state()["best_epoch"], done.state("best.pth")["epoch"]) == (1, 1)
    before = harness.snapshot("runs/r")
    flags = ("--checkpoint=runs/r/nn/epoch_2.pth", "--experiment=b", "--max-epochs=5")
    done = run(*flags, env=env)
    assert "branching off runs/r/nn/epoch_2.pth at epoch 2, frame 512; exactly" in done.out
    assert done.curves["info/epochs"] == [(256 * n, n) for n in (3, 4, 5)]
    assert (done.state()["best_epoch"], done.state("best.pth")["epoch"]) == (3, 3)
    flags = ("--checkpoint=runs/b", "--max-epochs=6", "--best-metric=rewards/iter")
    assert run(*flags, env=env).state()["best_epoch"] == 6
    assert [run(*SMALL, "--experiment=r").folder.name for _ in range(2)] == ["r_2", "r_3"]
    assert harness.snapshot("runs/r") == before


def test_a_new_run_has_no_mean_reward_of_the_one_before(here):
    run(*SMALL, "--experiment=r", env=dict(lengths=8))
    flags, env = ("--max-epochs=5", "--save-frequency=0"), dict(lengths=99)
    assert "rewards/iter" in run("--checkpoint=runs/r", *flags, env=env).curves
    assert "rewards/iter" not in run("--checkpoint=runs/r/nn/epoch_4.pth", *flags, env=env).curves


def flip(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_a_folder_continues_from_its_newest_readable_file(here):
    straight = run(*SMALL, "--save-frequency=1", "--experiment=r").state()
    nn = Path("runs/r/nn")
    good, weight = (nn / "last.pth").read_bytes(), straight["model"]["a2c_network.mu.weight"]
    (nn / "last.pth").write_bytes(flip(good, good.index(weight.numpy().tobytes())))
    (nn / "epoch_4.pth").write_bytes(good[:-1000])
    torch.save({"of another": "program"}, str(nn / "epoch_3.pth"))
    (nn / "saving.tmp").write_bytes(b"half a file")
    done = run("--checkpoint=runs/r")
    assert "continuing runs/r/nn/epoch_2.pth at epoch 2" in done.out
    skipped = re.findall(r"^warning: .*?/nn/(\S+) ", done.err, re.M)
    assert sorted(skipped) == ["epoch_3.pth", "epoch_4.pth", "last.pth"]
    assert same_state(done.state(), straight) == []


def test_of_two_files_of_one_epoch_the_one_with_the_envs_state_is_taken(here):
    torch.save(dict(run(*SMALL, "--experiment=r").state(), env_state=None), "runs/r/nn/last.pth")
    assert "continuing runs/r/nn/epoch_4.pth" in run("--checkpoint=runs/r", "--max-epochs=5").out


def test_a_folder_that_is_moved_is_made_again(here):
    run(*SMALL, "--experiment=r", observers=[At(3, lambda _: os.rename("runs/r", "runs/moved"))])
    assert (last("moved")["epoch"], last()["epoch"]) == (2, 4)


def test_an_env_may_change_the_working_directory(here):
    """The run that is there goes on, instead of being started anew."""
    os.mkdir("assets")
    env = dict(set_train_info=lambda *_: os.chdir(str(here / "assets")))
    for epochs in (2, 4):
        run(*SMALL, "--experiment=r", "--resume", f"--max-epochs={epochs}", env=env)
        os.chdir(str(here))
    epochs = [value for _, value in Run("", "", 0, here / "runs/r").curves["info/epochs"]]
    assert (epochs, os.listdir("assets"), os.listdir("runs")) == ([1, 2, 3, 4], [], ["r"])


# RESTARTS AND SETTINGS ============================================================================


def test_one_command_starts_goes_on_and_is_complete(here):
    """What a job that is pre-empted and queued again needs, also with --init-from."""
    run(*SMALL, "--max-epochs=1", "--experiment=a")
    os.makedirs("runs/b/nn")  # as if killed before its first save
    command = (*SMALL, "--experiment=b", "--resume", "--init-from=runs/a/nn/last.pth")
    assert "continuing" not in run(*command, observers=[At(3, send("SIGTERM"))], code=143).out
    assert "continuing runs/b/nn/last.pth at epoch 3" in run(*command).out
    before = last("b")
    assert "stopped after epoch 4 (done)" in run(*command).out, "it is complete"
    assert same_state(last("b"), before) == [] and sorted(os.listdir("runs")) == ["a", "b"]


def test_init_from_takes_the_weights_and_nothing_else(here):
    old = run(*SMALL, "--units", "8", "--separate", "--learning-rate=0.002", "--experiment=a")
    copy = At(1, lambda _: shutil.copy("runs/b/nn/last.pth", "start.pth"))
    run(*SMALL, "--init-from=runs/a", "--experiment=b", observers=[copy])
    new = load_checkpoint("start.pth")
    assert differences(new["model"], old.state()["model"]) == [] and new["optimizer"]["state"] == {}
    assert (new["epoch"], new["frame"], new["best_epoch"]) == (0, 0, 0)
    assert new["optimizer"]["param_groups"][0]["lr"] == pytest.approx(3e-4)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a run of my_task:make, and the module; nothing may change there."""
    folder = tmp_path_factory.mktemp("trained")
    settings = "SETTINGS = dict(num_envs=16, gamma=0.5, units=(8, 8), num_steps=8)\n"
    (folder / "my_task.py").write_text("from harness import Env as make\n" + settings)
    flags = "--env-id=my_task:make --experiment=r --max-epochs=2 --gamma=0.7 --separate"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        state = run(*flags.split(), "--learning-rate=0.001", "--torch-threads=2").state()
        state["args"].update(track=True, wandb_entity="them")  # as after --track
        torch.save(state, "runs/r/nn/last.pth")
    del sys.modules["my_task"]
    return folder


FOLDER, FILE = "--checkpoint=runs/r", "--checkpoint=runs/r/nn/last.pth"
PRECEDENCE = {  # flags: arguments
    "SETTINGS over defaults": ([], dict(gamma=0.5, num_envs=16, gae_lambda=0.95)),
    "checkpoint over SETTINGS": ([FOLDER], dict(gamma=0.7, num_envs=16, separate=True)),
    "a flag that is the default": ([FILE, "--gamma", "0.99"], dict(gamma=0.99, separate=True)),
    "a switch": ([FOLDER, "--no-separate"], dict(separate=False, gamma=0.7)),
    "the network's alone": (["--init-from=runs/r"], dict(separate=True, gamma=0.5, track=False)),
    "W&B of a folder": ([FOLDER], dict(track=True, wandb_entity="them")),
    "no W&B of a file": ([FILE], dict(track=False, wandb_entity="")),
    "nothing about its start": ([FOLDER], dict(torch_threads=1, experiment="")),
}


@pytest.mark.parametrize("name", PRECEDENCE)
def test_a_value_comes_from(name, here, trained, monkeypatch):
    """A flag, else the checkpoint, else SETTINGS, else the default."""
    flags, expected = PRECEDENCE[name]
    monkeypatch.chdir(trained)
    args, _, _ = train_ppo.parse_args(["--env-id=my_task:make", *flags])
    assert {key: asdict(args)[key] for key in expected} == expected


def test_a_learning_rate_that_is_given_is_used(here):
    """Also the one that the run began with, but not once more with --resume."""
    adapted = run(*SMALL, "--experiment=r").state()["optimizer"]["param_groups"][0]["lr"]
    assert adapted > 0.001
    file, given = "--checkpoint=runs/r/nn/epoch_4.pth", "--learning-rate=0.0003"
    again, new = ("--experiment=r", "--resume", given), (file, "--experiment=s", "--resume", given)
    cases = ((again, adapted), ((file,), adapted), ((file, given), 0.0003), (new, 0.0003))
    for flags, rate in cases:
        done = run(*SMALL, "--max-epochs=5", "--lr-schedule=fixed", *flags)
        assert done.curves["info/last_lr"][-1][1] == pytest.approx(rate)


# CONTINUING =======================================================================================

OPTIONS = {  # flags, keywords of an Env
    "default": ("", None),
    "tanh": ("--separate --activation=tanh --schedule-type=standard --minibatch-size=64", None),
    "linear": ("--lr-schedule=linear --no-normalize-input --no-normalize-value", None),
    "privileged critic": ("", dict(exact=True, num_states=3, lengths=5)),
    "own exact env": ("", dict(exact=True, lengths=torch.arange(32) % 7 + 2)),
}


def comparable(run):
    """The curves of a run, but for those of its speed."""
    return {k: v for k, v in run.curves.items() if k[:12] != "performance/" and k[-5:] != "/time"}


CONTINUE = ["default max_epochs", "default SIGTERM", "default exception", "tanh exception"]
CONTINUE += ["linear SIGTERM", "privileged critic SIGTERM", "own exact env max_epochs"]
CONTINUE += ["own exact env exception"]


@pytest.mark.parametrize("name", CONTINUE)
def test_two_epochs_and_two_more_are_four_to_the_last_bit(name, here):
    """Weights, Adam, statistics, meters, generators, the environment, and the curves."""
    options, _, stop = name.rpartition(" ")
    flags, env = OPTIONS[options]
    flags = (*SMALL, *flags.split(), "--games-to-track=9", "--save-best-after=1")
    straight = run(*flags, "--strict-observers", "--experiment=straight", env=env)
    flags = (*flags, "--strict-observers", "--experiment=r")
    if stop == "max_epochs":
        run(*flags, "--max-epochs=2", env=env)
    elif stop == "SIGTERM":
        run(*flags, env=env, observers=[At(2, send("SIGTERM"))], code=143)
    else:
        with pytest.raises(ZeroDivisionError):
            run(*flags, env=env, observers=[At(3, lambda _: 1 / 0, hook="process_infos")])
    assert last()["epoch"] == 2
    done = run("--checkpoint=runs/r", "--max-epochs=4", env=env)
    assert "exactly where it stopped" in done.out
    assert done.files == straight.files and set(done.files) >= {"epoch_2.pth", "last.pth"}
    for file in done.files:
        assert same_state(done.state(file), straight.state(file)) == []
    assert len(done.curves["losses/a_loss"]) == 4 and comparable(done) == comparable(straight)


def test_new_episodes_get_new_noise(here):
    """Where continuing is not exact, the log says so; no random number is drawn a second time."""
    noise = []

    def keep(algo):
        drawn = (algo.buffer["actions"] - algo.buffer["mus"]) / algo.buffer["sigmas"]
        noise.append(torch.cat((drawn, algo.buffer["obs"]), -1))

    run(*SMALL, "--experiment=r", env={}, observers=[At(1, keep)])
    for _ in range(2):
        flags = ("--checkpoint=runs/r/nn/last.pth", "--max-epochs=5")
        done = run(*flags, env={}, observers=[At(5, keep)])
        assert "the env starts new episodes" in done.out and "exactly" not in done.out
    first, fifth, again = noise
    assert torch.equal(fifth, again), "it follows from seed and epoch"
    assert (first - fifth).abs().lt(1e-4).float().mean() < 0.01


INEXACT = {  # what is changed in the checkpoint, flags
    "another number of processes": (dict(processes=2), ()),
    "another kind of device": (dict(device="cuda"), ()),
    "another number of envs": ({}, ["--num-envs=16"]),
    "without the env's state": (dict(env_state=None), ()),
}


@pytest.mark.parametrize("name", INEXACT)
def test_is_not_called_exact(name, here):
    changes, flags = INEXACT[name]
    torch.save(dict(run(*SMALL, "--experiment=r").state(), **changes), "changed.pth")
    done = run("--checkpoint=changed.pth", "--max-epochs=5", *flags)
    assert "at epoch 4, frame 1,024; the env starts new episodes" in done.out
    assert (done.state()["first_epoch"], done.state()["epoch"]) == (4, 5)


# HOW A RUN ENDS ===================================================================================


# An epoch is 8 steps, and step 1 is the check of the env: epoch 3 has steps 18 to 25. The columns
# are env, exit code or exception, epoch and level of the curriculum in last.pth, what is said.
CTRL_C = KeyboardInterrupt("by its own handler")
BAD = "error: NaN or Inf in {} of {} of 32 envs, epoch 3\n".format
DEATHS = {
    "raises": (dict(raise_at=20), RuntimeError, 2, 20, "the simulator broke"),
    "is interrupted": (dict(raise_at=20, error=CTRL_C), KeyboardInterrupt, 2, 20, "by its own"),
    "exits": (dict(raise_at=20, error=SystemExit("window closed")), 1, 2, 20, "window closed\n"),
    "NaN in obs": (dict(bad_at=(20, "obs", 3, NAN)), 1, 2, 25, BAD("obs", 3)),
    "Inf in obs at the end": (dict(bad_at=(25, "obs", 1, INF)), 1, 2, 25, BAD("next obs", 1)),
    "-Inf in rewards": (dict(bad_at=(25, "reward", 32, -INF)), 1, 2, 25, BAD("rewards", 32)),
    "SIGTERM": (kill_at(20, "SIGTERM"), 143, 3, 25, "stopped after epoch 3 (SIGTERM)"),
    "SIGINT": (kill_at(18, "SIGINT"), 130, 3, 25, "stopped after epoch 3 (SIGINT)"),
    "SIGHUP": (kill_at(25, "SIGHUP"), 129, 3, 25, "stopped after epoch 3 (SIGHUP)"),
    "SIGUSR1": (kill_at(20, "SIGUSR1"), 138, 3, 25, "stopped after epoch 3 (SIGUSR1)"),
    "SIGTERM in the last epoch": (kill_at(28, "SIGTERM"), 0, 4, 33, "after epoch 4 (done)"),
}


@pytest.mark.parametrize("name", DEATHS)
def test_last_is_of_the_last_whole_epoch_if_the_env(name, here):
    env, end, epoch, level, message = DEATHS[name]
    flags, env = (*SMALL, "--save-frequency=0", "--experiment=r"), dict(env, level=0)
    if isinstance(end, int):
        done = run(*flags, env=env, code=end)
        said = done.out + done.err
    else:
        with pytest.raises(end) as raised:
            run(*flags, env=env)
        said = str(raised.value)
    assert message in said
    state = last()
    assert (state["epoch"], state["frame"], not_finite(state)) == (epoch, 256 * epoch, [])
    assert state["env_state"] == (level and {"level": level})
    assert run("--checkpoint=runs/r", env=dict(level=0)).state()["epoch"] == 4


def test_bad_weights_are_saved_nowhere(here):
    """What turns bad in an update costs the epochs since the last save, but for the best one."""
    spoil = At(4, lambda algo: algo.model.a2c_network.sigma.data.fill_(-120.0))
    env = dict(infos=scores(1, 2, 3, 4), lengths=8)
    done = run(*SMALL, *BY_SCORE, "--experiment=r", env=env, observers=[spoil], code=1)
    assert re.match("error: NaN or Inf in losses/a_loss, .* of the update, epoch 4\n", done.err)
    assert done.files == ["best.pth", "epoch_2.pth", "last.pth"]
    assert (done.state()["epoch"], done.state("best.pth")["epoch"]) == (2, 3)
    assert not_finite(done.state()) == not_finite(done.state("best.pth")) == []


def test_a_signal_two_seconds_after_the_first_interrupts_the_epoch(here, monkeypatch):
    """It is for a simulator that hangs. Earlier ones are the same wish, sent twice."""
    now, sent = time.monotonic(), []

    def infos(env):
        for seconds in (0, 0.1, 1.9, 2.1) if env.steps == 20 else ():
            monkeypatch.setattr(time, "monotonic", lambda seconds=seconds: now + seconds)
            sent.append(seconds)
            signal.raise_signal(signal.SIGTERM)
        return {}

    with pytest.raises(KeyboardInterrupt):
        run(*SMALL, "--save-frequency=0", "--experiment=r", env=dict(infos=infos))
    assert (sent, last()["epoch"]) == ([0, 0.1, 1.9, 2.1], 2)


def test_nohup_keeps_sighup_ignored_and_other_handlers_are_put_back(here):
    names = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN), *map(signal.getsignal, names[1:])
    try:
        assert run(*SMALL, env=kill_at(20, "SIGHUP")).state()["epoch"] == 4
    finally:
        signal.signal(signal.SIGHUP, before[0])
    assert tuple(map(signal.getsignal, names)) == before


def test_a_forked_child_can_be_terminated(here):
    """It inherits the handlers, and must not take the signal for a wish to stop training."""
    processes = multiprocessing.get_context("fork")
    child = processes.Process(target=signal.raise_signal, args=(signal.SIGTERM,))

    def fork(_):
        child.start()
        child.join()

    run(*SMALL, "--max-epochs=1", "--strict-observers", observers=[At(1, fork)])
    assert child.exitcode == -signal.SIGTERM


SLOW = """
import os, time, train_ppo
fsync = os.fsync
os.fsync = lambda descriptor: (time.sleep(0.02), fsync(descriptor))
train_ppo.main()
"""


def test_kill_9_at_any_moment_costs_the_epochs_since_the_last_save(here):
    """Killed 6 times, some of them within a save, and continued, a run ends as if it had not."""
    Path("slow.py").write_text(SLOW)
    nn, in_a_save = Path("runs/killed/nn"), 0
    flags = "--num-envs=16 --num-steps=8 --update-epochs=1 --games-to-track=9 --save-best-after=1"
    flags = (*flags.split(), "--save-frequency=1", "--max-epochs=60")
    straight = run(*flags, "--experiment=straight")
    flags = (*flags, "--experiment=killed")
    for number in range(6):
        before = len(list(nn.glob("epoch_*.pth")))
        process = start(*flags, script="slow.py")
        harness.wait_for(lambda before=before: len(list(nn.glob("epoch_*.pth"))) > before, process)
        if number % 2:
            harness.wait_for((nn / "saving.tmp").exists, process)
        process.kill()
        process.wait()
        assert process.returncode == -signal.SIGKILL, "it was over before it could be killed"
        in_a_save += (nn / "saving.tmp").exists()
        flags = ("--checkpoint=runs/killed",)
    assert in_a_save > 0
    done = run(*flags)
    assert same_state(done.state(), straight.state()) == []
    for tag in ("info/epochs", "losses/a_loss", "rewards/iter"):  # epochs may be there twice
        assert set(done.curves[tag]) == set(straight.curves[tag])


@pytest.mark.parametrize("end", ["| head -1; exit ${PIPESTATUS[0]}", ">/dev/full 2>&1", ">&- 2>&-"])
def test_what_cannot_be_printed_is_dropped(end, here):
    line = " ".join(map(shlex.quote, [sys.executable, SCRIPT, *SMALL, "--experiment=r"]))
    done = subprocess.run(["bash", "-c", f"{line} {end}"], timeout=120, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr, last()["epoch"]) == (0, b"", 4)


# DISKS ============================================================================================


def test_a_full_disk_ends_training_and_spoils_no_file(here):
    """As if: in epoch 4, no file of this process can grow beyond 1,000 bytes."""
    size, endless = resource.RLIMIT_FSIZE, resource.RLIM_INFINITY
    full = At(4, lambda _: resource.setrlimit(size, (1000, endless)))
    run(*SMALL, "--experiment=r", "--max-epochs=2")
    with pytest.raises(OSError, match="File too large"):
        try:
            run("--checkpoint=runs/r", "--max-epochs=4", observers=[full])
        finally:
            resource.setrlimit(size, (endless, endless))
    assert "exactly where it stopped" in run("--checkpoint=runs/r", "--max-epochs=4").out
    assert last()["epoch"] == 4


# Error of a function: whether training goes on.


DRIVES = {"EINVAL os.fsync": True, "ENOSYS fcntl.flock": True, "EIO os.fsync": False}


@pytest.mark.parametrize("name", DRIVES)
def test_a_drive_may_lack_fsync_and_locks_but_not_fail(name, here, monkeypatch):
    error, function = name.split()
    fails = mock.Mock(side_effect=OSError(getattr(errno, error), error))
    monkeypatch.setattr(function, fails)
    if DRIVES[name]:
        done = run(*SMALL)
        assert (done.state()["epoch"], done.err) == (4, "")
    else:
        with pytest.raises(OSError, match=error):
            run(*SMALL)


def test_a_file_is_on_disk_before_it_has_its_name(here, monkeypatch):
    """After a power cut a name leads to the old file or to the new one."""
    calls, fsync, replace = [], os.fsync, os.replace

    def sync(descriptor):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not name.startswith("events"):  # TensorBoard's thread, perhaps of an earlier test
            calls.append(name)
        fsync(descriptor)

    def rename(source, target):
        calls.append((os.path.basename(source), os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    run(*SMALL, "--max-epochs=2")
    expected = []
    for names in ("last.pth", "epoch_2.pth last.pth", "last.pth"):
        for name in names.split():
            expected += ["saving.tmp", ("saving.tmp", name)]
        expected.append("nn")
    assert calls == expected


# REFUSALS =========================================================================================


@pytest.fixture(scope="session")
def bad_files(tmp_path_factory):
    """A folder with a run, runs/r, and files that cannot be continued; nothing may change there."""
    folder = tmp_path_factory.mktemp("bad")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        state = run(*SMALL, "--max-epochs=1", "--experiment=r").state()
        good = Path("runs/r/nn/last.pth").read_bytes()
        weight = state["model"]["a2c_network.mu.weight"].numpy().tobytes()
        Path("flipped.pth").write_bytes(flip(good, good.index(weight)))
        Path("text.pth").write_text("text")
        Path("my_evil.py").write_text("open('imported', 'w').close()")
        harness.torchscript("runs/script/nn/last.pth")
        torch.save(dict(state, env_state=Path("x")), "objects.pth")
        torch.save([state], "list.pth")
        torch.save(dict(state, format_version=2), "of_1.0.pth")
        args = dict(state["args"], env_id="my_evil:make")
        torch.save(dict(state, args=args), "stranger.pth")
    return folder


NUMBERS = [field for field in fields(Args) if field.type in (int, float, train_ppo.Count)]
UNREADABLE = "flipped text objects runs/script/nn/last missing"
VERSION = "not a checkpoint of this version: a file of 1.0 needs train_ppo.py 1.0, one of rl_games"
OWN = "--env-id=harness:make_env"
MISFIT = "last.pth does not fit this env or network: Error(s) in loading state_dict"
REFUSALS = [  # flags, message
    *((f"--{f.name}=0", "must be >= 1, not 0") for f in NUMBERS if f.type is train_ppo.Count),
    *((f"--{f.name}=-1", "must be >= ") for f in NUMBERS),
    ("--gamma=nan", "--gamma must be >= 0, not nan"),
    ("--minibatch-size=100", "--minibatch-size must be > 1 and divide num_envs x num_steps = 256"),
    ("--env-id=Ant", "--env-id Ant needs Isaac Gym"),
    ("--env-id=no_such_module:f", "No module named 'no_such_module'"),
    ("--env-id=harness:typo", "--env-id harness:typo: harness has no typo"),
    ("--device=gpu", "--device gpu cannot be used"),
    ("--resume", "--resume needs --experiment NAME"),
    *((f"--checkpoint={name}.pth", f"{name}.pth cannot be used") for name in UNREADABLE.split()),
    *((f"--checkpoint={name}.pth", f"{name}.pth is {VERSION}") for name in ("list", "of_1.0")),
    ("--checkpoint=runs/script", "runs/script has no readable checkpoint in nn/"),
    ("--checkpoint=stranger.pth", "your own env: repeat --env-id my_evil:make"),
    (f"--checkpoint=stranger.pth {OWN}", "stranger.pth does not fit this env or network"),
    (f"--checkpoint=runs/r {OWN}", MISFIT),
    ("--checkpoint=runs/r --units 8", MISFIT),
    ("--checkpoint=runs/r --init-from=runs/r", "give one of them"),
    ("--checkpoint=runs/r --experiment=new", "give a .pth file for a new one"),
    ("--checkpoint=runs/r --experiment=new --resume", "give a .pth file for a new one"),
]


@pytest.mark.parametrize("flags, message", REFUSALS, ids=[flags for flags, _ in REFUSALS])
def test_is_refused_in_one_line(flags, message, here, bad_files, monkeypatch):
    monkeypatch.chdir(bad_files)
    harness.ENV.clear()
    assert message in refused(*([] if "=runs" in flags else SMALL), *flags.split())


@pytest.mark.parametrize("flag", ["--no-such-flag", "--num-envs=many", "--activation=cube"])
def test_a_flag_that_is_no_flag_is_named_with_exit_code_2(flag, here):
    assert flag.split("=")[0].lstrip("-") in run(flag, code=2).err and os.listdir() == []


BROKEN = {  # what step() returns: its place, message
    "wide obs": ({"obs": torch.zeros(32, 7)}, 0, "the shapes [(32, 2), (32, 7), (32,)"),
    "column of rewards": (torch.zeros(32, 1), 1, "(32, 2), (32, 1), (32,)"),
    "few dones": (torch.zeros(5), 2, "(32,), (5,), (5,)]"),
    "few time_outs": ({"time_outs": torch.zeros(3)}, 3, "(3,)]"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_env_that_breaks_the_contract_is_refused(name, here):
    wrong, place, message = BROKEN[name]
    returned = [{"obs": torch.zeros(32, 2)}, torch.zeros(32), torch.zeros(32), {}]
    returned[place] = wrong
    assert message in refused(*SMALL, env=dict(step=lambda _: returned))


@pytest.mark.parametrize("name", ["get_env_state", "policy_metadata"])
def test_what_no_checkpoint_can_hold_is_refused_before_training(name, here):
    done = run(*SMALL, env={name: lambda: {"path": Path("x")}}, code=1)
    assert "last.pth cannot be used: only tensors, numbers, text, lists and dicts" in done.err
    assert "epoch 1/" not in done.out
