"""PPO for Isaac Gym in one file: train, log, checkpoint, continue, play, export.

    python train_ppo.py                                             train the built-in Cartpole (seconds, any machine)
    python train_ppo.py --env-id Ant --track                        an IsaacGymEnvs task, metrics to Weights & Biases too
    python train_ppo.py --env-id my_module:make_env                 your own batched environment
    python train_ppo.py --checkpoint runs/NAME                      continue a run where it stopped
    python train_ppo.py --play --checkpoint runs/NAME/nn/best.pth   evaluate a policy
    python train_ppo.py --export DIR --checkpoint runs/NAME         a policy as ONNX and TorchScript, for a robot
    torchrun --nproc-per-node=2 train_ppo.py                        on several GPUs; --num-envs is for each process
    python train_ppo.py --help                                      every argument

Read it top to bottom. To find a thing, search for its section:

    1  ARGUMENTS      Args, and where a value comes from: flag > checkpoint > task's yaml > default
    2  ENVIRONMENTS   Cartpole (plain torch), Isaac Gym, module:factory
    3  NETWORKS       RunningMeanStd, ActorCritic
    4  METRICS        WindowMeter, EpisodeMeter, Writer (TensorBoard)
    5  OBSERVERS      AlgoObserver, RLGPUAlgoObserver, WandbAlgoObserver (how a metric reaches W&B), MultiObserver
    6  CHECKPOINTS    save_checkpoint, load_checkpoint, from_rl_games, find_checkpoint
    7  PPO            gae, ppo_loss, PPOAgent: rollout, update, train; save_checkpoints (where best.pth is written)
    8  PLAY, EXPORT   play, export_policy
    9  RUNNER         run folder, stop signals, Runner, parse_args, main

Shapes: T = num_steps, E = num_envs, N = T * E, O = num_obs, A = num_acts.
"""
import codecs
import collections
import contextlib
import functools
import glob
import importlib.util
import io
import json
import math
import os
import pickle
import platform
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
import uuid
import warnings
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Dict, Iterable, List, Literal, NamedTuple, Optional, Tuple

import numpy as np

# isaacgym refuses to be imported after torch, so it comes first, and before anything that imports torch.
ISAACGYM_ERROR: Optional[str] = "it is not installed"  # None once it is imported
if importlib.util.find_spec("isaacgym") is not None:
    vars(np).setdefault("float", float)  # isaacgym.torch_utils still says np.float, gone since numpy 1.24
    try:
        import isaacgym  # noqa: F401

        ISAACGYM_ERROR = None
    except Exception as exc:  # torch first ("import train_ppo before torch"), libpython not found, no driver ...
        ISAACGYM_ERROR = f"importing it failed: {exc}"

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import tyro  # noqa: E402
from tensorboard.compat.proto.event_pb2 import Event  # noqa: E402
from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.tensorboard import SummaryWriter  # noqa: E402
from tqdm import tqdm  # noqa: E402


class UserError(Exception):
    """A mistake that the user can mend: `main` prints it as one line and exits with 2."""


class TrainingError(Exception):
    """Training cannot go on, or its result is not on disk: `main` prints it as one line and exits with 1."""


# torchrun starts WORLD_SIZE processes that train one policy on envs of their own; the one of rank 0 alone prints, logs and saves
RANK, LOCAL_RANK, WORLD_SIZE = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


def log(message: str) -> None:
    """Print a line without tearing the live progress line."""
    if RANK == 0:
        tqdm.write(message)
        sys.stdout.flush()


def warn(message: str) -> None:
    if RANK == 0:
        tqdm.write(f"warning: {message}", file=sys.stderr)


def first_line(exc: BaseException) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0]


def together(collective: Any, *args, **kwargs) -> None:
    """Call something that every process takes part in; if another one has gone, say so instead of a backend's error."""
    try:
        collective(*args, **kwargs)
    except RuntimeError as exc:
        raise TrainingError(f"another process of this run has ended, so this one ({RANK}) stops too; start all again with --checkpoint") from exc


def average(x: Tensor) -> Tensor:
    """The mean of x over all processes, in place; x itself if there is one process."""
    if WORLD_SIZE > 1:
        together(dist.all_reduce, x)
        x /= WORLD_SIZE
    return x


