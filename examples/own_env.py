"""An environment of your own, as short as it can be.

    python train_ppo.py --env-id examples.own_env:make_env --max-epochs 30

Copy this file, put your simulation into `step`, and name it module:factory. All environments are
simulated together: every tensor has one row for each of them and stays on one device. What else an
environment may offer stands at the top of the ENVIRONMENTS section of train_ppo.py.
"""

import torch


class Reach:
    """A point in the square [-1, 1] x [-1, 1] moves to a goal. An episode lasts 100 steps.

    Observation: position and goal - position. Action: velocity. Reward: 1 - distance to the goal.
    """

    num_obs = 4
    num_acts = 2
    max_episode_length = 100

    def __init__(self, num_envs: int, device: str):
        self.num_envs = num_envs
        self.device = device
        self.position = self.random_points()
        self.goal = self.random_points()
        # Each environment starts somewhere in its episode, so that they do not all end together.
        self.steps = torch.randint(self.max_episode_length, (num_envs,), device=device)

    def random_points(self) -> torch.Tensor:
        return 2.0 * torch.rand(self.num_envs, 2, device=self.device) - 1.0

    def reset(self):
        """Called before training only: afterwards `step` resets the environments that are done."""
        return {"obs": torch.cat((self.position, self.goal - self.position), dim=1)}

    def step(self, actions: torch.Tensor):
        self.position = (self.position + 0.1 * actions).clamp(-1.0, 1.0)
        distance = (self.goal - self.position).norm(dim=1)
        reward = 1.0 - distance

        self.steps = self.steps + 1
        done = self.steps >= self.max_episode_length
        self.steps = torch.where(done, 0, self.steps)
        # torch.where, not indexing by `done`: a GPU would have to wait for the number of rows.
        self.position = torch.where(done[:, None], self.random_points(), self.position)
        self.goal = torch.where(done[:, None], self.random_points(), self.goal)

        infos = {
            "time_outs": done,  # the clock ended these episodes, the task did not
            "distance": distance.mean(),  # any scalar is logged
        }
        return self.reset(), reward, done, infos


def make_env(num_envs: int, device: str, seed: int) -> Reach:
    # torch is seeded already. A simulator with random numbers of its own would take `seed`.
    return Reach(num_envs, device)
