"""Any task of MuJoCo Playground, which JAX simulates in batches, by its name.

    pip install -r requirements.txt playground "jax[cuda12]"
    python train_ppo.py --env-id examples.playground_env:CartpoleBalance

Without a GPU leave out "jax[cuda12]". JAX compiles first; tasks with a robot clone
its meshes from GitHub. A done puts an environment back to the state of its first reset at once.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else JAX takes 3/4 of the GPU
import jax
import torch
from mujoco_playground import registry, wrapper

SETTINGS = dict(num_envs=256, num_steps=32, minibatch_size=512, update_epochs=8, gamma=0.995)
SETTINGS.update(units=(128, 128), vf_coef=1.0, reward_scale=1.0, max_lr=1e-3)


class Playground:
    def __init__(self, task: str, num_envs: int, device: str, seed: int):
        kind, _, index = device.partition(":")
        jax.config.update("jax_default_device", jax.devices(kind)[int(index or 0)])
        cfg = registry.get_default_config(task)
        cfg.impl = cfg.impl if kind == "cuda" else "jax"  # the default, MuJoCo Warp, needs a GPU
        env = registry.load(task, cfg)
        env = wrapper.wrap_for_brax_training(env, cfg.episode_length, cfg.action_repeat)
        self.jit_reset, self.jit_step = jax.jit(env.reset), jax.jit(env.step)
        self.keys = jax.random.split(jax.random.PRNGKey(seed), num_envs)
        self.num_envs, self.num_acts = num_envs, env.action_size
        self.max_episode_length = cfg.episode_length
        sizes = {name: values.shape[1] for name, values in self.reset().items()}
        self.num_obs, self.num_states = sizes["obs"], sizes.get("states", 0)

    def reset(self) -> dict:
        self.state = self.jit_reset(self.keys)
        return self.observe()

    def set_train_info(self, frame: int, algo) -> None:
        """Before the first rollout, set the clocks apart, or all episodes end in the same step."""
        if algo.epoch_num == algo.first_epoch + 1:
            share = jax.numpy.arange(self.num_envs) / self.num_envs
            self.state.info["steps"] = (share * self.max_episode_length).round()

    def step(self, actions: torch.Tensor):  # by dlpack, JAX and torch see the same memory
        self.state = state = self.jit_step(self.state, jax.dlpack.from_dlpack(actions))
        infos = {"time_outs": state.info["truncation"], "episode_cumulative": state.metrics}
        return (self.observe(), *jax.tree.map(torch.from_dlpack, (state.reward, state.done, infos)))

    def observe(self) -> dict:
        obs = self.state.obs if isinstance(self.state.obs, dict) else {"state": self.state.obs}
        names = {"state": "obs", "privileged_state": "states"}
        return {names[key]: torch.from_dlpack(obs[key]) for key in names if key in obs}


def __getattr__(task: str):  # the factory, for --env-id examples.playground_env:TASK
    if task not in registry.ALL_ENVS:
        raise AttributeError(f"{task} is none of {', '.join(registry.ALL_ENVS)}")
    return lambda **arguments: Playground(task, **arguments)
