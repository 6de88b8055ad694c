"""What is reached, with how many seeds: docs/results.md, from the runs kept in results.jsonl.

    pip install -r requirements.txt "mujoco>=3.3.3" "gymnasium[mujoco]>=1.1"
    pip install gym==0.23.1 tensorboardX psutil setproctitle pyyaml
    pip install --no-deps --ignore-requires-python rl-games==1.6.1
    pip install --no-deps mjlab==1.6.0             which has the Go1
    python benchmarks/results.py                   write docs/results.md
    python benchmarks/results.py --check           say whether that page and README have its numbers
    python benchmarks/results.py train ant         train what is missing of a task, and keep it
    python benchmarks/results.py train ant --trainer rl_games --seeds 5

`train` can be stopped and started at will, and in several terminals, one for each trainer: each run
is a line of results.jsonl once it is over. Each has one thread for torch and one for MuJoCo.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import compare

TOP = os.path.dirname(HERE)
KEPT = os.path.join(HERE, "results.jsonl")
PAGE = os.path.join(TOP, "docs", "results.md")
METRICS = {"speed_error": " m/s", "Episode/falls": ""}  # of an evaluation, with their units
FEW = 5  # so many seeds at least for a mean
EVERY = 5  # epochs between two returns that are kept

# task: its name on the page, its name in compare.py or its --env-id, seeds, the return of a
# threshold, trainers
BOTH, OURS = ("train_ppo", "rl_games"), ("train_ppo",)
TASKS = {
    "cartpole": ("Cartpole, built in", "cartpole", 20, 470, BOTH),
    "ant": ("Ant, MuJoCo", "mujoco-ant", 30, 3000, BOTH),
    "quadruped": ("Quadruped", "examples.mujoco_robot:make_env", 3, 20, OURS),
    "go1": ("Unitree Go1", "examples.mujoco_robot:go1", 3, 20, OURS),
    "pendulum": ("Pendulum-v1", "examples.gymnasium_env:Pendulum-v1", 3, -200, OURS),
    "hopper": ("Hopper-v5", "examples.gymnasium_env:Hopper-v5", 3, 1000, OURS),
    "halfcheetah": ("HalfCheetah-v5", "examples.gymnasium_env:HalfCheetah-v5", 3, 1000, OURS),
}


# --------------------------------------------------------------------------------------------------
# runs


def kept():
    """The runs so far: {(task, trainer, seed): run}."""
    if not os.path.exists(KEPT):
        return {}
    with open(KEPT) as file:
        runs = [json.loads(line) for line in file]
    return {(run["task"], run["trainer"], run["seed"]): run for run in runs}


def train(task, trainers, seeds):
    """Train what is missing, the seeds one after the other."""
    os.environ["MUJOCO_THREADS"] = "1"
    for seed in range(1, seeds + 1):
        for trainer in trainers:
            if (task, trainer, seed) not in kept():
                name = TASKS[task][1]
                run = own_run(task, seed) if ":" in name else compared_run(name, trainer, seed)
                run = {"task": task, "trainer": trainer, "seed": seed, **run}
                with open(KEPT, "a") as file:
                    file.write(json.dumps(run) + "\n")
                print(f"{task} {trainer} seed {seed}: {run['return']}", flush=True)


def start(*command):
    command = [sys.executable, *command]
    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")


def compared_run(name, trainer, seed):
    """By compare.py, which measures all trainers alike: returns are of the last 256 episodes."""
    found = compare.run(trainer, name, 1, compare.EPOCHS[name], seed)
    return {
        "return": found["returns"][-1],
        "env_steps": found["env_steps"],
        "env_steps_to_threshold": found["env_steps_to_target"],
        "cpu_minutes_to_threshold": in_minutes(found["cpu_seconds_to_target"]),
        "versions": found["versions"],
        "curve": found["returns"][EVERY - 1 :: EVERY],
    }


def in_minutes(seconds):
    return seconds and round(seconds / 60, 2)


def own_run(task, seed):
    """By train_ppo.py's own command, then an evaluation of best.pth by tools/evaluate.py."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, name, _, threshold, _ = TASKS[task]
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--env-id", name, "--seed", str(seed), "--train-dir", folder]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start("train_ppo.py", *flags, "--experiment", "run", "--device", "cpu")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        run_dir, result = os.path.join(folder, "run"), os.path.join(folder, "evaluation.json")
        start("tools/evaluate.py", run_dir, "--env-id", name, "--json", result)
        events = EventAccumulator(os.path.join(run_dir, "summaries")).Reload()
        points = events.Scalars("rewards/step")
        with open(result) as file:
            evaluation = json.load(file)
        with open(os.path.join(run_dir, "config.json")) as file:
            config = json.load(file)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    env_steps = points[-1].step
    to_threshold = next((point.step for point in points if point.value >= threshold), None)
    keys = ("mean", "std", "count", "length", "epoch")
    return {
        "return": round(points[-1].value, 1),
        "env_steps": env_steps,
        "env_steps_to_threshold": to_threshold,
        "cpu_minutes_to_threshold": in_minutes(
            to_threshold and cpu_seconds * to_threshold / env_steps
        ),
        "cpu_minutes": in_minutes(cpu_seconds),
        "evaluation": {key: round(evaluation[key], 2) for key in keys},
        "metrics": {tag: evaluation["metrics"].get(tag) for tag in METRICS},
        "versions": {"torch": config["torch"], "train_ppo": compare.commit()},
        "curve": [round(point.value, 1) for point in points[EVERY - 1 :: EVERY]],
    }


