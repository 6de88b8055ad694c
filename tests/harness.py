"""What the tests share: `run` is the command in this process, `start` in one of its own, and `Env`
is an environment that keywords drive. Nothing in here is a test."""

import contextlib
import dataclasses
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
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


def newest_run(folder="."):
    runs = sorted(Path(folder, "runs").glob("*"), key=lambda path: path.stat().st_mtime_ns)
    return runs[-1].resolve() if runs else Path("")


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


def start(*flags, env=None, environ=(), cwd=".", script=SCRIPT):
    """A running process of `python SCRIPT FLAGS`, which `finish` waits for. env must be JSON."""
    if env is not None:
        flags = ("--env-id=harness:make_env", *flags)
    environ = {"TEST_ENV": json.dumps(env or {}), "WANDB_MODE": "offline", **dict(environ)}
    environ = {**os.environ, **environ, "PYTHONUNBUFFERED": ""}
    environ["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environ.pop("WANDB_SERVICE", None)  # that of the tests' own process, which ends with it
    words = [sys.executable, str(script), *map(str, flags)]
    out, err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
    process = subprocess.Popen(words, cwd=cwd, env=environ, stdout=out, stderr=err)
    process.files = (out, err)
    return process


def output(process):
    """[stdout, stderr] of a process so far."""
    return [os.pread(file.fileno(), 2**20, 0).decode() for file in process.files]


def finish(process, code=0, timeout=120, cwd="."):
    """Wait for a process of `start`, whose exit code must be `code`; returns its Run."""
    try:
        process.wait(timeout)
    finally:
        process.kill()
        out, err = output(process)
    assert process.returncode == code, f"{process.returncode} instead of {code}\n{out}\n{err}"
    return Run(out, err, code, newest_run(cwd))


def wait_for(condition, process=None, seconds=60):
    """Wait until condition() is true; fails if that takes too long or the process ends before."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        assert process is None or process.poll() is None, output(process)
        time.sleep(0.005)


# COMPARISONS ======================================================================================


def snapshot(folder):
    """{path: content} of all files under a folder."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in paths if "__pycache__" not in str(path)}


def differences(a, b, path=""):
    """Names of the leaves in which two checkpoints differ, to the last bit."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(set(a) | set(b), key=str)
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{path}.{k}")]
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

    @torch.jit.export
    def __getstate__(self) -> Tuple[torch.Tensor, bool]:
        return torch.ones(1), self.training

    @torch.jit.export
    def __setstate__(self, state: Tuple[torch.Tensor, bool]) -> None:
        self.training = state[1]
        torch.save(state[0], "owned")


def torchscript(path):
    """An archive that torch < 2.6 hands to torch.jit.load, weights_only or not. That it works is
    tried first."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    torch.jit.save(torch.jit.script(Evil()), path)
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
    kill_at     the step in which the process gets the signal `kill`
    bad_at      (step, "obs" | "reward", number of environments, value)
    exact       True: it has its whole state in checkpoints
    level       a number to begin with: a curriculum, kept in checkpoints, one more at each step
    others      become attributes: num_states, max_episode_length, close, policy_metadata ..."""

    num_obs = num_acts = 2
    num_states = 0

    def __init__(self, num_envs, device, seed, **keywords):
        self.num_envs = num_envs
        self.lengths, self.infos, self.time_outs = 20, {}, True
        self.raise_at = self.kill_at = self.bad_at = None
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
        if self.steps == self.kill_at:
            os.kill(os.getpid(), self.kill)
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
