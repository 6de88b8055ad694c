"""PPO for Isaac Gym in one file: train, log, save, continue, play.

    python train_ppo.py                                 train the built-in Cartpole, on any machine
    python train_ppo.py --env-id Ant --track            an IsaacGymEnvs task, logged to W&B too
    python train_ppo.py --env-id my_module:make_env     your own batched environment
    python train_ppo.py --checkpoint runs/NAME          continue a run where it stopped
    python train_ppo.py --play --checkpoint runs/NAME   evaluate its policy
    torchrun --nproc-per-node=2 train_ppo.py            train on two GPUs

It computes what rl_games 1.6.1 computes, update after update (benchmarks/fidelity.py). Read it from
the top: `PPOAgent.train` is the outline of the algorithm, and there you may stop. The sections:

    ARGUMENTS      Args
    NETWORK        RunningMeanStd, ActorCritic; put another network here
    PPO            rollout, gae, make_batch, ppo_loss, update; PPOAgent with the loop
    ENVIRONMENTS   Cartpole in plain torch, Isaac Gym, module:factory
    METRICS        what is measured, and its way to the console, TensorBoard and W&B
    CHECKPOINTS    what they hold, when they are written, how they are read
    RUNNER         evaluation, run folder, stop signals, command line

Shapes: T = num_steps, E = num_envs, N = T * E, O = num_obs, A = num_acts; S = num_states, which is
0 unless the environment has privileged states for the critic.
"""

import collections
import contextlib
import ctypes
import errno
import functools
import glob
import importlib.util
import inspect
import io
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import typing
import urllib.request
import zipfile
from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from typing import Any, Callable, Dict, List, Literal, NamedTuple, Optional, Sequence, Tuple

import numpy as np

# isaacgym refuses to be imported after torch, so it comes first.
ISAACGYM_ERROR: Optional[str] = "it is not installed"  # None once it is imported
if importlib.util.find_spec("isaacgym") is not None:
    vars(np).setdefault("float", float)  # isaacgym.torch_utils uses np.float, gone since numpy 1.24
    try:
        import isaacgym  # noqa: F401

        ISAACGYM_ERROR = None
    except Exception as exc:
        ISAACGYM_ERROR = f"importing it failed: {exc}"

import torch
import torch.distributed as dist
import tyro
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

__version__ = "1.0.0"

# Several GPUs: torchrun starts WORLD_SIZE processes, numbered by RANK, each with environments and
# a seed of its own. All start from rank 0's weights and `average` gradients, KL divergence,
# statistics and figures, so all take the same decisions. Rank 0 alone prints, logs and saves.
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


# ARGUMENTS ========================================================================================
# Where a value comes from, highest first: a flag; the checkpoint that is continued or played; the
# task's own settings (<Task>PPO.yaml of IsaacGymEnvs, SETTINGS of your module); the default below.
#
# The names are CleanRL's, and `rl_games:` says what a <Task>PPO.yaml calls the same thing. Defaults
# are those of CartpolePPO.yaml, but for value_bootstrap, which that file leaves off.


@dataclass
class Run:
    env_id: str = "Cartpole"  # Cartpole, an IsaacGymEnvs task such as Ant, or module:factory
    sim: Literal["auto", "isaacgym", "torch"] = "auto"  # auto: isaacgym if installed
    num_envs: int = 512  # parallel environments in each process (rl_games: num_actors)
    seed: int = 42  # of Python, numpy and torch; each process adds its rank
    torch_deterministic: bool = False  # use deterministic torch kernels only (slower on a GPU)
    device: str = "auto"  # where simulation and policy run: auto, cpu, cuda, cuda:1
    torch_threads: int = 1  # CPU threads; 1 is safe beside other processes, 0 is torch's choice
    headless: bool = True  # Isaac Gym without its viewer window

    experiment: str = ""  # name of the run's folder, made unique; empty: <env_id>_<date>_<time>
    train_dir: str = "runs"  # folder of all runs
    checkpoint: str = ""  # a run folder continues there, a .pth file starts a new run from there
    init_from: str = ""  # like --checkpoint, but only the weights: a new run from epoch 1
    resume: bool = False  # continue --experiment if that folder has a checkpoint, else start it
    max_epochs: int = 100  # rollouts and updates in all, earlier parts of the run included
    save_frequency: int = 25  # epochs between the periodic checkpoints; 0: none
    save_best_after: int = 50  # first epoch that may write best.pth
    best_metric: str = ""  # what best.pth goes by, such as Episode/success; empty: the mean reward
    games_to_track: int = 100  # finished episodes in the window of the mean reward
    strict_observers: bool = False  # an observer that raises ends training, for debugging it


@dataclass
class Play:
    play: bool = False  # run the policy of --checkpoint instead of training; writes nothing
    json: str = ""  # a file in which --play writes its results


@dataclass
class WandB:
    track: bool = False  # log to Weights & Biases too; WANDB_MODE, WANDB_TAGS ... are obeyed
    wandb_project_name: str = "train_ppo"  # W&B project
    wandb_entity: str = ""  # W&B team or user; empty: your default


@dataclass
class PPO:
    num_steps: int = 16  # steps of each environment in a rollout (rl_games: horizon_length)
    minibatch_size: int = 8192  # samples in a gradient step; a smaller rollout is one minibatch
    update_epochs: int = 8  # passes over each rollout (rl_games: mini_epochs)
    learning_rate: float = 3e-4  # Adam's learning rate at the start
    lr_schedule: Literal["adaptive", "linear", "fixed"] = "adaptive"  # adaptive: rate follows KL
    schedule_type: Literal["legacy", "standard"] = "legacy"  # adapt after a minibatch, or a pass
    kl_threshold: float = 0.008  # KL divergence that the adaptive schedule aims at
    max_lr: float = 1e-2  # highest learning rate of the adaptive schedule
    min_lr: float = 1e-6  # lowest learning rate of the adaptive schedule
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of generalised advantage estimation (rl_games: tau)
    clip_coef: float = 0.2  # clip range of the probability ratio and the value (rl_games: e_clip)
    clip_vloss: bool = True  # clip the value loss (rl_games: clip_value)
    vf_coef: float = 4.0  # weight of half the squared value error (rl_games: critic_coef)
    ent_coef: float = 0.0  # weight of the entropy bonus (rl_games: entropy_coef)
    bounds_loss_coef: float = 1e-4  # weight of the loss on mean actions outside [-1.1, 1.1]
    max_grad_norm: float = 1.0  # gradient norm to clip at; 0: do not clip (rl_games: grad_norm)
    norm_adv: bool = True  # normalise advantages (rl_games: normalize_advantage)
    normalize_input: bool = True  # normalise observations with running statistics
    normalize_value: bool = True  # normalise returns with running statistics
    value_bootstrap: bool = True  # at a time limit, add gamma * V(s_t) to the reward
    reward_scale: float = 0.1  # multiplies rewards before learning (rl_games: scale_value)
    clip_actions: bool = True  # clip actions to [-1, 1] on their way to the environment
    mixed_precision: bool = False  # bfloat16 autocast in the update; on CUDA only
    compile: bool = False  # torch.compile policy, loss and Cartpole; CUDA graphs on CUDA


@dataclass
class Network:
    units: Tuple[int, ...] = (32, 32)  # widths of the hidden layers
    activation: Literal["elu", "relu", "tanh", "selu", "gelu", "swish"] = "elu"  # of hidden layers
    separate: bool = False  # give the value function hidden layers of its own
    critic_units: Tuple[int, ...] = ()  # widths of the critic's own layers; empty: as --units
    sigma_init: float = 0.0  # log standard deviation of the actions at the start


@dataclass
class Args(Network, PPO, WandB, Play, Run):
    """All of them, flat: args.gamma. --help shows a box for each of the classes, the last first."""


# NETWORK ==========================================================================================
# Parameters have rl_games' names and order, so a checkpoint, optimizer state included, can move
# between the two. For a CNN or a transformer change ActorCritic: observations stay flat (O,), and
# `forward` may reshape them. An LSTM also needs its state in `act`, `rollout`, `play` and `Batch`,
# reset at each done, and minibatches of whole sequences.


class RunningMeanStd(nn.Module):
    """Mean and variance of all that was seen, in float64. It starts with count 1, mean 0, var 1."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("running_var", torch.ones(size, dtype=torch.float64))
        self.register_buffer("count", torch.ones((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take in a batch x (n, size) by its moments (Chan et al. 1979, parallel variance)."""
        n = len(x) * WORLD_SIZE
        mean, var = mean_and_var(x)
        total = self.count + n
        delta = mean - self.running_mean
        squares = self.running_var * self.count + var * n + delta.square() * self.count * n / total
        self.running_mean += delta * n / total
        self.running_var.copy_(squares / total)
        self.count.copy_(total)

    def forward(self, x: Tensor) -> Tensor:
        std = (self.running_var.float() + 1e-5).sqrt()
        # The clamp keeps one broken sensor from saturating the network.
        return ((x - self.running_mean.float()) / std).clamp(-5.0, 5.0)

    def denormalize(self, x: Tensor) -> Tensor:
        std = (self.running_var.float() + 1e-5).sqrt()
        return x.clamp(-5.0, 5.0) * std + self.running_mean.float()


class Linear(nn.Linear):
    """nn.Linear whose weights are transposed in memory first. Autograd then computes their gradient
    as x^T g, for few observations seven times faster than g^T x on a CPU, where MKL does it."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return super().forward(x)
        return torch.addmm(self.bias, x, self.weight.t().contiguous())


class ActorCritic(nn.Module):
    """Gaussian policy and value function on an MLP (rl_games: continuous_a2c_logstd). The standard
    deviation is the same in every state: one learned logarithm for each action.

    An environment may have S = num_states numbers for the critic that the actor must do without,
    such as friction. They follow the observation in its row, obs (n, O + S), and the critic then
    has layers of its own and sees them alone."""

    ACTIVATIONS = dict(relu=nn.ReLU, tanh=nn.Tanh, selu=nn.SELU, gelu=nn.GELU, swish=nn.SiLU)
    ACTIVATIONS["elu"] = functools.partial(nn.ELU, inplace=True)  # so its gradient needs no exp

    def __init__(self, num_obs: int, num_acts: int, args: Args, num_states: int = 0):
        super().__init__()
        self.num_obs = num_obs
        self.num_states = num_states
        self.separate = args.separate or num_states > 0
        self.a2c_network = net = nn.Module()
        net.sigma = nn.Parameter(torch.full((num_acts,), args.sigma_init))  # a logarithm, in fact
        net.actor_mlp, width = self.mlp(num_obs, args.units, args)
        critic_width = width
        if self.separate:
            units = args.critic_units or args.units
            net.critic_mlp, critic_width = self.mlp(num_states or num_obs, units, args)
        net.value = nn.Linear(critic_width, 1)
        net.mu = nn.Linear(width, num_acts)
        for module in self.modules():
            if isinstance(module, nn.Linear):  # as in rl_games: torch's weights, zero biases
                nn.init.zeros_(module.bias)
        normalizer = RunningMeanStd if args.normalize_input else nn.Identity
        self.running_mean_std = normalizer(num_obs)
        self.value_mean_std = RunningMeanStd(1) if args.normalize_value else None
        if num_states:
            self.state_mean_std = normalizer(num_states)

    def mlp(self, size: int, units: Sequence[int], args: Args) -> Tuple[nn.Sequential, int]:
        """Hidden layers for an input of this size, and the size of their output."""
        layers: List[nn.Module] = []
        for width in units:
            layers += [Linear(size, width), self.ACTIVATIONS[args.activation]()]
            size = width
        return nn.Sequential(*layers), size

    def forward(self, obs: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Observations (n, O + S) -> mean action (n, A), log std (n, A), normalised value (n,)."""
        net = self.a2c_network
        own = self.running_mean_std(obs[:, : self.num_obs])
        features = net.actor_mlp(own)
        mu = net.mu(features)
        if self.num_states:
            features = net.critic_mlp(self.state_mean_std(obs[:, self.num_obs :]))
        elif self.separate:
            features = net.critic_mlp(own)
        return mu, net.sigma.expand_as(mu), net.value(features).squeeze(-1)

    def mean_action(self, obs: Tensor) -> Tensor:
        """What a robot runs: observations (n, O), without states -> mean action (n, A)."""
        net = self.a2c_network
        return net.mu(net.actor_mlp(self.running_mean_std(obs[:, : self.num_obs])))

    def update_statistics(self, obs: Tensor) -> None:
        """Take observations (n, O + S) into the running statistics."""
        self.running_mean_std.update(obs[:, : self.num_obs])
        if self.num_states:
            self.state_mean_std.update(obs[:, self.num_obs :])

    @torch.no_grad()
    def act(self, obs: Tensor, noise: Tensor) -> Dict[str, Tensor]:
        """Observations (n, O + S) and normal noise (n, A) -> what a rollout keeps of a step."""
        mu, logstd, value = self(obs)
        sigma = logstd.exp()
        actions = mu + sigma * noise
        logprobs = log_prob(actions, mu, sigma, logstd)
        values = self.denorm_value(value)
        return dict(actions=actions, logprobs=logprobs, mus=mu, sigmas=sigma, values=values)

    @torch.no_grad()
    def value(self, obs: Tensor) -> Tensor:
        """Observations (n, O + S) -> value in units of the scaled reward (n,)."""
        return self.denorm_value(self(obs)[2])

    def denorm_value(self, value: Tensor) -> Tensor:
        return value if self.value_mean_std is None else self.value_mean_std.denormalize(value)


