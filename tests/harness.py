"""What the tests share: `run` is the command in this process, `start` in one of its own, and `Env`
is an environment that keywords drive. Nothing in here is a test."""

import contextlib
import dataclasses
import io
import json
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from typing import Tuple
from unittest import mock

import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

ROOT = Path(__file__).resolve().parent.parent
for folder in (str(ROOT), str(ROOT / "tests")):
    if folder not in sys.path:
        sys.path.insert(0, folder)

import train_ppo

SCRIPT = str(ROOT / "train_ppo.py")
SMALL = ("--num-envs=32", "--num-steps=8", "--max-epochs=4", "--save-frequency=2")
ENV = {}  # keywords of the Env that `make_env` makes


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory of the test's own, with W&B offline; imports of my_... are undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_ppo, "START_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    # Without it rl_games 1.6.1 cannot read its own files in torch >= 2.6.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in list(sys.modules):
        if name.startswith("my_"):
            del sys.modules[name]


# THE COMMAND ======================================================================================


@dataclasses.dataclass
class Run:
    """What a run of the command left behind: output, exit code, run folder."""

    out: str
    err: str
    code: int
    folder: Path  # of the newest run under ./runs, "" if there is none

    def state(self, name="last.pth"):
        return train_ppo.load_checkpoint(str(self.folder / "nn" / name))

    @property
    def files(self):
        return sorted(path.name for path in (self.folder / "nn").glob("*.pth"))

    @property
    def curves(self):
        """{tag: [(step, value), ...]} in the order in which they were written."""
        found = {}
        files = (self.folder / "summaries").glob("events*")
        for path in sorted(files, key=lambda p: p.stat().st_mtime):
            for event in EventFileLoader(str(path)).Load():
                for value in event.summary.value:
                    if value.tensor.float_val:
                        point = (event.step, value.tensor.float_val[0])
                        found.setdefault(value.tag, []).append(point)
        return found


def newest_run():
    runs = sorted(Path("runs").glob("*"), key=lambda path: path.stat().st_mtime_ns)
    return Path(os.path.abspath(str(runs[-1]))) if runs else Path("")


def run(*flags, env=None, code=0, observers=(), script=""):
    """`python train_ppo.py FLAGS`, or another script, in this process, in the working directory.
    With env, keywords of Env, it trains that environment. The exit code must be `code`."""
    out, err, ended = io.StringIO(), io.StringIO(), 0
    if env is not None:
        ENV.clear()
        ENV.update(env)
        flags = ("--env-id=harness:make_env", *flags)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if script:
                train_ppo.warn.cache_clear()
                with mock.patch("sys.argv", [str(word) for word in (script, *flags)]):
                    runpy.run_path(str(script), run_name="__main__")
            else:
                train_ppo.main([str(flag) for flag in flags], observers=observers)
        except SystemExit as exc:
            ended = exc.code if isinstance(exc.code, int) else 1
            if not isinstance(exc.code, int):
                print(exc.code, file=sys.stderr)
    done = Run(out.getvalue(), err.getvalue(), ended, newest_run())
    assert ended == code, f"exit code {ended}, expected {code}\n{done.out}\n{done.err}"
    return done