# --------------------------------------------------------------------------------------------------
# the page


def interval(ours, theirs):
    """Mean of ours less mean of theirs, and half of Welch's interval of 95 % about it."""
    parts = [statistics.variance(x) / len(x) for x in (ours, theirs)]
    freedom = sum(parts) ** 2 / sum(v**2 / (len(x) - 1) for v, x in zip(parts, (ours, theirs)))
    z = statistics.NormalDist().inv_cdf(0.975)
    t = z + (z**3 + z) / (4 * freedom)  # Student's quantile; its error is below 0.1 % from 20 on
    return statistics.mean(ours) - statistics.mean(theirs), t * math.sqrt(sum(parts))


def number(x, places=0):
    return "" if x is None else f"{x:,.{places}f}"


def spread(values):
    """Mean and standard deviation over the seeds, or the values if they are few."""
    places = 0 if max(map(abs, values)) >= 100 else 1
    if len(values) < FEW:
        return ", ".join(number(x, places) for x in values)
    return (
        f"{number(statistics.mean(values), places)} +- {number(statistics.stdev(values), places)}"
    )


def median(values):
    return statistics.median(math.inf if x is None else x for x in values)


def of(task, trainer):
    """The runs of a task by a trainer, in the order of their seeds."""
    found = [run for key, run in sorted(kept().items()) if key[:2] == (task, trainer)]
    return found[: TASKS[task][2]]


def rows(task):
    """The page's lines of a task: one for each trainer."""
    name, _, _, threshold, trainers = TASKS[task]
    for trainer in trainers:
        runs = of(task, trainer)
        if not runs:
            continue
        steps = median(run["env_steps_to_threshold"] for run in runs)
        reached = sum(run["env_steps_to_threshold"] is not None for run in runs)
        minutes = median(run["cpu_minutes_to_threshold"] for run in runs)
        cells = [name, trainer, str(len(runs)), number(runs[0]["env_steps"] / 1e6, 1)]
        cells += [spread([run["return"] for run in runs]), f"{threshold:,}"]
        cells += [f"{reached} of {len(runs)}"]
        cells += [number(steps / 1e6, 2), number(minutes, 1)] if steps < math.inf else ["", ""]
        yield "| " + " | ".join(cells) + " |"


def difference(task):
    """In words: how far apart the two trainers are, and how sure that is."""
    ours, theirs = ([run["return"] for run in of(task, trainer)] for trainer in BOTH)
    if min(len(ours), len(theirs)) < FEW:
        return ""
    mean, half = interval(ours, theirs)
    verdict = "contains 0" if abs(mean) <= half else "does not contain 0"
    name = TASKS[task][0]
    return (
        f"**{name}**: the mean of train_ppo less that of rl_games is {mean:+,.1f}, with a 95 % "
        f"interval (Welch) from {mean - half:+,.1f} to {mean + half:+,.1f}, which {verdict}."
    )


