"""How alike the left and the right side of a trained Ant are, for mirror.patch.

    python recipes/asymmetry.py runs/NAME

128 ants play 1,000 steps by the mean actions of last.pth. `policy` is the distance between the
action in a mirror image and the image of the action, as a part of their length; `gait` compares
how far a joint and its counterpart swing (standard deviations), from step 200 on. 0 is alike.
Not for a policy with an LSTM.
"""

import os
import sys
from dataclasses import fields

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import train_ppo
from examples.mujoco_ant import MujocoAnt


@torch.no_grad()
def main(run_dir: str) -> None:
    torch.manual_seed(0)
    path = os.path.join(run_dir, "nn", "last.pth")
    state = train_ppo.load_checkpoint(path)
    env = MujocoAnt(128)
    known = [field.name for field in fields(train_ppo.Args)]  # not the flags of a recipe
    args = train_ppo.Args(**{key: x for key, x in state["args"].items() if key in known})
    model = train_ppo.ActorCritic(env.num_obs, env.num_acts, args)
    train_ppo.load_weights(model, state, path)

    obs, angles, distance, size = env.reset()["obs"], [], 0.0, 0.0
    returns, alive = torch.zeros(128), torch.ones(128, dtype=torch.bool)
    for t in range(1000):
        action = model.mean_action(obs)
        image = env.mirror(model.mean_action(env.mirror(obs, "obs")), "actions")
        distance += (action - image).norm(dim=1).mean()
        size += 0.5 * (action.norm(dim=1) + image.norm(dim=1)).mean()
        seen, reward, done, _ = env.step(action)
        obs = seen["obs"]
        returns += reward * alive
        alive &= ~done
        if t >= 200:
            angles.append(env.physics[:, 8:16])
    swing = torch.stack(angles).std(0)  # (128, 8)
    difference = swing - env.mirror(swing, "actions").abs()
    gait = (difference.abs().mean(1) / swing.mean(1)).mean()
    print(f"return {returns.mean():.0f}, policy {distance / size:.2f}, gait {gait:.2f}")


if __name__ == "__main__":
    main(sys.argv[1])