def refused(*flags, env=None, script=""):
    """The one line of a refusal, `error: ...`, before which nothing may be written."""
    before = snapshot(".")
    done = run(*flags, env=env, code=1, script=script)
    assert snapshot(".") == before
    lines = [x for x in done.err.splitlines() if not x.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.err
    return lines[0]


# PROCESSES ========================================================================================


def forkserver():
    """Makes real processes that have imported torch already, which takes two seconds. torch._dynamo
    is there too, because the first optimizer imports it, which takes another second."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["harness", "torch._dynamo"])
    with LOCK:
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = str(ROOT / "tests")  # where the server finds this module
        multiprocessing.forkserver.ensure_running()
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


LOCK = threading.Lock()


def command(folder, environ, flags, prefix, script=""):
    """Target of such a process: the command, or a script, in `folder`, with its output in
    PREFIX.out and .err."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    os.environ.update(environ)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{prefix}.{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdout = os.fdopen(1, "w", 1)
    sys.stderr = os.fdopen(2, "w", 1)
    train_ppo.START_DIR = folder
    if "RANK" in environ:  # it is read at the import
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            setattr(train_ppo, name, int(environ[name]))
    if script:
        sys.argv = [script, *flags]
        runpy.run_path(script, run_name="__main__")
    else:
        train_ppo.main(flags)


def start(*flags, env=None, environ=(), cwd=".", script=""):
    """A running process with the command, or with `python SCRIPT FLAGS`; `finish` waits for it. env
    must be JSON."""
    prefix = os.path.join(tempfile.mkdtemp(), "std")
    environ = {"WANDB_MODE": "offline", **dict(environ)}
    if env is not None:
        environ["TEST_ENV"] = json.dumps(env)
        flags = ("--env-id=harness:make_env", *flags)
    target = (os.path.abspath(str(cwd)), environ, [str(x) for x in flags], prefix, str(script))
    process = forkserver().Process(target=command, args=target)
    process.start()
    process.prefix = prefix
    return process


def output(process):
    """[stdout, stderr] of a process so far."""
    paths = [Path(f"{process.prefix}.{name}") for name in ("out", "err")]
    return [path.read_text() if path.exists() else "" for path in paths]


def finish(process, code=0, timeout=120, cwd="."):
    """Wait for a process of `start`, whose exit code must be `code`; returns its Run."""
    process.join(timeout)
    hangs = process.is_alive()
    process.kill()
    process.join()
    out, err = output(process)
    assert not hangs, f"it does not end\n{out}\n{err}"
    assert process.exitcode == code, f"{process.exitcode} instead of {code}\n{out}\n{err}"
    before = os.getcwd()
    os.chdir(str(cwd))
    try:
        return Run(out, err, code, newest_run())
    finally:
        os.chdir(before)


def wait_for(condition, process=None, seconds=60):
    """Wait until condition() is true; fails if that takes too long or the process ends before."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        assert process is None or process.is_alive(), output(process)
        time.sleep(0.005)


# COMPARISONS ======================================================================================


def snapshot(folder):
    """{relative path: content} of all files under a folder."""
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in paths
        if "__pycache__" not in str(path)
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
    """Leaves that differ between two checkpoints, but for what must: clocks, names, W&B's id."""
    a, b = dict(a, args=dict(a["args"])), dict(b, args=dict(b["args"]))
    for state in (a, b):
        for key in ("total_time", "wandb_run_id"):
            del state[key]
        for key in ("max_epochs", "experiment", "checkpoint", "resume"):
            del state["args"][key]
    return differences(a, b)


# A MALICIOUS FILE =================================================================================


class Evil(torch.nn.Module):
    """A TorchScript module that writes the file "owned" when it is loaded."""

    def __init__(self):
        super().__init__()
        self.x = torch.ones(1)

    @torch.jit.export
    def __getstate__(self) -> Tuple[torch.Tensor, bool]:
        return self.x, self.training

    @torch.jit.export
    def __setstate__(self, state: Tuple[torch.Tensor, bool]) -> None:
        self.x, self.training = state
        torch.save(self.x, "owned")

    def forward(self) -> torch.Tensor:
        return self.x


def torchscript(path):
    """An archive that torch < 2.6 hands to torch.jit.load, weights_only or not, stored without
    compression, as a checkpoint is. That it works is tried first."""
    archive = io.BytesIO()
    torch.jit.save(torch.jit.script(Evil()), archive)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(path, "w") as stored:
        for name in source.namelist():
            stored.writestr(name, source.read(name))
    torch.jit.load(path)
    os.remove("owned")


# AN ENVIRONMENT ===================================================================================


class Env:
    """Reward 1 - |action - obs|, and whatever the keywords say. It resets before it observes and
    reuses its tensors, as many Isaac Gym tasks do.

    lengths     steps of an episode, one number or one for each environment
    infos       what to add to infos in each step: a dict, or a function of the env
    time_outs   False: infos has none
    raise_at    the step, counted from 1, that raises `error` (a RuntimeError)
    exit_at     the step that calls sys.exit
    kill_at     the step in which the process gets the signal `kill`
    sleep_at    the step that takes an hour
    bad_at      (step, "obs" | "reward" | "states", number of environments, value)
    exact       True: it has its whole state in checkpoints
    level       a number to begin with: a curriculum, kept in checkpoints, one more at each step
    others      become attributes: num_states, max_episode_length, close, policy_metadata ..."""

    num_obs = num_acts = 2
    num_states = 0

    def __init__(self, num_envs, device, seed, **keywords):
        self.num_envs = num_envs
        self.lengths, self.infos, self.time_outs = 20, {}, True
        self.raise_at = self.exit_at = self.kill_at = self.sleep_at = self.bad_at = None
        self.error, self.kill = RuntimeError("the simulator broke"), signal.SIGKILL
        self.exact, self.level = False, None
        self.__dict__.update(keywords)
        self.lengths = torch.as_tensor(self.lengths).expand(num_envs)
        self.steps = 0
        self.t = torch.zeros(num_envs, dtype=torch.long)
        self.obs = torch.rand(num_envs, self.num_obs) - 0.5
        self.reward = torch.zeros(num_envs)
        self.done = torch.zeros(num_envs, dtype=torch.long)
        self.exact_state = self.exact
        if self.exact or self.level is not None:
            self.get_env_state, self.set_env_state = self._get_state, self._set_state

    def _get_state(self):
        if self.level is not None:
            return {"level": self.level}
        return {"t": self.t.clone(), "obs": self.obs.clone(), "steps": self.steps}

    def _set_state(self, state):
        for name, value in state.items():
            setattr(self, name, value)

    def observations(self):
        obs = {"obs": self.obs}
        if self.num_states:
            obs["states"] = torch.cat((self.obs, self.obs), 1)[:, : self.num_states]
        return obs

    def reset(self):
        return self.observations()

    def step(self, actions):
        self.steps += 1
        if self.level is not None:
            self.level += 1
        if self.steps == self.raise_at:
            raise self.error
        if self.steps == self.exit_at:
            sys.exit("the window was closed")
        if self.steps == self.kill_at:
            os.kill(os.getpid(), self.kill)
        if self.steps == self.sleep_at:
            time.sleep(3600)
        distance = actions[:, : self.num_obs] - self.obs[:, : self.num_acts]
        self.reward[:] = 1 - distance.abs().mean(1)
        self.t += 1
        self.done[:] = self.t >= self.lengths
        self.t[self.done.bool()] = 0
        # In place: whoever kept the observations without a copy now has other numbers.
        self.obs[:] = torch.rand(self.num_envs, self.num_obs) - 0.5
        infos = dict(self.infos(self) if callable(self.infos) else self.infos)
        if self.time_outs:
            infos["time_outs"] = self.done.bool()
        obs = self.observations()
        if self.bad_at and self.steps == self.bad_at[0]:
            _, what, count, value = self.bad_at
            (self.reward if what == "reward" else obs[what])[:count] = float(value)
        return obs, self.reward, self.done, infos


def make_env(num_envs, device, seed):
    return Env(num_envs, device, seed, **ENV, **json.loads(os.environ.get("TEST_ENV", "{}")))