def mean_and_var(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and unbiased variance of the rows of x (n, ...), taken over the rows of all processes."""
    mean, var = x.mean(0), x.var(0)
    if WORLD_SIZE > 1:
        n, own_mean = len(x), mean
        mean = average(own_mean.clone())
        squares = average(var * (n - 1) + n * (own_mean - mean).square())
        var = squares * WORLD_SIZE / (n * WORLD_SIZE - 1)
    return mean, var


# ======================================================================================================================
# 1  ARGUMENTS
# ======================================================================================================================


@dataclass
class Args:
    """Names are CleanRL's; (rl_games: ...) is the same setting in a `<Task>PPO.yaml`. Defaults are CartpolePPO.yaml's."""

    env_id: str = "Cartpole"  # Cartpole (built in), an IsaacGymEnvs task such as Ant, or module:factory
    sim: Literal["auto", "isaacgym", "torch"] = "auto"  # auto: Isaac Gym where it is installed, else the built-in Cartpole
    num_envs: int = 512  # parallel environments (rl_games: num_actors)
    seed: int = 42  # seeds Python, numpy and torch, before the environment is made and again before its first step
    torch_deterministic: bool = False  # use deterministic torch kernels only (slower on a GPU)
    device: str = "auto"  # where simulation, policy and rollouts live: auto, cpu, cuda, cuda:1
    torch_threads: int = 1  # CPU threads for torch; 1 is fastest for small networks, 0 leaves torch's own default
    headless: bool = True  # Isaac Gym without its viewer window

    # the run
    experiment: str = ""  # the run's folder, made unique; empty: <env_id>_<date>_<time>
    train_dir: str = "runs"  # folder of all runs
    checkpoint: str = ""  # file (rl_games' too) or run folder to continue, or to --play or --export
    init_from: str = ""  # file or run folder: a new run that starts from these weights and normalisers
    max_epochs: int = 100  # an epoch is one rollout and its update; counted over all continuations
    save_frequency: int = 25  # epochs between the periodic checkpoints nn/epoch_<N>.pth; 0: none
    save_every_minutes: float = 10.0  # minutes after which last.pth is written if nothing else was saved; 0: never
    save_best_after: int = 50  # first epoch that may write nn/best.pth
    keep_last: int = 0  # keep only this many of the newest periodic checkpoints; 0: all
    games_to_track: int = 100  # finished episodes in the window that "mean reward" is taken over
    strict_observers: bool = False  # an observer that raises ends training instead of being dropped: for writing one

    # play and export
    play: bool = False  # evaluate --checkpoint instead of training; writes nothing, but a video if asked to
    games: int = 0  # with --play: episodes in all, rounded up to the same number for each env; 0: one an env
    stochastic: bool = False  # with --play: sample actions as in training instead of taking the mean action
    export: str = ""  # a new folder for the policy of --checkpoint as policy.onnx, policy.pt (TorchScript) and policy.json

    # video
    capture_video: bool = False  # draw the first envs to GIFs under videos/, in TensorBoard and W&B; with --play: the first episode
    video_frequency: int = 25  # epochs from the start of one video to the next, the first in epoch 1
    video_length: int = 200  # steps in a video

    # Weights & Biases
    track: bool = False  # log to Weights & Biases too (WANDB_MODE=offline works)
    wandb_project_name: str = "train_ppo"  # its project
    wandb_entity: str = ""  # its team or user; empty: your default
    wandb_group: str = ""  # groups runs in the dashboard
    wandb_tags: Tuple[str, ...] = ()  # tags of the run
    wandb_upload: Literal["none", "best", "all"] = "none"  # checkpoints to upload at the end, as versions of an artifact of type model

    # PPO
    num_steps: int = 16  # steps per env and rollout (rl_games: horizon_length)
    minibatch_size: int = 8192  # samples per gradient step; a smaller rollout is one minibatch
    update_epochs: int = 8  # passes over each rollout (rl_games: mini_epochs)
    learning_rate: float = 3e-4  # Adam's learning rate, the initial one unless lr_schedule is fixed
    lr_schedule: Literal["adaptive", "linear", "fixed"] = "adaptive"  # by the KL divergence, or down to 1e-6 at max_epochs
    schedule_type: Literal["legacy", "standard"] = "legacy"  # step the schedule after each minibatch (legacy) or pass (standard)
    kl_threshold: float = 0.008  # the KL divergence between two passes over a minibatch that the adaptive schedule aims at
    max_lr: float = 1e-2  # highest learning rate of the adaptive schedule
    min_lr: float = 1e-6  # lowest learning rate of the adaptive schedule
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation (rl_games: tau)
    clip_coef: float = 0.2  # clip range of the probability ratio, and of the value if clip_vloss (rl_games: e_clip)
    clip_vloss: bool = True  # clip the value loss too (rl_games: clip_value)
    vf_coef: float = 4.0  # weight of half the squared value error (rl_games: critic_coef)
    ent_coef: float = 0.0  # weight of the entropy bonus (rl_games: entropy_coef)
    bounds_loss_coef: float = 1e-4  # weight of the loss that pulls mean actions back into [-1.1, 1.1]
    max_grad_norm: float = 1.0  # clip the gradient's norm; 0: don't (rl_games: grad_norm, truncate_grads)
    norm_adv: bool = True  # normalise advantages over the rollout (rl_games: normalize_advantage)
    normalize_input: bool = True  # normalise observations with running statistics
    normalize_value: bool = True  # normalise returns with running statistics
    value_bootstrap: bool = True  # add gamma * V(s) to the reward where an episode was cut by the clock
    reward_scale: float = 0.1  # multiplies rewards before learning (rl_games: reward_shaper.scale_value)
    clip_actions: bool = True  # clip actions to [-1, 1] on their way to the env
    mixed_precision: bool = False  # bfloat16 autocast in the update, on CUDA only
    compile: bool = False  # torch.compile policy, GAE and loss (on CUDA with graphs): faster epochs after a slow start

    # network
    units: Tuple[int, ...] = (32, 32)  # hidden layers of the MLP
    activation: Literal["elu", "relu", "tanh", "selu", "gelu", "swish"] = "elu"  # its activation
    separate: bool = False  # give the value function an MLP of its own
    sigma_init: float = 0.0  # initial log standard deviation of the actions

    def check(self) -> None:
        """UserError for values that make no sense. Called by the Runner, when flags, checkpoint and yaml have all been read."""
        positive = {"num_envs", "num_steps", "minibatch_size", "update_epochs", "max_epochs", "games_to_track", "video_frequency", "video_length"}
        any_sign = {"seed", "reward_scale", "sigma_init"}
        for field in fields(self):
            value, least = getattr(self, field.name), int(field.name in positive)
            if field.type in (int, float) and field.name not in any_sign and not value >= least:  # `not >=` also catches nan
                raise UserError(f"--{field.name.replace('_', '-')} must be at least {least}, not {value}")
        if any(width < 1 for width in self.units):
            raise UserError(f"--units must be positive, not {self.units}")
        batch = self.num_envs * self.num_steps
        if batch % min(self.minibatch_size, batch) and not self.play:
            raise UserError(f"{self.num_envs} envs x {self.num_steps} steps = {batch} samples cannot be split into minibatches "
                            f"of {self.minibatch_size}: choose a --minibatch-size that divides {batch}")
        if self.checkpoint and self.init_from:
            raise UserError("--checkpoint continues a run, --init-from starts a new one: give one of them")
        if (self.play or self.export) and WORLD_SIZE > 1:
            raise UserError("--play and --export run in one process: start them without torchrun")
        if (self.play or self.export) and not self.checkpoint:
            raise UserError(f"--{'play' if self.play else 'export'} needs --checkpoint PATH (a .pth file or a run folder)")


# what rl_games and IsaacGymEnvs call our arguments in `params.config`
RL_GAMES_NAMES = dict(
    num_actors="num_envs", horizon_length="num_steps", mini_epochs="update_epochs", tau="gae_lambda", e_clip="clip_coef",
    clip_value="clip_vloss", critic_coef="vf_coef", entropy_coef="ent_coef", grad_norm="max_grad_norm", normalize_advantage="norm_adv",
)

# ======================================================================================================================
# 2  ENVIRONMENTS
#
# One contract, that of IsaacGymEnvs' VecTask; everything is batched over E = num_envs and stays on one device:
#     num_envs, num_obs, num_acts   ints
#     reset()        -> {"obs": (E, O) float32}
#     step(actions)  -> {"obs": (E, O)}, reward (E,), done (E,), infos; it resets finished envs by itself
#     infos["time_outs"]  (E,) where the episode was cut by the clock; infos["episode"], any scalar: logged
#     optional: max_episode_length, clip_obs (the range of its observations, for export), get_env_state(), set_env_state(state),
#               set_train_info(frame, algo) before each rollout, render(mode="rgb_array"), close(),
#               exact_state = True: get_env_state() holds the whole simulation, so a run can continue to the last bit
# ======================================================================================================================


class Cartpole:
    """IsaacGymEnvs' Cartpole task with its physics written out in torch, as one batch.

    State and observation: cart position [m] and velocity [m/s], pole angle from upright [rad] and angular velocity [rad/s].
    Action: force on the cart in units of 400 N. Like the original, the observation returned with done=1 is the episode's
    last one, and the *next* step ignores the action, resets that env and returns its first observation.

    Nothing depends on a value on the device (torch.where instead of indexing), so a step never waits for a GPU.
    """

    num_obs, num_acts, max_episode_length, clip_obs = 4, 1, 500, 5.0
    exact_state = True

    def __init__(self, num_envs: int, device: torch.device):
        self.num_envs, self.device = num_envs, device
        self.state = torch.zeros(4, num_envs, device=device)  # x, x_dot, theta, theta_dot
        self.progress = torch.zeros(num_envs, dtype=torch.long, device=device)
        self.reset_buf = torch.ones(num_envs, dtype=torch.long, device=device)
        self.reward = torch.zeros(num_envs, device=device)
        self.reset_scale = torch.tensor([[0.2], [0.5], [0.2], [0.5]], device=device)

    def reset(self) -> Dict[str, Tensor]:
        return {"obs": self.state.t().clamp(-self.clip_obs, self.clip_obs)}

    def step(self, actions: Tensor):
        force = 400.0 * actions[:, 0].clamp(-1.0, 1.0)
        resetting = self.reset_buf.bool()
        fresh = (torch.rand_like(self.state) - 0.5) * self.reset_scale
        self.state = torch.where(resetting, fresh, self._simulate(force))
        self.progress = torch.where(resetting, 0, self.progress + 1)

        x, x_dot, theta, theta_dot = self.state
        fell = (x.abs() > 3.0) | (theta.abs() > math.pi / 2)
        reward = 1.0 - theta.square() - 0.01 * x_dot.abs() - 0.005 * theta_dot.abs()
        self.reward = torch.where(fell, -2.0, reward)
        late = self.progress >= self.max_episode_length - 1
        self.reset_buf = (fell | late).long()
        # as in VecTask, an episode that ends on the last tick counts as timed out even if the pole fell on it
        return self.reset(), self.reward, self.reset_buf, {"time_outs": late}

    def _simulate(self, force: Tensor, dt: float = 0.0166, substeps: int = 2) -> Tensor:
        """Semi-implicit Euler on the two equations of motion; a positive angle leans towards negative x.

            (M + m) x'' - m l cos(th) th'' = F - m l sin(th) th'^2
            (I + m l^2) th'' - m l cos(th) x'' = m g l sin(th)
        """
        M, m, l, g = 1.0, 1.0, 0.47, 9.81  # kg, kg, m to the pole's centre, m/s^2
        inertia = m * (0.06**2 + 1.0**2) / 12 + m * l * l  # of a 0.04 x 0.06 x 1.0 m box, about the hinge
        x, x_dot, theta, theta_dot = self.state
        h = dt / substeps
        for _ in range(substeps):
            sin, cos = theta.sin(), theta.cos()
            coupling = m * l * cos
            a = force - m * l * sin * theta_dot.square()
            b = m * g * l * sin
            det = (M + m) * inertia - coupling.square()
            x_dot = x_dot + h * (inertia * a + coupling * b) / det
            theta_dot = (theta_dot + h * (coupling * a + (M + m) * b) / det).clamp(-8.0, 8.0)  # joint limit
            x, theta = x + h * x_dot, theta + h * theta_dot
        return torch.stack((x, x_dot, theta, theta_dot))

    def render(self, mode: str = "rgb_array") -> np.ndarray:
        """The first four envs as one picture (320, 600, 3) uint8, at 50 pixels a metre."""
        from PIL import Image, ImageDraw

        picture = Image.new("RGB", (1200, 640), "white")  # twice the size, for smooth edges
        draw = ImageDraw.Draw(picture)
        for i, (x, _, theta, _) in enumerate(self.state[:, :4].t().tolist()):
            left, ground = i % 2 * 600, i // 2 * 320 + 250
            cart = left + 300 + 90 * x
            draw.rectangle((left + 4, ground - 240, left + 596, ground + 64), outline="#c8c8c8", width=2)
            draw.line((left + 30, ground, left + 570, ground), fill="#8c8c8c", width=4)
            draw.rectangle((cart - 40, ground - 20, cart + 40, ground + 20), fill="#1f4e79")
            draw.line((cart, ground, cart - 170 * math.sin(theta), ground - 170 * math.cos(theta)), fill="#d9822b", width=14)
            draw.ellipse((cart - 9, ground - 9, cart + 9, ground + 9), fill="white")
        picture = picture.reduce(2)
        draw = ImageDraw.Draw(picture)
        for i, steps in enumerate(self.progress[:4].tolist()):
            draw.text((i % 2 * 300 + 12, i // 2 * 160 + 10), f"{steps * 0.0166:.1f} s   reward {float(self.reward[i]):.2f}", fill="black")
        return np.asarray(picture)

    def get_env_state(self) -> Dict[str, Tensor]:
        return {"state": self.state, "progress": self.progress, "reset_buf": self.reset_buf}

    def set_env_state(self, env_state: Dict[str, Tensor]) -> None:
        for name, value in env_state.items():
            setattr(self, name, value.to(self.device))


def compose_isaacgym_config(args: Args, num_envs: Any = ""):
    """The hydra config of an IsaacGymEnvs task, as its train.py composes it. num_envs "": the task's own number."""
    try:
        import isaacgymenvs  # registers the resolvers that its yaml files use
        from hydra import compose, initialize_config_dir
        from hydra.errors import MissingConfigException
    except ImportError as exc:
        raise UserError(f"--env-id {args.env_id} needs IsaacGymEnvs beside Isaac Gym, but importing it failed: {exc} (README, Isaac Gym)")
    config_dir = os.path.join(os.path.dirname(os.path.abspath(isaacgymenvs.__file__)), "cfg")
    device = pick_device(args.device)
    overrides = [
        f"task={args.env_id}", f"num_envs={num_envs}", f"seed={args.seed}", f"headless={args.headless and not args.capture_video}",
        f"sim_device={device}", f"rl_device={device}", f"graphics_device_id={device.index or 0}",
        # sim_device alone is not enough: physx.use_gpu and the pipeline are decided by the config
        f"pipeline={'gpu' if device.type == 'cuda' else 'cpu'}",
    ]
    try:
        with initialize_config_dir(config_dir=config_dir, version_base=None):
            return compose(config_name="config", overrides=overrides)
    except MissingConfigException:
        tasks = sorted(name[:-5] for name in os.listdir(os.path.join(config_dir, "task")) if name.endswith(".yaml"))
        raise UserError(f"unknown --env-id {args.env_id}: IsaacGymEnvs has {', '.join(tasks)}; your own env is --env-id module:factory")


def settings_from_yaml(params: Dict[str, Any], task: str) -> Dict[str, Any]:
    """Our arguments from the `params` of a `<Task>PPO.yaml`; UserError if the task needs an algorithm that is not in this file."""
    config, network = dict(params["config"]), params["network"]
    space, mlp = network.get("space") or {}, network.get("mlp") or {}
    normal = space.get("continuous") or {}
    shaper = dict(config.pop("reward_shaper", {}))
    unset = (None, "None", False)
    needs = {
        f"the algorithm {params['algo']['name']}": params["algo"]["name"] != "a2c_continuous",
        f"the model {params['model']['name']}": params["model"]["name"] != "continuous_a2c_logstd",
        f"the network {network['name']}": network["name"] != "actor_critic",
        "a recurrent network (LSTM or GRU)": "rnn" in network,
        "a convolutional network": "cnn" in network,
        "a central value network": config.get("central_value_config") not in unset,
        "discrete actions": bool(space) and "continuous" not in space,
        "a state-dependent sigma": normal.get("fixed_sigma", True) is not True,
        "an activation on the mean action": normal.get("mu_activation") not in unset,
        "d2rl layers": mlp.get("d2rl", False),
        "layer normalisation": network.get("normalization") not in unset,
        "normalize_rms_advantage": config.pop("normalize_rms_advantage", False),
        "use_smooth_clamp": config.pop("use_smooth_clamp", False),
        "a bound_loss_type other than bound": config.pop("bound_loss_type", "bound") != "bound",
        "a reward_shaper beyond scale_value": any(v not in (0, None, False) for k, v in shaper.items() if k not in ("scale_value", "is_torch")),
    }
    needed = [what for what, needs_it in needs.items() if needs_it]
    if needed:
        raise UserError(f"--env-id {task} cannot be trained here: its settings ask for {', '.join(needed)}, which this file leaves out")

    if not config.pop("truncate_grads", False):
        config["grad_norm"] = 0.0
    if config.get("lr_schedule") not in ("adaptive", "linear"):  # "fixed", "constant", "identity", None: all mean the same
        config["lr_schedule"] = "fixed"
    config.update(
        bounds_loss_coef=config.get("bounds_loss_coef") or 0.0, reward_scale=shaper.get("scale_value", 1.0), units=mlp.get("units", ()),
        activation=mlp.get("activation", "elu"), separate=network.get("separate", False), sigma_init=normal.get("sigma_init", {}).get("val", 0.0))
    ignored = {"name", "full_experiment_name", "env_name", "multi_gpu", "ppo", "device", "device_name", "print_stats", "player",
               "score_to_win", "seq_len", "seq_length", "zero_rnn_on_done", "central_value_config", "train_dir",
               "defer_summaries_sec", "summaries_interval_sec_min", "summaries_interval_sec_max"}
    types = {f.name: f.type for f in fields(Args)}
    settings = {}
    for key, value in config.items():
        name = RL_GAMES_NAMES.get(key, key)
        if name in types:
            # yaml reads 3e-4 as a string and 4 as an int: give each value its argument's type
            settings[name] = types[name](value) if types[name] in (int, float, bool) else tuple(value) if name == "units" else value
        elif key not in ignored:
            warn(f"{task}PPO.yaml sets {key} = {value}, which this file does not know: ignored")
    return settings


def make_factory_env(args: Args):
    """--env-id module:factory, called as factory(num_envs, device, seed); what breaks the contract above is named."""
    module, _, factory = args.env_id.partition(":")
    sys.path.insert(0, os.getcwd())  # as for `python -m`
    try:
        make = getattr(importlib.import_module(module), factory)
    except ModuleNotFoundError as exc:
        raise UserError(f"--env-id {args.env_id}: cannot import {exc.name}; run from the folder that holds it, or install it")
    except AttributeError:
        raise UserError(f"--env-id {args.env_id}: the module {module} has no {factory}")
    finally:
        sys.path.pop(0)
    env = make(num_envs=args.num_envs, device=str(pick_device(args.device)), seed=args.seed)
    for name in ("num_envs", "num_obs", "num_acts"):
        value = getattr(env, name, "missing")
        if not isinstance(value, int) or value < 1 or (name == "num_envs" and value != args.num_envs):
            want = f"the {args.num_envs} that were asked for" if name == "num_envs" else "a positive int"
            raise UserError(f"--env-id {args.env_id} breaks the contract: {name} must be {want}, not {value!r}")
    if args.play:
        return env  # it was checked when it was trained on, and the check takes a step, which evaluation would miss
    reset, step = env.reset(), env.step(torch.zeros(env.num_envs, env.num_acts, device=pick_device(args.device)))
    if not isinstance(step, tuple) or len(step) != 4 or not isinstance(step[3], dict):
        raise UserError(f"--env-id {args.env_id} breaks the contract: step() must return (obs, reward, done, infos) with infos a dict")
    found = {"reset()['obs']": reset, "step()[0]['obs']": step[0], "step()'s reward": step[1], "step()'s done": step[2],
             "infos['time_outs']": step[3].get("time_outs", step[2])}
    for what, value in found.items():
        expected = (env.num_envs, env.num_obs) if "obs" in what else (env.num_envs,)
        if "obs" in what:
            value = value.get("obs") if isinstance(value, dict) else None
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else "missing" if value is None else type(value).__name__
        if got != f"shape {expected}":
            raise UserError(f"--env-id {args.env_id} breaks the contract: {what} must be a tensor of shape {expected}, not {got}")
    return env


def uses_isaacgym(args: Args) -> bool:
    """Whether Isaac Gym simulates this task. Installed but broken is an error: another simulator must never step in silently."""
    if ":" in args.env_id or args.sim == "torch" or (args.sim == "auto" and ISAACGYM_ERROR == "it is not installed"):
        return False
    if ISAACGYM_ERROR:
        raise UserError(f"Isaac Gym cannot be used: {ISAACGYM_ERROR} (README, Isaac Gym; --sim torch has the built-in Cartpole)")
    return True


def make_env(args: Args):
    """The environment that `args` ask for. Isaac Gym has one simulation per process: call it once."""
    if ":" in args.env_id:
        return make_factory_env(args)
    if not uses_isaacgym(args):
        if args.env_id != "Cartpole":
            raise UserError(f"unknown --env-id {args.env_id}: without Isaac Gym only Cartpole is built in; for IsaacGymEnvs' tasks install "
                            "NVIDIA's Isaac Gym (README, Isaac Gym), for your own use --env-id module:factory")
        return Cartpole(args.num_envs, pick_device(args.device))
    import isaacgymenvs

    cfg = compose_isaacgym_config(args, args.num_envs)
    return isaacgymenvs.make(
        seed=args.seed, task=args.env_id, num_envs=args.num_envs, sim_device=cfg.sim_device, rl_device=cfg.rl_device,
        graphics_device_id=cfg.graphics_device_id, headless=cfg.headless, force_render=not args.headless,
        virtual_screen_capture=args.capture_video, cfg=cfg)  # draws to a virtual screen, through the viewer


class RecordVideo:
    """An env of which some steps are drawn: `video_length` of them every `video_frequency` epochs, as GIFs in the run's videos/."""

    def __init__(self, env, args: Args):
        self.env, self.args = env, args
        self.path, self.algo, self.frames, self.length, self.works = "", None, [], args.video_length, True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def set_train_info(self, frame: int, algo: Any) -> None:
        if hasattr(self.env, "set_train_info"):
            self.env.set_train_info(frame, algo)
        self.algo = algo
        if (algo.epoch_num - 1) % self.args.video_frequency == 0 and RANK == 0:
            self.start(os.path.join(algo.config["run_dir"], "videos", f"epoch_{algo.epoch_num}.gif"))
        if algo.epoch_num == self.args.max_epochs:  # there is no more to come than this rollout
            self.length = min(self.length, len(self.frames) + self.args.num_steps)

    def start(self, path: str) -> None:
        self.write()
        self.path = path if self.works else ""

    def step(self, actions: Tensor):
        result = self.env.step(actions)
        if self.path:
            with self.or_without():
                from PIL import Image

                picture = Image.fromarray(np.asarray(self.env.render(mode="rgb_array"), dtype=np.uint8))
                # a palette of 64 colours: a third of the memory, and what a GIF holds; octree takes a tenth of median cut's time
                self.frames.append(picture.quantize(64, method=Image.Quantize.FASTOCTREE))
            if len(self.frames) == self.length:
                self.write()
        return result

    def write(self) -> None:
        """Finish the video that is being recorded: 50 frames a second, the most that browsers show."""
        path, frames, self.path, self.frames = self.path, self.frames, "", []
        if frames:
            with self.or_without():
                os.makedirs(os.path.dirname(path), exist_ok=True)
                frames[0].save(path, save_all=True, append_images=frames[1:], duration=20, loop=0)
                if self.algo is None:
                    log(f"video     {path}")
                else:
                    self.algo.writer.add_gif("video", path, frames[0].size, self.algo.frame)

    @contextlib.contextmanager
    def or_without(self):
        """What goes wrong in here ends the videos, not the training: no render(), no picture from it, no Pillow, no space on the disk."""
        try:
            yield
        except Exception as exc:
            self.works, self.path, self.frames = False, "", []
            warn(f"--capture-video: {self.args.env_id} gave no picture ({exc}): going on without video")


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = f"cuda:{LOCAL_RANK}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{LOCAL_RANK}" if name == "cuda" else name)
    except RuntimeError:
        raise UserError(f"--device {name} is not a torch device: use cpu, cuda or cuda:<number>")
    if device.type == "cuda" and (not torch.cuda.is_available() or device.index >= torch.cuda.device_count()):
        raise UserError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here; use --device cpu, or check the driver")
    return device


