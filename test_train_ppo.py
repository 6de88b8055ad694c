"""Tests of train_ppo.py through the real thing: real processes, event files, W&B offline runs, rl_games, hydra.

Only isaacgym and isaacgymenvs, which cannot be installed from a package index, are stood in for (`ISAACGYM`, below).
"""
import errno
import http.server
import importlib
import json
import math
import multiprocessing
import os
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import train_ppo
from benchmarks import fidelity
from train_ppo import Args, Cartpole, EpisodeMeter, RunningMeanStd, WindowMeter, gae, load_checkpoint, main

HERE = Path(__file__).resolve().parent
SCRIPT = str(HERE / "train_ppo.py")
README = (HERE / "README.md").read_text()
SMALL = ["--num-envs", "32", "--num-steps", "8", "--max-epochs", "4", "--save-frequency", "2"]


# ---------------------------------------------------------------------------------------------------------- helpers


def shell(*arguments, cwd, env=(), code=0, timeout=240, script=(SCRIPT,)):
    """Run train_ppo.py as a user does; returns (stdout, stderr)."""
    environment = {**os.environ, "PYTHONPATH": str(cwd), "WANDB_MODE": "offline", **dict(env)}
    environment.pop("WANDB_SERVICE", None)  # that of a run in this process
    done = subprocess.run([sys.executable, *script, *arguments], cwd=str(cwd), env=environment, timeout=timeout,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == code, f"exit code {done.returncode}, expected {code}\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def at_once(call, items):
    """[call(item) for item in items], all at the same time: each mostly waits for a process to start."""
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(call, items))


