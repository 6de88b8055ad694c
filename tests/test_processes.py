"""Several processes, joined by gloo: they train one policy, and end together."""

import atexit
import json
import os
import re
import signal
import socket
import sys
import time
from subprocess import PIPE, STDOUT, Popen

import pytest
import torch
from harness import SCRIPT, SMALL, Env, differences, finish, snapshot, start, wait_for

import train_ppo

SPY = "--env-id=test_processes:make_spy"
FLAGS = (SPY, "--num-envs=16", "--num-steps=8", "--save-frequency=0", "--experiment=r")
GOODBYE = "exit hooks are called\n"
EPOCH_4 = 2 + 3 * 8  # the step of an Env with which it begins; step 1 is the check of the env


class Spy(Env):
    """Notes what its process has at the start of each epoch."""

    def set_train_info(self, frame, algo):
        row = dict(frame=frame, lr=float(algo.lr), model=algo.model.state_dict(), obs=self.obs)
        torch.save(row, f"epoch_{algo.epoch_num}_of_{train_ppo.RANK}.pth")
        if self.bad_at and algo.epoch_num == 4:  # gloo's threads now wait for the main one
            for thread in map(int, os.listdir("/proc/self/task")):
                os.sched_setaffinity(thread, {min(os.sched_getaffinity(0))})
                if thread != os.getpid():
                    os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))


def make_spy(num_envs, device, seed):
    atexit.register(print, GOODBYE[:-1])  # W&B and multiprocessing have some
    return Spy(num_envs, device, seed, **json.loads(os.environ["TEST_ENV"]))


def noted(epoch, rank):
    return torch.load(f"epoch_{epoch}_of_{rank}.pth", weights_only=True)