def log_prob(action: Tensor, mu: Tensor, sigma: Tensor, logstd: Tensor) -> Tensor:
    """Log density of a diagonal Gaussian, with sigma = exp(logstd): four (n, A) -> (n,)."""
    z = (action - mu) / sigma
    constant = 0.5 * math.log(2.0 * math.pi) * mu.shape[-1]
    return -(0.5 * z.square().sum(-1) + constant + logstd.sum(-1))


# PPO, with rl_games' details ======================================================================
# Schulman et al. 2017      Proximal policy optimization algorithms      arxiv.org/abs/1707.06347
# Schulman et al. 2015      Generalised advantage estimation             arxiv.org/abs/1506.02438
# Pardo et al. 2018         Time limits in reinforcement learning        arxiv.org/abs/1712.00378
# Andrychowicz et al. 2020  What matters in on-policy learning?          arxiv.org/abs/2006.05990
# Makoviychuk et al. 2021   Isaac Gym: thousands of envs on one GPU      arxiv.org/abs/2108.10470
# Rudin et al. 2021         Learning to walk in minutes                  arxiv.org/abs/2109.11978


@torch.no_grad()
def rollout(policy, env, obs: Tensor, buffer: Dict[str, Tensor], args: Args, after_step):
    """Take num_steps steps in every environment, starting from obs (E, O + S), and fill the buffer.
    `policy` is ActorCritic.act; after_step(infos, dones) is called after each step. Returns the
    observations after the last step (E, O + S) and the seconds that the environment took. It may
    overwrite the tensors that it returned, so the buffer gets copies."""
    env_seconds = 0.0
    for t in range(args.num_steps):
        decision = policy(obs, torch.randn_like(buffer["actions"][t]))
        buffer["obs"][t] = obs
        for name, value in decision.items():
            buffer[name][t] = value

        start = time.perf_counter()
        actions = decision["actions"]
        step = env.step(actions.clamp(-1.0, 1.0) if args.clip_actions else actions)
        env_seconds += time.perf_counter() - start

        obs, rewards, dones, time_outs, infos = check_step(step, env, obs.device)
        buffer["rewards"][t] = rewards
        buffer["dones"][t] = dones
        buffer["time_outs"][t] = time_outs
        after_step(infos, dones)
    return obs, env_seconds


def shape_rewards(buffer: Dict[str, Tensor], args: Args) -> Tensor:
    """The rewards that PPO learns from (T, E): scaled and, at a time limit, with gamma * V(s_t) for
    the rest of the episode (Pardo et al. 2018). V(s_t+1) would be exact, but in some tasks the next
    observation already belongs to a new episode, so this uses V(s_t), as rl_games does."""
    rewards = args.reward_scale * buffer["rewards"]
    if args.value_bootstrap:
        rewards = rewards + args.gamma * buffer["values"] * buffer["time_outs"]
    return rewards


def gae(rewards: Tensor, values: Tensor, dones: Tensor, last_value: Tensor, args: Args) -> Tensor:
    """Advantages (T, E) by generalised advantage estimation (Schulman et al. 2015, eq. 16) from
    rewards, values and dones (T, E), and the value of the state after the rollout (E,). dones[t] is
    1.0 if the episode ended with step t; a time limit's bootstrap is in the rewards already."""
    alive = 1.0 - dones
    decay = args.gamma * args.gae_lambda * alive
    next_values = torch.cat((values[1:], last_value.unsqueeze(0)))
    # First the errors of one step. Then each one takes in what follows it.
    advantages = rewards + args.gamma * next_values * alive - values
    for t in reversed(range(len(rewards) - 1)):
        advantages[t] += decay[t] * advantages[t + 1]
    return advantages


class Batch(NamedTuple):
    """A rollout as rows, or a minibatch of them."""

    obs: Tensor  # (n, O + S) as the environment gave them
    actions: Tensor  # (n, A) as sampled, before clipping
    logprobs: Tensor  # (n,) of the actions, when they were taken
    values: Tensor  # (n,) as predicted in the rollout
    returns: Tensor  # (n,) what the values should have been
    advantages: Tensor  # (n,) how much better the action was than expected
    mus: Tensor  # (n, A) mean actions at the last pass over these rows; at first, in the rollout
    sigmas: Tensor  # (n, A) and their standard deviations


def make_batch(buffer: Dict[str, Tensor], advantages: Tensor) -> Batch:
    """A rollout and its advantages (T, E) as N rows, and the returns that follow from them."""
    returns = advantages + buffer["values"]
    # Subtracting the values again looks idle, but repeats rl_games' rounding to the last bit.
    columns = {**buffer, "returns": returns, "advantages": returns - buffer["values"]}
    # (T, E, ...) -> (N, ...), one environment after the other, as rl_games has them. With thousands
    # of environments a contiguous piece is mixed enough, and nothing is shuffled.
    return Batch(*(columns[name].transpose(0, 1).flatten(0, 1) for name in Batch._fields))


def normalize_batch(model: ActorCritic, batch: Batch, args: Args) -> Batch:
    """The batch with normalised values, returns and advantages; the value statistics move."""
    values, returns, advantages = batch.values, batch.returns, batch.advantages
    if args.normalize_value:  # the values first: the returns are normalised with both taken in
        model.value_mean_std.update(values.unsqueeze(1))
        values = model.value_mean_std(values)
        model.value_mean_std.update(returns.unsqueeze(1))
        returns = model.value_mean_std(returns)
    if args.norm_adv:  # over the whole rollout; CleanRL does it in each minibatch
        mean, var = mean_and_var(advantages)
        advantages = (advantages - mean) / (var.sqrt() + 1e-8)
    return batch._replace(values=values, returns=returns, advantages=advantages)


LOSSES = ("a_loss", "c_loss", "entropy", "bounds_loss", "clipfrac")  # rl_games' names in the log


def ppo_loss(model: ActorCritic, batch: Batch, args: Args) -> Tuple[Tensor, ...]:
    """The loss to minimise (), the policy's mean actions and standard deviations (n, A), and the
    values of LOSSES with the KL divergence since the last pass over these rows (6,)."""
    mu, logstd, value = model(batch.obs)
    mu, value = mu.float(), value.float()  # bfloat16 is too coarse for ratios near 1
    sigma = logstd.exp()

    # Schulman et al. 2017, equation 7. Where the ratio has left the clip range in the direction
    # that pays, the gain is constant, so several passes cannot run off with the policy. (It is
    # torch.min of the two gains, whose gradient by torch.where takes half the time.)
    ratio = (log_prob(batch.actions, mu, sigma, logstd) - batch.logprobs).exp()
    clipped_ratio = ratio.detach().clamp(1.0 - args.clip_coef, 1.0 + args.clip_coef)
    gain, clipped_gain = batch.advantages * ratio, batch.advantages * clipped_ratio
    policy_loss = -torch.where(gain > clipped_gain, clipped_gain, gain).mean()

    # A value gains nothing by moving further than clip_coef, in normalised units, from the old one.
    # rl_games and the original code do it; Andrychowicz et al. 2020 found that it does not help.
    value_loss = (value - batch.returns).square()
    if args.clip_vloss:
        change = (value - batch.values).clamp(-args.clip_coef, args.clip_coef)
        clipped_loss = (batch.values + change - batch.returns).square()
        value_loss = torch.where(value_loss > clipped_loss, value_loss, clipped_loss)
    value_loss = value_loss.mean()

    entropy = (0.5 + 0.5 * math.log(2.0 * math.pi) + logstd).sum(-1).mean()
    # Actions are clipped to [-1, 1] on their way to the environment. A mean far outside changes
    # nothing any more, so nothing else would bring it back.
    bounds_loss = nn.functional.softshrink(mu, 1.1).square().sum(-1).mean()

    loss = policy_loss + 0.5 * args.vf_coef * value_loss
    loss = loss - args.ent_coef * entropy + args.bounds_loss_coef * bounds_loss
    clipfrac = (ratio != clipped_ratio).float().mean()
    mu, sigma = mu.detach(), sigma.detach()
    kl = policy_kl(mu, sigma, batch.mus, batch.sigmas)
    losses = torch.stack((policy_loss, value_loss, entropy, bounds_loss, clipfrac, kl))
    return loss, mu, sigma, losses.detach()


def policy_kl(mu: Tensor, sigma: Tensor, old_mu: Tensor, old_sigma: Tensor) -> Tensor:
    """Mean KL(new || old) of diagonal Gaussians, four (n, A) -> (), with rl_games' 1e-5 terms."""
    log_ratio = (old_sigma / sigma + 1e-5).log()
    distance = (sigma.square() + (mu - old_mu).square()) / (2.0 * (old_sigma.square() + 1e-5))
    return (log_ratio + distance - 0.5).sum(-1).mean()


def next_lr(lr: Tensor, kl: Tensor, epoch: int, args: Args) -> Tensor:
    """The next learning rate (). The adaptive schedule raises it if the policy moves too little and
    lowers it if it moves too much; on tensors, so nothing waits for the GPU."""
    if args.lr_schedule == "adaptive":
        lr = torch.where(kl > 2.0 * args.kl_threshold, (lr / 1.5).clamp(min=args.min_lr), lr)
        return torch.where(kl < 0.5 * args.kl_threshold, (lr * 1.5).clamp(max=args.max_lr), lr)
    if args.lr_schedule == "linear":
        left = max(0.0, 1.0 - epoch / args.max_epochs)
        return torch.full_like(lr, 1e-6 + (args.learning_rate - 1e-6) * left)
    return lr


def update(model, optimizer, lr: Tensor, batch: Batch, epoch: int, args: Args, loss_fn) -> Tensor:
    """Pass over the batch update_epochs times, with a gradient step for each minibatch; changes the
    learning rate lr () in place. Returns the mean LOSSES and KL divergence of all steps (6,)."""
    batch = normalize_batch(model, batch, args)
    minibatches = [Batch(*rows) for rows in zip(*(x.split(args.minibatch_size) for x in batch))]
    parameters = list(model.parameters())
    totals = torch.zeros(len(LOSSES) + 1, device=lr.device)
    autocast = args.mixed_precision and lr.device.type == "cuda"
    for pass_number in range(args.update_epochs):
        pass_kl = torch.zeros_like(lr)
        for minibatch in minibatches:
            # The statistics of the observations move in the first pass only, just before they are
            # used, so that later passes see inputs that stand still.
            if args.normalize_input and pass_number == 0:
                model.update_statistics(minibatch.obs)
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                loss, mu, sigma, losses = loss_fn(model, minibatch, args)
            optimizer.zero_grad()
            loss.backward()

            minibatch.mus.copy_(mu)
            minibatch.sigmas.copy_(sigma)
            kl = average_gradients(parameters, losses[-1])
            if args.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()

            totals += losses
            pass_kl += kl / len(minibatches)
            if args.schedule_type == "legacy":
                lr.copy_(next_lr(lr, kl, epoch, args))
        if args.schedule_type == "standard":
            lr.copy_(next_lr(lr, pass_kl, epoch, args))
    return totals / (args.update_epochs * len(minibatches))