# ======================================================================================================================
# 3  NETWORKS
#
# Parameter names and their order are rl_games', so that a checkpoint with its optimizer state moves both ways.
# ======================================================================================================================


class RunningMeanStd(nn.Module):
    """Mean and variance of everything seen so far, in float64; starts as if one sample of mean 0 and variance 1 had been seen."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("running_var", torch.ones(size, dtype=torch.float64))
        self.register_buffer("count", torch.ones((), dtype=torch.float64))

    def update(self, x: Tensor) -> None:
        """Merge a batch x (n, size) by its moments (Chan et al. 1979: parallel variance); its variance is the unbiased one, as in rl_games."""
        n = x.shape[0] * WORLD_SIZE
        mean, var = mean_and_var(x)
        total = self.count + n
        delta = mean - self.running_mean
        m2 = self.running_var * self.count + var * n + delta.square() * self.count * n / total
        self.running_mean += delta * n / total
        self.running_var.copy_(m2 / total)
        self.count.copy_(total)

    def normalize(self, x: Tensor) -> Tensor:
        # the clamp keeps one broken sensor from saturating the network
        return ((x - self.running_mean.float()) / (self.running_var.float() + 1e-5).sqrt()).clamp(-5.0, 5.0)

    def denormalize(self, y: Tensor) -> Tensor:
        return y.clamp(-5.0, 5.0) * (self.running_var.float() + 1e-5).sqrt() + self.running_mean.float()


class ActorCritic(nn.Module):
    """Normalise -> MLP -> mean action and value; one learned log standard deviation per action (rl_games: continuous_a2c_logstd)."""

    ACTIVATIONS = dict(elu=nn.ELU, relu=nn.ReLU, tanh=nn.Tanh, selu=nn.SELU, gelu=nn.GELU, swish=nn.SiLU)

    def __init__(self, num_obs: int, num_acts: int, units: Tuple[int, ...] = (32, 32), activation: str = "elu", separate: bool = False,
                 sigma_init: float = 0.0, normalize_input: bool = True, normalize_value: bool = True):
        super().__init__()

        def mlp() -> nn.Sequential:
            layers: List[nn.Module] = []
            for size_in, size_out in zip((num_obs, *units), units):
                layers += [nn.Linear(size_in, size_out), self.ACTIVATIONS[activation]()]
            return nn.Sequential(*layers)

        width = units[-1] if units else num_obs
        self.a2c_network = net = nn.Module()
        # the log of the standard deviation, by rl_games' name: the same in every state, one number an action, learned like a weight
        net.sigma = nn.Parameter(torch.full((num_acts,), sigma_init))
        net.actor_mlp = mlp()
        if separate:
            net.critic_mlp = mlp()
        net.value = nn.Linear(width, 1)
        net.mu = nn.Linear(width, num_acts)
        for module in self.modules():  # torch's default weights, zero biases: rl_games' "default" initializer
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        if normalize_input:
            self.running_mean_std = RunningMeanStd(num_obs)
        if normalize_value:
            self.value_mean_std = RunningMeanStd(1)
        self.normalize_input, self.normalize_value, self.separate = normalize_input, normalize_value, separate

    def norm_obs(self, obs: Tensor) -> Tensor:
        return self.running_mean_std.normalize(obs) if self.normalize_input else obs

    def norm_value(self, value: Tensor) -> Tensor:
        return self.value_mean_std.normalize(value) if self.normalize_value else value

    def denorm_value(self, value: Tensor) -> Tensor:
        return self.value_mean_std.denormalize(value) if self.normalize_value else value

    def forward(self, normed_obs: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Normalised observations (n, O) -> mean action (n, A), log std (n, A), normalised value (n,)."""
        net = self.a2c_network
        features = net.actor_mlp(normed_obs)
        value_features = net.critic_mlp(normed_obs) if self.separate else features
        mu = net.mu(features)
        return mu, net.sigma.expand_as(mu), net.value(value_features).squeeze(-1)

    @torch.no_grad()
    def act(self, obs: Tensor, noise: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        """Raw observations (n, O) and standard normal noise (n, A) -> sampled action (n, A), its log probability (n,), value in reward
        units (n,), mean action (n, A)."""
        mu, logstd, value = self(self.norm_obs(obs))
        action = mu + logstd.exp() * noise
        return action, log_prob(action, mu, logstd), self.denorm_value(value), mu

    @torch.no_grad()
    def value(self, obs: Tensor) -> Tensor:
        """Raw observations (n, O) -> value in reward units (n,)."""
        return self.denorm_value(self(self.norm_obs(obs))[2])


def make_model(args: Args, num_obs: int, num_acts: int, state: Optional[Dict[str, Any]] = None) -> ActorCritic:
    """The network that `args` describe; with a checkpoint's `state` its weights and normalisers, strictly."""
    model = ActorCritic(num_obs, num_acts, args.units, args.activation, args.separate, args.sigma_init, args.normalize_input,
                        args.normalize_value)
    if state is not None:
        if (state["num_obs"], state["num_acts"]) != (num_obs, num_acts):
            raise UserError(f"the checkpoint is for {state['num_obs']} observations and {state['num_acts']} actions, "
                            f"but the env has {num_obs} and {num_acts}: check --env-id")
        try:
            model.load_state_dict(state["model"])
        except RuntimeError as exc:
            reason = re.sub(r"\s+", " ", str(exc)).split(": ", 1)[-1][:200]
            raise UserError(f"the checkpoint does not fit the network that the arguments describe: {reason}")
    return model


def log_prob(action: Tensor, mu: Tensor, logstd: Tensor) -> Tensor:
    """Log density of a diagonal Gaussian: three (n, A) -> (n,)."""
    z = (action - mu) / logstd.exp()
    return -(0.5 * z.square().sum(-1) + 0.5 * math.log(2.0 * math.pi) * mu.shape[-1] + logstd.sum(-1))


# ======================================================================================================================
# 4  METRICS
# ======================================================================================================================


class WindowMeter:
    """The last `size` rows that it was given, on the device. `add` waits for a GPU: call it once an epoch."""

    def __init__(self, size: int, width: int, device: torch.device):
        self.size, self.rows, self.count = size, torch.zeros(0, width, device=device), 0  # count: rows ever added

    def add(self, values: Tensor, mask: Tensor) -> None:
        """Add the rows of values (n, width) where mask (n,) is true, oldest first."""
        new = values[mask]
        self.count += len(new)
        self.rows = torch.cat((self.rows, new))[-self.size:]

    def state_dict(self) -> Dict[str, Any]:
        return {"rows": self.rows, "count": self.count}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.rows, self.count = state["rows"][-self.size:].to(self.rows.device), state["count"]


class EpisodeMeter:
    """Sums of `width` numbers over each running episode, and those of the last `games_to_track` finished ones."""

    def __init__(self, num_envs: int, games_to_track: int, width: int, device: torch.device):
        self.running = torch.zeros(num_envs, width, device=device)
        self.finished = WindowMeter(games_to_track, width, device)

    def add_rollout(self, *steps: Tensor, dones: Tensor) -> Tensor:
        """`width` tensors (T, E); returns their sums since each episode's first step, (T, E, width)."""
        sums, done = torch.stack(steps, dim=-1), dones.bool()
        for t in range(len(sums)):
            self.running += sums[t]
            sums[t] = self.running
            self.running.masked_fill_(done[t].unsqueeze(1), 0.0)
        self.finished.add(sums.flatten(0, 1), done.flatten())
        return sums


class Writer(SummaryWriter):
    """A SummaryWriter that also remembers the epoch's scalars, whoever wrote them: `scalars` is {tag: value}.

    Scalars of the same step leave as one TensorBoard event at `end_epoch`: ten times cheaper than an event each.
    """

    def __init__(self, log_dir: str, **kwargs):
        super().__init__(log_dir, **kwargs)
        self.scalars: Dict[str, float] = {}
        self.gifs: Dict[str, str] = {}  # {tag: path} of the epoch's videos
        self.pending: Dict[int, List[Summary.Value]] = {}
        self.works = True

    def add_scalar(self, tag, scalar_value, global_step=None, *args, **kwargs) -> None:
        value = float(scalar_value)
        self.scalars[tag] = value
        self.pending.setdefault(int(global_step or 0), []).append(Summary.Value(tag=tag, simple_value=value))

    def add_gif(self, tag: str, path: str, size: Tuple[int, int], global_step: int) -> None:
        with open(path, "rb") as file:
            image = Summary.Image(width=size[0], height=size[1], colorspace=3, encoded_image_string=file.read())
        self.gifs[tag] = path
        self.pending.setdefault(global_step, []).append(Summary.Value(tag=tag, image=image))

    def end_epoch(self) -> None:
        try:
            for step, values in self.pending.items() if self.works else ():
                self.file_writer.add_summary(Summary(value=values), step)
        except Exception as exc:  # the disk is full, the folder gone: the curve stops, training does not
            self.works = False
            warn(f"TensorBoard events cannot be written any more ({exc}): training goes on without them")
        self.pending.clear()
        self.scalars.clear()
        self.gifs.clear()

    @staticmethod
    def rewind(log_dir: str, epoch: int) -> None:
        """Cut off what was logged after `epoch`, so that epochs that are run again are not drawn twice.

        purge_step cannot do it alone: it compares frames with the steps of <tag>/iter (epochs) and <tag>/time (seconds).
        """
        for path in glob.glob(os.path.join(glob.escape(log_dir), "events.out.tfevents*")):
            with open(path, "r+b") as file:
                while True:  # a record is: 8 bytes of length, 4 of checksum, the event, 4 of checksum
                    start, header = file.tell(), file.read(12)
                    length = struct.unpack("<Q", header[:8])[0] + 4 if len(header) == 12 else 1
                    event = file.read(length)
                    if len(event) < length:
                        break  # the end, or half a record of a killed process
                    values = Event.FromString(event[:-4]).summary.value
                    if any(value.tag == "info/epochs" and value.simple_value > epoch for value in values):
                        break
                if file.seek(0, os.SEEK_END) > start:
                    file.truncate(start)


# ======================================================================================================================
# 5  OBSERVERS
#
# The training loop knows no logging backend: it writes to `algo.writer` and calls these hooks, rl_games' six, on the
# observer given to the Runner. For a new backend subclass AlgoObserver, override `after_print_stats`, where
# `self.writer.scalars` has all that the epoch logged, and add it in `main`.
# `algo` is the PPOAgent: algo.writer, .device, .games_to_track, .epoch_num, .frame, .model, .mean_rewards, .config ...
# ======================================================================================================================


class AlgoObserver:
    """The hooks, in the order in which they are called; none needs to be overridden. rl_games' observers plug in unchanged."""

    needs_done_indices = True  # False saves a wait for the GPU each step, if every observer says so; `algo.dones` has the mask

    def before_init(self, base_name: str, config: Dict[str, Any], experiment_name: str) -> None:
        """Before the agent exists. config: all arguments, by our and by rl_games' names, and `run_dir`, `wandb_run_id`."""

    def after_init(self, algo: "PPOAgent") -> None:
        """The agent is complete."""
        self.algo, self.writer = algo, algo.writer

    def process_infos(self, infos: Dict[str, Any], done_indices: Optional[Tensor]) -> None:
        """After each env step. done_indices (n, 1): the envs whose episode ended. Copy what you keep of infos."""

    def after_steps(self) -> None:
        """After the rollout, before the update."""

    def after_clear_stats(self) -> None:
        """rl_games calls this when it clears its meters."""

    def after_print_stats(self, frame: int, epoch_num: int, total_time: float) -> None:
        """At the end of each epoch: log here. frame: env steps so far, total_time: seconds of training."""

    def close(self) -> None:
        """The run ends. (This and the next two are not rl_games' hooks.)"""

    def state_dict(self) -> Dict[str, Any]:
        """What to keep in checkpoints, as tensors, numbers, strings, lists and dicts."""
        return {}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Back to what `state_dict` gave; called after after_init when a run is continued."""


class RLGPUAlgoObserver(AlgoObserver):
    """Logs what the environment puts into `infos`, as IsaacGymEnvs' observer of this name does:

        infos["episode"][key]             scalar or tensor      Episode/<key>: mean over the epoch
        infos["episode_cumulative"][key]  (E,), summed up over  episode_cumulative{,_min,_max}/<key>: over the last
                                          each episode          games_to_track episodes
        any scalar, nested or not                               <key>/{frame,iter,time}: mean over the epoch

    But keys may come and go, scalars are averaged instead of the last one taken, and nothing loops over envs or leaves the device
    before the epoch ends.
    """

    needs_done_indices = False

    def after_init(self, algo) -> None:
        super().after_init(algo)
        self.sums: Dict[str, Any] = {}  # "Episode/<key>" or scalar's key -> (sum, count) over the epoch
        self.steps: Dict[str, List[Tuple[Tensor, Tensor]]] = {}  # episode_cumulative key -> (value, done) of each step of the epoch
        self.episodes = collections.defaultdict(lambda: EpisodeMeter(len(algo.dones), algo.games_to_track, 1, algo.device))

    def process_infos(self, infos, done_indices) -> None:
        for key, value in infos.get("episode", {}).items():
            value = torch.as_tensor(value, device=self.algo.device).detach().float()
            self._add("Episode/" + key, value.sum(), value.numel())
        for key, value in infos.get("episode_cumulative", {}).items():
            self.steps.setdefault(key, []).append((value.to(self.algo.device, torch.float32, copy=True), self.algo.dones.bool()))
        self._add_scalars(infos, "")

    def _add_scalars(self, infos, prefix) -> None:
        for key, value in infos.items():
            if isinstance(value, dict):
                self._add_scalars(value, f"{prefix}{key}/")
            elif isinstance(value, (int, float, np.number)) or (isinstance(value, Tensor) and value.dim() == 0):
                self._add(prefix + key, value.detach().float() if isinstance(value, Tensor) else float(value), 1)

    def _add(self, key, value, count) -> None:
        total, n = self.sums.get(key, (0.0, 0))
        self.sums[key] = (total + value, n + count)

    def after_print_stats(self, frame, epoch_num, total_time) -> None:
        if self.sums:  # one transfer for all of them
            means = torch.stack([torch.as_tensor(total / max(count, 1), dtype=torch.float32, device=self.algo.device)
                                 for total, count in self.sums.values()]).tolist()
            for key, mean in zip(self.sums, means):
                if key.startswith("Episode/"):
                    self.writer.add_scalar(key, mean, epoch_num)
                else:
                    for axis, step in (("frame", frame), ("iter", epoch_num), ("time", total_time)):
                        self.writer.add_scalar(f"{key}/{axis}", mean, step)
            self.sums.clear()
        for key, steps in self.steps.items():
            values, dones = map(torch.stack, zip(*steps))
            window, before = self.episodes[key].finished, self.episodes[key].finished.count
            self.episodes[key].add_rollout(values, dones=dones)
            if window.count > before:  # only if episodes ended in this epoch
                self.writer.add_scalar(f"episode_cumulative/{key}", window.rows.mean(), frame)
                self.writer.add_scalar(f"episode_cumulative_min/{key}_min", window.rows.min(), frame)
                self.writer.add_scalar(f"episode_cumulative_max/{key}_max", window.rows.max(), frame)
        self.steps.clear()

    def state_dict(self):
        return {key: {"running": meter.running[:, 0], "window": meter.finished.state_dict()} for key, meter in self.episodes.items()}

    def load_state_dict(self, state) -> None:
        for key, saved in state.items():
            if saved["running"].shape == self.algo.dones.shape:  # another num_envs starts anew
                self.episodes[key].running[:, 0] = saved["running"]
                self.episodes[key].finished.load_state_dict(saved["window"])


class WandbAlgoObserver(AlgoObserver):
    """Sends the epoch's scalars to Weights & Biases, once an epoch. Put it last: it sends what the others wrote to `algo.writer`.

    Not by sync_tensorboard, which puts <tag>/iter and <tag>/time on the wrong x-axis; and without `step=`, which would drop the
    points of a continued run: frames, epoch and seconds are logged as values, and each metric is told which is its x-axis.
    Whatever W&B does - absent, offline, slow, broken - training goes on.
    """

    needs_done_indices = False
    patience = 20  # seconds for a server's first answer, and for sending the rest at the end: usually one or two do

    def __init__(self, args: Args):
        self.args, self.run, self.defined = args, None, set()

    def before_init(self, base_name, config, experiment_name) -> None:
        os.environ.setdefault("WANDB_INIT_TIMEOUT", "60")  # seconds; the variable works in every version
        try:
            import wandb

            self.wandb = wandb
        except ImportError:
            return warn("--track: wandb is not installed (pip install wandb): training goes on without it")
        for mode in (None, "offline"):  # None: as WANDB_MODE says, else online
            try:
                settings = wandb.setup().settings
                if mode is None and settings.mode == "online":  # without a network wandb would try for minutes
                    with contextlib.suppress(urllib.error.HTTPError):  # any answer will do
                        urllib.request.urlopen(settings.base_url, timeout=self.patience).close()
                self.run = wandb.init(
                    project=self.args.wandb_project_name, entity=self.args.wandb_entity or None, group=self.args.wandb_group or None,
                    tags=self.args.wandb_tags or None, name=experiment_name, id=config["wandb_run_id"], resume="allow",
                    dir=os.path.abspath(config["run_dir"]), config=config, mode=mode)
                for axis in ("global_step", "epoch", "time"):
                    self.run.define_metric(axis)
                return
            except Exception as exc:
                then = f"recording offline, upload later with: wandb sync {config['run_dir']}/wandb/offline-run-*"
                warn(f"W&B failed to start: {first_line(exc)}; {then if mode is None else 'training goes on without it'}")
                self._in_time(wandb.teardown)  # a failed start spoils the next one; clearing it away may wait for the network again

    def after_print_stats(self, frame, epoch_num, total_time) -> None:
        if self.run is None:
            return
        try:
            row = {**self.writer.scalars, **{tag: self.wandb.Video(path, format="gif") for tag, path in self.writer.gifs.items()}}
            for tag in set(row) - self.defined:
                axis = {"iter": "epoch", "time": "time"}.get(tag.rsplit("/", 1)[-1], "global_step")
                self.run.define_metric(tag, step_metric=axis)
                self.defined.add(tag)
            self.run.log({**row, "global_step": frame, "epoch": epoch_num, "time": total_time})
        except Exception as exc:
            self._leave(f"failed ({exc}): training goes on without it")

    def close(self) -> None:
        def finish():
            algo = self.algo
            best = algo.last_mean_rewards if algo.best_epoch else None
            self.run.summary.update({"best_reward": best, "best_epoch": algo.best_epoch or None, "stop_reason": algo.stop_reason})
            for name in sorted(os.listdir(algo.nn_dir)):
                if self.args.wandb_upload == "all" or (self.args.wandb_upload == "best" and name == "best.pth"):
                    epoch = int(re.sub(r"\D", "", name) or algo.epoch_num)
                    about = {"epoch": algo.best_epoch, "reward": best} if name == "best.pth" else {"epoch": epoch}
                    artifact = self.wandb.Artifact(f"{self.run.id}-{name[:-4]}", type="model", metadata=about)
                    artifact.add_file(os.path.join(algo.nn_dir, name))
                    self.run.log_artifact(artifact)
            for _ in range(32):  # W&B <= 0.24 writes its file in blocks of 32 KiB; the config, 1 KiB or more, pushes the last rows out
                self.run.config.persist()
            self.run.finish()

        try:
            if self.run is not None and self._in_time(finish, self.patience):
                self.run = None
        finally:  # also if Ctrl-C cuts the waiting short
            if self.run is not None:
                self._leave("did not take everything in time")

    def _leave(self, why: str) -> None:
        folder = os.path.relpath(os.path.dirname(self.run.dir))
        self.run = None
        warn(f"W&B {why}; upload the rest later with: wandb sync --include-online {folder}")
        self._in_time(self.wandb.teardown)  # first of all it unregisters W&B's exit hook, which would wait without end

    @staticmethod
    def _in_time(call, seconds: float = 2) -> bool:
        """Whether W&B did as told in time. Without an answer it waits for many minutes: it may, in a thread that ends with the program."""
        done: List[Any] = []

        def work():
            with contextlib.suppress(Exception):
                done.append(call())

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(seconds)
        return bool(done)


class MultiObserver(AlgoObserver):
    """Calls every hook on each of `observers`, in order. One that raises is reported, once, and left out from then on."""

    def __init__(self, observers: List[AlgoObserver], strict: bool = False):
        self.observers, self.strict = list(observers), strict
        # an observer written for rl_games does not say whether it looks at done_indices: then it does
        self.needs_done_indices = any(getattr(o, "needs_done_indices", True) for o in self.observers)

    def _call_one(self, observer: AlgoObserver, hook: str, *args) -> Any:
        try:
            if hasattr(observer, hook):  # rl_games' own base class lacks after_clear_stats, and those that are ours alone
                return getattr(observer, hook)(*args)
        except Exception as exc:
            if self.strict:
                raise
            self.observers.remove(observer)
            warn(f"{type(observer).__name__}.{hook} raised {exc!r}: training goes on without this observer\n{traceback.format_exc().rstrip()}")

    def _call(self, hook: str, *args) -> Dict[str, Any]:
        return {type(observer).__name__: self._call_one(observer, hook, *args) for observer in list(self.observers)}

    before_init = functools.partialmethod(_call, "before_init")
    after_init = functools.partialmethod(_call, "after_init")
    process_infos = functools.partialmethod(_call, "process_infos")
    after_steps = functools.partialmethod(_call, "after_steps")
    after_clear_stats = functools.partialmethod(_call, "after_clear_stats")
    after_print_stats = functools.partialmethod(_call, "after_print_stats")
    close = functools.partialmethod(_call, "close")
    state_dict = functools.partialmethod(_call, "state_dict")

    def load_state_dict(self, state) -> None:
        for observer in list(self.observers):
            if state.get(type(observer).__name__):
                self._call_one(observer, "load_state_dict", state[type(observer).__name__])


# ======================================================================================================================
# 6  CHECKPOINTS
#
# runs/<experiment>/nn/: epoch_<N>.pth every save_frequency epochs, best.pth at each new best mean reward, last.pth at exit and in between
# if nothing else was written for long.
# Each is rl_games' dict (model, optimizer, epoch, frame, last_mean_rewards, env_state) and what exact continuation needs besides.
# ======================================================================================================================

FORMAT_VERSION = 1


def save_checkpoint(state: Dict[str, Any], path: str) -> None:
    """Write `state` so that `path` holds either the old file or the whole new one, also if the machine dies meanwhile."""
    serialised = io.BytesIO()  # torch.save to a file would turn a full disk into a RuntimeError without a reason
    torch.save(state, serialised)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(serialised.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def claim_run_dir(run_dir: str) -> Any:
    """Keep other processes out of a run folder for as long as this process lives, and clear what a killed one left half written."""
    try:
        lock = open(os.path.join(run_dir, ".lock"), "w")
    except OSError as exc:
        raise UserError(f"{run_dir} cannot be trained in: {exc.strerror or exc}; branch off with --experiment NAME")
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{run_dir} is being trained by another process: stop that one first, or branch off with --experiment NAME")
    except (ImportError, OSError):  # Windows; some network file systems have no locks: what is lost there is the refusal alone
        pass
    for path in glob.glob(os.path.join(glob.escape(run_dir), "nn", "*.tmp")):
        os.remove(path)
    return lock


def load_checkpoint(path: str) -> Dict[str, Any]:
    """Read a checkpoint to the CPU, without running code from it. UserError with one line if that cannot be done."""
    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise UserError(f"{path} is truncated or not a checkpoint")
            bad = zipfile.ZipFile(file).testzip()  # torch.load does not look at the checksums
            if bad:
                raise UserError(f"{path} is damaged: {bad} does not match its checksum")
            file.seek(0)
            allow_numpy_scalars()
            state = torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except OSError as exc:
        raise UserError(f"--checkpoint {path} cannot be read: {exc.strerror or exc}")
    except pickle.UnpicklingError:
        raise UserError(f"{path} is not a checkpoint of plain tensors and numbers (it asks to run code): refused")
    except Exception as exc:
        raise UserError(f"{path} is damaged or not a checkpoint: {first_line(exc)}")
    missing = [key for key in ("model", "optimizer", "epoch", "frame") if not isinstance(state, dict) or key not in state]
    if missing:
        raise UserError(f"{path} is not a checkpoint of train_ppo.py or of rl_games' PPO: it lacks {', '.join(missing)}")
    if "args" not in state:
        return from_rl_games(state, path)
    if state.get("format_version", 0) > FORMAT_VERSION:
        raise UserError(f"{path} was written by a newer train_ppo.py (format {state['format_version']} > {FORMAT_VERSION}): update this file")
    return state


@functools.lru_cache(maxsize=None)  # once: torch would keep them again with each call
def allow_numpy_scalars() -> None:
    """rl_games keeps its best reward as a numpy number: let weights_only read those, by the names that numpy 1 and 2 give them."""

    # torch compares the name in the file with the module and name that a function in its list says it has; the numpy that is
    # installed says only one of the two, so there is one function for each
    def renamed(module: str) -> Any:
        def read(*args):
            return scalar(*args)

        read.__module__, read.__name__, read.__qualname__ = module, "scalar", "scalar"
        return read

    scalar = np.float32(0).__reduce__()[0]
    torch.serialization.add_safe_globals([
        renamed("numpy.core.multiarray"), renamed("numpy._core.multiarray"), codecs.encode, np.dtype,
        *(type(np.dtype(name)) for name in ("float32", "float64", "int64"))])


def from_rl_games(state: Dict[str, Any], path: str) -> Dict[str, Any]:
    """A checkpoint of rl_games 1.x (a2c_continuous with continuous_a2c_logstd) as one of ours; layer sizes are read from its weights."""
    model = {key.replace("_orig_mod.", "", 1): value for key, value in state["model"].items()}  # the prefix of torch.compile
    try:
        num_acts, num_obs = len(model["a2c_network.sigma"]), model["a2c_network.actor_mlp.0.weight"].shape[1]
        units = [len(bias) for key, bias in model.items() if re.fullmatch(r"a2c_network\.actor_mlp\.\d+\.bias", key)]
        sizes = dict(units=units, separate="a2c_network.critic_mlp.0.weight" in model,
                     normalize_input="running_mean_std.count" in model, normalize_value="value_mean_std.count" in model)
        known = ActorCritic(num_obs, num_acts, **sizes).state_dict()
        odd = sorted(set(model) ^ set(known)) + sorted({"assymetric_vf_nets", "running_mean_std"} & set(state))
    except (KeyError, AttributeError) as exc:
        odd = [str(exc).strip("'")]
    if odd:
        raise UserError(f"{path} is of an rl_games network that this file does not have (it takes a2c_continuous with "
                        f"continuous_a2c_logstd, an MLP and a fixed sigma): {', '.join(odd[:3])}")
    best = float(state.get("last_mean_rewards", -math.inf))
    return {
        "model": model, "optimizer": state["optimizer"], "epoch": state["epoch"], "frame": state["frame"],
        # -100500 and -1000000000 are what rl_games starts from
        "last_mean_rewards": best if best > -100500 else -math.inf, "env_state": state.get("env_state"),
        "args": sizes, "num_obs": num_obs, "num_acts": num_acts, "lr": state["optimizer"]["param_groups"][0]["lr"],
        # what it does not keep
        "best_epoch": 0, "total_time": 0.0, "clip_obs": None, "observers": {}, **new_episodes(),
    }


def new_episodes() -> Dict[str, Any]:
    """For a state that does not hold where its environments were: they start anew, and so does the window of episodes."""
    return {"obs": torch.zeros(0), "finished": {"rows": torch.zeros(0, 3), "count": 0}}


def periodic_names(names: Iterable[str]) -> List[str]:
    """Those of the names that are epoch_<N>.pth, by N."""
    return sorted((name for name in names if re.fullmatch(r"epoch_\d+\.pth", name)), key=lambda name: int(name[6:-4]))


def find_checkpoint(path: str, quiet: bool = False) -> Tuple[str, Dict[str, Any]]:
    """(file, state) for what --checkpoint or --init-from names: a file, or a run folder's readable one with the highest epoch."""
    if not os.path.exists(path):
        raise UserError(f"--checkpoint {path} does not exist: give a .pth file or a run folder such as runs/Cartpole_...")
    if not os.path.isdir(path):
        return path, load_checkpoint(path)
    folder, found = os.path.join(path, "nn"), []
    names = set(map(os.path.basename, glob.glob(os.path.join(glob.escape(folder), "*.pth"))))
    periodic = periodic_names(names)
    for name in sorted(names.difference(periodic)) + periodic[::-1]:
        try:
            found.append((os.path.join(folder, name), load_checkpoint(os.path.join(folder, name))))
            if name in periodic:
                break  # the rest is older
        except UserError as exc:
            if not quiet:
                warn(f"{exc}: skipped")
    if not found:
        raise UserError(f"{path} has no readable checkpoint (looked for {os.path.join(folder, '*.pth')})")
    return max(found, key=lambda item: (item[1]["epoch"], os.path.basename(item[0]) == "last.pth"))


def get_rng_state(device: torch.device) -> Dict[str, Any]:
    """State of every random generator an env or the policy may draw from, as tensors and numbers."""
    version, keys, gauss = random.getstate()
    name, np_keys, *np_rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": [version, torch.from_numpy(np.array(keys)), gauss],
        "numpy": [name, torch.from_numpy(np_keys.astype(np.int64)), *np_rest],
    }


