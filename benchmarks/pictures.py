"""Make the README's pictures, in docs/.

    pip install -r benchmarks/requirements.txt matplotlib
    python benchmarks/pictures.py cartpole       docs/cartpole.gif: the policy of the first epoch and the trained one
    python benchmarks/pictures.py curves         docs/curves.png: five seeds here and with rl_games (three minutes on 2 cores)
    python benchmarks/pictures.py tensorboard    docs/tensorboard.png: the page of a real run, by Chromium
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
SCRIPT, DOCS = os.path.join(TOP, "train_ppo.py"), os.path.join(TOP, "docs")


def cartpole() -> None:
    from PIL import Image, ImageDraw

    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, SCRIPT, "--capture-video", "--video-frequency", "1000", "--experiment", "r"], cwd=folder, check=True)
        play = ["--play", "--checkpoint", "runs/r/nn/best.pth", "--capture-video", "--num-envs", "4"]
        subprocess.run([sys.executable, SCRIPT, *play], cwd=folder, check=True)
        files = [os.path.join(folder, "runs/r/videos", name) for name in ("epoch_1.gif", "play_epoch_100.gif")]
        gifs = [Image.open(file) for file in files]
        frames = []
        for t in range(0, 200, 2):
            picture = Image.new("RGB", (820, 250), "white")
            draw = ImageDraw.Draw(picture)
            for i, (gif, title) in enumerate(zip(gifs, ("epoch 1", "epoch 100, after some seconds of training"))):
                frame_at(gif, t)
                picture.paste(gif.convert("RGB").resize((405, 216)), (i * 410 + 2, 30))
                draw.text((i * 410 + 10, 10), title, fill="black", font_size=14)
            frames.append(picture.quantize(64))
        frames[0].save(os.path.join(DOCS, "cartpole.gif"), save_all=True, append_images=frames[1:], duration=40, loop=0)


def frame_at(gif, t: int) -> None:
    """Go to what the GIF shows at its step t: equal pictures in a row are stored as one that lasts longer."""
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
    for name, color in (("rl_games", "#d9822b"), ("train_ppo", "#1f4e79")):
        runs = []
        for seed in range(1, 6):
            command = [sys.executable, os.path.join(HERE, "compare.py"), "--one", name, "--env", "cartpole", "--threads", "1", "--seed", str(seed)]
            runs.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)["returns"])
            axes.plot([512 * 16 * (i + 1) / 1000 for i in range(100)], runs[-1], color=color, alpha=0.3, linewidth=1)
        means = np.array(runs, float).mean(0)  # None, before the first episode ended, becomes nan: not drawn
        axes.plot([512 * 16 * (i + 1) / 1000 for i in range(100)], means, color=color, linewidth=2.5, label=f"{name}, mean of seeds 1 to 5")
        print(name, {epoch: round(means[epoch - 1]) for epoch in (20, 40, 60, 80, 100)})
    axes.set(xlabel="thousand env steps", ylabel="mean return of the last 256 episodes", xlim=(0, 820), ylim=(0, 510))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(os.path.join(DOCS, "curves.png"), dpi=110)


def tensorboard() -> None:
    page = "http://localhost:6116/?darkMode=false#scalars&tagFilter=" + quote("^rewards/(step|time)|c_loss|entropy|kl|last_lr", safe="")
    # no 3d: TensorBoard then draws its curves as SVG, which a screenshot sees
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-3d-apis", "--disable-background-networking",
               "--disable-component-update", "--disable-sync", "--no-first-run", "--hide-scrollbars", "--window-size=1000,1030",
               "--virtual-time-budget=30000", f"--screenshot={DOCS}/tensorboard.png"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, SCRIPT, "--experiment", "Cartpole"], cwd=folder, check=True)
        server = subprocess.Popen([sys.executable, "-m", "tensorboard.main", "--logdir", "runs", "--port", "6116"], cwd=folder)
        try:
            time.sleep(15)
            subprocess.run([*browser, f"--user-data-dir={folder}/browser", page], check=True)
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    pictures = {"cartpole": cartpole, "curves": curves, "tensorboard": tensorboard}
    if len(sys.argv) != 2 or sys.argv[1] not in pictures:
        sys.exit(__doc__)
    pictures[sys.argv[1]]()
