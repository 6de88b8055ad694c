"""Make the pictures of README.md and of the pages in docs/.

pip install -r benchmarks/requirements.txt matplotlib
python benchmarks/pictures.py cartpole       cartpole.gif: the first policy and the trained one
python benchmarks/pictures.py curves         curves.png: the seeds of Cartpole that results.py has
                                             kept, here and with rl_games
python benchmarks/pictures.py robot          robot.gif: a Unitree Go1 before and after training
                                             (twenty minutes; mujoco, mjlab's XML)
python benchmarks/pictures.py ant            ant.gif: MuJoCo's Ant before and after training
                                             (five minutes; mujoco)
python benchmarks/pictures.py ant_curves     ant_curves.png: those of the Ant
python benchmarks/pictures.py states         states.png: a critic with and without the exact state,
                                             five seeds each (three minutes)
python benchmarks/pictures.py tensorboard    tensorboard.png: the page of a real run, six of its
                                             curves (half a minute; Chromium)
"""

import os
import subprocess
import sys
import tempfile
import time
from urllib.parse import quote

import results  # benchmarks/results.py

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(HERE)
DOCS = os.path.join(TOP, "docs")


def train(folder: str, script: str, *flags: str) -> str:
    """The folder of a training with the default settings."""
    command = [sys.executable, os.path.join(TOP, script), "--train-dir", folder, *flags]
    subprocess.run([*command, "--experiment", "run"], cwd=TOP, check=True)
    return os.path.join(folder, "run")


def cartpole() -> None:
    """Four environments in the first epochs of a training, beside four with its best policy."""
    titles = ("epochs 1 to 13", "after 100 epochs, some seconds of training")
    before_and_after("cartpole.gif", [], titles, size=(405, 216), steps=range(0, 200, 2))


def robot() -> None:
    """A Go1 in the first epochs of a training, beside one with its best policy."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    env = ["--env-id", "examples.mujoco_robot:go1"]
    titles = ("epochs 1 to 9", "after 250 epochs")
    before_and_after("robot.gif", env, titles, size=(400, 300), steps=range(0, 198, 3))


def ant() -> None:
    """An ant in the first epochs of a training, beside one with its best policy."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    env = ["--env-id", "examples.mujoco_ant:make_env"]
    titles = ("epochs 1 to 13", "after 300 epochs, some minutes on two CPU cores")
    before_and_after("ant.gif", env, titles, size=(340, 255), steps=range(0, 198, 3))


def before_and_after(name: str, env, titles, size, steps) -> None:
    """docs/<name>: the video of epoch 1 beside a film of best.pth, those steps of each."""
    script = os.path.join("examples", "record_video.py")
    with tempfile.TemporaryDirectory() as folder:
        run_dir = train(folder, script, *env)
        best = os.path.join(folder, "best.gif")
        film = [sys.executable, os.path.join(TOP, "tools", "evaluate.py"), run_dir]
        subprocess.run([*film, "--film", best, *env], cwd=TOP, check=True)
        first = os.path.join(run_dir, "videos", "epoch_1.gif")
        side_by_side(name, (first, best), titles, size, steps)


def side_by_side(name: str, files, titles, size, steps) -> None:
    """docs/<name>: those steps of two GIFs."""
    from PIL import Image, ImageDraw

    width, height = size
    frames = []
    for t in steps:
        picture = Image.new("RGB", (2 * width + 10, height + 34), "white")
        draw = ImageDraw.Draw(picture)
        for i, file in enumerate(files):
            with Image.open(file) as gif:
                go_to(gif, t)
                picture.paste(gif.convert("RGB").resize(size), (i * (width + 5) + 2, 30))
            draw.text((i * (width + 5) + 10, 10), titles[i], fill="black", font_size=14)
        frames.append(picture.quantize(48, dither=Image.Dither.NONE))
    step = 20 * (steps[1] - steps[0])  # milliseconds
    rest = dict(save_all=True, append_images=frames[1:], duration=step, loop=0)
    frames[0].save(os.path.join(DOCS, name), **rest)


def go_to(gif, t: int) -> None:
    """Seek the frame of step t. Equal pictures in a row are stored as one that is shown longer."""
    shown = 0
    for i in range(gif.n_frames):
        gif.seek(i)
        shown += gif.info["duration"]
        if shown > 20 * t:
            return


