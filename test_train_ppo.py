"""Tests of train_ppo.py through the real thing: processes, event files, W&B runs, rl_games, hydra.

Only isaacgym and isaacgymenvs are stood in for (`ISAACGYM`): no package index has them.
"""

import collections
import contextlib
import copy
import errno
import http.server
import importlib
import importlib.util
import io
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import train_ppo
from benchmarks import fidelity
from examples.record_video import RecordVideo, film
from tools import export_policy, from_rl_games
from train_ppo import Args, Cartpole, EpisodeMeter, RunningMeanStd, gae, load_checkpoint, main

HERE = Path(__file__).resolve().parent
SCRIPT = str(HERE / "train_ppo.py")
SMALL = ["--num-envs", "32", "--num-steps", "8", "--max-epochs", "4", "--save-frequency", "2"]


# ------------------------------------------------------------------------------------------ helpers


def shell(*arguments, cwd, env=(), code=0, timeout=240, script=(SCRIPT,)):
    """Run train_ppo.py as a user does; returns (stdout, stderr)."""
    environment = {**os.environ, "PYTHONPATH": str(cwd), "WANDB_MODE": "offline", **dict(env)}
    environment.pop("WANDB_SERVICE", None)  # it belongs to a W&B run in this process
    done = subprocess.run(
        [sys.executable, *script, *arguments],
        cwd=str(cwd),
        env=environment,
        timeout=timeout,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
    )
    assert done.returncode == code, (
        f"exit code {done.returncode}, expected {code}\n{done.stdout}\n{done.stderr}"
    )
    return done.stdout, done.stderr


def at_once(call, items):
    """[call(item) for item in items], all at the same time: most of it is waiting for processes."""
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(call, items))


FORKSERVER_LOCK = threading.Lock()


def forkserver():
    """Makes real processes that have imported torch already, which takes two seconds.

    torch._dynamo is there too, because the first optimizer imports it, which takes another second.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    with FORKSERVER_LOCK:
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # where the server finds this module
        multiprocessing.forkserver.ensure_running()
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


def start_main(folder, environ, arguments, prefix, reload=False):
    """Target of a process that has imported torch already: `train_ppo.py ARGUMENTS` in `folder`.

    Its output goes to the files PREFIX.out and PREFIX.err. With `reload` train_ppo is imported
    anew, with this environment.
    """
    os.chdir(folder)
    sys.path.insert(0, folder)
    os.environ.update(environ)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{prefix}.{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdout = os.fdopen(1, "w", 1)
    sys.stderr = os.fdopen(2, "w", 1)
    if reload:
        importlib.reload(train_ppo)
    if "SLOW_FSYNC" in environ:
        fsync = os.fsync
        train_ppo.os.fsync = lambda fd: (time.sleep(float(environ["SLOW_FSYNC"])), fsync(fd))
    train_ppo.main(arguments)


def started(arguments, environ=(), cwd=".", reload=False):
    """A running process of the forkserver with these arguments.

    When it has ended, process.output() is [stdout, stderr].
    """
    prefix = os.path.join(tempfile.mkdtemp(), "std")
    target = (os.path.abspath(str(cwd)), dict(environ), arguments, prefix, reload)
    process = forkserver().Process(target=start_main, args=target)
    process.start()
    process.output = lambda: [Path(f"{prefix}.{name}").read_text() for name in ("out", "err")]
    return process


def forked(*arguments, cwd, env=(), code=0, timeout=240, reload=False):
    """Like `shell`, but main() in a process of the forkserver, which starts 3 seconds sooner."""
    process = started(arguments, {"WANDB_MODE": "offline", **dict(env)}, cwd, reload)
    process.join(timeout)
    process.kill()
    process.join()
    out, err = process.output()
    assert process.exitcode == code, f"{process.exitcode} instead of {code}\n{out}\n{err}"
    return out, err


def scalars(run_dir):
    """{tag: [(step, value), ...]} of a run's event files, in the order in which they were written.

    Steps of epochs that were run twice are there twice.
    """
    found = {}
    for path in sorted(Path(run_dir, "summaries").glob("events*"), key=lambda p: p.stat().st_mtime):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag in ("video", "arguments/text_summary"):
                    continue
                assert value.tensor.float_val, value
                found.setdefault(value.tag, []).append((event.step, value.tensor.float_val[0]))
    return found


def wandb_records(run_dir):
    """Records of each W&B run under a run folder, oldest first, read from its LevelDB-style log."""
    from wandb.proto import wandb_internal_pb2

    runs = []
    for path in sorted(Path(run_dir).glob("wandb/*run-*/*.wandb"), key=lambda p: p.stat().st_mtime):
        data = path.read_bytes()
        position = 7
        records = []
        buffer = b""
        while position + 7 <= len(data):
            left = 32768 - position % 32768
            if left < 7:  # the last bytes of a block are too few for a header
                position += left
                continue
            _, length, kind = struct.unpack("<IHB", data[position : position + 7])
            if kind in (1, 2):  # a record begins
                buffer = b""
            buffer += data[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):  # a record ends
                records.append(wandb_internal_pb2.Record.FromString(buffer))
        runs.append(records)
    return runs


def wandb_run(records):
    """(run id, config, history rows, {metric: x-axis}) of one W&B run."""

    def key(item):
        return item.key or "/".join(item.nested_key)

    run = next(r.run for r in records if r.HasField("run"))
    config = {key(item): json.loads(item.value_json) for item in run.config.update}
    histories = [r.history for r in records if r.HasField("history")]
    rows = [{key(item): json.loads(item.value_json) for item in h.item} for h in histories]
    axes = {r.metric.name: r.metric.step_metric for r in records if r.HasField("metric")}
    return run.run_id, config, rows, axes


def snapshot(folder):
    """{relative path: content} of all files under a folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file() and "__pycache__" not in str(p)
    }


def differences(a, b, path=""):
    """Names of the leaves in which two checkpoints differ, to the last bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(set(a) | set(b), key=str)
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{path}.{k}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{path}.{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = torch.equal(a, b)
    else:
        same = type(a) is type(b) and a == b
    return [] if same else [path]


def same_state(a, b):
    """Leaves that differ between two checkpoint files, but for what must: clocks and names."""
    a, b = load_checkpoint(str(a)), load_checkpoint(str(b))
    for state in (a, b):
        for key in ("total_time", "wandb_run_id"):
            del state[key]
        for key in ("max_epochs", "experiment", "checkpoint"):
            del state["args"][key]
    return differences(a, b)


class Env:
    """A factory env for tests, which resets before it observes and reuses its tensors.

    Reward: 1 - |a - obs|. Episodes of environment i have lengths[i] steps.
    """

    num_obs = num_acts = 2

    def __init__(self, num_envs, device, seed, lengths=None, **attributes):
        self.num_envs = num_envs
        self.lengths = torch.full((num_envs,), 20) if lengths is None else lengths
        self.t = torch.zeros(num_envs, dtype=torch.long)
        self.obs = torch.rand(num_envs, 2) - 0.5
        self.reward = torch.zeros(num_envs)
        self.done = torch.zeros(num_envs, dtype=torch.long)
        self.infos = {}
        self.__dict__.update(attributes)

    def reset(self):
        return {"obs": self.obs}

    def step(self, actions):
        self.reward[:] = 1 - (actions - self.obs).abs().mean(1)
        self.t += 1
        self.done[:] = self.t >= self.lengths
        self.t[self.done.bool()] = 0
        # In place: whoever kept the observations without a copy now has other numbers.
        self.obs[:] = torch.rand(self.num_envs, 2) - 0.5
        self.infos["time_outs"] = self.done.bool()
        return {"obs": self.obs}, self.reward, self.done, self.infos


@pytest.fixture(scope="session")
def default_run(tmp_path_factory):
    """`python train_ppo.py`, as a newcomer runs it, but into a pipe: (cwd, stdout, stderr, run)."""
    cwd = tmp_path_factory.mktemp("default")
    out, err = shell(cwd=cwd)
    return cwd, out, err, next((cwd / "runs").iterdir())


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A working directory with a finished run of four epochs, runs/r; not to be written to."""
    cwd = tmp_path_factory.mktemp("small")
    main([*SMALL, "--experiment", "r", "--train-dir", str(cwd / "runs")])
    return cwd


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory of the test's own, with W&B offline; imports of the test are undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    # Without it rl_games 1.6.1 cannot read its own files in torch >= 2.6.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in ("my_envs", "my_env", "my_observer"):
        sys.modules.pop(name, None)


# ------------------------------------------------------------------------------------- the main job


def test_default_run_learns_cartpole(default_run):
    """`python train_ppo.py` solves Cartpole, prints a plain line an epoch, and leaves its files."""
    cwd, out, err, run_dir = default_run
    rewards = [float(x) for x in re.findall(r"reward ([-\d.]+) length", out)]
    assert rewards[19] < 250 < rewards[-1]
    assert max(rewards) >= 480
    assert len(re.findall(r"^epoch \d+/100 ", out, re.M)) == 100
    assert "\r" not in out and "\x1b" not in out, "a pipe gets plain lines"
    assert not err.strip(), err
    files = {"best.pth", "last.pth", *(f"epoch_{n}.pth" for n in (25, 50, 75, 100))}
    assert set(os.listdir(run_dir / "nn")) == files
    best = load_checkpoint(str(run_dir / "nn" / "best.pth"))
    assert best["epoch"] == best["best_epoch"] >= 50
    assert best["last_mean_rewards"] == pytest.approx(max(rewards[49:]), abs=0.01)
    assert rewards[best["epoch"] - 1] == max(rewards[49:])


def test_five_seeds_learn_as_in_rl_games(default_run, tmp_path):
    """The median over five seeds learns as fast as rl_games 1.6 does with the same settings.

    There it is about 110, 200, 480 and 489 at epochs 20, 40, 60 and 100. In both a seed now and
    then stays below 480, which would spoil a mean.
    """

    def curve(out):
        line = r"^epoch {}/100 .*reward ([-\d.]+) "
        return [float(re.search(line.format(n), out, re.M).group(1)) for n in (20, 40, 60, 100)]

    def train(seed):
        flags = ["--seed", str(seed), "--save-frequency", "0", "--experiment", f"r{seed}"]
        return forked(*flags, cwd=tmp_path)[0]

    outputs = [default_run[1], *at_once(train, [1, 2, 3, 4])]
    rewards = np.array([curve(out) for out in outputs])
    assert (np.median(rewards, 0) >= [85, 150, 430, 480]).all(), rewards


def test_printed_play_command_evaluates_the_best_checkpoint(default_run):
    """The command that a run prints plays one episode in each env, and writes nothing."""
    cwd, out, _, run_dir = default_run
    before = snapshot(cwd)
    script, arguments = re.search(r"^play +python (\S+) (.*)$", out, re.M).groups()
    assert (cwd / script).resolve() == Path(SCRIPT)
    assert arguments == f"--play --checkpoint {run_dir.relative_to(cwd)}/nn/best.pth"
    out, _ = shell(*arguments.split(), cwd=cwd)
    figures = r"reward mean (\S+) .* mean length (\S+), (\d+) episodes"
    mean, length, count = re.search(figures, out).groups()
    assert float(mean) >= 470
    assert (length, count) == ("500.0", "512"), "the pole stands to the end everywhere"
    assert snapshot(cwd) == before


def test_tensorboard_has_rl_games_tags(default_run):
    """The event file has the tags of rl_games and two of ours, each on its own x-axis."""
    expected = {
        f"{name}/{axis}"
        for name in ("rewards", "shaped_rewards", "episode_lengths")
        for axis in ("step", "iter", "time")
    }
    expected |= {f"losses/{x}" for x in ("a_loss", "c_loss", "entropy", "bounds_loss")}
    expected |= {"losses/clipfrac", "losses/explained_variance"}
    expected |= {f"info/{x}" for x in ("last_lr", "lr_mul", "e_clip", "kl", "epochs")}
    parts = ("step_inference_rl_update", "step_inference", "step")
    expected |= {f"performance/{part}_fps" for part in parts}
    parts = ("rl_update", "step_inference", "step")
    expected |= {f"performance/{part}_time" for part in parts}
    found = scalars(default_run[3])
    assert set(found) == expected
    assert [step for step, _ in found["losses/a_loss"]] == [8192 * i for i in range(1, 101)]
    assert [step for step, _ in found["rewards/iter"]] == list(range(1, 101))
    assert all(math.isfinite(v) for values in found.values() for _, v in values)


def test_config_json_says_how_to_run_it_again(default_run):
    """config.json has the arguments, the command line, and the versions that were used."""
    config = json.loads((default_run[3] / "config.json").read_text())
    saved = {k: tuple(v) if isinstance(v, list) else v for k, v in config["args"].items()}
    assert Args(**saved) == Args()
    assert config["versions"]["torch"] == torch.__version__
    assert "train_ppo.py" in config["command"]
    assert config["origin"] == "", "it started from nothing"


def screen(output, columns):
    """The lines that a terminal shows after `output`, and the epochs' lines drawn on it."""
    lines, drawn, column = [""], [], 0
    for piece in re.findall(r"\r|\n|\x1b\[K|[^\r\n\x1b]+", output):
        if piece == "\r":
            column = 0
        elif piece == "\n":
            lines.append("")
        elif piece == "\x1b[K":
            lines[-1] = lines[-1][:column]
        else:
            lines[-1] = lines[-1][:column] + piece + lines[-1][column + len(piece) :]
            column += len(piece)
            if re.match(r"epoch \d", piece):
                assert lines[-1] == piece, f"drawn over something else: {lines[-1]}"
                assert len(piece) < columns, f"too long, the terminal would wrap it: {piece}"
                drawn.append(piece)
    return lines, drawn


def test_live_line_on_a_terminal(tmp_path):
    """On a terminal of 80 columns an epoch is one line, drawn in place, of whole fields only.

    Messages do not tear it: each has lines of its own, whether stderr is the terminal or a file.
    """
    import fcntl
    import pty
    import termios

    script = textwrap.dedent("""
        import sys
        import train_ppo

        class Fails(train_ppo.AlgoObserver):
            def __init__(self, epoch, errors):
                self.epoch = epoch
                self.errors = errors

            def after_print_stats(self, frame, epoch_num, total_time):
                if epoch_num == self.epoch:
                    sys.stderr = self.errors
                    raise ValueError(f"on purpose in epoch {epoch_num}")

        file = open("err", "w")
        train_ppo.main(observers=[Fails(2, sys.stderr), Fails(4, file)])
    """)
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", script, *SMALL, "--max-epochs", "100000"],
        cwd=str(tmp_path),
        env={**os.environ, "PYTHONPATH": str(HERE)},
        stdout=child,
        stderr=child,
    )
    os.close(child)
    output = b""
    chunk = b"the first"
    signalled = False
    with contextlib.suppress(OSError):  # raised once the other end is closed
        while chunk:
            chunk = os.read(parent, 4096)
            output += chunk
            if b"epoch 7/" in output and not signalled:
                time.sleep(0.003)  # in the middle of an epoch rather than of its line
                process.send_signal(signal.SIGTERM)
                signalled = True
    os.close(parent)
    assert process.wait() == 128 + signal.SIGTERM, output

    lines, drawn = screen(output.decode(), 80)
    fields = [r"no episode finished yet|reward -?\d+\.\d\d length \d+\.\d"]
    fields += [r"left \d+:\d\d:\d\d", r"lr \d\.\de-\d\d", r"fps \d+k/\d+k/\d+k"]
    whole = r"epoch \d+/100000" + "".join(f"( ({field})" for field in fields) + ")?" * len(fields)
    for text in drawn:
        assert re.fullmatch(whole, text), text
    assert [text.split("/")[0] for text in drawn[:7]] == [f"epoch {i}" for i in range(1, 8)]
    assert sum(line.startswith("epoch ") for line in lines) <= 1, "each over the one before"
    assert "SIGTERM: finishing this epoch, then saving last.pth" in lines
    errors = (tmp_path / "err").read_text()
    assert "\x1b" not in errors and "\r" not in errors
    for epoch, shown in ((2, lines), (4, errors.splitlines())):
        error = f"on purpose in epoch {epoch}"
        warning = f"warning: Fails.after_print_stats raised ValueError({error!r}): "
        assert sum(line.startswith(warning) for line in shown) == 1, shown
        assert f"ValueError: {error}" in shown


# --------------------------------------------------------------------------------------- continuing


def test_second_signal_ends_it_at_once(here):
    """An env that never returns from step cannot hold up the end; earlier files stay readable.

    --play has nothing to finish, so there the first signal ends it.
    """
    Path("my_envs.py").write_text(
        textwrap.dedent("""
            import time
            import train_ppo

            class Slow(train_ppo.Cartpole):
                steps = 0

                def step(self, actions):
                    self.steps += 1
                    if self.steps > 30:
                        print("asleep", flush=True)
                        time.sleep(100)
                    return super().step(actions)

            def make(num_envs, device, seed):
                return Slow(num_envs, device)
        """)
    )

    def asleep(arguments):
        process = subprocess.Popen(
            [sys.executable, SCRIPT, "--env-id", "my_envs:make", *arguments],
            env={**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{HERE}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,
            # Where these tests are a shell's background job, their children would ignore it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert any("asleep" in line for line in process.stdout)
        return process

    main([*SMALL, "--experiment", "played", "--max-epochs", "1"])
    training, playing = at_once(
        asleep,
        [
            [*SMALL, "--max-epochs", "9", "--experiment", "r"],
            ["--play", "--checkpoint", "runs/played"],
        ],
    )
    training.send_signal(signal.SIGTERM)
    assert "finishing this epoch" in training.stdout.readline()
    training.send_signal(signal.SIGTERM)
    assert training.wait(10) == -signal.SIGTERM
    assert load_checkpoint("runs/r/nn/epoch_2.pth")["epoch"] == 2
    playing.send_signal(signal.SIGINT)
    assert playing.communicate(timeout=60) == ("", "")
    assert playing.returncode == 128 + signal.SIGINT


def test_continuing_is_exact(tmp_path):
    """8 epochs and 8 more give what 16 give: all files to the last bit, and the same curves."""
    # Episodes have up to 500 steps, so best.pth may be written from epoch 10 on.
    flags = ["--num-envs", "160", "--num-steps", "50", "--save-best-after", "5", "--experiment"]
    straight, stopped = tmp_path / "runs/straight", tmp_path / "runs/stopped"
    at_once(
        lambda run: forked("--max-epochs", run[0], *flags, run[1], cwd=tmp_path),
        [("16", "straight"), ("8", "stopped")],
    )
    files = [(straight / "nn" / name, stopped / "nn" / name) for name in ("last.pth", "best.pth")]
    assert same_state(*files[0]), "the comparison can see a difference"
    out, _ = shell("--checkpoint", "runs/stopped", "--max-epochs", "16", cwd=tmp_path)
    assert "exactly where it stopped" in out
    assert sorted(os.listdir(tmp_path / "runs")) == ["stopped", "straight"]
    for pair in files:
        assert same_state(*pair) == []
    curves, expected = scalars(stopped), scalars(straight)
    assert set(curves) == set(expected)
    for tag, points in curves.items():
        if tag.endswith("/time"):
            assert [v for _, v in points] == [v for _, v in expected[tag]]
            steps = [step for step, _ in points]
            assert steps == sorted(steps), "time goes on, it does not start over"
        elif not tag.startswith("performance/"):
            assert points == expected[tag], tag


@contextlib.contextmanager
def tensorboard(logdir):
    """A running TensorBoard with its data server: a function (run, tag) -> [(step, value), ...]."""
    command = ["--load_fast=true", "--logdir", str(logdir), "--port", "0", "--host", "127.0.0.1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
    )
    printed = []
    try:
        for line in process.stdout:
            printed.append(line)
            if "Press CTRL+C" in line:
                break
        address = re.search(r"http://[\d.:]+/", "".join(printed))
        assert address, "".join(printed)

        def points(run, tag):
            query = urllib.parse.urlencode({"run": run, "tag": tag})
            url = f"{address.group()}data/plugin/scalars/scalars?{query}"
            with urllib.request.urlopen(url, timeout=20) as answer:
                return [(step, value) for _, step, value in json.load(answer)]

        yield points
    finally:
        process.terminate()
        process.wait(20)


def test_tensorboard_shows_epochs_that_are_run_again_once(here):
    """After a crash TensorBoard shows each step once, with the values of the later run of it.

    Both runs of an epoch are in the event files. TensorBoard's data server, which it uses wherever
    it is installed, drops the earlier one while it loads.
    """
    data_server = pytest.importorskip("tensorboard_data_server")
    if data_server.server_binary() is None:
        pytest.skip("tensorboard-data-server has no program for this platform")
    main([*SMALL, "--num-steps", "64", "--experiment", "r", "--max-epochs", "5"])
    for name in ("last", "epoch_4"):  # as if killed in epoch 4
        os.remove(f"runs/r/nn/{name}.pth")
    time.sleep(1.1)  # event files are read in the order of their names, which have whole seconds
    # Another learning rate, so that the two runs of an epoch can be told apart.
    flags = ["--learning-rate", "1e-5", "--lr-schedule", "fixed"]
    main(["--checkpoint", "runs/r", "--max-epochs", "7", *flags])
    written = scalars("runs/r")
    with tensorboard("runs/r") as points:
        for tag, step in (("rewards/iter", 1), ("rewards/step", 2048), ("losses/a_loss", 2048)):
            steps = [step * epoch for epoch in range(1, 8)]
            assert [s for s, _ in written[tag]] == steps[:5] + steps[2:]
            deadline = time.time() + 20
            while points("summaries", tag)[-1][0] < steps[-1] and time.time() < deadline:
                time.sleep(0.1)
            shown = points("summaries", tag)
            assert shown == written[tag][:2] + written[tag][5:], tag
            assert written[tag][4] != written[tag][7], "the two runs of epoch 5 differ"


def test_a_file_starts_a_new_run(here, capsys):
    """--checkpoint FILE goes on from there in a new folder, and the old one stays as it is.

    This holds for an older file and for the newest one, and config.json says where the run came
    from. A folder can only be continued, so a new name for it is an error.
    """
    main([*SMALL, "--experiment", "old"])
    before = snapshot("runs/old")
    main(["--checkpoint", "runs/old/nn/epoch_2.pth", "--experiment", "branch"])
    main(["--checkpoint", "runs/old/nn/last.pth", "--max-epochs", "5"])
    assert snapshot("runs/old") == before
    assert capsys.readouterr().out.count("branching off runs/old/nn/") == 2
    assert same_state("runs/old/nn/last.pth", "runs/branch/nn/last.pth") == []
    assert [s for s, _ in scalars("runs/branch")["info/epochs"]] == [768, 1024]
    (newest,) = (path for path in Path("runs").iterdir() if path.name not in ("old", "branch"))
    assert newest.name.startswith("Cartpole_"), "a name is not inherited"
    assert load_checkpoint(str(newest / "nn/last.pth"))["epoch"] == 5
    folders = ["runs/old", "runs/branch", newest]
    configs = [json.loads(Path(folder, "config.json").read_text()) for folder in folders]
    files = ["", "runs/old/nn/epoch_2.pth", "runs/old/nn/last.pth"]
    assert [config["origin"] for config in configs] == files
    ids = [load_checkpoint(f"{folder}/nn/last.pth")["wandb_run_id"] for folder in folders]
    assert len(set(ids)) == 3

    before = snapshot("runs")
    with pytest.raises(SystemExit, match="2"):
        main(["--checkpoint", "runs/old", "--experiment", "new", "--max-epochs", "5"])
    message = capsys.readouterr().err
    assert re.fullmatch("error: .* folder continues .* give runs/old/nn/last.pth\n", message)
    assert snapshot("runs") == before


def test_complete_run_says_so(here, capsys):
    """To continue a run that has all its epochs changes nothing and says what to do."""
    main([*SMALL, "--experiment", "r"])
    before = snapshot("runs")
    main(["--checkpoint", "runs/r"])
    assert "is complete: 4 of 4 epochs" in capsys.readouterr().out
    assert snapshot("runs") == before


def test_newest_is_picked_by_epoch_and_broken_files_are_skipped(here, capsys):
    """A folder continues from its readable file of the highest epoch; each other one is named."""
    main([*SMALL, "--experiment", "r", "--max-epochs", "12"])
    os.mkfifo("runs/r/nn/best.pth")  # reading it would wait for ever
    for name in ("last", "epoch_12"):
        Path(f"runs/r/nn/{name}.pth").write_bytes(b"half a file")
    main(["--checkpoint", "runs/r"])
    output = capsys.readouterr()
    for name in ("last", "epoch_12"):
        pattern = rf"^warning: runs/r/nn/{name}\.pth cannot be used: .*: skipped$"
        assert len(re.findall(pattern, output.err, re.M)) == 1, output.err
    assert "warning: runs/r/nn/best.pth is not a file: skipped\n" in output.err
    assert "continuing runs/r/nn/epoch_10.pth at epoch 10" in output.out, "by name it were epoch_8"


def test_continuing_reads_each_checkpoint_once(here, monkeypatch):
    """One continuation loads each file at most once, and no older epoch_N.pth than the newest."""
    flags = ["--num-steps", "128", "--save-best-after", "1", "--games-to-track", "4"]
    main([*SMALL, *flags, "--experiment", "r"])
    loads = collections.Counter()
    load = torch.load

    def counting(file, *args, **kwargs):
        if hasattr(file, "name"):  # not what is only tried in memory
            loads[os.path.relpath(file.name, "runs/r/nn")] += 1
        return load(file, *args, **kwargs)

    monkeypatch.setattr(torch, "load", counting)
    main(["--checkpoint", "runs/r", "--max-epochs", "5"])
    assert loads == {"last.pth": 1, "best.pth": 1, "epoch_4.pth": 1}


def test_flags_win_over_the_checkpoint(here, capsys):
    """A flag changes a run that is continued; with another num_envs it starts new episodes."""
    main([*SMALL, "--experiment", "r"])
    flags = ["--learning-rate", "1e-5", "--lr-schedule", "fixed"]
    main(["--checkpoint", "runs/r", "--max-epochs", "5", *flags])
    group = load_checkpoint("runs/r/nn/last.pth")["optimizer"]["param_groups"][0]
    assert group["lr"] == pytest.approx(1e-5)
    main(["--checkpoint", "runs/r", "--max-epochs", "6", "--num-envs", "16"])
    assert "starts new episodes" in capsys.readouterr().out


def test_init_from_starts_a_new_run_with_the_weights(here):
    """--init-from takes weights, statistics and network from a run, and counts from epoch 1."""
    main([*SMALL, "--experiment", "a", "--units", "8", "--activation", "tanh"])
    flags = ["--max-epochs", "1", "--learning-rate", "0", "--lr-schedule", "fixed"]
    main([*SMALL, "--experiment", "b", "--init-from", "runs/a", *flags])
    a, b = load_checkpoint("runs/a/nn/last.pth"), load_checkpoint("runs/b/nn/last.pth")
    assert b["epoch"] == 1
    assert b["args"]["activation"] == "tanh"
    weights = [k for k in a["model"] if k.startswith("a2c_network")]
    assert weights
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in weights)
    assert b["model"]["running_mean_std.count"] == a["model"]["running_mean_std.count"] + 256
    origin = json.loads(Path("runs/b/config.json").read_text())["origin"]
    assert origin == "runs/a/nn/last.pth"


def test_runs_never_share_a_folder(here):
    """A name that is taken gets a number."""
    for _ in range(3):
        main([*SMALL, "--experiment", "same", "--max-epochs", "1"])
    assert sorted(os.listdir("runs")) == ["same", "same_2", "same_3"]


def test_stop_signal_saves_and_can_be_continued(here, capsys):
    """Ctrl-C and SIGTERM end training after the epoch; the command that is printed goes on."""

    def run(number):
        process = subprocess.Popen(
            [sys.executable, SCRIPT, *SMALL, "--max-epochs", "100000", "--experiment", number.name],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
            # Where these tests are a shell's background job, their children would ignore it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        for line in process.stdout:
            if line.startswith("epoch 5/"):
                process.send_signal(number)
                break
        output = process.stdout.read()
        return output, process.wait(60)

    signals = [signal.SIGINT, signal.SIGTERM]
    for number, (output, code) in zip(signals, at_once(run, signals)):
        assert code == 128 + number, output
        epoch = load_checkpoint(f"runs/{number.name}/nn/last.pth")["epoch"]
        assert epoch >= 5
        assert f"\nstopped after epoch {epoch} ({number.name})" in output
        script, arguments = re.search(r"^continue +python (\S+) (.*)$", output, re.M).groups()
        assert Path(script).resolve() == Path(SCRIPT)
        assert arguments == f"--checkpoint runs/{number.name}"
        capsys.readouterr()
        main([*arguments.split(), "--max-epochs", str(epoch + 1)])
        out = capsys.readouterr().out
        assert f"at epoch {epoch}," in out
        assert "exactly where it stopped" in out


# --------------------------------------------------------------------------------------------- play


def one_and_nine_env(num_envs, device, seed):
    """Half of the envs have episodes of 1 step, half of 9 steps; each step gives a reward of 1."""
    env = Env(num_envs, device, seed, lengths=torch.tensor([1, 9] * (num_envs // 2)))
    step = env.step

    def constant(actions):
        obs, reward, done, infos = step(actions)
        return obs, torch.ones_like(reward), done, infos

    env.step = constant
    return env


def test_play_takes_one_episode_of_every_env(here):
    """The mean is 5, not nearer to 1, though many short episodes end before the long ones.

    A number of envs that cannot be split into minibatches is no obstacle, because play has none.
    """
    env = ["--env-id", f"{__name__}:one_and_nine_env"]
    main([*env, *SMALL, "--experiment", "r"])
    flags = [*env, "--num-envs", "10", "--minibatch-size", "3"]
    args, path, state = train_ppo.parse_args(["--play", "--checkpoint", "runs/r", *flags])
    result = train_ppo.Runner(args, train_ppo.MultiObserver([]), path, state).run()
    expected = {"mean": 5, "std": 4, "min": 1, "max": 9, "length": 5, "count": 10}
    assert {name: result[name] for name in expected} == expected


def test_play_takes_mean_actions(here, capsys):
    """The policy's standard deviation plays no part in --play, the seed of the env does."""
    main([*SMALL, "--experiment", "r", "--max-epochs", "1"])
    state = load_checkpoint("runs/r/nn/last.pth")
    state["model"]["a2c_network.sigma"] += 3
    train_ppo.save_checkpoint(state, "noisy.pth")

    def played(*flags):
        capsys.readouterr()
        main(["--play", "--num-envs", "8", "--checkpoint", *flags])
        return capsys.readouterr().out

    first = played("runs/r")
    assert "8 episodes, one of each env, mean actions" in first
    assert played("noisy.pth") == first
    assert played("runs/r", "--seed", "7") != first


# ---------------------------------------------------------------------------------------------- W&B


def test_wandb_offline_run_holds_every_scalar(tmp_path):
    """W&B has all that TensorBoard has, with the same x-axes, in one run over a continuation.

    Tags and group come from W&B's own variables.
    """
    flags = ["--num-steps", "128", "--save-best-after", "2", "--games-to-track", "8"]
    env = {"WANDB_TAGS": "x,y", "WANDB_RUN_GROUP": "g"}
    forked(*SMALL, "--track", "--experiment", "r", *flags, cwd=tmp_path, env=env)
    # --track comes from the checkpoint.
    forked("--checkpoint", "runs/r", "--max-epochs", "6", cwd=tmp_path)
    run_dir = tmp_path / "runs/r"
    records = wandb_records(run_dir)
    first, second = (wandb_run(part) for part in records)
    run = next(record.run for record in records[0] if record.HasField("run"))
    assert (list(run.tags), run.run_group) == (["x", "y"], "g")
    saved = load_checkpoint(str(run_dir / "nn/last.pth"))["wandb_run_id"]
    assert first[0] == second[0] == saved, "the run is continued, not begun anew"
    arguments = json.loads((run_dir / "config.json").read_text())["args"]
    assert arguments.items() <= first[1].items()

    rows = first[2] + second[2]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["global_step"] for row in rows] == [4096 * i for i in range(1, 7)]
    for tag, points in scalars(run_dir).items():
        sent = [row for row in rows if tag in row]
        values = [np.float32(value) for _, value in points]
        assert [np.float32(row[tag]) for row in sent] == values, tag
        axis = {"iter": "epoch", "time": "time"}.get(tag.split("/")[-1], "global_step")
        if tag.startswith("performance/"):
            axis = "global_step"
        assert first[3].get(tag, axis) == second[3][tag] == axis
        assert [int(row[axis]) for row in sent] == [step for step, _ in points], tag

    best = load_checkpoint(str(run_dir / "nn/best.pth"))
    summary = {}
    for record in records[1]:
        if record.HasField("summary"):
            update = record.summary.update
            summary.update({item.key: json.loads(item.value_json) for item in update if item.key})
    assert summary["stop_reason"] == "done"
    assert summary["best_reward"] == best["last_mean_rewards"]
    assert summary["best_epoch"] == best["best_epoch"]


def test_wandb_run_id_from_the_environment_wins(here, monkeypatch):
    """WANDB_RUN_ID names the W&B run, and the checkpoint remembers it."""
    monkeypatch.setenv("WANDB_RUN_ID", "mine1234")
    main([*SMALL, "--track", "--experiment", "r"])
    assert wandb_run(wandb_records("runs/r")[0])[0] == "mine1234"
    assert load_checkpoint("runs/r/nn/last.pth")["wandb_run_id"] == "mine1234"


def test_wandb_trouble_does_not_stop_training(tmp_path):
    """Without an account or a network there is one warning, and all is recorded offline."""

    def run(trouble):
        folder = tmp_path / trouble.replace(" ", "_")
        folder.mkdir()
        env = {
            "HOME": str(folder),
            "WANDB_MODE": "online",
            "WANDB_INIT_TIMEOUT": "5",
            "NETRC": str(folder / "none"),
            "WANDB_BASE_URL": "http://127.0.0.1:9",
        }
        if trouble == "no network":
            env["WANDB_API_KEY"] = "0" * 40
        start = shell if trouble == "no network" else forked
        _, err = start(*SMALL, "--track", "--experiment", "r", cwd=folder, env=env)
        warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
        assert len(warnings) == 1, err
        assert warnings[0].startswith("warning: W&B failed to start: "), err
        assert "recording offline, upload later: wandb sync runs/r/wandb/" in warnings[0]
        assert load_checkpoint(str(folder / "runs/r/nn/last.pth"))["epoch"] == 4
        assert len(scalars(folder / "runs/r")["info/kl"]) == 4
        assert len(wandb_run(wandb_records(folder / "runs/r")[-1])[2]) == 4

    at_once(run, ["no account", "no network"])


def test_wandb_that_is_missing_does_not_stop_training(here, monkeypatch, capsys):
    """Without the package --track is one warning that says how to install it."""
    monkeypatch.setitem(sys.modules, "wandb", None)  # which makes `import wandb` fail
    main([*SMALL, "--track", "--experiment", "r"])
    err = capsys.readouterr().err
    assert re.fullmatch(r"warning: --track: .*pip install wandb.*\n", err), err
    assert load_checkpoint("runs/r/nn/last.pth")["epoch"] == 4
    assert len(scalars("runs/r")["info/kl"]) == 4


class WandbServer(http.server.ThreadingHTTPServer):
    """As much of a W&B server as its client needs.

    Its trouble begins once the run is made, or at the start.
    """

    daemon_threads = True

    def __init__(self, trouble):
        super().__init__(("127.0.0.1", 0), WandbHandler)
        self.trouble = trouble
        self.in_trouble = trouble == "silent from the start"
        self.rows = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_):
        """Clients may hang up at any time."""


class WandbHandler(http.server.BaseHTTPRequestHandler):
    def answer(self):
        server = self.server
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if server.in_trouble and server.trouble.startswith("silent"):
            time.sleep(600)
        if server.in_trouble and server.trouble == "gone":
            server.shutdown()
            server.server_close()  # from now on connections are refused
            raise ConnectionError
        status, data = 200, {}
        if self.path == "/graphql":
            data = self.answer_query(json.loads(body))
        elif self.path.endswith("/file_stream"):
            status = 404 if server.in_trouble else 200
            files = json.loads(body).get("files", {})
            rows = files.get("wandb-history.jsonl", {}).get("content", ())
            server.rows += [json.loads(row) for row in rows]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(data).encode())

    do_GET = do_POST = do_PUT = answer

    def answer_query(self, query):
        server = self.server
        names = query.get("variables", {})
        wanted = query["query"].split("(")[0].split("{")[0].split()[-1]
        project = {"id": "p", "name": names.get("project"), "entity": {"id": "e", "name": "e"}}
        run = names.get("name")
        bucket = {"id": "b", "name": run, "displayName": run, "project": project}
        wanted_files = names.get("files", ())
        files = [{"name": name, "uploadUrl": f"{server.url}/{name}"} for name in wanted_files]
        made_files = {"runID": "b", "uploadHeaders": [], "files": files}
        answers = {
            "UpsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": True}},
            "RunResumeStatus": {"model": None},
            "CreateRunFiles": {"createRunFiles": made_files},
            "ServerFeaturesQuery": {"serverInfo": {"features": []}},
        }
        server.in_trouble |= wanted == "UpsertBucket" and server.trouble != "none"
        return {"data": answers.get(wanted, {})}

    def log_message(self, *_):
        """Says nothing."""


