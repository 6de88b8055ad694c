"""Would the tests notice? Breaks train_ppo.py in one small place at a time, in a copy of the
repository, and runs the tests there: each mutation must make one fail.

    python benchmarks/mutate.py                   all of them; an hour or more
    python benchmarks/mutate.py --jobs 4          four at a time
    python benchmarks/mutate.py --only gae:       those whose name begins so

A row of MUTATIONS is `name | old text | new text`, with the old text exactly once in train_ppo.py.
The line with a # above names the tests that should notice, by words for pytest's -k or as a file:
they run first, and all the others only if these pass. Exit code 1 if a mutation survives.
"""

import argparse
import functools
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
SOURCE = (TOP / "train_ppo.py").read_text()

MUTATIONS = r"""
# tests/test_algorithm.py
gae: lambda | args.gamma * args.gae_lambda * not_done | args.gamma * not_done
gae: done | next_values * not_done - values | next_values - values
gae: last step | reversed(range(len(rewards) - 1)) | reversed(range(len(rewards) - 2))
bootstrap: gamma | args.gamma * buffer["values"] * buffer | buffer["values"] * buffer
rollout: clipped actions | actions.clamp(-1.0, 1.0) if args.clip_actions else actions | actions
batch: env-major | x.transpose(0, 1).flatten(0, 1) for name | x.flatten(0, 1) for name
norm: values first | model.value_mean_std.update(values.unsqueeze(1)) | pass
norm: unbiased | len(x), x.mean(0), x.var(0) | len(x), x.mean(0), x.var(0, False)
norm: clamp | / std).clamp(-5.0, 5.0) | / std)
loss: clip range | 1.0 + args.clip_coef) | 1.0 + 2 * args.clip_coef)
loss: pessimistic | torch.where(surrogate > clipped | torch.where(surrogate < clipped
loss: value clip | torch.where(value_loss > clipped_loss | torch.where(value_loss < clipped_loss
loss: entropy's sign | loss - args.ent_coef | loss + args.ent_coef
loss: soft bound | softshrink(mu, 1.1) | softshrink(mu, 1.0)
kl: direction | (old_sigma / sigma + 1e-5) | (sigma / old_sigma + 1e-5)
lr: upper bound | 2.0 * args.kl_threshold | 3.0 * args.kl_threshold
lr: max | (lr * 1.5).clamp(max=args.max_lr) | (lr * 1.5)
lr: linear | 1.0 - epoch / args.max_epochs | 1.0 - (epoch - 1) / args.max_epochs
lr: standard | pass_kl += kl / len(minibatches) | pass_kl += kl
cartpole: velocity limit | theta_dot.clamp(-8.0, 8.0) | theta_dot
meter: at most size | weight = min(n, self.size) | weight = n
meter: older episodes | kept = min(self.count, self.size - weight) | kept = self.count
meter: sums start anew | self.running.masked_fill_(ended[t].unsqueeze(1), 0.0) | pass
# tests/test_rl_games.py
norm: first pass only | if args.normalize_input and pass_number == 0 | if args.normalize_input
kl: since the last pass | minibatch["mus"].copy_(mu) | pass
update: max_grad_norm 0 | if args.max_grad_norm > 0: | if True:
# tests/test_processes.py
processes: n | n = len(x) * WORLD_SIZE | n = len(x)
processes: variance between | var * (n - 1) + n * (mean - common_mean).square() | var * (n - 1)
processes: gradients | nn.utils.vector_to_parameters(message[1:], gradients) | pass
# infos or nan or save or exception or whole_epoch or four or before_it_has_its_name
meter: continued | agent.episodes.mean = state["episodes"]["mean"] | pass
infos: finite | numbers = numbers[numbers.isfinite()] | pass
nan: after the update | if bad: | if False:
nan: in the rollout | sums.isfinite().all() | sums.isfinite().any()
save: fsync | sync(file.fileno()) | pass
save: fsync of the folder | if os.name == "posix": | if False:
save: replace | os.replace(temporary, os | shutil.copy(temporary, os
save: epoch before an exception | self.epoch_num -= 1 | pass
save: level in mid-rollout | mid_rollout and getattr(env, "exact_state", False) | mid_rollout
# checkpoint or torchscript or best
load: checksum | if zipfile.ZipFile(path).testzip(): | if False:
load: weights_only | weights_only=True) | weights_only=False)
load: TorchScript | mock.patch("torch.jit.load", | mock.patch("torch.jit.save",
load: env's state counts | found[1]["env_state"] is not None | 0
best: enough episodes | finished >= args.games_to_track | finished > 0
best: save_best_after | epoch >= args.save_best_after | epoch > args.save_best_after
best: not another run's | if os.path.isdir(args.checkpoint) and state | if state
best: first_epoch | agent.epoch_num = agent.first_epoch = state | agent.epoch_num = state
# signal or stop or fork or seed
signals: two seconds | > first_time + 2.0 | > first_time
signals: fork | if os.getpid() != process: | if False:
seed: not drawn again | 1_000_003 * epoch | 0 * epoch
# refused or flag or setting
args: Count | 1 if field.type is Count else 0 | 0
args: precedence | [*as_flags(found), *argv] | [*argv, *as_flags(found)]
args: init_from's group | "normalize_input" if first.init_from | "num_envs" if first.init_from
args: a file passes on no track | "track" if os.path.isdir(source) else "env_id" | "track"
args: absolute paths | os.path.abspath(getattr(first, name)) | getattr(first, name)
# tests/test_isaacgym.py
yaml: truncate_grads | if not flat.pop("config.truncate_grads", False): | if False:
yaml: separate | "network.separate": "separate" | "network.separate": "torch_deterministic"
yaml: fixed | flat["config.lr_schedule"] = "fixed" | flat["config.lr_schedule"] = "adaptive"
yaml: 0 asks for something | if value is not False and | if value and
# tests/test_wandb.py
wandb: axes | epoch_num: "epoch", | epoch_num: "global_step",
wandb: its own variables | if f"WANDB_{k.upper()}" not in os.environ | if True
"""


