"""PPO for Isaac Gym in one file: train, log, save, continue.

    python train_ppo.py                                 train the built-in Cartpole, on any machine
    python train_ppo.py --env-id Ant --track            an IsaacGymEnvs task, logged to W&B too
    python train_ppo.py --env-id my_module:make_env     your own batched environment
    python train_ppo.py --checkpoint runs/NAME          continue a run where it stopped
    python tools/evaluate.py runs/NAME                  evaluate its policy
    torchrun --nproc-per-node=2 train_ppo.py            train on two GPUs

It computes what rl_games 1.6.1 computes, as benchmarks/fidelity.py shows. One epoch:

    env.step -> rollout -> gae -> make_batch -> update -> log, save
       ^           |                              |
       +- actions -+<-------- new weights --------+

`PPOAgent.train` is this diagram as code. Read from here to its end, and you know the algorithm.

    ARGUMENTS      Args
    NETWORK        RunningMeanStd, ActorCritic, the Gaussian policy; put another network here
    PPO            rollout, gae, make_batch, ppo_loss, update; PPOAgent with the loop
    PROCESSES      averages over several GPUs
    ENVIRONMENTS   Cartpole in plain torch, Isaac Gym, module:factory
    METRICS        what is measured, and its way to the console, TensorBoard and W&B
    CHECKPOINTS    what they hold, when they are written, how they are read
    RUNNER         run folder, stop signals, command line

Shapes: T = num_steps, E = num_envs, N = T * E, O = num_obs, A = num_acts; S = num_states, which is
0 unless the environment has privileged states for the critic.
"""

import atexit
import contextlib
import ctypes
import errno
import functools
import glob
import importlib
import io
import json
import math
import os
import pickle
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
import zipfile
from collections import defaultdict
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from typing import Any, Dict, List, Literal, NewType, Optional, Sequence, Tuple
from unittest import mock

import numpy as np

# isaacgym refuses to be imported after torch, so it comes first.
ISAACGYM_ERROR = ""
try:
    vars(np).setdefault("float", float)  # isaacgym uses np.float, which numpy 1.24 has removed
    import isaacgym  # noqa: F401
    import isaacgymenvs  # noqa: F401
except Exception as exc:  # most often: it is not installed
    ISAACGYM_ERROR = str(exc)

import torch
import torch.distributed as dist
import tyro
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.tensorboard import SummaryWriter

__version__ = "2.0.0"


class UserError(SystemExit):
    """A mistake that the user can mend: one line on stderr and exit code 1, without a traceback."""

    def __init__(self, message: str):
        super().__init__(f"error: {message}")


# ARGUMENTS ========================================================================================
# Where a value comes from, highest first: a flag; the checkpoint that is continued; the task's own
# settings (<Task>PPO.yaml of IsaacGymEnvs, SETTINGS of your module); the default below.
#
# The names are CleanRL's, and `rl_games:` says what a <Task>PPO.yaml calls the same thing. Defaults
# are those of CartpolePPO.yaml, except value_bootstrap, which is off there. A Count is at least 1,
# a Signed may be negative, any other number is at least 0.

Count = NewType("Count", int)
Signed = NewType("Signed", float)


@dataclass
class Args:
    # About this start of the program: never taken from a checkpoint.
    checkpoint: str = ""  # a run folder continues there, a .pth file starts a new run from there
    init_from: str = ""  # like --checkpoint, but only the weights: a new run from epoch 1
    resume: bool = False  # continue --experiment if that folder has a checkpoint, else start it
    experiment: str = ""  # name of the run's folder, made unique; empty: <env_id>_<date>_<time>
    train_dir: str = "runs"  # folder of all runs
    device: str = "auto"  # where simulation and policy run: auto, cpu, cuda, cuda:1
    torch_threads: int = 1  # CPU threads; 1 is safe beside other processes, 0 is torch's choice

    # From here on: taken from a run folder that is continued.
    track: bool = False  # log to Weights & Biases too; its own variables, WANDB_..., are obeyed
    wandb_project_name: str = "train_ppo"  # W&B project; WANDB_PROJECT wins
    wandb_entity: str = ""  # W&B team or user; empty: your default

    # From here on: also taken from a .pth file.
    env_id: str = "Cartpole"  # Cartpole, an IsaacGymEnvs task such as Ant, or module:factory
    sim: Literal["auto", "torch"] = "auto"  # of Cartpole; auto: isaacgym if it is installed
    overrides: Tuple[str, ...] = ()  # of IsaacGymEnvs' settings: train=NAME task.env.x=1
    num_envs: Count = 512  # parallel environments in each process (rl_games: num_actors)
    seed: int = 42  # of Python, numpy and torch; each process adds its rank
    torch_deterministic: bool = False  # use deterministic torch kernels only (slower on a GPU)
    headless: bool = True  # Isaac Gym without its viewer window
    max_epochs: Count = 100  # rollouts and updates in all, earlier parts of the run included
    save_frequency: int = 25  # epochs between the periodic checkpoints; 0: none
    save_best_after: int = 50  # first epoch that may write best.pth
    best_metric: str = ""  # tag that best.pth maximises, such as Episode/success; "": mean reward
    games_to_track: Count = 100  # finished episodes in the mean reward, at most
    strict_observers: bool = False  # an observer that raises ends training, for debugging it

    num_steps: Count = 16  # steps of each environment in a rollout (rl_games: horizon_length)
    minibatch_size: Count = 8192  # samples in a gradient step; a smaller rollout is one minibatch
    update_epochs: Count = 8  # passes over each rollout (rl_games: mini_epochs)
    learning_rate: float = 3e-4  # Adam's learning rate at the start
    lr_schedule: Literal["adaptive", "linear", "fixed"] = "adaptive"  # adaptive: rate follows KL
    schedule_type: Literal["legacy", "standard"] = "legacy"  # adapt after each minibatch, or pass
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
    value_bootstrap: bool = True  # at a time limit, add gamma * V(s_t) to the reward
    reward_scale: Signed = 0.1  # multiplies rewards before learning (rl_games: scale_value)
    clip_actions: bool = True  # clip actions to [-1, 1] on their way to the environment
    mixed_precision: bool = False  # bfloat16 autocast in the update; on CUDA only
    compile: bool = False  # torch.compile policy, loss and Cartpole; CUDA graphs on CUDA

    # From here on: also taken by --init-from, as they shape the network.
    normalize_input: bool = True  # normalise observations with running statistics
    normalize_value: bool = True  # normalise returns with running statistics
    units: Tuple[int, ...] = (32, 32)  # widths of the hidden layers
    activation: Literal["elu", "relu", "tanh", "selu", "gelu", "swish"] = "elu"  # of hidden layers
    separate: bool = False  # give the value function hidden layers of its own
    critic_units: Tuple[int, ...] = ()  # widths of the critic's own layers; empty: as --units
    sigma_init: Signed = 0.0  # log standard deviation of the actions at the start


# NETWORK ==========================================================================================
# Parameters have rl_games' names and order, so a checkpoint, optimizer state included, can move
# between the two. For a CNN or a transformer change ActorCritic: observations stay flat (O,), and
# `forward` may reshape them.


class RunningMeanStd(nn.Module):
    """Mean and variance of everything seen so far, in float64; at first count 1, mean 0, var 1."""

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


class TransposedLinear(nn.Linear):
    """nn.Linear on a transposed copy of its weights: on a CPU, with few inputs, their gradient is
    seven times faster."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return super().forward(x)
        return torch.addmm(self.bias, x, self.weight.t().contiguous())


class ActorCritic(nn.Module):
    """Gaussian policy and value function on an MLP (rl_games: continuous_a2c_logstd). The standard
    deviation is the same in every state: one learned logarithm for each action.

    An environment may have S = num_states numbers for the critic that the actor must do without,
    such as friction. They follow the observation in its row, obs (n, O + S). The critic then has
    layers of its own, and its input is the states without the observation."""

    ACTIVATIONS = dict(relu=nn.ReLU, tanh=nn.Tanh, selu=nn.SELU, gelu=nn.GELU, swish=nn.SiLU)
    ACTIVATIONS["elu"] = functools.partial(nn.ELU, inplace=True)  # so its gradient needs no exp

    def __init__(self, num_obs: int, num_acts: int, args: Args, num_states: int = 0):
        super().__init__()
        self.num_obs = num_obs
        self.num_states = num_states
        self.separate = args.separate or num_states > 0
        self.a2c_network = net = nn.Module()
        net.sigma = nn.Parameter(torch.full((num_acts,), args.sigma_init))  # the LOG std
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
            layers += [TransposedLinear(size, width), self.ACTIVATIONS[args.activation]()]
            size = width
        return nn.Sequential(*layers), size

    def forward(self, obs: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Observations (n, O + S) -> mean action (n, A), log std (n, A), normalised value (n,)."""
        net = self.a2c_network
        actor_obs = self.running_mean_std(obs[:, : self.num_obs])
        features = net.actor_mlp(actor_obs)
        mu = net.mu(features)
        if self.num_states:
            features = net.critic_mlp(self.state_mean_std(obs[:, self.num_obs :]))
        elif self.separate:
            features = net.critic_mlp(actor_obs)
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
        values = self.denormalize_value(value)
        return dict(actions=actions, logprobs=logprobs, mus=mu, sigmas=sigma, values=values)

    @torch.no_grad()
    def value(self, obs: Tensor) -> Tensor:
        """Observations (n, O + S) -> value in units of the scaled reward (n,)."""
        return self.denormalize_value(self(obs)[2])

    def denormalize_value(self, value: Tensor) -> Tensor:
        return value if self.value_mean_std is None else self.value_mean_std.denormalize(value)


