"""IsaacGymEnvs' Ant on the CPU, simulated by MuJoCo.

    pip install "mujoco>=3.3.3"
    python train_ppo.py --env-id examples.mujoco_ant:make_env

An ant with eight joints learns to run to a target 1 km away. mujoco_robot.py simulates it; what is
here makes an Ant of that robot: its body, and its observations and rewards.
"""

import math
import re
from typing import Any, Dict, Tuple

import mujoco
import torch
from torch import Tensor

from examples.mujoco_robot import MujocoRobot, add_scene, body_axes

# The trainer's arguments: those of IsaacGymEnvs' AntPPO.yaml, but with a quarter of the
# environments and of the minibatch size, and 300 epochs instead of 500.
SETTINGS = dict(num_envs=1024, num_steps=16, minibatch_size=8192, update_epochs=4, max_epochs=300)
SETTINGS.update(learning_rate=3e-4, kl_threshold=0.008, vf_coef=2.0, max_grad_norm=0.0)
SETTINGS.update(reward_scale=0.01, units=(256, 128, 64), save_best_after=100, save_frequency=50)

DT = 1 / 60  # seconds between two actions
SUBSTEPS = 2  # simulation steps in that time
GEAR = 15.0  # torque of an action of 1, in N m
FALLEN = 0.31  # an ant whose torso's centre is lower than this [m] has fallen
TARGET_X = 1000.0  # the target is on the x axis, this many metres from the start

LEGS = (1, 2, 3, 4)
JOINTS = [f"{joint}_{leg}" for leg in LEGS for joint in ("hip", "ankle")]
SENSORS = [f"foot_{leg}_{kind}" for leg in LEGS for kind in ("force", "torque")]
OBSERVATIONS = ["height"] + [f"{name}_{axis}" for name in ("velocity", "spin") for axis in "xyz"]
OBSERVATIONS += ["yaw", "roll", "angle_to_target", "up_projection", "heading_projection"]
OBSERVATIONS += [f"{kind}_{joint}" for kind in ("position", "velocity") for joint in JOINTS]
OBSERVATIONS += [f"{sensor}_{axis}" for sensor in SENSORS for axis in "xyz"]
OBSERVATIONS += [f"previous_action_{joint}" for joint in JOINTS]

# In a mirror that swaps left and right, y to -y, these numbers change their signs, and legs 1 and 4
# change places, as do 2 and 3.
TURNED = re.compile("velocity_y|spin_[xz]|yaw|roll|angle_to_target|hip|force_y|torque_[xz]")
OTHER_LEG = str.maketrans("1234", "4321")
MIRROR = {}  # kind -> for each number the one in its place, and its sign
for kind, names in dict(obs=OBSERVATIONS, actions=JOINTS).items():
    others = torch.tensor([names.index(name.translate(OTHER_LEG)) for name in names])
    signs = torch.tensor([-1.0 if TURNED.search(name) else 1.0 for name in names])
    MIRROR[kind] = (others, signs)

MODEL = """<mujoco>
  <option timestep="{timestep}" iterations="10" ls_iterations="10"/>
  <default>
    <joint limited="true" armature="0.01" damping="0.1"/>
    <geom type="capsule" size="0.08" density="5" rgba="0.9 0.4 0.1 1"/>
  </default>
  <worldbody>
    <body name="torso" pos="0 0 0.44">
      <freejoint/>
      <light pos="0 0 3" mode="trackcom"/>
      <geom type="sphere" size="0.25"/>{legs}
    </body>
  </worldbody>
  <actuator>{motors}</actuator>
  <sensor>{sensors}</sensor>
</mujoco>"""
LEG = """
<frame euler="0 0 {turn}">
  <geom fromto="0 0 0 0.2 0.2 0"/>
  <body pos="0.2 0.2 0">
    <joint name="hip_{leg}" axis="0 0 1" range="-40 40"/>
    <geom fromto="0 0 0 0.2 0.2 0"/>
    <body pos="0.2 0.2 0">
      <joint name="ankle_{leg}" axis="{ankle_axis}" range="{ankle_range}"/>
      <geom fromto="0 0 0 0.4 0.4 0"/>
      <site name="foot_{leg}" euler="0 0 -{turn}"/>
    </body>
  </body>
</frame>"""


def make_model() -> mujoco.MjModel:
    """Put the XML together: four equal legs, 90 degrees apart, with motors and sensors."""
    legs = ""
    for leg, turn in zip(LEGS, (0, 90, 180, 270)):
        # The ankles of legs 2 and 3 count backwards, as in the original.
        axis, degrees = ("-1 1 0", "30 100") if leg in (1, 4) else ("1 -1 0", "-100 -30")
        legs += LEG.format(leg=leg, turn=turn, ankle_axis=axis, ankle_range=degrees)
    motors = "".join(f'<motor joint="{joint}" gear="{GEAR}"/>' for joint in JOINTS)
    sensors = "".join(f'<force site="foot_{leg}"/><torque site="foot_{leg}"/>' for leg in LEGS)
    parts = dict(timestep=DT / SUBSTEPS, legs=legs, motors=motors, sensors=sensors)
    spec = mujoco.MjSpec.from_string(MODEL.format(**parts))
    add_scene(spec)
    return spec.compile()