def draw_curves(name: str, runs, steps, ylabel: str) -> None:
    """docs/<name>.png. runs: {label: one list of returns, an entry an epoch, for each seed}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(figsize=(8, 4), facecolor="white")
    for (label, lines), color in zip(runs.items(), ("#d9822b", "#1f4e79")):
        for line in lines:
            axes.plot(steps, line, color=color, alpha=0.3, linewidth=1)
        means = np.array(lines, float).mean(0)  # None, before an episode ended, becomes nan
        label = f"{label}, mean of {len(lines)} seeds"
        axes.plot(steps, means, color=color, linewidth=2.5, label=label)
        some = range(len(means) // 5 - 1, len(means), len(means) // 5)
        print(label, {epoch + 1: round(means[epoch]) for epoch in some})
    axes.set(xlabel="million env steps", ylabel=ylabel, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(os.path.join(DOCS, f"{name}.png"), dpi=110)


def kept_curves(name: str, task: str, frames: int, epochs: int) -> None:
    """docs/<name>.png: the runs of results.jsonl. frames: env steps of an epoch."""
    runs = {}
    for trainer in ("rl_games", "train_ppo"):
        runs[trainer] = [run["curve"] for run in results.of(task, trainer)]
    steps = [frames * epoch / 1e6 for epoch in range(results.EVERY, epochs + 1, results.EVERY)]
    draw_curves(name, runs, steps, "mean return of the last 256 episodes")


def curves() -> None:
    kept_curves("curves", "cartpole", 512 * 16, 100)


def ant_curves() -> None:
    kept_curves("ant_curves", "ant", 1024 * 16, 300)


def states() -> None:
    """examples/privileged_critic.py, whose critic sees the exact state, and its blind twin."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs = {"critic sees what the actor sees": [], "critic sees the exact state": []}
    for seed in range(1, 6):
        for lines, factory in zip(runs.values(), ("make_blind_env", "make_env")):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, os.path.join(TOP, "train_ppo.py"), "--separate"]
                command += ["--env-id", f"examples.privileged_critic:{factory}"]
                command += ["--seed", str(seed), "--train-dir", folder, "--experiment", "run"]
                subprocess.run(command, cwd=TOP, check=True, stdout=subprocess.DEVNULL)
                events = EventAccumulator(os.path.join(folder, "run", "summaries"))
                events.Reload()
                found = {event.step: event.value for event in events.Scalars("rewards/iter")}
                lines.append([found.get(epoch) for epoch in range(1, 151)])
    steps = [512 * 16 * epoch / 1e6 for epoch in range(1, 151)]
    draw_curves("states", runs, steps, "mean return of the last 100 episodes")


def tensorboard() -> None:
    tags = quote("^rewards/(step|time)|c_loss|entropy|kl|last_lr", safe="")
    page = f"http://localhost:6116/?darkMode=false#scalars&tagFilter={tags}"
    # Without 3D, TensorBoard draws its curves as SVG, which a screenshot sees.
    flags = (
        "headless no-sandbox disable-gpu disable-3d-apis disable-background-networking "
        "disable-component-update disable-sync no-first-run hide-scrollbars "
        "window-size=1000,1030 virtual-time-budget=30000"
    )
    browser = ["chromium", *(f"--{flag}" for flag in flags.split())]
    with tempfile.TemporaryDirectory() as folder:
        train(os.path.join(folder, "runs"), "train_ppo.py")
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", "runs", "--port", "6116"]
        server = subprocess.Popen(command, cwd=folder)
        try:
            time.sleep(15)
            browser += [f"--screenshot={DOCS}/tensorboard.png", f"--user-data-dir={folder}/browser"]
            subprocess.run([*browser, page], check=True)
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    pictures = {"cartpole": cartpole, "curves": curves, "ant": ant, "ant_curves": ant_curves}
    pictures.update(robot=robot, states=states, tensorboard=tensorboard)
    if len(sys.argv) != 2 or sys.argv[1] not in pictures:
        sys.exit(__doc__)
    pictures[sys.argv[1]]()
