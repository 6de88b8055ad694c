"""Any Gymnasium task whose observations and actions are boxes of numbers.

    pip install "gymnasium[mujoco]"
    python train_ppo.py --env-id examples.gymnasium_env:HalfCheetah-v5

Gymnasium steps its environments one after the other, in this process, on one core. That is quicker
than processes of their own for tasks as small as MuJoCo's.
"""

import functools
from typing import Any, Dict

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import TimeLimit
from torch import Tensor

# The trainer's arguments: CleanRL's for MuJoCo, for 32 environments instead of one.
SETTINGS = dict(num_envs=32, num_steps=128, minibatch_size=512, update_epochs=5, max_epochs=250)
SETTINGS.update(units=(64, 64), activation="tanh", separate=True, reward_scale=1.0, vf_coef=1.0)
SETTINGS.update(kl_threshold=0.01, max_lr=1e-3, save_best_after=20, games_to_track=32)


class GymnasiumEnv:
    """num_envs copies of a task. The step that ends an episode starts the next one, too."""

    def __init__(self, task: str, num_envs: int, device: Any, seed: int):
        options = dict(num_envs=num_envs, vectorization_mode="sync", render_mode="rgb_array")
        options["vector_kwargs"] = dict(autoreset_mode=AutoresetMode.SAME_STEP)
        self.env = gymnasium.make_vec(task, **options)
        self.task, self.num_envs, self.device, self.seed = task, num_envs, device, seed
        actions = self.env.single_action_space
        self.low, self.high = actions.low, actions.high
        self.num_obs = int(np.prod(self.env.single_observation_space.shape))
        self.num_acts = int(np.prod(actions.shape))
        self.max_episode_length = self.env.spec.max_episode_steps or 0

    def reset(self) -> Dict[str, Tensor]:
        obs = self.observe(self.env.reset(seed=self.seed)[0])
        # The clocks of the first episodes differ, so that not all of them end in the same step.
        for number, env in enumerate(self.env.envs):
            while not isinstance(env, TimeLimit) and env is not env.unwrapped:
                env = env.env
            env._elapsed_steps = number * self.max_episode_length // self.num_envs
        return obs

    def step(self, actions: Tensor):
        """Actions (E, A) in [-1, 1], which are scaled to the task's own range."""
        unit = actions.cpu().numpy().reshape(self.env.action_space.shape)
        scaled = self.low + 0.5 * (unit + 1.0) * (self.high - self.low)
        obs, reward, terminated, truncated, _ = self.env.step(scaled)
        infos = {"time_outs": torch.as_tensor(truncated & ~terminated)}
        done = torch.as_tensor(terminated | truncated)
        return self.observe(obs), torch.as_tensor(reward), done, infos

    def observe(self, obs: np.ndarray) -> Dict[str, Tensor]:
        return {"obs": torch.as_tensor(obs, dtype=torch.float32).view(self.num_envs, -1)}

    def render(self, mode: str = "rgb_array") -> np.ndarray:
        return self.env.envs[0].render()

    def policy_metadata(self) -> Dict[str, Any]:
        """The task, and what actions of -1 and 1 mean."""
        return dict(task=self.task, low=self.low.tolist(), high=self.high.tolist())

    def close(self) -> None:
        self.env.close()


def __getattr__(task: str):
    """The factory of a task, for --env-id examples.gymnasium_env:TASK."""
    if task.startswith("__"):
        raise AttributeError(task)
    return functools.partial(GymnasiumEnv, task)