@functools.lru_cache(maxsize=None)
def failure(old, new, words):
    """The first of the tests with these words that fails with this mutation; "" if none does."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(TOP, copy, ignore=shutil.ignore_patterns("runs", "wandb", "__pycache__"))
        (copy / "train_ppo.py").write_text(SOURCE.replace(old, new))
        command = ["timeout", "-s", "KILL", "1800", sys.executable, "-m", "pytest", "-x", "-q"]
        command += [words] if words.endswith(".py") else ["-k", words]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    if done.returncode in (0, 5):  # 5: no test has these words
        return ""
    failed = re.findall(r"^(?:FAILED|ERROR) (.*?)(?: - |$)", done.stdout, re.MULTILINE)
    return failed[0] if failed else f"exit code {done.returncode}: {done.stdout[-200:]}"


def check(row):
    """Print what becomes of a mutation. Returns whether it was caught."""
    words, name, old, new = row
    if not failure(old, new, words):
        words = ""  # all tests
    failed = failure(old, new, words)
    caught = bool(failed) and failed != failure("", "", words)  # not without a mutation, too
    why = f"fails without it, too: {failed}" if failed else "no test fails"
    print(f"{name}: {f'caught by {failed}' if caught else f'SURVIVED, {why}'}", flush=True)
    return caught


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="with what the names of the mutations begin")
    parser.add_argument("--jobs", type=int, default=1, help="mutations at a time")
    options = parser.parse_args()
    rows, words = [], ""
    for line in MUTATIONS.strip().splitlines():
        if line.startswith("# "):
            words = line[2:]
            continue
        name, old, new = line.split(" | ")
        if SOURCE.count(old) != 1:
            sys.exit(f"error: {name}: {SOURCE.count(old)} times in train_ppo.py: {old}")
        compile(SOURCE.replace(old, new), name, "exec")
        if name.startswith(options.only):
            rows.append((words, name, old, new))
    with ThreadPoolExecutor(options.jobs) as pool:
        caught = sum(pool.map(check, rows))
    print(f"{caught} of {len(rows)} mutations caught")
    sys.exit(caught < len(rows))


if __name__ == "__main__":
    main()
