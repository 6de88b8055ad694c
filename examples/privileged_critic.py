"""A critic that sees more than the actor: Cartpole with noisy sensors.

    python train_ppo.py --env-id examples.privileged_critic:make_env

In simulation the exact state is known, on a robot it is not. The actor gets what the robot will
have: here, four numbers with noise on them. The critic is needed for training alone, so it may have
the exact ones. An environment says so with `num_states` and hands them over beside the observation;
nothing else is to be done. The policy that is evaluated and exported needs observations alone.
"""

from typing import Dict

import torch
from torch import Tensor

from train_ppo import Cartpole

SETTINGS = dict(max_epochs=150)
NOISE = 0.3  # standard deviation of the noise on each observation


class NoisyCartpole(Cartpole):
    """Cartpole, of whose state the observation is a noisy copy."""

    num_states = 4  # size of obs["states"]; 0, or no such attribute, means: none

    def reset(self) -> Dict[str, Tensor]:
        """The present observations for the actor, and states for the critic: (E, 4) each."""
        exact = super().reset()["obs"]
        return {"obs": exact + NOISE * torch.randn_like(exact), "states": exact}


class BlindCritic(NoisyCartpole):
    """The same with a critic that sees what the actor sees, to compare with."""

    num_states = 0


def make_env(num_envs: int, device: str, seed: int) -> NoisyCartpole:
    return NoisyCartpole(num_envs, torch.device(device))


def make_blind_env(num_envs: int, device: str, seed: int) -> BlindCritic:
    return BlindCritic(num_envs, torch.device(device))