def processes(*flags, codes, envs=({}, {}, {}), folders=(".", ".", "."), script=SCRIPT):
    """Start processes as torchrun does, each with its env (keywords of Spy) and working directory,
    and wait for their ends with these exit codes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environ = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(len(codes)))
    started = []
    for rank in range(len(codes)):
        environ.update(RANK=str(rank), LOCAL_RANK=str(rank), TEST_ENV=json.dumps(envs[rank]))
        started.append(start(*flags, environ=environ, cwd=folders[rank], script=script))
    return [finish(process, code) for process, code in zip(started, codes)]


def test_processes_train_one_policy_stop_together_and_continue(here):
    """A signal to one of them stops both after the same epoch. What goes on is the policy, not the
    noise of the first epoch; the number of processes may change."""
    envs = (dict(lengths=4, infos={"rank": 0.0}), dict(lengths=2, infos={"rank": 1.0}))
    envs[1].update(kill_at=EPOCH_4, kill=signal.SIGTERM)
    first, second = processes(*FLAGS, "--max-epochs=9", envs=envs, codes=(143, 0))
    assert "2 x cpu, 16 envs" in first.out and "continue  torchrun" in first.out
    assert (second.out, second.err) == (GOODBYE, ""), "rank 0 alone speaks"
    for epoch in (1, 2, 3, 4):
        assert differences(noted(epoch, 0), noted(epoch, 1)) == [".obs"]
    state, curves = first.state(), first.curves
    assert (state["epoch"], state["frame"], os.listdir("runs")) == (4, 4 * 2 * 16 * 8, ["r"])
    assert curves["episode_lengths/iter"][-1] == (4, pytest.approx(3, abs=0.1)), "mean of both"
    assert curves["rank/iter"][-1] == (4, 0.0), "what environments report is rank 0's"

    for n, epochs in ((2, 6), (1, 7), (3, 8)):
        done, *_ = processes(SPY, "--checkpoint=runs/r", f"--max-epochs={epochs}", codes=[0] * n)
        before, state = state, done.state()
        frames = before["frame"] + (epochs - before["epoch"]) * n * 16 * 8
        assert (state["epoch"], state["frame"]) == (epochs, frames)
        for rank in range(n):
            now, at_first = noted(before["epoch"] + 1, rank), noted(1, rank % 2)
            assert differences(now["model"], before["model"]) == []
            assert not torch.equal(now["obs"], at_first["obs"])


BAD_REWARD = dict(bad_at=(EPOCH_4, "reward", 3, "nan"))
TROUBLES = {  # env of the second process, its exit code, what the first one says, and the second
    "is killed": (dict(kill_at=EPOCH_4), -9, "RuntimeError: ", ""),
    "raises": (dict(raise_at=EPOCH_4), 1, "RuntimeError: ", "RuntimeError: the simulator broke"),
    "meets NaN": (BAD_REWARD, 1, "error: NaN or Inf in another process", "NaN or Inf in rewards"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_process_that_dies_or_goes_bad_ends_the_others(trouble, here):
    env, code, *messages = TROUBLES[trouble]
    both = processes(*FLAGS, "--max-epochs=99", envs=({}, env), codes=(1, code))
    for done, message in zip(both, messages):
        assert message in done.err
        assert done.code != 1 or done.out.endswith(GOODBYE)
    state = both[0].state()
    assert state["epoch"] == 3 and all(x.isfinite().all() for x in state["model"].values())


def test_processes_that_see_different_checkpoints_do_not_average_them(here):
    """A folder that is not shared, or not yet up to date."""
    for epochs in "12":
        os.mkdir(epochs)
        processes(*FLAGS, f"--max-epochs={epochs}", folders=epochs, codes=[0])
    before = snapshot(".")
    first, _ = processes(SPY, "--checkpoint=runs/r", "--max-epochs=9", folders="12", codes=(1, 1))
    assert re.fullmatch("error: the processes see different checkpoints.*\n", first.err)
    assert snapshot(".") == before


def learn(rows):
    """Update a policy from these rows of 32, of which the two halves differ much. Returns weights,
    statistics, learning rate and a gradient, whose scale Adam's steps do not show."""
    torch.manual_seed(0)
    args = train_ppo.Args(update_epochs=3, kl_threshold=0.1)
    model = train_ppo.ActorCritic(3, 2, args)
    obs = torch.cat((torch.randn(16, 3), torch.randn(16, 3) + 5.0))
    batch = dict(model.act(obs, torch.randn(32, 2)), obs=obs)
    batch["advantages"] = torch.randn(32) + 3 * obs[:, 0]
    batch["returns"] = batch["advantages"] + batch["values"]
    batch = {name: column[rows].clone() for name, column in batch.items()}
    lr = torch.tensor(1e-3)
    adam = torch.optim.Adam(model.parameters(), lr=lr)
    train_ppo.update(model, adam, lr, batch, 1, args, train_ppo.ppo_loss)
    return dict(model.state_dict(), lr=lr, gradient=model.a2c_network.sigma.grad)


LEARN = """
import os, torch, test_processes, train_ppo
torch.distributed.init_process_group("gloo")
rank = train_ppo.RANK
torch.save(test_processes.learn(slice(16 * rank, 16 * rank + 16)), f"learned_{rank}.pth")
os._exit(0)
"""


def test_two_processes_learn_what_one_learns_from_the_rows_of_both(here):
    processes(LEARN, script="-c", codes=(0, 0))
    first, second = [torch.load(f"learned_{rank}.pth", weights_only=False) for rank in range(2)]
    assert differences(first, second) == []
    expected = learn(slice(32))
    assert expected["lr"] not in (learn(slice(16))["lr"], learn(slice(16, 32))["lr"])
    for name, value in expected.items():
        assert torch.allclose(first[name], value, rtol=1e-4, atol=1e-5), name


def test_two_signals_under_torchrun_save_the_last_whole_epoch(here):
    """SLURM signals every process, and torchrun, which gets the signal too, passes it on."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", SCRIPT]
    words += [*SMALL, "--experiment=r", "--max-epochs=100000", "--save-frequency=0"]
    process = Popen(words, stdout=PIPE, stderr=STDOUT, start_new_session=True, text=True)
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