def set_rng_state(state: Dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


def plain(value: Any) -> Any:
    """A copy of `value` as tensors, numbers, strings, lists and dicts, the only things that a checkpoint may hold."""
    if isinstance(value, Tensor):
        return value.clone()  # under no_grad: without its history
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return torch.tensor(value)
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


# ======================================================================================================================
# 7  PPO, with rl_games' details
#
#     Schulman et al. 2017      Proximal policy optimization algorithms                        https://arxiv.org/abs/1707.06347
#     Schulman et al. 2015      High-dimensional continuous control using GAE                  https://arxiv.org/abs/1506.02438
#     Pardo et al. 2018         Time limits in reinforcement learning                          https://arxiv.org/abs/1712.00378
#     Andrychowicz et al. 2020  What matters in on-policy reinforcement learning?              https://arxiv.org/abs/2006.05990
#     Huang et al. 2022         The 37 implementation details of PPO                           (ICLR blog track)
#     Makoviychuk et al. 2021   Isaac Gym: thousands of envs on one GPU, short rollouts        https://arxiv.org/abs/2108.10470
#     Rudin et al. 2021         Learning to walk in minutes: what to tune with so many envs    https://arxiv.org/abs/2109.11978
# ======================================================================================================================


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, dones: Tensor, last_value: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2015, eq. 16): three (T, E) and the (E,) value after them -> (T, E).

    dones[t], 0.0 or 1.0: the episode ended with step t, so nothing after it counts. If it was the clock that ended it, what it was
    still worth is in rewards[t] by now (PPOAgent.make_batch).
    """
    advantages = torch.empty_like(rewards)
    advantage, next_value = torch.zeros_like(last_value), last_value
    for t in reversed(range(len(rewards))):
        alive = 1.0 - dones[t]
        delta = rewards[t] + gamma * alive * next_value - values[t]
        advantages[t] = advantage = delta + gamma * gae_lambda * alive * advantage
        next_value = values[t]
    return advantages


class Batch(NamedTuple):
    """A rollout, or a minibatch of it, as the update sees it."""

    obs: Tensor  # (n, O) as the env gave them
    actions: Tensor  # (n, A) as sampled, before clipping
    logprobs: Tensor  # (n,) under the policy that acted
    advantages: Tensor  # (n,) normalised
    values: Tensor  # (n,) predicted during the rollout, normalised anew
    returns: Tensor  # (n,) normalised
    mus: Tensor  # (n, A) mean actions when these rows were last passed over: at first those of the policy that acted
    sigmas: Tensor  # (n, A) and the standard deviations then


# what ppo_loss returns last, in its order, by the names in the log
LOSSES = dict(a_loss="the policy loss", c_loss="the value loss", entropy="the entropy", bounds_loss="the bounds loss", clipfrac="the clip fraction")


def ppo_loss(model: ActorCritic, batch: Batch, args: Args) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> loss (), the new mean actions (n, A) and log std (n, A), and LOSSES as one tensor (5,)."""
    mu, logstd, value = model(model.norm_obs(batch.obs))
    mu, value = mu.float(), value.float()  # of bfloat16 under mixed_precision: ratios near 1 need all their digits
    # Schulman et al. 2017, eq. 7: once the ratio has left the clip range in the direction that pays, its gradient is zero, so several
    # passes over one batch cannot run off with the policy. The min keeps the gradient that leads back.
    ratio = (log_prob(batch.actions, mu, logstd) - batch.logprobs).exp()
    clipped = ratio.clamp(1.0 - args.clip_coef, 1.0 + args.clip_coef)
    policy_loss = -torch.min(batch.advantages * ratio, batch.advantages * clipped).mean()

    # kept within clip_coef (in normalised units) of the old prediction: rl_games and the original code do it, Andrychowicz et al. 2020
    # found that it does not help
    value_loss = (value - batch.returns).square()
    if args.clip_vloss:
        value_clipped = batch.values + (value - batch.values).clamp(-args.clip_coef, args.clip_coef)
        value_loss = torch.max(value_loss, (value_clipped - batch.returns).square())
    value_loss = value_loss.mean()

    entropy = (0.5 + 0.5 * math.log(2 * math.pi) + logstd).sum(-1).mean()
    # actions are clipped to [-1, 1] on their way to the env: a mean action far outside changes nothing any more, so nothing else would
    # bring it back. Up to 1.1 is free (rl_games' soft_bound).
    bounds_loss = (mu.abs() - 1.1).clamp(min=0.0).square().sum(-1).mean()

    loss = policy_loss + 0.5 * args.vf_coef * value_loss - args.ent_coef * entropy + args.bounds_loss_coef * bounds_loss
    clipfrac = (ratio != clipped).float().mean()
    return loss, mu.detach(), logstd.detach(), torch.stack((policy_loss, value_loss, entropy, bounds_loss, clipfrac)).detach()