def observe(physics: Tensor, sensors: Tensor, actions: Tensor, limits: Tensor) -> Tensor:
    """Physics (E, 30), foot sensors (E, 24), actions (E, 8), limits (8, 2) -> (E, 60) float64.
    Physics is the time, 15 positions and 14 velocities."""
    x, y, height = physics[:, 1:4].unbind(1)
    joints, velocity, spin, joint_velocity = physics[:, 8:].split((8, 3, 3, 8), dim=1)

    axes = body_axes(physics[:, 4:8])  # (E, 3, 3), rows: forward, left, up
    velocity = (axes @ velocity.unsqueeze(2)).squeeze(2)  # along these axes, as the spin already is

    yaw = torch.atan2(axes[:, 0, 1], axes[:, 0, 0])
    roll = torch.atan2(axes[:, 1, 2], axes[:, 2, 2])
    bearing = torch.atan2(-y, TARGET_X - x)
    to_target = torch.remainder(bearing - yaw + math.pi, 2 * math.pi) - math.pi
    heading = axes[:, 0, 0] * bearing.cos() + axes[:, 0, 1] * bearing.sin()

    pose = torch.stack((yaw, roll, to_target, axes[:, 2, 2], heading), dim=1)
    low, high = limits.unbind(1)
    scaled = (2.0 * joints - low - high) / (high - low)
    parts = (height[:, None], velocity, spin, pose, scaled, 0.2 * joint_velocity, 0.1 * sensors)
    return torch.cat((*parts, actions), dim=1)


def compute_reward(obs: Tensor, progress: Tensor) -> Tensor:
    """Observations (E, 60), not clamped, and speed towards the target (E,) in m/s -> (E,)."""
    up, heading, actions = obs[:, 10], obs[:, 11], obs[:, 52:60]
    reward = progress + 0.5 + 0.1 * (up > 0.93) + 0.5 * (heading / 0.8).clamp(max=1.0)
    reward -= 0.005 * actions.square().sum(1)
    reward -= 0.05 * (actions * obs[:, 20:28]).abs().sum(1)  # electricity
    reward -= 0.1 * (obs[:, 12:20] > 0.99).sum(1)  # only the upper limits, as in the original
    return torch.where(obs[:, 0] < FALLEN, -2.0, reward)


class MujocoAnt(MujocoRobot):
    """E = num_envs ants."""

    num_obs, num_acts, clip_obs = 60, 8, 5.0
    substeps = SUBSTEPS
    view = dict(distance=3.3, azimuth=90.0, elevation=-20.0)

    def __init__(self, num_envs: int, device: Any = "cpu"):
        model = make_model()
        self.limits = torch.tensor(model.jnt_range[1:])  # row 0 is the torso's free joint
        super().__init__([model], num_envs, device)

    def new_episodes(self, count: int) -> Dict[str, Tensor]:
        """The start pose with noise on the joints. The feet are in the air."""
        state = self.at_rest(count)
        low, high = self.limits.unbind(1)
        noise = 2.0 * torch.rand(count, 16).double() - 1.0
        rest = torch.zeros_like(low).clamp(low, high)  # the allowed angles that are closest to 0
        state["physics"][:, 8:16] = (rest + 0.2 * noise[:, :8]).clamp(low, high)
        state["physics"][:, 22:30] = 0.1 * noise[:, 8:]
        return state

    def controls(self) -> Tensor:
        return self.actions

    def observe(self) -> Dict[str, Tensor]:
        obs = observe(self.physics, self.sensors, self.actions, self.limits)
        return {"obs": obs.clamp(-self.clip_obs, self.clip_obs)}

    def judge(self, before: Dict[str, Tensor]) -> Tuple[Tensor, Tensor, Dict[str, Any]]:
        obs = observe(self.physics, self.sensors, self.actions, self.limits)
        distances = []  # to the target, in m
        for physics in (before["physics"], self.physics):
            distances.append(torch.hypot(TARGET_X - physics[:, 1], physics[:, 2]))
        reward = compute_reward(obs, progress=(distances[0] - distances[1]) / self.dt)
        return reward, obs[:, 0] < FALLEN, {"episode": {"metres": self.physics[:, 1]}}

    def mirror(self, x: Tensor, kind: str) -> Tensor:
        """The mirror images of rows x (n, ...) of "obs" or "actions", for recipes/mirror.patch."""
        others, signs = MIRROR[kind]
        return x[:, others.to(x.device)] * signs.to(x)

    def policy_metadata(self) -> Dict[str, Any]:
        """What one must know to run a policy outside this file, apart from its weights."""
        names = {"observation_names": OBSERVATIONS, "action_names": JOINTS, "joint_names": JOINTS}
        return {**names, "torque_per_action_nm": GEAR, "control_hz": round(1 / self.dt, 6)}


def make_env(num_envs: int, device: Any, seed: int) -> MujocoAnt:
    """The factory for --env-id. It needs no seed: all noise is from torch's global generator."""
    return MujocoAnt(num_envs, device)
