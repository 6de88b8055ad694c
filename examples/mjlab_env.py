"""mjlab's tasks, which MuJoCo Warp simulates in batches as Isaac Gym does.

    pip install -r requirements.txt mjlab==1.6.0
    python train_ppo.py --env-id examples.mjlab_env:make_env

The environment variable MJLAB_TASK names another task than Cartpole. mjlab's own settings for it
are in mjlab.tasks.registry.load_rl_cfg(TASK); SETTINGS below are those for Cartpole, and flags win.
If the task's actions go beyond [-1, 1], add `--no-clip-actions --bounds-loss-coef 0`. mjlab's
"critic" observations are the critic's states, and what mjlab logs is shown under Episode/.
"""

import os

import mjlab.tasks  # noqa: F401  # registers the tasks
from mjlab.envs import ManagerBasedRlEnv
from mjlab.tasks.registry import load_env_cfg

SETTINGS = dict(num_envs=256, num_steps=32, minibatch_size=2048, update_epochs=5, vf_coef=1.0)
SETTINGS.update(reward_scale=1.0, ent_coef=0.01, units=(64, 64))
TASK = os.environ.get("MJLAB_TASK", "Mjlab-Cartpole-Balance")


class Mjlab:
    """mjlab resets within the step: with a done comes the next episode's first observation."""

    def __init__(self, num_envs: int, device: str, seed: int):
        cfg = load_env_cfg(TASK)
        cfg.scene.num_envs = num_envs
        cfg.seed = seed
        self.env = ManagerBasedRlEnv(cfg, device)
        self.num_envs = num_envs
        (self.num_obs,) = self.env.observation_manager.group_obs_dim["actor"]
        (self.num_states,) = self.env.observation_manager.group_obs_dim.get("critic", (0,))
        self.num_acts = self.env.action_manager.total_action_dim
        self.max_episode_length = self.env.max_episode_length
        self.spread = False

    def reset(self):
        return self.rename(self.env.reset()[0])

    def rename(self, groups):
        """mjlab's observation groups by the names of the contract."""
        names = {"obs": "actor", "states": "critic"}
        return {ours: groups[theirs] for ours, theirs in names.items() if theirs in groups}

    def step(self, actions):
        obs, reward, terminated, truncated, extras = self.env.step(actions)
        # extras["log"] is empty unless an episode ended in this step.
        infos = {"time_outs": truncated, "episode": extras["log"]}
        return self.rename(obs), reward, terminated | truncated, infos

    def set_train_info(self, frame: int, algo) -> None:
        """Before the first rollout, put each environment somewhere on its clock. Otherwise all
        episodes would end in the same step, and the mean reward would move once in 1000 steps.
        tools/evaluate.py does not call this: there the episodes are whole."""
        if not self.spread:
            self.env.episode_length_buf.random_(self.max_episode_length)
            self.spread = True

    def get_env_state(self):
        """The counter that mjlab's curricula go by. When a run continues, new episodes start."""
        return {"common_step_counter": self.env.common_step_counter}

    def set_env_state(self, state) -> None:
        self.env.common_step_counter = state["common_step_counter"]


def make_env(num_envs: int, device: str, seed: int) -> Mjlab:
    return Mjlab(num_envs, device, seed)