class PPOAgent:
    """A training run: model, optimizer, rollout buffer and counters. `train` is the outline of PPO.
    Observers may read all of it; what rl_games has too bears its name."""

    def __init__(self, args: Args, env, observer: "MultiObserver"):
        self.args = args
        self.env = env
        self.algo_observer = observer
        self.device = self.ppo_device = pick_device(args.device)
        self.games_to_track = args.games_to_track
        self.num_agents = 1
        self.epoch_num = 0
        self.frame = 0  # steps of single environments so far, over all processes
        self.frames_per_epoch = args.num_steps * env.num_envs * WORLD_SIZE
        self.total_time = 0.0  # seconds of training
        self.mean_rewards = -math.inf  # of the last games_to_track episodes
        self.last_mean_rewards = -math.inf  # the best score so far, by rl_games' name for it
        self.best_epoch = 0
        self.stop_signal = 0  # the number of the signal that asked to stop after this epoch

        self.num_states = int(getattr(env, "num_states", None) or 0)
        self.max_episode_length = int(getattr(env, "max_episode_length", None) or 0)  # 0: unknown
        self.model = ActorCritic(env.num_obs, env.num_acts, args, self.num_states).to(self.device)
        if WORLD_SIZE > 1:
            for tensor in self.model.state_dict().values():
                together(dist.broadcast, tensor, 0)
        # The learning rate is a tensor, which the fused optimizer reads without waiting for a GPU.
        self.lr = torch.tensor(args.learning_rate, device=self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.lr, eps=1e-8, fused=True)
        self.act, self.loss_fn = self.model.act, ppo_loss
        if args.compile:
            self.act, self.loss_fn = compiled([self.act, self.loss_fn], env, self.device)

        # Thousands of environments and few steps fill a rollout in a fraction of the time that one
        # environment needs (Rudin et al. 2021); the value function stands for what comes after.
        acts = (env.num_acts,)
        shapes = dict(obs=(env.num_obs + self.num_states,), actions=acts, mus=acts, sigmas=acts)
        shapes.update(logprobs=(), values=(), rewards=(), dones=(), time_outs=())
        size = (args.num_steps, env.num_envs)
        self.buffer = {k: torch.zeros(*size, *v, device=self.device) for k, v in shapes.items()}
        # Sums over episodes: return, shaped return and length.
        self.episodes = EpisodeMeter(env.num_envs, args.games_to_track, 3, self.device)
        self.obs = check_obs(env.reset(), "reset()", env).to(self.device)
        self.dones = torch.zeros(env.num_envs, dtype=torch.bool, device=self.device)
        self.first_epoch = 0  # epoch_num when the environments last started afresh
        self.whole_epoch: Optional[int] = 0  # the last complete one; None in an update
        self.time_outs_seen = False
        self.metric_known = False  # best_metric was logged
        self.policy_metadata = policy_metadata(env)

    def train(self) -> None:
        """Train until max_epochs or a stop signal."""
        args, buffer = self.args, self.buffer
        stop = False
        while self.epoch_num < args.max_epochs and not stop:
            self.epoch_num += 1
            start = time.perf_counter()
            if hasattr(self.env, "set_train_info"):
                self.env.set_train_info(self.frame, self)
            self.obs, step_time = rollout(self.act, self.env, self.obs, buffer, args, self.on_step)
            check_finite(self)
            play_time = time.perf_counter() - start
            self.algo_observer.after_steps()

            shaped = shape_rewards(buffer, args)
            last_value = self.model.value(self.obs)
            advantages = gae(shaped, buffer["values"], buffer["dones"], last_value, args)
            batch = make_batch(buffer, advantages)
            self.whole_epoch = None
            losses = update(
                self.model, self.optimizer, self.lr, batch, self.epoch_num, args, self.loss_fn
            )
            lengths = torch.ones_like(shaped)
            self.episodes.add_rollout((buffer["rewards"], shaped, lengths), buffer["dones"])
            figures = collect_figures(self, losses, batch)
            stop = figures["stop"] > 0

            epoch_time = time.perf_counter() - start
            self.total_time += epoch_time
            self.frame += self.frames_per_epoch
            self.whole_epoch = self.epoch_num
            score = log_epoch(self, figures, step_time, play_time, epoch_time)
            save_checkpoints(self, score, figures["finished"])

    def open(self, run_dir: str, wandb_run_id: str) -> None:
        """Get ready to write into run_dir. `config` is what observers expect under this name."""
        self.config = dict(asdict(self.args), run_dir=run_dir, wandb_run_id=wandb_run_id)
        self.config["name"] = os.path.basename(run_dir)
        self.config.update({name: self.config[ours] for name, ours in RL_GAMES_NAMES.items()})
        self.nn_dir = os.path.join(run_dir, "nn")
        self.writer = Writer(run_dir, self.args) if RANK == 0 else None

    def on_step(self, infos: Dict[str, Any], dones: Tensor) -> None:
        """Hand a step of the rollout to the observers."""
        self.dones = dones
        self.time_outs_seen |= "time_outs" in infos
        # Finding the indices makes a GPU wait, so it is done only if someone looks at them.
        wanted = self.algo_observer.needs_done_indices
        self.algo_observer.process_infos(infos, dones.nonzero() if wanted else None)


def average(x: Tensor) -> Tensor:
    """The mean of x over all processes, in place. With one process it is x itself."""
    if WORLD_SIZE > 1:
        together(dist.all_reduce, x)
        x /= WORLD_SIZE
    return x


def together(collective, *args) -> None:
    """Call what all processes take part in. TrainingError if one of them is gone."""
    try:
        collective(*args)
    except RuntimeError as exc:
        raise TrainingError(f"another process has ended, so number {RANK} stops too") from exc