def policy_kl(mu: Tensor, sigma: Tensor, old_mu: Tensor, old_sigma: Tensor) -> Tensor:
    """KL(new || old) of two diagonal Gaussians, mean over the batch, with the 1e-5 that rl_games adds; four (n, A) -> ()."""
    log_ratio = (old_sigma / sigma + 1e-5).log()
    distance = (sigma.square() + (mu - old_mu).square()) / (2.0 * (old_sigma.square() + 1e-5))
    return (log_ratio + distance - 0.5).sum(-1).mean()


def next_lr(lr: Tensor, kl: Tensor, epoch: int, args: Args) -> Tensor:
    """The learning rate that follows lr (), by rl_games' schedules; tensors, so that no step waits for the GPU."""
    if args.lr_schedule == "adaptive":  # keep the KL divergence near its threshold
        lr = torch.where(kl > 2.0 * args.kl_threshold, (lr / 1.5).clamp(min=args.min_lr), lr)
        return torch.where(kl < 0.5 * args.kl_threshold, (lr * 1.5).clamp(max=args.max_lr), lr)
    if args.lr_schedule == "linear":
        return torch.full_like(lr, 1e-6 + (args.learning_rate - 1e-6) * max(0.0, 1.0 - epoch / args.max_epochs))
    return lr


def compiled(functions: List[Any], device: torch.device) -> List[Any]:
    """The same functions, compiled; unchanged, with one warning, where there is no compiler."""
    try:
        torch.compile(lambda x: x.exp() + 1.0)(torch.ones(8, device=device))
    except Exception as exc:
        warn(f"--compile: torch.compile does not work here ({first_line(exc)}): going on without it")
        return functions
    return [torch.compile(f, mode="reduce-overhead" if device.type == "cuda" else "default") for f in functions]


