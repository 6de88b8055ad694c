"""Several processes, joined by gloo: they train one policy, and end together."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from harness import (
    SCRIPT,
    SMALL,
    Env,
    differences,
    finish,
    forkserver,
    run,
    snapshot,
    start,
    wait_for,
)

import train_ppo

FLAGS = ("--num-envs=16", "--num-steps=8", "--save-frequency=0", "--experiment=r")


class Spy(Env):
    """Notes what each process has at the start of each epoch. In epoch 4 process 1 has trouble."""

    def __init__(self, num_envs, device, seed):
        super().__init__(num_envs, device, seed, lengths=4)
        self.actions = torch.zeros(())

    def set_train_info(self, frame, algo):
        weights = sum(x.double().abs().sum() for x in algo.model.state_dict().values())
        row = (algo.epoch_num, frame, algo.lr, weights, self.obs.sum(), self.actions.sum())
        with open(f"rank{train_ppo.RANK}.txt", "a") as file:
            file.write(" ".join(repr(float(x)) for x in row) + "\n")
        trouble = os.environ.get("TROUBLE", "")
        if algo.epoch_num == 4 and train_ppo.RANK == 1 and trouble:
            if trouble == "raise":
                raise RuntimeError("the simulator broke")
            if trouble == "nan":
                self.bad_at = (self.steps + 1, "reward", 3, "nan")
            else:
                os.kill(os.getpid(), getattr(signal, trouble))

    def step(self, actions):
        self.actions = actions
        obs, reward, done, infos = super().step(actions)
        reward = reward * 0 + train_ppo.RANK * done  # NaN stays
        return obs, reward, done, dict(infos, rank=float(train_ppo.RANK))


def processes(n, *flags, codes, trouble="", folders=(".", ".", ".")):
    """Start n processes as torchrun does, and wait for them; their exit codes must be `codes`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(n))
    started, flags = [], ("--env-id=test_processes:Spy", *flags)
    for rank in range(n):
        environ.update(TROUBLE=trouble, RANK=str(rank), LOCAL_RANK=str(rank))
        started.append(start(*flags, environ=environ, cwd=folders[rank]))
    return [finish(process, code) for process, code in zip(started, codes)]


def noted(rank):
    """The rows of Spy: epoch, frame, learning rate, weights, observations, actions."""
    with open(f"rank{rank}.txt") as file:
        rows = [[float(x) for x in line.split()] for line in file]
    os.remove(f"rank{rank}.txt")
    return rows


def test_processes_train_one_policy_stop_together_and_continue(here):
    """A signal to one of them stops both after the same epoch. What goes on is the policy, not the
    noise of the first epoch; the number of processes may change."""
    first, second = processes(2, *FLAGS, "--max-epochs=9", trouble="SIGTERM", codes=(143, 143))
    assert "2 x cpu, 16 envs" in first.out and "continue  torchrun" in first.out
    assert (second.out, second.err) == ("", ""), "rank 0 alone speaks"
    before = noted(0)
    both = list(zip(before, noted(1)))
    assert [int(a[0]) for a, _ in both] == [1, 2, 3, 4]
    assert [a[1:4] for a, _ in both] == [b[1:4] for _, b in both], "frame, learning rate, weights"
    assert len({a[3] for a, _ in both}) == 4, "the weights move"
    assert [a[4] != b[4] for a, b in both] == [True] * 4, "each has environments of its own"
    assert [a[5] != b[5] for a, b in both[1:]] == [True] * 3, "and noise of its own"
    state = first.state()
    assert (state["epoch"], state["frame"]) == (4, 4 * 2 * 16 * 8) and len(first.files) == 1
    assert first.curves["rewards/iter"][-1] == (4, 0.5), "the mean of both"
    assert first.curves["rank/iter"][-1] == (4, 0.0), "what environments report is rank 0's"

    for n, epochs in ((2, 6), (1, 7), (3, 8)):
        done, *_ = processes(n, "--checkpoint=runs/r", f"--max-epochs={epochs}", codes=[0] * n)
        assert "the env starts new episodes" in done.out
        after = done.state()
        frames = (epochs - state["epoch"]) * n * 16 * 8
        assert (after["epoch"], after["frame"]) == (epochs, state["frame"] + frames)
        weights = sum(float(x.double().abs().sum()) for x in state["model"].values())
        rows = [noted(rank) for rank in range(n)]
        for (row, *_), old in zip(rows, (*both[0], [0] * 6)):
            assert (row[0], row[3]) == (state["epoch"] + 1, pytest.approx(weights, rel=1e-12))
            assert row[2] == pytest.approx(state["optimizer"]["param_groups"][0]["lr"])
            assert row[4] != old[4], "the resets of the first epoch are not drawn again"
        state = after


