"""A guard around any environment: one that simulates NaN or Inf is reset instead of ending the run.

    python examples/nan_guard.py --env-id Ant        any argument of train_ppo.py
    NanGuard(my_env)                                 or in the factory of an env of your own

Its row of that step becomes harmless (observations, states and reward 0), its episode ends, and it
is reset by its own means: `reset_buf`, as IsaacGymEnvs' tasks and Cartpole have it, or a function,
NanGuard(env, reset), that gets the mask (E,) of broken environments in each step. The mean number
of those in a step is logged as broken_envs. Watch it: a guard hides a fault, it does not mend it.
"""

import os
import sys
from typing import Any, Callable, Optional

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import train_ppo
from train_ppo import Tensor, UserError


class NanGuard:
    """The environment `env`, whose rows are finite. Nothing in here makes a GPU wait."""

    def __init__(self, env: Any, reset: Optional[Callable[[Tensor], None]] = None):
        if reset is None and not hasattr(env, "reset_buf"):
            raise UserError("NanGuard: the env has no reset_buf, so give NanGuard(env, reset)")
        self.env = env
        self.reset_broken = reset or self.set_reset_buf

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)  # what is not defined here

    def set_reset_buf(self, broken: Tensor) -> None:
        self.env.reset_buf.masked_fill_(broken.to(self.env.reset_buf.device), 1)

    def step(self, actions: Tensor):
        obs, reward, done, infos = self.env.step(actions)
        broken = ~reward.isfinite()
        for x in obs.values():
            broken = broken | ~x.isfinite().all(1).to(broken.device)
        self.reset_broken(broken)
        for name, x in obs.items():
            obs = dict(obs, **{name: x.masked_fill(broken.to(x.device).unsqueeze(1), 0.0)})
        infos = dict(infos, broken_envs=broken.sum())
        if "time_outs" in infos:  # what follows is unknown, so it is no time limit
            infos["time_outs"] = infos["time_outs"] * ~broken
        return obs, reward.masked_fill(broken, 0.0), done.bool() | broken, infos


if __name__ == "__main__":
    make_env = train_ppo.make_env
    train_ppo.make_env = lambda args, seed: NanGuard(make_env(args, seed))
    train_ppo.main()
