"""Make the README's pictures, in docs/.

    python benchmarks/pictures.py     docs/cartpole.gif: the policy of the first epoch and the trained one
"""
import os
import subprocess
import sys
import tempfile

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


if __name__ == "__main__":
    cartpole()