class PPOAgent:
    """Owns model, optimizer, rollout buffers and counters; `train` is the loop. What observers may read is rl_games' by name."""

    def __init__(self, args: Args, env, observer: AlgoObserver, writer: SummaryWriter, config: Dict[str, Any]):
        self.args, self.env, self.algo_observer, self.writer, self.config = args, env, observer, writer, config
        self.device = self.ppo_device = pick_device(args.device)
        if args.mixed_precision and self.device.type != "cuda":
            log("--mixed-precision does nothing on a CPU, as in rl_games")
        self.nn_dir = os.path.join(config["run_dir"], "nn")  # of checkpoints, by rl_games' name
        self.games_to_track, self.num_agents, self.args_dict = args.games_to_track, 1, plain(asdict(args))
        self.epoch_num, self.frame, self.total_time = 0, 0, 0.0
        self.mean_rewards, self.last_mean_rewards, self.best_epoch = -math.inf, -math.inf, 0  # last_mean_rewards: the best so far
        self.stop_signal = 0  # set by Runner's signal handler: leave after this epoch
        self.stop_reason = "error"  # until train() returns
        self.games = 0.0  # finished episodes that mean_rewards is over: games_to_track, once there are so many

        self.model = make_model(args, env.num_obs, env.num_acts).to(self.device)
        for tensor in self.model.state_dict().values() if WORLD_SIZE > 1 else ():
            together(dist.broadcast, tensor, 0)  # each process has a seed of its own
        self.lr = torch.tensor(args.learning_rate, device=self.device)
        self.act, self.gae, self.ppo_loss = self.model.act, gae, ppo_loss
        if args.compile:
            self.act, self.gae, self.ppo_loss = compiled([self.act, self.gae, self.ppo_loss], self.device)
        # fused: one kernel, and it takes the learning rate as a tensor
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.lr, eps=1e-8, fused=True)
        self.epoch_frames = args.num_steps * env.num_envs * WORLD_SIZE
        self.minibatch_size = min(args.minibatch_size, args.num_envs * args.num_steps)

        # many envs, few steps each: a rollout is as large as with one env and long episodes, but comes in a fraction of the time
        # (Makoviychuk et al. 2021, Rudin et al. 2021); what lies beyond its T steps is the value function's to say
        T, E, O, A = args.num_steps, env.num_envs, env.num_obs, env.num_acts
        self.buffer = {name: torch.zeros(T, E, *shape, device=self.device) for name, shape in dict(
            obs=(O,), actions=(A,), mus=(A,), logprobs=(), values=(), rewards=(), dones=(), time_outs=()).items()}
        self.episodes = EpisodeMeter(E, args.games_to_track, 3, self.device)  # returns, shaped returns and lengths
        self.obs = env.reset()["obs"].to(self.device)
        self.dones = torch.zeros(E, dtype=torch.bool, device=self.device)
        self.has_time_outs = self.warned_time_outs = self.warned_save = False
        self.last_save = self.last_best_save = time.monotonic()
        self.best_state: Optional[Dict[str, Any]] = None  # a new best that is not on disk yet
        observer.after_init(self)

    @torch.no_grad()
    def rollout(self) -> float:
        """Fill the buffers with T steps of every env. Returns the seconds spent in env.step.

        The env may return the same tensors every step and overwrite them in place: what is kept is copied, nothing is written to
        (self.obs may be the env's own: it is used up before the next step).
        """
        buffer, env_seconds = self.buffer, 0.0
        for t in range(self.args.num_steps):
            action, logprob, value, mu = self.act(self.obs, torch.randn_like(buffer["actions"][t]))
            for name, x in (("obs", self.obs), ("actions", action), ("logprobs", logprob), ("values", value), ("mus", mu)):
                buffer[name][t] = x

            start = time.perf_counter()
            obs, reward, done, infos = self.env.step(action.clamp(-1.0, 1.0) if self.args.clip_actions else action)
            env_seconds += time.perf_counter() - start

            self.obs = obs["obs"].to(self.device)
            buffer["rewards"][t] = reward
            buffer["dones"][t] = done
            buffer["time_outs"][t] = infos.get("time_outs", 0.0)
            self.has_time_outs |= "time_outs" in infos
            self.dones = buffer["dones"][t].bool()
            done_indices = self.dones.nonzero() if self.algo_observer.needs_done_indices else None
            self.algo_observer.process_infos(infos, done_indices)
        return env_seconds

    @torch.no_grad()
    def make_batch(self) -> Tuple[Batch, Tensor]:
        """What there is to learn from the buffers, as (N, ...) rows by env, and (2,) figures: explained variance, longest episode."""
        args, model, buffer = self.args, self.model, self.buffer
        shaped = args.reward_scale * buffer["rewards"]
        if args.value_bootstrap:
            # An episode cut by the clock has a future (Pardo et al. 2018). V(s_{t+1}) would be the exact thing to add, but some tasks
            # return the next episode's first observation there, so, like rl_games, take V(s_t): one step off, but never of another episode.
            shaped = shaped + args.gamma * buffer["values"] * buffer["time_outs"]
        returns = buffer["values"] + self.gae(shaped, buffer["values"], buffer["dones"], model.value(self.obs), args.gamma, args.gae_lambda)
        sums = self.episodes.add_rollout(buffer["rewards"], shaped, torch.ones_like(shaped), dones=buffer["dones"])
        longest = (sums[..., 2] * buffer["dones"]).max()
        del sums  # as large as the rollout is

        def flat(x: Tensor) -> Tensor:  # (T, E, ...) -> (N, ...) by env: with thousands of envs minibatches need no shuffling
            return x.transpose(0, 1).flatten(0, 1)

        obs, values, returns = flat(buffer["obs"]), flat(buffer["values"]), flat(returns)
        advantages = returns - values  # not what gae gave: like this rounding is rl_games' as well
        explained_variance = 1.0 - (returns - values).var() / returns.var().clamp(min=1e-8)
        # The old values are taken in, and normalised, before the returns are, as rl_games does it.
        if args.normalize_value:
            model.value_mean_std.update(values.unsqueeze(1))
        values = model.norm_value(values)
        if args.normalize_value:
            model.value_mean_std.update(returns.unsqueeze(1))
        returns = model.norm_value(returns)
        # over the whole rollout (Huang et al. 2022, detail 7: each minibatch): the step size then does not depend on the reward's scale
        if args.norm_adv:
            mean, var = mean_and_var(advantages)
            advantages = (advantages - mean) / (var.sqrt() + 1e-8)
        mus = flat(buffer["mus"])
        sigmas = model.a2c_network.sigma.exp().expand_as(mus).clone()
        batch = Batch(obs, flat(buffer["actions"]), flat(buffer["logprobs"]), advantages, values, returns, mus, sigmas)
        return batch, torch.stack((explained_variance, longest))

    def update(self) -> Dict[str, float]:
        """update_epochs passes of minibatch gradient steps over what the buffers hold. Returns the epoch's figures."""
        args, model = self.args, self.model
        self.check_rollout()
        batch, about_batch = self.make_batch()
        minibatches = [Batch(*rows) for rows in zip(*(x.split(self.minibatch_size) for x in batch))]
        figures = torch.zeros(len(LOSSES) + 1, device=self.device)  # sums of LOSSES and of the KL divergence
        for update_epoch in range(args.update_epochs):
            pass_kl = torch.zeros((), device=self.device)
            for part in minibatches:
                # The statistics of the observations move in the first pass, each minibatch before it is normalised with them, and then
                # rest until the next epoch.
                if args.normalize_input and update_epoch == 0:
                    model.running_mean_std.update(part.obs)
                with torch.autocast("cuda", torch.bfloat16, enabled=args.mixed_precision and self.device.type == "cuda"):
                    loss, mu, logstd, losses = self.ppo_loss(model, part, args)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                # How far the policy has moved since these rows were last passed over, before this step.
                kl = policy_kl(mu, logstd.exp(), part.mus, part.sigmas)
                part.mus.copy_(mu)
                part.sigmas.copy_(logstd.exp())
                if WORLD_SIZE > 1:  # the processes' mean gradient and KL divergence, in one message
                    gradients = [p.grad for p in model.parameters()]
                    message = average(torch.cat([kl.view(1), *(g.flatten() for g in gradients)]))
                    kl = message[0]
                    nn.utils.vector_to_parameters(message[1:], gradients)
                if args.max_grad_norm > 0:
                    nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                self.optimizer.step()
                pass_kl += kl / len(minibatches)
                figures += torch.cat((losses, kl.view(1)))
                if args.schedule_type == "legacy":
                    self.lr.copy_(next_lr(self.lr, kl, self.epoch_num, args))
            if args.schedule_type == "standard":
                self.lr.copy_(next_lr(self.lr, pass_kl, self.epoch_num, args))

        return self.fetch(figures / (args.update_epochs * len(minibatches)), about_batch)

    def fetch(self, about_passes: Tensor, about_batch: Tensor) -> Dict[str, float]:
        """All figures of the epoch in one transfer from the device, averaged over the processes, by name. Stops the run if one is NaN or
        Inf, and sets mean_rewards."""
        weights = torch.stack([p.detach().sum() for p in self.model.parameters()]).sum()  # NaN or Inf if any of them is
        window = self.episodes.finished.rows
        finished = torch.full((1,), float(len(window)), device=self.device)
        means = average(torch.cat((about_passes, about_batch, torch.stack((self.lr, weights)), window.sum(0), finished)))
        names = (*LOSSES, "kl", "explained_variance", "longest", "lr", "weights", "reward", "shaped_reward", "length", "finished")
        figures = dict(zip(names, means.tolist()))
        for name, what in {**LOSSES, "kl": "the KL divergence", "weights": "the weights"}.items():
            if not math.isfinite(figures[name]):
                self.stop_for_bad_numbers(what)
        for name in ("reward", "shaped_reward", "length"):
            figures[name] /= max(figures["finished"], 1.0)
        if figures["finished"]:
            self.mean_rewards, self.games = figures["reward"], figures["finished"]
        return figures

    def train(self) -> None:
        """The loop: until max_epochs or a stop signal. Everything that is logged or saved happens at the end of an epoch."""
        args, first, began, stop_signal = self.args, self.epoch_num, time.perf_counter(), 0
        # a live line on a terminal; in a pipe or a file (disable=None) plain lines
        bar = tqdm(total=args.max_epochs, disable=None, file=sys.stdout, dynamic_ncols=True, bar_format="{desc}")
        while self.epoch_num < args.max_epochs and not stop_signal:
            self.epoch_num += 1
            start = time.perf_counter()
            if hasattr(self.env, "set_train_info"):
                self.env.set_train_info(self.frame, self)
            step_time = self.rollout()
            play_time = time.perf_counter() - start
            self.algo_observer.after_steps()
            figures = self.update()
            epoch_time = time.perf_counter() - start
            self.total_time += epoch_time
            self.frame += self.epoch_frames

            minutes = (time.monotonic() - self.last_save) / 60
            stop_signal, overdue = self.agree(self.stop_signal, 0 < args.save_every_minutes < minutes)
            if RANK == 0:
                self.write_stats(figures, step_time, play_time, epoch_time)
            self.save_checkpoints(bool(overdue))
            if RANK == 0:
                left = (time.perf_counter() - began) / (self.epoch_num - first) * (args.max_epochs - self.epoch_num)
                line = self.epoch_line(figures, left, (step_time, play_time, epoch_time))
                print(line, flush=True) if bar.disable else bar.set_description_str(line)
        bar.close()
        self.stop_signal = stop_signal
        self.stop_reason = signal.Signals(stop_signal).name if stop_signal else f"--max-epochs {args.max_epochs} reached"

    def agree(self, *numbers: int) -> List[int]:
        """The largest of each over all processes: what one wants - to stop, to save - all do after the same epoch."""
        if WORLD_SIZE == 1:
            return list(numbers)
        agreed = torch.tensor(numbers, device=self.device)
        together(dist.all_reduce, agreed, dist.ReduceOp.MAX)
        return agreed.tolist()

    def epoch_line(self, figures: Dict[str, float], left: float, times: Tuple[float, ...]) -> str:
        """One epoch for the console, the most important first: a narrow terminal cuts off the rest."""
        fps = "/".join(f"{self.epoch_frames / max(t, 1e-9) / 1000:.0f}k" for t in times)
        episodes = f"reward {figures['reward']:.2f} length {figures['length']:.1f}" if figures["finished"] else "no episode finished yet"
        return (f"epoch {self.epoch_num}/{self.args.max_epochs} left {int(left) // 3600}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d} "
                f"{episodes} lr {figures['lr']:.1e} fps {fps} frames {self.frame:,}")

    def write_stats(self, figures: Dict[str, float], step_time: float, play_time: float, epoch_time: float) -> None:
        """Give the epoch's metrics, by rl_games' names, to the writer, and then the observers their turn."""
        write, frame, frames = self.writer.add_scalar, self.frame, self.epoch_frames
        for name, value in dict(
            step_inference_rl_update_fps=frames / epoch_time, step_inference_fps=frames / play_time, step_fps=frames / max(step_time, 1e-9),
            rl_update_time=epoch_time - play_time, step_inference_time=play_time, step_time=step_time).items():
            write("performance/" + name, value, frame)
        for name in (*LOSSES, "explained_variance"):
            write("losses/" + name, figures[name], frame)
        for name, value in dict(last_lr=figures["lr"], lr_mul=1.0, e_clip=self.args.clip_coef, kl=figures["kl"], epochs=self.epoch_num).items():
            write("info/" + name, value, frame)
        if figures["finished"]:
            for tag, name in (("rewards", "reward"), ("shaped_rewards", "shaped_reward"), ("episode_lengths", "length")):
                for axis, step in (("step", frame), ("iter", self.epoch_num), ("time", self.total_time)):
                    write(f"{tag}/{axis}", figures[name], step)
        limit = float(getattr(self.env, "max_episode_length", math.inf))
        if not self.has_time_outs and figures["longest"] >= limit - 1 and not self.warned_time_outs:
            self.warned_time_outs = True
            warn(f"episodes end at max_episode_length ({limit:.0f}) but the env gives no infos['time_outs']: the clock is taken for failure")
        self.algo_observer.after_print_stats(frame, self.epoch_num, self.total_time)
        self.writer.end_epoch()

    def check_rollout(self) -> None:
        """A batch with NaN or Inf in it never reaches the weights, nor a checkpoint: name what went bad first, and stop."""
        named = {"observations": "obs", "mean actions": "mus", "actions": "actions", "values": "values", "rewards": "rewards"}
        good = torch.stack([self.obs.sum(), *(self.buffer[name].sum() for name in named.values())]).isfinite().all()
        if average(good.float()) == 1.0:  # the epoch's other wait for the device
            return
        bad = ~torch.stack([self.buffer[name].unsqueeze(-1).flatten(2).isfinite().all(-1) for name in named.values()], dim=1)  # (T, 5, E)
        bad = torch.cat((bad, torch.zeros_like(bad[:1])))
        bad[-1, 0] = ~self.obs.isfinite().all(-1)  # the observations that follow the rollout: their value is in the advantages
        if average(bad.any().float()) == 0.0:
            return  # only a sum was too large
        if not bad.any():
            raise TrainingError(f"NaN or Inf in another process, which says more: process {RANK} stopped too, epoch {self.epoch_num}")
        step, what = bad.any(-1).nonzero()[0].tolist()  # the first one
        name, envs = list(named)[what], int(bad[step, what].sum())
        self.stop_for_bad_numbers(f"{name} of {envs} of {self.env.num_envs} envs at step {step + 1} of the rollout")

    def stop_for_bad_numbers(self, what: str) -> None:
        path = os.path.join(self.config["run_dir"], f"nan_dump{f'_{RANK}' if RANK else ''}.pth")
        kept = "nothing of this epoch was saved"
        with contextlib.suppress(OSError):
            save_checkpoint({**self.get_full_state_weights(gather=False), "buffer": self.buffer, "what": what}, path)
            kept += f" but {path}, to look into"
        raise TrainingError(f"NaN or Inf in {what}, epoch {self.epoch_num}: stopped; {kept}")

    def save_checkpoints(self, overdue: bool) -> None:
        """best.pth at each new best mean reward over a full window, from epoch save_best_after on; epoch_<N>.pth every save_frequency
        epochs; last.pth if no file was written for save_every_minutes."""
        args, state = self.args, None
        full_window = self.games == args.games_to_track
        if full_window and self.epoch_num >= args.save_best_after and self.mean_rewards > self.last_mean_rewards:
            self.last_mean_rewards, self.best_epoch = self.mean_rewards, self.epoch_num
            state = self.best_state = self.get_full_state_weights()
        periodic = bool(args.save_frequency) and self.epoch_num % args.save_frequency == 0
        # A run with epochs of milliseconds may find a new best in each: it waits in memory, at most five seconds, and always goes to
        # disk before a file that knows of it.
        if periodic or overdue or time.monotonic() - self.last_best_save > 5.0:
            self.save_best()
        if periodic:
            self.save(f"epoch_{self.epoch_num}.pth", state)
            if args.keep_last and RANK == 0:
                for name in periodic_names(os.listdir(self.nn_dir))[:-args.keep_last]:
                    with contextlib.suppress(OSError):
                        os.remove(os.path.join(self.nn_dir, name))
        elif overdue:
            self.save("last.pth")

    def save_best(self) -> None:
        if self.best_state is not None and self.save("best.pth", self.best_state):
            self.best_state, self.last_best_save = None, time.monotonic()

    def save(self, name: str, state: Optional[Dict[str, Any]] = None, final: bool = False) -> bool:
        """Save, or say why not: while training goes on there is a next time, at the end there is none. For all processes to call."""
        path, state = os.path.join(self.nn_dir, name), state or self.get_full_state_weights()
        if RANK != 0:
            return True
        with contextlib.suppress(Exception):  # a writer that fails is reported where it writes
            self.writer.flush()  # the curve on disk is never behind the checkpoint
        try:
            save_checkpoint(state, path)
            self.last_save, self.warned_save = time.monotonic(), False
        except OSError as exc:
            if final:
                raise TrainingError(f"{path} cannot be written ({exc.strerror or exc}): the weights of epoch {self.epoch_num} are not on disk")
            if not self.warned_save:
                warn(f"{path} cannot be written ({exc.strerror or exc}); training goes on, the next save will try again")
            self.warned_save = True
        return not self.warned_save

    @torch.no_grad()
    def get_full_state_weights(self, gather: bool = True) -> Dict[str, Any]:
        """Everything that the run is, copied, as plain tensors, numbers, strings, lists and dicts. For all processes to call."""
        own = plain({  # what each process has for itself
            "env_state": self.env.get_env_state() if hasattr(self.env, "get_env_state") else None, "obs": self.obs, "dones": self.dones,
            "running": self.episodes.running, "finished": self.episodes.finished.state_dict(), "rng": get_rng_state(self.device),
        })
        everyones: List[Any] = [None] * WORLD_SIZE
        if WORLD_SIZE > 1 and gather:
            together(dist.gather_object, own, everyones if RANK == 0 else None)
        optimizer = self.optimizer.state_dict()
        optimizer["param_groups"] = [{**group, "lr": float(self.lr), "fused": None} for group in optimizer["param_groups"]]  # as rl_games has it
        return {**plain({
            "model": dict(self.model.state_dict()), "optimizer": optimizer, "epoch": self.epoch_num, "frame": self.frame,
            "last_mean_rewards": self.last_mean_rewards,  # rl_games' keys are these and, in own, env_state
            "format_version": FORMAT_VERSION, "num_obs": self.env.num_obs, "num_acts": self.env.num_acts,
            "clip_obs": float(getattr(self.env, "clip_obs", math.inf)), "lr": self.lr, "best_epoch": self.best_epoch,
            "total_time": self.total_time, "wandb_run_id": self.config["wandb_run_id"], "observers": self.algo_observer.state_dict(),
        }), **own, "args": self.args_dict, "other_processes": everyones[1:]}

    def set_full_state_weights(self, state: Dict[str, Any]) -> bool:
        """Continue from `state`. True if exactly, False if the env had to start new episodes."""
        others = state.get("other_processes", [])
        if RANK > 0:
            state = {**state, **(others[RANK - 1] if RANK <= len(others) else new_episodes())}
        self.model.load_state_dict(state["model"])
        ours = {"lr": self.lr, "fused": True, "foreach": None, "capturable": False}  # how a step is computed, not what it computes
        groups = [{**group, **ours} for group in state["optimizer"]["param_groups"]]
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        if state["args"].get("learning_rate") in (None, self.args.learning_rate):  # else the user gave a new one: it wins
            self.lr.fill_(float(state["lr"]))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.epoch_num, self.frame, self.total_time = state["epoch"], state["frame"], state["total_time"]
        self.last_mean_rewards, self.best_epoch = state["last_mean_rewards"], state["best_epoch"]
        self.episodes.finished.load_state_dict(state["finished"])
        self.algo_observer.load_state_dict(state["observers"])
        whole = getattr(self.env, "exact_state", False)  # else env_state is what fits any number of envs, as an Isaac Gym task's curriculum
        exact = whole and state["obs"].shape == self.obs.shape
        if state["env_state"] is not None and hasattr(self.env, "set_env_state") and (exact or not whole):
            self.env.set_env_state(state["env_state"])
        if exact:
            self.obs, self.dones = state["obs"].to(self.device), state["dones"].to(self.device)
            self.episodes.running.copy_(state["running"])
            set_rng_state(state["rng"], self.device)
        if len(others) + 1 != WORLD_SIZE:
            log(f"number of processes: saved by {len(others) + 1}, continued by {WORLD_SIZE}; one without a saved state starts new episodes")
        return exact and len(others) + 1 == WORLD_SIZE