# The policy's distribution: a diagonal Gaussian, sigma = exp(logstd), that `act` samples.


def log_prob(action: Tensor, mu: Tensor, sigma: Tensor, logstd: Tensor) -> Tensor:
    """Log density of actions: four (n, A) -> (n,)."""
    z = (action - mu) / sigma
    constant = 0.5 * math.log(2.0 * math.pi) * mu.shape[-1]
    return -(0.5 * z.square().sum(-1) + constant + logstd.sum(-1))


def mean_entropy(logstd: Tensor) -> Tensor:
    """Mean entropy: (n, A) -> ()."""
    return (0.5 + 0.5 * math.log(2.0 * math.pi) + logstd).sum(-1).mean()


def mean_kl(mu: Tensor, sigma: Tensor, old_mu: Tensor, old_sigma: Tensor) -> Tensor:
    """Mean KL(new || old), four (n, A) -> (), with rl_games' 1e-5 terms."""
    log_ratio = (old_sigma / sigma + 1e-5).log()
    distance = (sigma.square() + (mu - old_mu).square()) / (2.0 * (old_sigma.square() + 1e-5))
    return (log_ratio + distance - 0.5).sum(-1).mean()


# PPO, with rl_games' details ======================================================================
# Schulman et al. 2017 (PPO): arxiv.org/abs/1707.06347, Schulman et al. 2015 (GAE): 1506.02438,
# Pardo et al. 2018 (time limits): 1712.00378, Andrychowicz et al. 2020 (what matters): 2006.05990,
# Makoviychuk et al. 2021 (Isaac Gym): 2108.10470, Rudin et al. 2021 (many envs): 2109.11978
#
# The units of a reward or value: raw, as the env gives it; scaled = raw * reward_scale, for GAE;
# normalised = (scaled - mean) / std by value_mean_std, for the value loss.


@torch.no_grad()
def rollout(policy, env, obs: Tensor, buffer: Dict[str, Tensor], args: Args, after_step):
    """Take num_steps steps in every environment, starting from obs (E, O + S), and fill the buffer
    with what the policy and the env give: name -> (T, E, ...). `policy` is ActorCritic.act;
    after_step(infos, dones) is called after each step. Returns the observations after the last
    step (E, O + S) and the seconds that the environment took."""
    env_seconds = 0.0
    for t in range(args.num_steps):
        decision = policy(obs, torch.randn(env.num_envs, env.num_acts, device=obs.device))
        actions = decision["actions"]
        start = time.perf_counter()
        # A copy in either case, because the env may change it in place.
        step = env.step(actions.clamp(-1.0, 1.0) if args.clip_actions else actions.clone())
        env_seconds += time.perf_counter() - start

        next_obs, rewards, dones, time_outs, infos = read_step(step, env, obs.device)
        signals = dict(rewards=rewards, dones=dones.float(), time_outs=time_outs.float())
        for name, value in dict(decision, obs=obs, **signals).items():
            if name not in buffer:  # in the first step of a run
                buffer[name] = value.new_empty(args.num_steps, *value.shape)
            buffer[name][t] = value
        after_step(infos, dones)
        obs = next_obs
    return obs, env_seconds


def scale_and_bootstrap(buffer: Dict[str, Tensor], args: Args) -> Tensor:
    """The rewards that PPO learns from (T, E): scaled and, at a time limit, with gamma * V(s_t) in
    place of the future that was cut off (Pardo et al. 2018). V(s_t+1) would be right, but there
    some tasks return the next episode's observation, so this uses V(s_t), as rl_games does."""
    rewards = args.reward_scale * buffer["rewards"]
    if args.value_bootstrap:
        rewards = rewards + args.gamma * buffer["values"] * buffer["time_outs"]
    return rewards


def gae(rewards: Tensor, values: Tensor, dones: Tensor, last_value: Tensor, args: Args) -> Tensor:
    """Advantages (T, E) by generalised advantage estimation (Schulman et al. 2015, eq. 16) from
    scaled rewards, values and dones (T, E), and the value of the state after the rollout (E,):

        delta_t = r_t + gamma * V(s_t+1) * (1 - done_t) - V(s_t)
        A_t     = delta_t + gamma * lambda * (1 - done_t) * A_t+1

    done_t is 1 if the episode ended with step t. A time limit's bootstrap is in r_t already."""
    not_done = 1.0 - dones
    decay = args.gamma * args.gae_lambda * not_done
    next_values = torch.cat((values[1:], last_value.unsqueeze(0)))
    advantages = rewards + args.gamma * next_values * not_done - values  # delta_t, at first
    for t in reversed(range(len(rewards) - 1)):
        advantages[t] += decay[t] * advantages[t + 1]
    return advantages


# A rollout as rows, or a minibatch of them. Its columns:
#
#     obs         (n, O + S)  as the environment gave them
#     actions     (n, A)      as sampled, before clipping
#     logprobs    (n,)        of the actions, when they were taken
#     values      (n,)        as predicted in the rollout
#     returns     (n,)        what the value function learns: advantages + values
#     advantages  (n,)        how much better the action was than expected
#     mus         (n, A)      mean actions when last trained on; in the first pass, when sampled
#     sigmas      (n, A)      and their standard deviations
#
# and the rollout's rewards, dones and time_outs (n,), which the update does not use.
Batch = Dict[str, Tensor]


def make_batch(buffer: Dict[str, Tensor], advantages: Tensor) -> Batch:
    """A rollout and its advantages (T, E) as N rows, and the returns that follow from them."""
    returns = advantages + buffer["values"]
    # Subtracting the values again looks redundant, but rounds as rl_games does, to the last bit.
    columns = dict(buffer, returns=returns, advantages=returns - buffer["values"])
    # (T, E, ...) -> (N, ...), one environment after the other, as rl_games has them. With thousands
    # of environments a contiguous piece is mixed enough, and nothing is shuffled.
    return {name: x.transpose(0, 1).flatten(0, 1) for name, x in columns.items()}


def normalize_batch(model: ActorCritic, batch: Batch, args: Args) -> Batch:
    """The batch with normalised values, returns and advantages; also updates value_mean_std."""
    values, returns, advantages = batch["values"], batch["returns"], batch["advantages"]
    if args.normalize_value:  # update with values, then with returns: the returns see both
        model.value_mean_std.update(values.unsqueeze(1))
        values = model.value_mean_std(values)
        model.value_mean_std.update(returns.unsqueeze(1))
        returns = model.value_mean_std(returns)
    if args.norm_adv:  # over the whole rollout; CleanRL does it in each minibatch
        mean, var = mean_and_var(advantages)
        advantages = (advantages - mean) / (var.sqrt() + 1e-8)
    return dict(batch, values=values, returns=returns, advantages=advantages)


def ppo_loss(model: ActorCritic, batch: Batch, args: Args) -> Tuple[Any, ...]:
    """The loss to minimise (), mu and sigma of the policy (n, A), and a dict of scalars to log,
    under rl_games' names; "kl" is the divergence from the policy of the previous pass. The policy
    is improved by the clipped surrogate (Schulman et al. 2017, equation 7):

        L_clip = mean(min(ratio * A, clip(ratio, 1 - clip_coef, 1 + clip_coef) * A))

    with ratio = p(action now) / p(action when sampled)."""
    mu, logstd, value = model(batch["obs"])
    mu, value = mu.float(), value.float()  # bfloat16 is too coarse for ratios near 1
    sigma = logstd.exp()

    # Once the ratio has left the clip range in the direction that pays, the gradient is zero, so
    # several passes cannot run off with the policy. (torch.where has a faster gradient than min.)
    ratio = (log_prob(batch["actions"], mu, sigma, logstd) - batch["logprobs"]).exp()
    clipped_ratio = ratio.detach().clamp(1.0 - args.clip_coef, 1.0 + args.clip_coef)
    surrogate = batch["advantages"] * ratio
    clipped = batch["advantages"] * clipped_ratio
    policy_loss = -torch.where(surrogate > clipped, clipped, surrogate).mean()

    # Moving a value more than clip_coef, in normalised units, from the old one gains nothing.
    # rl_games and the original code clip so; Andrychowicz et al. 2020 found that it does not help.
    value_loss = (value - batch["returns"]).square()
    if args.clip_vloss:
        change = (value - batch["values"]).clamp(-args.clip_coef, args.clip_coef)
        clipped_loss = (batch["values"] + change - batch["returns"]).square()
        value_loss = torch.where(value_loss > clipped_loss, value_loss, clipped_loss)
    value_loss = value_loss.mean()

    entropy = mean_entropy(logstd)
    # Beyond [-1, 1] actions are clipped on their way to the environment, so the reward cannot bring
    # a mean back. This loss does.
    bounds_loss = nn.functional.softshrink(mu, 1.1).square().sum(-1).mean()

    loss = policy_loss + 0.5 * args.vf_coef * value_loss
    loss = loss - args.ent_coef * entropy + args.bounds_loss_coef * bounds_loss
    losses = dict(a_loss=policy_loss, c_loss=value_loss, entropy=entropy, bounds_loss=bounds_loss)
    mu, sigma = mu.detach(), sigma.detach()
    losses["clipfrac"] = (ratio != clipped_ratio).float().mean()
    losses["kl"] = mean_kl(mu, sigma, batch["mus"], batch["sigmas"])
    return loss, mu, sigma, {name: x.detach() for name, x in losses.items()}


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