def evaluated(task):
    """The page's line about the policies that a task's runs ended with."""
    runs = of(task, "train_ppo")
    if not runs or "evaluation" not in runs[0]:
        return
    results = [run["evaluation"] for run in runs]
    cells = [TASKS[task][0], spread([x["mean"] for x in results])]
    for tag, unit in METRICS.items():
        values = [run["metrics"][tag] for run in runs]
        cells.append(", ".join(f"{x:.3f}" for x in values) + unit if None not in values else "")
    cells.append(number(statistics.mean(run["cpu_minutes"] for run in runs), 1))
    yield "| " + " | ".join(cells) + " |"


def page():
    lines = [INTRODUCTION, *(row for task in TASKS for row in rows(task)), BETWEEN]
    lines += [text for text in map(difference, ("cartpole", "ant")) if text]
    lines += [POLICIES, *(row for task in TASKS for row in evaluated(task))]
    found = {}
    for run in kept().values():
        for package, version in run["versions"].items():
            found.setdefault(package, set()).add(version)
    versions = "; ".join(f"{x} {', '.join(sorted(found[x]))}" for x in sorted(found))
    return "\n".join(lines) + f"\n\nVersions: {versions}.\n"


INTRODUCTION = """# Results

`python benchmarks/results.py` made this page from the runs in `benchmarks/results.jsonl`, and
`python benchmarks/results.py train TASK` trains what is missing there.

| task | trainer | seeds | million env steps | final return | threshold | reached by \
| million steps to it | core minutes to it |
|---|---|---:|---:|---:|---:|---:|---:|---:|"""
BETWEEN = """
Published, after a million steps as well: [CleanRL](https://docs.cleanrl.dev/rl-algorithms/ppo/) has
2,383 +- 272 for Hopper-v4 and 1,443 +- 46 for HalfCheetah-v4, the final returns of three seeds; the
policies that rl-baselines3-zoo tuned for each task have
[2,410](https://huggingface.co/sb3/ppo-Hopper-v3) and
[5,836](https://huggingface.co/sb3/ppo-HalfCheetah-v3) by mean actions in the tasks' `-v3`.

The final return is the mean return of the last episodes at the end of training, with sampled
actions: of the last 256 for Cartpole and Ant, measured alike for both trainers, else what
train_ppo.py reports. From five seeds on it is the mean over the seeds +- their standard deviation,
which says how far apart single runs are, not how sure the mean is. Steps and minutes to the
threshold are medians; core minutes are those of a processor, so that they do not depend on what
else the machine did. Processors were an Intel Xeon at 2.8 GHz and an AMD EPYC twice as quick, for
both trainers alike.
"""
POLICIES = """
| policy (`best.pth`, mean actions) | return | speed error | falls an episode | core minutes of \
training |
|---|---:|---:|---:|---:|"""


def check():
    """Whether the page is the one of the kept runs, and README says what it says."""
    faults = []
    with open(PAGE) as file:
        if file.read() != page():
            faults.append("docs/results.md is of other runs: python benchmarks/results.py")
    with open(os.path.join(TOP, "README.md")) as file:
        readme = " ".join(file.read().replace("&plusmn;", "+-").split())
    for trainer in BOTH:
        returns = [run["return"] for run in of("ant", trainer)]
        if len(returns) >= FEW and spread(returns) not in readme:
            faults.append(f"README.md does not say {spread(returns)!r} for the Ant with {trainer}")
    return faults


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=["train"])
    parser.add_argument("task", nargs="?", choices=TASKS)
    parser.add_argument("--trainer", choices=BOTH, help="only this one")
    parser.add_argument("--seeds", type=int, help="the seeds 1 to this one, instead of all")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.command and not options.task:
        parser.error(f"train what? {', '.join(TASKS)}")
    if options.command:
        _, _, seeds, _, trainers = TASKS[options.task]
        chosen = [x for x in trainers if options.trainer in (None, x)]
        train(options.task, chosen, options.seeds or seeds)
    elif options.check:
        sys.exit("\n".join(check()) or None)
    else:
        with open(PAGE, "w") as file:
            file.write(page())


if __name__ == "__main__":
    main()