# ======================================================================================================================
# 8  PLAY, EXPORT
# ======================================================================================================================


@torch.no_grad()
def play(args: Args, env, path: str, state: Dict[str, Any]) -> Dict[str, float]:
    """Evaluate a checkpoint: mean, std, min and max return of the same number of episodes from every env.

    A quota per env, because taking the first episodes to finish, from whichever env, would favour the short ones.
    """
    device = pick_device(args.device)
    model = make_model(args, env.num_obs, env.num_acts, state).to(device)
    quota = math.ceil((args.games or env.num_envs) / env.num_envs)
    returns = torch.zeros(quota + 1, env.num_envs, device=device)  # row: episode of that env; the last row takes what comes after
    lengths, episode = torch.zeros_like(returns), torch.zeros(env.num_envs, dtype=torch.long, device=device)
    envs = torch.arange(env.num_envs, device=device)
    obs = env.reset()["obs"].to(device)
    if args.capture_video:
        folder = os.path.dirname(path)
        folder = os.path.dirname(folder) if os.path.basename(folder) == "nn" else folder  # the run's
        env.start(os.path.join(folder, "videos", f"play_epoch_{state['epoch']}.gif"))
    while int(episode.min()) < quota:
        noise = torch.randn(env.num_envs, env.num_acts, device=device) * args.stochastic
        action = model.act(obs, noise)[0]
        obs, reward, done, _ = env.step(action.clamp(-1.0, 1.0) if args.clip_actions else action)
        obs = obs["obs"].to(device)
        returns[episode, envs] += reward
        lengths[episode, envs] += 1
        episode = (episode + done.long()).clamp(max=quota)
    returns, lengths = returns[:quota].flatten(), lengths[:quota].flatten()
    if args.capture_video:
        env.write()
    result = {"mean": returns.mean().item(), "std": returns.std(unbiased=False).item(), "min": returns.min().item(), "max": returns.max().item(),
              "length": lengths.mean().item(), "count": len(returns)}
    log("reward mean {mean:.2f} std {std:.2f} min {min:.2f} max {max:.2f}, mean length {length:.1f}, {count} episodes".format(**result)
        + f" ({quota} from each of {env.num_envs} envs, {'sampled' if args.stochastic else 'deterministic'} actions)")
    return result


class ExportedPolicy(nn.Module):
    """What a robot runs: raw observations (n, O) -> deterministic actions (n, A), as in training with the env's own clipping of both."""

    def __init__(self, model: ActorCritic, clip_obs: Optional[float], clip_actions: bool):
        super().__init__()
        self.model, self.clip_obs, self.clip_actions = model, clip_obs, clip_actions

    def forward(self, obs: Tensor) -> Tensor:
        if self.clip_obs is not None:
            obs = obs.clamp(-self.clip_obs, self.clip_obs)
        mu = self.model(self.model.norm_obs(obs))[0]
        return mu.clamp(-1.0, 1.0) if self.clip_actions else mu


def export_policy(args: Args, path: str, state: Dict[str, Any]) -> Dict[str, Any]:
    """Write policy.onnx, policy.pt and policy.json, and run both files against the checkpoint: none stays if they differ from it.

    TorchScript, though torch now advises torch.export: it is the one format that LibTorch 2.4 and 2.13 both load without a compiler.
    """
    if os.path.isdir(args.export) and os.listdir(args.export) or os.path.isfile(args.export):
        raise UserError(f"--export {args.export} exists already: give a new folder")
    model = make_model(args, state["num_obs"], state["num_acts"], state).eval()
    clip_obs = state.get("clip_obs") if state.get("clip_obs") != math.inf else None
    policy = ExportedPolicy(model, clip_obs, args.clip_actions)
    torch.manual_seed(0)
    obs = torch.randn(1000, state["num_obs"]) * 10.0 ** torch.randint(-3, 7, (1000, 1))
    obs[0], obs[1], obs[2] = 0.0, 3e38, -3e38
    with torch.no_grad():
        expected = policy(obs)
    temporary = f"{os.path.normpath(args.export)}.{os.getpid()}.tmp"
    try:
        os.makedirs(temporary)
        files = {name: os.path.join(temporary, name) for name in ("policy.pt", "policy.onnx", "policy.json")}
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of both ways out being called legacy
            torch.jit.trace(policy, obs[:2]).save(files["policy.pt"])
            outputs = {"policy.pt": [torch.jit.load(files["policy.pt"])(x) for x in (obs, obs[:1])]}
            try:
                import onnx  # noqa: F401
                import onnxruntime
            except ImportError as exc:
                warn(f"policy.onnx is not written, {exc.name} is missing: pip install onnx onnxruntime")
            else:
                torch.onnx.export(policy, (obs[:2],), files["policy.onnx"], input_names=["obs"], output_names=["action"], opset_version=17,
                                  dynamic_axes={"obs": {0: "batch"}, "action": {0: "batch"}}, dynamo=False)
                session = onnxruntime.InferenceSession(files["policy.onnx"], providers=["CPUExecutionProvider"])
                outputs["policy.onnx"] = [torch.from_numpy(session.run(None, {"obs": x.numpy()})[0]) for x in (obs, obs[:1])]
        differences = {name: max(float((y - expected[:len(y)]).abs().max()) for y in ys) for name, ys in outputs.items()}
        if not all(difference <= 1e-5 for difference in differences.values()):
            raise TrainingError(f"the exported policy differs from {path} by {differences}: nothing was written")
        about = {
            "format_version": 1, "env_id": args.env_id, "checkpoint": os.path.abspath(path), "epoch": state["epoch"],
            "mean_reward": state["last_mean_rewards"] if math.isfinite(state["last_mean_rewards"]) else None,
            "input": {"name": "obs", "dtype": "float32", "shape": f"(batch, {state['num_obs']})", "size": state["num_obs"], "clip": clip_obs,
                      "meaning": "raw observations: clipping and normalisation are inside"},
            "output": {"name": "action", "dtype": "float32", "shape": f"(batch, {state['num_acts']})", "size": state["num_acts"],
                       "clip": 1.0 if args.clip_actions else None,
                       "meaning": "normalised mean action: the task's own action scale is not applied"},
            "largest_difference": differences,
        }
        with open(files["policy.json"], "w") as file:
            json.dump(about, file, indent=2)
        os.replace(temporary, args.export)
    except OSError as exc:
        raise UserError(f"--export {args.export} cannot be written: {exc.strerror or exc}")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if clip_obs is None:
        log("no clipping of observations: the checkpoint does not say whether the env clips them (IsaacGymEnvs: clipObservations)")
    log(f"exported {path}, epoch {state['epoch']}, to {args.export}: largest difference to it "
        + ", ".join(f"{difference:.1e} ({name})" for name, difference in differences.items()) + f" on {len(obs)} observations")
    return about


