"""What observers, metrics and checkpoints cost: the default job with all of them on against all of them off, in pairs.

    python benchmarks/overhead.py [PAIRS]
"""
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from typing import List

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from train_ppo import Args, MultiObserver, PPOAgent, RLGPUAlgoObserver, Runner  # noqa: E402


def seconds(folder: str, on: bool) -> List[float]:
    """Wall and CPU seconds of the training loop, saves included, start-up left out."""
    full = {name: getattr(PPOAgent, name) for name in ("train", "write_stats", "save")}
    times = []

    def timed_train(agent):
        start = time.perf_counter(), time.process_time()
        full["train"](agent)
        times.extend((time.perf_counter() - start[0], time.process_time() - start[1]))

    PPOAgent.train = timed_train
    if not on:
        PPOAgent.write_stats = lambda *_: None
        PPOAgent.save = lambda *_, **__: None
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            Runner(Args(train_dir=folder), MultiObserver([RLGPUAlgoObserver()] if on else [])).run()
    finally:
        for name, function in full.items():
            setattr(PPOAgent, name, function)
    return times


if __name__ == "__main__":
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    wall, cpu = [], []
    with tempfile.TemporaryDirectory() as folder:
        seconds(folder, True)  # warm up
        for i in range(pairs):
            # the order alternates, so that a machine that gets slower or faster favours neither
            times = {on: seconds(folder, on) for on in ((True, False) if i % 2 else (False, True))}
            wall.append(100 * (times[True][0] / times[False][0] - 1))
            cpu.append(100 * (times[True][1] / times[False][1] - 1))
            print(f"pair {i + 1}: on {times[True][0]:.2f} s, off {times[False][0]:.2f} s: {wall[-1]:+.1f} % wall, {cpu[-1]:+.1f} % CPU", flush=True)
    print(f"median of {pairs} pairs: {statistics.median(wall):+.1f} % wall, {statistics.median(cpu):+.1f} % CPU")