SERVER_TROUBLES = ["none", "gone", "silent", "silent from the start", "run deleted"]


@pytest.fixture(scope="module")
def wandb_server_runs(tmp_path_factory):
    """{trouble: (folder, server, stderr, seconds from last.pth to the end)}.

    All run at the same time, because they mostly wait.
    """
    base = tmp_path_factory.mktemp("wandb")

    def run(trouble):
        folder = base / trouble.replace(" ", "_")
        folder.mkdir()
        server = WandbServer(trouble)
        env = {
            "HOME": str(folder),
            "WANDB_MODE": "online",
            "WANDB_API_KEY": "0" * 40,
            "WANDB_BASE_URL": server.url,
            "WANDB_ERROR_REPORTING": "false",  # W&B would wait 10 seconds more for its telemetry
        }
        flags = [*SMALL, "--track", "--experiment", "r"]
        if trouble in ("none", "run deleted"):
            _, err = forked(*flags, cwd=folder, env=env)
        else:  # a whole interpreter, because W&B has an exit hook, which must not wait
            env["PYTHONPATH"] = str(HERE)
            script = "import train_ppo; train_ppo.WandbAlgoObserver.patience = 3; train_ppo.main()"
            _, err = shell(*flags, cwd=folder, env=env, script=["-c", script])
        waited = time.time() - (folder / "runs/r/nn/last.pth").stat().st_mtime
        return folder, server, err, waited

    return dict(zip(SERVER_TROUBLES, at_once(run, SERVER_TROUBLES)))


@pytest.mark.parametrize("trouble", SERVER_TROUBLES)
def test_wandb_server_trouble_does_not_stop_training(wandb_server_runs, trouble):
    """Whatever a server does, training neither waits for it nor loses a row on disk.

    At the end W&B is waited for, but not for long, and one warning says how to upload the rest.
    """
    folder, server, err, waited = wandb_server_runs[trouble]
    warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
    saved = load_checkpoint(str(folder / "runs/r/nn/last.pth"))
    assert saved["epoch"] == 4
    assert saved["total_time"] < 10, "training did not wait"
    if trouble in ("gone", "silent"):
        assert 3 < waited < 30
        left = next((folder / "runs/r/wandb").glob("run-*")).relative_to(folder)
        assert len(warnings) == 1, err
        assert f"wandb sync --include-online {left}" in warnings[0]
    elif trouble == "silent from the start":
        assert len(warnings) == 1, err
        assert "recording offline" in warnings[0]
    else:
        assert not warnings
        # W&B itself says that the run is gone.
        assert ("wandb sync" in err) == (trouble == "run deleted"), err
    rows = wandb_run(wandb_records(folder / "runs/r")[-1])[2]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4], "all of it is on disk"
    if trouble == "none":
        sent = [(row["epoch"], row["global_step"]) for row in server.rows]
        assert sent == [(i, 256 * i) for i in range(1, 5)]
        assert server.rows[-1]["time"] > server.rows[0]["time"]
        rewards = [row["rewards/step"] for row in server.rows if "rewards/step" in row]
        assert rewards == pytest.approx([v for _, v in scalars(folder / "runs/r")["rewards/step"]])


# ---------------------------------------------------------------------------------------- observers


def infos_env(num_envs, device, seed, late_keys=True):
    """An env whose infos hold all that RLGPUAlgoObserver logs.

    A key comes late, and a tensor is overwritten in place.
    """
    env = Env(num_envs, device, seed, lengths=torch.arange(num_envs) % 4 + 2)
    step = env.step
    count = [0]
    reused = torch.zeros(num_envs)

    def with_infos(actions):
        obs, reward, done, infos = step(actions)
        count[0] += 1
        n = count[0]
        reused.fill_(float(n))
        infos["episode"] = {"early": torch.tensor(float(n)), "per_env": reused}
        if late_keys and n > 3:
            infos["episode"]["late"] = 2.0
        infos["episode_cumulative"] = {"steps": torch.ones(num_envs)}
        infos["scores"] = torch.full((num_envs,), 7.0)
        infos["successes"] = torch.tensor(float(n))
        infos["nested"] = {"deep": n, "numpy": np.float32(n)}
        return obs, reward, done, infos

    env.step = with_infos
    return env


def no_late_env(num_envs, device, seed):
    return infos_env(num_envs, device, seed, late_keys=False)


TINY = ["--num-envs", "4", "--num-steps", "8", "--max-epochs", "2"]


def test_rlgpu_observer_logs_what_the_env_reports(here):
    """Means of scalars over the epoch; sums of episode_cumulative over the last episodes."""
    main(["--env-id", f"{__name__}:infos_env", *TINY, "--experiment", "r"])
    found = scalars("runs/r")
    # The check of the env's contract takes step 1, so the two epochs see n = 2..9 and 10..17.
    assert found["Episode/early"] == [(1, 5.5), (2, 13.5)]
    assert found["Episode/per_env"] == [(1, 5.5), (2, 13.5)]
    assert found["Episode/late"] == [(1, 2.0), (2, 2.0)]
    assert found["successes/frame"] == [(32, 5.5), (64, 13.5)]
    for tag in ("successes/iter", "nested/deep/iter", "nested/numpy/iter"):
        assert found[tag] == [(1, 5.5), (2, 13.5)]
    # Episodes of 2, 3, 4 and 5 steps. The check took the first step of the first ones, and the sums
    # start with training.
    lengths = [1, 2, 2, 2] + [2, 3, 3] + [3, 4] + [4]
    assert found["episode_cumulative/steps"][0] == (32, pytest.approx(np.mean(lengths)))
    assert found["episode_cumulative_min/steps_min"][0] == (32, 1)
    assert found["episode_cumulative_max/steps_max"][0] == (32, 4)


def test_rl_games_observers_run_unchanged(here):
    """rl_games' own observers log what they log there, and what they write reaches W&B too."""
    theirs = pytest.importorskip("rl_games.common.algo_observer")
    flags = [*TINY, "--track", "--experiment"]
    observers = [theirs.DefaultAlgoObserver()]
    main(["--env-id", f"{__name__}:infos_env", *flags, "r"], observers=observers)
    found = scalars("runs/r")
    assert found["scores/iter"] == [(1, 7), (2, 7)]
    assert [v for _, v in found["scores/mean"]] == [7, 7]
    rows = wandb_run(wandb_records("runs/r")[0])[2]
    assert [row["scores/mean"] for row in rows] == [7, 7]

    # IsaacAlgoObserver logs what RLGPUAlgoObserver logs, so it takes its place. A key that comes
    # late would stop its own loop.
    args, *_ = train_ppo.parse_args(["--env-id", f"{__name__}:no_late_env", *flags, "q"])
    observers = [theirs.IsaacAlgoObserver(), train_ppo.WandbAlgoObserver()]
    train_ppo.Runner(args, train_ppo.MultiObserver(observers)).run()
    found = scalars("runs/q")
    assert found["Episode/early"] == [(1, 5.5), (2, 13.5)]
    assert found["successes/iter"] == [(1, 9), (2, 17)]
    rows = wandb_run(wandb_records("runs/q")[0])[2]
    assert [row["Episode/early"] for row in rows] == [5.5, 13.5]


def test_hooks_are_called_in_order_with_rl_games_signatures(here):
    """An observer gets rl_games' hooks, arguments and attributes, and the indices of the dones."""
    calls = []
    names = "writer device ppo_device games_to_track epoch_num frame model optimizer env"
    names += " mean_rewards last_mean_rewards num_agents config"

    class Recorder(train_ppo.AlgoObserver):
        def before_init(self, base_name, config, experiment_name):
            assert config["horizon_length"] == config["num_steps"] == 8
            assert experiment_name == config["name"] == "r"
            calls.append("before_init")

        def after_init(self, algo):
            for name in names.split():
                assert hasattr(algo, name), name
            self.algo = algo
            self.ended = 0
            calls.append("after_init")

        def process_infos(self, infos, done_indices):
            assert torch.equal(done_indices, self.algo.dones.nonzero())
            assert done_indices.shape[1:] == (1,)
            self.ended += len(done_indices)
            calls.append("process_infos")

        def after_steps(self):
            calls.append("after_steps")

        def after_print_stats(self, frame, epoch_num, total_time):
            assert frame == epoch_num * 256
            assert total_time > 0
            calls.append("after_print_stats")

    recorder = Recorder()
    main([*SMALL, "--experiment", "r", "--max-epochs", "2", "--strict-observers"], [recorder])
    epoch = 8 * ["process_infos"] + ["after_steps", "after_print_stats"]
    assert calls == ["before_init", "after_init"] + 2 * epoch
    assert recorder.algo.algo_observer.needs_done_indices
    assert recorder.ended == recorder.algo.episodes.count > 0


def test_done_indices_are_not_computed_for_nobody(here, monkeypatch):
    """Where no observer overrides process_infos, no step makes a GPU wait for the indices."""
    handed = []

    class Idle(train_ppo.AlgoObserver):
        def after_print_stats(self, frame, epoch_num, total_time):
            assert not self.algo.algo_observer.needs_done_indices
            handed.append("epoch")

    process_infos = train_ppo.MultiObserver.process_infos

    def spy(self, infos, done_indices):
        handed.append(done_indices)
        process_infos.__get__(self)(infos, done_indices)

    monkeypatch.setattr(train_ppo.MultiObserver, "process_infos", spy)
    main([*SMALL, "--max-epochs", "1", "--strict-observers"], [Idle()])
    assert handed == 8 * [None] + ["epoch"]


class Counting(train_ppo.AlgoObserver):
    """Counts epochs from `start`, and keeps the count in checkpoints, unless it is told not to."""

    def __init__(self, start=0, fails=False, keeps=True):
        self.count = start
        self.fails = fails
        self.keeps = keeps

    def after_print_stats(self, frame, epoch_num, total_time):
        self.count += 1
        if self.fails:
            raise ValueError("on purpose")

    def state_dict(self):
        return {"count": self.count} if self.keeps else {}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_observers_get_back_their_own_states_only(here):
    """When a run is continued each gets back what it had.

    None gets what another one had, even where that one has no state or was left out for an error.
    """
    cases = [
        (Counting(10), [15, 25]),
        (Counting(10, keeps=False), [1, 25]),
        (Counting(10, fails=True), [1, 25]),
    ]
    for i, (first, expected) in enumerate(cases):
        main([*SMALL, "--experiment", f"r{i}"], observers=[first, Counting(20)])
        again = [Counting(), Counting()]
        main(["--checkpoint", f"runs/r{i}", "--max-epochs", "5"], observers=again)
        assert [observer.count for observer in again] == expected, i


def test_main_with_observers_is_still_the_command(here, capsys):
    """main(observers=...) keeps --track, exit codes and errors of one line."""

    class Stopping(train_ppo.AlgoObserver):
        def after_print_stats(self, frame, epoch_num, total_time):
            self.writer.add_scalar("mine/frame", 3.0 * epoch_num, frame)
            if epoch_num == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as exit:
        main([*SMALL, "--track", "--experiment", "r"], observers=[Stopping()])
    assert exit.value.code == 128 + signal.SIGTERM
    stopped = load_checkpoint("runs/r/nn/last.pth")["epoch"]
    assert stopped in (2, 3)
    rows = wandb_run(wandb_records("runs/r")[0])[2]
    assert [row["mine/frame"] for row in rows] == [3.0 * i for i in range(1, stopped + 1)]
    assert [v for _, v in scalars("runs/r")["mine/frame"]] == [row["mine/frame"] for row in rows]

    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(["--checkpoint", "nowhere.pth"], observers=[Stopping()])
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: nowhere.pth cannot be used: ")
    assert message.count("\n") == 1


# ------------------------------------------------------------------------------------ the algorithm


def agent_of(lengths=(3, 5, 50, 50), **arguments):
    """An agent for four environments of `Env`, with eight steps and four minibatches."""
    args = Args(env_id="-", num_envs=4, num_steps=8, minibatch_size=8, device="cpu", **arguments)
    torch.manual_seed(0)
    env = Env(4, "cpu", 0, lengths=torch.tensor(lengths))
    return train_ppo.PPOAgent(args, env, train_ppo.MultiObserver([]))


def roll_out(agent, after_step=lambda infos, dones: None):
    agent.obs, _ = train_ppo.rollout(
        agent.act, agent.env, agent.obs, agent.buffer, agent.args, after_step
    )


def batch_of(agent):
    """The batch of the agent's rollout."""
    rewards = train_ppo.shape_rewards(agent.buffer, agent.args)
    values, dones = agent.buffer["values"], agent.buffer["dones"]
    advantages = gae(rewards, values, dones, agent.model.value(agent.obs), agent.args)
    return train_ppo.make_batch(agent.buffer, advantages)


def test_rollout_copies_what_the_env_overwrites():
    """Each row of the buffer is of its own step, although `Env` reuses its tensors.

    The env gets the clipped action, the buffer the sampled one.
    """
    agent = agent_of(sigma_init=0.5)
    seen = []
    roll_out(agent, lambda infos, dones: seen.append((dones.tolist(), dict(infos))))
    buffer = agent.buffer
    assert len({tuple(row.flatten().tolist()) for row in buffer["obs"]}) == 8
    assert buffer["actions"].abs().max() > 1
    expected = 1 - (buffer["actions"].clamp(-1, 1) - buffer["obs"]).abs().mean(-1)
    assert torch.allclose(buffer["rewards"], expected)
    assert buffer["dones"][:, 0].tolist() == [0, 0, 1, 0, 0, 1, 0, 0]
    assert torch.equal(buffer["time_outs"], buffer["dones"])
    assert [dones for dones, _ in seen] == buffer["dones"].bool().tolist()
    assert all(list(infos) == ["time_outs"] for _, infos in seen)
    assert torch.equal(agent.obs, agent.env.obs)

    agent = agent_of(sigma_init=0.5, clip_actions=False)
    roll_out(agent)
    buffer = agent.buffer
    assert torch.allclose(buffer["rewards"], 1 - (buffer["actions"] - buffer["obs"]).abs().mean(-1))


def watched_env(num_envs, device, seed):
    """`Env` with bool dones, which fails if somebody has written into what it returned."""
    env = Env(num_envs, device, seed, lengths=torch.arange(num_envs) % 5 + 1)
    env.done = env.done.bool()
    env.infos["time_outs"] = torch.zeros(num_envs, dtype=torch.bool)
    step = env.step
    returned = []

    def watched(actions):
        for tensor, as_it_was in returned:
            assert torch.equal(tensor, as_it_was), "somebody wrote into a tensor of the env"
        obs, reward, done, infos = step(actions)
        tensors = (obs["obs"], reward, done, infos["time_outs"])
        returned[:] = [(tensor, tensor.clone()) for tensor in tensors]
        return obs, reward, done, infos

    env.step = watched
    return env


def test_nothing_writes_into_the_tensors_of_the_env(here):
    """Neither training nor playing changes what the env returned; it may be its own state."""
    main(["--env-id", f"{__name__}:watched_env", *SMALL, "--experiment", "r", "--max-epochs", "2"])
    main(["--play", "--checkpoint", "runs/r", "--env-id", f"{__name__}:watched_env"])


def test_gae_by_hand():
    rewards = torch.tensor([[1.0], [2.0], [3.0]])
    values = torch.tensor([[0.5], [1.5], [2.5]])
    dones = torch.tensor([[0.0], [1.0], [0.0]])
    third = 3.0 + 0.9 * 4.0 - 2.5
    second = 2.0 - 1.5  # the episode ended: neither the next value nor the next advantage counts
    first = 1.0 + 0.9 * 1.5 - 0.5 + 0.9 * 0.8 * second
    args = Args(gamma=0.9, gae_lambda=0.8)
    found = gae(rewards, values, dones, torch.tensor([4.0]), args)
    assert found.flatten().tolist() == pytest.approx([first, second, third])


def test_rewards_are_scaled_and_bootstrapped_at_time_limits():
    """Where the clock cut an episode off, gamma times the value of its last state is added."""
    buffer = {
        "rewards": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "values": torch.tensor([[10.0, 20.0], [30.0, 40.0]]),
        "time_outs": torch.tensor([[0.0, 1.0], [0.0, 0.0]]),
    }
    args = Args(reward_scale=0.5, gamma=0.9)
    assert train_ppo.shape_rewards(buffer, args).tolist() == [[0.5, 19.0], [1.5, 2.0]]
    args = Args(reward_scale=0.5, gamma=0.9, value_bootstrap=False)
    assert train_ppo.shape_rewards(buffer, args).tolist() == [[0.5, 1.0], [1.5, 2.0]]
    assert buffer["rewards"].tolist() == [[1, 2], [3, 4]]


class Capture(train_ppo.AlgoObserver):
    """Makes the agent of a run visible to the test."""


def short_episodes_env(num_envs, device, seed):
    return Env(num_envs, device, seed, lengths=torch.tensor([3, 5, 50, 50]))


def test_shaped_return_is_measured_with_the_bootstrap(here):
    """A finished episode's shaped return is scale * its rewards + gamma * V at its last step."""
    args = Args(
        env_id=f"{__name__}:short_episodes_env",
        num_envs=4,
        num_steps=8,
        max_epochs=1,
        reward_scale=0.5,
        gamma=0.9,
    )
    observer = Capture()
    train_ppo.Runner(args, train_ppo.MultiObserver([observer])).run()
    agent = observer.algo
    # Env 0 ends after three steps of its own, one of which was the check of the contract.
    rewards = agent.buffer["rewards"][:2, 0].sum()
    shaped = 0.5 * rewards + 0.9 * agent.buffer["values"][1, 0]
    expected = [float(rewards), float(shaped), 2.0]
    assert agent.episodes.finished[0].tolist() == pytest.approx(expected)
    assert agent.episodes.count == len(agent.episodes.finished) == 4


def no_time_outs_env(num_envs, device, seed):
    env = Env(num_envs, device, seed, max_episode_length=20)
    step = env.step
    env.step = lambda actions: (*step(actions)[:3], {})
    return env


def test_missing_time_outs_are_warned_about_once(here, capsys):
    main(["--env-id", f"{__name__}:no_time_outs_env", *SMALL, "--max-epochs", "9"])
    assert capsys.readouterr().err.count("without infos['time_outs']") == 1


def test_batch_has_the_steps_of_one_env_after_another():
    """Rows are env-major, as in rl_games; returns are advantages + values."""
    steps, envs = 2, 3
    number = torch.arange(6.0).view(steps, envs)  # t * 3 + e
    vectors = {name: number.unsqueeze(-1) + torch.tensor([0.0, 100.0]) for name in ("obs", "mus")}
    vectors.update(actions=vectors["obs"] + 1000, sigmas=vectors["obs"] + 2000)
    buffer = {**vectors, "logprobs": number + 10, "values": number + 20, "rewards": number + 30}
    advantages = number / 4  # exact, also after values have been added and subtracted
    batch = train_ppo.make_batch(buffer, advantages)
    order = [0, 3, 1, 4, 2, 5]  # both steps of env 0, of env 1, of env 2
    assert batch.obs.tolist() == [[n, n + 100] for n in order]
    assert batch.mus.tolist() == [[n, n + 100] for n in order]
    assert batch.actions.tolist() == [[n + 1000, n + 1100] for n in order]
    assert batch.sigmas.tolist() == [[n + 2000, n + 2100] for n in order]
    assert batch.logprobs.tolist() == [n + 10 for n in order]
    assert batch.values.tolist() == [n + 20 for n in order]
    assert batch.advantages.tolist() == [n / 4 for n in order]
    assert batch.returns.tolist() == [n / 4 + n + 20 for n in order]


def test_values_returns_and_advantages_are_normalised():
    """Values are taken into the statistics first, then returns; advantages over all rows."""
    agent = agent_of()
    roll_out(agent)
    batch = batch_of(agent)
    statistics = RunningMeanStd(1)
    statistics.update(batch.values.unsqueeze(1))
    values = statistics(batch.values)
    statistics.update(batch.returns.unsqueeze(1))
    returns = statistics(batch.returns)
    before = [x.clone() for x in batch]
    found = train_ppo.normalize_batch(agent.model, batch, agent.args)
    assert torch.equal(found.values, values) and torch.equal(found.returns, returns)
    assert agent.model.value_mean_std.count == 1 + 2 * 32
    scores = (batch.advantages - batch.advantages.mean()) / batch.advantages.std()
    assert torch.allclose(found.advantages, scores, atol=1e-5)
    assert all(torch.equal(x, y) for x, y in zip(batch, before)), "the batch itself stays"

    agent = agent_of(normalize_value=False, norm_adv=False)
    found = train_ppo.normalize_batch(agent.model, batch, agent.args)
    assert all(a is b for a, b in zip(found, batch))


