"""What must hold on a GPU, checked in one call: a line for each check, and exit code 1 if one
fails.

    python benchmarks/gpu.py                  on a machine with CUDA; about ten minutes
    python benchmarks/gpu.py --device cpu     a rehearsal: it tests this script rather than CUDA,
                                              and times Cartpole alone

It says what was seen, with the card's name, so that a result can be quoted:

    no waiting   nowhere in a rollout and an update does the CPU wait for the GPU
    continuing   4 + 4 epochs are 8, to the last bit
    devices      a checkpoint of the GPU continues and is evaluated on the CPU, and the other way
                 round
    --compile    with CUDA graphs it learns what eager PyTorch learns: the largest difference
                 between the weights after 3 epochs, and the return after a whole run
    precision    the return after a whole run with float32, with TF32, and with bfloat16
    NCCL         the collectives that several processes use
    time         of an epoch, rollout and update, eager, compiled, and compiled with TF32, in
                 Cartpole's, Ant's and ShadowHand's sizes; the update's matrix products as a share
                 of the rate that one large product reaches
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time

import torch
import torch.distributed as dist

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import compare

import train_ppo
from train_ppo import Args

compare.torch = torch  # it imports torch only where it trains

TOP = os.path.dirname(HERE)
SCRIPT = os.path.join(TOP, "train_ppo.py")
EVALUATE = os.path.join(TOP, "tools", "evaluate.py")
SHADOW_HAND = dict(num_envs=16384, num_steps=8, minibatch_size=32768, update_epochs=5)
# Observations, actions, and what the tasks' yaml files say; the networks are theirs too.
SIZES = {
    "Cartpole": (4, 1, {}),
    "Ant": (60, 8, compare.ANT),
    "ShadowHand": (211, 20, dict(SHADOW_HAND, units=(512, 512, 256, 128))),
}


def agent_for(env, args):
    return train_ppo.PPOAgent(args, env, train_ppo.MultiObserver([]))


def epoch(agent):
    """One epoch without figures, log and checkpoints. Returns when the device is at rest, with the
    seconds of rollout and update."""
    wait = torch.cuda.synchronize if agent.device.type == "cuda" else lambda: None
    start = time.perf_counter()
    rollout(agent)
    wait()
    middle = time.perf_counter()
    core(agent)
    wait()
    return middle - start, time.perf_counter() - middle


def rollout(agent):
    job = (agent.act, agent.env, agent.obs, agent.buffer, agent.args, lambda infos, dones: None)
    agent.obs, _ = train_ppo.rollout(*job)


def core(agent):
    """What PPOAgent.train does after the rollout."""
    args, buffer = agent.args, agent.buffer
    rewards = train_ppo.scale_and_bootstrap(buffer, args)
    last_value = agent.model.value(agent.obs)
    advantages = train_ppo.gae(rewards, buffer["values"], buffer["dones"], last_value, args)
    batch = train_ppo.make_batch(buffer, advantages)
    return train_ppo.update(agent.model, agent.optimizer, agent.lr, batch, 1, args, agent.loss_fn)


def command(folder, *flags, script=SCRIPT):
    """Run train_ppo.py, or another script; returns what it printed."""
    done = subprocess.run(
        [sys.executable, script, *flags],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:])
    return done.stdout


def weights(folder, run):
    path = os.path.join(folder, "runs", run, "nn", "last.pth")
    return train_ppo.load_checkpoint(path)["model"]


def difference(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def final_reward(output):
    return float(re.findall(r"mean reward (-?\d+\.\d+)", output)[-1])


# --------------------------------------------------------------------------------------------------
# the checks: each returns (whether it holds, what was seen)


def no_waiting(device, folder):
    args = Args(device=device, sim="torch")
    torch_device = train_ppo.pick_device(device)
    agent = agent_for(train_ppo.Cartpole(args.num_envs, torch_device), args)
    epoch(agent)
    if torch_device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        rollout(agent)
        core(agent)
    except RuntimeError as exc:
        return False, str(exc).splitlines()[0]
    finally:
        if torch_device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return True, "a rollout and an update"


def continuing(device, folder):
    flags = ["--device", device, "--torch-deterministic", "--experiment"]
    command(folder, *flags, "straight", "--max-epochs", "8")
    command(folder, *flags, "stopped", "--max-epochs", "4")
    same = ["--device", device, "--torch-deterministic", "--checkpoint", "runs/stopped"]
    command(folder, *same, "--max-epochs", "8")
    found = difference(weights(folder, "straight"), weights(folder, "stopped"))
    return found == 0.0, f"largest difference {found:.1e}"


def devices(device, folder):
    command(folder, "--device", device, "--experiment", "moved", "--max-epochs", "4")
    for where, epochs in (("cpu", "6"), (device, "8")):
        command(folder, "--device", where, "--checkpoint", "runs/moved", "--max-epochs", epochs)
    means = []
    for where in ("cpu", device):
        flags = ["--device", where, "--json", "evaluation.json"]
        command(folder, "runs/moved", *flags, script=EVALUATE)
        with open(os.path.join(folder, "evaluation.json")) as file:
            means.append(json.load(file)["mean"])
    seen = f"evaluated on the CPU {means[0]:.2f}, there {means[1]:.2f}"
    return True, f"{device} -> cpu -> {device}; {seen}"


def compile_(device, folder):
    flags = ["--device", device, "--experiment"]
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        command(folder, *flags, name, "--max-epochs", "3", *more)
    found = difference(weights(folder, "eager"), weights(folder, "compiled"))
    reward = final_reward(command(folder, *flags, "whole", "--compile"))
    return found < 1e-3 and reward > 450, f"largest difference {found:.1e}, return {reward:.1f}"


def precision(device, folder):
    rewards = {}
    rewards["float32"] = final_reward(command(folder, "--device", device))
    script = os.path.join(folder, "tf32.py")
    with open(script, "w") as file:
        file.write(f"import sys\nsys.path.insert(0, {TOP!r})\nimport torch\nimport train_ppo\n")
        file.write("torch.set_float32_matmul_precision('high')\ntrain_ppo.main()\n")
    rewards["TF32"] = final_reward(command(folder, "--device", device, script=script))
    rewards["bfloat16"] = final_reward(command(folder, "--device", device, "--mixed-precision"))
    seen = ", ".join(f"{name} {reward:.1f}" for name, reward in rewards.items())
    return min(rewards.values()) > 450, f"return {seen}"


def nccl(device, folder):
    backend = "gloo" if device == "cpu" else "nccl"
    store = f"file://{os.path.join(folder, 'store')}"
    dist.init_process_group(backend, init_method=store, rank=0, world_size=1)
    try:
        x = torch.arange(4.0, device=train_ppo.pick_device(device))
        dist.all_reduce(x)
        dist.broadcast(x, 0)
        good = x.tolist() == [0.0, 1.0, 2.0, 3.0]
    finally:
        dist.destroy_process_group()
    return good, f"all_reduce and broadcast by {backend}, one process"


def matrix_rate(device, size=4096):
    """Multiplications and additions a second that one large product reaches."""
    a = torch.randn(size, size, device=device)
    for _ in range(3):
        a @ a
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(3):
        a @ a
    wait()
    return 3 * 2 * size**3 / (time.perf_counter() - start)


def times(device, epochs):
    """Prints a row for each size and mode."""
    torch_device = train_ppo.pick_device(device)
    for name in SIZES if torch_device.type == "cuda" else ["Cartpole"]:
        num_obs, num_acts, more = SIZES[name]
        for mode in ("eager", "compiled", "compiled with TF32"):
            torch.set_float32_matmul_precision("high" if "TF32" in mode else "highest")
            rate = matrix_rate(torch_device)
            args = Args(device=device, sim="torch", compile=mode != "eager", **more)
            env = compare.Synthetic(args.num_envs, num_obs, num_acts, torch_device)
            if name == "Cartpole":
                env = train_ppo.Cartpole(args.num_envs, torch_device)
            agent = agent_for(env, args)
            for _ in range(3):
                epoch(agent)
            rounds = sorted(epoch(agent) for _ in range(epochs))
            rollout_time, update_time = rounds[len(rounds) // 2]
            layers = [p for p in agent.model.a2c_network.parameters() if p.dim() == 2]
            # Forward once, and backward twice, of each weight for each row of each pass.
            work = 6 * sum(p.numel() for p in layers) * args.num_envs * args.num_steps
            share = work * args.update_epochs / update_time / rate
            seen = f"rollout {1000 * rollout_time:.1f} ms, update {1000 * update_time:.1f} ms"
            print(
                f"time       {name}, {mode}: {seen}, {share:.0%} of the rate of one large product"
            )
            sys.stdout.flush()


CHECKS = {
    "no waiting": no_waiting,
    "continuing": continuing,
    "devices": devices,
    "--compile": compile_,
    "precision": precision,
    "NCCL": nccl,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or, to rehearse, cpu")
    parser.add_argument("--epochs", type=int, default=20, help="that are timed, for each row")
    options = parser.parse_args()
    device = train_ppo.pick_device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, a rehearsal"
    print(f"torch {torch.__version__}, {name}")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for what, check in CHECKS.items():
            try:
                good, seen = check(options.device, folder)
            except (Exception, train_ppo.UserError) as exc:
                lines = str(exc).strip().splitlines() or [""]
                good, seen = False, f"{type(exc).__name__}: {lines[-1]}"
            failed |= not good
            print(f"{what:10} {'good' if good else 'FAILED'}: {seen}", flush=True)
        times(options.device, options.epochs)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