def mean_and_var(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and unbiased variance of the rows of x (n, ...), over the rows of all processes."""
    mean, var = x.mean(0), x.var(0)
    if WORLD_SIZE > 1:
        n, own_mean = len(x), mean
        mean = average(own_mean.clone())
        squares = average(var * (n - 1) + n * (own_mean - mean).square())
        var = squares * WORLD_SIZE / (n * WORLD_SIZE - 1)
    return mean, var


def average_gradients(parameters: Sequence[Tensor], kl: Tensor) -> Tensor:
    """Average the gradients over the processes, in one message with the KL divergence ()."""
    if WORLD_SIZE == 1:
        return kl
    gradients = [p.grad for p in parameters if p.grad is not None]
    message = average(torch.cat([kl.view(1), *(g.flatten() for g in gradients)]))
    nn.utils.vector_to_parameters(message[1:], gradients)
    return message[0]


# ENVIRONMENTS =====================================================================================
# One contract, that of IsaacGymEnvs' VecTask. Everything is batched and stays on one device:
#
#     num_envs, num_obs, num_acts   ints
#     reset()        -> {"obs": (E, O)}, and "states": (E, S) if it has num_states > 0
#     step(actions)  -> {"obs": (E, O)}, reward (E,), done (E,), infos; finished environments are
#                       reset by the env itself
#     infos          time_outs (E,): the episode was cut by the clock, not ended by the task;
#                    episode, episode_cumulative, any scalar: logged (RLGPUAlgoObserver)
#
# and, if it has them, close(), max_episode_length,
#     clip_obs                      range of its observations, for exporting the policy
#     policy_metadata()             a dict for the robot, such as action scale and joint names
#     set_train_info(frame, algo)   called before each rollout in every process: a curriculum
#     get_env_state(), set_env_state(state)   kept in checkpoints
#     exact_state = True            this and torch's generators say all: a run continues exactly
#     compilable = True             step() is torch operations alone, and --compile compiles it


class Cartpole:
    """IsaacGymEnvs' Cartpole task with its physics written out in torch, as one batch.

    State and observation: cart position [m] and velocity [m/s], pole angle from upright [rad] and
    angular velocity [rad/s]. Action: force on the cart in units of 400 N. As in the original, the
    observation that comes with done = 1 is the episode's last one; the next step ignores the
    action, resets that environment and returns its first observation. A step never waits for a GPU.
    """

    num_obs, num_acts, max_episode_length = 4, 1, 500
    clip_obs = 5.0
    exact_state = compilable = True

    def __init__(self, num_envs: int, device: torch.device):
        self.num_envs = num_envs
        self.device = device
        self.state = torch.zeros(4, num_envs, device=device)  # x, x_dot, theta, theta_dot
        self.progress = torch.zeros(num_envs, dtype=torch.long, device=device)
        self.reset_buf = torch.ones(num_envs, dtype=torch.long, device=device)
        self.reset_range = torch.tensor([[0.2], [0.5], [0.2], [0.5]], device=device)

    def reset(self) -> Dict[str, Tensor]:
        """The present observations. As in IsaacGymEnvs it is the first step that resets."""
        return {"obs": self.state.t().clamp(-self.clip_obs, self.clip_obs)}

    def step(self, actions: Tensor):
        force = 400.0 * actions[:, 0].clamp(-1.0, 1.0)
        resetting = self.reset_buf.bool()
        fresh = (torch.rand_like(self.state) - 0.5) * self.reset_range
        self.state = torch.where(resetting, fresh, self.simulate(force))
        self.progress = torch.where(resetting, 0, self.progress + 1)

        x, x_dot, theta, theta_dot = self.state
        fell = (x.abs() > 3.0) | (theta.abs() > math.pi / 2)
        reward = 1.0 - theta.square() - 0.01 * x_dot.abs() - 0.005 * theta_dot.abs()
        reward = torch.where(fell, -2.0, reward)
        late = self.progress >= self.max_episode_length - 1  # also if it fell, as in VecTask
        self.reset_buf = (fell | late).long()
        return self.reset(), reward, self.reset_buf, {"time_outs": late}

    def simulate(self, force: Tensor, dt: float = 0.0166, substeps: int = 2) -> Tensor:
        """Semi-implicit Euler on the equations of motion; a positive angle leans to negative x.

        (M + m) x'' - m l cos(th) th'' = F - m l sin(th) th'^2
        (I + m l^2) th'' - m l cos(th) x'' = m g l sin(th)"""
        cart, pole, length, gravity = 1.0, 1.0, 0.47, 9.81  # kg, kg, m to the centre, m/s^2
        inertia = pole * (0.06**2 + 1.0**2) / 12 + pole * length * length  # a box, about the hinge
        x, x_dot, theta, theta_dot = self.state
        h = dt / substeps
        for _ in range(substeps):
            sin, cos = theta.sin(), theta.cos()
            coupling = pole * length * cos
            a = force - pole * length * sin * theta_dot.square()
            b = pole * gravity * length * sin
            det = (cart + pole) * inertia - coupling.square()
            x_dot = x_dot + h * (inertia * a + coupling * b) / det
            theta_dot = theta_dot + h * (coupling * a + (cart + pole) * b) / det
            theta_dot = theta_dot.clamp(-8.0, 8.0)  # the joint's velocity limit
            x = x + h * x_dot
            theta = theta + h * theta_dot
        return torch.stack((x, x_dot, theta, theta_dot))

    def get_env_state(self) -> Dict[str, Tensor]:
        return {"state": self.state, "progress": self.progress, "reset_buf": self.reset_buf}

    def set_env_state(self, env_state: Dict[str, Tensor]) -> None:
        for name, value in env_state.items():
            getattr(self, name).copy_(value)


def uses_isaacgym(args: Args) -> bool:
    """Whether Isaac Gym simulates this task. A broken installation is an error, not a fallback."""
    if args.sim == "torch" or (args.sim == "auto" and ISAACGYM_ERROR == "it is not installed"):
        return False
    if ISAACGYM_ERROR:
        raise UserError(f"Isaac Gym cannot be used: {ISAACGYM_ERROR}; --sim torch has Cartpole")
    return True


def make_env(args: Args):
    """The environment that args ask for. Isaac Gym has one simulation a process: call it once."""
    device = pick_device(args.device)
    if ":" in args.env_id:
        return make_factory_env(args, device)
    if not uses_isaacgym(args):
        if args.env_id == "Cartpole":
            return Cartpole(args.num_envs, device)
        what = f"unknown --env-id {args.env_id}: without Isaac Gym only Cartpole is built in"
        raise UserError(f"{what}; your own env is --env-id module:factory")
    import isaacgymenvs

    cfg = compose_isaacgym_config(args, args.num_envs)
    names = ("sim_device", "rl_device", "graphics_device_id", "headless")
    settings = dict({name: cfg[name] for name in names}, force_render=not args.headless, cfg=cfg)
    return isaacgymenvs.make(args.seed, args.env_id, args.num_envs, **settings)


def import_env_module(env_id: str):
    if not re.fullmatch(r"[\w.]*\w:\w+", env_id):
        raise UserError(f"--env-id {env_id} is not module:factory")
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        return importlib.import_module(env_id.partition(":")[0])
    except ModuleNotFoundError as exc:
        raise UserError(f"--env-id {env_id} cannot be imported here: {exc}") from exc


def make_factory_env(args: Args, device: torch.device):
    """The env of --env-id module:factory. UserError if it breaks the contract above."""
    name = args.env_id.partition(":")[2]
    factory: Any = getattr(import_env_module(args.env_id), name, None)
    options = dict(num_envs=args.num_envs, device=str(device), seed=args.seed)
    try:
        with contextlib.suppress(ValueError):  # a C function may have no signature
            inspect.signature(factory).bind(**options)
    except TypeError as exc:  # None, too, if there is no such name
        what = f"{name} must be a function of num_envs, device and seed ({exc})"
        raise UserError(f"--env-id {args.env_id}: {what}") from exc
    env = factory(**options)
    for name in ("num_envs", "num_obs", "num_acts"):
        value = getattr(env, name, "missing")
        if not isinstance(value, (int, np.integer)) or value < 1:
            raise UserError(f"the env's {name} must be a positive int, not {value!r}")
    limit = getattr(env, "max_episode_length", None)
    if limit is not None and not (isinstance(limit, (int, float, np.number)) and limit >= 1):
        raise UserError(f"the env's max_episode_length must be a number, not {limit!r:.40}")
    if env.num_envs != args.num_envs:
        raise UserError(f"the env has num_envs {env.num_envs}, but {args.num_envs} were asked for")
    if not args.play:  # look at one step before anything is written
        check_obs(env.reset(), "reset()", env)
        check_step(env.step(torch.zeros(env.num_envs, env.num_acts, device=device)), env, device)
    return env


def check_step(step: Any, env, device: torch.device) -> Tuple[Any, ...]:
    """What env.step returned, as the rollout needs it: observations (E, O + S), rewards, dones and
    time_outs (E,), the latter two as bool, infos. UserError if it is something else."""
    if not isinstance(step, tuple) or len(step) != 4 or not isinstance(step[3], dict):
        raise UserError("the env's step() must return (obs, reward, done, infos), infos a dict")
    obs, rewards, dones, infos = step
    shape = (env.num_envs,)
    rewards = check_shape(rewards, "step()'s reward", shape).to(device)
    dones = check_shape(dones, "step()'s done", shape)
    dones = dones.to(device, torch.bool, copy=True)  # observers keep it; it may be the env's own
    time_outs = infos["time_outs"] if "time_outs" in infos else torch.zeros_like(dones)
    time_outs = check_shape(time_outs, "infos['time_outs']", shape).to(device, torch.bool)
    return check_obs(obs, "step()[0]", env).to(device), rewards, dones, time_outs, infos


def check_obs(obs: Any, what: str, env) -> Tensor:
    """The observations and, where the env has them, the states for the critic as (E, O + S)."""
    obs = obs if isinstance(obs, dict) else {}
    own = check_shape(obs.get("obs"), f"{what}['obs']", (env.num_envs, env.num_obs)).float()
    size = getattr(env, "num_states", None)
    if not size:
        return own
    states = check_shape(obs.get("states"), f"{what}['states']", (env.num_envs, size))
    return torch.cat((own, states.float()), dim=1)


def check_shape(value: Any, what: str, shape: Tuple[int, ...]) -> Tensor:
    dense = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
    if not dense or value.shape != shape:
        found = f"shape {tuple(value.shape)}" if dense else type(value).__name__
        raise UserError(f"the env's {what} must be a dense tensor of shape {shape}, not {found}")
    return value


def compose_isaacgym_config(args: Args, num_envs: Any = ""):
    """The task's hydra config as IsaacGymEnvs composes it; num_envs "" means the task's number."""
    try:
        import isaacgymenvs  # registers the resolvers that its yaml files use
        from hydra import compose, initialize_config_dir
        from hydra.errors import MissingConfigException
    except ImportError as exc:
        raise UserError(f"--env-id {args.env_id} needs IsaacGymEnvs, but: {exc}") from exc
    folder = os.path.join(os.path.dirname(os.path.abspath(isaacgymenvs.__file__)), "cfg")
    device = pick_device(args.device)
    # sim_device alone is not enough: the pipeline and physx.use_gpu are the config's to decide.
    overrides = f"task={args.env_id} num_envs={num_envs} seed={args.seed} headless={args.headless}"
    overrides += f" sim_device={device} rl_device={device} graphics_device_id={device.index or 0}"
    overrides += " pipeline=gpu" if device.type == "cuda" else " pipeline=cpu"
    try:
        with initialize_config_dir(config_dir=folder, version_base=None):
            return compose(config_name="config", overrides=overrides.split())
    except MissingConfigException as exc:
        files = sorted(os.listdir(os.path.join(folder, "task")))
        known = ", ".join([*files, "module:factory"]).replace(".yaml", "")
        raise UserError(f"unknown --env-id {args.env_id}: choose one of {known}") from exc


# What rl_games calls our arguments in a <Task>PPO.yaml, and what in such a file has no effect here.
RL_GAMES_NAMES = dict(num_actors="num_envs", horizon_length="num_steps", tau="gae_lambda")
RL_GAMES_NAMES.update(mini_epochs="update_epochs", e_clip="clip_coef", clip_value="clip_vloss")
RL_GAMES_NAMES.update(critic_coef="vf_coef", entropy_coef="ent_coef", grad_norm="max_grad_norm")
RL_GAMES_NAMES.update(normalize_advantage="norm_adv")
NO_EFFECT = """
    name full_experiment_name env_name multi_gpu ppo device device_name print_stats player
    score_to_win seq_len seq_length zero_rnn_on_done central_value_config train_dir truncate_grads
    use_experimental_cv reward_shaper normalize_rms_advantage use_smooth_clamp bound_loss_type
    defer_summaries_sec summaries_interval_sec_min summaries_interval_sec_max
""".split()


def policy_metadata(env) -> Dict[str, Any]:
    """What a robot needs besides the weights, from the env. UserError if JSON cannot hold it."""
    keys = "dt control_freq_inv decimation clip_obs clip_actions action_scale power_scale dof_names"
    found = [(k, getattr(env, k, None)) for k in keys.split()]  # inf: VecTask's word for no limit
    metadata = {k: v for k, v in found if isinstance(v, (int, float, str, list)) and v != math.inf}
    if hasattr(env, "policy_metadata"):
        metadata = env.policy_metadata()
    try:
        return json.loads(json.dumps(metadata, allow_nan=False))
    except (TypeError, ValueError) as exc:
        raise UserError(f"the env's policy_metadata(): {exc}; use numbers, strings, lists") from exc


def task_settings(args: Args) -> Dict[str, Any]:
    """The task's arguments: SETTINGS of the env's module, or IsaacGymEnvs' <Task>PPO.yaml."""
    if ":" in args.env_id:
        settings = getattr(import_env_module(args.env_id), "SETTINGS", {})
        return checked(settings, f"SETTINGS of --env-id {args.env_id}")
    if not uses_isaacgym(args):
        return {}
    return settings_from_yaml(compose_isaacgym_config(args).train.params, args.env_id)


def settings_from_yaml(params: Dict[str, Any], task: str) -> Dict[str, Any]:
    """Arguments from a <Task>PPO.yaml. UserError rather than training without what it asks for."""
    defaults = dict(value_bootstrap=False, normalize_value=False, save_best_after=100)  # rl_games'
    config, network = {**defaults, **params["config"]}, params["network"]
    space, mlp = network.get("space") or {}, network.get("mlp") or {}
    normal = space.get("continuous") or {}
    off = (None, "None", False, 0)
    central = config.get("central_value_config")
    critic = {} if central in off else central["network"]
    critic_mlp = critic.get("mlp") or {}
    activation = mlp.get("activation", "elu")
    shaper = config.get("reward_shaper") or {}
    shaping = {k: v for k, v in shaper.items() if k not in ("scale_value", "is_torch")}
    algo, model = params["algo"]["name"], params["model"]["name"]
    refused = (
        (algo != "a2c_continuous", f"the algorithm {algo}"),
        (model != "continuous_a2c_logstd", f"the model {model}"),
        (network["name"] != "actor_critic", f"the network {network['name']}"),
        ("rnn" in network or "rnn" in critic, "a recurrent network (LSTM or GRU)"),
        ("cnn" in network or "cnn" in critic, "a convolutional network"),
        (bool(space) and "continuous" not in space, "discrete actions"),
        (normal.get("fixed_sigma", True) is not True, "a state-dependent sigma"),
        (normal.get("mu_activation") not in off, "an activation on the mean action"),
        (mlp.get("d2rl") not in off or critic_mlp.get("d2rl") not in off, "d2rl layers"),
        (critic_mlp.get("activation", activation) != activation, "two activations"),
        (network.get("normalization") not in off, "layer normalisation"),
        (config.get("normalize_rms_advantage") not in off, "normalize_rms_advantage"),
        (config.get("use_smooth_clamp") not in off, "use_smooth_clamp"),
        (config.get("bound_loss_type", "bound") != "bound", "a bound_loss_type other than bound"),
        (any(v not in off for v in shaping.values()), "a reward_shaper beyond scale_value"),
    )
    reasons = ", ".join(what for is_asked, what in refused if is_asked)
    if reasons:
        raise UserError(f"--env-id {task} cannot be trained here: its settings ask for {reasons}")
    if not config.get("truncate_grads"):
        config["grad_norm"] = 0.0
    if config.get("lr_schedule") not in ("adaptive", "linear"):  # constant, identity, None ...
        config["lr_schedule"] = "fixed"
    config["bounds_loss_coef"] = config.get("bounds_loss_coef") or 0.0
    config.update(units=mlp.get("units", ()), reward_scale=shaper.get("scale_value", 1.0))
    config.update(activation=activation, separate=network.get("separate", False))
    config["sigma_init"] = normal.get("sigma_init", {}).get("val", 0.0)
    if critic:
        config["critic_units"] = critic_mlp.get("units", ())
        warn(f"{task}PPO.yaml has a central value network: here it shares the actor's optimizer")
    settings = {}
    for key in sorted(config.keys() - set(NO_EFFECT)):
        name, value = RL_GAMES_NAMES.get(key, key), config[key]
        if hasattr(Args, name):  # yaml reads 3e-4 as a string, 4 as an int and units as a list
            settings[name] = type(getattr(Args, name))(value)
        else:
            warn(f"{task}PPO.yaml sets {key} = {value}, which this file does not know: ignored")
    return settings


def pick_device(name: str) -> torch.device:
    """The device of --device; UserError where there is none, never another device in silence."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"cuda:{LOCAL_RANK}" if name == "cuda" else name
    known = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name not in known:
        raise UserError(f"--device {name} is unknown: torch sees {', '.join(known)} here")
    return torch.device(name)


def compiled(functions: Sequence[Callable], env, device: torch.device) -> List[Callable]:
    """The functions, compiled, and env.step too. Where there is no compiler: all as they are."""
    try:
        torch.compile(lambda x: x.exp() + 1.0)(torch.ones(8, device=device))
    except Exception as exc:
        warn(f"torch.compile does not work here ({first_line(exc)}): going on without --compile")
        return list(functions)
    if getattr(env, "compilable", False):
        # With the option it draws the same random numbers as without --compile.
        env.step = torch.compile(env.step, options=dict(fallback_random=True))
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    return [torch.compile(function, mode=mode) for function in functions]


# METRICS ==========================================================================================
# A reward: env.step -> rollout -> buffer -> EpisodeMeter.add_rollout (its sum over the episode) ->
#           collect_figures (mean of the last episodes) -> log_epoch -> Writer.add_scalar
# infos:    env.step -> PPOAgent.on_step -> RLGPUAlgoObserver -> Writer.add_scalar
# Writer:   -> TensorBoard; and all scalars of the epoch -> WandbAlgoObserver.after_print_stats
# For another backend write an AlgoObserver (examples/own_observer.py): main(observers=[Mine()]).


class EpisodeMeter:
    """Sums of `width` quantities over the running episodes and the last `size` finished ones."""

    def __init__(self, num_envs: int, size: int, width: int, device: torch.device):
        self.size = size
        self.running = torch.zeros(num_envs, width, device=device)
        self.finished = torch.zeros(0, width, device=device)
        self.count = 0  # episodes finished so far

    def add_rollout(self, quantities: Sequence[Tensor], dones: Tensor) -> None:
        """Add `width` tensors (T, E) and dones (T, E). Waits for a GPU: call it once an epoch."""
        sums = torch.stack(tuple(quantities), dim=-1)
        ended = dones.bool()
        for t in range(len(sums)):
            self.running += sums[t]
            sums[t] = self.running
            self.running.masked_fill_(ended[t].unsqueeze(1), 0.0)
        new = sums[ended]
        self.finished = torch.cat((self.finished, new))[-self.size :]
        self.count += len(new)


def check_finite(agent: PPOAgent) -> None:
    """TrainingError before NaN or Inf of a rollout reach the weights; it names what came first."""
    buffer, steps = agent.buffer, agent.args.num_steps
    sums = torch.stack([x.sum() for x in (agent.obs, *buffer.values())])  # quicker than looking
    if average(sums.isfinite().all().float()) == 1.0:
        return
    rows = [(t, name, x[t]) for t in range(steps) for name, x in buffer.items()]
    for t, name, x in [*rows, (steps, "obs", agent.obs)]:
        bad = int((~x.isfinite()).reshape(len(x), -1).any(1).sum())
        if bad:
            what = f"{name} of {bad} of {len(x)} envs at step {t + 1} of the rollout"
            raise TrainingError(f"NaN or Inf in {what}, epoch {agent.epoch_num}")
    if WORLD_SIZE > 1:  # else it was only a sum that is too large
        raise TrainingError(f"NaN or Inf in another process, so number {RANK} stops too")


EPISODE_SUMS = ("rewards", "shaped_rewards", "episode_lengths")  # rl_games' names in the log


def collect_figures(agent: PPOAgent, losses: Tensor, batch: Batch) -> Dict[str, float]:
    """The epoch's figures by name, averaged over the processes, in one transfer from the device.
    Sets agent.mean_rewards; TrainingError if the update has gone wrong."""
    window = agent.episodes.finished
    unexplained = (batch.returns - batch.values).var() / batch.returns.var().clamp(min=1e-8)
    tensors = dict(zip((*LOSSES, "kl"), losses), explained_variance=1.0 - unexplained, lr=agent.lr)
    weights = agent.model.state_dict().values()  # and statistics
    tensors["weights"] = torch.stack([x.float().sum() for x in weights]).sum()
    tensors.update(zip(EPISODE_SUMS, window.sum(0)))
    tensors.update(zip(("finished", "stop"), agent.lr.new_tensor([len(window), agent.stop_signal])))
    figures = dict(zip(tensors, average(torch.stack(list(tensors.values()))).tolist()))
    for name in (*LOSSES, "kl", "weights"):
        if not math.isfinite(figures[name]):
            raise TrainingError(f"NaN or Inf in the {name} of the update, epoch {agent.epoch_num}")
    if figures["finished"]:
        for name in EPISODE_SUMS:
            figures[name] /= figures["finished"]
        agent.mean_rewards = figures["rewards"]
    if figures["stop"] and not agent.stop_signal:  # another process got a signal
        agent.stop_signal = signal.SIGTERM
    return figures


def log_epoch(agent: PPOAgent, figures, step_time: float, play_time: float, epoch_time: float):
    """Write the epoch's scalars under rl_games' tags, call the observers, draw the console line.
    Returns what best.pth goes by, the mean reward or best_metric; nan if this epoch has none."""
    if RANK != 0:
        return math.nan
    args, epoch, frame, writer = agent.args, agent.epoch_num, agent.frame, agent.writer
    rates = [agent.frames_per_epoch / max(t, 1e-9) for t in (step_time, play_time, epoch_time)]
    for name, rate in zip(("step", "step_inference", "step_inference_rl_update"), rates):
        writer.add_scalar(f"performance/{name}_fps", rate, frame)
    writer.add_scalar("performance/step_time", step_time, frame)
    writer.add_scalar("performance/step_inference_time", play_time, frame)
    writer.add_scalar("performance/rl_update_time", epoch_time - play_time, frame)
    for name in (*LOSSES, "explained_variance"):
        writer.add_scalar(f"losses/{name}", figures[name], frame)
    info = dict(last_lr=figures["lr"], lr_mul=1.0, e_clip=args.clip_coef, kl=figures["kl"])
    for name, value in dict(info, epochs=epoch).items():
        writer.add_scalar(f"info/{name}", value, frame)
    score, done = math.nan, "no episode finished yet"
    if figures["finished"]:
        for name in EPISODE_SUMS:
            writer.add_on_axes(name, figures[name], step=frame, iter=epoch, time=agent.total_time)
        score = agent.mean_rewards
        done = f"reward {score:.2f} length {figures['episode_lengths']:.1f}"
    agent.algo_observer.after_print_stats(frame, epoch, agent.total_time)
    if args.best_metric:
        score = writer.scalars.get(args.best_metric, math.nan)
        known = agent.metric_known or args.best_metric in writer.scalars
        if figures["finished"] and not known:
            ours = ("performance/", "losses/", "info/")
            tags = ", ".join(tag for tag in writer.scalars if not tag.startswith(ours))
            warn(f"--best-metric {args.best_metric} is not logged: {tags} are")
        agent.metric_known = known or figures["finished"] > 0  # or it was said
    writer.end_epoch()

    left = int(epoch_time * (args.max_epochs - epoch))
    left = f"left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
    fps = "fps " + "/".join(f"{rate / 1000:.0f}k" for rate in rates)
    lr = f"lr {figures['lr']:.1e}"
    log(f"epoch {epoch}/{args.max_epochs}", done, left, lr, fps, f"frames {frame:,}", live=True)
    limit = agent.max_episode_length or math.inf
    if not agent.time_outs_seen and (agent.episodes.finished[:, 2] >= limit - 1).any():
        warn("without infos['time_outs'], episodes cut at max_episode_length count as failed")
    return score


class Writer(SummaryWriter):
    """A SummaryWriter that remembers the epoch's scalars, whoever wrote them, for other backends,
    and writes those of one step as one event, ten times cheaper than one event each."""

    def __init__(self, run_dir: str, args: Args):
        try:
            super().__init__(os.path.join(run_dir, "summaries"))
        except (OSError, ValueError) as exc:  # ValueError: a name that is not UTF-8
            raise UserError(f"{run_dir}/summaries cannot be written: {first_line(exc)}") from exc
        rows = [f"|{name}|{value}|" for name, value in asdict(args).items()]
        self.add_text("arguments", "\n".join(["|argument|value|", "|-|-|", *rows]))
        self.scalars: Dict[str, float] = {}
        self.steps: Dict[int, List[Summary.Value]] = collections.defaultdict(list)
        self.works = True

    def add_scalar(self, tag, scalar_value, global_step=None, *args, **kwargs) -> None:
        self.scalars[tag] = value = float(scalar_value)
        self.steps[int(global_step or 0)].append(Summary.Value(tag=tag, simple_value=value))

    def add_on_axes(self, name: str, value: float, **steps: float) -> None:
        """A scalar over several x-axes: one tag for each."""
        for axis, step in steps.items():
            self.add_scalar(f"{name}/{axis}", value, step)

    def end_epoch(self) -> None:
        try:
            for step, values in self.steps.items() if self.works else ():
                self.file_writer.add_summary(Summary(value=values), step)
        except Exception as exc:  # a full disk, for example, stops the curve but not training
            self.works = False
            warn(f"TensorBoard's events cannot be written ({exc}): training goes on")
        self.steps.clear()
        self.scalars.clear()


class AlgoObserver:
    """rl_games' six hooks, in the order in which they are called, and three of our own. None needs
    to be overridden, and rl_games' own observers plug in unchanged.

    before_init        before training; config: the arguments, by rl_games' names too, and run_dir
    after_init         the PPOAgent is complete
    process_infos      after each step; done_indices (n, 1): the environments whose episode ended,
                       of which algo.dones (E,) is the mask; copy what you keep of infos
    after_steps        after the rollout, before the update
    after_clear_stats  rl_games calls it when it clears its meters; here nothing does
    after_print_stats  at the end of an epoch: log here; frame: env steps; total_time: seconds
    close              the run ends
    state_dict         what to keep in checkpoints: tensors, numbers, strings, lists and dicts
    load_state_dict    gets it back, after after_init, when a run is continued"""

    def after_init(self, algo: PPOAgent) -> None:
        self.algo = algo
        self.writer = algo.writer

    def state_dict(self) -> Dict[str, Any]:
        return {}

    def before_init(self, base_name: str, config: Dict[str, Any], experiment_name: str) -> None: ...
    def process_infos(self, infos: Dict[str, Any], done_indices: Optional[Tensor]) -> None: ...
    def after_steps(self) -> None: ...
    def after_clear_stats(self) -> None: ...
    def after_print_stats(self, frame: int, epoch_num: int, total_time: float) -> None: ...
    def close(self) -> None: ...
    def load_state_dict(self, state: Dict[str, Any]) -> None: ...


class RLGPUAlgoObserver(AlgoObserver):
    """Logs what the environment puts into infos, as IsaacGymEnvs' observer of this name does:

    infos["episode"][key]             tensor or number      Episode/<key>: mean over the epoch
    infos["episode_cumulative"][key]  (E,), summed up over  episode_cumulative{,_min,_max}/<key>:
                                      each episode          over the last games_to_track episodes
    any scalar, nested or not         <key>/{frame,iter,time}: mean over the epoch

    Keys may come and go, and nothing leaves the device during the rollout."""

    def after_init(self, algo) -> None:
        super().after_init(algo)
        self.totals: Dict[str, List[Any]] = collections.defaultdict(lambda: [0.0, 0])  # sum, count
        self.steps = collections.defaultdict(list)  # episode_cumulative's key -> (value, dones) ...
        size = (len(algo.dones), algo.games_to_track, 1, algo.device)
        self.meters = collections.defaultdict(lambda: EpisodeMeter(*size))

    def process_infos(self, infos, done_indices) -> None:
        cumulative = infos.get("episode_cumulative")
        for key, value in cumulative.items() if isinstance(cumulative, dict) else ():
            if isinstance(value, Tensor) and value.shape == self.algo.dones.shape:
                value = value.to(self.algo.device, torch.float32, copy=True)
                self.steps[key].append((value, self.algo.dones))
        self.add({key: value for key, value in infos.items() if key != "episode_cumulative"}, "")

    def add(self, infos: Dict[str, Any], prefix: str) -> None:
        for key, value in infos.items():
            tag = f"{prefix}{key}"
            try:
                if isinstance(value, dict):
                    self.add(value, "Episode/" if tag == "episode" else f"{tag}/")
                elif isinstance(value, (int, float, np.number)):
                    self.count(tag, float(value), 1)
                elif not isinstance(value, Tensor):
                    raise TypeError(f"it is a {type(value).__name__}")
                elif value.dim() == 0 or prefix == "Episode/":
                    value = value.detach().to(self.algo.device, torch.float32)
                    self.count(tag, value.sum(), value.numel())
            except (ArithmeticError, NotImplementedError, TypeError) as exc:  # the others stay
                warn(f"infos: {tag} cannot be logged: {first_line(exc)}")

    def count(self, tag: str, total: Any, n: int) -> None:
        self.totals[tag] = [self.totals[tag][0] + total, self.totals[tag][1] + n]

    def after_steps(self) -> None:
        """Bring together what the environments of all processes have reported."""
        if WORLD_SIZE > 1:
            everyone: List[Any] = [None] * WORLD_SIZE
            mine = {tag: (float(total), n) for tag, (total, n) in self.totals.items()}
            together(dist.all_gather_object, everyone, mine)
            self.totals.clear()
            if RANK != 0:  # only rank 0 logs, so nothing may pile up here
                self.steps.clear()
                return
            for totals in everyone:
                for tag, (total, n) in totals.items():
                    self.count(tag, total, n)

    def figures(self) -> Dict[str, float]:
        """What the environments have reported since the last call, by tag without its axis."""
        found = {tag: float(total) / n for tag, (total, n) in self.totals.items() if n}
        self.totals.clear()
        for key, steps in self.steps.items():
            values, dones = (torch.stack(x) for x in zip(*steps))
            meter, before = self.meters[key], self.meters[key].count
            meter.add_rollout((values,), dones)
            if meter.count > before:
                found[f"episode_cumulative/{key}"] = float(meter.finished.mean())
                found[f"episode_cumulative_min/{key}_min"] = float(meter.finished.min())
                found[f"episode_cumulative_max/{key}_max"] = float(meter.finished.max())
        self.steps.clear()
        return found

    def after_print_stats(self, frame, epoch_num, total_time) -> None:
        for tag, value in self.figures().items():
            if tag.startswith("Episode/"):
                self.writer.add_scalar(tag, value, epoch_num)
            elif tag.startswith("episode_cumulative"):
                self.writer.add_scalar(tag, value, frame)
            else:
                self.writer.add_on_axes(tag, value, frame=frame, iter=epoch_num, time=total_time)

    def state_dict(self) -> Dict[str, Any]:
        return {key: [m.running, m.finished, m.count] for key, m in self.meters.items()}

    def load_state_dict(self, state) -> None:
        for key, (running, finished, count) in state.items():
            meter = self.meters[key]
            if running.shape == meter.running.shape:  # with another num_envs it starts anew
                meter.running.copy_(running)
                meter.finished, meter.count = finished.to(self.algo.device), count


class WandbAlgoObserver(AlgoObserver):
    """Sends the epoch's scalars to Weights & Biases; training goes on if that is absent, offline,
    slow or broken. sync_tensorboard would get the x-axis of <tag>/iter and <tag>/time wrong, and
    `step=` would drop points of a continued run, so define_metric names each tag's x-axis."""

    patience = 20  # seconds for the server's first answer, and for the rest at the end
    run: Any = None
    defined: frozenset = frozenset()  # tags whose x-axis W&B knows

    def before_init(self, base_name, config, experiment_name) -> None:
        os.environ.setdefault("WANDB_INIT_TIMEOUT", "60")  # seconds
        run_dir = config["run_dir"]
        about = dict(project=config["wandb_project_name"], entity=config["wandb_entity"] or None)
        about.update(name=experiment_name, id=config["wandb_run_id"], resume="allow", config=config)
        about["dir"] = os.path.abspath(run_dir)
        try:
            self.wandb = importlib.import_module("wandb")
        except ImportError as exc:
            return warn(f"--track: {exc} (pip install wandb): training goes on without it")
        try:
            settings = self.wandb.setup().settings
            if settings.mode == "online":  # init would wait for minutes
                with contextlib.suppress(urllib.error.HTTPError):  # any answer will do
                    urllib.request.urlopen(settings.base_url, timeout=self.patience).close()
            self.run = self.wandb.init(**about)
        except Exception as exc:
            then = f"recording offline, upload later: wandb sync {run_dir}/wandb/offline-run-*"
            warn(f"W&B failed to start: {first_line(exc)}; {then}")
            self.in_time(self.wandb.teardown, 2)  # a failed start would spoil the next one
            self.run = self.wandb.init(**about, mode="offline")
        folder = os.path.join(run_dir, "code")
        self.in_time(lambda: self.run.log_code(folder, include_fn=lambda _: True), self.patience)

    def after_print_stats(self, frame, epoch_num, total_time) -> None:
        if self.run is None:
            return
        axes = dict(global_step=frame, epoch=epoch_num, time=total_time)
        values = {**self.writer.scalars, **axes}
        try:
            for tag in values.keys() - self.defined:
                axis = dict(iter="epoch", time="time").get(tag.rsplit("/", 1)[-1], "global_step")
                self.run.define_metric(tag, step_metric=None if tag in axes else axis)
            self.defined = self.defined.union(values)
            self.run.log(values)
        except Exception as exc:
            self.give_up(f"failed ({exc}): training goes on without it")

    def close(self) -> None:
        if self.run is not None:
            try:
                self.in_time(self.finish, self.patience)
            finally:  # also if Ctrl-C cuts the waiting short
                if self.run is not None:
                    self.give_up("did not take everything in time")

    def finish(self) -> None:
        algo, summary = self.algo, self.run.summary
        summary["stop_reason"] = stop_reason(algo)
        if algo.best_epoch:
            summary.update(dict(best_reward=algo.last_mean_rewards, best_epoch=algo.best_epoch))
            summary["best_metric"] = algo.args.best_metric or "mean reward"
        # W&B <= 0.24 writes its file in blocks of 32 KiB. Repeating the config, 1 KiB or more,
        # pushes the last rows out before the server is waited for.
        for _ in range(32):
            self.run.config.persist()
        self.run.finish()
        self.run = None

    def give_up(self, why: str) -> None:
        folder = os.path.relpath(os.path.dirname(self.run.dir))
        self.run = None
        warn(f"W&B {why}; upload the rest later with: wandb sync --include-online {folder}")
        self.in_time(self.wandb.teardown, 2)  # or W&B's exit hook would wait without end

    def in_time(self, call: Callable[[], Any], seconds: float) -> None:
        """Wait for W&B, but not for long: then it may go on, in a thread that ends with us."""

        def work():
            with contextlib.suppress(Exception):
                call()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(seconds)


class MultiObserver(AlgoObserver):
    """Calls every hook on each of `observers`, in order. One that raises is named and left out."""

    def __init__(self, observers: Sequence[AlgoObserver], strict: bool = False):
        self.everyone = list(observers)
        self.observers = list(observers)  # without those that were left out
        self.strict = strict  # let exceptions through
        # Ours uses the mask; another one that has a process_infos of its own may want the indices.
        ours = (AlgoObserver.process_infos, RLGPUAlgoObserver.process_infos)
        hooks = [getattr(type(observer), "process_infos", None) for observer in self.observers]
        self.needs_done_indices = any(hook not in ours for hook in hooks)

    def ask(self, observer: AlgoObserver, hook: str, *args) -> Any:
        """What the observer returns; None if it is left out or, like rl_games', lacks the hook."""
        try:
            if observer in self.observers and hasattr(observer, hook):
                answer = getattr(observer, hook)(*args)
                return plain(answer) if hook == "state_dict" else answer
        except Exception as exc:
            if self.strict or isinstance(exc, TrainingError):
                raise
            self.observers.remove(observer)
            what = f"{type(observer).__name__}.{hook} raised {exc!r}"
            what += f": training goes on without this observer\n{traceback.format_exc()}"
            log(f"warning: {what}", stream=sys.stderr)

    def call(self, hook: str, *args) -> None:
        for observer in list(self.observers):
            self.ask(observer, hook, *args)

    before_init = functools.partialmethod(call, "before_init")
    after_init = functools.partialmethod(call, "after_init")
    process_infos = functools.partialmethod(call, "process_infos")
    after_steps = functools.partialmethod(call, "after_steps")
    after_clear_stats = functools.partialmethod(call, "after_clear_stats")
    after_print_stats = functools.partialmethod(call, "after_print_stats")
    close = functools.partialmethod(call, "close")

    def state_dict(self) -> List[Any]:
        """[class name, state] of each observer, so that two of one class have their own."""
        return [[type(x).__name__, self.ask(x, "state_dict")] for x in self.everyone]

    def load_state_dict(self, states: List[Any]) -> None:
        for observer in self.everyone:
            mine = next((entry for entry in states if entry[0] == type(observer).__name__), None)
            states = [entry for entry in states if entry is not mine]  # those that are left
            if mine and mine[1]:
                self.ask(observer, "load_state_dict", mine[1])


# CHECKPOINTS ======================================================================================
# runs/<experiment>/nn/epoch_<N>.pth   every save_frequency epochs
#                      best.pth        at each new highest score, once a window of episodes is full
#                      last.pth        when the run ends, by itself, by a signal or by an error
#
# Each holds rl_games' keys (model, optimizer, epoch, frame, last_mean_rewards, env_state) and what
# exact continuation needs besides (agent_state): nothing but tensors, numbers, strings, lists and
# dicts, so that it loads with weights_only=True, which runs no code.

FORMAT_VERSION = 2
COUNTERS = ("frame", "total_time", "last_mean_rewards", "best_epoch")
CONVERT = "if it is rl_games', convert it: python tools/from_rl_games.py {} ours.pth"


def agent_state(agent: PPOAgent, with_env: bool = True) -> Dict[str, Any]:
    """All that the run is, as a checkpoint keeps it; with_env: the state of the simulation too."""
    env, episodes, optimizer = agent.env, agent.episodes, agent.optimizer.state_dict()
    optimizer["param_groups"][0].update(lr=float(agent.lr), fused=None)  # as rl_games has them
    cuda = torch.cuda.get_rng_state(agent.device) if agent.device.type == "cuda" else None
    state = {name: getattr(agent, name) for name in COUNTERS}
    state.update(format_version=FORMAT_VERSION, version=__version__, args=asdict(agent.args))
    state.update(model=agent.model.state_dict(), optimizer=optimizer, epoch=agent.epoch_num)
    state.update(num_obs=int(env.num_obs), num_acts=int(env.num_acts))
    if agent.num_states:
        state["num_states"] = agent.num_states
    state["clip_obs"] = float(getattr(env, "clip_obs", None) or math.inf)
    state["env_state"] = env.get_env_state() if with_env and hasattr(env, "get_env_state") else None
    state.update(rng=dict(torch=torch.get_rng_state(), cuda=cuda), first_epoch=agent.first_epoch)
    state["episodes"] = [episodes.running, episodes.finished, episodes.count]
    state.update(obs=agent.obs, dones=agent.dones, observers=agent.algo_observer.state_dict())
    state.update(policy_metadata=agent.policy_metadata, wandb_run_id=agent.config["wandb_run_id"])
    return plain(state)


def plain(value: Any) -> Any:
    """A copy of `value` made of what a checkpoint may hold; numpy becomes torch and Python."""
    if isinstance(value, Tensor):
        return value.detach().clone().as_subclass(Tensor)
    if isinstance(value, np.ndarray):
        return torch.tensor(value)
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


def check_like(found: Any, expected: Any, name: str) -> None:
    """UserError unless `found` has the keys, types and shapes of `expected`. torch does not check
    Adam's moments: of another shape they crash Python."""

    def kind(x: Any) -> str:
        if isinstance(x, Tensor):
            return f"{x.layout} {x.dtype} {tuple(x.shape)}"
        return "missing" if x is None else "nan" if x != x else type(x).__name__

    if isinstance(found, dict) and isinstance(expected, dict):
        for key in {**expected, **found}:
            check_like(found.get(key), expected.get(key), f"{name}.{key}")
    elif kind(found) != kind(expected):
        what = f"{name} is {kind(found)}, but should be {kind(expected)}"
        raise UserError(f"it does not fit this env, network or version: {what}")


def load_weights(model: ActorCritic, state: Dict[str, Any], path: str) -> None:
    """Load weights and statistics. UserError if they, or Adam's moments, do not fit this model."""
    with reading(path):
        check_like(state["model"], dict(model.state_dict()), "model")
        for i, parameter in enumerate(model.parameters()):
            fresh = dict(step=torch.zeros(()), exp_avg=parameter, exp_avg_sq=parameter)
            check_like(state["optimizer"]["state"].get(i, fresh), fresh, f"optimizer.{i}")
        model.load_state_dict(state["model"])


def restore_agent(agent: PPOAgent, state: Dict[str, Any], path: str) -> bool:
    """Go on from `state`. True if exactly, False if the environment had to start new episodes."""
    load_weights(agent.model, state, path)
    with reading(path):
        # The optimizer's settings are this run's, its moments the checkpoint's.
        adam = state["optimizer"]
        moments = plain(adam["state"])  # copies: their storage is as large as their shape says
        agent.optimizer.load_state_dict({**agent.optimizer.state_dict(), "state": moments})
        agent.optimizer.param_groups[0]["lr"] = agent.lr
        if state["args"].get("learning_rate") in (None, agent.args.learning_rate):  # no new flag
            agent.lr.fill_(adam["param_groups"][0]["lr"])
        for name in COUNTERS:
            check_like(state[name], getattr(agent, name), name)
            setattr(agent, name, state[name])
        agent.epoch_num = agent.whole_epoch = state["epoch"]
        if state["args"].get("best_metric", "") != agent.args.best_metric:  # not to be compared
            agent.last_mean_rewards, agent.best_epoch = -math.inf, 0
        running, finished, count = state["episodes"]
        agent.episodes.finished = finished.to(agent.device).view(-1, 3)
        agent.episodes.count = int(count)
        # Without exact_state the env's state is something like a curriculum: it fits any num_envs.
        env, whole = agent.env, getattr(agent.env, "exact_state", False)
        can_be_set = state["env_state"] is not None and hasattr(env, "set_env_state")
        exact = state["obs"].shape == agent.obs.shape and can_be_set and whole and WORLD_SIZE == 1
        if can_be_set and (exact or not whole):
            env.set_env_state(state["env_state"])
        if exact:
            agent.obs = torch.empty_like(agent.obs).copy_(state["obs"])
            agent.dones.copy_(state["dones"])
            agent.episodes.running.copy_(running)
            torch.set_rng_state(state["rng"]["torch"])
            if state["rng"]["cuda"] is not None and agent.device.type == "cuda":
                torch.cuda.set_rng_state(state["rng"]["cuda"], agent.device)
        agent.first_epoch = int(state["first_epoch"]) if exact else agent.epoch_num
    return exact


@contextlib.contextmanager
def reading(path: str):
    """Turn any exception inside into a UserError of one line that names `path`."""
    try:
        yield
    except Exception as exc:
        reason = first_line(exc)
        if isinstance(exc, pickle.UnpicklingError):
            reason = f"more than tensors, numbers and text is in it; {CONVERT.format(path)}"
        elif not isinstance(exc, UserError):
            reason = f"{type(exc).__name__}: {reason}"
        raise UserError(f"{path} cannot be used: {reason}") from exc


def save_checkpoints(agent: PPOAgent, score: float, finished: float) -> None:
    """best.pth and epoch_<N>.pth, if it is time for them. finished: episodes in the window."""
    args, epoch = agent.args, agent.epoch_num
    # The first episodes to end are the short ones, so wait for the others, and for a full window.
    steps = (epoch - agent.first_epoch) * args.num_steps
    fair = steps >= agent.max_episode_length and finished == args.games_to_track
    if fair and epoch >= args.save_best_after and score > agent.last_mean_rewards:
        before = (agent.last_mean_rewards, agent.best_epoch)
        agent.last_mean_rewards, agent.best_epoch = score, epoch
        if not save(agent, "best.pth"):  # it is not on disk, so it is still to be beaten
            agent.last_mean_rewards, agent.best_epoch = before
    if args.save_frequency and epoch % args.save_frequency == 0:
        save(agent, f"epoch_{epoch}.pth")


def save(agent: PPOAgent, name: str, final: bool = False, with_env: bool = True) -> bool:
    """Save, or warn and return False: there is a next time. If it is final: TrainingError."""
    if RANK != 0:
        return True
    path = os.path.join(agent.nn_dir, name)
    with contextlib.suppress(Exception):  # TensorBoard's trouble is not the checkpoint's
        agent.writer.flush()  # the curve on disk is never behind the checkpoint
    try:
        save_checkpoint(agent_state(agent, with_env), path)
    except OSError as exc:
        what = f"cannot be written ({exc.strerror or exc})"
        if final:
            raise TrainingError(f"{path} {what}: epoch {agent.epoch_num} is not on disk") from exc
        warn(f"{path} {what}; the next save will try again")
        return False
    return True


def save_checkpoint(state: Dict[str, Any], path: str) -> None:
    """Write `state` so that `path` always holds a whole file, even if the machine dies."""
    serialised = io.BytesIO()  # torch.save to a file reports a full disk without a reason
    torch.save(state, serialised)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(serialised.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def load_checkpoint(path: str) -> Dict[str, Any]:
    """Read a checkpoint to the CPU, without running code from it. UserError if it is no good."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is not a file")
    with reading(path), open(path, "rb") as file:
        archive = zipfile.ZipFile(file)
        parts = archive.infolist()
        # Compressed, or marked as a folder, which torch 2.4 would read as whatever is in memory.
        odd = any(part.compress_type or part.external_attr & 0x10 for part in parts)
        if odd or sum(part.file_size for part in parts) > os.path.getsize(path):  # they overlap
            raise UserError("torch did not write it like this")
        damaged = archive.testzip()  # torch.load ignores the checksums
        if damaged:
            raise UserError(f"{damaged} does not match its checksum")
        file.seek(0)
        state = torch.load(file, map_location="cpu", weights_only=True)
        if "format_version" not in state:
            raise UserError(f"it is not a checkpoint of train_ppo.py; {CONVERT.format(path)}")
        if state["format_version"] != FORMAT_VERSION:
            raise UserError(f"it has format {state['format_version']} instead of {FORMAT_VERSION}")
        for name, empty in dict(epoch=0, args={}, wandb_run_id="", observers=[]).items():
            if type(state[name]) is not type(empty):
                raise UserError(f"{name} is a {type(state[name]).__name__}")
        if not all(isinstance(entry, list) and len(entry) == 2 for entry in state["observers"]):
            raise UserError("observers is not a list of names and states")
    return state


def find_checkpoint(path: str) -> Tuple[str, Dict[str, Any]]:
    """(file, content) of a file, or of a run folder's readable file with the highest epoch."""
    if not os.path.isdir(path):
        return path, load_checkpoint(path)
    numbered = []  # (N, file) of epoch_<N>.pth, after last.pth and best.pth
    for file in glob.glob(os.path.join(glob.escape(path), "nn", "*.pth")):
        match = re.fullmatch(r"(?:last|best|epoch_(\d+))\.pth", os.path.basename(file))
        if match:
            numbered.append((float(match[1] or "inf"), file))
    found: List[Tuple[str, Dict[str, Any]]] = []
    for number, file in sorted(numbered, reverse=True):
        try:
            found.append((file, load_checkpoint(file)))
            if number < math.inf:
                break  # the others are older
        except UserError as exc:
            warn(f"{exc}: skipped")
    if not found:
        raise UserError(f"{path} has no readable checkpoint in nn/")
    return max(found, key=lambda item: item[1]["epoch"])


# RUNNER ===========================================================================================


class UserError(Exception):
    """A mistake that the user can mend: `main` prints it as one line and exits with 2."""


class TrainingError(Exception):
    """Training cannot go on, or its result is not on disk: one line, and exit code 1."""


def log(*fields: str, stream=None, live: bool = False) -> None:
    """Print, in the process of rank 0. On a terminal a live line is drawn over by the next one, and
    loses its last fields where it is too long. A terminal that is gone, full or of another encoding
    must not end training, so what cannot be printed is dropped."""
    if RANK != 0:
        return
    # RuntimeError: a signal handler printed while something else was being printed.
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        terminal = sys.stdout is not None and sys.stdout.isatty()
        if terminal:
            print("\r\x1b[K", end="", flush=True)
        while live and terminal and len(" ".join(fields)) >= shutil.get_terminal_size().columns:
            fields = fields[:-1]
        print(*fields, end="" if live and terminal else "\n", file=stream, flush=True)


@functools.lru_cache(maxsize=None)
def warn(message: str) -> None:
    """Print a warning, each text once per run."""
    log(f"warning: {message}", stream=sys.stderr)


def first_line(exc: BaseException) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0]


CLOSE_PATIENCE = 20.0  # seconds that an env has to close


def close_env(env, code: int) -> None:
    """Close the env, in the main thread as OpenGL requires. Everything is saved by then, so an
    exception is only a warning, and an env that hangs ends the program with `code`."""
    error = sys.exc_info()[1]

    def give_up():
        warn("the env's close() does not return, so the program ends without it")
        if error is not None:
            log(f"error: {error!r}", stream=sys.stderr)
        os._exit(code)

    timer = threading.Timer(CLOSE_PATIENCE, give_up)
    timer.start()
    try:
        env.close()
    except Exception as exc:
        warn(f"the env's close() raised {exc!r}")
    finally:
        timer.cancel()


def exit_code(stop_signal: int) -> int:
    return 128 + stop_signal if stop_signal else 0


def check_args(args: Args) -> None:
    """UserError for values that make no sense."""
    positive = "num_envs num_steps minibatch_size update_epochs max_epochs games_to_track".split()
    for field in fields(Args):
        value, least = getattr(args, field.name), int(field.name in positive)
        any_sign = field.name in ("seed", "reward_scale", "sigma_init")
        if field.type in (int, float) and not any_sign and not value >= least:  # true for nan, too
            raise UserError(f"--{field.name.replace('_', '-')} must be >= {least}, not {value}")
    if any(width < 1 for width in (*args.units, *args.critic_units)):
        raise UserError("--units and --critic-units must be positive")
    batch = args.num_envs * args.num_steps
    size = min(args.minibatch_size, batch)
    if not args.play and (batch % size or size < 2):
        what = f"num_envs x num_steps = {batch} samples cannot be split into minibatches of {size}"
        raise UserError(f"{what}: choose a --minibatch-size that divides {batch}")
    if args.play and (not args.checkpoint or WORLD_SIZE > 1):
        raise UserError("--play needs --checkpoint PATH, and no torchrun")
    if args.checkpoint and args.init_from:
        raise UserError("--checkpoint continues, --init-from starts anew: give one of them")
    if args.resume and not args.experiment:
        raise UserError("--resume needs --experiment NAME")
    if args.experiment and os.path.isdir(args.checkpoint) and not args.resume:
        file = os.path.join(args.checkpoint, "nn", "last.pth")
        raise UserError(f"a run folder continues under its own name; for a new run give {file}")
    if os.path.basename(args.experiment) != args.experiment:
        raise UserError(f"--experiment {args.experiment} must be a plain name; see --train-dir")


def seed_everything(args: Args) -> None:
    seed = args.seed + RANK
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**63)  # the CPU's generator and every GPU's
    if args.torch_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def open_run_dir(args: Args, origin: str) -> Tuple[str, Any]:
    """The folder to train in, and the lock that keeps others out while this process lives. A folder
    given as --checkpoint continues; all else gets a new one, so that nothing is overwritten."""
    continues = os.path.isdir(args.checkpoint)
    try:
        run_dir = os.path.normpath(args.checkpoint) if continues else make_run_dir(args)
        # O_NOFOLLOW: a link that someone put there must not lead to another file.
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        lock = open(os.open(os.path.join(run_dir, ".lock"), flags, 0o644))
        with contextlib.suppress(ImportError):  # Windows
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as exc:
                if exc.errno != errno.ENOLCK:  # some network file systems have no locks
                    raise
        nn_dir = os.path.join(run_dir, "nn")
        for path in glob.glob(os.path.join(glob.escape(nn_dir), "*.pth.*.tmp")):
            if os.path.isfile(path) and not os.path.islink(nn_dir):
                os.remove(path)  # what a killed process left half written
        if not continues:
            describe_run(run_dir, args, origin)
    except BlockingIOError as exc:
        raise UserError(f"{run_dir} is being trained by another process: stop it first") from exc
    except OSError as exc:
        what = exc.filename or run_dir
        raise UserError(f"{what} cannot be trained in: {exc.strerror or exc}") from exc
    return run_dir, lock