GONE = "Traceback .*RuntimeError: .*(Connection|peer|gloo).*"
NAN = "error: NaN or Inf in {}, epoch 4\n"
TROUBLES = {  # what happens in process 1: exit codes, what process 0 says, what process 1 says
    "SIGKILL": ((1, -9), GONE, ""),
    "raise": ((1, 1), GONE, "Traceback .*RuntimeError: the simulator broke\n"),
    "nan": ((1, 1), NAN.format("another process"), NAN.format("rewards of 3 of 16 envs")),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_process_that_dies_or_goes_bad_ends_the_others(here, trouble):
    """The reason is on the terminal, and what was learned before is on disk."""
    codes, *says = TROUBLES[trouble]
    both = processes(2, *FLAGS, "--max-epochs=99", trouble=trouble, codes=codes)
    for done, expected in zip(both, says):
        said = re.sub("^Process .*\n", "", done.err)  # which multiprocessing adds
        assert re.fullmatch(expected, said, re.DOTALL), done.err
    state = both[0].state()
    assert state["epoch"] == 3
    assert all(torch.isfinite(x).all() for x in state["model"].values()) and len(state["model"]) > 9


def test_a_users_mistake_is_one_line(here):
    first, second = processes(2, *FLAGS, "--kl-threshold=-1", codes=(1, 1))
    assert re.fullmatch("error: --kl-threshold must be .*\n", first.err), first.err
    assert second.err == ""


def test_what_process_0_alone_cannot_do_ends_all(here):
    first, _ = processes(2, *FLAGS, "--train-dir=/proc/x", codes=(1, 1))
    assert "/proc/x" in first.err


def test_processes_that_see_different_checkpoints_do_not_average_them(here):
    """A folder that is not shared, or not yet up to date."""
    run(*SMALL, "--experiment=r", "--env-id=test_processes:Spy")
    shutil.copytree("runs", "other/runs")
    os.replace("other/runs/r/nn/epoch_2.pth", "other/runs/r/nn/last.pth")
    os.remove("other/runs/r/nn/epoch_4.pth")
    flags = ("--checkpoint=runs/r", "--max-epochs=9")
    before = snapshot("runs")
    first, _ = processes(2, *flags, folders=(".", "other"), codes=(1, 1))
    assert re.fullmatch("error: the processes see different checkpoints.*\n", first.err)
    assert snapshot("runs") == before


def learn(rank, count):
    """Update a policy from the rows that process `rank` of `count` has of a common batch. Those of
    the two halves differ much. Returns weights, statistics, gradients and learning rate."""
    torch.manual_seed(0)
    # A half alone would make another learning rate of its KL divergence: 0.03 and 0.27.
    args = train_ppo.Args(minibatch_size=32 // count, update_epochs=3, kl_threshold=0.1)
    model = train_ppo.ActorCritic(3, 2, args)
    obs = torch.randn(2, 2, 16, 3) + torch.tensor([0.0, 5.0]).view(2, 1, 1)  # minibatch, half, row
    batch = dict(model.act(obs.flatten(0, 2), torch.randn(64, 2)), obs=obs.flatten(0, 2))
    batch["advantages"] = torch.randn(64) + 3 * obs.flatten(0, 2)[:, 0]
    batch["returns"] = batch["advantages"] + batch["values"]
    for name, column in batch.items():
        halves = column.unflatten(0, (2, 2, 16))
        mine = halves if count == 1 else halves[:, rank]
        batch[name] = mine.reshape(64 // count, *column.shape[1:]).clone()
    lr = torch.tensor(1e-3)
    adam = torch.optim.Adam(model.parameters(), lr=lr)
    train_ppo.update(model, adam, lr, batch, 1, args, train_ppo.ppo_loss)
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    return dict(model.state_dict(), **gradients, lr=lr)


def learn_together(rank, url):
    """Target of a process."""
    train_ppo.RANK, train_ppo.WORLD_SIZE = rank, 2
    dist.init_process_group("gloo", url, rank=rank, world_size=2)
    torch.save(learn(rank, 2), f"learned_{rank}.pth")
    os._exit(0)


def test_two_processes_learn_what_one_learns_from_the_rows_of_both(here):
    context, url = forkserver(), f"file://{here}/meeting_point"
    started = [context.Process(target=learn_together, args=(rank, url)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    first, second = [torch.load(f"learned_{rank}.pth", weights_only=False) for rank in range(2)]
    assert differences(first, second) == []
    expected = learn(0, 1)
    assert expected["running_mean_std.count"] == 65 and expected["value_mean_std.count"] == 129
    assert expected["lr"] != 1e-3, "the schedule has seen a KL divergence"
    for name, value in expected.items():
        assert torch.allclose(first[name], value, rtol=1e-4, atol=1e-5), name


def test_two_signals_under_torchrun_save_the_last_whole_epoch(here):
    """SLURM signals every process, and torchrun, which gets the signal too, passes it on."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", SCRIPT]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    flags = (*SMALL, "--experiment=r", "--max-epochs=100000", "--save-frequency=0")
    process = subprocess.Popen([*words, *flags], universal_newlines=True, **options)
    try:
        wait_for(lambda: "epoch 3/" in process.stdout.readline(), seconds=200)
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.02)
        os.killpg(process.pid, signal.SIGTERM)
        out, _ = process.communicate(timeout=120)  # until the workers, too, have closed it
    finally:
        process.kill()
    epoch = int(re.findall(r"epoch (\d+)/100000", out)[-1])
    assert f"stopped after epoch {epoch} (SIGTERM)" in out, out
    assert train_ppo.load_checkpoint("runs/r/nn/last.pth")["epoch"] == epoch