def forkserver():
    """Makes real processes that have torch imported already; the first optimizer would import _dynamo, for over a second."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_train_ppo", "torch._dynamo"])
    return context


def scalars(run_dir):
    """{tag: [(step, value), ...]} of all event files of a run, in the order in which they were written; nothing is purged."""
    found = {}
    for path in sorted(Path(run_dir, "summaries").glob("events*"), key=lambda p: p.stat().st_mtime):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag == "video":
                    continue
                assert value.tensor.float_val, value
                found.setdefault(value.tag, []).append((event.step, value.tensor.float_val[0]))
    return found


def wandb_records(run_dir):
    """Records of each W&B run under a run folder, oldest first, read from its LevelDB-style log."""
    from wandb.proto import wandb_internal_pb2

    runs = []
    for path in sorted(Path(run_dir).glob("wandb/*run-*/*.wandb"), key=lambda p: p.stat().st_mtime):
        data, position, records, buffer = path.read_bytes(), 7, [], b""
        while position + 7 <= len(data):
            left = 32768 - position % 32768
            if left < 7:  # a block's last bytes, too few for a header
                position += left
                continue
            _, length, kind = struct.unpack("<IHB", data[position:position + 7])
            buffer = (b"" if kind in (1, 2) else buffer) + data[position + 7:position + 7 + length]
            position += 7 + length
            if kind in (1, 4):
                records.append(wandb_internal_pb2.Record.FromString(buffer))
        runs.append(records)
    return runs


def wandb_run(records):
    """(run id, config, history rows, {metric: x-axis}) of one offline run."""
    key = lambda item: item.key or "/".join(item.nested_key)  # noqa: E731
    run = next(r.run for r in records if r.HasField("run"))
    config = {key(item): json.loads(item.value_json) for item in run.config.update}
    rows = [{key(item): json.loads(item.value_json) for item in r.history.item} for r in records if r.HasField("history")]
    axes = {r.metric.name: r.metric.step_metric for r in records if r.HasField("metric")}
    return run.run_id, config, rows, axes


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file() and "__pycache__" not in str(p)}


def differences(a, b, path=""):
    """Names of the leaves in which two checkpoints differ, to the last bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for key in sorted(set(a) | set(b), key=str) for d in differences(a.get(key), b.get(key), f"{path}.{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{path}.{i}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else type(a) is type(b) and a == b
    return [] if same else [path]


class Env:
    """A factory env for tests: reward 1 - |a - obs|, episodes of `lengths[env]` steps, resets before it observes; aliased buffers."""

    num_obs = num_acts = 2

    def __init__(self, num_envs, device, seed, lengths=None, **attributes):
        self.num_envs = num_envs
        self.lengths = torch.full((num_envs,), 20) if lengths is None else lengths
        self.t, self.obs = torch.zeros(num_envs, dtype=torch.long), torch.rand(num_envs, 2) - 0.5
        self.reward, self.done, self.infos = torch.zeros(num_envs), torch.zeros(num_envs, dtype=torch.long), {}
        self.__dict__.update(attributes)

    def reset(self):
        return {"obs": self.obs}

    def step(self, actions):
        self.reward[:] = 1 - (actions - self.obs).abs().mean(1)
        self.t += 1
        self.done[:] = self.t >= self.lengths
        self.t[self.done.bool()] = 0
        self.obs[:] = torch.rand(self.num_envs, 2) - 0.5  # in place: whoever kept it without a copy now has other numbers
        self.infos["time_outs"] = self.done.bool()
        return {"obs": self.obs}, self.reward, self.done, self.infos


@pytest.fixture(scope="session")
def default_run(tmp_path_factory):
    """`python train_ppo.py`, as a newcomer runs it, with a pipe for a terminal."""
    cwd = tmp_path_factory.mktemp("default")
    out, err = shell(cwd=cwd)
    return cwd, out, err, next((cwd / "runs").iterdir())


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory of one's own, with W&B offline and torch's generator left as it was found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # without it rl_games 1.6.1 cannot read its own files in torch >= 2.6
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in ("my_envs", "my_env", "my_observer"):
        sys.modules.pop(name, None)


# ---------------------------------------------------------------------------------------------------------- the main job


def test_default_run_learns_cartpole(default_run):
    cwd, out, err, run_dir = default_run
    rewards = [float(x) for x in re.findall(r"reward ([-\d.]+) length", out)]
    assert rewards[19] < 250 < rewards[-1] and max(rewards) >= 480
    assert len(re.findall(r"^epoch \d+/100 ", out, re.M)) == 100
    assert "\r" not in out and "\x1b" not in out, "a pipe gets plain lines"
    assert not err.strip(), err
    assert {p.name for p in (run_dir / "nn").iterdir()} == {"best.pth", "last.pth", "epoch_25.pth", "epoch_50.pth", "epoch_75.pth", "epoch_100.pth"}
    best = load_checkpoint(str(run_dir / "nn" / "best.pth"))
    assert best["epoch"] >= 50 and best["last_mean_rewards"] == pytest.approx(max(rewards[49:]), abs=0.01)


def test_five_seeds_learn_as_in_rl_games(tmp_path):
    """rl_games 1.6 with the same settings: about 110, 200, 480 and 489 at epochs 20, 40, 60 and 100. In both a seed now and then stays below 480."""

    def curve(seed):
        out, _ = shell("--seed", str(seed), "--save-frequency", "0", "--experiment", f"r{seed}", cwd=tmp_path)
        return [float(re.search(rf"^epoch {epoch}/100 .* reward ([-\d.]+) ", out, re.M).group(1)) for epoch in (20, 40, 60, 100)]

    rewards = np.array(at_once(curve, range(1, 6)))
    assert (np.median(rewards, 0) >= [85, 150, 430, 480]).all(), rewards  # the mean would be that of the seed that falls back


def test_best_checkpoint_plays(default_run):
    cwd, _, _, run_dir = default_run
    before = snapshot(cwd)
    out, _ = shell("--play", "--checkpoint", str(run_dir / "nn" / "best.pth"), cwd=cwd)
    mean, count = re.search(r"mean ([\d.]+) std .* (\d+) episodes", out).groups()
    assert float(mean) >= 490 and count == "512"
    assert snapshot(cwd) == before, "play writes nothing"


def test_printed_commands_work(default_run):
    cwd, out, _, run_dir = default_run
    command = re.search(r"^play +python (\S+) (.*)$", out, re.M)
    assert (cwd / command.group(1)).resolve() == Path(SCRIPT)
    out, _ = shell(*command.group(2).split(), "--num-envs", "700", cwd=cwd)  # no multiple of the minibatch: it is not training
    assert "700 episodes" in out


def test_tensorboard_has_rl_games_tags(default_run):
    found = scalars(default_run[3])
    tags = ["rewards/{}", "shaped_rewards/{}", "episode_lengths/{}"]
    expected = {t.format(axis) for t in tags for axis in ("step", "iter", "time")}
    expected |= {f"losses/{x}" for x in ("a_loss", "c_loss", "entropy", "bounds_loss", "clipfrac", "explained_variance")}
    expected |= {f"info/{x}" for x in ("last_lr", "lr_mul", "e_clip", "kl", "epochs")}
    expected |= {f"performance/{x}" for x in ("step_inference_rl_update_fps", "step_inference_fps", "step_fps", "rl_update_time",
                                              "step_inference_time", "step_time")}
    assert set(found) == expected
    assert [step for step, _ in found["losses/a_loss"]] == [8192 * (i + 1) for i in range(100)]
    assert [step for step, _ in found["rewards/iter"]] == list(range(1, 101))
    assert all(math.isfinite(v) for values in found.values() for _, v in values)


def test_config_json_says_how_to_run_it_again(default_run):
    config = json.loads((default_run[3] / "config.json").read_text())
    assert Args(**{k: tuple(v) if isinstance(v, list) else v for k, v in config["args"].items()}) == Args()
    assert config["versions"]["torch"] == torch.__version__ and "train_ppo.py" in config["command"] and "git_commit" in config


def test_live_line_on_a_terminal(tmp_path):
    """On a terminal the epoch line is drawn in place, and it fits."""
    import fcntl
    import pty
    import termios

    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen([sys.executable, SCRIPT, *SMALL], cwd=str(tmp_path), stdout=child, stderr=child)
    os.close(child)
    output = b""
    while True:
        try:
            chunk = os.read(parent, 4096)
        except OSError:
            break
        if not chunk:
            break
        output += chunk
    assert process.wait() == 0
    drawn = [part for part in output.decode().split("\r") if "epoch" in part and "reward" in part and "\n" not in part]
    assert any("4/4" in part for part in drawn), output
    assert max(len(re.sub(r"\x1b\[\w", "", part)) for part in drawn) <= 80


# ---------------------------------------------------------------------------------------------------------- continuing


def test_second_signal_ends_it_at_once(here):
    """An env that never returns from step cannot hold up the end; what was saved before stays readable."""
    Path("my_envs.py").write_text(textwrap.dedent("""
        import time
        from test_train_ppo import Env
        def make(num_envs, device, seed):
            env = Env(num_envs, device, seed)
            step, count = env.step, [0]
            def slow(actions):
                count[0] += 1
                if count[0] > 30:
                    print("asleep", flush=True)
                    time.sleep(100)
                return step(actions)
            env.step = slow
            return env
    """))

    def asleep(*arguments):
        process = subprocess.Popen([sys.executable, SCRIPT, *arguments], env={**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{HERE}"},
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
                                   # a shell's background job, as these tests may be, has its children ignore it
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        assert any("asleep" in line for line in process.stdout)
        return process

    process = asleep("--env-id", "my_envs:make", *SMALL, "--max-epochs", "9", "--experiment", "r")
    process.send_signal(signal.SIGTERM)
    assert "finishing this epoch" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    assert load_checkpoint("runs/r/nn/epoch_2.pth")["epoch"] == 2
    process = asleep("--play", "--checkpoint", "runs/r", "--games", "100000")
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "") and process.returncode == 128 + signal.SIGINT, "--play has nothing to finish"


def same_state(a, b):
    """Leaves that differ between two checkpoints, but for what must: clocks, names, budgets."""
    a, b = load_checkpoint(str(a)), load_checkpoint(str(b))
    for state in (a, b):
        for key in ("total_time", "wandb_run_id"):
            del state[key]
        for key in ("max_epochs", "experiment", "checkpoint"):
            del state["args"][key]
    return differences(a, b)


def test_continuing_is_exact(tmp_path):
    shell("--max-epochs", "24", "--save-best-after", "5", "--experiment", "straight", cwd=tmp_path)
    shell("--max-epochs", "12", "--save-best-after", "5", "--experiment", "stopped", cwd=tmp_path)
    assert same_state(tmp_path / "runs/straight/nn/last.pth", tmp_path / "runs/stopped/nn/last.pth"), "the comparison can see a difference"
    out, _ = shell("--checkpoint", "runs/stopped", "--max-epochs", "24", cwd=tmp_path)
    assert "exactly where it stopped" in out and sorted(os.listdir(tmp_path / "runs")) == ["stopped", "straight"]
    assert same_state(tmp_path / "runs/straight/nn/last.pth", tmp_path / "runs/stopped/nn/last.pth") == []
    assert same_state(tmp_path / "runs/straight/nn/best.pth", tmp_path / "runs/stopped/nn/best.pth") == []
    straight, stopped = scalars(tmp_path / "runs/straight"), scalars(tmp_path / "runs/stopped")
    assert set(straight) == set(stopped)
    for tag in straight:
        if tag.endswith("/time"):
            assert [v for _, v in straight[tag]] == [v for _, v in stopped[tag]]
            assert [s for s, _ in stopped[tag]] == sorted(s for s, _ in stopped[tag]), "time goes on, it does not start over"
        elif not tag.startswith("performance/"):
            assert straight[tag] == stopped[tag], tag


def test_lost_epochs_are_not_drawn_twice(here):
    """After a crash the curve is cut back to the checkpoint, whatever the x-axis."""
    main([*SMALL, "--experiment", "crash", "--max-epochs", "5"])
    os.remove("runs/crash/nn/last.pth")  # as if killed in epoch 6: the newest file is epoch 4's
    main(["--checkpoint", "runs/crash", "--max-epochs", "7"])
    assert [s for s, _ in scalars("runs/crash")["info/epochs"]] == [256 * i for i in range(1, 8)]
    assert [s for s, _ in scalars("runs/crash")["rewards/iter"]][-4:] == [4, 5, 6, 7]


def test_older_checkpoint_branches_into_a_new_run(here, capsys):
    main([*SMALL, "--experiment", "old"])
    before = snapshot("runs/old")
    main(["--checkpoint", "runs/old/nn/epoch_2.pth"])
    assert snapshot("runs/old") == before
    branch = json.loads(Path("runs/old_2/config.json").read_text())
    assert "old/nn/epoch_2.pth (epoch 2)" in branch["branched_from"]
    assert same_state("runs/old/nn/last.pth", "runs/old_2/nn/last.pth") == []
    before = snapshot("runs/old")
    main(["--checkpoint", "runs/old", "--experiment", "new", "--max-epochs", "5"])  # a new name branches too
    assert snapshot("runs/old") == before and load_checkpoint("runs/new/nn/last.pth")["epoch"] == 5


def test_complete_run_says_so(here, capsys):
    main([*SMALL, "--experiment", "r"])
    before = snapshot("runs")
    main(["--checkpoint", "runs/r"])
    assert "is complete: 4 of 4 epochs" in capsys.readouterr().out and snapshot("runs") == before


def test_newest_is_picked_by_epoch_and_broken_files_are_skipped(here, capsys):
    main([*SMALL, "--experiment", "r", "--max-epochs", "12"])
    for name in ("last", "epoch_12"):
        Path(f"runs/r/nn/{name}.pth").write_bytes(b"half a file")
    main(["--checkpoint", "runs/r"])
    output = capsys.readouterr()
    assert output.err.count("skipped") >= 2 and "epoch_10.pth at epoch 10" in output.out  # not epoch_8, the last by name


def test_flags_win_over_the_checkpoint(here, capsys):
    main([*SMALL, "--experiment", "r"])
    main(["--checkpoint", "runs/r", "--max-epochs", "5", "--learning-rate", "1e-5", "--lr-schedule", "fixed"])
    assert float(load_checkpoint("runs/r/nn/last.pth")["lr"]) == pytest.approx(1e-5)
    main(["--checkpoint", "runs/r", "--max-epochs", "6", "--num-envs", "16"])
    assert "starts new episodes" in capsys.readouterr().out


def test_init_from_starts_a_new_run_with_the_weights(here):
    main([*SMALL, "--experiment", "a", "--units", "8", "--activation", "tanh"])
    main([*SMALL, "--experiment", "b", "--init-from", "runs/a", "--max-epochs", "1", "--learning-rate", "0", "--lr-schedule", "fixed"])
    a, b = load_checkpoint("runs/a/nn/last.pth"), load_checkpoint("runs/b/nn/last.pth")
    assert b["epoch"] == 1 and b["args"]["activation"] == "tanh"
    weights = [k for k in a["model"] if k.startswith("a2c_network")]
    assert weights and all(torch.equal(a["model"][k], b["model"][k]) for k in weights)
    assert b["model"]["running_mean_std.count"] == a["model"]["running_mean_std.count"] + 256


def test_keep_last(here):
    main([*SMALL, "--experiment", "r", "--save-frequency", "1", "--max-epochs", "11", "--keep-last", "2"])
    assert sorted(os.listdir("runs/r/nn")) == ["epoch_10.pth", "epoch_11.pth", "last.pth"]


def test_runs_never_share_a_folder(here):
    for _ in range(3):
        main([*SMALL, "--experiment", "same", "--max-epochs", "1"])
    assert sorted(os.listdir("runs")) == ["same", "same_2", "same_3"]


def test_stop_signal_saves_and_can_be_continued(tmp_path):
    def run(number):
        folder = tmp_path / number.name
        folder.mkdir()
        process = subprocess.Popen([sys.executable, SCRIPT, "--max-epochs", "100000", "--experiment", "r", "--num-envs", "64"], cwd=str(folder),
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
        for line in process.stdout:
            if line.startswith("epoch 5/"):
                process.send_signal(number)
                break
        rest = process.stdout.read()
        assert process.wait(60) == 128 + number, rest
        epoch = load_checkpoint(str(folder / "runs/r/nn/last.pth"))["epoch"]
        assert epoch >= 5 and f"stopped after epoch {epoch} ({number.name})" in rest
        out, _ = shell("--checkpoint", "runs/r", "--max-epochs", str(epoch + 1), cwd=folder)
        assert f"at epoch {epoch}," in out and "exactly" in out

    at_once(run, [signal.SIGINT, signal.SIGTERM])


# ---------------------------------------------------------------------------------------------------------- play


def test_play_takes_the_same_number_of_episodes_from_every_env(here, capsys):
    """Half of the envs end after 1 step (return 1), half after 9 (return 9): the mean is 5, however many short ones finish first."""
    Path("my_envs.py").write_text(textwrap.dedent("""
        import torch
        from test_train_ppo import Env
        def make(num_envs, device, seed):
            env = Env(num_envs, device, seed, lengths=torch.tensor([1, 9] * (num_envs // 2)))
            step = env.step
            def constant(actions):
                obs, reward, done, infos = step(actions)
                return obs, torch.ones_like(reward), done, infos
            env.step = constant
            return env
    """))
    main(["--env-id", "my_envs:make", *SMALL, "--experiment", "r"])
    args = train_ppo.parse_args(["--play", "--checkpoint", "runs/r", "--num-envs", "8", "--games", "21"])
    result = train_ppo.Runner(args).run()
    assert (result["mean"], result["min"], result["max"], result["count"], result["std"]) == (5, 1, 9, 24, 4)


def test_play_is_deterministic_unless_told_otherwise(here, capsys):
    main([*SMALL, "--experiment", "r", "--max-epochs", "1"])

    def played(*flags):
        capsys.readouterr()
        main(["--play", "--checkpoint", "runs/r", "--num-envs", "8", *flags])
        return capsys.readouterr().out

    assert played() == played() != played("--stochastic") and "sampled" in played("--stochastic")


# ---------------------------------------------------------------------------------------------------------- W&B


def test_wandb_offline_run_holds_every_scalar(tmp_path):
    shell(*SMALL, "--track", "--experiment", "r", "--wandb-group", "g", "--wandb-tags", "x", "y",
          "--save-best-after", "2", "--games-to-track", "8", cwd=tmp_path)
    shell("--checkpoint", "runs/r", "--max-epochs", "6", "--wandb-upload", "all", cwd=tmp_path)  # --track comes from the checkpoint
    first, second = (wandb_run(records) for records in wandb_records(tmp_path / "runs/r"))
    assert first[0] == second[0] == load_checkpoint(str(tmp_path / "runs/r/nn/last.pth"))["wandb_run_id"], "the run is continued, not begun anew"
    arguments = json.loads((tmp_path / "runs/r/config.json").read_text())["args"]
    assert arguments.items() <= first[1].items()
    rows = first[2] + second[2]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6] and [row["global_step"] for row in rows] == [256 * i for i in range(1, 7)]
    found = scalars(tmp_path / "runs/r")
    for tag, values in found.items():
        assert [np.float32(row[tag]) for row in rows if tag in row] == [np.float32(v) for _, v in values], tag
        axis = {"iter": "epoch", "time": "time"}.get(tag.split("/")[-1], "global_step")
        assert first[3].get(tag, axis) == second[3][tag] == axis
        steps = [row[axis] for row in rows if tag in row]
        if not tag.startswith("performance"):
            assert [int(step) for step in steps] == [step for step, _ in values], f"{tag} has the x-axis of TensorBoard"
    records, best = wandb_records(tmp_path / "runs/r")[1], load_checkpoint(str(tmp_path / "runs/r/nn/best.pth"))
    summary = {item.key: json.loads(item.value_json) for r in records if r.HasField("summary") for item in r.summary.update if item.key}
    assert summary["stop_reason"] == "--max-epochs 6 reached" and (summary["best_reward"], summary["best_epoch"]) == (best["last_mean_rewards"], best["best_epoch"])
    artifacts = {r.artifact.name: r.artifact for r in records if r.HasField("artifact") and r.artifact.type == "model"}
    assert set(artifacts) == {f"{first[0]}-{name}" for name in ("best", "last", "epoch_2", "epoch_4", "epoch_6")}
    uploaded = artifacts[f"{first[0]}-best"]
    assert json.loads(uploaded.metadata) == {"epoch": best["best_epoch"], "reward": best["last_mean_rewards"]}
    assert Path(uploaded.manifest.contents[0].local_path).read_bytes() == (tmp_path / "runs/r/nn/best.pth").read_bytes()


def test_wandb_run_id_from_the_environment_wins(here, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "mine1234")
    main([*SMALL, "--track", "--experiment", "r"])
    assert wandb_run(wandb_records("runs/r")[0])[0] == load_checkpoint("runs/r/nn/last.pth")["wandb_run_id"] == "mine1234"


def test_wandb_trouble_does_not_stop_training(tmp_path):
    def run(trouble):
        folder = tmp_path / trouble.replace(" ", "_")
        folder.mkdir()
        env = {"HOME": str(folder), "WANDB_MODE": "online", "WANDB_INIT_TIMEOUT": "5", "NETRC": str(folder / "none"), "WANDB_BASE_URL": "http://127.0.0.1:9"}
        if trouble == "no network":
            env["WANDB_API_KEY"] = "0" * 40
        if trouble == "not installed":
            (folder / "wandb.py").write_text("raise ImportError('no wandb')")
        _, err = shell(*SMALL, "--track", "--experiment", "r", cwd=folder, env=env)
        warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
        assert len(warnings) == 1 and ("W&B" in warnings[0] or "wandb" in warnings[0]), err
        assert load_checkpoint(str(folder / "runs/r/nn/last.pth"))["epoch"] == 4 and len(scalars(folder / "runs/r")["info/kl"]) == 4
        if trouble != "not installed":
            assert len(wandb_run(wandb_records(folder / "runs/r")[-1])[2]) == 4, "recorded offline instead"

    at_once(run, ["no account", "no network", "not installed"])


class WandbServer(http.server.ThreadingHTTPServer):
    """As much of a W&B server as its client needs. The trouble begins once the run is made, or at the start."""

    daemon_threads = True

    def __init__(self, trouble):
        super().__init__(("127.0.0.1", 0), WandbHandler)
        self.trouble, self.in_trouble, self.rows = trouble, trouble == "silent from the start", []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_):
        """Clients may hang up at any time."""


class WandbHandler(http.server.BaseHTTPRequestHandler):
    def answer(self):
        body, server = self.rfile.read(int(self.headers["Content-Length"] or 0)), self.server
        if server.in_trouble and server.trouble.startswith("silent"):
            time.sleep(600)
        if server.in_trouble and server.trouble == "gone":
            server.shutdown()
            server.server_close()  # from now on connections are refused
            raise ConnectionError
        status, data = 200, {}
        if self.path == "/graphql":
            query = json.loads(body)
            names, wanted = query.get("variables", {}), query["query"].split("(")[0].split("{")[0].split()[-1]
            project = {"id": "p", "name": names.get("project"), "entity": {"id": "e", "name": "e"}}
            bucket = {"id": "b", "name": names.get("name"), "displayName": names.get("name"), "project": project}
            files = [{"name": name, "uploadUrl": f"{server.url}/{name}"} for name in names.get("files", ())]
            data = {"data": {"UpsertBucket": {"upsertBucket": {"bucket": bucket, "inserted": True}}, "RunResumeStatus": {"model": None},
                             "CreateRunFiles": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}},
                             "ServerFeaturesQuery": {"serverInfo": {"features": []}}}.get(wanted, {})}
            server.in_trouble |= wanted == "UpsertBucket" and server.trouble != "none"
        elif self.path.endswith("/file_stream"):
            status = 404 if server.in_trouble else 200
            server.rows += [json.loads(row) for row in json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", ())]
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(data).encode())

    do_GET = do_POST = do_PUT = answer

    def log_message(self, *_):
        """Says nothing."""


SERVER_TROUBLES = ["none", "gone", "silent", "silent from the start", "run deleted"]


@pytest.fixture(scope="module")
def wandb_server_runs(tmp_path_factory):
    """{trouble: (folder, server, stderr, seconds from last.pth to the end)}; all at the same time, because they mostly wait."""
    base = tmp_path_factory.mktemp("wandb")

    def run(trouble):
        folder, server = base / trouble.replace(" ", "_"), WandbServer(trouble)
        folder.mkdir()
        patience = "" if trouble in ("none", "run deleted") else "train_ppo.WandbAlgoObserver.patience = 3; "
        script = ["-c", f"import train_ppo; {patience}train_ppo.main()"]
        env = {"HOME": str(folder), "WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": server.url, "PYTHONPATH": str(HERE),
               "WANDB_ERROR_REPORTING": "false"}  # W&B's telemetry, for which it waits 10 seconds more
        _, err = shell(*SMALL, "--track", "--experiment", "r", cwd=folder, env=env, script=script)
        return folder, server, err, time.time() - (folder / "runs/r/nn/last.pth").stat().st_mtime

    return dict(zip(SERVER_TROUBLES, at_once(run, SERVER_TROUBLES)))