def update(model, optimizer, lr: Tensor, batch: Batch, epoch: int, args: Args, loss_fn):
    """Pass over the batch update_epochs times, with a gradient step for each minibatch; changes the
    learning rate lr () in place. Returns the means of ppo_loss' losses over all steps, by name."""
    batch = normalize_batch(model, batch, args)
    count = max(1, len(batch["obs"]) // args.minibatch_size)
    pieces = {name: x.split(len(x) // count) for name, x in batch.items()}
    minibatches = [{name: x[i] for name, x in pieces.items()} for i in range(count)]
    parameters = list(model.parameters())
    totals = torch.zeros((), device=lr.device)
    autocast = args.mixed_precision and lr.device.type == "cuda"
    for pass_number in range(args.update_epochs):
        pass_kl = torch.zeros_like(lr)
        for minibatch in minibatches:
            # The first pass alone updates the statistics of the observations, so that later passes
            # see inputs that stand still.
            if args.normalize_input and pass_number == 0:
                model.update_statistics(minibatch["obs"])
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                loss, mu, sigma, losses = loss_fn(model, minibatch, args)
            optimizer.zero_grad()
            loss.backward()

            # This writes into the batch, of which a minibatch is a view: the next pass over these
            # rows measures the KL divergence from here.
            minibatch["mus"].copy_(mu)
            minibatch["sigmas"].copy_(sigma)
            kl = average_gradients(parameters, losses["kl"])
            if args.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()

            totals = totals + torch.stack(tuple(losses.values()))
            pass_kl += kl / len(minibatches)
            if args.schedule_type == "legacy":
                lr.copy_(next_lr(lr, kl, epoch, args))
        if args.schedule_type == "standard":
            lr.copy_(next_lr(lr, pass_kl, epoch, args))
    return dict(zip(losses, totals / (args.update_epochs * len(minibatches))))


class PPOAgent:
    """A training run: model, optimizer, rollout buffer and counters. `train` is the outline of PPO.
    Observers may read all of it; attributes that rl_games also has keep its names."""

    def __init__(self, args: Args, env, observer: "MultiObserver"):
        self.args = args
        self.env = env
        self.algo_observer = observer
        self.device = self.ppo_device = pick_device(args.device)
        self.games_to_track = args.games_to_track
        self.num_agents = 1
        self.num_states = int(getattr(env, "num_states", None) or 0)
        self.max_episode_length = int(getattr(env, "max_episode_length", None) or 0)  # 0: unknown
        self.config: Dict[str, Any] = {}  # arguments and run folder for observers, see open_run
        self.writer: Optional[Writer] = None  # of rank 0
        self.epoch_num = 0  # the epoch that is running, or else the last one
        self.first_epoch = 0  # epoch_num when the environments last started afresh
        self.frame = 0  # steps of single environments so far, over all processes
        self.frames_per_epoch = args.num_steps * env.num_envs * WORLD_SIZE
        self.total_time = 0.0  # seconds of training
        self.mean_rewards = -math.inf  # of about the last games_to_track episodes
        self.best_score = -math.inf  # what best.pth has
        self.best_epoch = 0
        self.best: Dict[str, Any] = {}  # the state for best.pth, until it is written
        self.save_time = -math.inf  # when a file was last saved
        self.stop_signal = 0  # the number of the signal that asked to stop after this epoch
        self.policy_metadata = getattr(env, "policy_metadata", dict)()

        self.model = ActorCritic(env.num_obs, env.num_acts, args, self.num_states).to(self.device)
        # The learning rate is a tensor, which the fused optimizer reads without waiting for a GPU.
        self.lr = torch.tensor(args.learning_rate, device=self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.lr, eps=1e-8, fused=True)
        self.act, self.loss_fn = self.model.act, ppo_loss
        if args.compile:
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self.act = torch.compile(self.act, mode=mode)
            self.loss_fn = torch.compile(self.loss_fn, mode=mode)
            if getattr(env, "compilable", False):  # with the same random numbers as uncompiled
                env.step = torch.compile(env.step, options=dict(fallback_random=True))

        self.buffer: Dict[str, Tensor] = {}
        self.episodes = EpisodeMeter(env.num_envs, args.games_to_track, 3, self.device)
        self.obs = read_obs(env.reset(), env, self.device)
        self.dones = torch.zeros(env.num_envs, dtype=torch.bool, device=self.device)

    @property
    def last_mean_rewards(self) -> float:
        return self.best_score  # by rl_games' name

    def train(self) -> None:
        """Train until max_epochs or a stop signal."""
        args, env, model, buffer = self.args, self.env, self.model, self.buffer
        stop = False
        while self.epoch_num < args.max_epochs and not stop:
            self.epoch_num += 1
            start = time.perf_counter()
            try:
                if hasattr(env, "set_train_info"):
                    env.set_train_info(self.frame, self)
                after_step = self.after_step
                self.obs, step_time = rollout(self.act, env, self.obs, buffer, args, after_step)
                check_finite(buffer, self.obs, self.epoch_num)
            except BaseException:  # a simulator may call sys.exit, too
                self.epoch_num -= 1  # the weights are still those of the last epoch
                save(self, "last.pth", mid_rollout=True)
                raise
            play_time = time.perf_counter() - start
            self.algo_observer.call("after_steps")

            rewards = scale_and_bootstrap(buffer, args)
            last_value = model.value(self.obs)
            advantages = gae(rewards, buffer["values"], buffer["dones"], last_value, args)
            batch = make_batch(buffer, advantages)
            optimizer, lr, epoch = self.optimizer, self.lr, self.epoch_num
            losses = update(model, optimizer, lr, batch, epoch, args, self.loss_fn)
            sums = (buffer["rewards"], rewards, torch.ones_like(rewards))
            self.episodes.add_rollout(sums, buffer["dones"])
            metrics = collect_metrics(self, losses, batch)
            stop = metrics["stop"] > 0

            epoch_time = time.perf_counter() - start
            self.total_time += epoch_time
            self.frame += self.frames_per_epoch
            if RANK == 0:
                score = log_epoch(self, metrics, step_time, play_time, epoch_time)
                save_checkpoints(self, score, metrics["finished"])

    def after_step(self, infos: Dict[str, Any], dones: Tensor) -> None:
        """Hand a step of the rollout to the observers."""
        self.dones = dones
        # Finding the indices makes a GPU wait, so it is done only if someone looks at them.
        indices = dones.nonzero() if self.algo_observer.needs_done_indices else None
        self.algo_observer.call("process_infos", infos, indices)


# PROCESSES ========================================================================================
# Several GPUs: torchrun starts WORLD_SIZE processes, numbered by RANK, each with environments and
# a seed of its own. All start from rank 0's weights. Gradients, statistics and metrics are
# averaged, so all take the same steps and decisions. Rank 0 alone prints, logs and saves.

RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def average(x: Tensor) -> Tensor:
    """The mean of x over all processes. With one process it is x itself."""
    if WORLD_SIZE == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / WORLD_SIZE


def average_gradients(parameters: Sequence[Tensor], kl: Tensor) -> Tensor:
    """Average the gradients over the processes, in one message with the KL divergence ()."""
    if WORLD_SIZE == 1:
        return kl
    gradients = [p.grad for p in parameters if p.grad is not None]
    message = average(torch.cat([kl.view(1), *(g.flatten() for g in gradients)]))
    nn.utils.vector_to_parameters(message[1:], gradients)
    return message[0]


def mean_and_var(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Mean and unbiased variance of the rows of x (n, ...), over the rows of all processes."""
    n, mean, var = len(x), x.mean(0), x.var(0)
    if WORLD_SIZE == 1:
        return mean, var
    common_mean = average(mean)
    squares = average(var * (n - 1) + n * (mean - common_mean).square())
    return common_mean, squares * WORLD_SIZE / (n * WORLD_SIZE - 1)


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
#     exact_state = True            get_env_state() is the complete state: a run resumes bit for bit
#     compilable = True             step() is torch operations alone, and --compile compiles it


class Cartpole:
    """IsaacGymEnvs' Cartpole task with its physics written out in torch, as one batch.

    State and observation: cart position [m] and velocity [m/s], pole angle from upright [rad] and
    angular velocity [rad/s]. Action: force on the cart in units of 400 N. As in the original, the
    step after done = 1 ignores the action, resets that environment and returns its first
    observation. A step never waits for a GPU."""

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
        """The current observations. As in IsaacGymEnvs it is the first step that resets."""
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


def make_env(args: Args, seed: int):
    """The environment of --env-id. Call it once: Isaac Gym allows one simulation per process."""
    device = pick_device(args.device)
    if ":" in args.env_id:
        module, _, name = args.env_id.partition(":")
        factory = getattr(import_env_module(args.env_id), name, None)
        if factory is None:
            raise UserError(f"--env-id {args.env_id}: {module} has no {name}")
        env = factory(num_envs=args.num_envs, device=str(device), seed=seed)
        check_env(env, args, device)
        return env
    if not uses_isaacgym(args):
        return Cartpole(args.num_envs, device)
    import isaacgymenvs

    cfg = compose_isaacgym_config(replace(args, seed=seed), args.num_envs)
    names = ("sim_device", "rl_device", "graphics_device_id", "headless")
    settings = dict({name: cfg[name] for name in names}, force_render=not args.headless, cfg=cfg)
    env = isaacgymenvs.make(seed, args.env_id, args.num_envs, **settings)
    if not cfg.train.params.config.get("central_value_config"):
        env.num_states = 0  # rl_games ignores them then, and in AllegroKuka they are all zero
    elif not env.num_states:
        raise UserError(f"{args.env_id} has no states for its central value network")
    return env


def check_env(env, args: Args, device: torch.device) -> None:
    """UserError unless what a reset and a step return has the shapes of the contract above."""
    n, width = args.num_envs, env.num_obs + (getattr(env, "num_states", None) or 0)
    first = read_obs(env.reset(), env, device)
    obs, reward, done, infos = env.step(torch.zeros(n, env.num_acts, device=device))
    parts = (first, read_obs(obs, env, device), reward, done, infos.get("time_outs", done))
    found = [tuple(part.shape) for part in parts]
    expected = [(n, width), (n, width), (n,), (n,), (n,)]
    if found != expected:
        what = "reset()'s obs, step()'s obs (both with states), reward, done and time_outs"
        raise UserError(f"the env's {what} have the shapes {found} instead of {expected}")
    if "time_outs" not in infos and getattr(env, "max_episode_length", None):
        warn("without infos['time_outs'], episodes cut at max_episode_length count as failed")


def read_step(step, env, device: torch.device) -> Tuple[Any, ...]:
    """What env.step returned, as the rollout needs it: observations (E, O + S), rewards (E,), dones
    and time_outs (E,) as bool, and infos."""
    obs, rewards, dones, infos = step
    dones = dones.to(device, torch.bool, copy=True)  # observers keep it; it may be the env's own
    time_outs = infos.get("time_outs", torch.zeros_like(dones)).to(device, torch.bool)
    return read_obs(obs, env, device), rewards.to(device, torch.float32), dones, time_outs, infos


def read_obs(obs: Dict[str, Tensor], env, device: torch.device) -> Tensor:
    """A copy of the observations and, where the env has them, the states for the critic as
    (E, O + S)."""
    names = ("obs", "states") if getattr(env, "num_states", None) else ("obs",)
    return torch.cat([obs[name].to(device, torch.float32) for name in names], dim=1)


def import_env_module(env_id: str):
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        return importlib.import_module(env_id.partition(":")[0])
    except ModuleNotFoundError as exc:
        raise UserError(f"--env-id {env_id} cannot be imported here: {exc}") from exc


def uses_isaacgym(args: Args) -> bool:
    """Whether Isaac Gym simulates this task. Without it there is the built-in Cartpole."""
    if args.env_id == "Cartpole" and (args.sim == "torch" or ISAACGYM_ERROR):
        return False
    if ISAACGYM_ERROR:
        raise UserError(f"--env-id {args.env_id} needs Isaac Gym, which fails: {ISAACGYM_ERROR}")
    return True


def compose_isaacgym_config(args: Args, num_envs: Any):
    """The task's hydra config as IsaacGymEnvs composes it; num_envs "" means the task's number."""
    import hydra
    import isaacgymenvs  # registers the resolvers that its yaml files use

    folder = os.path.join(os.path.dirname(os.path.abspath(isaacgymenvs.__file__)), "cfg")
    device = pick_device(args.device)
    # sim_device alone is not enough: the pipeline and physx.use_gpu are the config's to decide.
    overrides = f"task={args.env_id} num_envs={num_envs} seed={args.seed} headless={args.headless}"
    overrides += f" sim_device={device} rl_device={device} graphics_device_id={device.index or 0}"
    overrides += " pipeline=gpu" if device.type == "cuda" else " pipeline=cpu"
    try:
        with hydra.initialize_config_dir(config_dir=folder, version_base=None):
            return hydra.compose("config", [*overrides.split(), *args.overrides])
    except (hydra.errors.HydraException, ValueError) as exc:
        files = sorted(glob.glob(os.path.join(folder, "train", "*PPO.yaml")))
        tasks = ", ".join(os.path.basename(file)[:-8] for file in files)
        what = f"{args.env_id} {' '.join(args.overrides)}: {str(exc).splitlines()[0]}"
        raise UserError(f"{what}; tasks are {tasks}") from exc


# rl_games' names of our arguments in `config` of a <Task>PPO.yaml, and the places of others.
RL_GAMES_NAMES = dict(num_actors="num_envs", horizon_length="num_steps", tau="gae_lambda")
RL_GAMES_NAMES.update(mini_epochs="update_epochs", e_clip="clip_coef", clip_value="clip_vloss")
RL_GAMES_NAMES.update(critic_coef="vf_coef", entropy_coef="ent_coef", grad_norm="max_grad_norm")
RL_GAMES_NAMES.update(normalize_advantage="norm_adv")
PLACES = {
    "config.reward_shaper.scale_value": "reward_scale",
    "network.mlp.units": "units",
    "network.mlp.activation": "activation",
    "network.separate": "separate",
    "network.space.continuous.sigma_init.val": "sigma_init",
    "central.network.mlp.units": "critic_units",  # central: config.central_value_config
}
# Settings that are supported with one value alone, by the last two words of their place. Any other
# key in a network or a reward_shaper is refused.
REQUIRED = {
    "algo.name": "a2c_continuous",
    "model.name": "continuous_a2c_logstd",
    "network.name": "actor_critic",
    "network.central_value": True,
    "initializer.name": "default",
    "mu_init.name": "default",
    "sigma_init.name": "const_initializer",
    "continuous.fixed_sigma": True,
    "reward_shaper.shift_value": 0,
    "config.ppo": True,
    "config.bound_loss_type": "bound",
}
OFF = "weight_decay minibatch_size_per_env use_smooth_clamp normalize_rms_advantage".split()
REQUIRED.update({f"config.{key}": 0 for key in (*OFF, "schedule_entropy")})  # 0 is False, too
HARMLESS = "name full_experiment_name env_name multi_gpu print_stats player seq_len".split()


def flatten(tree: Any, separator: str, prefix: str = "") -> Dict[str, Any]:
    """{"a": {"b": 1, "c": None}} -> {"a.b": 1}, with the separator "."."""
    flat = {}
    for key, value in tree.items():
        if hasattr(value, "items"):
            flat.update(flatten(value, separator, f"{prefix}{key}{separator}"))
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def settings_from_yaml(params: Dict[str, Any], task: str) -> Dict[str, Any]:
    """Arguments from a <Task>PPO.yaml. UserError if it asks for something this file cannot do."""
    settings: Dict[str, Any] = dict(units=[], reward_scale=1.0, bounds_loss_coef=0.0)
    settings.update(save_best_after=100, value_bootstrap=False, normalize_value=False)
    config = dict(params["config"])
    central = {"central": config.pop("central_value_config", None) or {}}
    flat = flatten({**params, "config": config, **central}, ".")
    if not flat.pop("config.truncate_grads", False):
        flat["config.grad_norm"] = 0.0
    if flat.get("config.lr_schedule") not in ("adaptive", "linear"):  # constant, identity ...
        flat["config.lr_schedule"] = "fixed"
    # The critic has the actor's activation.
    required = {**REQUIRED, "mlp.activation": flat.get("network.mlp.activation")}
    refused, unused = [], []
    for path, value in flat.items():
        words = path.split(".")
        name = PLACES.get(path) or RL_GAMES_NAMES.get(words[-1], words[-1])
        requirement = ".".join(words[-2:])
        if path in PLACES or (path == f"config.{words[-1]}" and name in passed_on("env_id")):
            settings[name] = value
        elif requirement in required:
            if value != required[requirement]:
                refused.append(f"{path} = {value}")
        elif "network" in words or "reward_shaper" in words:
            if value is not False and value != "None":
                refused.append(f"{path} = {value}")
        elif words[0] in ("config", "central") and words[1] not in HARMLESS:
            unused.append(path.replace("config.", ""))
    if refused:
        what = f"{task} cannot be trained: its settings ask for {', '.join(refused)}"
        raise UserError(f"{what}; apply recipes/lstm.patch" if "rnn.name = lstm" in what else what)
    if unused:
        log(f"settings of {task} that are not used here: {', '.join(unused)}")
    return settings


def pick_device(name: str) -> torch.device:
    """The device of --device. UserError if torch does not know it or does not see it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=f"cuda:{LOCAL_RANK}" if name == "cuda" else name).device
    except (AssertionError, RuntimeError) as exc:
        raise UserError(f"--device {name} cannot be used: {str(exc).splitlines()[0]}") from exc


# METRICS ==========================================================================================
# A reward: env.step -> rollout -> buffer -> EpisodeMeter.add_rollout (its sum over the episode) ->
#           collect_metrics (mean of the last episodes) -> log_epoch -> Writer.add_scalar
# infos:    env.step -> PPOAgent.after_step -> RLGPUAlgoObserver -> Writer.add_scalar
# Writer:   -> TensorBoard; and all scalars of the epoch -> WandbAlgoObserver.after_print_stats
# For another backend write an AlgoObserver (examples/own_observer.py): main(observers=[Mine()]).

EPISODE_SUMS = ("rewards", "shaped_rewards", "episode_lengths")  # rl_games' names in the log


class EpisodeMeter:
    """Sums of `width` quantities over the running episodes, and their mean over about the last
    `size` finished ones. As in rl_games' AverageMeter the n episodes that end in one step enter
    together, as their mean with the weight min(n, size), in place of as many older ones."""

    def __init__(self, num_envs: int, size: int, width: int, device: torch.device):
        self.size = size
        self.running = torch.zeros(num_envs, width, device=device)
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.count = 0  # episodes in the mean

    def add_rollout(self, quantities: Sequence[Tensor], dones: Tensor) -> Tensor:
        """Add `width` tensors (T, E) and dones (T, E). Returns the sums of the episodes that ended
        (n, width). Waits for a GPU: call it once an epoch."""
        sums = torch.stack(tuple(quantities), dim=-1)
        ended = dones.bool()
        for t in range(len(sums)):
            self.running += sums[t]
            sums[t] = self.running
            self.running.masked_fill_(ended[t].unsqueeze(1), 0.0)
        totals = sums.masked_fill(~ended.unsqueeze(-1), 0.0).sum(1).double().cpu()
        for total, n in zip(totals, ended.sum(1).tolist()):
            weight = min(n, self.size)
            kept = min(self.count, self.size - weight)
            if n > 0:
                self.mean = (self.mean * kept + total / n * weight) / (kept + weight)
                self.count = kept + weight
        return sums[ended]


def check_finite(buffer: Dict[str, Tensor], obs: Tensor, epoch: int) -> None:
    """UserError, in all processes, before NaN or Inf of a rollout reach the weights."""
    columns = {"obs": buffer["obs"], "next obs": obs.unsqueeze(0), **buffer}
    sums = torch.stack([x.sum() for x in columns.values()])  # quicker than looking at each number
    if average(sums.isfinite().all().float()) == 1.0:
        return
    for name, x in columns.items():
        bad_envs = (~x.isfinite()).transpose(0, 1).flatten(1).any(1)  # (E,)
        if bad_envs.any():
            where = f"{name} of {int(bad_envs.sum())} of {len(bad_envs)} envs"
            raise UserError(f"NaN or Inf in {where}, epoch {epoch}")
    raise UserError(f"NaN or Inf in another process, epoch {epoch}")


def collect_metrics(agent: PPOAgent, losses: Dict[str, Tensor], batch: Batch) -> Dict[str, float]:
    """The epoch's metrics by their tags, averaged over the processes, in one transfer from the
    device. UserError if the update went wrong."""
    episodes, tensor = agent.episodes, agent.lr.new_tensor
    returns, errors = batch["returns"], batch["returns"] - batch["values"]
    tensors = {f"losses/{name}": x for name, x in losses.items()}
    tensors["losses/explained_variance"] = 1.0 - errors.var() / returns.var().clamp(min=1e-8)
    tensors["info/kl"] = tensors.pop("losses/kl")
    weights = agent.model.state_dict().values()  # and statistics
    tensors["weights"] = torch.stack([x.float().sum() for x in weights]).sum()
    tensors["info/last_lr"] = agent.lr
    tensors.update(zip(EPISODE_SUMS, tensor((episodes.mean * episodes.count).tolist())))
    tensors.update(finished=tensor(episodes.count), stop=tensor(agent.stop_signal))
    averages = average(torch.stack(list(tensors.values()))).tolist()
    metrics = dict(zip(tensors, averages))
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise UserError(f"NaN or Inf in {', '.join(bad)} of the update, epoch {agent.epoch_num}")
    if metrics["finished"]:
        for name in EPISODE_SUMS:
            metrics[name] /= metrics["finished"]
        agent.mean_rewards = metrics["rewards"]
    if metrics["stop"] and not agent.stop_signal:  # another process got a signal
        agent.stop_signal = signal.SIGTERM
    return metrics


def log_epoch(agent: PPOAgent, metrics, step_time: float, play_time: float, epoch_time: float):
    """Write the epoch's scalars under rl_games' tags, call the observers, print a line. Returns the
    score for best.pth: the mean reward or best_metric; nan if this epoch has not logged it."""
    args, epoch, frame, writer = agent.args, agent.epoch_num, agent.frame, agent.writer
    scalars = {tag: value for tag, value in metrics.items() if "/" in tag}
    scalars.update({"info/lr_mul": 1.0, "info/e_clip": args.clip_coef, "info/epochs": epoch})
    times = dict(step=step_time, step_inference=play_time, step_inference_rl_update=epoch_time)
    scalars.update({f"performance/{k}_fps": agent.frames_per_epoch / t for k, t in times.items()})
    scalars["performance/step_time"] = step_time
    scalars["performance/step_inference_time"] = play_time
    scalars["performance/rl_update_time"] = epoch_time - play_time
    for tag, value in scalars.items():
        writer.add_scalar(tag, value, frame)
    reward = "no episode finished yet"
    if metrics["finished"]:
        for name in EPISODE_SUMS:
            writer.add_on_axes(name, metrics[name], step=frame, iter=epoch, time=agent.total_time)
        reward = f"reward {metrics['rewards']:.2f} length {metrics['episode_lengths']:.1f}"
    agent.algo_observer.call("after_print_stats", frame, epoch, agent.total_time)
    score = writer.scalars.get(args.best_metric or "rewards/step", math.nan)
    if metrics["finished"] and math.isnan(score):
        warn(f"--best-metric {args.best_metric} was not logged: TensorBoard shows the tags")
    writer.end_epoch()
    left = timedelta(seconds=int(epoch_time * (args.max_epochs - epoch)))
    rates = f"lr {metrics['info/last_lr']:.1e} fps {agent.frames_per_epoch / epoch_time:,.0f}"
    log(f"epoch {epoch}/{args.max_epochs} {reward} left {left} {rates}")
    return score


class Writer(SummaryWriter):
    """A SummaryWriter that remembers the scalars of an epoch, whoever wrote them."""

    def __init__(self, run_dir: str, args: Args):
        super().__init__(os.path.join(run_dir, "summaries"))
        rows = [f"|{name}|{value}|" for name, value in asdict(args).items()]
        self.add_text("arguments", "\n".join(["|argument|value|", "|-|-|", *rows]))
        self.scalars: Dict[str, float] = {}  # tag -> value
        self.steps: Dict[str, Any] = {}  # tag -> global_step
        self.events = defaultdict(list)  # step -> what TensorBoard gets for it

    def add_scalar(self, tag, scalar_value, global_step=None, *args, **kwargs) -> None:
        self.scalars[tag] = float(scalar_value)
        self.steps[tag] = global_step
        value = Summary.Value(tag=tag, simple_value=self.scalars[tag])
        self.events[int(global_step or 0)].append(value)

    def end_epoch(self) -> None:
        """Write the scalars. One event for all of a step is ten times cheaper than one for each."""
        with contextlib.suppress(OSError):  # a full disk must not end training here
            for step, values in self.events.items():
                self.file_writer.add_summary(Summary(value=values), step)
        self.events.clear()
        self.scalars.clear()

    def add_on_axes(self, name: str, value: float, **steps: float) -> None:
        """A scalar over several x-axes: one tag for each."""
        for axis, step in steps.items():
            self.add_scalar(f"{name}/{axis}", value, step)


class AlgoObserver:
    """rl_games' six hooks, in the order in which they are called, and close. None needs to be
    overridden, and rl_games' own observers plug in unchanged. config: the arguments, by rl_games'
    names too, and run_dir; done_indices (n, 1): the environments whose episode ended, of which
    algo.dones (E,) is the mask; frame: env steps; total_time: seconds."""

    def before_init(self, base_name: str, config: Dict[str, Any], experiment_name: str) -> None: ...

    def after_init(self, algo: PPOAgent) -> None:
        self.algo = algo
        self.writer = algo.writer

    def process_infos(self, infos: Dict[str, Any], done_indices: Optional[Tensor]) -> None: ...
    def after_steps(self) -> None: ...  # between rollout and update
    def after_clear_stats(self) -> None: ...  # rl_games clears its meters; here nothing calls it
    def after_print_stats(self, frame: int, epoch_num: int, total_time: float) -> None: ...
    def close(self) -> None: ...  # the run ends


class RLGPUAlgoObserver(AlgoObserver):
    """Logs what the environment puts into infos, as IsaacGymEnvs' observer of this name does:

    infos["episode"][key]             tensor or number      Episode/<key>: mean over the epoch
    infos["episode_cumulative"][key]  (E,), summed up over  episode_cumulative/<key>: mean, as for
                                      each episode          rewards; _min and _max of this epoch
    any scalar, nested or not         <key>/{frame,iter,time}: mean over the epoch

    Keys may come and go, numbers that are not finite are left out, and nothing leaves the device
    during the rollout. With several processes these are rank 0's environments."""

    def after_init(self, algo) -> None:
        super().after_init(algo)
        self.values = defaultdict(list)  # tag -> what was reported in this epoch
        self.steps = defaultdict(list)  # episode_cumulative's key -> (value, dones) of each step
        size = (len(algo.dones), algo.games_to_track, 1, algo.device)
        self.meters = defaultdict(lambda: EpisodeMeter(*size))

    def process_infos(self, infos, done_indices) -> None:
        for tag, value in flatten(infos, "/").items():
            kind, _, key = tag.partition("/")
            tag = f"Episode/{key}" if kind == "episode" else tag
            is_number = isinstance(value, (int, float, np.number))
            is_tensor = isinstance(value, Tensor) and (value.dim() == 0 or kind == "episode")
            if kind == "episode_cumulative":
                value = value.to(self.algo.device, torch.float32, copy=True)
                self.steps[key].append((value.nan_to_num(0.0, 0.0, 0.0), self.algo.dones))
            elif is_number or is_tensor:  # other things are not for the log
                number = torch.as_tensor(value, dtype=torch.float32)
                self.values[tag].append(number.detach().flatten().clone())

    def means(self) -> Dict[str, float]:
        """What the environments have reported since the last call, by tag without its axis."""
        found = {}
        for tag, values in self.values.items():
            numbers = torch.cat([value.to(self.algo.device) for value in values])
            numbers = numbers[numbers.isfinite()]  # the mean over no episodes is NaN
            if len(numbers):
                found[tag] = float(numbers.mean())
        for key, steps in self.steps.items():
            values, dones = (torch.stack(x) for x in zip(*steps))
            ended = self.meters[key].add_rollout((values,), dones)
            if len(ended):
                found[f"episode_cumulative/{key}"] = float(self.meters[key].mean)
                found[f"episode_cumulative_min/{key}_min"] = float(ended.min())
                found[f"episode_cumulative_max/{key}_max"] = float(ended.max())
        self.values.clear()
        self.steps.clear()
        return found

    def after_print_stats(self, frame, epoch_num, total_time) -> None:
        for tag, value in self.means().items():
            if tag.startswith("Episode/"):
                self.writer.add_scalar(tag, value, epoch_num)
            elif tag.startswith("episode_cumulative"):
                self.writer.add_scalar(tag, value, frame)
            else:
                self.writer.add_on_axes(tag, value, frame=frame, iter=epoch_num, time=total_time)


class WandbAlgoObserver(AlgoObserver):
    """Sends the epoch's scalars to Weights & Biases. sync_tensorboard would draw <tag>/iter and
    <tag>/time over a wrong x-axis, and `step=` would drop points of a continued run, so
    define_metric names the x-axis of each tag."""

    def before_init(self, base_name, config, experiment_name) -> None:
        import wandb

        options = dict(project=config["wandb_project_name"], name=experiment_name)
        options.update(entity=config["wandb_entity"] or None, dir=config["run_dir"])
        # W&B's own variables, such as WANDB_PROJECT, win.
        options = {k: v for k, v in options.items() if f"WANDB_{k.upper()}" not in os.environ}
        options.update(id=config["wandb_run_id"], resume="allow", config=config)
        self.tags = set()  # those whose x-axis W&B knows
        try:
            self.run = wandb.init(**options)
        except Exception as exc:
            where = f"{config['run_dir']}/wandb/offline-run-*"
            why = " ".join(str(exc).split())
            warn(f"W&B did not start ({why}): recording offline, upload later: wandb sync {where}")
            in_time(wandb.teardown, 2.0)  # a failed start would spoil the next one
            self.run = wandb.init(**options, mode="offline")

    def after_print_stats(self, frame, epoch_num, total_time) -> None:
        scalars, steps = self.writer.scalars, self.writer.steps
        # TensorBoard has each scalar over one of these steps, which W&B takes for its x-axis.
        axes = {frame: "global_step", epoch_num: "epoch", total_time: "time"}
        for tag in scalars.keys() - self.tags:
            with contextlib.suppress(Exception):  # W&B reads a * in a name as a pattern
                self.run.define_metric(tag, step_metric=axes.get(steps[tag], "global_step"))
        self.tags.update(scalars)
        self.run.log(dict(scalars, global_step=frame, epoch=epoch_num, time=total_time))

    def close(self) -> None:
        algo = self.algo
        if self.writer.scalars:  # observers wrote them when they closed
            self.after_print_stats(algo.frame, algo.epoch_num, algo.total_time)
        if algo.best_epoch:
            self.run.summary.update(dict(best_reward=algo.best_score, best_epoch=algo.best_epoch))
        if not in_time(self.run.finish, 30.0):
            folder = os.path.dirname(self.run.dir)
            warn(f"W&B is too slow: upload the rest later by wandb sync {folder}")
            in_time(sys.modules["wandb"].teardown, 2.0)  # its exit hook would wait without end


def in_time(call, seconds: float) -> bool:
    """Run call() in a thread and wait at most this long. True if it has ended."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


class MultiObserver:
    """Calls a hook of each of `observers`, in order. One that raises is left out with a warning; if
    strict, its exception ends training."""

    def __init__(self, observers: Sequence[Any], strict: bool = False):
        self.observers = list(observers)
        self.strict = strict
        # Ours uses the mask; another one that has a process_infos of its own may want the indices.
        ours = {AlgoObserver.process_infos, RLGPUAlgoObserver.process_infos, None}
        hooks = {getattr(type(observer), "process_infos", None) for observer in self.observers}
        self.needs_done_indices = not hooks <= ours

    def call(self, hook: str, *args) -> None:
        for observer in list(self.observers):
            try:
                if hasattr(observer, hook):  # rl_games' observers have no close
                    getattr(observer, hook)(*args)
            except Exception:
                if self.strict:
                    raise
                self.observers.remove(observer)
                warn(f"going on without {type(observer).__name__}:\n{traceback.format_exc()}")


# CHECKPOINTS ======================================================================================
# runs/<experiment>/nn/epoch_<N>.pth   every save_frequency epochs
#                      best.pth        of each new highest score, once enough episodes have ended
#                      last.pth        with each epoch_<N>.pth, and whenever the run ends
#
# No file is ever half written. Errors are raised, and cost the epochs since the last save; an error
# in a rollout costs none, because the weights are still those of the last epoch.

FORMAT_VERSION = 3


def agent_state(agent: PPOAgent, mid_rollout: bool = False) -> Dict[str, Any]:
    """All that the run is: rl_games' keys (model, optimizer, epoch, frame, last_mean_rewards,
    env_state), and what exact continuation needs besides. Nothing but tensors, numbers, strings,
    lists and dicts, so that it loads with weights_only=True, which runs no code."""
    env, episodes, device = agent.env, agent.episodes, agent.device
    optimizer = agent.optimizer.state_dict()
    optimizer["param_groups"][0].update(lr=float(agent.lr), fused=None)  # as rl_games has them
    # In mid-rollout an exact state no longer fits obs and rng; a curriculum's level still does.
    fits = not (mid_rollout and getattr(env, "exact_state", False))
    env_state = env.get_env_state() if fits and hasattr(env, "get_env_state") else None
    return dict(
        format_version=FORMAT_VERSION,
        version=__version__,
        args=asdict(agent.args),
        num_obs=int(env.num_obs),
        num_acts=int(env.num_acts),
        num_states=agent.num_states,
        clip_obs=float(getattr(env, "clip_obs", None) or math.inf),
        policy_metadata=agent.policy_metadata,
        wandb_run_id=agent.config["wandb_run_id"],
        device=device.type,
        processes=WORLD_SIZE,
        model=dict(agent.model.state_dict()),
        optimizer=optimizer,
        epoch=agent.epoch_num,
        frame=agent.frame,
        total_time=agent.total_time,
        last_mean_rewards=agent.best_score,
        best_epoch=agent.best_epoch,
        episodes=dict(mean=episodes.mean, count=episodes.count, running=episodes.running),
        env_state=env_state,
        first_epoch=agent.first_epoch,
        obs=agent.obs,
        dones=agent.dones,
        rng=torch.get_rng_state(),
        cuda_rng=torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    )


def load_weights(model: ActorCritic, state: Dict[str, Any], path: str) -> None:
    """Load weights and statistics. UserError if they, or Adam's moments, do not fit this model."""
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as exc:
        what = " ".join(str(exc).split())
        raise UserError(f"{path} does not fit this env or network: {what:.300}") from exc
    for parameter, adam in zip(model.parameters(), state["optimizer"]["state"].values()):
        if {adam["exp_avg"].shape, adam["exp_avg_sq"].shape} != {parameter.shape}:
            raise UserError(f"{path}: Adam's moments have other shapes")  # torch would crash


def restore_agent(agent: PPOAgent, state: Dict[str, Any], path: str) -> bool:
    """Go on from `state`. True if exactly, False if the environment had to start new episodes."""
    args, env = agent.args, agent.env
    load_weights(agent.model, state, path)
    # The optimizer's settings are this run's, its moments and its learning rate the checkpoint's.
    adam = state["optimizer"]
    agent.optimizer.load_state_dict({**agent.optimizer.state_dict(), "state": adam["state"]})
    agent.optimizer.param_groups[0]["lr"] = agent.lr
    agent.lr.fill_(adam["param_groups"][0]["lr"])
    agent.epoch_num = agent.first_epoch = state["epoch"]
    agent.frame = state["frame"]
    agent.total_time = state["total_time"]
    if os.path.isdir(args.checkpoint):  # a new run may have another reward: it has no mean yet
        agent.episodes.mean = state["episodes"]["mean"]
        agent.episodes.count = state["episodes"]["count"]
        agent.mean_rewards = float(agent.episodes.mean[0]) if agent.episodes.count else -math.inf
        if state["args"].get("best_metric") == args.best_metric:  # else they cannot be compared
            agent.best_score = state["last_mean_rewards"]
            agent.best_epoch = state["best_epoch"]
    # The state of an env without exact_state does not depend on num_envs: a curriculum's level.
    exact_state, saved = getattr(env, "exact_state", False), state["env_state"] is not None
    one_process = WORLD_SIZE == 1 and state["processes"] == 1
    same_sizes = state["device"] == agent.device.type and state["obs"].shape == agent.obs.shape
    exact = exact_state and saved and one_process and same_sizes
    if saved and (exact or not exact_state):
        env.set_env_state(state["env_state"])
    if exact:
        agent.first_epoch = state["first_epoch"]
        agent.obs = state["obs"].to(agent.device)
        agent.dones = state["dones"].to(agent.device)
        agent.episodes.running.copy_(state["episodes"]["running"])
        torch.set_rng_state(state["rng"])
        if agent.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], agent.device)
    return exact