def make_run_dir(args: Args) -> str:
    """A new folder. If the name is taken it is <name>_2, _3 ...; of two processes one gets it."""
    task = re.sub(r"[^A-Za-z0-9_-]+", "_", args.env_id)
    name = args.experiment or task + time.strftime("_%Y-%m-%d_%H-%M-%S")
    os.makedirs(args.train_dir, exist_ok=True)
    for n in range(1, 10**5):
        with contextlib.suppress(FileExistsError):
            run_dir = os.path.join(args.train_dir, name if n == 1 else f"{name}_{n}")
            os.makedirs(run_dir, exist_ok=args.resume)  # resumed before the first checkpoint
            break
    os.makedirs(os.path.join(run_dir, "nn"), exist_ok=args.resume)
    return run_dir


def describe_run(run_dir: str, args: Args, origin: str) -> None:
    """Write config.json and code/: this file, the script started, the env's module, git's diff."""
    about = dict(args=asdict(args), origin=origin, command=shlex.join([sys.executable, *sys.argv]))
    versions = dict(python=sys.version.split()[0], torch=torch.__version__, train_ppo=__version__)
    with open(os.path.join(run_dir, "config.json"), "w") as file:
        json.dump(dict(about, versions=versions), file, indent=2)
    folder = os.path.join(run_dir, "code")
    os.makedirs(folder, exist_ok=True)
    for name in (__name__, "__main__", args.env_id.partition(":")[0]):
        path = getattr(sys.modules.get(name), "__file__", None) or ""
        if path.endswith(".py") and os.path.isfile(path):
            shutil.copy(path, folder)
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__))]
    options = dict(stderr=subprocess.DEVNULL, timeout=10)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.check_output([*git, "rev-parse", "HEAD"], **options)
        diff = subprocess.check_output([*git, "diff", "HEAD"], **options)
        with open(os.path.join(folder, "git.diff"), "wb") as file:
            file.write(b"since commit " + commit + diff[: 10**7])  # bytes