@pytest.mark.parametrize("trouble", SERVER_TROUBLES)
def test_wandb_server_trouble_does_not_stop_training(wandb_server_runs, trouble):
    folder, server, err, waited = wandb_server_runs[trouble]
    warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
    saved = load_checkpoint(str(folder / "runs/r/nn/last.pth"))
    assert saved["epoch"] == 4 and saved["total_time"] < 10, "training went on, and did not wait"
    if trouble in ("gone", "silent"):
        assert 3 < waited < 30, "everything is saved before W&B is waited for, and that not for long"
        left = next((folder / "runs/r/wandb").glob("run-*")).relative_to(folder)
        assert len(warnings) == 1 and f"wandb sync --include-online {left}" in warnings[0], err
    elif trouble == "silent from the start":
        assert len(warnings) == 1 and "recording offline" in warnings[0], err
    else:
        assert not warnings and ("wandb sync" in err) == (trouble == "run deleted"), f"W&B itself says that the run is gone\n{err}"
    assert [row["epoch"] for row in wandb_run(wandb_records(folder / "runs/r")[-1])[2]] == [1, 2, 3, 4], "all of it is on disk"
    if trouble == "none":
        assert [(row["epoch"], row["global_step"]) for row in server.rows] == [(i, 256 * i) for i in range(1, 5)]
        assert server.rows[-1]["time"] > server.rows[0]["time"] and [row["rewards/step"] for row in server.rows if "rewards/step" in row] == [
            pytest.approx(value) for _, value in scalars(folder / "runs/r")["rewards/step"]]


# ---------------------------------------------------------------------------------------------------------- observers


def infos_env(num_envs, device, seed):
    """An env whose infos hold all that RLGPUAlgoObserver logs; keys come late, tensors are overwritten in place."""
    env = Env(num_envs, device, seed, lengths=torch.arange(num_envs) % 4 + 2)
    step, count, reused = env.step, [0], torch.zeros(num_envs)

    def with_infos(actions):
        obs, reward, done, infos = step(actions)
        count[0] += 1
        n = count[0]
        reused.fill_(float(n))
        infos["episode"] = {"early": torch.tensor(float(n)), "per_env": reused}
        if n > 3:
            infos["episode"]["late"] = 2.0
        infos["episode_cumulative"] = {"steps": torch.ones(num_envs)}
        infos["scores"] = torch.full((num_envs,), 7.0)
        infos["successes"] = torch.tensor(float(n))
        infos["nested"] = {"deep": n, "numpy": np.float32(n)}
        return obs, reward, done, infos

    env.step = with_infos
    return env


def test_rlgpu_observer_logs_what_the_env_reports(here):
    main(["--env-id", "test_train_ppo:infos_env", "--num-envs", "4", "--num-steps", "8", "--max-epochs", "2", "--experiment", "r"])
    found = scalars("runs/r")
    # the factory's contract check takes step 1, so the two epochs see n = 2..9 and 10..17
    assert found["Episode/early"] == found["Episode/per_env"] == [(1, 5.5), (2, 13.5)]
    assert found["Episode/late"] == [(1, 2.0), (2, 2.0)]
    assert found["successes/frame"] == [(32, 5.5), (64, 13.5)] and found["successes/iter"] == [(1, 5.5), (2, 13.5)]
    assert found["nested/deep/iter"] == found["nested/numpy/iter"] == [(1, 5.5), (2, 13.5)]
    # Envs with episodes of 2, 3, 4 and 5 steps. The first ones are a step short, the contract check took it; the sums start with training.
    lengths = [[1, 2, 2, 2], [2, 3, 3], [3, 4], [4]]
    flat = sum(lengths, [])
    assert found["episode_cumulative/steps"][0] == (32, pytest.approx(np.mean(flat)))
    assert found["episode_cumulative_min/steps_min"][0] == (32, 1) and found["episode_cumulative_max/steps_max"][0] == (32, 4)


def test_rl_games_observers_run_unchanged(here):
    algo_observer = pytest.importorskip("rl_games.common.algo_observer")
    args = train_ppo.parse_args(["--env-id", "test_train_ppo:infos_env", "--num-envs", "4", "--num-steps", "8", "--max-epochs", "2", "--experiment", "r"])
    theirs = [algo_observer.IsaacAlgoObserver(), algo_observer.DefaultAlgoObserver()]
    # IsaacAlgoObserver's own loop trips over keys that come late: give it an env without
    observers = [theirs[1], train_ppo.RLGPUAlgoObserver(), train_ppo.WandbAlgoObserver(args)]
    train_ppo.Runner(args, train_ppo.MultiObserver(observers)).run()
    found = scalars("runs/r")
    assert [v for _, v in found["scores/mean"]] == [7, 7] and found["scores/iter"] == [(1, 7), (2, 7)]
    assert [row["scores/mean"] for row in wandb_run(wandb_records("runs/r")[0])[2]] == [7, 7], "W&B has it too"

    import test_train_ppo

    early = test_train_ppo.infos_env

    def without_late_keys(*args, **kwargs):
        env = early(*args, **kwargs)
        step = env.step

        def stepped(actions):
            obs, reward, done, infos = step(actions)
            infos["episode"].pop("late", None)
            infos["episode"] = dict(infos["episode"])
            return obs, reward, done, infos

        env.step = stepped
        return env

    test_train_ppo.no_late_env = without_late_keys
    args = train_ppo.parse_args(["--env-id", "test_train_ppo:no_late_env", "--num-envs", "4", "--num-steps", "8", "--max-epochs", "2", "--experiment", "q"])
    observers = [theirs[0], train_ppo.WandbAlgoObserver(args)]
    train_ppo.Runner(args, train_ppo.MultiObserver(observers)).run()
    assert scalars("runs/q")["Episode/early"] == [(1, 5.5), (2, 13.5)] and scalars("runs/q")["successes/iter"] == [(1, 9), (2, 17)]
    assert [row["Episode/early"] for row in wandb_run(wandb_records("runs/q")[0])[2]] == [5.5, 13.5]


def test_hooks_are_called_in_order_with_rl_games_signatures(here):
    calls = []

    class Recorder(train_ppo.AlgoObserver):
        def before_init(self, base_name, config, experiment_name):
            assert config["horizon_length"] == config["num_steps"] == 8 and experiment_name == config["name"] == "r"
            calls.append("before_init")

        def after_init(self, algo):
            for name in ("writer", "device", "ppo_device", "games_to_track", "epoch_num", "frame", "model", "optimizer", "mean_rewards",
                         "last_mean_rewards", "num_agents", "config"):
                assert hasattr(algo, name), name
            self.algo = algo
            calls.append("after_init")

        def process_infos(self, infos, done_indices):
            assert torch.equal(done_indices, self.algo.dones.nonzero()) and done_indices.shape[1] == 1
            calls.append("process_infos")

        def after_steps(self):
            calls.append("after_steps")

        def after_print_stats(self, frame, epoch_num, total_time):
            assert frame == epoch_num * 256 and total_time > 0
            calls.append("after_print_stats")

    train_ppo.Runner(train_ppo.parse_args([*SMALL, "--experiment", "r", "--max-epochs", "2"]), train_ppo.MultiObserver([Recorder()])).run()
    assert calls == ["before_init", "after_init"] + 2 * (8 * ["process_infos"] + ["after_steps", "after_print_stats"])


# ---------------------------------------------------------------------------------------------------------- the algorithm


def test_gae_by_hand():
    rewards, values = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[0.5], [1.5], [2.5]])
    dones = torch.tensor([[0.0], [1.0], [0.0]])
    third = 3.0 + 0.9 * 4.0 - 2.5
    second = 2.0 - 1.5  # the episode ended: neither the next value nor the next advantage counts
    first = 1.0 + 0.9 * 1.5 - 0.5 + 0.9 * 0.8 * second
    assert torch.allclose(gae(rewards, values, dones, torch.tensor([4.0]), 0.9, 0.8).flatten(), torch.tensor([first, second, third]))


def agent_of(here, **arguments):
    """A PPOAgent on `Env`, built as the Runner builds it."""
    args = Args(env_id="-", num_envs=4, num_steps=8, minibatch_size=8, train_dir=str(here), **arguments)
    torch.manual_seed(0)
    config = {"run_dir": str(here), "wandb_run_id": "x"}
    return train_ppo.PPOAgent(args, Env(4, "cpu", 0, lengths=torch.tensor([3, 5, 50, 50])), train_ppo.AlgoObserver(), train_ppo.Writer(str(here)), config)


def test_time_limits_are_bootstrapped_with_the_value_of_the_last_state(here):
    """The shaped return of a finished episode is scale * sum of rewards + gamma * V(s at its last step)."""
    agent = agent_of(here, reward_scale=0.5, gamma=0.9)
    agent.rollout()
    expected = 0.5 * agent.buffer["rewards"][:3, 0].sum() + 0.9 * agent.buffer["values"][2, 0]
    assert agent.buffer["time_outs"][2, 0] == 1
    agent.update()
    assert torch.isclose(agent.episodes.finished.rows[0, 1], expected)


def test_missing_time_outs_are_warned_about_once(here, capsys):
    Path("my_envs.py").write_text(textwrap.dedent("""
        from test_train_ppo import Env
        def make(num_envs, device, seed):
            env = Env(num_envs, device, seed, max_episode_length=20)
            step = env.step
            env.step = lambda actions: (*step(actions)[:3], {})
            return env
    """))
    main(["--env-id", "my_envs:make", *SMALL, "--max-epochs", "9"])
    assert capsys.readouterr().err.count("no infos['time_outs']") == 1


def test_rollout_keeps_copies_of_what_the_env_overwrites(here):
    agent = agent_of(here)
    agent.rollout()
    assert len({tuple(row.flatten().tolist()) for row in agent.buffer["obs"]}) == 8, "eight different observations, not one eight times"
    assert torch.allclose(agent.buffer["rewards"], 1 - (agent.buffer["actions"].clamp(-1, 1) - agent.buffer["obs"]).abs().mean(-1))


def test_running_mean_std_merges_batches():
    """It starts as if one sample with mean 0 and variance 1 had been seen; each batch counts with its unbiased variance, as in rl_games."""
    torch.manual_seed(0)
    data = torch.randn(1000, 3, dtype=torch.float64) * 5 + 2
    running, mean, var, count = RunningMeanStd(3), 0.0, 1.0, 1
    for chunk in data.split(137):
        running.update(chunk)
        n, delta = len(chunk), chunk.mean(0) - mean
        var = (var * count + chunk.var(0) * n + delta.square() * count * n / (count + n)) / (count + n)
        mean, count = mean + delta * n / (count + n), count + n
    assert torch.allclose(running.running_mean, mean) and torch.allclose(running.running_var, var) and running.count == 1001
    x = data[:5].float()
    assert torch.allclose(running.denormalize(running.normalize(x)), x, atol=1e-4)
    assert running.normalize(torch.full((1, 3), 1e6)).max() == 5


def test_window_meter_is_a_deque():
    from collections import deque

    torch.manual_seed(0)
    meter, reference, total = WindowMeter(7, 1, torch.device("cpu")), deque(maxlen=7), 0
    for rows in (3, 0, 2, 9, 1, 30, 4):
        values, mask = torch.randn(rows + 3, 1), torch.rand(rows + 3) < 0.6
        meter.add(values, mask)
        reference.extend(values[mask].flatten().tolist())
        total += int(mask.sum())
        assert meter.rows.flatten().tolist() == list(reference) and meter.count == total


def test_episode_meter_counts_across_rollouts():
    meter = EpisodeMeter(2, 10, 3, torch.device("cpu"))
    rewards = torch.tensor([[1.0, 10.0], [2.0, 20.0]])
    meter.add_rollout(rewards, 2 * rewards, torch.ones(2, 2), dones=torch.zeros(2, 2))
    sums = meter.add_rollout(rewards, 2 * rewards, torch.ones(2, 2), dones=torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert sums[:, :, 2].tolist() == [[3, 3], [4, 1]], "lengths, step by step"
    assert meter.finished.rows.tolist() == [[40, 80, 3], [6, 12, 4]]
    assert meter.running.tolist() == [[0, 0, 0], [20, 40, 1]]


def test_schedules():
    def step(lr, kl, epoch=1, **arguments):
        return float(train_ppo.next_lr(torch.tensor(lr), torch.tensor(kl), epoch, Args(**arguments)))

    assert step(1e-3, 0.017) == pytest.approx(1e-3 / 1.5)
    assert step(1e-3, 0.003) == pytest.approx(1.5e-3)
    assert step(1e-3, 0.008) == pytest.approx(1e-3)
    assert step(9e-3, 0.0) == pytest.approx(1e-2) and step(9e-3, 0.0, max_lr=9.5e-3) == pytest.approx(9.5e-3)
    assert step(1.2e-6, 1.0) == pytest.approx(1e-6) and step(1.2e-5, 1.0, min_lr=1e-5) == pytest.approx(1e-5)
    assert step(1.0, 1.0, 30, lr_schedule="linear", learning_rate=1e-3) == pytest.approx(1e-6 + (1e-3 - 1e-6) * 0.7)
    assert step(1e-3, 1.0, lr_schedule="fixed") == pytest.approx(1e-3)


def test_policy_kl_is_that_of_two_gaussians():
    torch.manual_seed(0)
    mu, old_mu = torch.randn(2, 9, 3)
    sigma, old_sigma = torch.randn(2, 9, 3).exp()
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mu, sigma), normal(old_mu, old_sigma)).sum(-1).mean()
    assert train_ppo.policy_kl(mu, sigma, old_mu, old_sigma) == pytest.approx(float(expected), rel=1e-3)  # rl_games adds 1e-5 here and there
    assert torch.allclose(train_ppo.log_prob(old_mu, mu, sigma.log()), normal(mu, sigma).log_prob(old_mu).sum(-1), atol=1e-5)