def save_checkpoints(agent: PPOAgent, score: float, finished: float) -> None:
    """Write what is due: best.pth at most every five seconds. finished: episodes in the mean."""
    args, epoch = agent.args, agent.epoch_num
    # The first episodes to end are the short ones, so wait for the others, and for enough of them.
    steps = (epoch - agent.first_epoch) * args.num_steps
    fair = steps >= agent.max_episode_length and finished >= args.games_to_track
    if fair and epoch >= args.save_best_after and score > agent.best_score:
        agent.best_score, agent.best_epoch = score, epoch
        agent.best = tree_map_only(Tensor, Tensor.clone, agent_state(agent))  # a deep copy
    if args.save_frequency and epoch % args.save_frequency == 0:
        save(agent, f"epoch_{epoch}.pth", "last.pth")
    elif agent.best and time.monotonic() > agent.save_time + 5.0:
        save(agent)


def save(agent: PPOAgent, *names: str, mid_rollout: bool = False) -> None:
    """Save files of these names (rank 0 only), after a best.pth that is still waiting. Each file
    is always whole, even after a power cut."""
    if RANK != 0 or not (names or agent.best):
        return
    with contextlib.suppress(OSError):
        agent.writer.flush()  # the curve on disk is never behind the checkpoint
    states = {"best.pth": agent.best} if agent.best else {}
    if names:
        states.update(dict.fromkeys(names, agent_state(agent, mid_rollout)))
    folder = os.path.join(agent.config["run_dir"], "nn")
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, "saving.tmp")
    for name, state in states.items():
        buffer = io.BytesIO()  # given a file, torch.save reports a full disk without a reason
        torch.save(state, buffer)
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            sync(file.fileno())
        os.replace(temporary, os.path.join(folder, name))
    if os.name == "posix":  # the new names must be on disk, too
        descriptor = os.open(folder, os.O_RDONLY)
        sync(descriptor)
        os.close(descriptor)
    agent.best, agent.save_time = {}, time.monotonic()


