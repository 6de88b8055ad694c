"""What observers, metrics and checkpoints cost: a job with and without them.

    python benchmarks/overhead.py [PAIRS]    the default job, Cartpole
    python benchmarks/overhead.py PAIRS ant  one of Ant's size, whose env costs next to nothing

Both jobs train in one process and take turns of five epochs, so that a machine that gets slower or
faster does so for both. In the second half of a pair the other job starts first, because whoever
starts first is slower, also if both do the same. What the calls themselves take is free of the
machine's noise, but leaves out what they cost others, such as the processor's caches.
"""

import contextlib
import io
import os
import statistics
import sys
import tempfile
import threading
import time

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import compare

import train_ppo

compare.torch = torch  # it imports torch only where it trains

TURN = 5  # epochs
WITH, WITHOUT = "with", "without"  # the jobs, by the names of their runs
turns = threading.Condition()
whose = [WITH]
seconds = {WITH: 0.0, WITHOUT: 0.0}
calls = [0.0]  # seconds in the calls of the job with, since the start of a pair


class ShortEpisodes(compare.Synthetic):
    max_episode_length = 100  # so that every env has ended one when best.pth begins


CPU = torch.device("cpu")
JOBS = {
    "cartpole": (train_ppo.Cartpole, {}),
    "ant": (ShortEpisodes, dict(compare.ANT, max_epochs=25, save_best_after=10)),
}


class TurnTaking:
    """Waits before every fifth epoch until the other job has had its turn."""

    def __init__(self, env, job):
        self.env = env
        self.job = job
        self.start = None

    def __getattr__(self, name):
        return getattr(self.env, name)

    def set_train_info(self, frame, algo):
        if (algo.epoch_num - 1) % TURN == 0:
            self.pass_on()
            with turns:
                if not turns.wait_for(lambda: whose[0] == self.job, timeout=60):
                    raise RuntimeError("the other job has ended early")
            self.start = time.perf_counter()

    def close(self):
        self.pass_on()

    def pass_on(self):
        if self.start is not None:
            seconds[self.job] += time.perf_counter() - self.start
            with turns:
                whose[0] = WITHOUT if self.job == WITH else WITH
                turns.notify_all()


def timed(function):
    """The function, whose time is added to calls."""

    def called(*args):
        start = time.perf_counter()
        result = function(*args)
        calls[0] += time.perf_counter() - start
        return result

    return called


def leave_out(name: str) -> None:
    """Let the job without do nothing where train_ppo calls this function with its agent, but for
    the first last.pth, which is saved before the clock starts and read again."""
    function = getattr(train_ppo, name)

    def called(agent, *args, **kwargs):
        if agent.args.experiment == WITH or agent.epoch_num == 0:
            return function(agent, *args, **kwargs)

    setattr(train_ppo, name, called)


def make_env(args: train_ppo.Args, seed: int) -> TurnTaking:
    return TurnTaking(ENV(args.num_envs, device=CPU), args.experiment)


def train(job: str, folder: str) -> None:
    names = dict(train_dir=folder, experiment=job, device="cpu", sim="torch")
    args = train_ppo.Args(**names, **SETTINGS)
    observers = [train_ppo.RLGPUAlgoObserver()] if job == WITH else []
    train_ppo.run(args, train_ppo.MultiObserver(observers))


def train_both(first: str, second: str) -> None:
    whose[0] = first
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        threads = [threading.Thread(target=train, args=(job, folder)) for job in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    ENV, SETTINGS = JOBS[sys.argv[2] if len(sys.argv) > 2 else "cartpole"]
    train_ppo.make_env = make_env
    observer = train_ppo.RLGPUAlgoObserver
    observer.process_infos = timed(observer.process_infos)
    train_ppo.log_epoch = timed(train_ppo.log_epoch)
    train_ppo.save_checkpoints = timed(train_ppo.save_checkpoints)
    for name in ("log_epoch", "save_checkpoints", "save"):
        leave_out(name)
    train_both(WITH, WITHOUT)  # warm up
    overheads = []
    for i in range(pairs):
        seconds.update({WITH: 0.0, WITHOUT: 0.0})
        calls[0] = 0.0
        train_both(WITH, WITHOUT)
        train_both(WITHOUT, WITH)
        overheads.append(100 * (seconds[WITH] / seconds[WITHOUT] - 1))
        print(
            f"pair {i + 1}: with {seconds[WITH]:.2f} s, without {seconds[WITHOUT]:.2f} s: "
            f"{overheads[-1]:+.1f} %, the calls {100 * calls[0] / seconds[WITH]:.1f} %",
            flush=True,
        )
    print(f"median of {pairs} pairs: {statistics.median(overheads):+.1f} %")