def test_loss_by_hand():
    """Two samples whose ratios left the clip range; only one of them in the direction that pays."""
    log_density = -0.5 * math.log(2 * math.pi)  # of the mean, with a standard deviation of 1
    ratios = torch.tensor([1.5, 0.5])
    mu = torch.tensor([[1.6], [-1.1]])
    logstd = torch.zeros(2, 1, requires_grad=True)
    batch = train_ppo.Batch(
        obs=torch.zeros(2, 3),
        actions=mu,
        logprobs=log_density - ratios.log(),
        values=torch.tensor([0.0, 0.9]),
        returns=torch.tensor([2.0, 0.0]),
        advantages=torch.tensor([1.0, 1.0]),
        mus=mu,
        sigmas=torch.ones(2, 1),
    )

    def model(obs):
        return mu, logstd, torch.tensor([1.0, 1.0])

    args = Args(clip_coef=0.2, vf_coef=4.0, ent_coef=0.1, bounds_loss_coef=0.01)
    loss, _, sigma, losses = train_ppo.ppo_loss(model, batch, args)
    policy_loss = -(1.2 + 0.5) / 2
    # The first value may move by 0.2 only, so it counts as 0.2 and not as 1.
    value_loss = (1.8**2 + 1.0**2) / 2
    entropy = 0.5 + 0.5 * math.log(2 * math.pi)
    bounds_loss = 0.5**2 / 2  # of the mean action 1.6
    expected = [policy_loss, value_loss, entropy, bounds_loss, 1.0, 0.0]  # KL of a policy at rest
    assert losses.tolist() == pytest.approx(expected, abs=1e-5)
    total = policy_loss + 0.5 * 4.0 * value_loss - 0.1 * entropy + 0.01 * bounds_loss
    assert float(loss.detach()) == pytest.approx(total, abs=1e-6)
    assert sigma.tolist() == [[1.0], [1.0]]

    args = Args(clip_coef=0.2, vf_coef=0.0, bounds_loss_coef=0.0, clip_vloss=False)
    loss, _, _, losses = train_ppo.ppo_loss(model, batch, args)
    loss.backward()
    assert logstd.grad[0] == 0 and logstd.grad[1] != 0
    assert float(losses[1]) == pytest.approx((1.0 + 1.0) / 2, abs=1e-6), "values are not clipped"


@pytest.mark.parametrize("schedule_type", ["legacy", "standard"])
def test_update_steps_the_learning_rate_in_place_and_returns_means(monkeypatch, schedule_type):
    """The rate follows the KL divergences of the minibatches (legacy) or of the passes (standard).

    A KL divergence is between the policy of now and that of the last pass over the same rows.
    """
    agent = agent_of(update_epochs=3, schedule_type=schedule_type)
    roll_out(agent)
    batch = batch_of(agent)
    losses = []
    divergences = []
    policy_kl = train_ppo.policy_kl

    def loss_fn(*arguments):
        losses.append(train_ppo.ppo_loss(*arguments))
        return losses[-1]

    def watched_kl(mu, sigma, old_mu, old_sigma):
        if len(divergences) >= 4:  # the second pass has begun
            _, mu_then, sigma_then, _ = losses[len(divergences) - 4]
            assert torch.equal(old_mu, mu_then) and torch.equal(old_sigma, sigma_then)
        divergences.append(policy_kl(mu, sigma, old_mu, old_sigma))
        return divergences[-1]

    monkeypatch.setattr(train_ppo, "policy_kl", watched_kl)
    lr = agent.lr
    arguments = (agent.optimizer, lr, batch, 1, agent.args, loss_fn)
    found = train_ppo.update(agent.model, *arguments)
    assert len(losses) == len(divergences) == 3 * 4
    assert agent.model.running_mean_std.count == 1 + 32, "observations count in the first pass only"

    steps = divergences
    if schedule_type == "standard":
        steps = [torch.stack(divergences[i : i + 4]).mean() for i in (0, 4, 8)]
    expected = torch.tensor(agent.args.learning_rate)
    for kl in steps:
        expected = train_ppo.next_lr(expected, kl, 1, agent.args)
    assert float(lr) == float(expected) != pytest.approx(agent.args.learning_rate)
    assert agent.optimizer.param_groups[0]["lr"] is lr, "the optimizer sees it without being told"
    means = torch.stack([losses for _, _, _, losses in losses]).mean(0)
    assert torch.allclose(found, means, atol=1e-6)
    assert torch.allclose(found[-1], torch.stack(divergences).mean(), atol=1e-6)


def test_averaging_does_nothing_in_one_process():
    model = torch.nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    kl = torch.tensor(0.25)
    assert train_ppo.average_gradients(list(model.parameters()), kl) is kl and kl == 0.25
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before))
    assert train_ppo.average(kl) is kl and kl == 0.25
    x = torch.randn(9, 3)
    mean, var = train_ppo.mean_and_var(x)
    assert torch.equal(mean, x.mean(0)) and torch.equal(var, x.var(0))


def test_linear_is_that_of_torch():
    """The same output and gradients, on a layer of a few observations and on a wide one."""
    for size in (4, 60):
        layer, expected = train_ppo.Linear(size, 32), torch.nn.Linear(size, 32)
        expected.load_state_dict(layer.state_dict())
        x = torch.randn(999, size, requires_grad=True)
        same_x = x.detach().clone().requires_grad_()
        layer(x).square().sum().backward()
        expected(same_x).square().sum().backward()
        assert torch.allclose(layer(x), expected(x), atol=1e-5)
        assert torch.allclose(x.grad, same_x.grad, atol=1e-4)
        for p, q in zip(layer.parameters(), expected.parameters()):
            assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-2)
            assert p.grad.is_contiguous(), "the fused optimizer needs it"


def test_freed_memory_is_kept(here):
    """32 MB come back from glibc without a page fault, once they have been used."""
    code = """
import resource, torch, train_ppo
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def used():
    before = faults()
    for _ in range(3):
        torch.ones(2**23 + 1)
    return faults() - before
before = used()
train_ppo.keep_freed_memory()
used()
print(before, used())
"""
    env = {**os.environ, "PYTHONPATH": os.path.dirname(train_ppo.__file__)}
    out = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True)
    before, after = map(int, out.stdout.split())
    if before < 1000:
        pytest.skip("another C library, or huge pages")
    assert after < before / 100, (before, after)


def test_running_mean_std_merges_batches():
    """It starts as if one sample with mean 0 and variance 1 had been seen.

    Each batch counts with its unbiased variance, as in rl_games.
    """
    torch.manual_seed(0)
    data = torch.randn(1000, 3, dtype=torch.float64) * 5 + 2
    running = RunningMeanStd(3)
    mean, var, count = 0.0, 1.0, 1
    for chunk in data.split(137):
        running.update(chunk)
        n = len(chunk)
        delta = chunk.mean(0) - mean
        squares = var * count + chunk.var(0) * n + delta.square() * count * n / (count + n)
        var = squares / (count + n)
        mean = mean + delta * n / (count + n)
        count += n
    assert torch.allclose(running.running_mean, mean)
    assert torch.allclose(running.running_var, var)
    assert running.count == 1001
    x = data[:5].float()
    assert torch.allclose(running.denormalize(running(x)), x, atol=1e-4)
    assert running(torch.full((1, 3), 1e6)).max() == 5


def test_episode_meter_sums_up_over_rollouts_and_keeps_the_last_episodes():
    """Against a loop over environments and a deque, in rollouts with few and many episode ends."""
    torch.manual_seed(0)
    meter = EpisodeMeter(num_envs=3, size=7, width=2, device=torch.device("cpu"))
    running = torch.zeros(3, 2)
    window = collections.deque(maxlen=7)
    count = 0
    for probability in (0.0, 0.1, 0.3, 0.0, 0.9, 0.2):
        rewards = torch.randint(9, (8, 3)).float()
        dones = torch.rand(8, 3) < probability
        meter.add_rollout((rewards, torch.ones(8, 3)), dones.float())
        for t in range(8):
            for env in range(3):
                running[env] += torch.tensor([rewards[t, env], 1.0])
                if dones[t, env]:
                    window.append(running[env].tolist())
                    running[env] = 0
                    count += 1
        assert meter.finished.tolist() == list(window)
        assert meter.running.tolist() == running.tolist()
        assert meter.count == count


def test_schedules():
    def step(lr, kl, epoch=1, **arguments):
        args = Args(**arguments)
        return float(train_ppo.next_lr(torch.tensor(lr), torch.tensor(kl), epoch, args))

    assert step(1e-3, 0.017) == pytest.approx(1e-3 / 1.5)
    assert step(1e-3, 0.003) == pytest.approx(1.5e-3)
    assert step(1e-3, 0.008) == pytest.approx(1e-3)
    assert step(9e-3, 0.0) == pytest.approx(1e-2)
    assert step(9e-3, 0.0, max_lr=9.5e-3) == pytest.approx(9.5e-3)
    assert step(1.2e-6, 1.0) == pytest.approx(1e-6)
    assert step(1.2e-5, 1.0, min_lr=1e-5) == pytest.approx(1e-5)
    linear = step(1.0, 1.0, epoch=30, lr_schedule="linear", learning_rate=1e-3)
    assert linear == pytest.approx(1e-6 + (1e-3 - 1e-6) * 0.7)
    assert step(1e-3, 1.0, lr_schedule="fixed") == pytest.approx(1e-3)


def test_policy_kl_and_log_prob_are_those_of_gaussians():
    torch.manual_seed(0)
    mu, old_mu = torch.randn(2, 9, 3)
    sigma, old_sigma = torch.randn(2, 9, 3).exp()
    new = torch.distributions.Normal(mu, sigma)
    old = torch.distributions.Normal(old_mu, old_sigma)
    expected = torch.distributions.kl_divergence(new, old).sum(-1).mean()
    found = train_ppo.policy_kl(mu, sigma, old_mu, old_sigma)
    assert float(found) == pytest.approx(float(expected), rel=1e-3)  # rl_games adds 1e-5 twice
    found = train_ppo.log_prob(old_mu, mu, sigma, sigma.log())
    assert torch.allclose(found, new.log_prob(old_mu).sum(-1), atol=1e-5)


needs_rl_games = pytest.mark.skipif(
    importlib.util.find_spec("rl_games") is None,
    reason="needs rl-games 1.6.1, see the README's test command",
)
FIDELITY_ROWS = [
    "default",
    "adaptive legacy",
    "adaptive standard",
    "small KL threshold",
    "linear",
    "separate",
    "entropy",
    "no value normalisation",
    "no action clipping",
]


@needs_rl_games
@pytest.mark.parametrize("row", FIDELITY_ROWS)
def test_weights_are_those_of_rl_games(row):
    """From the same weights and random draws rl_games 1.6.1 gets the same weights.

    So it does statistics and learning rates. Adam, Linear and ELU are torch's plain ones, as in
    rl_games, so that rounding has nothing to start from; with our own the differences are a few
    1e-7.
    """
    found, ours, theirs = fidelity.compare(fidelity.ROWS[row], same_kernels=True)
    assert found[0] <= 1e-6 and max(found[:3]) <= 1e-5, found
    assert ours == pytest.approx(theirs, rel=1e-6)
    if row in ("default", "adaptive legacy"):
        found, _, _ = fidelity.compare(fidelity.ROWS[row])
        assert found[0] <= 1e-5, found


def test_mixed_precision_does_nothing_on_a_cpu(here, capsys):
    """IsaacGymEnvs' Ant sets it. A CPU without bfloat16 would be ten times slower with it."""
    for name, flag in (("plain", "--no-mixed-precision"), ("mixed", "--mixed-precision")):
        main([*SMALL, "--device", "cpu", "--experiment", name, flag])
        said = capsys.readouterr().out.count("--mixed-precision does nothing on a CPU")
        assert said == (name == "mixed")
    plain, mixed = [load_checkpoint(f"runs/{name}/nn/last.pth") for name in ("plain", "mixed")]
    assert differences(plain["model"], mixed["model"]) == []


# ----------------------------------------------- success metrics, metadata, the run's code, version


REPORTED = []  # what ReportingEnv has put into infos["episode"]["success"]


class ReportingEnv(Env):
    """Episodes of 16 steps. Reward and success depend on the epoch alone, in different ways."""

    max_episode_length = 16
    rewards = {3: 9.0}
    successes = {5: 0.75}
    epoch = 0

    def set_train_info(self, frame, algo):
        self.epoch = algo.epoch_num

    def step(self, actions):
        obs, reward, done, infos = super().step(actions)
        reward[:] = self.rewards.get(self.epoch, float(self.epoch > 0))
        infos = {**infos, "speed": 2.0, "episode_cumulative": {"cost": torch.ones(len(reward)) / 4}}
        if done.any():
            success = torch.full((int(done.sum()),), self.successes.get(self.epoch, 0.25))
            success[0] += 0.0 if self.epoch else torch.rand(()).item()
            REPORTED.extend(success.tolist())
            infos["episode"] = {"success": success}
        return obs, reward, done, infos

    def policy_metadata(self):
        return {"action_scale": [0.5, 0.25], "joint_names": ["hip", "knee"], "control_hz": 50}


def reporting_env(num_envs, device, seed):
    return ReportingEnv(num_envs, device, seed, lengths=torch.full((num_envs,), 16))


REPORTING = ["--env-id", f"{__name__}:reporting_env", "--num-envs", "16", "--num-steps", "16"]
REPORTING += ["--max-epochs", "6", "--games-to-track", "16", "--save-best-after", "1"]
REPORTING += ["--minibatch-size", "128", "--device", "cpu"]


def test_best_goes_by_the_metric_that_is_named(here, capsys):
    """Reward is highest in epoch 3, success in epoch 5. With another metric it starts anew."""
    main([*REPORTING, "--experiment", "reward"])
    main([*REPORTING, "--experiment", "success", "--best-metric", "Episode/success"])
    out, err = capsys.readouterr()
    assert "best Episode/success 0.75" in out and err == ""
    by_reward = load_checkpoint("runs/reward/nn/best.pth")
    by_success = load_checkpoint("runs/success/nn/best.pth")
    assert (by_reward["epoch"], by_reward["last_mean_rewards"]) == (3, 9.0 * 15 + 1.0)
    assert (by_success["epoch"], by_success["last_mean_rewards"]) == (5, 0.75)
    assert by_success["args"]["best_metric"] == "Episode/success"
    main(["--checkpoint", "runs/success", "--max-epochs", "7", *REPORTING[:2]])
    assert load_checkpoint("runs/success/nn/last.pth")["last_mean_rewards"] == 0.75
    flags = [*REPORTING[:2], "--best-metric", "speed/iter"]
    main(["--checkpoint", "runs/success", "--max-epochs", "8", *flags])
    assert load_checkpoint("runs/success/nn/best.pth")["last_mean_rewards"] == 2.0


def test_a_best_metric_that_is_not_logged_is_named_once(here):
    flags = ["--experiment", "r", "--best-metric", "Episode/succes"]
    _, err = forked(*REPORTING, *flags, cwd=here, reload=True)
    assert err.count("warning: --best-metric Episode/succes is not logged: ") == 1
    assert "Episode/success" in err
    assert not Path("runs/r/nn/best.pth").exists()


def test_play_reports_what_the_env_reports(here, capsys):
    """The means are those of all that came in while playing; the JSON says the same."""
    main([*REPORTING, "--experiment", "r"])
    before = sorted(Path("runs").rglob("*"))
    capsys.readouterr()
    REPORTED.clear()
    main(["--play", "--checkpoint", "runs/r", *REPORTING[:2], "--json", "result.json"])
    out, err = capsys.readouterr()
    mean = sum(REPORTED) / len(REPORTED)
    assert f"Episode/success {mean:.5g}\n" in out and "\nspeed 2\n" in out and err == ""
    result = json.loads(Path("result.json").read_text())
    expected = {"Episode/success": mean, "speed": 2.0, "episode_cumulative/cost": 4.0}
    expected.update({f"episode_cumulative_{x}/cost_{x}": 4.0 for x in ("min", "max")})
    assert result["metrics"] == pytest.approx(expected)
    assert result["checkpoint"] == "runs/r/nn/last.pth" and result["epoch"] == 6
    assert f"mean {result['mean']:.2f} " in out and result["count"] == 16
    assert sorted(Path("runs").rglob("*")) == before, "nothing else is written"
    flags = ["--checkpoint", "runs/r", *REPORTING[:2], "--json", "no/x"]
    _, err = forked("--play", *flags, cwd=here, code=2, reload=True)
    assert err == "error: --json no/x cannot be written: No such file or directory\n"


def test_policy_metadata_arrives_in_checkpoint_json_and_onnx(here):
    onnx = pytest.importorskip("onnx")
    main([*REPORTING, "--experiment", "r"])
    metadata = reporting_env(1, "cpu", 0).policy_metadata()
    assert load_checkpoint("runs/r/nn/last.pth")["policy_metadata"] == metadata
    shell("runs/r", "policy", cwd=here, script=(EXPORT_TOOL,))
    assert json.loads(Path("policy/policy.json").read_text())["metadata"] == metadata
    props = {entry.key: entry.value for entry in onnx.load("policy/policy.onnx").metadata_props}
    assert {key: json.loads(value) for key, value in props.items()} == metadata


@pytest.mark.parametrize("bad", [torch.ones(2), np.float32(1), math.nan, {1, 2}])
def test_policy_metadata_that_json_cannot_hold_is_one_line(bad, here, monkeypatch, capsys):
    monkeypatch.setattr(ReportingEnv, "policy_metadata", lambda self: {"scale": bad})
    with pytest.raises(SystemExit) as exit:
        main([*REPORTING, "--experiment", "r"])
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count("\n") == 1
    assert err.startswith("error: the env's policy_metadata(): ")
    assert not Path("runs").exists()


def test_settings_come_with_the_module(here, capsys):
    """A flag wins over SETTINGS, and so does the checkpoint; what is wrong in them is one line."""
    text = f"from {__name__} import reporting_env as make\nSETTINGS = "
    Path("my_env.py").write_text(text + "dict(num_envs=16, num_steps=8, units=[4], max_epochs=3)")
    sys.path.insert(0, str(HERE))
    flags = ["--env-id", "my_env:make", "--minibatch-size", "64", "--device", "cpu"]
    main([*flags, "--num-steps", "16", "--experiment", "r"])
    args = load_checkpoint("runs/r/nn/last.pth")["args"]
    assert (args["num_envs"], args["num_steps"], args["units"]) == (16, 16, [4])
    Path("my_env.py").write_text(text + "dict(num_steps=4)")
    forked(*flags[:2], "--checkpoint", "runs/r", "--max-epochs", "4", cwd=here, reload=True)
    assert load_checkpoint("runs/r/nn/last.pth")["args"]["num_steps"] == 16
    for wrong, what in (
        ("dict(num_stepz=4)", "has an unknown argument: num_stepz"),
        ("dict(num_steps='4')", "has num_steps = '4', which cannot be"),
    ):
        Path("my_env.py").write_text(text + wrong)
        _, err = forked(*flags, cwd=here, code=2, reload=True)
        assert err == f"error: SETTINGS of --env-id my_env:make {what}\n"


def test_the_code_of_a_run_is_kept(tmp_path):
    """This script, the one that was started, the env's module, and git's diff, if there is git."""
    repository = tmp_path / "repository"
    repository.mkdir()
    shutil.copy(SCRIPT, str(repository))
    git = ["git", "-C", str(repository), "-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    with open(str(repository / "train_ppo.py"), "a") as file:
        file.write("\n# my change\n")
    text = (
        f"import sys\nsys.path.insert(0, {str(HERE)!r})\nfrom test_train_ppo import reporting_env"
    )
    (repository / "my_env.py").write_text(text)
    env = ["--env-id", "my_env:reporting_env", *REPORTING[2:], "--experiment", "r"]
    shell(*env, "--track", cwd=repository, script=("train_ppo.py",))
    code = repository / "runs" / "r" / "code"
    assert sorted(os.listdir(str(code))) == ["git.diff", "my_env.py", "train_ppo.py"]
    assert "# my change" in (code / "train_ppo.py").read_text()
    diff = (code / "git.diff").read_text()
    head = subprocess.run([*git, "rev-parse", "HEAD"], stdout=subprocess.PIPE, check=True).stdout
    assert diff.startswith(f"since commit {head.decode()}") and "+# my change" in diff
    (records,) = wandb_records(repository / "runs" / "r")
    assert any(record.request.log_artifact.artifact.type == "code" for record in records) or any(
        record.artifact.type == "code" for record in records
    )
    config = json.loads((repository / "runs" / "r" / "config.json").read_text())
    assert config["versions"]["train_ppo"] == train_ppo.__version__

    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(SCRIPT, str(alone))
    flags = [*SMALL, "--max-epochs", "1", "--experiment", "r"]
    shell(*flags, cwd=alone, script=("train_ppo.py",), env={"GIT_CEILING_DIRECTORIES": "/"})
    assert os.listdir(str(alone / "runs" / "r" / "code")) == ["train_ppo.py"]


def test_arguments_are_text_in_tensorboard(small_run):
    (path,) = (small_run / "runs" / "r" / "summaries").glob("events*")
    events = list(EventFileLoader(str(path)).Load())
    (text,) = [v for e in events for v in e.summary.value if v.tag == "arguments/text_summary"]
    assert "|num_envs|" in text.tensor.string_val[0].decode()


def test_version_is_printed_and_kept(small_run):
    out, err = forked("--version", cwd=small_run)
    assert out == f"train_ppo.py {train_ppo.__version__}\n" and err == ""
    assert (
        load_checkpoint(str(small_run / "runs/r/nn/last.pth"))["version"] == train_ppo.__version__
    )
    text = (HERE / "docs" / "changelog.md").read_text()
    assert re.search(r"^## ([\d.]+) ", text, re.M).group(1) == train_ppo.__version__
    assert f"version: {train_ppo.__version__}\n" in (HERE / "CITATION.cff").read_text()


# -------------------------------------------------------------------------------- privileged critic

PRIVILEGED = ["--env-id", "examples.privileged_critic:make_env", "--num-envs", "64"]
PRIVILEGED += ["--minibatch-size", "512", "--device", "cpu"]


def test_privileged_critic_is_continued_played_and_exported_by_observations_alone(here):
    """4 + 4 epochs are 8 to the last bit; play and export do without the states."""
    sys.path.insert(0, str(HERE))
    main([*PRIVILEGED, "--experiment", "whole", "--max-epochs", "8"])
    main([*PRIVILEGED, "--experiment", "parts", "--max-epochs", "4"])
    main([*PRIVILEGED, "--checkpoint", "runs/parts", "--max-epochs", "8"])
    assert same_state("runs/whole/nn/last.pth", "runs/parts/nn/last.pth") == []
    state = load_checkpoint("runs/whole/nn/last.pth")
    assert state["num_states"] == 4
    moments = state["optimizer"]["state"]
    assert len(moments) == len([name for name in state["model"] if "a2c_network" in name])

    blind = ["--env-id", "examples.privileged_critic:make_blind_env", "--num-envs", "8"]
    main(["--play", "--checkpoint", "runs/whole/nn/last.pth", *blind])

    shell("runs/whole", "policy", cwd=here, script=(str(HERE / "tools" / "export_policy.py"),))
    exported = torch.jit.load("policy/policy.pt")
    model = train_ppo.ActorCritic(4, 1, Args(**state["args"]), num_states=4)
    model.load_state_dict(state["model"])
    obs = torch.randn(5, 4)
    expected = model.mean_action(obs).clamp(-1, 1)
    assert torch.allclose(exported(obs), expected, atol=1e-6)
    states = torch.randn(5, 4)
    mu, _, value = model(torch.cat((obs, states), dim=1))
    assert torch.equal(mu, model.mean_action(obs))
    assert not torch.equal(value, model(torch.cat((obs, states + 1.0), dim=1))[2])


def test_a_critic_that_sees_the_state_explains_more(here):
    """Of the returns of a noisy Cartpole, from the same seed."""
    sys.path.insert(0, str(HERE))
    explained = {}
    for factory in ("make_env", "make_blind_env"):
        name = f"examples.privileged_critic:{factory}"
        main(["--env-id", name, "--separate", "--max-epochs", "25", "--experiment", factory])
        curve = [value for _, value in scalars(f"runs/{factory}")["losses/explained_variance"]]
        explained[factory] = sum(curve[-10:]) / 10
    assert explained["make_env"] > explained["make_blind_env"] + 0.05, explained


@pytest.mark.parametrize("what", ["missing", "shape"])
def test_states_that_do_not_come_are_one_line(what, here, capsys):
    text = {"missing": "return {'obs': obs['obs']}", "shape": "return obs"}[what]
    Path("my_env.py").write_text(
        f"""
from examples.privileged_critic import NoisyCartpole
class Mine(NoisyCartpole):
    num_states = 3
    def reset(self):
        obs = super().reset()
        {text}
def make(num_envs, device, seed):
    return Mine(num_envs, device)
"""
    )
    sys.path.insert(0, str(HERE))
    with pytest.raises(SystemExit) as exit:
        main(["--env-id", "my_env:make"])
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count("\n") == 1, err
    found = {"missing": "not NoneType", "shape": "not shape (512, 4)"}[what]
    assert "reset()['states'] must be a dense tensor of shape (512, 3)" in err and found in err


# ------------------------------------------------------------------------------------- environments


def test_cartpole_follows_the_equations_of_motion():
    """Against the Lagrangian, integrated in double precision with steps 100 times smaller."""
    env = Cartpole(1, torch.device("cpu"))
    env.step(torch.zeros(1, 1))
    env.state = torch.tensor([[0.1], [-0.3], [0.2], [0.4]])
    x, v, angle, omega = env.state.double().flatten().tolist()
    dt = 0.0166 / 200
    for force in (0.02, -0.03, 0.01):
        env.step(torch.tensor([[force]]))
        for _ in range(200):
            cos, sin = math.cos(angle), math.sin(angle)
            mass = np.array([[2.0, -0.47 * cos], [-0.47 * cos, (0.06**2 + 1) / 12 + 0.47**2]])
            forces = [400 * force - 0.47 * sin * omega**2, 9.81 * 0.47 * sin]
            a, alpha = np.linalg.solve(mass, forces)
            v += a * dt
            omega += alpha * dt
            x += v * dt
            angle += omega * dt
        assert env.state.flatten().tolist() == pytest.approx([x, v, angle, omega], abs=0.03)


def test_cartpole_keeps_isaacgymenvs_contract():
    """The first step resets, as does the step after a done, whatever the action."""
    torch.manual_seed(0)
    env = Cartpole(3, torch.device("cpu"))
    assert env.reset()["obs"].abs().sum() == 0, "reset() resets nothing"
    obs, reward, done, infos = env.step(torch.ones(3, 1))
    assert obs["obs"].shape == (3, 4) and obs["obs"].abs().max() <= 0.25
    assert done.dtype == torch.int64 and infos["time_outs"].dtype == torch.bool

    env.state[0, 0] = 3.1  # env 0: the cart leaves the track
    env.state[2, 1] = 2.0  # env 1: the pole is down
    obs, reward, done, infos = env.step(torch.zeros(3, 1))
    assert reward[:2].tolist() == [-2, -2] and done.tolist() == [1, 1, 0]
    assert not infos["time_outs"].any()
    assert obs["obs"][0, 0] > 3, "the observation with done=1 is the episode's last one"
    obs, reward, done, infos = env.step(torch.ones(3, 1))
    assert obs["obs"][:2].abs().max() <= 0.25 and done.tolist() == [0, 0, 0]

    steps = 0
    while not done[0]:
        env.state.zero_()  # held upright, it ends by the clock
        obs, reward, done, infos = env.step(torch.zeros(3, 1))
        steps += 1
    # Env 2 ended a step earlier than the others and has begun anew.
    assert steps == 499 and infos["time_outs"].tolist() == [True, True, False]


def test_cartpole_state_goes_on_exactly():
    """Two envs with the same state and random numbers do the same; the state is not shared."""
    torch.manual_seed(0)
    env, other = Cartpole(5, torch.device("cpu")), Cartpole(5, torch.device("cpu"))
    for _ in range(9):
        env.step(torch.rand(5, 1))
    state = {name: value.clone() for name, value in env.get_env_state().items()}
    other.set_env_state(state)
    results = []
    for one in (env, other):
        torch.manual_seed(1)
        results.append([one.step(torch.rand(5, 1) - 0.5) for _ in range(30)])
    for (obs, *rest), (other_obs, *other_rest) in zip(*results):
        assert torch.equal(obs["obs"], other_obs["obs"])
        assert torch.equal(rest[0], other_rest[0]) and torch.equal(rest[1], other_rest[1])
    with pytest.raises(AttributeError):
        other.set_env_state({"step": torch.zeros(5)})
    assert callable(other.step)


def test_cartpole_never_waits_for_the_device():
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    env = Cartpole(64, torch.device("cuda:0"))
    actions = torch.zeros(64, 1, device="cuda:0")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            env.step(actions)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# A stand-in for NVIDIA's isaacgym and IsaacGymEnvs, with the facts about them that break naive
# trainers.
ISAACGYM = {
    "isaacgym/__init__.py": """
        import sys
        if "torch" in sys.modules:
            raise ImportError("PyTorch was imported before isaacgym modules.  Please import torch "
                              "after isaacgym modules.")
    """,
    "isaacgym/torch_utils.py": """
        import numpy as np
        import torch
        def get_axis_params(value, axis_idx, dtype=np.float):
            return list(np.eye(3)[axis_idx].astype(dtype) * value)
    """,
    "isaacgymenvs/__init__.py": """
        from omegaconf import OmegaConf
        import isaacgym, torch
        import numpy as np
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
            assert headless and not force_render
            cfg = OmegaConf.to_container(cfg.task, resolve=True)
            assert cfg["env"]["numEnvs"] == num_envs
            sim = cfg["sim"]
            assert not sim["use_gpu_pipeline"] and not sim["physx"]["use_gpu"], "there is no GPU"
            assert torch.initial_seed() == int(seed), "make(seed) seeds nothing: the caller must"
            return Task(num_envs, cfg["env"].get("numStates", 0))
        class Task:
            # Reward 1 - mean |action - obs|. An env is reset by the step after its done. The same
            # tensors are returned each time, but for the observations and time_outs.
            num_acts = num_actions = 2
            num_obs = num_observations = 3
            max_episode_length = 30
            clip_obs = np.inf  # where the task's yaml has no clipObservations
            clip_actions, dt, control_freq_inv = 1.0, 0.0166, 2
            def __init__(self, n, num_states):
                self.num_envs, self.num_states = n, num_states
                self.obs_buf, self.rew_buf = torch.zeros(n, 3), torch.zeros(n)
                self.reset_buf = torch.ones(n, dtype=torch.long)
                self.progress_buf = torch.zeros(n, dtype=torch.long)
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
                self.obs_buf[:] = torch.rand(self.num_envs, 3) - 0.5
                late = self.progress_buf >= self.max_episode_length - 1
                self.reset_buf[:] = torch.where(late, 1, self.reset_buf)
                self.extras["time_outs"] = late & (self.reset_buf != 0)
                self.extras["episode"] = {"level": torch.tensor(float(self.curriculum))}
                return self.reset(), self.rew_buf, self.reset_buf, self.extras
            def set_train_info(self, env_frames, *args):
                self.curriculum += 1
            def get_env_state(self):
                return {"curriculum": self.curriculum}
            def set_env_state(self, env_state):
                self.curriculum = env_state["curriculum"]
    """,
    "isaacgymenvs/cfg/config.yaml": """
        task_name: ${task.name}
        num_envs: ''
        seed: 42
        max_iterations: ''
        physics_engine: 'physx'
        pipeline: 'gpu'
        sim_device: 'cuda:0'
        rl_device: 'cuda:0'
        graphics_device_id: 0
        multi_gpu: False
        headless: False
        checkpoint: ''
        experiment: ''
        defaults:
          - task: Ant
          - train: ${task}PPO
          - override hydra/job_logging: disabled
          - _self_
        hydra:
          output_subdir: null
          run:
            dir: .
    """,
    "isaacgymenvs/cfg/task/Ant.yaml": """
        name: Ant
        physics_engine: ${..physics_engine}
        env:
          numEnvs: ${resolve_default:64,${...num_envs}}
          clipActions: 1.0
        sim:
          use_gpu_pipeline: ${eq:${...pipeline},"gpu"}
          physx:
            use_gpu: ${contains:"cuda",${....sim_device}}
    """,
    "isaacgymenvs/cfg/train/AntPPO.yaml": """
        params:
          seed: ${...seed}
          algo:
            name: a2c_continuous
          model:
            name: continuous_a2c_logstd
          network:
            name: actor_critic
            separate: False
            space:
              continuous:
                mu_activation: None
                sigma_activation: None
                mu_init: {name: default}
                sigma_init: {name: const_initializer, val: -0.5}
                fixed_sigma: True
            mlp:
              units: [24, 12]
              activation: elu
              d2rl: False
              initializer: {name: default}
              regularizer: {name: None}
          load_checkpoint: ${if:${...checkpoint},True,False}
          config:
            name: ${resolve_default:Ant,${....experiment}}
            env_name: rlgpu
            multi_gpu: ${....multi_gpu}
            ppo: True
            mixed_precision: True
            normalize_input: True
            normalize_value: True
            value_bootstrap: True
            num_actors: ${....task.env.numEnvs}
            reward_shaper: {scale_value: 0.01}
            normalize_advantage: True
            gamma: 0.98
            tau: 0.9
            learning_rate: 3e-4
            lr_schedule: adaptive
            schedule_type: standard
            kl_threshold: 0.016
            score_to_win: 20000
            max_epochs: ${resolve_default:6,${....max_iterations}}
            save_best_after: 2
            save_frequency: 3
            grad_norm: 1.0
            entropy_coef: 0.001
            truncate_grads: True
            e_clip: 0.1
            horizon_length: 8
            minibatch_size: 256
            mini_epochs: 3
            critic_coef: 2
            clip_value: True
            seq_len: 4
            bounds_loss_coef: 0.0001
            something_new: 1
    """,
}
ANT = ISAACGYM["isaacgymenvs/cfg/train/AntPPO.yaml"]
LSTM = ANT.replace(
    "separate: False", "separate: False\n            rnn: {name: lstm, units: 8, layers: 1}"
)
CENTRAL = ANT.replace(
    "ppo: True",
    """ppo: True
            use_experimental_cv: True
            central_value_config:
              minibatch_size: 256
              learning_rate: 5e-4
              network:
                name: actor_critic
                central_value: True
                mlp: {units: [48, 16], activation: elu, d2rl: False}""",
)
CENTRAL_LSTM = CENTRAL.replace(
    "separate: False", "separate: False\n            rnn: {name: lstm, units: 8, layers: 1}"
)


def write_isaacgym(folder):
    """The stand-ins as packages in a folder, with the tasks Ant, AntLSTM, AntCentral and
    AntCentralLSTM."""
    files = dict(ISAACGYM)
    for name, train in dict(AntLSTM=LSTM, AntCentral=CENTRAL, AntCentralLSTM=CENTRAL_LSTM).items():
        task = ISAACGYM["isaacgymenvs/cfg/task/Ant.yaml"].replace("name: Ant", f"name: {name}")
        if "Central" in name:
            task = task.replace("clipActions: 1.0", "numStates: 5")
        files[f"isaacgymenvs/cfg/task/{name}.yaml"] = task
        files[f"isaacgymenvs/cfg/train/{name}PPO.yaml"] = train
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))