def keep_freed_memory() -> None:
    """Have glibc keep what an update frees for the next one. By default it gives much of it back to
    the system, and getting it again, page by page, takes a tenth of a training on a CPU."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD


class Runner:
    """Does what args say. path, state: the checkpoint that they name, and its content."""

    def __init__(self, args: Args, observer: MultiObserver, path: str = "", state=None):
        self.args = args
        self.path = path
        self.state = state
        self.observer = observer
        if RANK != 0:  # there the environments' reports are gathered, and nothing else
            ours = [x for x in observer.observers if isinstance(x, RLGPUAlgoObserver)]
            self.observer = MultiObserver(ours)

    def run(self) -> Dict[str, Any]:
        """Returns the figures of play, or of training."""
        args, state = self.args, self.state
        check_args(args)
        if args.checkpoint and not args.play and state["epoch"] >= args.max_epochs:
            what = f"{args.checkpoint} is complete: {state['epoch']} of {args.max_epochs} epochs"
            log(f"{what}. To train longer give a larger --max-epochs")
            return dict(run_dir=args.checkpoint, epoch=state["epoch"], stop_signal=0)
        device = pick_device(args.device)
        if args.torch_threads:
            torch.set_num_threads(args.torch_threads)
        keep_freed_memory()
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")  # TF32, as in rl_games
        elif args.mixed_precision:
            log("--mixed-precision does nothing on a CPU, as in rl_games")
        if WORLD_SIZE > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        seed_everything(args)
        env = make_env(replace(args, seed=args.seed + RANK))
        seed_everything(args)  # making an env may draw any number of random numbers
        try:
            agent = PPOAgent(args, env, self.observer)
            return play(agent, state, self.path) if args.play else self.train(agent)
        finally:
            if hasattr(env, "close"):
                close_env(env, code=1 if sys.exc_info()[0] else exit_code(agent.stop_signal))
            # gloo needs no farewell, and with torch 2.4 it sometimes hung in it.
            if WORLD_SIZE > 1 and dist.get_backend() == "nccl":
                dist.destroy_process_group()

    def train(self, agent: PPOAgent) -> Dict[str, Any]:
        """Load the checkpoint, open run folder and observers, train, save last.pth, report."""
        args, state, path, observer = self.args, self.state, self.path, self.observer
        continues = os.path.isdir(args.checkpoint)
        if args.checkpoint:
            exact = restore_agent(agent, state, path)
            how = "exactly where it stopped" if exact else "the env starts new episodes"
            what = f"{'continuing' if continues else 'branching off'} {path}"
            log(f"{what} at epoch {agent.epoch_num}, frame {agent.frame:,}; {how}")
        elif state is not None:
            load_weights(agent.model, state, path)
        opened, lock = [""], None
        if RANK == 0:
            opened[0], lock = open_run_dir(args, path)
        if WORLD_SIZE > 1:
            together(dist.broadcast_object_list, opened, 0)
        run_id = state["wandb_run_id"] if continues else ""
        agent.open(opened[0], os.environ.get("WANDB_RUN_ID") or run_id or os.urandom(4).hex())
        observer.before_init("train_ppo", agent.config, agent.config["name"])
        observer.after_init(agent)
        if args.checkpoint:
            observer.load_state_dict(state["observers"])
        # A state that cannot be kept is found out before the first epoch, not at the first save.
        states = "what get_env_state() or an observer's state_dict() returns"
        with contextlib.nullcontext() if args.strict_observers else reading(states):
            agent_state(agent)
        envs = f"{WORLD_SIZE} x {args.num_envs}" if WORLD_SIZE > 1 else args.num_envs
        what = f"{args.env_id} on {agent.device}, {envs} envs x {args.num_steps} steps"
        log(f"training {what}; writing to {opened[0]}")
        try:
            with stop_signals(agent):
                agent.train()
                save(agent, "last.pth", final=True)
        except BaseException:  # a simulator whose window is closed may call sys.exit
            if agent.whole_epoch:  # the weights are those of a complete epoch
                agent.epoch_num = agent.whole_epoch
                with contextlib.suppress(Exception):  # the first exception is the one to see
                    save(agent, "last.pth", final=True, with_env=False)  # the env may be broken
            raise
        finally:
            observer.close()
            with contextlib.suppress(Exception):  # rank 0 alone has a writer and a lock
                agent.writer.close()
                lock.close()
        report(agent)
        results = dict(run_dir=opened[0], epoch=agent.epoch_num, mean_reward=agent.mean_rewards)
        return dict(results, best=agent.last_mean_rewards, stop_signal=agent.stop_signal)


@torch.no_grad()
def play(agent: PPOAgent, state: Dict[str, Any], path: str) -> Dict[str, float]:
    """Evaluate the mean actions on the second episode of each environment: the first may have begun
    before, and the first N to end, of whichever environments, would be the short ones."""
    args, env, obs = agent.args, agent.env, agent.obs
    agent.games_to_track = 10**6  # all episodes
    agent.writer = None
    observer = RLGPUAlgoObserver()
    observer.after_init(agent)
    with reading(path):  # the policy does without states, so this env may have other ones or none
        model = ActorCritic(env.num_obs, env.num_acts, args, state.get("num_states", 0))
        agent.model = model.to(agent.device)
    load_weights(agent.model, state, path)
    # Of each environment: sums over its second episode, and the episodes that it has ended.
    returns, lengths, ended = torch.zeros(3, env.num_envs, device=agent.device)
    limit = 4 * (agent.max_episode_length or 25_000)
    for _ in range(limit):
        actions = agent.model.mean_action(obs)
        actions = actions.clamp(-1.0, 1.0) if args.clip_actions else actions
        obs, rewards, agent.dones, _, infos = check_step(env.step(actions), env, agent.device)
        observer.process_infos(infos, None)
        returns += rewards * (ended == 1)
        lengths += ended == 1
        ended += agent.dones
        if (ended >= 2).all():
            break
    returns, lengths = returns[ended >= 2], lengths[ended >= 2]
    if len(returns) == 0:
        raise TrainingError(f"no episode ended in {limit} steps, so there is nothing to report")
    result = dict(mean=returns.mean().item(), std=returns.std(unbiased=False).item())
    result.update(min=returns.min().item(), max=returns.max().item())
    result.update(length=lengths.mean().item(), count=len(returns))
    what = "reward mean {mean:.2f} std {std:.2f} min {min:.2f} max {max:.2f}, mean length "
    what += "{length:.1f}, {count} episodes, one of each env, mean actions"
    log(what.format(**result))
    if len(returns) < env.num_envs:
        warn(f"{env.num_envs - len(returns)} envs ended no whole episode in {limit} steps")
    result["metrics"] = observer.figures()
    for tag, value in result["metrics"].items():
        log(f"{tag} {value:.5g}")
    result.update(checkpoint=path, epoch=state["epoch"], env_id=args.env_id, seed=args.seed)
    if args.json:
        try:
            with open(args.json, "w") as file:
                json.dump(result, file, indent=2)
        except OSError as exc:
            raise UserError(f"--json {args.json} cannot be written: {exc.strerror}") from exc
    return result


@contextlib.contextmanager
def stop_signals(agent: PPOAgent):
    """Let a signal end training after the epoch that is under way, and a second one at once."""

    def stop(signum, _frame):
        agent.stop_signal = signum
        for every in before:
            signal.signal(every, signal.SIG_DFL)
        log(f"{signal.Signals(signum).name}: finishing this epoch, then saving last.pth")

    before = {}
    # SIGHUP: the terminal is gone. SIGUSR1: what SLURM's --signal sends before a time limit.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        signum = getattr(signal, name, None)  # Windows lacks two of them; nohup ignores SIGHUP
        if signum is not None and signal.getsignal(signum) != signal.SIG_IGN:
            with contextlib.suppress(ValueError):  # only the main thread may handle signals
                before[signum] = signal.signal(signum, stop)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def stop_reason(agent: PPOAgent) -> str:
    if agent.stop_signal:
        return signal.Signals(agent.stop_signal).name
    return "done" if agent.epoch_num >= agent.args.max_epochs else "error"


def report(agent: PPOAgent) -> None:
    """The end of a run on the console: results, and the commands that go on from here."""
    args, run_dir = agent.args, agent.config["run_dir"]
    here = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD_SIZE))  # processes on this machine
    script = sys.argv[0] if sys.argv[0].endswith(".py") else __file__  # one with own observers?
    script = shlex.quote(os.path.relpath(script))
    nodes = f" --nnodes={WORLD_SIZE // here} ..." if WORLD_SIZE > here else ""
    launcher = "python" if WORLD_SIZE == 1 else f"torchrun --nproc-per-node={here}{nodes}"
    name = "best.pth" if os.path.exists(os.path.join(agent.nn_dir, "best.pth")) else "last.pth"
    more = "" if agent.stop_signal else f" --max-epochs {2 * args.max_epochs}"
    env = f" --env-id {args.env_id}" if ":" in args.env_id else ""
    folder = shlex.quote(run_dir)
    reward = f"mean reward {agent.mean_rewards:.2f}" if agent.episodes.count else "no episode ended"
    if math.isfinite(agent.last_mean_rewards):
        best = f"best {args.best_metric}" if args.best_metric else "best"
        reward += f", {best} {agent.last_mean_rewards:.2f} in epoch {agent.best_epoch}"
    log(f"\nstopped after epoch {agent.epoch_num} ({stop_reason(agent)}), {reward}")
    log(f"files     {run_dir}")
    log(f"play      python {script} --play --checkpoint {folder}/nn/{name}{env}")
    log(f"continue  {launcher} {script} --checkpoint {folder}{more}{env}")
    log(f"curves    tensorboard --logdir {folder}/summaries")


# Arguments that a checkpoint does not pass on: they say what this start of the program is for.
OWN_ARGS = "checkpoint init_from resume play json device experiment train_dir torch_threads".split()
NETWORK_ARGS = "units critic_units activation separate normalize_input normalize_value".split()


def parse_flags(argv: Optional[Sequence[str]], default: Args) -> Args:
    """The flags over these values. tyro draws a box in --help for each nested dataclass."""
    kinds = Args.__bases__[::-1]
    parts = [kind(**{f.name: getattr(default, f.name) for f in fields(kind)}) for kind in kinds]
    nested = make_dataclass("Args", [(kind.__name__, kind) for kind in kinds])
    about = dict(default=nested(*parts), description=__doc__.splitlines()[0])
    found = tyro.cli(tyro.conf.OmitArgPrefixes[nested], args=argv, **about)
    return Args(**{name: x for part in vars(found).values() for name, x in vars(part).items()})


def parse_args(argv: Optional[Sequence[str]] = None):
    """Args, path and content of the checkpoint that they name. The flags are parsed twice, first
    to learn which checkpoint or task is meant, then over the values found there."""
    first = parse_flags(argv, Args())
    folder = os.path.join(first.train_dir, first.experiment)
    if first.resume and glob.glob(os.path.join(glob.escape(folder), "nn", "*.pth")):
        first = replace(first, checkpoint=folder)
    source = first.checkpoint or first.init_from
    path, state = find_checkpoint(source) if source else ("", None)
    found = inherited_args(first, path, state) if source else {}
    if "env_id" not in found:
        found = {**task_settings(first), **found}
    args = parse_flags(argv, replace(Args(), **found))
    return replace(args, checkpoint=first.checkpoint), path, state


def inherited_args(first: Args, path: str, state: Dict[str, Any]) -> Dict[str, Any]:
    """The checkpoint's arguments. It chooses no code: module:factory must come from a flag."""
    names = vars(first).keys() - set(OWN_ARGS) if first.checkpoint else NETWORK_ARGS
    found = checked({k: v for k, v in state["args"].items() if k in names}, path)
    env_id = found.get("env_id", "")
    if ":" in env_id and first.env_id == Args.env_id:
        raise UserError(f"{path} was trained on your own env: repeat its flag, --env-id {env_id}")
    return found