def sync(descriptor: int) -> None:
    """os.fsync that tolerates file systems without it, such as some network drives."""
    try:
        os.fsync(descriptor)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def load_checkpoint(path: str) -> Dict[str, Any]:
    """Read a checkpoint to the CPU, without running code from it. UserError if it is no good."""
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load ignores the checksums
            raise ValueError("its checksum is wrong")
        # torch < 2.6 would hand a TorchScript archive to torch.jit.load, which runs code.
        with mock.patch("torch.jit.load", side_effect=ValueError("it is a TorchScript archive")):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exc:
        what = f"{type(exc).__name__}: {exc}".splitlines()[0]
        if isinstance(exc, pickle.UnpicklingError):
            what = "only tensors, numbers, text, lists and dicts may be in it"
            what += "; a file of rl_games needs tools/from_rl_games.py"
        raise UserError(f"{shown(path)} cannot be used: {what:.200}") from exc
    if not isinstance(state, dict) or state.get("format_version") != FORMAT_VERSION:
        what = "a file of 1.0 needs train_ppo.py 1.0, one of rl_games tools/from_rl_games.py"
        raise UserError(f"{shown(path)} is not a checkpoint of this version: {what}")
    return state


def find_checkpoint(path: str) -> Tuple[str, Dict[str, Any]]:
    """(file, content) of a file, or of a run folder's readable file with the highest epoch."""
    if not os.path.isdir(path):
        return path, load_checkpoint(path)
    # epoch_<N>.pth from the lowest N up, then best.pth and last.pth.
    files = sorted(glob.glob(os.path.join(glob.escape(path), "nn", "*.pth")))
    files.sort(key=lambda file: int(re.sub(r"\D", "", os.path.basename(file)) or 10**9))
    readable = []
    while files and len(readable) < 3:  # the others are older
        file = files.pop()
        try:
            readable.append((file, load_checkpoint(file)))
        except UserError as exc:
            warn(str(exc.code).replace("error:", "skipped:"))
    if not readable:
        raise UserError(f"{shown(path)} has no readable checkpoint in nn/")
    # Of two files of the same epoch, one with the env's state is better.
    return max(readable, key=lambda found: (found[1]["epoch"], found[1]["env_state"] is not None))


