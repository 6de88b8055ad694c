"""Any Gymnasium task whose observations and actions are boxes of numbers.

    pip install "gymnasium[mujoco]>=1.1"
    python train_ppo.py --env-id examples.gymnasium_env:HalfCheetah-v5

It steps the environments one after the other: for MuJoCo's tasks quicker than in processes.
"""

import functools

import gymnasium
import numpy as np
import torch

# The trainer's arguments: CleanRL's network for MuJoCo, its passes over 2,048 steps, its million
# steps; minibatches are twice as large.
SETTINGS = dict(num_envs=32, num_steps=64, minibatch_size=128, update_epochs=10, max_epochs=488)
SETTINGS.update(units=(64, 64), activation="tanh", separate=True, reward_scale=1.0, vf_coef=1.0)
SETTINGS.update(kl_threshold=0.01, max_lr=3e-4, save_best_after=40, games_to_track=32)


class GymnasiumEnv:
    """num_envs copies of a task. The step that ends an episode starts the next one, too."""

    def __init__(self, task: str, num_envs: int, device, seed: int):
        options = dict(autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP)
        try:
            self.env = gymnasium.make_vec(task, num_envs, "sync", vector_kwargs=options)
        except gymnasium.error.Error as exc:
            raise SystemExit(f"error: {task}: {exc}") from exc
        self.task, self.num_envs, self.seed = task, num_envs, seed
        self.close = self.env.close
        obs, actions = self.env.single_observation_space, self.env.single_action_space
        boxes = all(type(x) is gymnasium.spaces.Box and len(x.shape) == 1 for x in (obs, actions))
        if not boxes or not np.isfinite(actions.high - actions.low).all():
            raise SystemExit(f"error: {task} has {obs} and {actions}: vectors, finite actions only")
        self.low, self.high = actions.low, actions.high
        self.num_obs, self.num_acts = obs.shape[0], actions.shape[0]
        self.max_episode_length = self.env.spec.max_episode_steps or 0

    def reset(self) -> dict:
        # The seeds n, n + 1 ... would be those of other processes, too.
        seeds = np.random.SeedSequence(self.seed).generate_state(self.num_envs).tolist()
        return self.observe(self.env.reset(seed=seeds)[0])

    def set_train_info(self, frame: int, algo) -> None:
        """Before the first rollout, set the clocks apart, or all episodes end in the same step."""
        if algo.epoch_num == algo.first_epoch + 1 and self.max_episode_length:
            for number, env in enumerate(self.env.envs):
                elapsed = number * self.max_episode_length // self.num_envs
                env.set_wrapper_attr("_elapsed_steps", elapsed)  # of the wrapper TimeLimit

    def step(self, actions: torch.Tensor):
        """Actions (E, A) in [-1, 1], which are scaled to the task's own range."""
        unit = actions.cpu().numpy()
        scaled = self.low + 0.5 * (unit + 1.0) * (self.high - self.low)
        obs, reward, terminated, truncated, _ = self.env.step(scaled)
        infos = {"time_outs": torch.as_tensor(truncated & ~terminated)}
        done = torch.as_tensor(terminated | truncated)
        return self.observe(obs), torch.as_tensor(reward), done, infos

    def observe(self, obs: np.ndarray) -> dict:
        return {"obs": torch.as_tensor(obs, dtype=torch.float32)}

    def render(self, mode: str = "rgb_array") -> np.ndarray:
        first = self.env.envs[0]
        first.unwrapped.render_mode = mode  # not before, as not every task can be drawn
        return first.render()

    def policy_metadata(self) -> dict:
        return dict(task=self.task, low=self.low.tolist(), high=self.high.tolist())


def __getattr__(task: str):
    """The factory of a task, for --env-id examples.gymnasium_env:TASK."""
    if task.startswith("_"):
        raise AttributeError(task)
    return functools.partial(GymnasiumEnv, task)