needs_hydra = pytest.mark.skipif(
    importlib.util.find_spec("hydra") is None, reason="needs hydra-core"
)
ISAACGYM_COMMANDS = {
    "AntLSTM": ["--env-id", "AntLSTM"],
    "AntCentralLSTM": ["--env-id", "AntCentralLSTM"],
    "AntCentral": ["--env-id", "AntCentral", "--experiment", "central"],
    "Anymal": ["--env-id", "Anymal"],
    "Cartpole": ["--env-id", "Cartpole"],
    "train": ["--env-id", "Ant", "--num-steps", "16", "--experiment", "r"],
    "play": ["--play", "--checkpoint", "runs/r", "--num-envs", "5"],
    "continue": ["--checkpoint", "runs/r", "--max-epochs", "8"],
    "sim torch": [*SMALL, "--env-id", "Cartpole", "--sim", "torch", "--experiment", "torch"],
}
# Runs each list of arguments in a process of its own, without importing torch for each again.
FORKS = f"""
import json, os, sys
sys.path.insert(0, {str(HERE)!r})
import train_ppo
import torch._dynamo  # the first optimizer would import it
for name, arguments in json.loads(sys.argv[1]).items():
    if os.fork() == 0:
        for number, end in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{{name}}.{{end}}", os.O_WRONLY | os.O_CREAT), number)
        train_ppo.main(arguments)
        sys.exit(0)
    status = os.wait()[1]
    with open(f"{{name}}.code", "w") as file:
        file.write(str(status >> 8))
"""


@pytest.fixture(scope="session")
def isaacgym_runs(tmp_path_factory):
    """ISAACGYM_COMMANDS, one after the other, with the stand-ins: (folder, {name: its output}).

    An output is (exit code, stdout, stderr).
    """
    folder = tmp_path_factory.mktemp("isaacgym")
    write_isaacgym(folder)
    shell(json.dumps(ISAACGYM_COMMANDS), cwd=folder, script=("-c", FORKS))
    outputs = {}
    for name in ISAACGYM_COMMANDS:
        code, out, err = [(folder / f"{name}.{end}").read_text() for end in ("code", "out", "err")]
        outputs[name] = (int(code), out, err)
    return folder, outputs


@needs_hydra
def test_isaacgym_task_trains_with_its_own_settings(isaacgym_runs):
    """A flag wins over the task's yaml, which wins over the defaults."""
    folder, outputs = isaacgym_runs
    code, out, err = outputs["train"]
    assert code == 0 and "epoch 6/6" in out, err
    args = load_checkpoint(str(folder / "runs/r/nn/epoch_6.pth"))["args"]
    expected = dict(
        num_steps=16,  # the flag's; all others are the yaml's
        units=(24, 12),
        sigma_init=-0.5,
        mixed_precision=True,
        reward_scale=0.01,
        gamma=0.98,
        gae_lambda=0.9,
        learning_rate=3e-4,
        schedule_type="standard",
        kl_threshold=0.016,
        max_epochs=6,
        save_best_after=2,
        save_frequency=3,
        max_grad_norm=1.0,
        ent_coef=0.001,
        clip_coef=0.1,
        minibatch_size=256,
        update_epochs=3,
        vf_coef=2.0,
        bounds_loss_coef=1e-4,
        num_envs=64,
    )
    args["units"] = tuple(args["units"])
    assert {name: args[name] for name in expected} == expected
    assert "AntPPO.yaml sets something_new = 1" in err and err.count("warning:") == 1
    assert (folder / "runs/r/nn/best.pth").exists()
    metadata = load_checkpoint(str(folder / "runs/r/nn/last.pth"))["policy_metadata"]
    assert metadata == {"dt": 0.0166, "control_freq_inv": 2, "clip_actions": 1.0}


@needs_hydra
def test_isaacgym_task_continues_and_plays_without_its_flags(isaacgym_runs):
    """The env starts new episodes, because its simulation is not saved; its curriculum goes on."""
    folder, outputs = isaacgym_runs
    code, out, err = outputs["continue"]
    assert code == 0 and "the env starts new episodes" in out and err == ""
    levels = [value for _, value in scalars(folder / "runs/r")["Episode/level"]]
    assert levels == [1, 2, 3, 4, 5, 6, 7, 8]
    code, out, err = outputs["play"]
    assert code == 0 and "mean length 30.0, 5 episodes" in out and err == ""


@needs_hydra
def test_isaacgym_tasks_that_cannot_be_trained_are_refused(isaacgym_runs):
    """Each by one line that says why, and nothing is written.

    Where Isaac Gym is installed, Cartpole is IsaacGymEnvs' one, unless --sim torch is given.
    """
    folder, outputs = isaacgym_runs
    reasons = {
        "AntLSTM": "a recurrent network (LSTM or GRU)",
        "AntCentralLSTM": "a recurrent network (LSTM or GRU)",
        "Anymal": "unknown --env-id Anymal: choose one of Ant, AntCentral, AntCentralLSTM, AntLSTM",
        "Cartpole": "unknown --env-id Cartpole: choose one of Ant, AntCentral, AntCentralLSTM",
    }
    for name, reason in reasons.items():
        code, _, err = outputs[name]
        assert code == 2 and err.startswith("error: ") and reason in err and err.count("\n") == 1
    code, out, err = outputs["sim torch"]
    assert code == 0 and "training Cartpole" in out and err == ""
    assert sorted(os.listdir(folder / "runs")) == ["central", "r", "torch"]


@needs_hydra
def test_isaacgym_task_with_a_central_value_network_trains_a_privileged_critic(isaacgym_runs):
    """Its critic has the layers of the yaml's, sees the states, and one line says what differs."""
    folder, outputs = isaacgym_runs
    code, out, err = outputs["AntCentral"]
    assert code == 0 and "epoch 6/6" in out, err
    assert err.count("warning: ") == 2 and "AntCentralPPO.yaml sets something_new" in err
    assert "warning: AntCentralPPO.yaml has a central value network" in err
    state = load_checkpoint(str(folder / "runs/central/nn/last.pth"))
    assert state["num_states"] == 5 and state["args"]["critic_units"] == [48, 16]
    shapes = {name: tuple(value.shape) for name, value in state["model"].items()}
    assert shapes["a2c_network.actor_mlp.0.weight"] == (24, 3)
    assert shapes["a2c_network.critic_mlp.0.weight"] == (48, 5)
    assert shapes["a2c_network.value.weight"] == (1, 16)
    assert state["model"]["state_mean_std.running_mean"].abs().max() > 0.1


@needs_hydra
def test_isaacgym_imported_too_late_says_what_to_do(here):
    """With torch imported first the real package raises. No other simulator steps in silently."""
    forkserver()  # which must not find the stand-ins itself
    write_isaacgym(here / "site")
    _, err = forked("--env-id", "Ant", cwd=here / "site", reload=True, code=2)
    assert err.startswith("error: Isaac Gym cannot be used")
    assert "PyTorch was imported before" in err and err.count("\n") == 1


def test_yaml_settings_of_isaacgymenvs_cartpole_are_the_defaults():
    """The numbers of CartpolePPO.yaml, as facts, give the built-in defaults."""
    config = dict(
        normalize_input=True,
        normalize_value=True,
        reward_shaper=dict(scale_value=0.1),
        normalize_advantage=True,
        gamma=0.99,
        tau=0.95,
        learning_rate="3e-4",
        lr_schedule="adaptive",
        kl_threshold=0.008,
        score_to_win=20000,
        max_epochs=100,
        save_best_after=50,
        save_frequency=25,
        grad_norm=1.0,
        entropy_coef=0.0,
        truncate_grads=True,
        e_clip=0.2,
        horizon_length=16,
        minibatch_size=8192,
        mini_epochs=8,
        critic_coef=4,
        clip_value=True,
        seq_len=4,
        bounds_loss_coef=0.0001,
        num_actors=512,
        mixed_precision=False,
    )
    sigma_init = dict(name="const_initializer", val=0)
    normal = dict(mu_activation="None", fixed_sigma=True, sigma_init=sigma_init)
    network = dict(
        name="actor_critic",
        separate=False,
        mlp=dict(units=[32, 32], activation="elu", d2rl=False),
        space=dict(continuous=normal),
    )
    params = dict(
        algo=dict(name="a2c_continuous"),
        model=dict(name="continuous_a2c_logstd"),
        network=network,
        config=config,
    )
    settings = train_ppo.settings_from_yaml(params, "Cartpole")
    assert Args(**settings) == Args(value_bootstrap=False), "rl_games' default, where it is absent"
    assert all(type(v) is type(getattr(Args(), k)) for k, v in settings.items())


REFUSED_SETTINGS = {
    "SAC": (
        dict(
            algo=dict(name="sac"),
            network=dict(name="soft_actor_critic", space=dict(continuous=None)),
        ),
        "the algorithm sac, .*the network soft_actor_critic",
    ),
    "AMP": (dict(algo=dict(name="amp_continuous")), "the algorithm amp_continuous"),
    "discrete": (
        dict(network=dict(name="actor_critic", space=dict(discrete={}))),
        "discrete actions",
    ),
    "CNN": (dict(network=dict(name="actor_critic", cnn={})), "a convolutional network"),
    "sigma": (
        dict(network=dict(name="actor_critic", space=dict(continuous=dict(fixed_sigma=False)))),
        "a state-dependent sigma",
    ),
    "shaper": (
        dict(config=dict(reward_shaper=dict(scale_value=1.0, min_val=-1))),
        "a reward_shaper beyond scale_value",
    ),
    "bound loss": (
        dict(config=dict(bound_loss_type="regularisation")),
        "a bound_loss_type other than bound",
    ),
}


@pytest.mark.parametrize("name", REFUSED_SETTINGS)
def test_settings_that_ask_for_more_are_refused_by_name(name):
    change, reason = REFUSED_SETTINGS[name]
    params = dict(
        algo=dict(name="a2c_continuous"),
        model=dict(name="continuous_a2c_logstd"),
        network=dict(name="actor_critic"),
        config={},
    )
    train_ppo.settings_from_yaml({**params}, "Task")
    with pytest.raises(train_ppo.UserError, match=reason):
        train_ppo.settings_from_yaml({**params, **change}, "Task")


def numpy_sizes_env(num_envs, device, seed):
    return Env(num_envs, device, seed, num_obs=np.int64(2), num_acts=np.int32(2))


def test_sizes_may_be_numpy_numbers(here):
    """As those are that come out of an observation space; checkpoints have plain ones."""
    env = ["--env-id", f"{__name__}:numpy_sizes_env"]
    main([*env, *SMALL, "--experiment", "r"])
    main([*env, "--checkpoint", "runs/r", "--max-epochs", "5"])
    assert load_checkpoint("runs/r/nn/last.pth")["epoch"] == 5


class Rounded:
    """Observations of `Env` as another dtype; `plain` hands the same numbers over as float32."""

    def __init__(self, env, dtype, plain):
        self.env = env
        self.dtype = dtype
        self.plain = plain
        self.num_envs, self.num_obs, self.num_acts = env.num_envs, env.num_obs, env.num_acts

    def convert(self, obs):
        rounded = (obs["obs"] * 3).to(self.dtype)
        if self.dtype == torch.bool:
            rounded = obs["obs"] > 0
        return {"obs": rounded.float() if self.plain else rounded}

    def reset(self):
        return self.convert(self.env.reset())

    def step(self, actions):
        obs, reward, done, infos = self.env.step(actions)
        return (self.convert(obs), reward, done, infos)


def rounded_env(num_envs, device, seed):
    dtype, kind = os.environ["ROUNDED"].split()
    return Rounded(Env(num_envs, device, seed), getattr(torch, dtype), kind == "plain")


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "bool"])
def test_observations_may_have_any_dtype(here, monkeypatch, dtype):
    """They train to the same weights as the same numbers in float32, and play."""
    flags = ["--env-id", f"{__name__}:rounded_env"]
    states = []
    for kind in ("plain", "own"):
        monkeypatch.setenv("ROUNDED", f"{dtype} {kind}")
        main([*flags, *SMALL, "--experiment", kind, "--max-epochs", "2"])
        states.append(load_checkpoint(f"runs/{kind}/nn/last.pth"))
    assert states[0]["obs"].unique().numel() > 1
    assert differences(states[0]["model"], states[1]["model"]) == []
    main([*flags, "--play", "--checkpoint", "runs/own"])


DONES = {
    "long": lambda done: done,
    "bool": lambda done: done.bool(),
    "float": lambda done: done.float(),
    "twos": lambda done: 2 * done,
    "uint8": lambda done: done.to(torch.uint8),
}


def dones_env(num_envs, device, seed):
    """`done` and time_outs come in the form that DONES names, always in the same two tensors."""
    convert = DONES[os.environ["DONES"]]
    env = Env(num_envs, device, seed, lengths=torch.arange(num_envs) % 7 + 2)
    step = env.step
    dones = convert(env.done).clone()
    time_outs = convert(env.done).clone()

    def converted(actions):
        obs, reward, done, infos = step(actions)
        dones[:] = convert(done)
        time_outs[:] = convert(done)
        sums = {"steps": torch.ones(num_envs)}
        return obs, reward, dones, {"time_outs": time_outs, "episode_cumulative": sums}

    env.step = converted
    return env


def test_done_comes_in_any_form(here, monkeypatch):
    """bool, numbers, or another number than 1; also in a tensor that the env overwrites.

    The weights and what observers make of it are the same.
    """
    results = []
    for form in DONES:
        monkeypatch.setenv("DONES", form)
        main(["--env-id", f"{__name__}:dones_env", *SMALL, "--experiment", form])
        model = load_checkpoint(f"runs/{form}/nn/last.pth")["model"]
        results.append((model, scalars(f"runs/{form}")["episode_cumulative/steps"]))
    assert len(results[0][1]) == 4
    for result in results[1:]:
        assert differences(result, results[0]) == []


# ---------------------------------------------------------------------------------------- bad input


