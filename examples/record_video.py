"""Train with videos.

    python examples/record_video.py [any argument of train_ppo.py]

It writes runs/<name>/videos/epoch_<N>.gif in epoch 1 and then every 25 epochs, and shows them in
TensorBoard and, with --track, in W&B. `tools/evaluate.py --film` films a trained policy.

The built-in Cartpole is drawn here. An environment of your own needs render(mode="rgb_array"),
which returns a picture as an array (height, width, 3). An Isaac Gym task is drawn by its viewer
on a virtual screen, which needs `pip install pyvirtualdisplay` and, on Linux, `apt install xvfb`.
"""

import math
import os
import sys
from typing import Dict, Iterable, List, Tuple

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, TOP)
import train_ppo

try:
    from PIL import Image, ImageDraw
except ImportError as exc:
    raise train_ppo.UserError("videos need pillow: pip install pillow") from exc


class RecordVideo(train_ppo.AlgoObserver):
    """Films `length` steps, beginning in epoch 1 and then every `every` epochs.

    It raises where there is no picture or no space on the disk. As with every observer that raises,
    there is one warning, and training goes on without it.
    """

    def __init__(self, every: int = 25, length: int = 200):
        self.every = every
        self.length = length
        self.frames: List[Image.Image] = []
        self.recording = False
        self.first_epoch = 0  # of this video or, between two videos, of the last one

    def process_infos(self, infos: Dict, done_indices) -> None:
        epoch = self.algo.epoch_num
        if (epoch - 1) % self.every == 0 and epoch != self.first_epoch:
            self.write()  # the video before, if it is still too short
            self.recording = True
            self.first_epoch = epoch
        if self.recording:
            self.frames.append(picture(self.algo.env))
            if len(self.frames) == self.length:
                self.write()

    def close(self) -> None:
        self.write()
        tool = train_ppo.shown(os.path.join(TOP, "tools", "evaluate.py"))
        env_id = self.algo.args.env_id
        env = f" --env-id {env_id}" if ":" in env_id else ""
        run = train_ppo.shown(self.algo.config["run_dir"])
        train_ppo.log(f"film      python {tool} {run}{env} --film out.gif --length 300")

    def write(self) -> None:
        """End the video that is being recorded: write it, and show it in TensorBoard and W&B."""
        frames = self.frames
        self.frames = []
        self.recording = False
        if frames:
            folder = os.path.join(self.algo.config["run_dir"], "videos")
            path = os.path.join(folder, f"epoch_{self.first_epoch}.gif")
            os.makedirs(folder, exist_ok=True)
            write_gif(frames, path)
            self.show_in_tensorboard(path, frames[0].size)
            self.show_in_wandb(path)

    def show_in_tensorboard(self, path: str, size: Tuple[int, int]) -> None:
        # SummaryWriter.add_video would need moviepy. TensorBoard shows a GIF as a moving image.
        with open(path, "rb") as file:
            content = file.read()
        image = Summary.Image(
            width=size[0], height=size[1], colorspace=3, encoded_image_string=content
        )
        summary = Summary(value=[Summary.Value(tag="video", image=image)])
        self.algo.writer.file_writer.add_summary(summary, self.algo.frame)

    def show_in_wandb(self, path: str) -> None:
        wandb = sys.modules.get("wandb")  # --track has imported it
        if wandb is not None and wandb.run is not None:
            wandb.run.define_metric("video", step_metric="global_step")
            wandb.run.log({"video": wandb.Video(path), "global_step": self.algo.frame})


def picture(env) -> Image.Image:
    """What the environments look like now. 64 colours take a third of the memory of all colours."""
    if hasattr(env, "render"):
        pixels = env.render(mode="rgb_array")
        image = Image.fromarray(np.asarray(pixels, dtype=np.uint8))
    elif isinstance(env, train_ppo.Cartpole):
        image = draw_cartpole(env)
    else:
        raise NotImplementedError('the env has no render(mode="rgb_array")')
    return image.quantize(64, method=Image.Quantize.FASTOCTREE)  # ten times as fast as median cut


def draw_cartpole(env: train_ppo.Cartpole) -> Image.Image:
    """The first four environments, 300 x 160 pixels each, at 45 pixels a metre."""
    image = Image.new("RGB", (1200, 640), "white")  # twice the size, for smooth edges
    draw = ImageDraw.Draw(image)
    for i, (x, _, theta, _) in enumerate(env.state[:, :4].t().tolist()):
        left = i % 2 * 600
        ground = i // 2 * 320 + 250
        cart = left + 300 + 90 * x
        tip = (cart - 170 * math.sin(theta), ground - 170 * math.cos(theta))
        frame = (left + 4, ground - 240, left + 596, ground + 64)
        draw.rectangle(frame, outline="#c8c8c8", width=2)
        draw.line((left + 30, ground, left + 570, ground), fill="#8c8c8c", width=4)
        draw.rectangle((cart - 40, ground - 20, cart + 40, ground + 20), fill="#1f4e79")
        draw.line((cart, ground, *tip), fill="#d9822b", width=14)
        draw.ellipse((cart - 9, ground - 9, cart + 9, ground + 9), fill="white")
    image = image.reduce(2)
    draw = ImageDraw.Draw(image)
    for i, steps in enumerate(env.progress[:4].tolist()):
        corner = (i % 2 * 300 + 12, i // 2 * 160 + 10)
        draw.text(corner, f"{steps * 0.0166:.1f} s", fill="black")
    return image


def write_gif(frames: List[Image.Image], path: str) -> None:
    """50 frames a second, the most that browsers show."""
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=20, loop=0)


def film(steps: Iterable, env, path: str) -> None:
    """Go through steps that an environment takes, and write what it looks like after each."""
    if not path.endswith(".gif"):
        raise train_ppo.UserError(f"no film: {path} must end in .gif")
    try:
        picture(env)
    except NotImplementedError as exc:
        raise train_ppo.UserError(f"no film: {exc}") from exc
    write_gif([picture(env) for _ in steps], path)
    train_ppo.log(f"wrote {train_ppo.shown(path)}")


def use_a_virtual_screen() -> None:
    """Let IsaacGymEnvs draw to a virtual screen. It does so only when render() asks for it."""
    try:
        import isaacgymenvs
    except ImportError:
        return
    make = isaacgymenvs.make
    screen = {"headless": False, "virtual_screen_capture": True}
    isaacgymenvs.make = lambda *args, **settings: make(*args, **{**settings, **screen})


if __name__ == "__main__":
    use_a_virtual_screen()
    train_ppo.main(observers=[RecordVideo()])