def checked(values: Dict[str, Any], origin: str) -> Dict[str, Any]:
    """The values with Args' types. UserError if a name or a type is not one of Args."""
    types = {field.name: field.type for field in fields(Args)}
    found = {}
    for name, value in values.items():
        if name not in types:
            raise UserError(f"{origin} has an unknown argument: {name}")
        kind = type(getattr(Args, name))
        if (type(value), kind) in ((list, tuple), (int, float)):
            value = kind(value)
        choices = typing.get_args(types[name]) if kind is str else ()
        good = type(value) is kind and (not choices or value in choices)
        if not good or (kind is tuple and any(type(width) is not int for width in value)):
            raise UserError(f"{origin} has {name} = {str(value)[:40]!r}, which cannot be")
        found[name] = value
    return found


def main(argv: Optional[Sequence[str]] = None, observers: Sequence[AlgoObserver] = ()) -> None:
    """The command. `observers` are yours, called after RLGPUAlgoObserver and before W&B's."""
    warn.cache_clear()
    if "--version" in (sys.argv if argv is None else argv):
        return print(f"train_ppo.py {__version__}")
    try:
        try:
            args, path, state = parse_args(argv)
        except BrokenPipeError:  # --help | head
            sys.exit(1)
        wandb = [WandbAlgoObserver()] if args.track else []  # last: it sends what the others wrote
        observer = MultiObserver([RLGPUAlgoObserver(), *observers, *wandb], args.strict_observers)
        result = Runner(args, observer, path, state).run()
    except (UserError, TrainingError) as exc:
        if RANK == 0 or isinstance(exc, TrainingError):
            with contextlib.suppress(OSError, ValueError):
                print(f"error: {exc}", file=sys.stderr)
        sys.exit(2 if isinstance(exc, UserError) else 1)
    except KeyboardInterrupt:  # before or after training, or in --play
        sys.exit(128 + signal.SIGINT)
    finally:
        # At its exit Python would complain about a pipe that is gone, and change the exit code.
        for stream in filter(None, (sys.stdout, sys.stderr)):
            try:
                stream.flush()
            except (OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    code = exit_code(result.get("stop_signal", 0))
    if WORLD_SIZE > 1 and dist.is_initialized() and dist.get_backend() == "gloo":
        os._exit(code)  # all is written; with torch 2.4 gloo's threads may abort Python's own exit
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
