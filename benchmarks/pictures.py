"""Make the README's pictures, in docs/.

pip install -r benchmarks/requirements.txt matplotlib
python benchmarks/pictures.py cartpole       cartpole.gif: the first policy and the trained one
python benchmarks/pictures.py curves         curves.png: five seeds here and with rl_games
                                             (three minutes on 2 cores)
python benchmarks/pictures.py tensorboard    tensorboard.png: the page of a real run, by Chromium
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from urllib.parse import quote

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(HERE)
DOCS = os.path.join(TOP, "docs")


def train(folder: str, script: str) -> None:
    command = [sys.executable, os.path.join(TOP, script), "--experiment", "Cartpole"]
    subprocess.run(command, cwd=folder, check=True)


def cartpole() -> None:
    """Four environments in the first epochs of a training, beside four with its best policy."""
    from PIL import Image, ImageDraw

    script = os.path.join("examples", "record_video.py")
    with tempfile.TemporaryDirectory() as folder:
        train(folder, script)
        run_dir = os.path.join("runs", "Cartpole")
        film = ["--film", os.path.join(run_dir, "nn", "best.pth"), "best.gif"]
        subprocess.run([sys.executable, os.path.join(TOP, script), *film], cwd=folder, check=True)
        first = Image.open(os.path.join(folder, run_dir, "videos", "epoch_1.gif"))
        best = Image.open(os.path.join(folder, "best.gif"))
        frames = []
        for t in range(0, 200, 2):
            picture = Image.new("RGB", (820, 250), "white")
            draw = ImageDraw.Draw(picture)
            sides = (
                (first, "epochs 1 to 13"),
                (best, "after 100 epochs, some seconds of training"),
            )
            for i, (gif, title) in enumerate(sides):
                go_to(gif, t)
                picture.paste(gif.convert("RGB").resize((405, 216)), (i * 410 + 2, 30))
                draw.text((i * 410 + 10, 10), title, fill="black", font_size=14)
            frames.append(picture.quantize(64))
    path = os.path.join(DOCS, "cartpole.gif")
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=40, loop=0)


def go_to(gif, t: int) -> None:
    """Seek the frame of step t. Equal pictures in a row are stored as one that is shown longer."""
    shown = 0
    for i in range(gif.n_frames):
        gif.seek(i)
        shown += gif.info["duration"]
        if shown > 20 * t:
            return


def curves() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(figsize=(8, 4), facecolor="white")
    steps = [512 * 16 * epoch / 1000 for epoch in range(1, 101)]
    for name, color in (("rl_games", "#d9822b"), ("train_ppo", "#1f4e79")):
        runs = []
        for seed in range(1, 6):
            command = [sys.executable, os.path.join(HERE, "compare.py"), "--one", name]
            command += ["--env", "cartpole", "--threads", "1", "--seed", str(seed)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            runs.append(json.loads(done.stdout)["returns"])
            axes.plot(steps, runs[-1], color=color, alpha=0.3, linewidth=1)
        means = np.array(runs, float).mean(0)  # None, before an episode ended, becomes nan
        label = f"{name}, mean of seeds 1 to 5"
        axes.plot(steps, means, color=color, linewidth=2.5, label=label)
        print(name, {epoch: round(means[epoch - 1]) for epoch in (20, 40, 60, 80, 100)})
    axes.set(xlabel="thousand env steps", ylabel="mean return of the last 256 episodes")
    axes.set(xlim=(0, 820), ylim=(0, 510))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(os.path.join(DOCS, "curves.png"), dpi=110)


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
        train(folder, "train_ppo.py")
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
    pictures = {"cartpole": cartpole, "curves": curves, "tensorboard": tensorboard}
    if len(sys.argv) != 2 or sys.argv[1] not in pictures:
        sys.exit(__doc__)
    pictures[sys.argv[1]]()
