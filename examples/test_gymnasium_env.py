"""examples/gymnasium_env.py with a task of our own, whose returns and ends are known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

gymnasium = pytest.importorskip("gymnasium", minversion="1.1")
from examples import gymnasium_env


class Count(gymnasium.Env):
    """Shows the step; pays the action; ends at step 3 if the action there is positive."""

    observation_space = gymnasium.spaces.Box(0.0, 99.0, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-2.0, 6.0, (1,), np.float32)

    def reset(self, seed=None, options=None):
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        ended = bool(self.t == 3 and action[0] > 2.0)
        return np.full(1, self.t, np.float32), float(action[0]), ended, False, {}


@pytest.mark.parametrize(
    "space", ["Discrete(3)", "Box(-np.inf, np.inf, (2,))", "Box(0, 1, (2, 2))"]
)
def test_other_spaces_and_names_are_refused(space, monkeypatch):
    space = eval(space, vars(gymnasium.spaces), dict(np=np))
    gymnasium.register("Odd-v0", Count)
    monkeypatch.setattr(Count, "action_space", space)
    for task, why in (("Odd-v0", "vectors"), ("NoSuchTask-v0", "NoSuchTask")):
        with pytest.raises(SystemExit, match=f"error: {task}.*{why}"):
            getattr(gymnasium_env, task)(num_envs=2, device="cpu", seed=0)


def test_scaled_actions_ends_and_clocks():
    gymnasium.register("Count-v0", Count, max_episode_steps=4)
    env = getattr(gymnasium_env, "Count-v0")(num_envs=2, device="cpu", seed=0)
    assert (env.num_obs, env.num_acts, env.max_episode_length) == (1, 1, 4)
    assert env.reset()["obs"].tolist() == [[0.0], [0.0]]
    env.set_train_info(0, SimpleNamespace(epoch_num=5, first_epoch=4))
    steps = [env.step(torch.tensor([[1.0], [-1.0]])) for _ in range(4)]
    rewards = torch.stack([reward for _, reward, _, _ in steps])
    assert rewards.tolist() == [[6.0, -2.0]] * 4, "1 is the highest action, -1 the lowest"
    # The second clock starts at 2 of 4. With a done comes the next episode's first observation.
    obs = torch.stack([obs["obs"] for obs, _, _, _ in steps]).squeeze(2)
    assert obs.tolist() == [[1, 1], [2, 0], [0, 1], [1, 2]]
    assert [done.tolist() for _, _, done, _ in steps] == [[0, 0], [0, 1], [1, 0], [0, 0]]
    late = [infos["time_outs"].tolist() for _, _, _, infos in steps]
    assert late == [[0, 0], [0, 1], [0, 0], [0, 0]]
    env.close()
    assert not hasattr(gymnasium_env, "__path__")