needs_rl_games = pytest.mark.skipif(train_ppo.importlib.util.find_spec("rl_games") is None, reason="needs rl-games 1.6.1, see the README's test command")


@needs_rl_games
@pytest.mark.parametrize("row", ["default", "adaptive legacy", "adaptive standard", "small KL threshold", "linear", "separate", "entropy", "no value normalisation", "no action clipping"])
def test_weights_are_those_of_rl_games(row):
    """From the same weights and random draws rl_games 1.6.1 gets the same weights, statistics and learning rates.

    Adam is given the arithmetic of rl_games' one, so that rounding has nothing to start from; without that it is a few 1e-7.
    """
    differences, ours, theirs = fidelity.compare(fidelity.ROWS[row], same_adam=True)
    assert differences[0] <= 1e-6 and max(differences[:3]) <= 1e-5, differences
    assert ours == pytest.approx(theirs, rel=1e-6)
    if row in ("default", "adaptive legacy"):
        differences, ours, theirs = fidelity.compare(fidelity.ROWS[row])
        assert differences[0] <= 1e-5, differences


def test_mixed_precision_does_nothing_on_a_cpu(here, capsys):
    """IsaacGymEnvs' Ant sets it; without bfloat16 instructions a CPU would be ten times slower with it."""
    for name, flag in (("plain", "--no-mixed-precision"), ("mixed", "--mixed-precision")):
        main([*SMALL, "--device", "cpu", "--experiment", name, flag])
        assert capsys.readouterr().out.count("--mixed-precision does nothing on a CPU") == (name == "mixed")
    plain, mixed = (load_checkpoint(f"runs/{name}/nn/last.pth")["model"] for name in ("plain", "mixed"))
    assert differences(plain, mixed) == []


def rl_games_runner(observer=None, **config):
    """rl_games' own Runner, on our Cartpole with its default settings; `config` as in its yaml files."""
    pytest.importorskip("rl_games.torch_runner")
    ours = {"units": config.pop("units", (32, 32)), "separate": config.pop("separate", False)}
    args = Args(num_envs=config.get("num_actors", 512), max_epochs=20, seed=7, **ours)
    config = {"save_frequency": 10, "save_best_after": 5, "train_dir": "theirs", **config}
    return fidelity.rl_games_runner(Cartpole(args.num_envs, torch.device("cpu")), args, observer, **config)


def rl_games_player(path, **config):
    """-> f(raw observations) = (deterministic actions, values), by rl_games' own player with the checkpoint at `path`."""
    player = rl_games_runner(player=dict(use_vecenv=True), **config).create_player()
    player.restore(str(path))
    player.has_batch_dimension = True

    def act(obs):
        result = player.model(dict(is_train=False, obs=obs.clone(), prev_actions=None, rnn_states=None))
        return player.get_action(obs.clone(), is_deterministic=True), result["values"].squeeze(-1)

    return act


def our_player(path):
    state = load_checkpoint(str(path))
    args = Args(**{k: tuple(v) if isinstance(v, list) else v for k, v in state["args"].items()})
    model = train_ppo.make_model(args, state["num_obs"], state["num_acts"], state)
    return lambda obs: (model(model.norm_obs(obs))[0].clamp(-1, 1), model.value(obs))


def newest(pattern):
    return max(Path().glob(pattern), key=lambda path: path.stat().st_mtime)


class Recorder(train_ppo.AlgoObserver):
    """Notes each epoch of whichever trainer calls it; rl_games' Runner takes it as ours does."""

    def __init__(self):
        self.epochs, self.counts, self.ended = [], [], []

    def process_infos(self, infos, done_indices):
        self.ended.append(float(self.algo.dones.float().mean()))

    def after_print_stats(self, frame, epoch_num, total_time):
        self.epochs.append(epoch_num)
        self.counts.append(float(self.algo.model.state_dict()["running_mean_std.count"]))


def test_checkpoints_move_between_rl_games_and_here(here, capsys):
    """20 epochs there, 20 here, 10 there: nothing starts over, and after each hand-over both sides act alike."""
    recorder, obs = Recorder(), torch.randn(1000, 4) * torch.tensor([2.0, 2.0, 0.5, 3.0])

    def agree(path):
        for theirs, ours in zip(rl_games_player(path)(obs), our_player(path)(obs)):
            assert (theirs - ours).abs().max() <= 1e-6

    rl_games_runner(recorder).run(dict(train=True, play=False))
    first = newest("theirs/*/nn/last_theirs_ep_20_*.pth")
    agree(first)
    capsys.readouterr()

    args = train_ppo.parse_args(["--checkpoint", str(first), "--max-epochs", "40", "--experiment", "ours"])
    train_ppo.Runner(args, train_ppo.MultiObserver([recorder, train_ppo.RLGPUAlgoObserver()])).run()
    out = capsys.readouterr().out
    assert "epoch 20, frame 163,840" in out and "from rl_games: weights, normalisers, Adam and best reward are taken over" in out
    saved = torch.load(str(first), weights_only=False)
    assert f"learning rate {saved['optimizer']['param_groups'][0]['lr']:.1e}" in out
    agree("runs/ours/nn/last.pth")

    rl_games_runner(recorder, max_epochs=50).run(dict(train=True, play=False, checkpoint="runs/ours/nn/last.pth"))
    last = newest("theirs/*/nn/last_theirs_ep_50_*.pth")
    agree(last)
    assert recorder.epochs == list(range(1, 51))
    assert all(before < after for before, after in zip(recorder.counts, recorder.counts[1:])), "the normaliser starts over"
    theirs, ours = torch.load(str(last), weights_only=False), load_checkpoint("runs/ours/nn/last.pth")
    assert [int(s["step"]) for s in theirs["optimizer"]["state"].values()] == [8 * 50] * 9, "Adam starts over"
    assert theirs["frame"] == 50 * 8192
    assert [int(s["step"]) for s in ours["optimizer"]["state"].values()] == [8 * 40] * 9
    # An episode in which the policy failed is short: had a hand-over lost the policy, many would end in the epochs after it.
    ended = np.array(recorder.ended).reshape(50, 16).mean(1)
    assert ended[:5].mean() > 0.02 and ended[20:].max() < 0.012
    runs = [scalars(path) for path in (first.parent.parent, "runs/ours", last.parent.parent)]
    for before, after in zip(runs, runs[1:]):  # an entropy that starts over would jump to 1.42, a critic to several times its loss
        last_value, first_value = ({tag: values[i][1] for tag, values in run.items()} for run, i in ((before, -1), (after, 0)))
        assert abs(first_value["losses/entropy"] - last_value["losses/entropy"]) < 0.25
        assert first_value["losses/c_loss"] < 1.5 * last_value["losses/c_loss"]


def test_checkpoints_of_compiled_and_mixed_precision_rl_games(here, capsys):
    """What 1.6.5 writes by default: `_orig_mod.` before every name, and a numpy number. With mixed precision also the scaler."""
    rl_games_runner(max_epochs=6, units=(16, 8), separate=True, num_actors=64, minibatch_size=1024).run(dict(train=True, play=False))
    path = newest("theirs/*/nn/last*.pth")
    state = torch.load(str(path), weights_only=False)
    state["model"] = {f"_orig_mod.{key}": value for key, value in state["model"].items()}
    torch.save({**state, "last_mean_rewards": -100500}, "never.pth")  # what rl_games starts from: it never had a best
    assert load_checkpoint("never.pth")["last_mean_rewards"] == -math.inf
    state.update(last_mean_rewards=np.float32(12.5), scaler={"scale": 65536.0})
    torch.save(state, "compiled.pth")
    main(["--checkpoint", "compiled.pth", "--max-epochs", "8", "--num-envs", "64", "--minibatch-size", "1024", "--experiment", "r"])
    ours = load_checkpoint("runs/r/nn/last.pth")
    assert (ours["epoch"], ours["last_mean_rewards"], ours["args"]["units"], ours["args"]["separate"]) == (8, 12.5, [16, 8], True)
    main(["--play", "--checkpoint", "compiled.pth", "--num-envs", "8"])
    assert "8 episodes" in capsys.readouterr().out
    main(["--init-from", "compiled.pth", "--max-epochs", "1", "--num-envs", "64", "--minibatch-size", "1024", "--experiment", "from"])
    obs = torch.randn(100, 4)
    assert torch.allclose(rl_games_player(str(path), units=(16, 8), separate=True)(obs)[0], our_player("compiled.pth")(obs)[0], atol=1e-6)


@pytest.mark.parametrize("change, name", [
    (lambda s: s["model"].update({"a2c_network.rnn.weight_ih_l0": torch.zeros(4)}), "a2c_network.rnn.weight_ih_l0"),
    (lambda s: s.update(assymetric_vf_nets={}), "assymetric_vf_nets"),
    (lambda s: s["model"].pop("a2c_network.sigma"), "a2c_network.sigma"),
    (lambda s: s.update(running_mean_std={}), "running_mean_std"),
], ids=["recurrent", "central value", "discrete", "before 1.3"])
def test_rl_games_networks_that_are_not_ours_are_refused_by_name(here, capsys, change, name):
    model = train_ppo.ActorCritic(4, 1)
    optimizer = torch.optim.Adam(model.parameters()).state_dict()
    state = dict(model=dict(model.state_dict()), optimizer=optimizer, epoch=1, frame=1, last_mean_rewards=np.float64(1), env_state=None)
    torch.save(state, "fine.pth")
    assert load_checkpoint("fine.pth")["args"]["units"] == [32, 32]
    change(state)
    torch.save(state, "odd.pth")
    with pytest.raises(SystemExit):
        main(["--checkpoint", "odd.pth"])
    err = capsys.readouterr().err
    assert err.startswith("error: odd.pth is of an rl_games network that this file does not have") and name in err and err.count("\n") == 1


def test_our_observers_run_in_rl_games(here):
    """The other way round: our RLGPUAlgoObserver and MultiObserver in rl_games' Runner, unchanged."""
    recorder = Recorder()
    rl_games_runner(train_ppo.MultiObserver([train_ppo.RLGPUAlgoObserver(), recorder]), max_epochs=3).run(dict(train=True, play=False))
    assert recorder.epochs == [1, 2, 3]