@pytest.fixture(scope="session")
def bad_folder(small_run):
    """A working directory with a finished run, runs/r, and files that are no checkpoints."""
    path = small_run / "runs/r/nn/last.pth"
    state = load_checkpoint(str(path))
    good = path.read_bytes()
    (small_run / "truncated.pth").write_bytes(good[: len(good) // 2])
    where = good.index(state["model"]["a2c_network.mu.weight"].numpy().tobytes())
    flipped = bytes([good[where] ^ 1])
    (small_run / "flipped.pth").write_bytes(good[:where] + flipped + good[where + 1 :])
    (small_run / "empty.pth").write_bytes(b"")
    (small_run / "text.pth").write_text("not a checkpoint")
    torch.save({"weights": torch.zeros(3)}, str(small_run / "other.pth"))
    torch.save([torch.zeros(3)], str(small_run / "list.pth"))
    torch.save({"model": Path("x")}, str(small_run / "code.pth"))
    theirs = {key: state[key] for key in ("model", "optimizer", "epoch", "frame")}
    torch.save(theirs, str(small_run / "theirs.pth"))
    torch.save({**theirs, "last_mean_rewards": np.float32(1)}, str(small_run / "theirs2.pth"))
    torch.save({**state, "format_version": 99}, str(small_run / "newer.pth"))
    # A compressed file of some kilobytes could unfold to gigabytes.
    compressed = zipfile.ZipFile(str(small_run / "compressed.pth"), "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(str(path)) as archive, compressed:
        for name in archive.namelist():
            compressed.writestr(name, archive.read(name))
    (small_run / "folder").mkdir()
    (small_run / "loop").symlink_to("loop")
    return small_run


def wrong_count_env(num_envs, device, seed):
    return Env(num_envs + 1, device, seed)


def no_acts_env(num_envs, device, seed):
    env = Env(num_envs, device, seed)
    env.num_acts = None
    return env


def positional_env(count, where):
    """Not what make_env calls."""


def wide_reset_env(num_envs, device, seed):
    return Env(num_envs, device, seed, reset=lambda: {"obs": torch.zeros(num_envs, 7)})


GOOD_ENV = ["--env-id", f"{Env.__module__}:Env"]
MORE = ["--max-epochs", "9"]
CONVERT = "python tools/from_rl_games.py"
BAD = [
    (["--env-id", "Ant"], "unknown --env-id Ant: without Isaac Gym only Cartpole is built in"),
    (["--sim", "isaacgym"], "Isaac Gym cannot be used: it is not installed"),
    (["--env-id", "no_such_module:f"], "no_such_module"),
    (["--env-id", ":f"], "--env-id :f"),
    (["--env-id", "../x:f"], "--env-id ../x:f"),
    (
        ["--env-id", f"{__name__}:nothing"],
        "nothing must be a function of num_envs, device and seed",
    ),
    (["--env-id", f"{__name__}:positional_env"], "positional_env must be a function of num_envs"),
    (["--env-id", f"{__name__}:no_acts_env"], "num_acts must be a positive int, not None"),
    (["--env-id", f"{__name__}:wrong_count_env"], "num_envs 33, but 32 were asked for"),
    (
        ["--env-id", f"{__name__}:wide_reset_env"],
        "reset()['obs'] must be a dense tensor of shape (32, 2), not shape (32, 7)",
    ),
    (["--experiment", "a/b"], "--experiment a/b must be a plain name"),
    (["--train-dir", "text.pth"], "error: text.pth"),
    (["--train-dir", "/proc/x"], "error: /proc/x"),
    (["--minibatch-size", "100"], "choose a --minibatch-size that divides 256"),
    (["--minibatch-size", "1"], "--minibatch-size"),
    (["--num-envs", "0"], "--num-envs must be >= 1, not 0"),
    (["--num-steps", "-3"], "--num-steps must be >= 1, not -3"),
    (["--max-epochs", "0"], "--max-epochs must be >= 1"),
    (["--learning-rate", "-1"], "--learning-rate must be >= 0"),
    (["--gamma", "nan"], "--gamma must be >= 0, not nan"),
    (["--units", "0"], "--units and --critic-units must be positive"),
    (["--device", "gpu"], "--device gpu"),
    (["--device", "meta"], "--device meta"),
    (["--device", "cuda:77"], "--device cuda:77"),
    (["--play"], "--play needs --checkpoint"),
    (["--checkpoint", "missing.pth"], "missing.pth"),
    (["--checkpoint", "loop"], "loop"),
    (["--checkpoint", "folder"], "folder has no readable checkpoint in nn/"),
    (["--checkpoint", "truncated.pth"], "truncated.pth"),
    (["--checkpoint", "flipped.pth"], "does not match its checksum"),
    (["--checkpoint", "compressed.pth"], "compressed.pth"),
    (["--checkpoint", "empty.pth"], "empty.pth"),
    (["--checkpoint", "text.pth"], "text.pth"),
    (
        ["--checkpoint", "other.pth"],
        "other.pth cannot be used: it is not a checkpoint of train_ppo.py",
    ),
    (["--checkpoint", "list.pth"], "list.pth"),
    (["--checkpoint", "code.pth"], "more than tensors, numbers and text is in it"),
    (["--checkpoint", "theirs.pth"], f"{CONVERT} theirs.pth ours.pth"),
    (["--play", "--checkpoint", "theirs2.pth"], f"{CONVERT} theirs2.pth ours.pth"),
    (["--init-from", "theirs.pth"], f"{CONVERT} theirs.pth ours.pth"),
    (["--checkpoint", "newer.pth"], "format 99"),
    (
        ["--checkpoint", "runs/r", *GOOD_ENV, *MORE],
        "runs/r/nn/last.pth cannot be used: it does not fit",
    ),
    (
        ["--play", "--checkpoint", "runs/r", *GOOD_ENV],
        "runs/r/nn/last.pth cannot be used: it does not fit",
    ),
    (["--init-from", "runs/r", *GOOD_ENV], "runs/r/nn/last.pth cannot be used: it does not fit"),
    (
        ["--checkpoint", "runs/r", "--units", "8", *MORE],
        "runs/r/nn/last.pth cannot be used: it does not fit",
    ),
    (["--checkpoint", "runs/r", "--init-from", "runs/r", *MORE], "give one of them"),
    (
        ["--checkpoint", "runs/r", "--experiment", "new", *MORE],
        "for a new run give runs/r/nn/last.pth",
    ),
]


@pytest.fixture
def refused(monkeypatch, capsys):
    """refused(flags): main(flags) ends with 2 and one line, which is returned; all files stay."""

    def run(flags):
        before = snapshot(".")
        folders = sorted(Path().rglob("*"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(flags)
        output = capsys.readouterr()
        *others, error = output.err.splitlines()
        assert stopped.value.code == 2 and error.startswith("error: "), output.err
        assert all(line.startswith("warning: ") for line in others)
        assert snapshot(".") == before and sorted(Path().rglob("*")) == folders
        return error

    return run


@pytest.mark.parametrize("flags, message", BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_input_gets_one_line_and_writes_nothing(
    bad_folder, monkeypatch, refused, flags, message
):
    monkeypatch.chdir(bad_folder)
    assert message in refused([*([] if "--checkpoint" in flags else SMALL), *flags])


def test_bad_input_in_a_process_of_its_own(here):
    """Its output is that line alone, and its exit code is 2."""
    out, err = forked("--env-id", "Humanoid", cwd=here, code=2)
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("error: unknown --env-id Humanoid")


def test_unknown_flags_are_named(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--no-such-flag"])
    assert stopped.value.code == 2 and "no-such-flag" in capsys.readouterr().err


# name: (what step() returns instead of (obs, reward, done, infos), what the message says)
WRONG_STEPS = {
    "wide reward": (
        lambda o, r, d, i: (o, r.unsqueeze(1), d, i),
        "step()'s reward must be a dense tensor of shape (32,), not shape (32, 1)",
    ),
    "list done": (
        lambda o, r, d, i: (o, r, d.tolist(), i),
        "step()'s done must be a dense tensor of shape (32,), not list",
    ),
    "wide obs": (
        lambda o, r, d, i: ({"obs": torch.zeros(32, 7)}, r, d, i),
        "step()[0]['obs'] must be a dense tensor of shape (32, 2), not shape (32, 7)",
    ),
    "bare obs": (
        lambda o, r, d, i: (o["obs"], r, d, i),
        "step()[0]['obs'] must be a dense tensor of shape (32, 2), not NoneType",
    ),
    "few time_outs": (
        lambda o, r, d, i: (o, r, d, {"time_outs": d[:3]}),
        "infos['time_outs'] must be a dense tensor of shape (32,), not shape (3,)",
    ),
    "sparse reward": (
        lambda o, r, d, i: (o, r.to_sparse(), d, i),
        "step()'s reward must be a dense tensor of shape (32,), not Tensor",
    ),
    "obs without numbers": (
        lambda o, r, d, i: ({"obs": o["obs"].to("meta")}, r, d, i),
        "step()[0]['obs'] must be a dense tensor of shape (32, 2), not Tensor",
    ),
    "list infos": (lambda o, r, d, i: (o, r, d, []), "infos a dict"),
    "five values": (lambda o, r, d, i: (o, r, d, d, i), "step() must return (obs, reward, done"),
}


def wrong_step_env(num_envs, device, seed):
    """`Env` that breaks the contract from a certain step on."""
    name, first = os.environ["WRONG_STEP"].split(":")
    env = Env(num_envs, device, seed)
    step = env.step
    steps = []

    def wrong(actions):
        steps.append(1)
        result = step(actions)
        return WRONG_STEPS[name][0](*result) if len(steps) >= int(first) else result

    env.step = wrong
    return env


@pytest.mark.parametrize("name", WRONG_STEPS)
def test_env_that_breaks_the_contract_is_named(here, monkeypatch, capsys, refused, name):
    """At its first step, before anything is written, and at a later one; in training and play."""
    message = WRONG_STEPS[name][1]
    flags = ["--env-id", f"{__name__}:wrong_step_env"]
    monkeypatch.setenv("WRONG_STEP", f"{name}:1")
    assert message in refused([*flags, *SMALL])
    monkeypatch.setenv("WRONG_STEP", f"{name}:13")  # in the second rollout
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*flags, *SMALL, "--save-frequency", "1", "--experiment", "r"])
    output = capsys.readouterr()
    assert stopped.value.code == 2 and message in output.err
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    assert "epoch 1/4" in output.out and sorted(os.listdir("runs/r/nn")) == [
        "epoch_1.pth",
        "last.pth",
    ]
    assert load_checkpoint("runs/r/nn/last.pth")["epoch"] == 1, "what was learned before is there"
    assert message in refused([*flags, "--play", "--checkpoint", "runs/r"])


# Changes of a checkpoint by one field. Those who must refuse it: c, --checkpoint with a file or a
# folder; p, --play; i, --init-from. The others may refuse it too, or do their work.
REQUIRED = {
    "args": "cpi",
    "model": "cpi",
    "optimizer": "c",
    "epoch": "c",
    "frame": "c",
    "total_time": "c",
    "last_mean_rewards": "c",
    "best_epoch": "c",
    "env_state": "c",
    "episodes": "c",
    "obs": "c",
    "dones": "c",
    "rng": "c",
    "observers": "c",
}
MU = "a2c_network.mu.weight"
CHANGES = {
    "args None": ("cpi", lambda s: s.update(args=None)),
    "args a list": ("cpi", lambda s: s.update(args=["units"])),
    "units abc": ("cpi", lambda s: s["args"].update(units="abc")),
    "units None": ("cpi", lambda s: s["args"].update(units=None)),
    "units of strings": ("cpi", lambda s: s["args"].update(units=["a"])),
    "unknown activation": ("cpi", lambda s: s["args"].update(activation="abc")),
    "unknown schedule": ("c", lambda s: s["args"].update(lr_schedule="abc")),
    "gamma a string": ("c", lambda s: s["args"].update(gamma="0.9")),
    "num_envs None": ("c", lambda s: s["args"].update(num_envs=None)),
    "num_steps 1.5": ("c", lambda s: s["args"].update(num_steps=1.5)),
    "env_id a number": ("cp", lambda s: s["args"].update(env_id=3)),
    "an argument of the future": ("", lambda s: s["args"].update(speed=9000)),
    "an argument of no name": ("", lambda s: s["args"].update({3: 4})),
    "num_obs a tensor": ("", lambda s: s.update(num_obs=torch.zeros(2))),
    "format a tensor": ("cpi", lambda s: s.update(format_version=torch.zeros(3))),
    "format a string": ("cpi", lambda s: s.update(format_version="2")),
    "model a string": ("cpi", lambda s: s.update(model="x")),
    "model without a tensor": ("cpi", lambda s: s["model"].pop(MU)),
    "model with one more": ("cpi", lambda s: s["model"].update(more=torch.zeros(2))),
    "weight None": ("cpi", lambda s: s["model"].update({MU: None})),
    "weight of another shape": ("cpi", lambda s: s["model"].update({MU: torch.zeros(3, 3)})),
    "weight of another dtype": ("cpi", lambda s: s["model"].update({MU: s["model"][MU].half()})),
    "weight without numbers": ("cpi", lambda s: s["model"].update({MU: s["model"][MU].to("meta")})),
    "sparse weight": ("cpi", lambda s: s["model"].update({MU: s["model"][MU].to_sparse()})),
    "optimizer empty": ("c", lambda s: s.update(optimizer={})),
    "optimizer without groups": ("c", lambda s: s["optimizer"].update(param_groups=[])),
    "optimizer without a rate": ("c", lambda s: s["optimizer"]["param_groups"][0].pop("lr")),
    "rate a string": ("c", lambda s: s["optimizer"]["param_groups"][0].update(lr="x")),
    "optimizer without state": ("c", lambda s: s["optimizer"].update(state=None)),
    "moment missing": ("", lambda s: s["optimizer"]["state"].pop(0)),
    "moment of another shape": (
        "c",
        lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(7)),
    ),
    "moment of another dtype": (
        "c",
        lambda s: s["optimizer"]["state"][0].update(exp_avg_sq=torch.zeros(1).double()),
    ),
    "moment of less storage than its shape": (
        "",
        lambda s: s["optimizer"]["state"][0].update(
            exp_avg=torch.zeros(1).expand_as(s["optimizer"]["state"][0]["exp_avg"])
        ),
    ),
    "sparse moment": (
        "c",
        lambda s: s["optimizer"]["state"][0].update(
            exp_avg=s["optimizer"]["state"][0]["exp_avg"].to_sparse()
        ),
    ),
    "Adam's step None": ("c", lambda s: s["optimizer"]["state"][0].update(step=None)),
    "Adam's step three": (
        "c",
        lambda s: s["optimizer"]["state"][0].update(step=torch.zeros(3)),
    ),
    "epoch a string": ("c", lambda s: s.update(epoch="6")),
    "epoch a tensor": ("c", lambda s: s.update(epoch=torch.zeros(2))),
    "frame None": ("c", lambda s: s.update(frame=None)),
    "time a string": ("c", lambda s: s.update(total_time="x")),
    "time nan": ("c", lambda s: s.update(total_time=math.nan)),
    "best reward a list": ("c", lambda s: s.update(last_mean_rewards=[])),
    "best epoch a tensor": ("c", lambda s: s.update(best_epoch=torch.zeros(2))),
    "episodes None": ("c", lambda s: s.update(episodes=None)),
    "episodes short": ("c", lambda s: s["episodes"].pop()),
    "running episodes of another shape": (
        "c",
        lambda s: s["episodes"].__setitem__(0, torch.zeros(7, 7)),
    ),
    "finished episodes None": ("c", lambda s: s["episodes"].__setitem__(1, None)),
    "finished episodes of another shape": (
        "c",
        lambda s: s["episodes"].__setitem__(1, torch.zeros(7, 7)),
    ),
    "count of episodes a string": ("c", lambda s: s["episodes"].__setitem__(2, "x")),
    "env_state a string": ("c", lambda s: s.update(env_state="x")),
    "env_state of another env": ("c", lambda s: s.update(env_state={"level": 3})),
    "env_state of another shape": ("c", lambda s: s["env_state"].update(state=torch.zeros(4, 9))),
    "env_state not a tensor": ("c", lambda s: s["env_state"].update(progress=[1])),
    "env_state names a method": ("c", lambda s: s["env_state"].update(step=torch.zeros(3))),
    "obs a list": ("c", lambda s: s.update(obs=[])),
    "obs of another dtype": ("", lambda s: s.update(obs=s["obs"].double())),
    "dones None": ("c", lambda s: s.update(dones=None)),
    "dones of another shape": ("c", lambda s: s.update(dones=torch.zeros(5))),
    "rng None": ("c", lambda s: s.update(rng=None)),
    "rng without torch's": ("c", lambda s: s["rng"].pop("torch")),
    "torch's rng too short": ("c", lambda s: s["rng"].update(torch=torch.zeros(3).byte())),
    "torch's rng nonsense": ("c", lambda s: s["rng"].update(torch=torch.zeros(5056).byte())),
    "rng without the GPU's": ("c", lambda s: s["rng"].pop("cuda")),
    "rng with Python's, as older files": ("", lambda s: s["rng"].update(python=None, numpy=None)),
    "observers None": ("c", lambda s: s.update(observers=None)),
    "observers numbers": ("c", lambda s: s.update(observers=[1])),
    "another key": ("", lambda s: s.update(more=1)),
    "a key that is a number": ("", lambda s: s.update({3: 1})),
}
for key, refusing in REQUIRED.items():
    CHANGES[f"no {key}"] = (refusing, lambda s, key=key: s.pop(key))


def impatient_cartpole(args):
    """The built-in Cartpole with episodes of three steps at most, for a short --play."""
    env = Cartpole(args.num_envs, torch.device("cpu"))
    env.max_episode_length = 3
    return env


@pytest.fixture(scope="session")
def tiny_state(tmp_path_factory):
    """The state of a run of two epochs in eight environments."""
    folder = tmp_path_factory.mktemp("tiny")
    flags = ["--num-envs", "8", "--num-steps", "8", "--update-epochs", "1", "--max-epochs", "2"]
    main([*flags, "--units", "4", "--experiment", "r", "--train-dir", str(folder)])
    return load_checkpoint(str(folder / "r/nn/last.pth"))


@pytest.mark.parametrize("name", CHANGES)
def test_malformed_checkpoints_are_refused_by_one_line(
    here, monkeypatch, capsys, refused, tiny_state, name
):
    """Also where they are harmless to read: no traceback, nothing written, others' files stay.

    Where the changed field does not matter the program may do its work instead.
    """
    refusing, change = CHANGES[name]
    state = copy.deepcopy(tiny_state)
    change(state)
    os.makedirs("runs/bad/nn")
    torch.save(state, "bad.pth")
    torch.save(state, "runs/bad/nn/last.pth")
    monkeypatch.setattr(train_ppo, "make_env", impatient_cartpole)
    small = ["--num-envs", "8", "--num-steps", "8", "--max-epochs", "1"]
    commands = [
        ("c", ["--checkpoint", "bad.pth", "--max-epochs", "3"]),
        ("c", ["--checkpoint", "runs/bad", "--max-epochs", "3"]),
        ("p", ["--play", "--checkpoint", "bad.pth"]),
        ("i", ["--init-from", "bad.pth", *small]),
    ]
    for mode, flags in commands:
        if mode in refusing:
            assert "bad" in refused(flags)
            continue
        try:
            main(flags)
        except SystemExit as stopped:
            assert stopped.code == 2
            assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_module_that_a_checkpoint_names_is_not_imported(here, refused, tiny_state):
    """The flag chooses which code runs, so --env-id module:factory must be given again."""
    Path("my_envs.py").write_text("open('imported', 'w')")
    state = copy.deepcopy(tiny_state)
    state["args"]["env_id"] = "my_envs:make"
    os.makedirs("runs/r/nn")
    torch.save(state, "runs/r/nn/last.pth")
    for flags in (["--checkpoint"], ["--play", "--checkpoint"]):
        for path in ("runs/r", "runs/r/nn/last.pth"):
            error = refused([*flags, path, "--max-epochs", "9"])
            assert "--env-id my_envs:make" in error
    main(["--init-from", "runs/r", *SMALL, "--max-epochs", "1"])
    assert not os.path.exists("imported")


EXPORT_TOOL = str(HERE / "tools/export_policy.py")
CONVERT_TOOL = str(HERE / "tools/from_rl_games.py")


# ----------------------------------------------------------------------------------------- rl_games


def rl_games_runner(observer=None, **config):
    """rl_games' own Runner on our Cartpole; `config` as in its yaml files."""
    pytest.importorskip("rl_games.torch_runner")
    torch.set_num_threads(1)  # as ours does; more are slower, much so on a busy machine
    ours = {"units": config.pop("units", (32, 32)), "separate": config.pop("separate", False)}
    args = Args(num_envs=config.get("num_actors", 512), max_epochs=10, seed=7, **ours)
    config = {"save_frequency": 10, "save_best_after": 5, "train_dir": "theirs", **config}
    return fidelity.rl_games_runner(
        Cartpole(args.num_envs, torch.device("cpu")), args, observer, **config
    )


def rl_games_player(path, **config):
    """f(raw observations) -> (mean actions, values), by rl_games' own player."""
    player = rl_games_runner(player=dict(use_vecenv=True), **config).create_player()
    player.restore(str(path))
    player.has_batch_dimension = True

    def act(obs):
        inputs = dict(is_train=False, obs=obs.clone(), prev_actions=None, rnn_states=None)
        values = player.model(inputs)["values"].squeeze(-1)
        return player.get_action(obs.clone(), is_deterministic=True), values

    return act


def our_player(path):
    """f(raw observations) -> (mean actions, values), by our network."""
    state = load_checkpoint(str(path))
    model = train_ppo.ActorCritic(state["num_obs"], state["num_acts"], Args(**state["args"]))
    model.load_state_dict(state["model"])
    return lambda obs: (model(obs)[0].detach().clamp(-1, 1), model.value(obs))


def newest(pattern):
    return max(Path().glob(pattern), key=lambda path: path.stat().st_mtime)


def random_checkpoint(path, num_obs=60, num_acts=8, **arguments):
    """An rl_games checkpoint of a policy whose weights and normaliser are random; its network."""
    args = Args(**{"units": (256, 128, 64), **arguments})
    model = train_ppo.ActorCritic(num_obs, num_acts, args)
    scale = torch.logspace(-2, 2, num_obs)
    model.running_mean_std.update(torch.randn(1000, num_obs) * scale + scale.log())
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = {
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "frame": 9,
        "last_mean_rewards": np.float32(7.5),
        "env_state": None,
    }
    torch.save(state, str(path))
    return model


class Recorder(train_ppo.AlgoObserver):
    """Notes each epoch of whichever trainer calls it; rl_games' Runner takes it as ours does."""

    def __init__(self):
        self.rates = []
        self.epochs = []
        self.counts = []
        self.ended = []

    def after_init(self, algo):
        super().after_init(algo)
        self.rates.append(float(algo.optimizer.param_groups[0]["lr"]))

    def process_infos(self, infos, done_indices):
        self.ended.append(float(self.algo.dones.float().mean()))

    def after_print_stats(self, frame, epoch_num, total_time):
        self.epochs.append(epoch_num)
        self.counts.append(float(self.algo.model.state_dict()["running_mean_std.count"]))


def convert(theirs, ours, *flags):
    from_rl_games.main([str(theirs), str(ours), *flags])
    return load_checkpoint(str(ours))


def test_checkpoints_move_between_rl_games_and_here(here, capsys):
    """20 epochs there, 10 here, 5 there: nothing starts over, and both sides act alike."""
    recorder = Recorder()
    obs = torch.randn(1000, 4) * torch.tensor([2.0, 2.0, 0.5, 3.0])

    def agree(theirs, ours):
        for a, b in zip(rl_games_player(theirs)(obs), our_player(ours)(obs)):
            assert (a - b).abs().max() <= 1e-6

    rl_games_runner(recorder, max_epochs=20).run(dict(train=True, play=False))
    first = newest("theirs/*/nn/last_theirs_ep_20_*.pth")
    saved = torch.load(str(first), weights_only=False)
    capsys.readouterr()
    moved = convert(first, "moved.pth", "--env-id", "Cartpole")
    out = capsys.readouterr().out
    assert out.startswith("wrote moved.pth: epoch 20, frame 163,840, best ")
    agree(first, "moved.pth")
    for name in ("model", "optimizer", "epoch", "frame"):
        assert differences(moved[name], saved[name]) == [], name
    assert moved["args"] == dict(
        units=(32, 32), separate=False, normalize_input=True, normalize_value=True
    ), "only what the weights say, so that the rest comes from flags and the task's yaml"

    command = shlex.split(re.search(r"continue  python (.*)", out).group(1))
    assert Path(command[0]).resolve() == Path(SCRIPT)
    argv = [*command[1:], "--max-epochs", "30", "--experiment", "ours"]
    main(argv, observers=[recorder])
    out = capsys.readouterr().out
    assert "branching off moved.pth at epoch 20, frame 163,840" in out
    rate = saved["optimizer"]["param_groups"][0]["lr"]
    assert recorder.rates[1] == pytest.approx(rate) != Args().learning_rate
    agree("runs/ours/nn/last.pth", "runs/ours/nn/last.pth")

    rl_games_runner(recorder, max_epochs=35).run(
        dict(train=True, play=False, checkpoint="runs/ours/nn/last.pth")
    )
    last = newest("theirs/*/nn/last_theirs_ep_35_*.pth")
    convert(last, "back.pth")
    agree(last, "back.pth")
    assert recorder.epochs == list(range(1, 36))
    counts = recorder.counts
    assert all(before < after for before, after in zip(counts, counts[1:])), "normaliser"
    for path, epochs in (("runs/ours/nn/last.pth", 30), ("back.pth", 35)):
        state = load_checkpoint(path)
        steps = [int(moment["step"]) for moment in state["optimizer"]["state"].values()]
        assert steps == [8 * epochs] * 9, "Adam starts over"
        assert state["frame"] == epochs * 8192
    # An episode in which the policy failed is short: had a hand-over lost the policy, many would
    # end in the epochs after it.
    ended = np.array(recorder.ended).reshape(35, 16).mean(1)
    assert ended[:5].mean() > 0.02 and ended[20:].max() < 0.012
    # An entropy that starts over would jump to 1.42, a critic to several times its loss.
    runs = [scalars(path) for path in (first.parent.parent, "runs/ours", last.parent.parent)]
    for before, after in zip(runs, runs[1:]):
        entropies = [before["losses/entropy"][-1][1], after["losses/entropy"][0][1]]
        critics = [before["losses/c_loss"][-1][1], after["losses/c_loss"][0][1]]
        assert abs(entropies[1] - entropies[0]) < 0.25
        assert critics[1] < 1.5 * critics[0]


def test_checkpoints_of_compiled_and_mixed_precision_rl_games(here, capsys):
    """What 1.6.5 writes by default: a prefix before every name, and a numpy number.

    With mixed precision it adds a scaler, and torch before 1.12 counted Adam's steps in an int.
    """
    sizes = dict(units=(16, 8), separate=True)
    few = ["--num-envs", "64", "--minibatch-size", "1024"]
    runner = rl_games_runner(max_epochs=6, num_actors=64, minibatch_size=1024, **sizes)
    runner.run(dict(train=True, play=False))
    path = newest("theirs/*/nn/last*.pth")
    state = torch.load(str(path), weights_only=False)
    state["model"] = {f"_orig_mod.{key}": value for key, value in state["model"].items()}
    for moment in state["optimizer"]["state"].values():
        moment["step"] = int(moment["step"])
    state.update(last_mean_rewards=np.float32(12.5), scaler={"scale": 65536.0})
    torch.save(state, "compiled.pth")
    moved = convert("compiled.pth", "moved.pth")
    assert moved["args"]["units"] == (16, 8) and moved["args"]["separate"]

    main(["--checkpoint", "moved.pth", "--max-epochs", "8", "--experiment", "r", *few])
    ours = load_checkpoint("runs/r/nn/last.pth")
    assert (ours["epoch"], ours["last_mean_rewards"]) == (8, 12.5)
    assert ours["args"]["units"] == [16, 8] and ours["args"]["separate"]
    steps = [float(moment["step"]) for moment in ours["optimizer"]["state"].values()]
    assert steps == [8 * 8] * 13
    main(["--play", "--checkpoint", "moved.pth", "--num-envs", "8"])
    assert "8 episodes" in capsys.readouterr().out
    main(["--init-from", "moved.pth", "--max-epochs", "1", "--experiment", "from", *few])
    assert load_checkpoint("runs/from/nn/last.pth")["epoch"] == 1
    obs = torch.randn(100, 4)
    theirs = rl_games_player(path, **sizes)(obs)[0]
    assert torch.allclose(theirs, our_player("moved.pth")(obs)[0], atol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("hydra") is None, reason="needs hydra-core")
def test_rl_games_checkpoint_of_an_isaacgym_task_takes_the_yamls_settings(here):
    """The file knows its layers, and the task's yaml everything else."""
    write_isaacgym(here)  # noqa: F405
    random_checkpoint("theirs.pth", 3, 2, units=(16, 8))
    convert("theirs.pth", "ours.pth", "--env-id", "Ant")
    flags = ["--env-id", "Ant", "--checkpoint", "ours.pth", "--experiment", "r"]
    out, _ = shell(*flags, cwd=here)
    assert "epoch 4/6" in out and "epoch 3/6" not in out and "best 7.50" in out
    args = load_checkpoint("runs/r/nn/last.pth")["args"]
    expected = dict(units=[16, 8], gamma=0.98, num_envs=64, env_id="Ant", mixed_precision=True)
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize("start", [-100500, -1000000000])
def test_rl_games_checkpoint_without_a_best_reward(here, start):
    """rl_games saves the number that it starts from, which would otherwise count as a reward."""
    random_checkpoint("theirs.pth", 3, 2)
    state = torch.load("theirs.pth", weights_only=False)
    torch.save({**state, "last_mean_rewards": start}, "never.pth")
    assert convert("never.pth", "ours.pth")["last_mean_rewards"] == -math.inf


def test_numpy_numbers_of_both_numpys_are_read(here):
    """numpy 1 and 2 name the function that makes a number differently, and a file has either."""
    random_checkpoint("installed.pth", 3, 2)
    state = torch.load("installed.pth", weights_only=False)
    state["env_state"] = {"level": np.float64(0.5), "levels": [np.int64(3)]}
    torch.save(state, "installed.pth")
    old, new = b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n"
    found = set()
    for wanted in (old, new):
        with zipfile.ZipFile("installed.pth") as source, zipfile.ZipFile("x.pth", "w") as target:
            for name in source.namelist():
                data = source.read(name)
                found.update({old, new}.intersection([m for m in (old, new) if m in data]))
                if name.endswith("data.pkl"):
                    data = data.replace(old, wanted).replace(new, wanted)
                target.writestr(name, data)
        ours = convert("x.pth", f"{len(wanted)}.pth")
        assert ours["last_mean_rewards"] == 7.5
        assert ours["env_state"] == {"level": 0.5, "levels": [3]}
        kinds = {type(ours["env_state"]["level"]), type(ours["env_state"]["levels"][0])}
        assert kinds == {float, int}, "a checkpoint of ours has no numpy in it"
    assert len(found) == 1, "the file names the function in another way: mend this test"


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("ran",)


NOT_OURS = "theirs.pth is of an rl_games network that train_ppo.py does not have"
UNFIT = "theirs.pth cannot be converted"
NOT_PPO = "theirs.pth is not a checkpoint of rl_games' PPO"
RL_GAMES_REFUSALS = {
    "recurrent": (
        lambda s: s["model"].update({"a2c_network.rnn.rnn.weight_ih_l0": torch.zeros(4)}),
        f"{NOT_OURS}.*: a2c_network.rnn.rnn.weight_ih_l0",
    ),
    "central value": (
        lambda s: s.update(assymetric_vf_nets={}),
        f"{NOT_OURS}.*: assymetric_vf_nets",
    ),
    "discrete": (
        lambda s: s["model"].pop("a2c_network.sigma"),
        f"{NOT_OURS}.*: a2c_network.sigma",
    ),
    "convolutional": (
        lambda s: s["model"].pop("a2c_network.actor_mlp.0.weight"),
        f"{NOT_OURS}.*: a2c_network.actor_mlp.0.weight",
    ),
    "another shape": (
        lambda s: s["model"].update({"a2c_network.mu.weight": torch.zeros(2, 5)}),
        r"theirs.pth cannot be used: .*: model.a2c_network.mu.weight is .* torch.float32 \(2, 5\)",
    ),
    "before 1.3": (
        lambda s: s.update(running_mean_std={}),
        f"{NOT_OURS}.*: running_mean_std",
    ),
    "another optimizer": (
        lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
        r"theirs.pth cannot be used: .*: optimizer.0.exp_avg is torch.strided torch.float32 \(3,\)",
    ),
    "no frame": (lambda s: s.pop("frame"), f"{NOT_PPO}: it lacks frame"),
    "model a list": (lambda s: s.update(model=[1]), f"{UNFIT}: AttributeError"),
    "epoch a list": (lambda s: s.update(epoch=[1]), f"{UNFIT}: TypeError"),
    "no learning rate": (lambda s: s["optimizer"].update(param_groups=[]), f"{UNFIT}: IndexError"),
    "code": (
        lambda s: s.update(env_state=RunsCode()),
        f"{UNFIT}: more than tensors, numbers and text is in it, and reading it would run code",
    ),
    "ours": (
        lambda s: s.update(format_version=2),
        "theirs.pth is a checkpoint of train_ppo.py: give it to --checkpoint as it is",
    ),
}


@pytest.mark.parametrize("case", RL_GAMES_REFUSALS)
def test_rl_games_files_that_are_not_ours_are_refused_by_name(here, capsys, case):
    """One line names what is in the way; nothing is written, and no code in the file runs."""
    change, message = RL_GAMES_REFUSALS[case]
    random_checkpoint("theirs.pth", 3, 2)
    state = torch.load("theirs.pth", weights_only=False)
    change(state)
    torch.save(state, "theirs.pth")
    with pytest.raises(SystemExit) as stopped:
        from_rl_games.main(["theirs.pth", "ours.pth"])
    assert stopped.value.code == 2
    assert re.fullmatch(f"error: {message}.*\n", capsys.readouterr().err)
    assert os.listdir() == ["theirs.pth"]


def test_rl_games_files_that_cannot_be_read_or_written(here, capsys):
    """Each gets one line, and an existing file stays as it is."""
    random_checkpoint("theirs.pth", 3, 2)
    good = Path("theirs.pth").read_bytes()
    Path("truncated.pth").write_bytes(good[: len(good) // 2])
    middle = good.index(load_weight("theirs.pth"))
    flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    Path("flipped.pth").write_bytes(flipped)
    Path("mine.pth").write_text("keep me")
    os.symlink("nowhere", "link.pth")
    before = snapshot(".")
    for theirs, ours, message in (
        ("none.pth", "new.pth", "none.pth cannot be converted: .*No such file.*"),
        (".", "new.pth", ". cannot be converted: .*Is a directory.*"),
        ("truncated.pth", "new.pth", "truncated.pth cannot be converted: BadZipFile.*"),
        (
            "flipped.pth",
            "new.pth",
            "flipped.pth cannot be converted: .* does not match its checksum",
        ),
        ("mine.pth", "new.pth", "mine.pth cannot be converted: BadZipFile.*"),
        ("theirs.pth", "mine.pth", "mine.pth exists already: give a new name"),
        ("theirs.pth", "link.pth", "link.pth exists already: give a new name"),
        ("theirs.pth", "no/x.pth", "no/x.pth cannot be written: No such file or directory"),
    ):
        with pytest.raises(SystemExit) as stopped:
            from_rl_games.main([theirs, ours])
        assert stopped.value.code == 2
        assert re.fullmatch(f"error: {message}\n", capsys.readouterr().err), (theirs, ours)
    assert snapshot(".") == before and not os.path.lexists("nowhere")


def load_weight(path):
    """The bytes of one weight in a checkpoint."""
    weights = torch.load(path, weights_only=False)["model"]
    return weights["a2c_network.actor_mlp.0.weight"].numpy().tobytes()


def test_observers_of_ours_run_in_rl_games(here):
    """An observer that is written for here, in our MultiObserver, works in rl_games' Runner."""
    recorder = Recorder()
    observers = train_ppo.MultiObserver([recorder])
    runner = rl_games_runner(observers, max_epochs=3, num_actors=64, minibatch_size=1024)
    runner.run(dict(train=True, play=False))
    assert recorder.epochs == [1, 2, 3]


def test_parameters_have_rl_games_names_in_its_order(here):
    """Same names, shapes, order and outputs as rl_games' model, so that checkpoints can move."""
    builder = pytest.importorskip("rl_games.algos_torch.model_builder")
    for separate in (False, True):
        args = Args(units=(16, 8), separate=separate)
        shape = dict(actions_num=2, input_shape=(5,), num_seqs=1, value_size=1)
        network = builder.ModelBuilder().load(fidelity.rl_games_params(args))
        theirs = network.build(dict(shape, normalize_value=True, normalize_input=True))
        ours = train_ppo.ActorCritic(5, 2, args)
        assert [(n, p.shape) for n, p in ours.named_parameters()] == [
            (n, p.shape) for n, p in theirs.named_parameters()
        ]
        assert {n: (p.shape, p.dtype) for n, p in ours.state_dict().items()} == {
            n: (p.shape, p.dtype) for n, p in theirs.state_dict().items()
        }
        theirs.load_state_dict(ours.state_dict())
        obs = torch.randn(50, 5)
        inputs = dict(is_train=False, obs=obs.clone(), prev_actions=None, rnn_states=None)
        result = theirs.eval()(inputs)
        assert torch.allclose(result["mus"], ours(obs)[0], atol=1e-6)
        assert torch.allclose(result["sigmas"], ours(obs)[1].exp(), atol=1e-6)
        assert torch.allclose(result["values"].squeeze(), ours.value(obs), atol=1e-6)


# ------------------------------------------------------------------------------------------- export


def exported(folder):
    """{file: f(raw observations) -> actions}, run as a robot would: without train_ppo."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(f"{folder}/policy.onnx")
    return {
        "policy.onnx": lambda obs: torch.from_numpy(session.run(None, {"obs": obs.numpy()})[0]),
        "policy.pt": torch.jit.load(f"{folder}/policy.pt"),
    }


def test_exported_policy_acts_as_in_play(here, capsys):
    """Clipping of observations and normalisation are inside. The env is not needed."""
    pytest.importorskip("onnxruntime")
    main([*SMALL, "--experiment", "r"])
    state = load_checkpoint("runs/r/nn/last.pth")
    state["args"]["env_id"] = "gone:make_env"
    torch.save(state, "last.pth")
    out, err = shell("last.pth", "out/policy", cwd=here, script=(EXPORT_TOOL,))
    assert out.startswith("exported last.pth, epoch 4, to out/policy: largest difference to it ")
    assert "(policy.onnx)" in out and out.count("\n") == 1 and err == ""
    assert os.listdir("out") == ["policy"]
    assert sorted(os.listdir("out/policy")) == ["policy.json", "policy.onnx", "policy.pt"]

    about = json.loads(Path("out/policy/policy.json").read_text())
    differs = about.pop("largest_difference")
    assert sorted(differs) == ["policy.onnx", "policy.pt"] and max(differs.values()) <= 1e-5
    assert about == {
        "format_version": 1,
        "env_id": "gone:make_env",
        "checkpoint": str(here / "last.pth"),
        "epoch": 4,
        "mean_reward": None,
        "metadata": {"clip_obs": 5.0},
        "input": {
            "name": "obs",
            "dtype": "float32",
            "shape": "(batch, 4)",
            "size": 4,
            "clip": 5.0,
            "meaning": "raw observations: clipping and normalisation are inside",
        },
        "output": {
            "name": "action",
            "dtype": "float32",
            "shape": "(batch, 1)",
            "size": 1,
            "clip": 1.0,
            "meaning": "normalised mean action: the task's own action scale is not applied",
        },
    }
    act = our_player("last.pth")
    for n in (1, 7, 513):
        obs = torch.randn(n, 4) * 10
        for name, f in exported("out/policy").items():
            assert f(obs).shape == (n, 1), name
            assert (f(obs) - act(obs.clamp(-5, 5))[0]).abs().max() <= 1e-5, name

    lines = textwrap.dedent(export_policy.__doc__.split("On the robot:")[1])
    robot, _ = shell("-c", lines, cwd=here / "out", script=())
    expected = float(act(torch.zeros(1, 4))[0])
    assert float(robot.strip("[]\n")) == pytest.approx(expected, abs=1e-5), (
        "the tool's own lines for a robot"
    )

    capsys.readouterr()
    export_policy.main(["runs/r", "of_a_run"])
    assert capsys.readouterr().out.startswith("exported runs/r/nn/last.pth, epoch 4, to of_a_run: ")


@pytest.mark.parametrize("activation", train_ppo.ActorCritic.ACTIVATIONS)
def test_exported_policy_of_an_rl_games_checkpoint(here, capsys, activation):
    """Of Ant's size with random weights; one of them with a value network of its own."""
    pytest.importorskip("onnxruntime")
    separate = activation == "relu"
    model = random_checkpoint("theirs.pth", activation=activation, separate=separate)
    convert("theirs.pth", "ours.pth")
    flags = ["--env-id", "Ant", "--activation", activation, "--no-clip-actions"]
    export_policy.main(["ours.pth", "out", *flags])
    out = capsys.readouterr().out
    assert "no clipping of observations" in out and "epoch 3" in out
    assert "does not say it" not in out
    obs = torch.randn(1000, 60) * 10.0 ** torch.randint(-3, 5, (1000, 1))
    for name, f in exported("out").items():
        assert (f(obs) - model(obs)[0]).abs().max() <= 1e-5, name
    about = json.loads(Path("out/policy.json").read_text())
    assert (about["mean_reward"], about["env_id"]) == (7.5, "Ant")
    assert about["input"]["clip"] is None and about["output"]["clip"] is None


def test_tools_work_from_any_folder(here, capsys):
    """Both as real processes, far from train_ppo.py; the export says what it had to assume."""
    random_checkpoint("theirs.pth", 3, 2, units=(8,))
    out, err = shell("theirs.pth", "ours.pth", "--env-id", "Ant", cwd=here, script=(CONVERT_TOOL,))
    assert "--env-id Ant --play --checkpoint ours.pth" in out and err == ""
    before = snapshot(".")

    def refused(case):
        script, target, message = case
        out, err = shell("theirs.pth", target, cwd=here, script=(script,), code=2)
        assert (out, err) == ("", f"error: {message}\n")

    os.mkdir("folder")
    exists = "ours.pth exists already: give a new name", "folder exists already: give a new folder"
    at_once(refused, [(CONVERT_TOOL, "ours.pth", exists[0]), (EXPORT_TOOL, "folder", exists[1])])
    assert snapshot(".") == before

    export_policy.main(["ours.pth", "out"])
    out = capsys.readouterr().out
    assert "activation elu: ours.pth was rl_games' and does not say it" in out
    assert "clip_actions True: ours.pth was rl_games' and does not say it" in out
    assert json.loads(Path("out/policy.json").read_text())["env_id"] is None


def test_export_refusals(here, capsys):
    """Each gets one line, and what exists stays as it is."""
    random_checkpoint("theirs.pth", 3, 2, units=(8,))
    convert("theirs.pth", "ours.pth")
    os.mkdir("empty")
    os.symlink("nowhere", "link")
    before = snapshot(".")
    capsys.readouterr()
    for checkpoint, folder, message in (
        ("ours.pth", "empty", "empty exists already: give a new folder"),
        ("ours.pth", "ours.pth", "ours.pth exists already: give a new folder"),
        ("ours.pth", "link", "link exists already: give a new folder"),
        ("ours.pth", "ours.pth/new", "ours.pth/new cannot be written: Not a directory"),
        ("none.pth", "new", "none.pth cannot be used: .*No such file.*"),
        ("empty", "new", "empty has no readable checkpoint .*"),
        ("theirs.pth", "new", "theirs.pth .*python tools/from_rl_games.py theirs.pth ours.pth"),
    ):
        with pytest.raises(SystemExit) as stopped:
            export_policy.main([checkpoint, folder])
        assert stopped.value.code == 2
        err = capsys.readouterr().err
        assert re.fullmatch(f"error: {message}\n", err), (checkpoint, folder, err)
    assert snapshot(".") == before and os.listdir("empty") == []
    assert sorted(os.listdir()) == ["empty", "link", "ours.pth", "theirs.pth"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s["model"].pop("a2c_network.mu.bias"), "a2c_network.mu.bias is missing"),
        (lambda s: s["args"].update(units=("a",)), "cannot be used: TypeError"),
        (lambda s: s["args"].update(activation="sine"), "cannot be used: KeyError"),
    ],
    ids=["after a change of ActorCritic", "bad units", "unknown activation"],
)
def test_export_of_a_checkpoint_that_does_not_fit(here, capsys, change, message):
    """One line says what is in the way."""
    random_checkpoint("theirs.pth", 3, 2, units=(8,))
    state = convert("theirs.pth", "ours.pth")
    change(state)
    torch.save(state, "ours.pth")
    with pytest.raises(SystemExit) as stopped:
        export_policy.main(["ours.pth", "out"])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and message in err
    assert err.count("\n") == 1 and not os.path.exists("out")


def test_export_without_onnx_still_writes_torchscript(here, monkeypatch, capsys):
    """One warning says what is missing."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    random_checkpoint("theirs.pth", 3, 2, units=(8,))
    convert("theirs.pth", "ours.pth")
    export_policy.main(["ours.pth", "out"])
    err = capsys.readouterr().err
    missing = "is missing: pip install onnx onnxruntime"
    assert re.fullmatch(f"warning: policy.onnx is not written, onnx(runtime)? {missing}\n", err)
    assert sorted(os.listdir("out")) == ["policy.json", "policy.pt"]
    about = json.loads(Path("out/policy.json").read_text())
    assert list(about["largest_difference"]) == ["policy.pt"]


def test_export_that_differs_leaves_no_file(here, monkeypatch, capsys):
    """The files are compared with the checkpoint's own policy, not with each other."""
    random_checkpoint("theirs.pth", 3, 2, units=(8,))
    convert("theirs.pth", "ours.pth")
    traced = torch.jit.trace

    def without_normaliser(policy, example):
        policy.model.running_mean_std = torch.nn.Identity()
        return traced(policy, example)

    monkeypatch.setattr(torch.jit, "trace", without_normaliser)
    with pytest.raises(SystemExit) as stopped:
        export_policy.main(["ours.pth", "folder/out"])
    assert stopped.value.code == 1
    err = capsys.readouterr().err
    assert "error: the exported policy differs from ours.pth by {'policy.pt': " in err
    assert err.endswith("nothing was written\n")
    assert sorted(os.listdir()) == ["ours.pth", "theirs.pth"]


def test_compile_learns_the_same_and_continues_without_it(here, capsys):
    """Same weights but for rounding; a checkpoint has no trace of it."""
    if train_ppo.compiled([gae], None, torch.device("cpu")) == [gae]:
        pytest.skip("no compiler")
    short = [*SMALL, "--max-epochs", "2"]
    main([*short, "--experiment", "eager"])
    main([*short, "--experiment", "compiled", "--compile"])
    eager = load_checkpoint("runs/eager/nn/last.pth")["model"]
    compiled = load_checkpoint("runs/compiled/nn/last.pth")["model"]
    assert eager.keys() == compiled.keys()
    for name, value in eager.items():
        assert torch.allclose(value, compiled[name], atol=1e-4), name
    main(["--checkpoint", "runs/compiled", "--max-epochs", "3", "--no-compile"])
    assert "exactly where it stopped" in capsys.readouterr().out


def test_compiled_cartpole_draws_and_computes_the_same():
    env, same = [train_ppo.Cartpole(8, torch.device("cpu")) for _ in range(2)]
    if train_ppo.compiled([gae], env, torch.device("cpu")) == [gae]:
        pytest.skip("no compiler")
    assert "step" in vars(env), "it is compiled"
    for t in range(20):
        actions = torch.rand(8, 1) * 2 - 1
        torch.manual_seed(t)
        obs, reward, done, infos = env.step(actions)
        torch.manual_seed(t)
        expected = same.step(actions)
        assert torch.allclose(obs["obs"], expected[0]["obs"], atol=1e-4)
        assert torch.allclose(reward, expected[1], atol=1e-4)
        assert torch.equal(done, expected[2])
        assert torch.equal(infos["time_outs"], expected[3]["time_outs"])
    others = fidelity.Reach(8, "cpu")  # an env that does not say that it is compilable
    train_ppo.compiled([], others, torch.device("cpu"))
    assert "step" not in vars(others)


def test_compile_without_a_compiler_warns_once(here):
    """Training goes on without it."""
    missing = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(here / "cache")}
    out, err = shell(*SMALL, "--compile", "--experiment", "r", cwd=here, env=missing)
    assert err.count("warning: torch.compile does not work here") == 1
    assert "epoch 4/4" in out


# ------------------------------------------------------------------------- what survives what


def wait_for(condition, process, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert process.is_alive() and time.time() < end
        time.sleep(0.005)


OPTIONS = {
    "default": ["--games-to-track", "9", "--save-best-after", "1"],
    "linear, another seed": ["--lr-schedule", "linear", "--seed", "7"],
    "fixed, several minibatches": ["--lr-schedule", "fixed", "--minibatch-size", "64"],
    "standard, separate": ["--schedule-type", "standard", "--separate", "--seed", "-1"],
    "no normalisation": ["--no-normalize-input", "--no-normalize-value", "--no-norm-adv"],
}


class StopsItself(train_ppo.AlgoObserver):
    """Sends SIGTERM to the run in its second epoch."""

    def after_steps(self):
        if self.algo.epoch_num == 2:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("name", OPTIONS)
def test_continuing_is_exact_with_any_options(here, capsys, name):
    """Stopped by a signal after two of five epochs, a run ends with the same state to the last bit.

    Weights, optimizer, statistics, windows, generators, the env, and what is logged.
    """
    flags = [*SMALL, *OPTIONS[name], "--max-epochs", "5", "--save-frequency", "0"]
    main([*flags, "--experiment", "straight"])
    with pytest.raises(SystemExit) as stopped:
        main([*flags, "--experiment", "stopped"], observers=[StopsItself()])
    assert stopped.value.code == 128 + signal.SIGTERM
    assert load_checkpoint("runs/stopped/nn/last.pth")["epoch"] == 2
    capsys.readouterr()
    main(["--checkpoint", "runs/stopped"])
    assert "exactly where it stopped" in capsys.readouterr().out
    for file in os.listdir("runs/straight/nn"):
        assert same_state(f"runs/straight/nn/{file}", f"runs/stopped/nn/{file}") == []
    straight, continued = scalars("runs/straight"), scalars("runs/stopped")
    assert set(straight) == set(continued) and len(straight["info/kl"]) == 5
    for tag in straight:
        if not tag.startswith("performance/") and not tag.endswith("/time"):
            assert straight[tag] == continued[tag], tag


def counting_env(num_envs, device, seed):
    """Cartpole that reports a quantity to be summed up over each episode."""
    env = Cartpole(num_envs, torch.device(device))
    step = env.step

    def counted(actions):
        obs, reward, done, infos = step(actions)
        infos["episode_cumulative"] = {"reward": reward}
        return obs, reward, done, infos

    env.step = counted
    return env


def test_observer_state_continues(here):
    """Sums and windows of episode_cumulative go on where they stopped."""
    env = ["--env-id", f"{__name__}:counting_env"]
    flags = [*env, *SMALL, "--games-to-track", "9", "--save-frequency", "0"]
    main([*flags, "--experiment", "straight", "--max-epochs", "8"])
    main([*flags, "--experiment", "stopped", "--max-epochs", "4"])
    main([*env, "--checkpoint", "runs/stopped", "--max-epochs", "8"])
    tag = "episode_cumulative/reward"
    straight = scalars("runs/straight")[tag]
    assert straight and straight == scalars("runs/stopped")[tag]
    assert same_state("runs/straight/nn/last.pth", "runs/stopped/nn/last.pth") == []


class Counter(train_ppo.AlgoObserver):
    """Counts epochs from `start` on, and has no state before it has counted one."""

    def __init__(self, start):
        self.count = start

    def after_print_stats(self, frame, epoch_num, total_time):
        self.count += self.count > 0

    def state_dict(self):
        return {"count": self.count} if self.count else {}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_warnings_are_said_again_in_the_next_run_of_a_process(here, capsys):
    """Also for each of two observers that fail alike."""
    for _ in range(2):
        observers = [Broken("after_steps"), Broken("after_steps")]
        main(["--best-metric", "no/such", *SMALL], observers=observers)
        err = capsys.readouterr().err
        assert err.count("warning: Broken.after_steps raised") == 2
        assert err.count("warning: --best-metric no/such is not logged") == 1


def test_a_folder_continues_from_its_own_files_only(here, capsys):
    """A copy by another name is not one of them. Where best.pth is equal, last.pth is taken."""
    main([*SMALL, "--experiment", "other", "--max-epochs", "6"])
    main([*SMALL, "--experiment", "r"])
    for name in ("best_of_b", "before_epoch_8"):
        shutil.copy("runs/other/nn/last.pth", f"runs/r/nn/{name}.pth")
    shutil.copy("runs/r/nn/last.pth", "runs/r/nn/best.pth")
    main(["--checkpoint", "runs/r", "--max-epochs", "5"])
    assert "continuing runs/r/nn/last.pth at epoch 4" in capsys.readouterr().out


def test_observers_of_one_class_have_states_of_their_own(here):
    """Also if the first of them has nothing to save."""
    flags = [*SMALL, "--save-frequency", "0", "--experiment", "r"]
    main(flags, observers=[Counter(0), Counter(10), Counter(20)])
    observers = [Counter(0), Counter(1), Counter(2)]
    main(["--checkpoint", "runs/r", "--max-epochs", "5"], observers=observers)
    assert [observer.count for observer in observers] == [0, 15, 25]


def numpy_env(num_envs, device, seed):
    """An env like IsaacGymEnvs' ADR tasks, with numpy numbers in its state."""
    state = {"level": np.float32(0.5), "range": np.array([1.0, 2.0]), "names": ("a", "b")}
    env = Env(num_envs, device, seed, state=state)
    env.get_env_state = lambda: env.state
    env.set_env_state = lambda state: state["level"] == 2.5 or 1 / 0

    def set_train_info(frame, algo):
        env.state["level"] += np.float32(0.5)
        env.state["range"] += 1.0

    env.set_train_info = set_train_info
    return env


class NumpyObserver(train_ppo.AlgoObserver):
    loaded = None

    def state_dict(self):
        return {"number": np.int64(3), "array": np.arange(2)}

    def load_state_dict(self, state):
        self.loaded = state


def test_numpy_in_the_state_of_env_and_observer_continues(here, capsys):
    """A checkpoint holds no numpy objects, which it could not be read with, but their values."""
    env = ["--env-id", f"{__name__}:numpy_env"]
    main([*env, *SMALL, "--experiment", "r"], observers=[NumpyObserver()])
    observer = NumpyObserver()
    main([*env, "--checkpoint", "runs/r", "--max-epochs", "5"], observers=[observer])
    assert observer.loaded["number"] == 3 and list(observer.loaded["array"]) == [0, 1]
    assert "warning" not in capsys.readouterr().err
    state = load_checkpoint("runs/r/nn/epoch_2.pth")["env_state"]
    assert state["level"] == 1.5 and list(state["range"]) == [3.0, 4.0]


def strange_env(num_envs, device, seed):
    return Env(num_envs, device, seed, get_env_state=lambda: {"path": Path("x")})


def test_state_that_a_checkpoint_cannot_hold_is_named(here, capsys):
    """It would be written, and could not be read again: the run would be lost at its end."""
    with pytest.raises(SystemExit) as stopped:
        main(["--env-id", f"{__name__}:strange_env", *SMALL, "--experiment", "r"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code in (1, 2) and error.startswith("error: ") and "Path" in error
    assert os.listdir("runs/r/nn") == []


def test_kill_dash_nine_at_any_moment_loses_nothing(here):
    """Killed at random moments and continued KILLS (default 15) times, a run ends as if it had not.

    Compared to the last bit. Each fsync takes longer, so that many kills fall into a save.
    """
    kills = int(os.environ.get("KILLS", "15"))
    rng = random.Random(0)
    flags = ["--num-envs", "16", "--num-steps", "8", "--update-epochs", "1"]
    flags += ["--games-to-track", "9", "--save-best-after", "1", "--save-frequency", "1"]
    flags += ["--max-epochs", str(6 * kills)]
    straight = started([*flags, "--experiment", "straight"])
    arguments = [*flags, "--experiment", "killed"]
    nn = Path("runs/killed/nn")
    in_a_save = 0
    for _ in range(kills):
        before = len(list(nn.glob("epoch_*.pth")))
        process = started(arguments, {"SLOW_FSYNC": "0.01"})
        # It goes on, if not by much, before it is killed.
        wait_for(lambda before=before: len(list(nn.glob("epoch_*.pth"))) > before, process)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was over before it could be killed"
        in_a_save += bool(list(nn.glob("*.tmp")))
        arguments = ["--checkpoint", "runs/killed"]
    last = started(arguments)
    for process in (straight, last):
        process.join(100)
        assert process.exitcode == 0
    print(f"{kills} kills survived, {in_a_save} of them inside a save")
    assert in_a_save > 0 and not list(nn.glob("*.tmp")), "what was left half written is removed"
    assert same_state("runs/straight/nn/last.pth", nn / "last.pth") == []
    # Epochs that ran twice are there twice, with the same values.
    straight, killed = scalars("runs/straight"), scalars("runs/killed")
    for tag in ("info/epochs", "losses/a_loss", "rewards/iter"):
        assert set(straight[tag]) == set(killed[tag])


def test_damaged_checkpoints_are_refused_or_load_the_same(small_run, here):
    """300 random flips of a bit and truncations: one line, or identical content.

    So does every flip in the directory of the archive's first two parts, where the checksums are.
    """
    rng = random.Random(0)
    good = (small_run / "runs/r/nn/last.pth").read_bytes()
    reference = load_checkpoint(str(small_run / "runs/r/nn/last.pth"))
    refused_ones = 0
    directory = zipfile.ZipFile(io.BytesIO(good)).start_dir
    flips = [(directory + n // 8, n % 8) for n in range(8 * 120)]
    for i in range(300 + len(flips)):
        damaged = bytearray(good)
        if i >= 300:
            place, bit = flips[i - 300]
            damaged[place] ^= 1 << bit
        elif i % 3:
            damaged[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(good)) :]
        Path("damaged.pth").write_bytes(damaged)
        try:
            assert differences(reference, load_checkpoint("damaged.pth")) == []
        except train_ppo.UserError as exc:
            assert "damaged.pth" in str(exc) and "\n" not in str(exc)
            refused_ones += 1
    assert refused_ones > 200


def limited_main(size, arguments, connection):
    """Target of a process whose files cannot grow beyond `size` bytes: sends (code, stderr)."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    output = io.StringIO()
    code = 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(output):
        try:
            main(arguments)
        except SystemExit as exit:
            code = exit.code
    connection.send((code, output.getvalue()))


def with_limit(size, *arguments):
    ours, theirs = multiprocessing.Pipe()
    process = forkserver().Process(target=limited_main, args=(size, arguments, theirs))
    process.start()
    assert ours.poll(100)
    process.join()
    return ours.recv()


def test_full_disk(here):
    """Files smaller than a checkpoint: training goes on, the end is loud, and old files stay."""
    main(["--units", "256", "256", *SMALL, "--experiment", "r", "--max-epochs", "2"])
    before = snapshot("runs/r/nn")
    code, err = with_limit(300000, "--checkpoint", "runs/r", "--max-epochs", "9")
    *warnings, error = err.splitlines()
    assert code == 1 and error.startswith("error: ")
    for epoch, warning in zip((4, 6, 8), warnings):
        what = f"epoch_{epoch}.pth cannot be written (File too large); the next save will try again"
        assert warning.startswith("warning: ") and what in warning
    assert len(warnings) == 3
    assert "runs/r/nn/last.pth cannot be written (File too large): epoch 9" in error
    assert snapshot("runs/r/nn") == before
    main(["--checkpoint", "runs/r", "--max-epochs", "4"])

    code, err = with_limit(0, *SMALL, "--experiment", "new")
    assert code == 2 and err.startswith("error: runs/new cannot be trained in: File too large")
    assert err.count("\n") == 1


def test_folder_that_cannot_be_written(here, monkeypatch, capsys):
    """A read-only folder or a used-up quota, which root does not feel: the system call fails."""
    main([*SMALL, "--experiment", "r", "--max-epochs", "2"])
    before = snapshot("runs/r/nn")
    reasons = {errno.EROFS: "Read-only file system", errno.EDQUOT: "quota exceeded"}
    for number, reason in reasons.items():

        def refuse(path, mode="r", *, number=number):
            if str(path).endswith(".tmp"):
                raise OSError(number, os.strerror(number))
            return open(path, mode)

        capsys.readouterr()
        with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
            patched.setattr(train_ppo, "open", refuse, raising=False)
            main(["--checkpoint", "runs/r", "--max-epochs", "5"])
        err = capsys.readouterr().err
        assert stopped.value.code == 1 and err.count("warning:") == 1
        assert reason in err and "epoch 5 is not on disk" in err
        assert snapshot("runs/r/nn") == before
    os.remove("runs/r/.lock")
    os.mkdir("runs/r/.lock")  # opening it fails, as in the folder of another user
    with pytest.raises(SystemExit) as stopped:
        main(["--checkpoint", "runs/r", "--max-epochs", "5"])
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert err.startswith("error: runs/r") and err.count("\n") == 1
    assert "cannot be trained in: Is a directory" in err


def test_file_system_without_locks(here, monkeypatch):
    """Training goes on: two processes in one folder can then not be told apart."""
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    main([*SMALL, "--experiment", "r"])
    main(["--checkpoint", "runs/r", "--max-epochs", "5"])
    assert load_checkpoint("runs/r/nn/last.pth")["epoch"] == 5


def test_lock_that_is_a_link_is_not_followed(here, capsys):
    """Else continuing in a folder that somebody else made would empty a file of one's own."""
    main([*SMALL, "--experiment", "r"])
    Path("precious").write_text("precious")
    os.remove("runs/r/.lock")
    os.symlink(os.path.abspath("precious"), "runs/r/.lock")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["--checkpoint", "runs/r", "--max-epochs", "5"])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert Path("precious").read_text() == "precious"


def test_two_processes_never_share_a_run(here, capsys):
    """Started at once under one name they get two folders. A folder in use is refused."""
    flags = ["--num-envs", "64", "--max-epochs", "1500", "--experiment", "r"]
    both = [started([*flags, "--save-frequency", "1"]) for _ in range(2)]
    try:
        for process, name in zip(both, ("r", "r_2")):
            wait_for(Path(f"runs/{name}/nn/epoch_2.pth").exists, process)
        config = Path("runs/r/config.json").read_text()
        with pytest.raises(SystemExit) as stopped:
            main(["--checkpoint", "runs/r"])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1
        assert error.startswith("error: runs/r is being trained by another process")
        assert Path("runs/r/config.json").read_text() == config
        for process in both:
            os.kill(process.pid, signal.SIGTERM)
        for process in both:
            process.join(60)
            assert process.exitcode == 128 + signal.SIGTERM
    finally:
        for process in both:
            process.kill()
    assert sorted(os.listdir("runs")) == ["r", "r_2"]


def nan_env(num_envs, device, seed):
    """What goes bad at step 60 or 65, in three envs, is named in the environment variable BAD."""
    env = Env(num_envs, device, seed)
    step = env.step
    count = [0]
    last = {60: "observations", 65: "observations after the last step"}

    def bad(actions):
        obs, reward, done, infos = step(actions)
        count[0] += 1  # the check of the contract was the first step
        if os.environ["BAD"] == last.get(count[0]):
            obs["obs"][2:5, 1] = math.nan
        if count[0] == 60 and os.environ["BAD"] == "rewards":
            reward[2:5] = math.inf
        if count[0] == 65 and os.environ["BAD"] == "a_loss":
            # A finite number, with which the ratio is not finite. The rollout is over.
            env.agent.model.a2c_network.sigma.data[:] = -120.0
        return obs, reward, done, infos

    env.step = bad
    env.set_train_info = lambda frame, agent: setattr(env, "agent", agent)
    return env


@pytest.mark.parametrize(
    "what", ["observations", "observations after the last step", "rewards", "a_loss"]
)
def test_bad_numbers_stop_training_and_spoil_nothing(here, monkeypatch, capsys, what):
    """One line says what is bad, where; no checkpoint has it, and the run can be continued."""
    monkeypatch.setenv("BAD", what)
    env = ["--env-id", f"{__name__}:nan_env"]
    with pytest.raises(SystemExit) as stopped:
        flags = ["--max-epochs", "100", "--save-best-after", "1", "--experiment", "r"]
        main([*env, *SMALL, *flags])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 1 and error.endswith("epoch 8")
    messages = {
        "observations": "NaN or Inf in obs of 3 of 32 envs at step 4 of the rollout",
        "observations after the last step": "NaN or Inf in obs of 3 of 32 envs at step 9",
        "rewards": "NaN or Inf in rewards of 3 of 32 envs at step 3 of the rollout",
        "a_loss": "NaN or Inf in the a_loss of the update",
    }
    assert error.startswith(f"error: {messages[what]}")
    for path in Path("runs/r/nn").iterdir():
        state = load_checkpoint(str(path))
        assert state["epoch"] < 8
        assert all(torch.isfinite(weight).all() for weight in state["model"].values())
    monkeypatch.setenv("BAD", "")
    main([*env, "--checkpoint", "runs/r", "--max-epochs", "9"])
    assert load_checkpoint("runs/r/nn/last.pth")["epoch"] == 9


def mortal_env(num_envs, device, seed):
    """Its step number MORTAL raises; step 30 is in epoch 4. So does its close()."""
    env = Env(num_envs, device, seed)
    step = env.step
    count = [0]

    def counted(actions):
        count[0] += 1
        if count[0] == int(os.environ["MORTAL"]):
            raise ValueError("the simulator died")
        return step(actions)

    def close():
        raise KeyError("already dead")

    env.step = counted
    env.close = close
    return env


def test_env_that_raises_loses_nothing_that_was_learned(here, monkeypatch, capsys):
    """Its own exception is the one to see, last.pth has the last whole epoch, and it goes on."""
    monkeypatch.setenv("MORTAL", "30")
    env = ["--env-id", f"{__name__}:mortal_env"]
    flags = ["--experiment", "r", "--max-epochs", "5", "--save-frequency", "3"]
    with pytest.raises(ValueError, match="the simulator died"):
        main([*env, *SMALL, *flags])
    err = capsys.readouterr().err
    assert err.count("warning: ") == 1 and "close() raised KeyError" in err
    assert sorted(os.listdir("runs/r/nn")) == ["epoch_3.pth", "last.pth"]
    before, after = [load_checkpoint(f"runs/r/nn/{name}.pth") for name in ("epoch_3", "last")]
    for key in ("epoch", "frame", "model", "optimizer"):
        assert differences(before[key], after[key]) == []
    monkeypatch.setenv("MORTAL", "0")
    main([*env, "--checkpoint", "runs/r"])
    assert load_checkpoint("runs/r/nn/last.pth")["epoch"] == 5


def test_update_that_raises_leaves_the_older_files(here, monkeypatch):
    """Weights of half an update are in no checkpoint."""
    policy_kl = train_ppo.policy_kl
    calls = []

    def mortal_kl(*arguments):
        calls.append(1)
        if len(calls) == 3 * 8 + 5:  # in the fourth epoch
            raise MemoryError("no memory left")
        return policy_kl(*arguments)

    monkeypatch.setattr(train_ppo, "policy_kl", mortal_kl)
    with pytest.raises(MemoryError):
        main([*SMALL, "--experiment", "r"])
    assert os.listdir("runs/r/nn") == ["epoch_2.pth"]


class Broken(train_ppo.AlgoObserver):
    """Raises in the hook that it is made with."""

    def __init__(self, hook):
        def fail(*args):
            raise ZeroDivisionError("oops")

        setattr(self, hook, fail)


HOOKS = [
    "before_init",
    "after_init",
    "process_infos",
    "after_steps",
    "after_print_stats",
    "close",
    "state_dict",
]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_failing_observer_is_left_out(here, capsys, hook):
    """With a warning that names it; the others go on. With --strict-observers it ends training."""
    flags = [*SMALL, "--max-epochs", "2", "--experiment"]
    other = Counter(1)
    main([*flags, "r"], observers=[Broken(hook), other])
    error = capsys.readouterr().err
    assert error.count("warning: ") == 1 and "Traceback" in error
    assert f"Broken.{hook} raised ZeroDivisionError('oops')" in error
    assert other.count == 3 and len(scalars("runs/r")["info/kl"]) == 2
    assert load_checkpoint("runs/r/nn/last.pth")["epoch"] == 2
    with pytest.raises((ZeroDivisionError, SystemExit)):
        main([*flags, "strict", "--strict-observers"], observers=[Broken(hook)])


def test_observer_that_cannot_continue_is_left_out(here, capsys):
    """The others get their states all the same."""

    def fail(self, state):
        raise ZeroDivisionError("oops")

    broken = type("Counter", (Counter,), {"load_state_dict": fail})  # of the name that is saved
    main([*SMALL, "--experiment", "r"], observers=[Counter(10), Counter(20)])
    observers = [broken(1), Counter(1)]
    capsys.readouterr()
    main(["--checkpoint", "runs/r", "--max-epochs", "5"], observers=observers)
    error = capsys.readouterr().err
    assert error.count("warning: ") == 1
    assert "Counter.load_state_dict raised ZeroDivisionError('oops')" in error
    assert [observer.count for observer in observers] == [1, 25]


class FillsTheDisk(train_ppo.AlgoObserver):
    """Lets the writing of events fail once, in TensorBoard's own thread, as a full disk does."""

    def after_steps(self):
        if self.algo.epoch_num == 1:
            writer = self.algo.writer.file_writer.event_writer._async_writer._writer
            write = writer.write

            def fail(data):
                writer.write = write
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            writer.write = fail


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_failing_tensorboard_writer_costs_the_curve_and_nothing_else(here, capsys):
    """One warning; checkpoints are written all the same, though TensorBoard never recovers."""
    flags = [*SMALL, "--experiment", "r", "--save-frequency", "1"]
    main(flags, observers=[FillsTheDisk()])
    error = capsys.readouterr().err
    assert error.count("warning: ") == 1
    assert "TensorBoard's events cannot be written" in error and "No space left" in error
    epochs = [load_checkpoint(f"runs/r/nn/epoch_{n}.pth")["epoch"] for n in (1, 2, 3, 4)]
    assert epochs == [1, 2, 3, 4]
    assert load_checkpoint("runs/r/nn/last.pth")["epoch"] == 4


# -------------------------------------------------------------------------------- several processes


def spying_env(num_envs, device, seed):
    """Cartpole that notes what each process has at the start of each epoch, and makes trouble."""
    env = Cartpole(num_envs, torch.device(device))
    trouble = os.environ.get("TROUBLE", "")

    def set_train_info(frame, algo):
        weights = sum(value.double().abs().sum() for value in algo.model.state_dict().values())
        row = (algo.epoch_num, seed, frame, algo.lr, weights, env.state.double().sum())
        env.epoch = algo.epoch_num
        with open(f"rank{train_ppo.RANK}.txt", "a") as file:
            file.write(" ".join(repr(float(x)) for x in row) + "\n")
        if algo.epoch_num == 4 and train_ppo.RANK == 1:
            if trouble == "nan":
                env.state[2, 3] = math.nan
            elif trouble:
                os.kill(os.getpid(), getattr(signal, trouble))

    env.epoch = 0
    step = env.step

    def reporting_step(actions):
        obs, reward, done, infos = step(actions)
        infos[f"only_{train_ppo.RANK}"] = 1.0
        infos["counted"] = float(env.epoch)
        return obs, reward, done, {**infos, "rank": float(train_ppo.RANK)}

    env.step = reporting_step
    env.set_train_info = set_train_info
    return env


def processes(n, *arguments, trouble=""):
    """Start n processes as torchrun does; [(exit code, stdout, stderr), ...]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--env-id", f"{__name__}:spying_env", "--num-envs", "16", "--save-frequency", "100"]
    base = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n)}
    base["TROUBLE"] = trouble
    all_of_them = []
    for rank in range(n):
        environ = {**base, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        all_of_them.append(started([*flags, *arguments], environ, reload=True))
    results = []
    for process in all_of_them:
        process.join(100)
        process.kill()
        process.join()
        results.append((process.exitcode, *process.output()))
    return results


def noted(rank):
    """The rows that spying_env has written: epoch, seed, frame, learning rate, weights, state."""
    path = Path(f"rank{rank}.txt")
    rows = [[float(x) for x in line.split()] for line in path.read_text().splitlines()]
    path.unlink()
    return rows


def weights_of(path):
    return sum(float(w.double().abs().sum()) for w in load_checkpoint(path)["model"].values())


def test_processes_train_one_policy_stop_together_and_continue(here):
    """Weights and learning rate are equal in both after every epoch; envs and seeds are not.

    A signal to one of them stops both after the same epoch. Two processes, or another number, go
    on from the weights.
    """
    results = processes(2, "--max-epochs", "9", "--experiment", "r", trouble="SIGTERM")
    (code, out, err), (other_code, other_out, other_err) = results
    assert (code, other_code) == (143, 143), err + other_err
    assert "2 x 16 envs" in out and "torchrun --nproc-per-node=2" in out
    assert (other_out, other_err) == ("", ""), "rank 0 alone speaks"
    first, second = noted(0), noted(1)
    assert [row[0] for row in first] == [1, 2, 3, 4]
    assert first[-1][2] == 3 * 2 * 16 * 16, "the frames of both"
    assert [row[3:5] for row in first] == [row[3:5] for row in second]
    assert len({row[4] for row in first}) == 4, "the weights move"
    assert first[0][1] + 1 == second[0][1], "each has a seed of its own"
    assert all(a[5] != b[5] for a, b in zip(first[1:], second[1:]))
    assert os.listdir("runs") == ["r"]
    assert load_checkpoint("runs/r/nn/last.pth")["epoch"] == 4
    curves = scalars("runs/r")
    assert [value for _, value in curves["rank/iter"]] == [0.5] * 4, "the mean of all processes"
    assert [value for _, value in curves["only_1/iter"]] == [1.0] * 4
    assert [value for _, value in curves["counted/iter"]] == [1.0, 2.0, 3.0, 4.0]

    for n, epochs in ((2, 6), (1, 7), (3, 8)):
        before = load_checkpoint("runs/r/nn/last.pth")
        weights = weights_of("runs/r/nn/last.pth")
        results = processes(n, "--checkpoint", "runs/r", "--max-epochs", str(epochs))
        assert [code for code, _, _ in results] == [0] * n, results
        after = load_checkpoint("runs/r/nn/last.pth")
        assert after["epoch"] == epochs
        assert after["frame"] == before["frame"] + (epochs - before["epoch"]) * n * 16 * 16
        for rank in range(n):
            row = noted(rank)[0]
            assert row[0] == before["epoch"] + 1 and row[4] == pytest.approx(weights, rel=1e-12)
            assert row[3] == pytest.approx(before["optimizer"]["param_groups"][0]["lr"])
        if n > 1:
            assert "the env starts new episodes" in results[0][1]


def test_a_process_that_dies_or_goes_bad_ends_the_others(here):
    """Each says so in one line, and no checkpoint has bad numbers."""
    flags = ["--max-epochs", "1000", "--experiment"]
    (code, _, err), (killed, _, _) = processes(2, *flags, "r", trouble="SIGKILL")
    assert (code, killed) == (1, -9)
    assert err == "error: another process has ended, so number 0 stops too\n"
    (code, _, err), (other_code, _, other_err) = processes(2, *flags, "bad", trouble="nan")
    assert (code, other_code) == (1, 1)
    assert err == "error: NaN or Inf in another process, so number 0 stops too\n"
    assert other_err.count("\n") == 1
    assert "error: NaN or Inf in rewards of 1 of 16 envs at step 1 of the rollout" in other_err
    assert os.listdir("runs/bad/nn") == ["last.pth"]
    state = load_checkpoint("runs/bad/nn/last.pth")
    assert state["epoch"] == 3, "what was learned before is there"
    assert all(torch.isfinite(weight).all() for weight in state["model"].values())


def test_a_users_mistake_in_several_processes_is_one_line(here):
    """Rank 0 says it. The others are silent, or end with it if it alone can find the mistake."""
    results = processes(2, "--num-envs", "0")
    assert [code for code, _, _ in results] == [2, 2], results
    assert results[0][2].startswith("error: --num-envs") and results[0][2].count("\n") == 1
    assert results[1][2] == ""

    results = processes(2, "--train-dir", "/proc/x")
    assert [code for code, _, _ in results] == [2, 1], results
    assert results[0][2].startswith("error: /proc/x") and results[0][2].count("\n") == 1
    assert results[1][2] == "error: another process has ended, so number 1 stops too\n"


def test_torchrun_learns_like_one_process(here):
    """Two processes with half of the default's environments each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", SCRIPT]
    done = subprocess.run(
        [*command, "--num-envs", "256", "--max-epochs", "40", "--experiment", "r"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    assert dict(scalars("runs/r")["rewards/iter"])[40] > 150


def test_two_nodes_train_one_policy(here):
    """Two torchrun agents on loopback, of one process each. The printed command names the nodes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def node(rank):
        agent = ["-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}"]
        agent += ["--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}", SCRIPT]
        return shell(*SMALL, "--experiment", "r", cwd=here, script=agent)

    outputs = at_once(node, [0, 1])
    assert "2 x 32 envs" in outputs[0][0] and "train" not in outputs[1][0]
    assert "torchrun --nproc-per-node=1 --nnodes=2 ... " in outputs[0][0]
    assert load_checkpoint("runs/r/nn/last.pth")["frame"] == 4 * 2 * 32 * 8


# ----------------------------------------------------------------------------- real habits


def bash(line, cwd, code=None, timeout=120):
    """Run a line in bash, with $PPO as the command; (exit code, output of both streams)."""
    environment = {**os.environ, "PPO": f"{sys.executable} {SCRIPT}", "PYTHONPATH": str(cwd)}
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=str(cwd),
        env=environment,
        timeout=timeout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
    )
    assert code is None or done.returncode == code, done.stdout
    return done.returncode, done.stdout


QUICK = "--num-envs 16 --num-steps 8 --max-epochs 6 --save-frequency 0"


@pytest.mark.parametrize(
    "line",
    [
        "$PPO {} | head -1; exit ${{PIPESTATUS[0]}}",
        "$PPO {} > /dev/full 2>&1",
        "$PPO {} >&-",
        "$PPO {} >&- 2>&-",
        "PYTHONIOENCODING=latin-1 $PPO {} --train-dir 'ra\u0142'",
        "LC_ALL=C $PPO {} --train-dir 'ra\u0142'",
    ],
)
def test_a_terminal_that_is_gone_does_not_end_training(tmp_path, line):
    """What cannot be printed is dropped: training goes on, saves, and keeps its exit code."""
    if "/dev/full" in line and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    _, out = bash(line.format(QUICK), tmp_path, code=0)
    assert "Traceback" not in out and "Exception ignored" not in out, out
    (last,) = tmp_path.glob("*/*/nn/last.pth")
    assert load_checkpoint(str(last))["epoch"] == 6


def test_help_into_head_is_quiet(tmp_path):
    _, out = bash("$PPO --help | head -1; exit ${PIPESTATUS[0]}", tmp_path)
    assert "Traceback" not in out and "Exception ignored" not in out, out


def test_ctrl_c_under_tee_saves(tmp_path):
    """The shell signals both, and tee is gone before the handler prints."""
    line = "$PPO --num-envs 16 --max-epochs 100000 --experiment r --save-frequency 0 | tee log"
    process = subprocess.Popen(
        ["bash", "-c", line],
        cwd=str(tmp_path),
        env={**os.environ, "PPO": f"{sys.executable} {SCRIPT}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        universal_newlines=True,
    )
    log = tmp_path / "log"
    while not (log.exists() and "epoch 5/" in log.read_text()):
        time.sleep(0.05)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    last = tmp_path / "runs/r/nn/last.pth"
    for _ in range(100):  # bash may end before its pipeline does
        if last.exists():
            break
        time.sleep(0.1)
    assert load_checkpoint(str(last))["epoch"] >= 5
    assert "Traceback" not in err, err


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_other_stop_signals_save_too(tmp_path, name):
    """An ssh line that drops, and SLURM's --signal. Under nohup SIGHUP is ignored."""
    command = [sys.executable, SCRIPT, "--num-envs", "16", "--max-epochs", "100000"]
    command += ["--experiment", "r", "--save-frequency", "0"]
    process = subprocess.Popen(
        command, cwd=str(tmp_path), stdout=subprocess.PIPE, universal_newlines=True
    )
    assert any(line.startswith("epoch 5/") for line in process.stdout)
    process.send_signal(getattr(signal, name))
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name)
    assert name in out and load_checkpoint(str(tmp_path / "runs/r/nn/last.pth"))["epoch"] >= 5


def test_nohup_ignores_sighup(tmp_path):
    line = (
        f"nohup $PPO {QUICK} --experiment r --max-epochs 60 > log & "
        "pid=$!; until grep -q 'epoch 2/' log; do sleep 0.05; done; kill -HUP $pid; wait $pid"
    )
    bash(line, tmp_path, code=0)
    assert load_checkpoint(str(tmp_path / "runs/r/nn/last.pth"))["epoch"] == 60


def dying_env(num_envs, device, seed):
    """The simulator dies in its 60th step, in epoch 8."""
    env = Env(num_envs, device, seed)
    step, count = env.step, [0]

    def stepped(actions):
        count[0] += 1
        if count[0] == 60:
            raise RuntimeError("PhysX has died")
        return step(actions)

    env.step = stepped
    return env


def test_a_simulator_that_dies_costs_one_epoch(here):
    """last.pth is that of the last complete epoch; the traceback is shown; the exit code is 1."""
    flags = ["--env-id", f"{__name__}:dying_env", "--num-envs", "16", "--num-steps", "8"]
    shell_path = {"PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{HERE}"}
    command = [*flags, "--max-epochs", "50", "--save-frequency", "0", "--experiment", "r"]
    _, err = shell(*command, cwd=here, env=shell_path, code=1)
    assert "PhysX has died" in err and "Traceback" in err
    state = load_checkpoint("runs/r/nn/last.pth")
    assert (state["epoch"], state["frame"]) == (7, 7 * 128)
    shell(*flags, "--checkpoint", "runs/r", "--max-epochs", "9", cwd=here, env=shell_path)
    assert load_checkpoint("runs/r/nn/last.pth")["epoch"] == 9


class FailsInEpoch4(train_ppo.AlgoObserver):
    def after_print_stats(self, frame, epoch_num, total_time):
        if epoch_num == 4:
            raise ZeroDivisionError("oops")


def test_a_strict_observer_that_raises_loses_nothing(here):
    flags = [*SMALL, "--max-epochs", "9", "--save-frequency", "0", "--experiment", "r"]
    with pytest.raises(ZeroDivisionError):
        main([*flags, "--strict-observers"], observers=[FailsInEpoch4()])
    assert load_checkpoint("runs/r/nn/last.pth")["epoch"] == 4


def unclosable_env(num_envs, device, seed):
    env = Env(num_envs, device, seed)

    def close():
        raise RuntimeError("cannot close")

    env.close = close
    return env


def test_an_env_that_cannot_be_closed_changes_nothing(here, capsys):
    main(["--env-id", f"{__name__}:unclosable_env", *SMALL, "--experiment", "r"])
    assert load_checkpoint("runs/r/nn/last.pth")["epoch"] == 4
    assert "cannot close" in capsys.readouterr().err


def test_a_checkpoint_chooses_no_code(here, capsys):
    """A stranger's file names a module: it is not imported, nor are its folders used."""
    main([*SMALL, "--experiment", "r"])
    state = torch.load("runs/r/nn/last.pth", weights_only=True)
    Path("evil.py").write_text("open('imported', 'w').close()")
    bad = {"env_id": "evil:make", "train_dir": "elsewhere", "torch_threads": 3, "device": "cuda:9"}
    torch.save({**state, "args": {**state["args"], **bad}}, "stranger.pth")
    for flags in (["--play"], ["--max-epochs", "9"]):
        with pytest.raises(SystemExit) as stopped:
            main([*flags, "--checkpoint", "stranger.pth"])
        assert stopped.value.code == 2
        assert "repeat its flag, --env-id evil:make" in capsys.readouterr().err
    assert not os.path.exists("imported")
    args, *_ = train_ppo.parse_args(["--env-id", "mine:make", "--checkpoint", "stranger.pth"])
    assert (args.env_id, args.train_dir, args.device) == ("mine:make", "runs", "auto")
    assert args.torch_threads == Args().torch_threads


def test_links_in_a_shared_folder_are_not_followed(here, capsys):
    main([*SMALL, "--experiment", "r", "--max-epochs", "2"])
    Path("precious").write_text("keep me")
    os.remove("runs/r/.lock")
    os.symlink("../../precious", "runs/r/.lock")
    with pytest.raises(SystemExit) as stopped:
        main(["--checkpoint", "runs/r", "--max-epochs", "3"])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert Path("precious").read_text() == "keep me"

    main([*SMALL, "--experiment", "q", "--max-epochs", "2"])
    os.mkdir("runs/q/nn/x.pth.1.tmp")
    Path("runs/q/nn/notes.tmp").write_text("mine")
    Path("runs/q/nn/last.pth.77.tmp").write_text("half a file")
    main(["--checkpoint", "runs/q", "--max-epochs", "3"])
    assert Path("runs/q/nn/notes.tmp").read_text() == "mine"
    assert not os.path.exists("runs/q/nn/last.pth.77.tmp"), "what a killed process left is gone"


def state_env(num_envs, device, seed):
    """get_env_state holds what STATE names."""
    import collections
    import enum

    level = enum.IntEnum("Level", "EASY HARD")
    odd = {"enum": level.HARD, "deque": collections.deque([1])}
    env = Env(num_envs, device, seed)
    env.get_env_state = lambda: {"value": odd[os.environ["STATE"]]}
    return env


@pytest.mark.parametrize("what", ["enum", "deque"])
def test_state_that_cannot_come_back_is_found_before_the_first_epoch(
    here, monkeypatch, capsys, what
):
    monkeypatch.setenv("STATE", what)
    with pytest.raises(SystemExit) as stopped:
        main(["--env-id", f"{__name__}:state_env", *SMALL])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and err.count("\n") == 1 and "epoch 1/" not in out
    assert err.startswith("error: ") and "get_env_state()" in err


@pytest.mark.parametrize("damage", ["zeros", "random"])
def test_a_damaged_event_file_does_not_keep_a_run_from_continuing(here, damage):
    """As after a power cut: the tail is zeros, or anything."""
    main([*SMALL, "--experiment", "r", "--max-epochs", "3"])
    (path,) = Path("runs/r/summaries").glob("events*")
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    tail = bytes(500) if damage == "zeros" else rng.integers(0, 256, 500, np.uint8).tobytes()
    path.write_bytes(content[:-500] + tail)
    main(["--checkpoint", "runs/r", "--max-epochs", "5"])
    assert load_checkpoint("runs/r/nn/last.pth")["epoch"] == 5


def staggered_env(num_envs, device, seed):
    """Episodes of 20 steps, begun at different times before play starts; reward 1 a step."""
    env = Env(num_envs, device, seed)
    env.t = torch.arange(num_envs) % 20
    step = env.step

    def stepped(actions):
        obs, reward, done, infos = step(actions)
        return obs, torch.ones_like(reward), done, infos

    env.step = stepped
    return env


def endless_env(num_envs, device, seed):
    lengths = torch.full((num_envs,), 10**9)
    return Env(num_envs, device, seed, lengths=lengths, max_episode_length=50)


def test_play_counts_whole_episodes_only(here, capsys):
    flags = ["--env-id", f"{__name__}:staggered_env"]
    main([*flags, *SMALL, "--experiment", "r", "--max-epochs", "1"])
    capsys.readouterr()
    main([*flags, "--play", "--checkpoint", "runs/r"])
    out = capsys.readouterr().out
    assert "reward mean 20.00 std 0.00" in out and "32 episodes" in out
    flags = ["--env-id", f"{__name__}:endless_env"]
    main([*flags, *SMALL, "--experiment", "endless", "--max-epochs", "1"])
    with pytest.raises(SystemExit):
        main([*flags, "--play", "--checkpoint", "runs/endless"])
    assert "no episode ended in 200 steps" in capsys.readouterr().err


def cost_env(num_envs, device, seed):
    """Rewards are costs, and a few episodes are short: the first to end are the best."""
    lengths = torch.full((num_envs,), 40)
    lengths[:8] = 5
    env = Env(num_envs, device, seed, lengths=lengths, max_episode_length=40)
    step = env.step

    def stepped(actions):
        obs, reward, done, infos = step(actions)
        return obs, -torch.ones_like(reward), done, infos

    env.step = stepped
    return env


def test_a_close_that_hangs_ends_with_the_usual_code(here):
    """All is saved by then. One line says so."""
    Path("my_env.py").write_text(
        f"""
import signal, sys, threading, time
sys.path.insert(0, {str(HERE)!r})
import train_ppo
from train_ppo import Cartpole
train_ppo.CLOSE_PATIENCE = 1.0
class Mine(Cartpole):
    def set_train_info(self, frame, algo):
        if algo.epoch_num == 3:
            signal.raise_signal(signal.SIGTERM)
    def close(self):
        time.sleep(600)
def make(num_envs, device, seed):
    return Mine(num_envs, device)
"""
    )
    flags = [*SMALL, "--env-id", "my_env:make", "--experiment", "r", "--max-epochs", "9"]
    _, err = forked(*flags, cwd=here, code=143, timeout=60)
    assert err == "warning: the env's close() does not return, so the program ends without it\n"
    assert load_checkpoint("runs/r/nn/last.pth")["epoch"] == 3


@pytest.mark.parametrize("how", ["sys.exit(0)", "raise BrokenPipeError('worker')"])
def test_a_simulator_that_exits_costs_one_epoch(how, here):
    """A viewer whose window is closed calls sys.exit; a dead worker leaves a broken pipe."""
    Path("my_env.py").write_text(
        f"""
import sys
from train_ppo import Cartpole
class Mine(Cartpole):
    def set_train_info(self, frame, algo):
        if algo.epoch_num == 3:
            {how}
def make(num_envs, device, seed):
    return Mine(num_envs, device)
"""
    )
    flags = [*SMALL, "--env-id", "my_env:make", "--experiment", "r", "--max-epochs", "9"]
    code = 0 if "exit" in how else 1
    _, err = forked(*flags, cwd=here, code=code)
    assert ("BrokenPipeError: worker" in err) == (code == 1)
    assert load_checkpoint("runs/r/nn/last.pth")["epoch"] == 2


@pytest.mark.parametrize("key", ["np.int64(3)", "Level.ONE"])
def test_state_with_odd_keys_can_be_loaded_or_is_refused(key, here):
    """numpy's keys become Python's; others are said before the first epoch."""
    Path("my_env.py").write_text(
        f"""
import enum
import numpy as np
from train_ppo import Cartpole
class Level(enum.IntEnum):
    ONE = 1
class Mine(Cartpole):
    exact_state = False
    def get_env_state(self):
        return {{{key}: 0.5}}
    def set_env_state(self, state):
        pass
def make(num_envs, device, seed):
    return Mine(num_envs, device)
"""
    )
    flags = [*SMALL, "--env-id", "my_env:make", "--experiment", "r"]
    _, err = forked(*flags, cwd=here, code=0 if "np" in key else 2)
    if "np" in key:
        assert load_checkpoint("runs/r/nn/last.pth")["env_state"] == {3: 0.5}
    else:
        assert "a checkpoint cannot hold a Level" in err and err.count("\n") == 1


def test_infinite_statistics_reach_no_checkpoint(here):
    """One reward of 1e30 would make the variance of the returns infinite for good."""
    Path("my_env.py").write_text(
        """
from train_ppo import Cartpole
class Mine(Cartpole):
    def step(self, actions):
        obs, reward, done, infos = super().step(actions)
        if self.progress.float().mean() > 10:
            reward = reward + 1e30
        return obs, reward, done, infos
def make(num_envs, device, seed):
    return Mine(num_envs, device)
"""
    )
    flags = [*SMALL, "--env-id", "my_env:make", "--experiment", "r", "--max-epochs", "9"]
    _, err = forked(*flags, cwd=here, code=1)
    assert err.startswith("error: NaN or Inf in ") and err.count("\n") == 1
    state = load_checkpoint("runs/r/nn/last.pth") if Path("runs/r/nn/last.pth").exists() else {}
    assert all(torch.isfinite(value).all() for value in state.get("model", {}).values())


def test_an_error_inside_the_users_module_is_shown_as_it_is(here):
    """A traceback belongs to the user there. What the module inserts into sys.path stays."""
    Path("broken.py").write_text("import math\nmath.no_such_thing\ndef make(**_): pass\n")
    _, err = forked("--env-id", "broken:make", cwd=here, code=1)
    assert "AttributeError: module 'math' has no attribute 'no_such_thing'" in err
    os.mkdir("helpers")
    Path("helpers/my_helper.py").write_text("from train_ppo import Cartpole\n")
    Path("my_env.py").write_text(
        """
import sys
sys.path.insert(0, "helpers")
def make(num_envs, device, seed):
    import my_helper
    return my_helper.Cartpole(num_envs, device)
"""
    )
    forked(*SMALL, "--env-id", "my_env:make", "--experiment", "r", cwd=here)
    os.symlink("nowhere", "dangling")
    _, err = forked(*SMALL, "--train-dir", "dangling", cwd=here, code=2)
    assert err.startswith("error: dangling cannot be trained in") and err.count("\n") == 1


def test_an_odd_info_is_named_once(here, capsys, monkeypatch):
    """The others are logged all the same."""
    step = Cartpole.step

    def odd_step(self, actions):
        obs, reward, done, infos = step(self, actions)
        return obs, reward, done, {**infos, "note": "text", 3: 1.5, "good": 2.0}

    monkeypatch.setattr(Cartpole, "step", odd_step)
    main([*SMALL, "--experiment", "r"])
    err = capsys.readouterr().err
    assert err == "warning: infos: note cannot be logged: it is a str\n"
    curves = scalars("runs/r")
    assert curves["good/iter"][0][1] == 2.0 and curves["3/iter"][0][1] == 1.5


@pytest.mark.parametrize("limit", ["None", "np.float64(40)", "'long'", "torch.ones(32)"])
def test_odd_limits_of_episodes(limit, here):
    """None means unknown, any number will do, all else is one line."""
    Path("my_env.py").write_text(
        f"""
import numpy as np, torch
from train_ppo import Cartpole
class Mine(Cartpole):
    def __init__(self, num_envs, device):
        super().__init__(num_envs, device)
        self.max_episode_length = 500
    def step(self, actions):
        self.max_episode_length = 500
        result = super().step(actions)
        self.max_episode_length = {limit}
        return result
def make(num_envs, device, seed):
    env = Mine(num_envs, device)
    env.max_episode_length = {limit}
    return env
"""
    )
    good = limit in ("None", "np.float64(40)")
    flags = ["--env-id", "my_env:make", "--experiment", "r"]
    _, err = forked(*SMALL, *flags, cwd=here, code=0 if good else 2)
    assert good or err.startswith("error: the env's max_episode_length must be a number, not ")
    assert err.count("\n") <= 1


def test_other_peoples_files_behind_a_link_stay(here):
    """A symlinked nn/ may hold what another run is about to rename."""
    main([*SMALL, "--experiment", "r"])
    os.rename("runs/r/nn", "elsewhere")
    os.symlink(str(here / "elsewhere"), "runs/r/nn")
    Path("elsewhere/last.pth.1.tmp").write_text("half")
    main(["--checkpoint", "runs/r", "--max-epochs", "5"])
    assert Path("elsewhere/last.pth.1.tmp").exists()


def test_short_first_episodes_do_not_spoil_best(here):
    """No best before every environment could have finished a whole episode since it started."""
    flags = ["--env-id", f"{__name__}:cost_env", "--num-envs", "32", "--num-steps", "8"]
    flags += ["--games-to-track", "8", "--save-best-after", "1", "--save-frequency", "0"]
    main([*flags, "--max-epochs", "4", "--experiment", "r"])
    assert load_checkpoint("runs/r/nn/last.pth")["best_epoch"] == 0, "32 steps: none was whole"
    main([*flags, "--max-epochs", "8", "--experiment", "q"])
    assert load_checkpoint("runs/q/nn/best.pth")["best_epoch"] >= 5


def test_a_zip_bomb_is_refused_at_once(here, capsys):
    import zipfile

    main([*SMALL, "--experiment", "r", "--max-epochs", "1"])
    with zipfile.ZipFile("runs/r/nn/last.pth") as good:
        with zipfile.ZipFile("bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
            for info in good.infolist():
                bomb.writestr(info.filename, good.read(info))
            folder = good.namelist()[0].split("/")[0]
            bomb.writestr(f"{folder}/data/99", bytes(2**28))
    start = time.perf_counter()
    with pytest.raises(SystemExit) as stopped:
        main(["--play", "--checkpoint", "bomb.pth"])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert time.perf_counter() - start < 5


def test_one_command_starts_and_restarts(here, capsys):
    """A pre-empted job is queued again with the command line that it had."""
    command = [*SMALL, "--experiment", "r", "--resume"]
    main([*command, "--max-epochs", "3"])
    main([*command, "--max-epochs", "5"])
    assert "continuing runs/r" in capsys.readouterr().out and os.listdir("runs") == ["r"]
    main([*command, "--max-epochs", "5"])
    assert "is complete: 5 of 5 epochs" in capsys.readouterr().out
    os.remove("runs/r/nn/last.pth")
    for path in Path("runs/r/nn").iterdir():
        path.unlink()
    main([*command, "--max-epochs", "2"])
    assert load_checkpoint("runs/r/nn/last.pth")["epoch"] == 2, "nothing readable: it starts"


@pytest.mark.parametrize(
    "infos",
    [
        {"episode": None},
        {"episode": {"a": "text", "b": 1.0}},
        {"episode_cumulative": {"a": 1.0}},
        {"episode_cumulative": {"a": torch.zeros(3)}},
        {"odd": object(), "fine": 2.0},
        {"huge": 10**400, "fine": 2.0},
        {"no numbers": torch.zeros((), device="meta")},
    ],
)
def test_odd_infos_cost_the_one_key(here, capsys, infos):
    """What cannot be logged is named once, and the other keys go on."""
    import types

    def make(num_envs, device, seed):
        env = Env(num_envs, device, seed)
        step = env.step

        def stepped(actions):
            obs, reward, done, own = step(actions)
            return obs, reward, done, {**own, **infos, "steady": 3.0}

        env.step = stepped
        return env

    sys.modules["odd_infos"] = types.SimpleNamespace(make=make)
    try:
        main(["--env-id", "odd_infos:make", *SMALL, "--experiment", "r"])
    finally:
        del sys.modules["odd_infos"]
    assert len(scalars("runs/r")["steady/iter"]) == 4
    assert capsys.readouterr().err.count("warning: ") <= 1


EXAMPLES = HERE / "examples"


def start_script(words, folder, output):
    """Target of a process that has imported torch already: what `python SCRIPT ARGUMENTS` does."""
    import runpy

    os.chdir(folder)
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true", CUDA_VISIBLE_DEVICES="")
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = os.fdopen(1, "w", 1)
    sys.stderr = os.fdopen(2, "w", 1)
    sys.argv = words
    sys.path.insert(0, os.path.dirname(os.path.join(folder, words[0])))
    runpy.run_path(words[0], run_name="__main__")


def run_script(*words, cwd, code=0):
    """What `python SCRIPT ARGUMENTS` prints."""
    output = os.path.join(tempfile.mkdtemp(), "output")
    process = forkserver().Process(target=start_script, args=(list(words), str(cwd), output))
    process.start()
    process.join(120)
    process.kill()
    process.join()
    text = Path(output).read_text()
    assert process.exitcode == code, f"{process.exitcode} from {words}\n{text}"
    return text


# ---------------------------------------------------------------------------------- own environment


def test_own_env_is_learned(tmp_path):
    """The environment that users copy: found by its module name, learned within seconds, logged."""
    flags = "--env-id examples.own_env:make_env --max-epochs 20 --experiment r"
    _, err = forked(*flags.split(), cwd=tmp_path)
    assert err == ""
    curves = scalars(tmp_path / "runs/r")
    reward, distance = ([v for _, v in curves[f"{x}/iter"]] for x in ("rewards", "distance"))
    assert reward[0] < 20 and reward[-1] > 75, "of at most 100"
    assert distance[-1] < distance[0] / 2
    lengths = [v for _, v in curves["episode_lengths/iter"]]
    assert lengths[0] < 50 and lengths[-1] == 100, "the first episodes start anywhere"


# ------------------------------------------------------------------------------------- own observer


def own_observer_until_sigterm(folder):
    """Exit code of examples/own_observer.py, stopped by SIGTERM after some epochs."""
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "own_observer.py"), "--track", "--experiment", "r"]
        + ["--num-envs", "32", "--num-steps", "8", "--max-epochs", "1000000"],
        cwd=str(folder),
        env={**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"},
        stdout=subprocess.DEVNULL,
    )
    try:
        lines = folder / "runs/r/metrics.jsonl"
        deadline = time.time() + 60
        while not (lines.exists() and lines.read_text().count("\n") >= 3):
            assert time.time() < deadline and process.poll() is None
            time.sleep(0.05)
        process.terminate()
        return process.wait(60)
    finally:
        process.kill()


def test_own_observer_runs_as_the_command_does(tmp_path):
    """A script of five lines has the command's flags, W&B, errors and exit codes, and its file has
    what TensorBoard and W&B have."""
    assert own_observer_until_sigterm(tmp_path) == 128 + signal.SIGTERM
    script = str(EXAMPLES / "own_observer.py")
    error = run_script(script, "--num-envs", "-3", cwd=tmp_path, code=2)
    assert re.fullmatch("error: --num-envs must be .*, not -3\n", error)

    run_dir = tmp_path / "runs/r"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    epochs = load_checkpoint(str(run_dir / "nn/last.pth"))["epoch"]
    assert [line.pop("epoch") for line in lines] == list(range(1, epochs + 1))
    assert [line.pop("frame") for line in lines] == [256 * n for n in range(1, epochs + 1)]
    written = {}
    for line in lines:
        for tag, value in line.items():
            written.setdefault(tag, []).append(value)
    curves = {tag: [v for _, v in points] for tag, points in scalars(run_dir).items()}
    assert "losses/a_loss" in written and written.keys() == curves.keys()
    for tag, values in written.items():
        assert values == pytest.approx(curves[tag], rel=1e-6), tag
    rows = wandb_run(wandb_records(run_dir)[0])[2]
    assert [row["losses/a_loss"] for row in rows] == written["losses/a_loss"]


# -------------------------------------------------------------------------------------------- video


def frames_of(path):
    """(seconds of a GIF, its different pictures). Equal pictures in a row are stored as one."""
    with Image.open(str(path)) as gif:
        seconds, pictures = 0.0, []
        for i in range(gif.n_frames):
            gif.seek(i)
            seconds += gif.info["duration"] / 1000
            pictures.append(np.asarray(gif.convert("RGB")))
    return pytest.approx(seconds), pictures


def test_videos_are_written_and_logged_and_change_nothing(here, capsys):
    """GIFs that move in the run folder, in the event file and in W&B's run; the same weights."""
    flags = [*SMALL, "--max-epochs", "6"]
    main([*flags, "--experiment", "plain"])
    main([*flags, "--track", "--experiment", "r"], observers=[RecordVideo(every=3, length=20)])
    videos = Path("runs/r/videos")
    assert sorted(os.listdir(videos)) == ["epoch_1.gif", "epoch_4.gif"]
    for path in videos.iterdir():
        seconds, pictures = frames_of(path)
        assert seconds == 20 / 50 and pictures[0].shape == (320, 600, 3)
        assert len(pictures) == 20 and not (pictures[0] == pictures[-1]).all()
    images = [
        (event.step, value.tensor.string_val[2])
        for path in Path("runs/r/summaries").glob("events*")
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.tag == "video"
    ]
    assert images == [  # a video ends in the third of its epochs of 256 frames
        (2 * 256, (videos / "epoch_1.gif").read_bytes()),
        (5 * 256, (videos / "epoch_4.gif").read_bytes()),
    ]
    _, _, rows, axes = wandb_run(wandb_records("runs/r")[0])
    sent = [row for row in rows if "video/path" in row]
    assert [row["global_step"] for row in sent] == [2 * 256, 5 * 256]
    for row, path in zip(sent, ("epoch_1.gif", "epoch_4.gif")):
        (file,) = Path("runs/r/wandb").glob(f"offline-run-*/files/{row['video/path']}")
        assert file.read_bytes() == (videos / path).read_bytes()
    assert axes["video"] == "global_step"
    assert len([row for row in rows if "losses/a_loss" in row]) == 6, "no other row is disturbed"

    a, b = (load_checkpoint(f"runs/{name}/nn/last.pth") for name in ("plain", "r"))
    for key in ("model", "optimizer", "env_state", "obs", "rng"):
        assert differences(a[key], b[key]) == [], key
    assert "warning" not in capsys.readouterr().err


def test_record_video_as_a_command(here, capsys):
    """It trains with any flag of train_ppo.py, also writes a video that is too short, and films a
    policy."""
    script = str(EXAMPLES / "record_video.py")
    main([*SMALL, "--experiment", "r"])
    main(["--play", "--checkpoint", "runs/r", "--num-envs", "4", "--seed", "7"])
    played = re.findall("^reward mean .*", capsys.readouterr().out, re.M)
    tasks = [
        lambda: run_script(script, *SMALL, "--experiment", "filmed", cwd=here),
        lambda: shell("--film", "runs/r", "policy.gif", "--seed", "7", cwd=here, script=(script,)),
    ]
    trained, (out, err) = at_once(lambda task: task(), tasks)
    assert "warning" not in trained and err == ""
    seconds, pictures = frames_of("runs/filmed/videos/epoch_1.gif")
    assert seconds == 4 * 8 / 50, "training ended before its 200 steps"
    assert len(pictures) > 10
    assert re.findall("^reward mean .*", out, re.M) == played, "to film a policy changes nothing"
    seconds, pictures = frames_of("policy.gif")
    longest = float(re.search(r"mean length (\S+),", out).group(1))
    assert longest / 50 <= seconds.expected <= 10 and len(pictures) > 10
    assert "video     policy.gif" in out

    with pytest.raises(SystemExit, match="2"):
        film("runs/none", "none.gif")
    err = capsys.readouterr().err
    assert err.startswith("error: runs/none ") and err.count("\n") == 1
    assert not Path("none.gif").exists()


@pytest.mark.parametrize("every, length", [(1, 3), (1, 99), (25, 99)])
def test_video_on_a_full_disk_is_one_warning(here, monkeypatch, capsys, every, length):
    """Whether a video ends by its length, by the next one or with the run: training goes on."""

    def full_disk(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", full_disk)
    main([*SMALL, "--experiment", "r"], observers=[RecordVideo(every, length)])
    err = capsys.readouterr().err
    assert err.count("warning:") == 1 and "No space left on device" in err
    assert load_checkpoint("runs/r/nn/last.pth")["epoch"] == 4


def test_video_of_an_env_without_a_picture_is_one_warning(here, capsys):
    main([*SMALL, "--env-id", f"{__name__}:Env", "--experiment", "r"], observers=[RecordVideo()])
    err = capsys.readouterr().err
    assert err.count("warning:") == 1 and 'the env has no render(mode="rgb_array")' in err
    assert load_checkpoint("runs/r/nn/last.pth")["epoch"] == 4


VIRTUAL_SCREEN = """
make_without_a_screen = make


def make(*args, headless, virtual_screen_capture=False, **settings):
    task = make_without_a_screen(*args, headless=True, **settings)
    task.has_screen = virtual_screen_capture and not headless
    return task


def render(self, mode):
    if self.has_screen and mode == "rgb_array":
        return torch.full((8, 12, 3), int(self.progress_buf[0])).numpy()


Task.render = render
"""


def test_isaacgym_task_is_filmed_on_a_virtual_screen(tmp_path):
    """IsaacGymEnvs draws only if it is made with a viewer and a virtual screen. The stand-in's
    picture counts the steps of an episode."""
    pytest.importorskip("hydra")
    write_isaacgym(tmp_path)
    with open(str(tmp_path / "isaacgymenvs/__init__.py"), "a") as file:
        file.write(VIRTUAL_SCREEN)
    script = (str(EXAMPLES / "record_video.py"),)
    flags = "--env-id Ant --device cpu --max-epochs 2 --experiment r"
    _, err = shell(*flags.split(), cwd=tmp_path, script=script)
    assert "RecordVideo" not in err, err
    _, pictures = frames_of(tmp_path / "runs/r/videos/epoch_1.gif")
    assert pictures[0].shape == (8, 12, 3)
    assert [int(picture[0, 0, 0]) for picture in pictures] == list(range(16)), "2 epochs of 8 steps"
    saved = load_checkpoint(str(tmp_path / "runs/r/nn/last.pth"))["args"]
    assert saved["headless"], "the next run needs no screen"


# -------------------------------------------------------------------------------------------- mjlab


@pytest.mark.skipif(
    importlib.util.find_spec("mjlab") is None,
    reason="needs mjlab, on Python 3.10 or newer",
)
def test_mjlab_env_trains(tmp_path):
    """The adapter on mjlab's Cartpole, made quick to judge by short episodes: 50 steps, and 40 in
    every other environment, which ends by a termination, so that what is cut off by the clock and
    what is ended by the task differ."""
    (tmp_path / "short.py").write_text(
        textwrap.dedent("""
        import torch
        from mjlab.managers.termination_manager import TerminationTermCfg
        from mjlab.tasks.registry import load_env_cfg, register_mjlab_task

        from examples import mjlab_env


        def is_even_and_late(env):
            even = torch.arange(env.num_envs) % 2 == 0
            return even & (env.episode_length_buf >= 40)


        cfg = load_env_cfg(mjlab_env.TASK)
        cfg.episode_length_s = 2.5
        cfg.terminations["even"] = TerminationTermCfg(is_even_and_late)
        register_mjlab_task("Short", cfg, cfg, None)
        mjlab_env.TASK = "Short"


        class Counted(mjlab_env.Mjlab):
            def step(self, actions):
                obs, reward, done, infos = super().step(actions)
                infos.update(ended=done.float().mean(), cut=infos["time_outs"].float().mean())
                return obs, reward, done, infos


        def make_env(num_envs, device, seed):
            env = Counted(num_envs, device, seed)
            env.set_env_state({"common_step_counter": 1000})
            return env
    """)
    )
    flags = "--env-id short:make_env --num-envs 256 --max-epochs 20 --games-to-track 256"
    _, err = shell(*flags.split(), "--device", "cpu", "--experiment", "r", cwd=tmp_path)
    assert re.findall("^warning: .*", err, re.M) == [], "no observer dropped, no time_outs missed"
    run_dir = tmp_path / "runs/r"
    curves = {tag: [v for _, v in points] for tag, points in scalars(run_dir).items()}
    lengths = curves["episode_lengths/iter"]
    assert lengths[0] < 20, "the first episodes start anywhere"
    assert all(43 < x < 46 for x in lengths[7:])
    ended = np.mean(curves["ended/iter"][5:])
    assert ended == pytest.approx((1 / 40 + 1 / 50) / 2, rel=0.1), "episodes in a step"
    cut = np.mean(curves["cut/iter"][5:])
    assert cut == pytest.approx(1 / 50 / 2, rel=0.1), "a termination is not a time-out"
    assert len(curves["Episode/Episode_Reward/smooth_reward"]) == 20
    assert {f"Episode/Episode_Termination/{x}" for x in ("time_out", "even")} < set(curves)
    reward = curves["rewards/iter"]
    assert reward[-1] > 1.2 * reward[7] > 0, "episodes of the same length earn more"
    state = load_checkpoint(str(run_dir / "nn/last.pth"))
    assert state["num_states"] == 5, "mjlab's critic group"
    counter = state["env_state"]
    assert counter == {"common_step_counter": 1000 + 1 + 20 * 16}

    play = "--play --checkpoint runs/r/nn/last.pth --num-envs 32 --device cpu"
    out, _ = shell(*play.split(), "--env-id", "short:make_env", cwd=tmp_path)
    mean = re.search(r"reward mean (\S+) .*, mean length 45\.0, 32 episodes", out).group(1)
    assert float(mean) > 1.2 * reward[7], "--play sees whole episodes of the trained policy"


# ----------------------------------------------------------------------------- README.md and docs/

# Commands of the documents that are not run as they are printed, and why. A new command is run,
# unless a line here covers it.
NOT_RUN = {
    r"(pip|git|python\S* -m venv|\. \S*activate)\b.*": "installs or downloads: .ci/run does so",
    r"(KILLS=\d+ )?python -m pytest .*|\.ci/run": "runs these tests",
    r"python train_ppo\.py": "the fixture default_run is this command",
    r"python train_ppo\.py --env-id Ant .*": "test_isaacgym_task_trains_with_its_own_settings",
    r"python tools/from_rl_games\.py .*": "test_checkpoints_move_between_rl_games_and_here",
    r"torchrun --nproc-per-node=2 train_ppo\.py": "test_torchrun_learns_like_one_process",
    r"python benchmarks/(compare|fidelity|gpu|limits|overhead|pictures)\.py.*": "minutes or hours",
    r"#!/bin/bash.*|srun .*": "needs SLURM; only its syntax is checked",
    r"wandb sync.*": "needs an account",
}
PROGRAM = r"(?:[A-Z_]+=\S+ )*(?:python|pip|git|torchrun|tensorboard|wandb|srun|export) |\.ci/run"


def documents():
    """{name: text} of README.md and docs/."""
    paths = (HERE / "README.md", *sorted(HERE.glob("docs/*.md")))
    return {path.name: path.read_text() for path in paths}


def documented_commands():
    """All commands of the documents, `a && b` apart: the lines of their bash blocks, of which a
    script counts as one, and `code` that starts with a program."""
    lines, scripts = [], []
    for text in documents().values():
        for block in re.findall(r"```bash\n(.*?)```", text, re.S):
            if block.startswith("#!"):
                scripts.append(block)
            else:
                lines += block.replace("\\\n", " ").splitlines()
        code = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
        lines += [piece for piece in code if re.match(PROGRAM, piece)]
    parts = [part for line in lines for part in line.split("#")[0].split("&&")]
    commands = [" ".join(part.split()) for part in parts]
    return scripts + [command for command in dict.fromkeys(commands) if command]


def is_run(command):
    return not any(re.fullmatch(pattern, command, re.S) for pattern in NOT_RUN)


def start_tensorboard(words, folder):
    """What it prints until it serves."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", *words[1:], "--port", "0"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        universal_newlines=True,
    )
    with process:
        text = ""
        for line in process.stderr:
            text += line
            if "(Press CTRL+C to quit)" in line:
                process.terminate()
    return text


@pytest.mark.parametrize("command", [x for x in documented_commands() if is_run(x)])
def test_documented_command_works_as_printed(command, default_run, tmp_path):
    """Trainings are shortened: to three epochs, or to one more where a run is trained for longer.
    runs/NAME is the run that `python train_ppo.py` made."""
    _, _, _, run_dir = default_run
    shutil.copytree(str(run_dir), str(tmp_path / "runs" / "NAME"))
    shutil.copy(SCRIPT, str(tmp_path))
    for name in ("examples", "tools"):
        shutil.copytree(str(HERE / name), str(tmp_path / name))
    words = shlex.split(command)
    if "examples.mujoco_ant:make_env" in words:
        pytest.importorskip("mujoco", minversion="3.3")
    if words[0] == "tensorboard":
        assert "http://" in start_tensorboard(words, str(tmp_path))
        return
    if words[0] != "python":
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
        subprocess.run(["bash", "-c", command], env={**os.environ, "PATH": path}, check=True)
        return
    goes_on = "runs/NAME" in command and "--init-from" not in words
    if "--max-epochs" in words:
        words[words.index("--max-epochs") + 1] = "101" if goes_on else "3"
    elif not goes_on and words[1].startswith(("train_ppo", "examples/")):
        words += ["--max-epochs", "3"]
    text = run_script(*words[1:], cwd=tmp_path)
    assert not re.search("^(warning|error|Traceback)", text, re.M), text


def test_list_of_commands_that_are_not_run_is_true():
    """Each line of NOT_RUN is about a command of the documents, each test that it names is there,
    and scripts are correct bash."""
    commands = documented_commands()
    assert len([x for x in commands if is_run(x)]) > 10, "the documents' commands are found"
    for pattern, reason in NOT_RUN.items():
        assert any(re.fullmatch(pattern, x, re.S) for x in commands), f"is gone: {pattern}"
        assert set(re.findall(r"\btest_\w+", reason)) <= all_tests(), reason
    for script in [x for x in commands if x.startswith("#!")]:
        subprocess.run(["bash", "-n"], input=script.encode(), check=True)


def all_tests():
    """The names of all tests of the project."""
    files = (HERE / "test_train_ppo.py", HERE / "examples" / "test_mujoco_ant.py")
    return {x for path in files for x in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}


def test_documents_name_only_tests_that_exist():
    for name, text in documents().items():
        assert set(re.findall(r"`(test_(?!train_ppo)\w+)", text)) <= all_tests(), name
        for part in re.findall(r"pytest[^`]* -k (\w+)", text):
            assert any(part in test for test in all_tests()), f"{name}: -k {part}"


def test_tables_are_whole():
    """Each row has as many cells as its header: a | in a cell must be written as \\|, even in
    `code`."""
    for name, text in documents().items():
        for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
            cells = [len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()]
            assert len(set(cells)) == 1, f"{name}: {table.splitlines()[cells.index(max(cells))]}"


def test_every_picture_says_what_made_it():
    """Pages that show a picture of docs/ describe it and name the command, which exists."""
    pictures = [path for path in (HERE / "docs").iterdir() if path.suffix in (".gif", ".png")]
    assert pictures
    for picture in pictures:
        shown = rf"!\[[^\]]{{20,}}\]\((docs/)?{picture.name}\)"  # with what it shows in words
        pages = {name: text for name, text in documents().items() if re.search(shown, text)}
        assert pages, f"no page shows {picture.name}"
        for name, text in pages.items():
            command = f"`python benchmarks/pictures.py {picture.stem}`"
            assert command in text, f"{name} does not say which command made {picture.name}"
        assert f"\ndef {picture.stem}(" in (HERE / "benchmarks" / "pictures.py").read_text()


def test_documents_name_only_arguments_that_exist():
    """In `code`, in commands and in the sweep's parameters."""
    known = {"--help", "--film", "--signal"}  # the last one is SLURM's
    for field in train_ppo.fields(Args):
        name = field.name.replace("_", "-")
        known |= {f"--{name}", f"--no-{name}"} if field.type is bool else {f"--{name}"}
    for page, text in documents().items():
        text = text.split("- Gone: ")[0]  # changelog.md
        named = re.findall(r"`(--[a-z][a-z-]*)", text)
        for line in re.findall(r"(?:train_ppo|own_observer|record_video)\.py +(--.*)", text):
            named += re.findall(r"(?<!\S)--[a-z][a-z-]*", line.split("#")[0])
        for sweep in re.findall(r"^parameters:\n((?: +.*\n)+)", text, re.M):
            named += [f"--{parameter}" for parameter in re.findall(r"^ +([\w-]+):", sweep, re.M)]
        assert set(named) <= known, page


def test_links_between_documents_lead_somewhere():
    """Files and headings that README.md and docs/ link to are there."""
    for path in (HERE / "README.md", *HERE.glob("docs/*.md")):
        for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
            if link.startswith(("http://", "https://")):
                continue
            file, _, anchor = link.partition("#")
            target = (path.parent / file) if file else path
            assert target.exists(), f"{path.name}: {link}"
            headings = re.findall(r"^#+ (.*)", target.read_text(), re.M) if anchor else []
            known = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
            assert not anchor or anchor in known, f"{path.name}: {link}"


def test_every_tag_is_explained(default_run):
    """In docs/metrics.md."""
    explained = set(re.findall(r"`([\w/]+)`", (HERE / "docs" / "metrics.md").read_text()))
    tags = set(scalars(default_run[3]))
    assert len(tags) > 20
    assert {tag for tag in tags if not {tag, tag.rpartition("/")[0]} & explained} == set()


# ----------------------------------------------------------------------------------------- the file


def test_file_works_when_it_is_copied_alone(tmp_path):
    """train_ppo.py is all that training, continuing and playing need."""
    shutil.copy(SCRIPT, str(tmp_path))
    commands = [
        [*SMALL, "--experiment", "r"],
        ["--checkpoint", "runs/r", "--max-epochs", "5"],
        ["--play", "--checkpoint", "runs/r"],
    ]
    program = f"import train_ppo\nfor command in {commands}:\n    train_ppo.main(command)"
    out, err = shell(cwd=tmp_path, script=("-c", program))
    assert err == ""
    assert re.findall(r"^stopped after epoch \d+|^reward mean", out, re.M) == [
        "stopped after epoch 4",
        "stopped after epoch 5",
        "reward mean",
    ]
    assert {path.name for path in tmp_path.iterdir()} <= {"train_ppo.py", "runs", "__pycache__"}


@pytest.mark.parametrize("folder", [".", "examples", "tools", "benchmarks"])
def test_files_run_on_python_3_8(folder):
    """No syntax newer than 3.8, whatever Python runs this test."""
    import ast

    paths = list((HERE / folder).glob("*.py"))
    assert paths
    for path in paths:
        ast.parse(path.read_text(), filename=str(path), feature_version=(3, 8))