# RUNNER ===========================================================================================

START_DIR = os.getcwd()  # an environment may change it


def log(message: str, stream=None) -> None:
    """Print, in the process of rank 0."""
    if RANK == 0:
        # A closed terminal must not end training, nor a signal handler that prints in the middle of
        # another print (RuntimeError).
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            print(message, file=stream, flush=True)


@functools.lru_cache(maxsize=None)  # each text once
def warn(message: str) -> None:
    log(f"warning: {message}", sys.stderr)


def shown(path: str) -> str:
    """The path from where the program was started, quoted for a shell."""
    start = START_DIR + os.sep
    return shlex.quote(path[len(start) :] if path.startswith(start) else path)


def seed_everything(args: Args, seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # the CPU's generator and every GPU's
    if args.torch_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def make_run_dir(args: Args, origin: str) -> str:
    """A new folder with config.json in it. If the name is taken it is <name>_2, _3 ..."""
    task = re.sub(r"[^A-Za-z0-9_-]+", "_", args.env_id)
    name = args.experiment or task + time.strftime("_%Y-%m-%d_%H-%M-%S")
    for n in range(1, 10**6):
        run_dir = os.path.join(args.train_dir, name if n == 1 else f"{name}_{n}")
        with contextlib.suppress(FileExistsError):
            os.makedirs(run_dir, exist_ok=args.resume)  # resumed before its first checkpoint
            break
    folder = shlex.quote(os.path.dirname(os.path.abspath(__file__)))
    commit = subprocess.getoutput(f"git -C {folder} describe --always --dirty 2>/dev/null")
    about = dict(args=asdict(args), origin=origin, command=shlex.join([sys.executable, *sys.argv]))
    about.update(device=str(pick_device(args.device)), git_commit=commit)
    about.update(python=sys.version, torch=torch.__version__, train_ppo=__version__)
    with open(os.path.join(run_dir, "config.json"), "w") as file:
        json.dump(about, file, indent=2)
    return run_dir


def open_run(agent: PPOAgent, state: Optional[Dict[str, Any]], origin: str):
    """Get ready to write: run folder, config for observers, TensorBoard, last.pth. Returns an open
    file that keeps other processes out of the folder until it is closed."""
    args, continues = agent.args, os.path.isdir(agent.args.checkpoint)
    run_dir = args.checkpoint if continues else make_run_dir(args, origin)
    lock = open(os.path.join(run_dir, ".lock"), "a")
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise UserError(f"{run_dir} is being trained by another process: stop it first") from exc
    except (ImportError, OSError):  # Windows, and network drives that have no locks
        pass
    run_id = state["wandb_run_id"] if continues else os.urandom(4).hex()
    agent.config = dict(asdict(args), run_dir=run_dir, name=os.path.basename(run_dir))
    agent.config["wandb_run_id"] = os.environ.get("WANDB_RUN_ID", run_id)
    agent.config.update({name: agent.config[ours] for name, ours in RL_GAMES_NAMES.items()})
    agent.writer = Writer(run_dir, args)
    if not continues:  # try now, not after a night, whether it can be written and read again
        save(agent, "last.pth")
        load_checkpoint(os.path.join(run_dir, "nn", "last.pth"))
    return lock


def run(args: Args, observer: MultiObserver, path: str = "", state=None) -> Dict[str, Any]:
    """Train as args say. path, state: the checkpoint that they name, and its content. Returns what
    `report` returns."""
    device = pick_device(args.device)
    if args.torch_threads:
        torch.set_num_threads(args.torch_threads)
    # Have glibc keep what an update frees for the next one. By default it returns much of it, and
    # getting it back, page by page, costs a tenth of the time on a CPU.
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        if libc.mallopt(-3, 2**31 - 1):  # M_MMAP_THRESHOLD; glibc before 2.35 refuses this value
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type != "cuda":
            atexit.register(leave, 1)  # for a run that ends by an error
    # A run that is continued must not draw the random numbers of its first epochs again.
    epoch = state["epoch"] if args.checkpoint else 0
    seed = (args.seed + RANK + 1_000_003 * epoch) % 2**31
    seed_everything(args, seed)
    env = make_env(args, seed)
    seed_everything(args, seed)  # making an env may draw any number of random numbers
    try:
        agent = PPOAgent(args, env, observer)
        with stop_signals(agent):
            train(agent, state, path)
            return report(agent)
    finally:
        if hasattr(env, "close"):
            env.close()
        if WORLD_SIZE > 1 and device.type == "cuda":  # gloo may hang in it, see `leave`
            dist.destroy_process_group()


def train(agent: PPOAgent, state: Optional[Dict[str, Any]], path: str) -> None:
    """Load the checkpoint, open run folder and observers, train, save last.pth."""
    args, observer = agent.args, agent.algo_observer
    if args.checkpoint:
        exact = restore_agent(agent, state, path)
        how = "exactly where it stopped" if exact else "the env starts new episodes"
        what = "continuing" if os.path.isdir(args.checkpoint) else "branching off"
        log(f"{what} {shown(path)} at epoch {agent.epoch_num}, frame {agent.frame:,}; {how}")
    elif state is not None:
        load_weights(agent.model, state, path)
    if average(torch.tensor(float(agent.epoch_num), device=agent.device)) != agent.epoch_num:
        raise UserError("the processes see different checkpoints: is the folder a shared one?")
    if WORLD_SIZE > 1:
        for tensor in agent.model.state_dict().values():
            dist.broadcast(tensor, 0)
    if RANK != 0:
        return agent.train()
    lock = open_run(agent, state, path)
    observer.call("before_init", "train_ppo", agent.config, agent.config["name"])
    observer.call("after_init", agent)
    where = f"{WORLD_SIZE} x {agent.device}" if WORLD_SIZE > 1 else agent.device
    what = f"{args.env_id} on {where}, {args.num_envs} envs x {args.num_steps} steps"
    log(f"training {what}; writing to {shown(agent.config['run_dir'])}")
    try:
        agent.train()
        save(agent, "last.pth")
    finally:
        observer.call("close")
        agent.writer.end_epoch()  # what observers wrote when they closed
        save(agent)  # best.pth, if it still waits because of an error
        lock.close()
        with contextlib.suppress(OSError):
            agent.writer.close()


@contextlib.contextmanager
def stop_signals(agent: PPOAgent):
    """Let a signal end training after the current epoch. It often comes twice, from the job and
    from torchrun, so repeats are ignored for two seconds; a later one interrupts at once."""
    process, before, first_time = os.getpid(), {}, math.inf

    def stop(signum, _frame):
        nonlocal first_time
        if os.getpid() != process:  # a forked child: as if there were no handler
            signal.signal(signum, before[signum] or signal.SIG_DFL)
            signal.raise_signal(signum)
        elif not agent.stop_signal:
            agent.stop_signal, first_time = signum, time.monotonic()
            log(f"{signal.Signals(signum).name}: finishing this epoch, then saving last.pth")
        elif time.monotonic() > first_time + 2.0:
            raise KeyboardInterrupt

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
            signal.signal(signum, handler or signal.SIG_DFL)


def report(agent: PPOAgent) -> Dict[str, Any]:
    """Print the end of a run, and the commands that go on from here. Returns run_dir, epoch,
    mean_reward, best_score, best_epoch and stop_signal (0: it ran to its end)."""
    args, run_dir = agent.args, agent.config.get("run_dir", "")  # rank 0 alone has one
    folder = shown(run_dir)
    signum = int(agent.stop_signal) if agent.epoch_num < args.max_epochs else 0
    why = signal.Signals(signum).name if signum else "done"
    reward = f"mean reward {agent.mean_rewards:.2f}" if agent.episodes.count else "no episode ended"
    best = f", best {agent.best_score:.2f} in epoch {agent.best_epoch}" if agent.best_epoch else ""
    env = f" --env-id {args.env_id}" if ":" in args.env_id else ""
    more = "" if signum else f" --max-epochs {2 * args.max_epochs}"
    launcher = "python" if WORLD_SIZE == 1 else "torchrun ..."
    script = getattr(sys.modules["__main__"], "__file__", None) or __file__  # a notebook has none
    tool = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tools", "evaluate.py")
    log(f"\nstopped after epoch {agent.epoch_num} ({why}), {reward}{best}")
    log(f"files     {folder}")
    if os.path.exists(tool):  # not if train_ppo.py was copied alone
        log(f"evaluate  python {shown(tool)} {folder}{env}")
    log(f"continue  {launcher} {shown(os.path.abspath(script))} --checkpoint {folder}{more}{env}")
    log(f"curves    tensorboard --logdir {folder}/summaries")
    result = dict(run_dir=run_dir, epoch=agent.epoch_num, mean_reward=agent.mean_rewards)
    result.update(best_score=agent.best_score, best_epoch=agent.best_epoch, stop_signal=signum)
    return result


def passed_on(first: str) -> List[str]:
    """The names of the arguments from `first` on, as the comments in Args divide them."""
    names = [field.name for field in fields(Args)]
    return names[names.index(first) :]


def as_flags(settings: Dict[str, Any]) -> List[str]:
    """Settings as the flags that set them."""
    flags = []
    for name, value in settings.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, (str, int, float)):
            flags.append(f"--{name}={value}")
        else:
            flags += [f"--{name}", *map(str, value)]
    return flags