# ======================================================================================================================
# 9  RUNNER
# ======================================================================================================================


def seed_everything(args: Args) -> None:
    seed = args.seed + RANK
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # the CPU's and every GPU's
    if args.torch_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def make_run_dir(args: Args) -> str:
    """A new folder <train_dir>/<experiment>, with _2, _3 ... appended if the name is taken."""
    name = args.experiment or f"{re.sub(r'[^A-Za-z0-9_-]+', '_', args.env_id)}_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    if os.path.basename(name) != name:
        raise UserError(f"--experiment {name} must be a plain name; --train-dir says in which folder")
    if os.path.exists(args.train_dir) and not os.path.isdir(args.train_dir):
        raise UserError(f"--train-dir {args.train_dir} is not a folder")
    for suffix in range(1, 10**6):
        run_dir = os.path.join(args.train_dir, name if suffix == 1 else f"{name}_{suffix}")
        try:
            os.makedirs(args.train_dir, exist_ok=True)
            os.mkdir(run_dir)  # atomic: of two processes one gets the name
            os.mkdir(os.path.join(run_dir, "nn"))
            return run_dir
        except FileExistsError:
            continue
        except OSError as exc:
            raise UserError(f"{run_dir} cannot be made: {exc.strerror or exc}")
    raise UserError(f"no free name for {name} in {args.train_dir}")


def describe_run(args: Args, run_dir: str, origin: Dict[str, Any]) -> Dict[str, Any]:
    """What config.json says: all that is needed to run it again."""

    def git(*command: str) -> str:
        command = ("git", "-C", os.path.dirname(os.path.abspath(__file__)), *command)
        try:
            return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=10).stdout.decode().strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    device = pick_device(args.device)
    return {
        "experiment": os.path.basename(run_dir), **origin, "args": asdict(args), "command": shlex.join([sys.executable, *sys.argv]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda, "numpy": np.__version__},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        "git_commit": git("rev-parse", "HEAD"), "git_dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
    }


def open_run_dir(args: Args, path: str, state: Optional[Dict[str, Any]]) -> Tuple[Any, str, bool, Dict[str, str]]:
    """-> lock, the folder to train in, whether the checkpoint's run goes on in it, and for config.json where a new one comes from.

    Only the newest file of a run folder goes on in that folder; from an older one, or under a new name, a new run branches off, so that
    neither a better best.pth nor later epochs are ever overwritten.
    """
    home = os.path.dirname(os.path.dirname(os.path.abspath(path)))
    is_newest = lambda: find_checkpoint(home, quiet=True)[1]["epoch"] <= state["epoch"]  # noqa: E731
    if (args.checkpoint and args.experiment == state["args"].get("experiment") and os.path.exists(os.path.join(home, "config.json"))
            and (os.path.isdir(args.checkpoint) or is_newest())):
        run_dir = os.path.relpath(home)
        lock = claim_run_dir(run_dir)
        if not is_newest():
            raise UserError(f"{run_dir} was trained by another process until now: start again")
        Writer.rewind(os.path.join(run_dir, "summaries"), state["epoch"])
        return lock, run_dir, True, {}
    origin = {} if state is None else {"branched_from" if args.checkpoint else "initialised_from": f"{path} (epoch {state['epoch']})"}
    run_dir = make_run_dir(args)
    lock = claim_run_dir(run_dir)
    try:
        with open(os.path.join(run_dir, "config.json"), "w") as file:
            json.dump(describe_run(args, run_dir, origin), file, indent=2)
    except OSError as exc:
        raise UserError(f"{run_dir} cannot be written: {exc.strerror or exc}")
    return lock, run_dir, False, origin


class Runner:
    """Runs what `args` say - train, continue or play - with the given observer. `.run()` returns a dict of results."""

    def __init__(self, args: Args, algo_observer: Optional[AlgoObserver] = None):
        self.args, self.algo_observer = args, algo_observer or RLGPUAlgoObserver()
        if not isinstance(self.algo_observer, MultiObserver):  # it is the one that keeps a failing observer from ending the run
            self.algo_observer = MultiObserver([self.algo_observer])
        self.algo_observer.strict = args.strict_observers

    def run(self) -> Dict[str, Any]:
        args = self.args
        args.check()
        if args.torch_threads:
            torch.set_num_threads(args.torch_threads)
        path, state = find_checkpoint(args.checkpoint or args.init_from) if args.checkpoint or args.init_from else ("", None)
        if args.export:
            return export_policy(args, path, state)
        if state is not None and args.checkpoint and not args.play and state["epoch"] >= args.max_epochs:
            log(f"{args.checkpoint} is complete: {state['epoch']} of {args.max_epochs} epochs. To train longer give a larger --max-epochs")
            return {"epoch": state["epoch"], "best": state["last_mean_rewards"], "stop_signal": 0}
        if WORLD_SIZE > 1:
            device = pick_device(args.device)
            if device.type == "cuda":
                torch.cuda.set_device(device)
            together(dist.init_process_group, "nccl" if device.type == "cuda" else "gloo")
            if RANK > 0:
                self.algo_observer = MultiObserver([])
        if pick_device(args.device).type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32, as in rl_games
        seed_everything(args)
        env = make_env(replace(args, seed=args.seed + RANK))
        env = RecordVideo(env, args) if args.capture_video else env
        seed_everything(args)  # making an env may draw any number of random numbers
        try:
            return play(args, env, path, state) if args.play else self.train(env, path, state)
        finally:
            if hasattr(env, "close"):
                env.close()
            if WORLD_SIZE > 1 and dist.get_backend() == "nccl":  # gloo's needs no farewell, and torch 2.4 sometimes hung in it
                dist.destroy_process_group()

    def train(self, env, path: str, state: Optional[Dict[str, Any]]) -> Dict[str, Any]:
        args = self.args
        if state is not None:
            make_model(args, env.num_obs, env.num_acts, state)  # if the weights do not fit, say so before anything is written
            seed_everything(args)
        lock, *opened = open_run_dir(args, path, state) if RANK == 0 else [None] * 4
        if WORLD_SIZE > 1:
            together(dist.broadcast_object_list, opened, 0)
        run_dir, continues, origin = opened

        run_id = os.environ.get("WANDB_RUN_ID") or (state["wandb_run_id"] if continues else uuid.uuid4().hex[:8])
        config = {**asdict(args), **{theirs: getattr(args, ours) for theirs, ours in RL_GAMES_NAMES.items()}, **origin,
                  "name": os.path.basename(run_dir), "run_dir": run_dir, "wandb_run_id": run_id}
        self.algo_observer.before_init("train_ppo", config, config["name"])
        writer = Writer(os.path.join(run_dir, "summaries"), purge_step=state["frame"] + 1 if continues else None) if RANK == 0 else None
        agent = PPOAgent(args, env, self.algo_observer, writer, config)
        what = f"training {args.env_id} on {agent.device}"
        if args.checkpoint:
            exact = agent.set_full_state_weights(state)
            what = (f"{'continuing' if continues else 'branching off'} {path} at epoch {state['epoch']}, frame {state['frame']:,}, learning rate "
                    f"{float(agent.lr):.1e}, best {state['last_mean_rewards']:.2f}; "
                    + ("exactly where it stopped" if exact else "the env cannot be restored: it starts new episodes"))
            if "rng" not in state:
                what += "\nfrom rl_games: weights, normalisers, Adam and best reward are taken over; the window of episodes starts empty"
        elif state is not None:
            agent.model.load_state_dict(state["model"])
            what += f" from the weights of {path}"
        batch = args.num_envs * args.num_steps
        log(f"{what}\n{f'{WORLD_SIZE} processes x ' if WORLD_SIZE > 1 else ''}{args.num_envs} envs x {args.num_steps} steps, "
            f"{args.update_epochs} passes of {batch // agent.minibatch_size} minibatches of {agent.minibatch_size}; writing to {run_dir}")

        def stop(signum, _frame):
            agent.stop_signal = signum
            signal.signal(signum, signal.SIG_DFL)  # a second one ends it at once
            with contextlib.suppress(RuntimeError):  # it came amid a print, which cannot be entered twice
                log(f"{signal.Signals(signum).name}: finishing this epoch, then saving last.pth")

        handlers = {}
        with contextlib.suppress(ValueError):  # not in the main thread: whoever runs us handles signals
            handlers = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            try:
                agent.train()
            finally:
                agent.save_best()
            agent.save("last.pth", final=True)
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
            self.algo_observer.close()
            with contextlib.suppress(Exception):
                writer.close()
            lock and lock.close()
        self.report(agent, run_dir)
        return {"run_dir": run_dir, "epoch": agent.epoch_num, "mean_reward": agent.mean_rewards, "best": agent.last_mean_rewards,
                "stop_signal": agent.stop_signal}

    def report(self, agent: PPOAgent, run_dir: str) -> None:
        script = f"python {os.path.relpath(__file__)}"
        best = os.path.join(agent.nn_dir, "best.pth")
        best = best if os.path.exists(best) else os.path.join(agent.nn_dir, "last.pth")  # of an older run than this one
        reward = f"mean reward {agent.mean_rewards:.2f} over the last {agent.games:.0f} episodes" if agent.games else "no episode finished"
        log(f"\nstopped after epoch {agent.epoch_num} ({agent.stop_reason}), {reward}")
        if agent.best_epoch:
            log(f"best      {agent.last_mean_rewards:.2f} at epoch {agent.best_epoch}")
        again = script if WORLD_SIZE == 1 else script.replace("python", f"torchrun --nproc-per-node={WORLD_SIZE}", 1)
        more = "" if agent.epoch_num < agent.args.max_epochs else f" --max-epochs {2 * agent.args.max_epochs}"
        log(f"files     {run_dir}\nplay      {script} --play --checkpoint {best}\ncontinue  {again} --checkpoint {run_dir}{more}\n"
            f"curves    tensorboard --logdir {os.path.join(run_dir, 'summaries')}")


def parse_args(argv: Optional[List[str]] = None) -> Args:
    """Args from flags (sys.argv by default); what no flag gives comes from the checkpoint, else the task's yaml, else the defaults.

    The flags are parsed twice: first to learn which checkpoint or task is meant, then over the values found there.
    """
    parse = functools.partial(tyro.cli, Args, args=argv, description=__doc__.splitlines()[0])
    first, saved, settings = parse(default=Args()), {}, {}
    if first.checkpoint or first.init_from:
        _, state = find_checkpoint(first.checkpoint or first.init_from, quiet=True)  # the Runner says what was skipped
        # what a run was started for is not part of what it is
        known = {f.name for f in fields(Args)} - {"checkpoint", "init_from", "play", "games", "stochastic", "export", "device"}
        if first.play:
            known.remove("capture_video")
        if first.init_from:
            known = {"units", "activation", "separate", "normalize_input", "normalize_value"}
        saved = {k: tuple(v) if isinstance(v, list) else v for k, v in state["args"].items() if k in known}
    if "env_id" not in saved and not first.export and uses_isaacgym(first):
        from omegaconf import OmegaConf

        cfg = compose_isaacgym_config(first)
        settings = settings_from_yaml(OmegaConf.to_container(cfg.train, resolve=True)["params"], first.env_id)
    return parse(default=Args(**{**settings, **saved}))


def main(argv: Optional[List[str]] = None) -> None:
    try:
        args = parse_args(argv)
        observers: List[AlgoObserver] = [RLGPUAlgoObserver()]
        # your own observers go here
        if args.track:
            observers.append(WandbAlgoObserver(args))  # last: it sends what the others wrote
        result = Runner(args, MultiObserver(observers)).run()
    except (UserError, TrainingError) as exc:
        if RANK == 0 or isinstance(exc, TrainingError):
            print(f"error: {exc}", file=sys.stderr)
        sys.exit(2 if isinstance(exc, UserError) else 1)
    except KeyboardInterrupt:  # before or after training, which handles it by itself, or amid --play
        sys.exit(128 + signal.SIGINT)
    if result.get("stop_signal"):
        sys.exit(128 + result["stop_signal"])


if __name__ == "__main__":
    main()
