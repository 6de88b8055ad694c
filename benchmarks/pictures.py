"""Make the README's pictures, in docs/.

    pip install -r benchmarks/requirements.txt matplotlib
    python benchmarks/pictures.py cartpole        docs/cartpole.gif: the policy before and after training
    python benchmarks/pictures.py curves          docs/curves.png: five seeds here and with rl_games (about 3 minutes on 2 cores)
    python benchmarks/pictures.py tensorboard     docs/tensorboard.png: needs Chromium
"""
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time

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
        os.makedirs(DOCS, exist_ok=True)
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

    figure, axes = plt.subplots(figsize=(8, 4), facecolor="white")
    for name, color in (("rl_games", "#d9822b"), ("train_ppo", "#1f4e79")):
        runs = []
        for seed in range(1, 6):
            command = [sys.executable, os.path.join(HERE, "compare.py"), "--one", name, "--env", "cartpole", "--threads", "1", "--seed", str(seed)]
            runs.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)["returns"])
            axes.plot([512 * 16 * (i + 1) / 1000 for i in range(100)], runs[-1], color=color, alpha=0.3, linewidth=1)
        means = [statistics.mean(values) for values in zip(*runs)]
        axes.plot([512 * 16 * (i + 1) / 1000 for i in range(100)], means, color=color, linewidth=2.5, label=f"{name}, mean of seeds 1 to 5")
        print(name, {epoch: round(means[epoch - 1]) for epoch in (20, 40, 60, 80, 100)})
    axes.set(xlabel="thousand env steps", ylabel="mean return of the last 256 episodes", xlim=(0, 820), ylim=(0, 510))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.tight_layout()
    os.makedirs(DOCS, exist_ok=True)
    figure.savefig(os.path.join(DOCS, "curves.png"), dpi=110)


def tensorboard() -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, SCRIPT, "--experiment", "Cartpole"], cwd=folder, check=True)
        server = subprocess.Popen([sys.executable, "-m", "tensorboard.main", "--logdir", "runs", "--port", "6116"], cwd=folder)
        try:
            time.sleep(15)
            os.makedirs(DOCS, exist_ok=True)
            subprocess.run(["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
                            "--disable-sync", "--no-first-run", f"--user-data-dir={folder}/browser", "--window-size=1300,1500", "--virtual-time-budget=30000",
                            "--hide-scrollbars", f"--screenshot={DOCS}/tensorboard.png", "http://localhost:6116/?darkMode=false#timeseries"], check=True)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait()


if __name__ == "__main__":
    wanted = {"cartpole": cartpole, "curves": curves, "tensorboard": tensorboard}.get(sys.argv[1] if len(sys.argv) == 2 else "")
    if wanted is None:
        sys.exit(__doc__)
    wanted()
