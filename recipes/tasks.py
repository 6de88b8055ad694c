"""Tasks on which the recipes were measured: python train_ppo.py --env-id recipes.tasks:blind"""

import torch

import train_ppo


class Blind(train_ppo.Cartpole):
    """Cartpole that shows positions and angles, and no velocities."""

    num_obs = 2

    def reset(self):
        return {"obs": super().reset()["obs"][:, [0, 2]]}


class Car:
    """Gymnasium's MountainCarContinuous without a hint: the top pays 1, and nothing else does. The
    motor is too weak to drive up; the car has to swing."""

    num_obs, num_acts, max_episode_length = 2, 1, 200

    def __init__(self, num_envs):
        self.num_envs = num_envs
        self.x = torch.full((num_envs,), -0.5)
        self.v = torch.zeros(num_envs)
        self.clock = torch.zeros(num_envs, dtype=torch.long)

    def reset(self):
        return {"obs": torch.stack((self.x, 10.0 * self.v), dim=1)}

    def step(self, actions):
        push = 0.0015 * actions[:, 0].cpu().clamp(-1.0, 1.0)
        self.v = (self.v + push - 0.0025 * (3.0 * self.x).cos()).clamp(-0.07, 0.07)
        self.x = (self.x + self.v).clamp(-1.2, 0.6)
        self.v = torch.where((self.x <= -1.2) & (self.v < 0.0), 0.0, self.v)
        self.clock = self.clock + 1

        top = self.x >= 0.45
        late = self.clock >= self.max_episode_length
        done = top | late
        self.clock = torch.where(done, 0, self.clock)
        self.x = torch.where(done, 0.2 * torch.rand_like(self.x) - 0.6, self.x)
        self.v = torch.where(done, 0.0, self.v)
        return self.reset(), top.float(), done, {"time_outs": late & ~top}


class Point:
    """A point that is pushed to 0 and starts anew within the step in which the clock ends it."""

    num_obs, num_acts = 2, 1

    def __init__(self, num_envs, limit):
        self.num_envs = num_envs
        self.max_episode_length = limit
        self.x = 2.0 * torch.rand(num_envs) - 1.0
        self.v = torch.zeros(num_envs)
        self.clock = torch.zeros(num_envs, dtype=torch.long)

    def reset(self):
        return {"obs": torch.stack((self.x, self.v), dim=1)}

    def step(self, actions):
        action = actions[:, 0].cpu()
        self.v = self.v + 0.2 * action
        self.x = self.x + 0.2 * self.v
        reward = -self.x.square() - 0.1 * action.square()
        self.clock = self.clock + 1
        infos = {"time_outs": self.clock >= self.max_episode_length, "final_obs": self.reset()}

        late = infos["time_outs"]
        self.clock = torch.where(late, 0, self.clock)
        self.x = torch.where(late, 2.0 * torch.rand_like(self.x) - 1.0, self.x)
        self.v = torch.where(late, 0.0, self.v)
        return self.reset(), reward, late, infos


def blind(num_envs, device, seed):
    return Blind(num_envs, torch.device(device))


def car(num_envs, device, seed):
    return Car(num_envs)


def point4(num_envs, device, seed):
    return Point(num_envs, 4)


def point8(num_envs, device, seed):
    return Point(num_envs, 8)


def point60(num_envs, device, seed):
    return Point(num_envs, 60)