def test_parameters_have_rl_games_names_in_its_order(here):
    """Against rl_games' own model: same names, shapes and parameter order, or checkpoints could not move."""
    builder = pytest.importorskip("rl_games.algos_torch.model_builder")
    for separate in (False, True):
        theirs = builder.ModelBuilder().load(fidelity.rl_games_params(Args(units=(16, 8), separate=separate))).build(
            dict(actions_num=2, input_shape=(5,), num_seqs=1, value_size=1, normalize_value=True, normalize_input=True))
        ours = train_ppo.ActorCritic(5, 2, (16, 8), separate=separate)
        assert [(n, p.shape) for n, p in ours.named_parameters()] == [(n, p.shape) for n, p in theirs.named_parameters()]
        assert {n: (p.shape, p.dtype) for n, p in ours.state_dict().items()} == {n: (p.shape, p.dtype) for n, p in theirs.state_dict().items()}
        theirs.load_state_dict(ours.state_dict())
        obs = torch.randn(50, 5)
        result = theirs.eval()(dict(is_train=False, obs=obs.clone(), prev_actions=None, rnn_states=None))
        mu, logstd, value = ours(ours.norm_obs(obs))
        assert torch.allclose(result["mus"], mu, atol=1e-6) and torch.allclose(result["values"].squeeze(), ours.denorm_value(value), atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- export


def exported(folder):
    """{file: f(raw observations) -> actions} of an exported policy, run as a robot would: without train_ppo."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session, scripted = onnxruntime.InferenceSession(f"{folder}/policy.onnx"), torch.jit.load(f"{folder}/policy.pt")
    return {"policy.onnx": lambda obs: torch.from_numpy(session.run(None, {"obs": obs.numpy()})[0]), "policy.pt": scripted}


def random_checkpoint(path, num_obs=60, num_acts=8, units=(256, 128, 64), activation="elu", **sizes):
    """An rl_games checkpoint of a policy whose weights and normaliser are random."""
    model = train_ppo.ActorCritic(num_obs, num_acts, units, activation, **sizes)
    model.running_mean_std.update(torch.randn(1000, num_obs) * torch.logspace(-2, 2, num_obs) + torch.linspace(-3, 3, num_obs))
    state = dict(model=dict(model.state_dict()), optimizer=torch.optim.Adam(model.parameters()).state_dict(), epoch=3, frame=9, last_mean_rewards=np.float32(7.5))
    torch.save(state, path)
    return model


def test_exported_policy_acts_as_in_play(small_run, here, capsys):
    """Of our own checkpoint; the env's clipping of observations is in the file, so is the normalisation."""
    pytest.importorskip("onnxruntime")
    state = load_checkpoint(str(small_run / "runs/r/nn/last.pth"))
    state["args"]["env_id"] = "gone:make_env"  # neither the env nor Isaac Gym is needed
    torch.save(state, "last.pth")
    out, _ = shell("--export", "out/policy", "--checkpoint", "last.pth", cwd=Path.cwd())
    assert "exported last.pth, epoch 4, to out/policy: largest difference to it" in out and "(policy.onnx)" in out and out.count("\n") == 1
    about = json.loads(Path("out/policy/policy.json").read_text())
    assert (about["input"]["size"], about["input"]["clip"], about["output"]["size"], about["output"]["clip"]) == (4, 5.0, 1, 1.0)
    assert (about["epoch"], about["env_id"]) == (4, "gone:make_env") and max(about["largest_difference"].values()) <= 1e-5
    act = our_player("last.pth")
    for n in (1, 7, 513):
        obs = torch.randn(n, 4) * 10
        for name, f in exported("out/policy").items():
            assert f(obs).shape == (n, 1) and (f(obs) - act(obs.clamp(-5, 5))[0]).abs().max() <= 1e-5, name
    snippet = next(s for s in snippets("python") if "onnxruntime" in s)
    action = subprocess.run([sys.executable, "-c", snippet], cwd="out", stdout=subprocess.PIPE, universal_newlines=True, check=True).stdout
    assert float(action.strip("[]\n")) == pytest.approx(float(act(torch.zeros(1, 4))[0]), abs=1e-5), "the README's lines for the robot"
    assert sorted(os.listdir("out")) == ["policy"] and sorted(os.listdir("out/policy")) == ["policy.json", "policy.onnx", "policy.pt"]
    with pytest.raises(SystemExit):
        main(["--export", "out/policy", "--checkpoint", "last.pth"])
    assert capsys.readouterr().err == "error: --export out/policy exists already: give a new folder\n"


@pytest.mark.parametrize("activation", train_ppo.ActorCritic.ACTIVATIONS)
def test_exported_policy_of_an_rl_games_checkpoint(here, capsys, activation):
    """Ant-sized, random weights, each activation; one of them with a value network of its own."""
    pytest.importorskip("onnxruntime")
    model = random_checkpoint("theirs.pth", activation=activation, separate=activation == "relu")
    main(["--export", "out", "--checkpoint", "theirs.pth", "--activation", activation, "--no-clip-actions"])
    out = capsys.readouterr().out
    assert "no clipping of observations" in out and "epoch 3" in out
    obs = torch.randn(1000, 60) * 10.0 ** torch.randint(-3, 5, (1000, 1))
    for name, f in exported("out").items():
        assert (f(obs) - model(model.norm_obs(obs))[0]).abs().max() <= 1e-5, name
    about = json.loads(Path("out/policy.json").read_text())
    assert about["mean_reward"] == 7.5 and about["input"]["clip"] is None and about["output"]["clip"] is None


def test_export_without_onnx_still_writes_torchscript(here, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    random_checkpoint("theirs.pth", 3, 2, (8,))
    main(["--export", "out", "--checkpoint", "theirs.pth"])
    assert capsys.readouterr().err == "warning: policy.onnx is not written, onnxruntime is missing: pip install onnx onnxruntime\n"
    assert sorted(os.listdir("out")) == ["policy.json", "policy.pt"]


def test_export_that_differs_leaves_no_file(here, monkeypatch, capsys):
    random_checkpoint("theirs.pth", 3, 2, (8,))
    traced = torch.jit.trace

    def wrong(policy, example):  # as if the export had lost the normaliser
        policy.model.normalize_input = False
        return traced(policy, example)

    monkeypatch.setattr(torch.jit, "trace", wrong)
    with pytest.raises(SystemExit) as stopped:
        main(["--export", "out", "--checkpoint", "theirs.pth"])
    assert stopped.value.code == 1 and "error: the exported policy differs from theirs.pth by" in capsys.readouterr().err
    assert sorted(os.listdir()) == ["theirs.pth"]


def test_compile_learns_the_same_and_continues_without_it(here, capsys):
    """Same weights but for rounding; a checkpoint has no trace of it."""
    if train_ppo.compiled([gae], torch.device("cpu")) == [gae]:
        pytest.skip("no compiler")
    main([*SMALL, "--experiment", "eager"])
    main([*SMALL, "--experiment", "compiled", "--compile"])
    eager, compiled = (load_checkpoint(f"runs/{name}/nn/last.pth") for name in ("eager", "compiled"))
    assert eager["model"].keys() == compiled["model"].keys()
    for name, value in eager["model"].items():
        assert torch.allclose(value, compiled["model"][name], atol=1e-4), name
    main(["--checkpoint", "runs/compiled", "--max-epochs", "5", "--no-compile"])
    assert "exactly where it stopped" in capsys.readouterr().out


def test_compile_without_a_compiler_warns_once(here):
    out, err = shell(*SMALL, "--compile", "--experiment", "r", cwd=here, env={"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(here / "cache")})
    assert err.count("warning: --compile: torch.compile does not work here") == 1 and "epoch 4/4" in out


# ---------------------------------------------------------------------------------------------------------- environments


def test_cartpole_follows_the_equations_of_motion():
    """Against an independent double-precision integration of the Lagrangian with 100 times smaller steps."""
    env = Cartpole(1, torch.device("cpu"))
    env.step(torch.zeros(1, 1))
    env.state = torch.tensor([[0.1], [-0.3], [0.2], [0.4]])
    x, v, angle, omega = env.state.double().flatten().tolist()
    for force in (0.02, -0.03, 0.01):
        env.step(torch.tensor([[force]]))
        for _ in range(200):
            c, s = math.cos(angle), math.sin(angle)
            mass = np.array([[2.0, -0.47 * c], [-0.47 * c, (0.06**2 + 1) / 12 + 0.47**2]])
            a, alpha = np.linalg.solve(mass, [400 * force - 0.47 * s * omega**2, 9.81 * 0.47 * s])
            v, omega = v + a * 0.0166 / 200, omega + alpha * 0.0166 / 200
            x, angle = x + v * 0.0166 / 200, angle + omega * 0.0166 / 200
        assert env.state.flatten().tolist() == pytest.approx([x, v, angle, omega], abs=0.03)


def test_cartpole_keeps_isaacgymenvs_contract():
    torch.manual_seed(0)
    env = Cartpole(3, torch.device("cpu"))
    assert env.reset()["obs"].abs().sum() == 0, "reset() resets nothing"
    obs, reward, done, infos = env.step(torch.ones(3, 1))
    assert obs["obs"].shape == (3, 4) and obs["obs"].abs().max() <= 0.25 and done.dtype == torch.int64 and infos["time_outs"].dtype == torch.bool
    env.state[0, 0], env.state[2, 1] = 3.1, 2.0  # env 0: cart off the track; env 1: pole down
    obs, reward, done, infos = env.step(torch.zeros(3, 1))
    assert reward[:2].tolist() == [-2, -2] and done.tolist() == [1, 1, 0] and not infos["time_outs"].any()
    assert obs["obs"][0, 0] > 3, "the observation with done=1 is the episode's last one"
    obs, reward, done, infos = env.step(torch.ones(3, 1))
    assert obs["obs"][:2].abs().max() <= 0.25 and done.tolist() == [0, 0, 0], "the next step resets, whatever the action"
    steps = 0
    while True:
        env.state.zero_()  # held upright, it ends by the clock
        obs, reward, done, infos = env.step(torch.zeros(3, 1))
        steps += 1
        if done[0]:
            break
    assert steps == 499 and infos["time_outs"].tolist() == [True, True, False]  # env 2 ended earlier and began anew


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


# A stand-in for NVIDIA's isaacgym and IsaacGymEnvs, with the facts about them that break naive trainers.
ISAACGYM = {
    "isaacgym/__init__.py": """
        import sys
        if "torch" in sys.modules:
            raise ImportError("PyTorch was imported before isaacgym modules.  Please import torch after isaacgym modules.")
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
        from isaacgym.torch_utils import get_axis_params
        OmegaConf.register_new_resolver("eq", lambda x, y: x.lower() == y.lower())
        OmegaConf.register_new_resolver("contains", lambda x, y: x.lower() in y.lower())
        OmegaConf.register_new_resolver("if", lambda pred, a, b: a if pred else b)
        OmegaConf.register_new_resolver("resolve_default", lambda default, arg: default if arg == "" else arg)
        MADE = []
        def make(seed, task, num_envs, sim_device, rl_device, graphics_device_id=-1, headless=False, multi_gpu=False,
                 virtual_screen_capture=False, force_render=True, cfg=None):
            print("Importing module 'gym_38' (stand-in)")
            if MADE:
                raise RuntimeError("Failed to create sim: one simulation per process")
            MADE.append(1)
            import rl_games
            cfg = OmegaConf.to_container(cfg.task, resolve=True)
            assert cfg["env"]["numEnvs"] == num_envs
            assert not cfg["sim"]["use_gpu_pipeline"] and not cfg["sim"]["physx"]["use_gpu"], "a GPU pipeline without a GPU"
            assert torch.initial_seed() == int(seed), "make(seed) seeds nothing: whoever calls it must"
            return Task(cfg, virtual_screen_capture and not headless)
        class Task:
            # reward 1 - mean |action - obs|; auto-resets on the step after done; all buffers are reused
            num_acts = num_actions = 2
            num_obs = num_observations = 3
            max_episode_length = 30
            def __init__(self, cfg, has_screen):
                self.has_screen = has_screen
                n = self.num_envs = cfg["env"]["numEnvs"]
                self.obs_buf, self.rew_buf = torch.zeros(n, 3), torch.zeros(n)
                self.reset_buf, self.progress_buf = torch.ones(n, dtype=torch.long), torch.zeros(n, dtype=torch.long)
                self.extras, self.obs_dict, self.curriculum, self.frames = {}, {}, 0, 0
            def reset(self):
                self.obs_dict["obs"] = torch.clamp(self.obs_buf, -5, 5)
                return self.obs_dict
            def step(self, actions):
                assert actions.abs().max() <= 1 and not actions.requires_grad
                self.rew_buf[:] = 1 - (actions - self.obs_buf[:, :2]).abs().mean(1)
                self.progress_buf += 1
                ids = self.reset_buf.nonzero().squeeze(-1)
                if len(ids):
                    self.rew_buf[ids], self.reset_buf[ids], self.progress_buf[ids] = 0.0, 0, 0
                self.obs_buf[:] = torch.rand(self.num_envs, 3) - 0.5
                self.reset_buf[:] = torch.where(self.progress_buf >= self.max_episode_length - 1, 1, self.reset_buf)
                self.extras["time_outs"] = (self.progress_buf >= self.max_episode_length - 1) & (self.reset_buf != 0)
                self.extras["episode"] = {"level": torch.tensor(float(self.curriculum))}
                self.obs_dict["obs"] = torch.clamp(self.obs_buf, -5, 5)
                return self.obs_dict, self.rew_buf, self.reset_buf, self.extras
            def render(self, mode="rgb_array"):
                if self.has_screen and mode == "rgb_array":  # else None, also for a viewer without a virtual screen
                    return torch.full((8, 12, 3), int(self.progress_buf[0])).numpy()
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
LSTM = ISAACGYM["isaacgymenvs/cfg/train/AntPPO.yaml"].replace("separate: False", "separate: False\n            rnn: {name: lstm, units: 8, layers: 1}")
CENTRAL = ISAACGYM["isaacgymenvs/cfg/train/AntPPO.yaml"].replace("ppo: True", "ppo: True\n            central_value_config: {minibatch_size: 256}")


@pytest.fixture
def isaacgym(tmp_path):
    """A working directory whose PYTHONPATH has the stand-ins, and the tasks Ant, AntLSTM and AntCentral."""
    files = dict(ISAACGYM)
    for name, train in (("AntLSTM", LSTM), ("AntCentral", CENTRAL)):
        files[f"isaacgymenvs/cfg/task/{name}.yaml"] = files["isaacgymenvs/cfg/task/Ant.yaml"].replace("name: Ant", f"name: {name}")
        files[f"isaacgymenvs/cfg/train/{name}PPO.yaml"] = train
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return tmp_path


pytest_hydra = pytest.mark.skipif(train_ppo.importlib.util.find_spec("hydra") is None, reason="needs hydra-core")


@pytest_hydra
def test_isaacgym_task_trains_with_its_own_settings(isaacgym):
    out, err = shell("--env-id", "Ant", "--num-steps", "16", "--experiment", "r", cwd=isaacgym)
    args = load_checkpoint(str(isaacgym / "runs/r/nn/last.pth"))["args"]
    expected = dict(num_steps=16, units=[24, 12], sigma_init=-0.5, mixed_precision=True, reward_scale=0.01, gamma=0.98, gae_lambda=0.9, learning_rate=3e-4,
                    schedule_type="standard", kl_threshold=0.016, max_epochs=6, save_best_after=2, save_frequency=3, max_grad_norm=1.0, ent_coef=0.001,
                    clip_coef=0.1, minibatch_size=256, update_epochs=3, vf_coef=2.0, bounds_loss_coef=1e-4, num_envs=64)
    assert {k: args[k] for k in expected} == expected  # all from the yaml, but num_steps, which the flag gave
    assert "AntPPO.yaml sets something_new = 1" in err and err.count("warning:") == 1
    found = scalars(isaacgym / "runs/r")
    assert [v for _, v in found["Episode/level"]] == [1, 2, 3, 4, 5, 6]
    assert (isaacgym / "runs/r/nn/best.pth").exists()

    out, err = shell("--checkpoint", "runs/r", "--max-epochs", "8", "--capture-video", "--video-frequency", "2", "--video-length", "4", cwd=isaacgym)
    assert "the env cannot be restored: it starts new episodes" in out
    with Image.open(str(isaacgym / "runs/r/videos/epoch_7.gif")) as gif:
        assert gif.size == (12, 8) and gif.n_frames == 4 and "warning" not in err, "drawn on a virtual screen, for which there must be a viewer"
    assert [v for _, v in scalars(isaacgym / "runs/r")["Episode/level"]] == [1, 2, 3, 4, 5, 6, 7, 8], "the curriculum goes on"
    out, _ = shell("--play", "--checkpoint", "runs/r", "--num-envs", "5", cwd=isaacgym)
    assert "mean length 30.0, 5 episodes" in out


@pytest_hydra
def test_rl_games_checkpoint_of_an_isaacgym_task_takes_the_yamls_settings(isaacgym):
    """The file knows its layers, the yaml the rest."""
    random_checkpoint(isaacgym / "theirs.pth", 3, 2, (16, 8))
    out, _ = shell("--env-id", "Ant", "--checkpoint", "theirs.pth", "--experiment", "r", cwd=isaacgym)
    args = load_checkpoint(str(isaacgym / "runs/r/nn/last.pth"))["args"]
    assert "epoch 4/6" in out and "epoch 3/6" not in out and "best 7.50" in out
    assert (args["units"], args["gamma"], args["num_envs"], args["env_id"], args["mixed_precision"]) == ([16, 8], 0.98, 64, "Ant", True)


@pytest_hydra
def test_isaacgym_task_that_cannot_be_trained_is_refused(isaacgym):
    """Also where Isaac Gym is installed and the built-in Cartpole is asked for by the name of a task that this IsaacGymEnvs lacks."""
    before = snapshot(isaacgym)
    reasons = {"AntLSTM": "a recurrent network (LSTM or GRU)", "AntCentral": "a central value network", "Anymal": "IsaacGymEnvs has Ant, AntCentral, AntLSTM",
               "Cartpole": "unknown --env-id Cartpole: IsaacGymEnvs has"}
    for reason, (_, err) in zip(reasons.values(), at_once(lambda task: shell("--env-id", task, cwd=isaacgym, code=2), list(reasons))):
        assert err.startswith("error: ") and len(err.splitlines()) == 1 and reason in err
    assert snapshot(isaacgym) == before


@pytest_hydra
def test_isaacgym_imported_too_late_says_what_to_do(isaacgym):
    """With torch imported first the real package raises: another simulator must not step in silently."""
    code = "import torch, train_ppo; train_ppo.main(['--env-id', 'Ant'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=str(isaacgym), env={**os.environ, "PYTHONPATH": f"{isaacgym}{os.pathsep}{HERE}"},
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == 2 and "error: Isaac Gym cannot be used" in done.stderr and "PyTorch was imported before" in done.stderr


@pytest_hydra
def test_sim_torch_leaves_isaacgym_alone(isaacgym):
    out, _ = shell("--env-id", "Cartpole", "--sim", "torch", *SMALL, cwd=isaacgym)
    assert "training Cartpole" in out


def test_yaml_settings_of_isaacgymenvs_cartpole_are_the_defaults():
    """The numbers of CartpolePPO.yaml, as facts, give exactly the built-in defaults."""
    config = dict(normalize_input=True, normalize_value=True, reward_shaper=dict(scale_value=0.1), normalize_advantage=True, gamma=0.99, tau=0.95,
                  learning_rate="3e-4", lr_schedule="adaptive", kl_threshold=0.008, score_to_win=20000, max_epochs=100, save_best_after=50,
                  save_frequency=25, grad_norm=1.0, entropy_coef=0.0, truncate_grads=True, e_clip=0.2, horizon_length=16, minibatch_size=8192,
                  mini_epochs=8, critic_coef=4, clip_value=True, seq_len=4, bounds_loss_coef=0.0001, num_actors=512, mixed_precision=False)
    network = dict(name="actor_critic", separate=False, mlp=dict(units=[32, 32], activation="elu", d2rl=False),
                   space=dict(continuous=dict(mu_activation="None", fixed_sigma=True, sigma_init=dict(name="const_initializer", val=0))))
    params = dict(algo=dict(name="a2c_continuous"), model=dict(name="continuous_a2c_logstd"), network=network, config=config)
    assert Args(**train_ppo.settings_from_yaml(params, "Cartpole")) == Args()


@pytest.mark.parametrize("change, reason", [
    (dict(algo=dict(name="sac"), network=dict(name="soft_actor_critic", space=dict(continuous=None))), "the algorithm sac, .*the network soft_actor_critic"),
    (dict(algo=dict(name="amp_continuous")), "the algorithm amp_continuous"),
    (dict(network=dict(name="actor_critic", space=dict(discrete={}))), "discrete actions"),
    (dict(network=dict(name="actor_critic", cnn={})), "a convolutional network"),
    (dict(network=dict(name="actor_critic", space=dict(continuous=dict(fixed_sigma=False)))), "a state-dependent sigma"),
    (dict(config=dict(reward_shaper=dict(scale_value=1.0, min_val=-1))), "a reward_shaper beyond scale_value"),
    (dict(config=dict(bound_loss_type="regularisation")), "a bound_loss_type other than bound"),
])
def test_settings_that_ask_for_more_are_refused_by_name(change, reason):
    params = dict(algo=dict(name="a2c_continuous"), model=dict(name="continuous_a2c_logstd"), network=dict(name="actor_critic"), config={})
    train_ppo.settings_from_yaml({**params}, "Task")
    with pytest.raises(train_ppo.UserError, match=reason):
        train_ppo.settings_from_yaml({**params, **change}, "Task")


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A finished run, and files that are no checkpoints."""
    cwd = tmp_path_factory.mktemp("small")
    shell(*SMALL, "--experiment", "r", cwd=cwd)
    good = (cwd / "runs/r/nn/last.pth").read_bytes()
    (cwd / "truncated.pth").write_bytes(good[:len(good) // 2])
    weight = load_checkpoint(str(cwd / "runs/r/nn/last.pth"))["model"]["a2c_network.mu.weight"].numpy().tobytes()
    where = good.index(weight)
    (cwd / "flipped.pth").write_bytes(good[:where] + bytes([good[where] ^ 1]) + good[where + 1:])
    (cwd / "empty.pth").write_bytes(b"")
    (cwd / "text.pth").write_text("not a checkpoint")
    torch.save({"weights": torch.zeros(3)}, str(cwd / "other.pth"))
    torch.save({"model": Path("x")}, str(cwd / "code.pth"))
    state = load_checkpoint(str(cwd / "runs/r/nn/last.pth"))
    torch.save({**state, "format_version": 99}, str(cwd / "newer.pth"))
    (cwd / "folder").mkdir()
    (cwd / "loop").symlink_to("loop")
    (cwd / "bad_envs.py").write_text(textwrap.dedent("""
        import torch
        from test_train_ppo import Env
        def good(num_envs, device, seed): return Env(num_envs, device, seed)
        def wrong_count(num_envs, device, seed): return Env(num_envs + 1, device, seed)
        def no_acts(num_envs, device, seed):
            env = Env(num_envs, device, seed); env.num_acts = None; return env
        def changed(**changes):
            def make(num_envs, device, seed):
                env = Env(num_envs, device, seed); step = env.step
                def stepped(actions):
                    result = dict(zip(("obs", "reward", "done", "infos"), step(actions)))
                    result.update({k: f(result[k]) for k, f in changes.items()})
                    return tuple(result.values())
                env.step = stepped
                return env
            return make
        wide_reward = changed(reward=lambda r: r.unsqueeze(1))
        list_done = changed(done=lambda d: d.tolist())
        tensor_obs = changed(obs=lambda o: o["obs"])
        wide_obs = changed(obs=lambda o: {"obs": torch.zeros(32, 7)})
        list_infos = changed(infos=lambda i: [])
    """))
    return cwd


BAD = [
    (["--env-id", "Ant"], "unknown --env-id Ant: without Isaac Gym only Cartpole is built in"),
    (["--env-id", "Cartpole", "--sim", "isaacgym"], "Isaac Gym cannot be used: it is not installed"),
    (["--env-id", "no_such_module:f"], "cannot import no_such_module"),
    (["--env-id", "bad_envs:nothing"], "the module bad_envs has no nothing"),
    (["--env-id", "bad_envs:no_acts"], "num_acts must be a positive int"),
    (["--env-id", "bad_envs:wrong_count"], "num_envs must be the 32 that were asked for, not 33"),
    (["--env-id", "bad_envs:wide_reward"], "step()'s reward must be a tensor of shape (32,), not shape (32, 1)"),
    (["--env-id", "bad_envs:list_done"], "step()'s done must be a tensor of shape (32,), not list"),
    (["--env-id", "bad_envs:tensor_obs"], "step()[0]['obs'] must be a tensor of shape (32, 2), not missing"),
    (["--env-id", "bad_envs:wide_obs"], "step()[0]['obs'] must be a tensor of shape (32, 2), not shape (32, 7)"),
    (["--env-id", "bad_envs:list_infos"], "infos a dict"),
    (["--experiment", "a/b"], "--experiment a/b must be a plain name"),
    (["--train-dir", "text.pth"], "--train-dir text.pth is not a folder"),
    (["--checkpoint", "loop"], "loop"),
    (["--minibatch-size", "100"], "choose a --minibatch-size that divides 256"),
    (["--num-envs", "0"], "--num-envs must be at least 1, not 0"),
    (["--num-steps", "-3"], "--num-steps must be at least 1, not -3"),
    (["--max-epochs", "0"], "--max-epochs must be at least 1"),
    (["--learning-rate", "-1"], "--learning-rate must be at least 0"),
    (["--gamma", "nan"], "--gamma must be at least 0, not nan"),
    (["--units", "0"], "--units must be positive"),
    (["--device", "gpu"], "--device gpu is not a torch device"),
    (["--device", "cuda:77"], "CUDA devices here"),
    (["--play"], "--play needs --checkpoint"),
    (["--checkpoint", "missing.pth"], "missing.pth does not exist"),
    (["--checkpoint", "folder"], "has no readable checkpoint"),
    (["--checkpoint", "truncated.pth"], "truncated.pth is truncated or not a checkpoint"),
    (["--checkpoint", "flipped.pth"], "flipped.pth is damaged"),
    (["--checkpoint", "empty.pth"], "empty.pth is truncated or not a checkpoint"),
    (["--checkpoint", "text.pth"], "text.pth is truncated or not a checkpoint"),
    (["--checkpoint", "other.pth"], "other.pth is not a checkpoint of train_ppo.py or of rl_games' PPO: it lacks model"),
    (["--checkpoint", "code.pth"], "code.pth is not a checkpoint of plain tensors and numbers (it asks to run code): refused"),
    (["--checkpoint", "newer.pth"], "written by a newer train_ppo.py"),
    (["--checkpoint", "runs/r", "--env-id", "bad_envs:good", "--max-epochs", "9"], "for 4 observations and 1 actions, but the env has 2 and 2"),
    (["--play", "--checkpoint", "runs/r", "--env-id", "bad_envs:good"], "for 4 observations and 1 actions, but the env has 2 and 2"),
    (["--init-from", "runs/r", "--env-id", "bad_envs:good"], "for 4 observations and 1 actions, but the env has 2 and 2"),
    (["--checkpoint", "runs/r", "--units", "8", "--max-epochs", "9"], "does not fit the network that the arguments describe"),
    (["--checkpoint", "runs/r", "--init-from", "runs/r", "--max-epochs", "9"], "give one of them"),
]


@pytest.mark.parametrize("flags, message", BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_input_gets_one_line_and_writes_nothing(small_run, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(small_run)
    monkeypatch.setattr(sys, "path", [str(small_run), str(HERE), *sys.path])
    before, time_before = snapshot(small_run), time.time()
    with pytest.raises(SystemExit) as stopped:
        main([*([] if "--checkpoint" in flags else SMALL), *flags])
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert error[-1].startswith("error: ") and message in error[-1], error
    assert all(line.startswith("warning: ") for line in error[:-1])
    assert snapshot(small_run) == before
    assert not [p for p in small_run.rglob("*.pth") if p.stat().st_mtime > time_before]


def test_bad_input_in_a_real_process(small_run):
    out, err = shell("--env-id", "Humanoid", cwd=small_run, code=2)
    assert out == "" and err.count("\n") == 1 and err.startswith("error: unknown --env-id Humanoid")
    _, err = shell("--no-such-flag", cwd=small_run, code=2)
    assert "no-such-flag" in err and "Traceback" not in err


# ---------------------------------------------------------------------------------------------------------- what survives what


def train_with_slow_fsync(folder, arguments, seconds):
    """Target of a killed process: train in `folder`, each fsync taking longer, so that many kills fall into a save."""
    fsync = os.fsync
    os.chdir(folder)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    train_ppo.os.fsync = lambda fd: (time.sleep(seconds), fsync(fd))
    main(arguments)


def test_kill_dash_nine_at_any_moment_loses_nothing(tmp_path):
    """KILLS (default 30) times: kill -9 at a random moment, continue. In the end the weights are those of the uninterrupted run."""
    import random

    kills, rng = int(os.environ.get("KILLS", "30")), random.Random(0)
    context = forkserver()
    epochs = str(6 * kills)
    flags = ["--num-envs", "16", "--num-steps", "8", "--update-epochs", "2", "--save-frequency", "1", "--save-best-after", "1", "--max-epochs", epochs]

    def start(arguments, seconds=0.0):
        process = context.Process(target=train_with_slow_fsync, args=(str(tmp_path), arguments, seconds))
        process.start()
        return process

    straight = start([*flags, "--experiment", "straight"])
    straight.join(200)
    assert straight.exitcode == 0
    arguments, done, in_a_save, run = [*flags, "--experiment", "killed"], 0, 0, tmp_path / "runs" / "killed"
    while done < kills:
        process = start(arguments, 0.01)
        before = len(list(run.glob("nn/epoch_*.pth")))
        while process.is_alive() and len(list(run.glob("nn/epoch_*.pth"))) == before:  # until it has saved once: it does go on
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"after {done} kills it ended by itself with {process.exitcode}"
        in_a_save += bool(list(run.glob("nn/*.tmp")))
        done += 1
        arguments = ["--checkpoint", "runs/killed"]
    last = start(arguments)
    last.join(200)
    assert last.exitcode == 0
    print(f"{done} of {done} kills survived, {in_a_save} of them inside a save")
    assert in_a_save > 0 and not list(run.glob("nn/*.tmp")), "left-over temporary files are cleared away"
    assert same_state(tmp_path / "runs/straight/nn/last.pth", run / "nn/last.pth") == []
    straight, killed = scalars(tmp_path / "runs/straight"), scalars(run)
    assert {t: v for t, v in straight.items() if not t.startswith("performance") and not t.endswith("time")} == {
        t: v for t, v in killed.items() if not t.startswith("performance") and not t.endswith("time")}, "no gap, no overlap, no step back"


def test_damaged_checkpoints_are_refused_or_load_the_same(small_run, tmp_path):
    """300 random flips of a bit and truncations: one line, or identical content; never something else."""
    import random

    rng, good, path = random.Random(0), (small_run / "runs/r/nn/last.pth").read_bytes(), str(tmp_path / "damaged.pth")
    reference, refused = load_checkpoint(str(small_run / "runs/r/nn/last.pth")), 0
    for i in range(300):
        damaged = bytearray(good)
        if i % 3:
            damaged[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(good)):]
        Path(path).write_bytes(damaged)
        try:
            assert differences(reference, load_checkpoint(path)) == []
        except train_ppo.UserError as exc:
            assert path in str(exc) and "\n" not in str(exc)
            refused += 1
    assert refused > 200


def test_full_disk(here):
    """A file size limit smaller than a checkpoint: saves fail as on a full disk. Training goes on, the end is loud, old files stay."""
    import resource

    main(["--units", "256", "256", *SMALL, "--experiment", "r", "--max-epochs", "2"])
    before = {p.name: p.read_bytes() for p in Path("runs/r/nn").iterdir()}

    def limited(size, *arguments):
        return subprocess.run([sys.executable, SCRIPT, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
                              preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))

    done = limited(300000, "--checkpoint", "runs/r", "--max-epochs", "9")
    assert done.returncode == 1, done.stderr
    warning, error = done.stderr.splitlines()
    assert warning.startswith("warning: ") and "epoch_4.pth cannot be written (File too large); training goes on" in warning
    assert error == "error: runs/r/nn/last.pth cannot be written (File too large): the weights of epoch 9 are not on disk"
    assert {p.name: p.read_bytes() for p in Path("runs/r/nn").iterdir()} == before
    main(["--checkpoint", "runs/r", "--max-epochs", "4"])
    done = limited(0, *SMALL, "--experiment", "new")
    assert (done.returncode, done.stderr) == (2, "error: runs/new cannot be written: File too large\n")


def test_folder_that_cannot_be_written(here, monkeypatch, capsys):
    """As for a read-only folder or a used-up quota, which root does not feel: the system call is what fails."""
    main([*SMALL, "--experiment", "r", "--max-epochs", "2"])
    before = {p.name: p.read_bytes() for p in Path("runs/r/nn").iterdir()}
    for number, reason in ((errno.EROFS, "Read-only file system"), (errno.EDQUOT, "quota exceeded")):
        with monkeypatch.context() as patched:
            def refuse(path, mode="r", *args, **kwargs):
                if str(path).endswith(".tmp"):
                    raise OSError(number, os.strerror(number))
                return open(path, mode, *args, **kwargs)

            patched.setattr(train_ppo, "open", refuse, raising=False)
            capsys.readouterr()
            with pytest.raises(SystemExit) as stopped:
                main(["--checkpoint", "runs/r", "--max-epochs", "5"])
        err = capsys.readouterr().err
        assert stopped.value.code == 1 and err.count("warning:") == 1 and reason in err and "the weights of epoch 5 are not on disk" in err
        assert {p.name: p.read_bytes() for p in Path("runs/r/nn").iterdir()} == before
    os.remove("runs/r/.lock")
    os.mkdir("runs/r/.lock")  # opening it fails, as in the folder of another user
    with pytest.raises(SystemExit) as stopped:
        main(["--checkpoint", "runs/r", "--max-epochs", "5"])
    assert stopped.value.code == 2 and capsys.readouterr().err == "error: runs/r cannot be trained in: Is a directory; branch off with --experiment NAME\n"


def test_a_snapshot_shares_nothing_with_what_it_was_taken_of():
    """A new best may wait in memory while training goes on, and an env may keep its state in arrays that it overwrites."""
    live = {"tensor": torch.zeros(2), "array": np.zeros(2), "list": [0, 0], "number": np.float32(0)}
    copy = train_ppo.plain(live)
    live["tensor"] += 1
    live["array"] += 1
    live["list"][0] += 1
    assert copy["tensor"].tolist() == copy["array"].tolist() == copy["list"] == [0, 0] and type(copy["number"]) is float


def test_file_system_without_locks(here, monkeypatch):
    """Training goes on: two processes in one folder can then not be told apart."""
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    main([*SMALL, "--experiment", "r"])
    assert load_checkpoint("runs/r/nn/last.pth")["epoch"] == 4


def test_save_every_minutes(here):
    main([*SMALL, "--experiment", "r", "--save-frequency", "0", "--save-every-minutes", "1e-9", "--max-epochs", "1"])
    saved = []
    save, train_ppo.save_checkpoint = train_ppo.save_checkpoint, lambda state, path: (saved.append((os.path.basename(path), state["epoch"])), save(state, path))
    try:
        main(["--checkpoint", "runs/r", "--max-epochs", "3"])
    finally:
        train_ppo.save_checkpoint = save
    assert saved == [("last.pth", 2), ("last.pth", 3), ("last.pth", 3)]


def nan_env(num_envs, device, seed):
    """What goes bad at step 60 or 65, in 3 envs, is named in the environment variable BAD."""
    env, count = Env(num_envs, device, seed), [0]
    step = env.step

    def bad(actions):
        obs, reward, done, infos = step(actions)
        count[0] += 1
        if os.environ["BAD"] == {60: "observations", 65: "observations after the last step"}.get(count[0]):  # the factory's check took one
            obs["obs"][2:5, 1] = math.nan
        if count[0] == 60 and os.environ["BAD"] == "rewards":
            reward[2:5] = math.inf
        if count[0] == 60 and os.environ["BAD"] == "the policy loss":
            env.agent.model.a2c_network.sigma.data[:] = -120.0  # finite numbers whose ratio is not
        return obs, reward, done, infos

    env.step = bad
    env.set_train_info = lambda frame, agent: setattr(env, "agent", agent)
    return env


@pytest.mark.parametrize("what", ["observations", "observations after the last step", "rewards", "the policy loss"])
def test_bad_numbers_stop_training_and_spoil_nothing(here, monkeypatch, capsys, what):
    monkeypatch.setenv("BAD", what)
    with pytest.raises(SystemExit) as stopped:
        main(["--env-id", "test_train_ppo:nan_env", *SMALL, "--max-epochs", "100", "--experiment", "r", "--save-best-after", "1"])
    error = capsys.readouterr().err.splitlines()[-1]
    step = {"observations": 4, "observations after the last step": 9, "rewards": 3}.get(what)
    what = what.replace(" after the last step", "")
    assert stopped.value.code == 1 and error.startswith(f"error: NaN or Inf in {what}") and "epoch 8" in error
    assert step is None or f"of 3 of 32 envs at step {step} of the rollout" in error
    for path in Path("runs/r/nn").iterdir():
        state = load_checkpoint(str(path))
        assert state["epoch"] < 8 and all(torch.isfinite(w).all() for w in state["model"].values())
    assert load_checkpoint("runs/r/nan_dump.pth")["what"].startswith(what)
    monkeypatch.setenv("BAD", "")
    main(["--checkpoint", "runs/r", "--max-epochs", "9"])


class Broken(train_ppo.AlgoObserver):
    """Raises in the hook it is made with."""

    def __init__(self, hook):
        def fail(*args):
            raise ZeroDivisionError("oops")

        setattr(self, hook, fail)


@pytest.mark.parametrize("hook", ["before_init", "after_init", "process_infos", "after_steps", "after_print_stats", "close", "state_dict"])
def test_a_failing_observer_is_left_out(here, capsys, hook):
    args = train_ppo.parse_args([*SMALL, "--experiment", "r"])
    result = train_ppo.Runner(args, train_ppo.MultiObserver([Broken(hook), train_ppo.RLGPUAlgoObserver()])).run()
    error = capsys.readouterr().err
    assert error.count("warning: ") == 1 and f"Broken.{hook} raised ZeroDivisionError('oops')" in error and "Traceback" in error
    assert result["epoch"] == 4 and len(scalars("runs/r")["info/kl"]) == 4 and load_checkpoint("runs/r/nn/last.pth")["epoch"] == 4
    args = train_ppo.parse_args([*SMALL, "--experiment", "q", "--strict-observers"])
    with pytest.raises(ZeroDivisionError):
        train_ppo.Runner(args, Broken(hook)).run()


def test_failing_tensorboard_writer_does_not_stop_training(here, monkeypatch, capsys):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_ppo.Writer, "flush", fail)
    monkeypatch.setattr("torch.utils.tensorboard.writer.FileWriter.add_summary", fail)
    main([*SMALL, "--experiment", "r"])
    error = capsys.readouterr().err
    assert error.count("warning: ") == 1 and "TensorBoard events cannot be written any more ([Errno 28] No space left on device)" in error
    assert load_checkpoint("runs/r/nn/last.pth")["epoch"] == 4


def test_observer_state_continues(here):
    """episode_cumulative sums and windows go on where they stopped, in an env whose whole state is in the checkpoint."""
    Path("my_envs.py").write_text(textwrap.dedent("""
        import torch
        from train_ppo import Cartpole
        class Counting(Cartpole):
            def step(self, actions):
                obs, reward, done, infos = super().step(actions)
                infos["episode_cumulative"] = {"reward": reward}
                return obs, reward, done, infos
        def make(num_envs, device, seed):
            return Counting(num_envs, torch.device(device))
    """))
    flags = ["--env-id", "my_envs:make", *SMALL, "--games-to-track", "9"]
    main([*flags, "--experiment", "straight", "--max-epochs", "10"])
    main([*flags, "--experiment", "stopped", "--max-epochs", "5"])
    main(["--checkpoint", "runs/stopped", "--max-epochs", "10"])
    tag = "episode_cumulative/reward"
    assert scalars("runs/straight")[tag] == scalars("runs/stopped")[tag] and same_state("runs/straight/nn/last.pth", "runs/stopped/nn/last.pth") == []


def test_two_processes_never_share_a_run(tmp_path):
    """Started at once with the same arguments: two folders. Continuing the same folder: the second is refused."""
    command = [sys.executable, SCRIPT, "--num-envs", "64", "--max-epochs", "100000", "--experiment", "r",
               "--save-frequency", "1"]  # the newest file is another one at every look
    both = [subprocess.Popen(command, cwd=str(tmp_path), stdout=subprocess.PIPE, universal_newlines=True) for _ in range(2)]
    for process in both:
        assert any(line.startswith("epoch 30/") for line in process.stdout)
    _, err = shell("--checkpoint", "runs/r", cwd=tmp_path, code=2)
    assert err == "error: runs/r is being trained by another process: stop that one first, or branch off with --experiment NAME\n"
    for process in both:
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert sorted(os.listdir(tmp_path / "runs")) == ["r", "r_2"]


# ---------------------------------------------------------------------------------------------------------- video


def test_video_is_written_and_logged(here, capsys):
    """GIFs in the run folder, in TensorBoard's event file and in the W&B run; --play draws the policy too."""
    shell(*SMALL, "--max-epochs", "6", "--capture-video", "--video-frequency", "3", "--video-length", "20", "--track", "--experiment", "r", cwd=here)
    assert sorted(os.listdir("runs/r/videos")) == ["epoch_1.gif", "epoch_4.gif"]
    with Image.open("runs/r/videos/epoch_1.gif") as gif:
        first = np.asarray(gif.convert("RGB"))
        durations = []
        for i in range(gif.n_frames):
            gif.seek(i)
            durations.append(gif.info["duration"])
        assert gif.size == (600, 320) and sum(durations) == 20 * 20 and not np.array_equal(first, np.asarray(gif.convert("RGB"))), "20 frames that move"
    images = [(event.step, value.image.encoded_image_string or value.tensor.string_val[2]) for path in Path("runs/r/summaries").glob("events*")
              for event in EventFileLoader(str(path)).Load() for value in event.summary.value if value.tag == "video"]
    assert [(step, data) for step, data in images] == [(2 * 256, Path("runs/r/videos/epoch_1.gif").read_bytes()), (5 * 256, Path("runs/r/videos/epoch_4.gif").read_bytes())]
    rows = wandb_run(wandb_records("runs/r")[0])[2]
    sent = [row["video/path"] if "video/path" in row else row["video"]["path"] for row in rows if "video" in row or "video/path" in row]
    assert len(sent) == 2 and all(any(Path("runs/r/wandb").glob(f"offline-run-*/files/{path}")) for path in sent)
    main(["--play", "--checkpoint", "runs/r", "--num-envs", "2"])
    assert "play_epoch_6.gif" not in os.listdir("runs/r/videos"), "only when asked for"
    main(["--play", "--checkpoint", "runs/r", "--num-envs", "2", "--capture-video", "--video-length", "5"])
    assert "runs/r/videos/play_epoch_6.gif" in capsys.readouterr().out and Path("runs/r/videos/play_epoch_6.gif").exists()


def test_video_changes_nothing_and_an_env_without_picture_is_warned_about_once(here, capsys):
    main([*SMALL, "--experiment", "plain"])
    main([*SMALL, "--experiment", "drawn", "--capture-video"])
    with Image.open("runs/drawn/videos/epoch_1.gif") as gif:
        assert gif.n_frames > 20, "training ends before the video is as long as it may be"
    assert not [name for name in same_state("runs/plain/nn/last.pth", "runs/drawn/nn/last.pth") if "args" not in name]
    capsys.readouterr()
    main(["--env-id", "test_train_ppo:infos_env", "--num-envs", "4", "--num-steps", "8", "--max-epochs", "3", "--experiment", "r", "--capture-video"])
    err = capsys.readouterr().err
    assert err.count("warning:") == 1 and "--capture-video: test_train_ppo:infos_env gave no picture" in err and "going on without video" in err
    for flags in (["--video-length", "3"], ["--video-length", "99"]):  # written when it is long enough, or when the next one starts
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("PIL.Image.Image.save", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            main([*SMALL, "--capture-video", "--video-frequency", "1", *flags])
        err = capsys.readouterr().err
        assert err.count("warning:") == 1 and "No space left on device" in err and "going on without video" in err


# ---------------------------------------------------------------------------------------------------------- several processes


def spying_env(num_envs, device, seed):
    """Cartpole that notes, at the start of each epoch, seed, learning rate and weights of the process that it runs in; and makes trouble."""
    env, trouble = Cartpole(num_envs, torch.device(device)), os.environ.get("TROUBLE", "")

    def set_train_info(frame, algo):
        weights = sum(value.double().abs().sum() for value in algo.model.state_dict().values())
        with open(f"rank{train_ppo.RANK}.txt", "a") as file:
            file.write(f"{algo.epoch_num} {seed} {frame} {float(algo.lr)} {float(weights)} {float(env.state.double().sum())}\n")
        if algo.epoch_num == 4 and train_ppo.RANK == 1:
            if trouble == "nan":
                env.state[2, 3] = math.nan
            elif trouble:
                os.kill(os.getpid(), getattr(signal, trouble))

    env.set_train_info = set_train_info
    return env


def as_rank(folder, environ, arguments, prefix):
    """Target of a process: what torchrun starts, without the seconds of importing torch."""
    os.chdir(folder)
    os.environ.update(environ)
    for fd, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{prefix}.{name}", os.O_WRONLY | os.O_CREAT), fd)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    importlib.reload(train_ppo)  # it reads the rank when it is imported
    train_ppo.main(arguments)


def processes(n, *arguments, trouble="", timeout=120):
    """Start n processes with the environment that torchrun gives them; [(exit code, stdout, stderr), ...]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = forkserver()
    arguments = ["--env-id", "test_train_ppo:spying_env", "--num-envs", "16", "--save-frequency", "100", *arguments]
    base = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n), "TROUBLE": trouble}
    folder, results = tempfile.mkdtemp(), []
    started = [context.Process(target=as_rank, args=(os.getcwd(), {**base, "RANK": str(rank), "LOCAL_RANK": str(rank)}, arguments, f"{folder}/{rank}"))
               for rank in range(n)]
    for process in started:
        process.start()
    for rank, process in enumerate(started):
        process.join(timeout)
        process.kill()
        process.join()
        results.append((process.exitcode, Path(f"{folder}/{rank}.out").read_text(), Path(f"{folder}/{rank}.err").read_text()))
    return results


def noted(rank):
    rows = [[float(x) for x in line.split()] for line in Path(f"rank{rank}.txt").read_text().splitlines()]
    Path(f"rank{rank}.txt").unlink()
    return rows


def test_processes_train_one_policy_and_continue_exactly(here):
    """Same weights and learning rate in both after every epoch, envs of their own; a signal to one stops both; continued to the same bits."""
    (code, out, err), (other_code, other_out, other_err) = processes(2, "--max-epochs", "7", "--experiment", "straight")
    assert (code, other_code) == (0, 0), err + other_err
    assert "2 processes x 16 envs" in out and "torchrun --nproc-per-node=2" in out and (other_out, other_err) == ("", ""), "rank 0 alone speaks"
    first, second = noted(0), noted(1)
    assert [row[0] for row in first] == [1, 2, 3, 4, 5, 6, 7] and first[-1][2] == 6 * 2 * 16 * 16, "frames of both"
    assert [row[3:5] for row in first] == [row[3:5] for row in second], "learning rate and weights"
    assert first[0][1] + 1 == second[0][1] and all(a[5] != b[5] for a, b in zip(first[1:], second[1:])), "envs and seeds of their own"
    assert sorted(os.listdir("runs")) == ["straight"]

    stopped = processes(2, "--max-epochs", "7", "--experiment", "stopped", trouble="SIGTERM")
    assert [code for code, _, _ in stopped] == [143, 143] and load_checkpoint("runs/stopped/nn/last.pth")["epoch"] == 4
    continued = processes(2, "--checkpoint", "runs/stopped")
    assert "exactly where it stopped" in continued[0][1] and [code for code, _, _ in continued] == [0, 0]
    assert same_state("runs/straight/nn/last.pth", "runs/stopped/nn/last.pth") == []
    assert len(load_checkpoint("runs/stopped/nn/last.pth")["other_processes"]) == 1


def test_continuing_with_another_number_of_processes(here):
    processes(2, "--max-epochs", "2", "--experiment", "r")
    for n, saved, epochs in ((1, 2, 4), (2, 1, 6)):
        results = processes(n, "--checkpoint", "runs/r", "--max-epochs", str(epochs))
        assert [code for code, _, _ in results] == [0] * n, results
        assert f"number of processes: saved by {saved}, continued by {n}; one without a saved state starts new episodes" in results[0][1]
    assert load_checkpoint("runs/r/nn/last.pth")["epoch"] == 6


def test_a_process_that_dies_or_goes_bad_ends_the_others(here):
    (code, _, err), (killed, _, _) = processes(2, "--max-epochs", "1000", "--experiment", "r", trouble="SIGKILL")
    assert (code, killed) == (1, -9)
    assert err == "error: another process of this run has ended, so this one (0) stops too; start all again with --checkpoint\n"
    (code, _, err), (other_code, _, other_err) = processes(2, "--max-epochs", "1000", "--experiment", "bad", trouble="nan")
    assert (code, other_code) == (1, 1) and "error: NaN or Inf in another process, which says more" in err
    assert "error: NaN or Inf in rewards of 1 of 16 envs at step 1 of the rollout" in other_err
    assert sorted(os.listdir("runs/bad")) == [".lock", "config.json", "nan_dump_1.pth", "nn", "summaries"] and os.listdir("runs/bad/nn") == []


def test_torchrun_learns_like_one_process(here):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", SCRIPT, "--num-envs", "256", "--max-epochs", "60",
                           "--experiment", "r"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True, timeout=200)
    assert done.returncode == 0, done.stdout
    rewards = dict(scalars("runs/r")["rewards/iter"])
    assert rewards[40] > 150 and rewards[60] > 400, rewards


# ---------------------------------------------------------------------------------------------------------- the README


def snippets(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def readme_commands():
    """Each command of the README's bash blocks, on one line, without comments; of `pip install ... && command` the command."""
    text = "\n".join(snippets("bash")).replace("\\\n", " ")
    lines = [re.sub(r"\s+", " ", line.split("#")[0].split("&&")[-1]).strip() for line in text.splitlines()]
    return [line for line in lines if line]


def test_readme_commands_work_as_printed(default_run):
    """All that need neither Isaac Gym, a GPU nor an installation, in the README's order where one needs what another wrote."""
    elsewhere = ("pip install", "git clone", "python -m pytest", "--env-id Ant", "mjlab_env:make_env")  # the last: in the next test
    found = [command for command in readme_commands() if not any(part in command for part in elsewhere)]
    assert len(found) == 14 and found[0] == "python train_ppo.py"
    cwd, _, _, run_dir = default_run
    shutil.copy(SCRIPT, str(cwd))
    for name in ("my_env.py", "my_observer.py"):
        (cwd / name).write_text(next(s for s in snippets("python") if name in s.splitlines()[0]))
    environ = {**os.environ, "WANDB_MODE": "offline", "CUDA_VISIBLE_DEVICES": "", "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]}

    def run(command):
        command = shlex.split(command.replace("NAME", run_dir.name)) + (["--port", "0"] if command.startswith("tensorboard") else [])
        process = subprocess.Popen(command, cwd=str(cwd), env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "(Press CTRL+C to quit)" in line:  # TensorBoard is up
                process.terminate()
        assert process.wait() == 0 or command[0] == "tensorboard", "".join(lines)
        return "".join(lines)

    # those that write to runs/NAME one after the other, beside them those that start a run of their own
    same = [command for command in found[1:] if "NAME" in command]
    others = [command for command in found[1:] if command not in same]
    out = {}
    at_once(lambda commands: out.update((command, run(command)) for command in commands), [same, others])
    for part, expected in {
            "--checkpoint runs/NAME": "is complete: 100 of 100 epochs", "--max-epochs 200": "stopped after epoch 200",
            "epoch_50.pth": "branching off", "--init-from": "from the weights of", "--play": "512 episodes", "--export": "largest difference",
            "--capture-video": "stopped after epoch 100", "torchrun": "2 processes x 512 envs", "tensorboard": "http://"}.items():
        command = next(command for command in found if part in command)
        assert expected in out[command] and not re.search("^(warning|error|Traceback)", out[command], re.M), f"{command}\n{out[command]}"
    rewards = [float(x) for x in re.findall(r"reward ([-\d.]+) length", out["python train_ppo.py --env-id my_env:make_env"])]
    assert rewards[-1] > rewards[0] + 5, "the README's env is learned"
    lines = [json.loads(line) for line in (cwd / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 21)) and all("losses/a_loss" in line for line in lines)


@pytest.mark.skipif(train_ppo.importlib.util.find_spec("mjlab") is None, reason="needs mjlab, on Python 3.10 or newer")
def test_mjlab_snippet_from_the_readme_trains(tmp_path):
    """The adapter as copied from the README, on mjlab's Cartpole made quick to judge.

    Short episodes: 50 steps, and 40 in every other env, which ends by a termination, so that what is cut off and what only ends differ.
    """
    (tmp_path / "mjlab_env.py").write_text(next(s for s in snippets("python") if "mjlab_env.py" in s.splitlines()[0]))
    (tmp_path / "short.py").write_text(textwrap.dedent("""
        import mjlab_env
        import torch
        from mjlab.managers.termination_manager import TerminationTermCfg
        from mjlab.tasks.registry import load_env_cfg, register_mjlab_task

        cfg = load_env_cfg(mjlab_env.TASK)
        cfg.episode_length_s = 2.5
        cfg.terminations["even"] = TerminationTermCfg(lambda env: (env.episode_length_buf >= 40) & (torch.arange(env.num_envs) % 2 == 0))
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
    """))
    _, err = shell("--env-id", "short:make_env", "--device", "cpu", "--num-envs", "256", "--num-steps", "16", "--max-epochs", "20",
                   "--games-to-track", "256", "--experiment", "r", cwd=tmp_path)
    assert re.findall("^warning: .*", err, re.M) == [], "no observer was dropped, no time_outs were missed"
    curves = {tag: [v for _, v in points] for tag, points in scalars(tmp_path / "runs/r").items()}
    lengths = curves["episode_lengths/iter"]
    assert lengths[0] < 20 and all(43 < x < 46 for x in lengths[7:]), "the first episodes are of any length, for the others see above"
    assert np.mean(curves["ended/iter"][5:]) == pytest.approx((1 / 40 + 1 / 50) / 2, rel=0.1), "episodes a step"
    assert np.mean(curves["cut/iter"][5:]) == pytest.approx(1 / 50 / 2, rel=0.1), "a termination is not a time-out"
    assert len(curves["Episode/Episode_Reward/smooth_reward"]) == 20 and {"Episode/Episode_Termination/time_out", "Episode/Episode_Termination/even"} < set(curves)
    reward = curves["rewards/iter"]
    assert reward[-1] > 1.2 * reward[7] > 0, "it learns: episodes of the same length earn more"
    assert load_checkpoint(str(tmp_path / "runs/r/nn/last.pth"))["env_state"] == {"common_step_counter": 1000 + 1 + 20 * 16}
    out, _ = shell("--play", "--checkpoint", "runs/r/nn/last.pth", "--num-envs", "32", "--device", "cpu", cwd=tmp_path)
    mean = float(re.search(r"reward mean (\S+) .*, mean length 45\.0, 32 episodes", out).group(1))
    assert mean > 1.2 * reward[7], "--play sees whole episodes of the trained policy"


def test_readme_lists_every_argument():
    """Name, default and meaning of each, word for word as in Args."""
    source = (HERE / "train_ppo.py").read_text()
    for field in train_ppo.fields(Args):
        meaning = re.search(rf"^    {field.name}: .*?  # (.*)$", source, re.M).group(1)
        default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        assert f"| `--{field.name.replace('_', '-')}` | {default} | {meaning} |" in README, field.name


def test_file_runs_on_python_3_8():
    """No syntax newer than 3.8, whatever Python runs this test."""
    import ast

    for name in ("train_ppo.py", "test_train_ppo.py"):
        ast.parse((HERE / name).read_text(), feature_version=(3, 8))
