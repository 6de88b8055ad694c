"""How close train_ppo.py comes to what the machine can do, and how it grows with the number of environments; two tables.

    python benchmarks/limits.py          the README's tables (three minutes on 2 cores)

Limits: the time that an epoch's update takes, next to three numbers that bound it:

    matmul        the network's multiplications and additions (forward, and twice that backward) at the rate of one large product
    memory        what any implementation that runs layer by layer moves, at the rate of copying a large tensor: each pass reads the
                  batch, writes each layer's output (before and after the activation) and their gradients, and reads each of them once
    bare network  as many minibatches forward and backward through torch's layers alone: no loss, no statistics, no optimizer

Growth: env steps/s end to end, and peak memory, of the built-in Cartpole; each in a process of its own.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import torch  # noqa: E402

import compare  # noqa: E402
from train_ppo import Args, Cartpole, MultiObserver, PPOAgent, Writer, replace  # noqa: E402

compare.torch = torch  # it imports torch only where it trains

CPU = torch.device("cpu")


def timed(call, repeats, summary=statistics.median):
    """Seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return summary(times)


def agent_for(args, env, folder):
    config = {"run_dir": folder, "wandb_run_id": ""}
    return PPOAgent(args, env, MultiObserver([]), Writer(folder), config)


def limits():
    x = torch.randn(2048, 2048)
    rate = 2 * 2048**3 / timed(lambda: x @ x, 20, min)
    big, copy = torch.zeros(2**26), torch.zeros(2**26)  # 256 MiB each: no cache holds them
    bandwidth = 2 * 4 * 2**26 / timed(lambda: copy.copy_(big), 20, min)
    print(f"matmul {rate / 1e9:.0f} GFLOP/s, memory {bandwidth / 1e9:.1f} GB/s, {torch.get_num_threads()} thread(s)\n")
    print("| | matmul | memory | bare network | update, reached | rollout | of it in the env |\n|---|---:|---:|---:|---:|---:|---:|")
    args = Args(device="cpu", sim="torch", torch_threads=1, max_epochs=1000)
    ant = replace(args, **compare.ANT)
    for name, args, env, epochs in (("Cartpole", args, Cartpole(512, CPU), 60), ("Ant-sized", ant, compare.Synthetic(4096), 6)):
        sizes = (env.num_obs, *args.units, env.num_acts + 1)
        passes = args.update_epochs * env.num_envs * args.num_steps
        operations = passes * 3 * 2 * sum(a * b for a, b in zip(sizes, sizes[1:]))
        moved = passes * 4 * (env.num_obs + env.num_acts + 4 + 4 * (2 * sum(args.units) + sizes[-1]))
        net, x = compare.mlp(env.num_obs, (*args.units, sizes[-1])), torch.randn(args.minibatch_size, env.num_obs)

        def bare():
            net(x).sum().backward()

        bare_seconds = timed(bare, epochs // 2) * passes / args.minibatch_size
        with tempfile.TemporaryDirectory() as folder:
            agent = agent_for(args, env, folder)
            times = []
            for agent.epoch_num in range(1, epochs + 1):
                start = time.perf_counter()
                in_env = agent.rollout()
                middle = time.perf_counter()
                agent.update()
                times.append((time.perf_counter() - middle, middle - start, in_env))
        update, rollout, in_env = (1000 * statistics.median(t[i] for t in times[1:]) for i in range(3))
        print(f"| {name} | {1000 * operations / rate:.1f} ms | {1000 * moved / bandwidth:.1f} ms | "
              f"{1000 * bare_seconds:.1f} ms | {update:.1f} ms | {rollout:.1f} ms | {in_env:.1f} ms |", flush=True)


def grow_one(num_envs):
    args = Args(device="cpu", sim="torch", num_envs=num_envs, minibatch_size=min(8192, 16 * num_envs), max_epochs=1000)
    with tempfile.TemporaryDirectory() as folder:
        agent = agent_for(args, Cartpole(num_envs, CPU), folder)
        times, began = [], time.perf_counter()
        while len(times) < 4 or time.perf_counter() - began < 5:
            start = time.perf_counter()
            agent.epoch_num += 1
            agent.rollout()
            agent.update()
            times.append(time.perf_counter() - start)
    print(json.dumps({"rate": num_envs * args.num_steps / statistics.median(times[1:]), "peak": compare.peak_mb()}))


def growth():
    print("| environments | env steps/s | peak MB |\n|---:|---:|---:|")
    for num_envs in (64, 512, 4096, 32768, 131072):
        done = subprocess.run([sys.executable, __file__, "--grow-one", str(num_envs)], check=True, stdout=subprocess.PIPE)
        result = json.loads(done.stdout)
        print(f"| {num_envs:,} | {result['rate'] / 1000:.0f}k | {result['peak']:.0f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grow-one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.grow_one:
        grow_one(options.grow_one)
    else:
        growth()  # first: Linux counts a parent's memory in its child's peak
        print()
        limits()
