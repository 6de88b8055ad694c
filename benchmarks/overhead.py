"""What observers, metrics and checkpoints cost: the default job with all of them on against all of them off.

    python benchmarks/overhead.py [PAIRS]

Both jobs train in one process and take turns of five epochs, so that a machine that gets slower or faster slows or speeds up both. A pair
is two such trainings, in the second of which the other job starts first: the first one to start is slower, also if both do the same.
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

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import train_ppo  # noqa: E402
from train_ppo import Args, Cartpole, MultiObserver, PPOAgent, RLGPUAlgoObserver, Runner  # noqa: E402

TURN = 5  # epochs
turns = threading.Condition()
whose, seconds = [True], {True: 0.0, False: 0.0}  # True: with everything on


class Bare(PPOAgent):
    """The loop without metrics and checkpoints."""

    def write_stats(self, *_) -> None:
        pass

    def save(self, *_, **__) -> bool:
        return True

    def save_checkpoints(self, *_) -> None:
        pass


class TurnTaking(Cartpole):
    """Its first step of every fifth epoch waits until the other job has had its turn."""

    def __init__(self, num_envs, device, on):
        super().__init__(num_envs, device)
        self.on, self.start = on, None

    def set_train_info(self, frame, algo):
        if (algo.epoch_num - 1) % TURN == 0:
            self.pass_on()
            with turns:
                turns.wait_for(lambda: whose[0] == self.on)
            self.start = time.perf_counter()

    def pass_on(self):
        if self.start is not None:
            seconds[self.on] += time.perf_counter() - self.start
            with turns:
                whose[0] = not self.on
                turns.notify_all()


def job(folder: str, on: bool) -> None:
    args = Args(train_dir=folder, experiment=str(on))
    runner = Runner(args, MultiObserver([RLGPUAlgoObserver()] if on else []))
    torch.set_num_threads(args.torch_threads)  # it is a setting of the thread
    env = TurnTaking(args.num_envs, torch.device("cpu"), on)
    runner.train(env, "", None)


def train_both(first: bool) -> None:
    whose[0] = first
    full, bare_thread, train = PPOAgent, None, PPOAgent.train

    def train_then_pass_on(agent):
        train(agent)
        agent.env.pass_on()

    PPOAgent.train = train_then_pass_on
    # each Runner looks its agent up by name: the thread decides which it gets
    train_ppo.PPOAgent = lambda *args: (Bare if threading.current_thread() is bare_thread else full)(*args)
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            jobs = {on: threading.Thread(target=job, args=(folder, on)) for on in (first, not first)}
            bare_thread = jobs[False]
            for thread in jobs.values():
                thread.start()
            for thread in jobs.values():
                thread.join()
    finally:
        PPOAgent.train, train_ppo.PPOAgent = train, full


if __name__ == "__main__":
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    train_both(True)  # warm up
    overheads = []
    for i in range(pairs):
        seconds.update({True: 0.0, False: 0.0})
        train_both(True)
        train_both(False)
        overheads.append(100 * (seconds[True] / seconds[False] - 1))
        print(f"pair {i + 1}: on {seconds[True]:.2f} s, off {seconds[False]:.2f} s: {overheads[-1]:+.1f} %", flush=True)
    print(f"median of {pairs} pairs: {statistics.median(overheads):+.1f} %")
