"""How close train_ppo.py comes to what the machine can do, and how it grows with the number of
environments; two tables.

    python benchmarks/limits.py               three minutes on 2 cores
    python benchmarks/limits.py --epochs 3    quicker, and less exact

Limits: the time of an epoch's update, next to three numbers that bound it:

    matmul        the network's multiplications and additions (forward, and twice that backward) at
                  the rate of one large product
    memory        what any implementation that runs layer by layer moves, at the rate of copying a
                  large tensor: each pass reads the batch, writes each layer's output (before and
                  after the activation) and their gradients, and reads each of them once
    bare network  as many minibatches forward and backward through torch's layers alone: no loss, no
                  statistics, no optimizer

Growth: env steps/s end to end, and peak memory, of the built-in Cartpole; each in a process of its
own.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from unittest import mock

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import compare
import torch

import train_ppo

compare.torch = torch  # it imports torch only where it trains

CPU = torch.device("cpu")
SETTINGS = train_ppo.Args(device="cpu", sim="torch", torch_threads=1, save_frequency=0)


def timed(call, repeats, summary=statistics.median):
    """Seconds that a call takes."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return summary(times)


class Stopwatch(train_ppo.AlgoObserver):
    """Trains, and keeps the seconds of each epoch's update, of its rollout and of the env in it."""

    def __init__(self, args, env):
        self.updates, self.rollouts, self.steps, self.ends = [], [], [], []
        timed = dict(
            make_env=lambda *_: env,
            rollout=self.timing(train_ppo.rollout, self.rollouts),
            update=self.timing(train_ppo.update, self.updates),
        )
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            with mock.patch.multiple(train_ppo, **timed):
                args = replace(args, train_dir=folder)
                train_ppo.run(args, train_ppo.MultiObserver([self]))

    @staticmethod
    def timing(function, times):
        def timed_function(*args):
            start = time.perf_counter()
            result = function(*args)
            times.append(time.perf_counter() - start)
            return result

        return timed_function

    def after_print_stats(self, frame, epoch_num, total_time):
        self.ends.append(time.perf_counter())
        self.steps.append(self.writer.scalars["performance/step_time"])


def limits(epochs):
    x = torch.randn(2048, 2048)
    rate = 2 * 2048**3 / timed(lambda: x @ x, 20, min)
    big, copy = torch.zeros(2**26), torch.zeros(2**26)  # 256 MiB each: no cache holds them
    bandwidth = 2 * 4 * 2**26 / timed(lambda: copy.copy_(big), 20, min)
    print(f"matmul {rate / 1e9:.0f} GFLOP/s, memory {bandwidth / 1e9:.1f} GB/s, 1 thread\n")
    titles = "matmul | memory | bare network | update, reached | rollout | of it in the env"
    print(f"| | {titles} |\n|---|---:|---:|---:|---:|---:|---:|")
    ant = replace(SETTINGS, **compare.ANT)
    limits_of("Cartpole", SETTINGS, train_ppo.Cartpole(512, CPU), rate, bandwidth, epochs or 60)
    limits_of("Ant-sized", ant, compare.Synthetic(4096), rate, bandwidth, epochs or 6)


def limits_of(name, args, env, rate, bandwidth, epochs):
    sizes = (env.num_obs, *args.units, env.num_acts + 1)
    samples = args.update_epochs * env.num_envs * args.num_steps  # of all passes together
    operations = samples * 3 * 2 * sum(a * b for a, b in zip(sizes, sizes[1:]))
    numbers = env.num_obs + env.num_acts + 4 + 4 * (2 * sum(args.units) + sizes[-1])
    moved = samples * 4 * numbers
    net = compare.mlp(env.num_obs, (*args.units, sizes[-1]))
    x = torch.randn(args.minibatch_size, env.num_obs)
    minibatch = timed(lambda: net(x).sum().backward(), max(epochs // 2, 3))
    bare = minibatch * samples / args.minibatch_size

    watch = Stopwatch(replace(args, max_epochs=epochs), env)
    reached = [statistics.median(x[1:]) for x in (watch.updates, watch.rollouts, watch.steps)]
    figures = (operations / rate, moved / bandwidth, bare, *reached)
    print(f"| {name} | " + " | ".join(f"{1000 * x:.1f} ms" for x in figures) + " |", flush=True)


def grow_one(num_envs, epochs):
    samples = 16 * num_envs
    size = min(8192, samples)
    epochs = epochs or max(4, 800_000 // samples)  # five seconds or more
    args = replace(SETTINGS, num_envs=num_envs, minibatch_size=size, max_epochs=epochs)
    ends = Stopwatch(args, train_ppo.Cartpole(num_envs, CPU)).ends
    seconds = statistics.median(b - a for a, b in zip(ends, ends[1:]))
    print(json.dumps({"rate": samples / seconds, "peak": compare.peak_mb()}))


def growth(epochs):
    print("| environments | env steps/s | peak MB |\n|---:|---:|---:|")
    for num_envs in (64, 512, 4096, 32768, 131072):
        command = [sys.executable, __file__, "--grow-one", str(num_envs), "--epochs", str(epochs)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        result = json.loads(done.stdout)
        print(f"| {num_envs:,} | {result['rate'] / 1000:.0f}k | {result['peak']:.0f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=0, help="of each training, at least 2")
    parser.add_argument("--grow-one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.grow_one:
        grow_one(options.grow_one, options.epochs)
    else:
        growth(options.epochs)  # first: Linux counts a parent's memory in its child's peak
        print()
        limits(options.epochs)