def parse_args(argv: Sequence[str]) -> Tuple[Args, str, Any]:
    """Args, and path and content of the checkpoint that they name. The flags are parsed once to
    find the checkpoint or task, and again with the settings found there in front of them."""
    first = tyro.cli(Args, args=argv, description=__doc__.splitlines()[0])
    for name in ("checkpoint", "init_from", "train_dir"):
        if getattr(first, name):  # an env may change the working directory
            setattr(first, name, os.path.abspath(getattr(first, name)))
    folder = os.path.join(first.train_dir, first.experiment)
    resumes = first.resume and glob.glob(os.path.join(glob.escape(folder), "nn", "*.pth"))
    if resumes:
        first.checkpoint, first.init_from = folder, ""
    elif first.experiment and os.path.isdir(first.checkpoint):
        raise UserError("a run folder continues under its own name; give a .pth file for a new one")
    source = first.checkpoint or first.init_from
    path, state = find_checkpoint(source) if source else ("", None)
    given = {word.partition("=")[0].replace("-", "_") for word in argv}
    found = {}
    if source:
        inherited = "track" if os.path.isdir(source) else "env_id"
        names = passed_on("normalize_input" if first.init_from else inherited)
        found = {name: value for name, value in state["args"].items() if name in names}
    if "env_id" not in found and ":" in first.env_id:
        found = {**getattr(import_env_module(first.env_id), "SETTINGS", {}), **found}
    elif "env_id" not in found and uses_isaacgym(first):
        cfg = compose_isaacgym_config(first, first.num_envs if "__num_envs" in given else "")
        found = {**settings_from_yaml(cfg.train.params, first.env_id), **found}
    args = tyro.cli(Args, args=[*as_flags(found), *argv])
    paths = dict(checkpoint=first.checkpoint, init_from=first.init_from, train_dir=first.train_dir)
    args = replace(args, **paths)
    if ":" in args.env_id and args.env_id != first.env_id:  # a checkpoint must not name code
        raise UserError(f"{path} was trained on your own env: repeat --env-id {args.env_id}")
    # Otherwise the checkpoint's rate goes on. A run that is resumed repeats its first flags.
    if args.checkpoint and "__learning_rate" in given and not resumes:
        state["optimizer"]["param_groups"][0]["lr"] = args.learning_rate
    check_args(args)
    return args, path, state


def check_args(args: Args) -> None:
    """UserError for values that make no sense."""
    for field in fields(Args):
        value, least = getattr(args, field.name), 1 if field.type is Count else 0
        if field.type in (int, float, Count) and not value >= least:  # true for nan, too
            raise UserError(f"--{field.name.replace('_', '-')} must be >= {least}, not {value}")
    batch = args.num_envs * args.num_steps
    size = min(batch, args.minibatch_size)
    if size < 2 or batch % size:
        raise UserError(f"--minibatch-size must be > 1 and divide num_envs x num_steps = {batch}")
    if args.checkpoint and args.init_from:
        raise UserError("--checkpoint continues, --init-from starts anew: give one of them")
    if args.resume and not args.experiment:
        raise UserError("--resume needs --experiment NAME")


def leave(code: int) -> None:
    """Python's own exit without its last part, in which it may hang or abort while a thread of gloo
    frees a tensor."""
    atexit.unregister(leave)  # or else the next lines would call it again
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # it may be closed
            stream.flush()
    os._exit(code)


def main(argv: Optional[Sequence[str]] = None, observers: Sequence[Any] = ()) -> Dict[str, Any]:
    """The command. `observers` are yours, called after RLGPUAlgoObserver and before W&B's. Returns
    what `report` returns, or exits: after a signal with 128 + its number, with gloo in any case."""
    warn.cache_clear()
    args, path, state = parse_args(sys.argv[1:] if argv is None else argv)
    wandb = [WandbAlgoObserver()] if args.track else []  # last: it sends what the others wrote
    everyone = [RLGPUAlgoObserver(), *observers, *wandb] if RANK == 0 else []
    result = run(args, MultiObserver(everyone, args.strict_observers), path, state)
    # torchrun ends all processes as soon as one fails, but rank 0 may still be saving.
    code = 128 + result["stop_signal"] if result["stop_signal"] and RANK == 0 else 0
    if dist.is_initialized():
        leave(code)
    if code:
        sys.exit(code)
    return result


if __name__ == "__main__":
    main()
