"""IsaacGymEnvs' Ant on the CPU, simulated by MuJoCo: a model of how to write a batched environment.

    pip install "mujoco>=3.3"
    python train_ppo.py --env-id examples.mujoco_ant:make_env

An ant with eight joints learns to run to a target 1 km away. MuJoCo steps all ants in threads of
its own: one for each core, or as many as the environment variable ANT_THREADS says. Torch computes
all observations and rewards at once, so there is no Python loop over environments.
"""

import math
import os
import re
from typing import Any, Dict, Tuple

import mujoco
import torch
from mujoco.rollout import Rollout
from torch import Tensor

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
STATE = mujoco.mjtState.mjSTATE_FULLPHYSICS  # 30 numbers: time, 15 positions, 14 velocities

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

# Two geoms collide if the contype of one meets the conaffinity of the other: an ant touches the
# floor, but not itself, as in the original.
MODEL = """<mujoco>
  <option timestep="{timestep}" iterations="10" ls_iterations="10"/>
  <default>
    <joint limited="true" armature="0.01" damping="0.1"/>
    <geom type="capsule" size="0.08" density="5" contype="0" conaffinity="1" rgba="0.9 0.4 0.1 1"/>
  </default>
  <asset>
    <texture type="skybox" builtin="flat" width="8" height="8" rgb1="0.7 0.85 1"/>
    <texture name="checks" type="2d" builtin="checker" width="64" height="64" rgb1="1 1 1"/>
    <material name="checks" texture="checks" texuniform="true"/>
  </asset>
  <worldbody>
    <geom type="plane" size="0 0 1" contype="1" material="checks" rgba="0.8 0.8 0.8 1"/>
    <light directional="true" dir="0.3 0.3 -1"/>
    <body name="torso" pos="0 0 0.44">
      <camera name="follow" mode="trackcom" pos="0 -3 1.3" xyaxes="1 0 0 0 0.4 1"/>
      <freejoint/>
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
    return mujoco.MjModel.from_xml_string(MODEL.format(**parts))


def observe(physics: Tensor, sensors: Tensor, actions: Tensor, limits: Tensor) -> Tensor:
    """Physics (E, 30), foot sensors (E, 24), actions (E, 8), limits (8, 2) -> (E, 60) float64."""
    x, y, height = physics[:, 1:4].unbind(1)
    joints, velocity, spin, joint_velocity = physics[:, 8:].split((8, 3, 3, 8), dim=1)

    # Rotate the three unit vectors by the torso's quaternion (w, v): e + 2w (v x e) + 2v x (v x e).
    w, v = physics[:, None, 4:5], physics[:, None, 5:8]
    unit = torch.eye(3, dtype=torch.float64).unsqueeze(0)
    twice = 2.0 * torch.linalg.cross(v, unit)
    axes = unit + w * twice + torch.linalg.cross(v, twice)  # (E, 3, 3), rows: forward, left, up
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


class MujocoAnt:
    """E = num_envs ants, simulated on the CPU; observations and rewards go to `device`.

    The step that ends an episode starts the next one too: the observation returned with done=True
    is the first of the new episode, while reward and infos belong to the old one.
    """

    num_obs, num_acts, max_episode_length, clip_obs = 60, 8, 1000, 5.0
    exact_state = True  # get_env_state() returns all that later steps depend on

    def __init__(self, num_envs: int, device: Any = "cpu"):
        self.num_envs, self.device, self.renderer = num_envs, device, None
        self.model = make_model()
        self.limits = torch.tensor(self.model.jnt_range[1:])  # row 0 is the torso's free joint
        threads = int(os.environ.get("ANT_THREADS", os.cpu_count() or 1))
        self.pool = Rollout(nthread=threads)
        self.datas = [mujoco.MjData(self.model) for _ in range(threads)]

        # The state. A step puts new tensors here and never writes into those of an earlier step.
        self.physics, self.obs = self._new_episodes(num_envs)  # (E, 30), (E, 60)
        self.distance = torch.full((num_envs,), TARGET_X).double()  # to the target, in m
        self.clock = torch.zeros(num_envs, dtype=torch.long)  # steps of the episode so far

    def _new_episodes(self, count: int) -> Tuple[Tensor, Tensor]:
        """The start pose with noise on the joints: physics (count, 30), observations (count, 60).

        The noise comes from torch's global generator, so the trainer's seed decides it.
        """
        low, high = self.limits.unbind(1)
        noise = 2.0 * torch.rand(count, 16).double() - 1.0
        rest = torch.zeros_like(low).clamp(low, high)  # the allowed angles that are closest to 0
        physics = torch.zeros(count, 30).double()
        physics[:, 1:16] = torch.tensor(self.model.qpos0)
        physics[:, 8:16] = (rest + 0.2 * noise[:, :8]).clamp(low, high)
        physics[:, 22:30] = 0.1 * noise[:, 8:]
        zeros = torch.zeros(count, 24).double()  # the feet are in the air, no action was taken
        return physics, observe(physics, zeros, zeros[:, :8], self.limits)

    def reset(self) -> Dict[str, Tensor]:
        """The current observation (E, 60). It resets nothing: `step` does so when it is due."""
        return {"obs": self.obs.clamp(-self.clip_obs, self.clip_obs).float().to(self.device)}

    def step(self, actions: Tensor) -> Tuple[Dict[str, Tensor], Tensor, Tensor, Dict[str, Any]]:
        """Actions (E, 8) in [-1, 1] -> observations (E, 60), reward (E,), done (E,), infos."""
        actions = actions.detach().cpu().double().clamp(-1.0, 1.0)
        before, torques = self.physics.numpy(), actions.unsqueeze(1).numpy()
        states, sensors = self.pool.rollout(self.model, self.datas, before, torques, nstep=SUBSTEPS)
        physics = torch.from_numpy(states[:, -1].copy())  # after the last of the substeps
        obs = observe(physics, torch.from_numpy(sensors[:, -1]), actions, self.limits)

        distance = torch.hypot(TARGET_X - physics[:, 1], physics[:, 2])
        reward = compute_reward(obs, progress=(self.distance - distance) / DT)
        clock = self.clock + 1
        fell = obs[:, 0] < FALLEN
        time_outs = (clock >= self.max_episode_length) & ~fell
        done = fell | time_outs

        infos: Dict[str, Any] = {"time_outs": time_outs.to(self.device)}
        if done.any():
            infos["episode"] = {"metres": physics[done, 1].float(), "falls": fell[done].float()}
            physics[done], obs[done] = self._new_episodes(int(done.sum()))
        self.physics, self.obs = physics, obs
        self.distance = torch.where(done, TARGET_X, distance)
        self.clock = torch.where(done, 0, clock)
        return self.reset(), reward.float().to(self.device), done.to(self.device), infos

    def mirror(self, x: Tensor, kind: str) -> Tensor:
        """The mirror images of rows x (n, ...) of "obs" or "actions", for recipes/mirror.patch."""
        others, signs = MIRROR[kind]
        return x[:, others.to(x.device)] * signs.to(x)

    def get_env_state(self) -> Dict[str, Tensor]:
        """All that `step` and `reset` read. MuJoCo's solver starts anew in each step."""
        return {name: getattr(self, name) for name in ("physics", "obs", "distance", "clock")}

    def set_env_state(self, state: Dict[str, Tensor]) -> None:
        """Continue exactly where `get_env_state` was called."""
        for name, value in state.items():
            setattr(self, name, value.cpu())

    def policy_metadata(self) -> Dict[str, Any]:
        """What one must know to run a policy outside this file, apart from its weights."""
        names = {"observation_names": OBSERVATIONS, "action_names": JOINTS, "joint_names": JOINTS}
        return {**names, "torque_per_action_nm": GEAR, "control_hz": round(1 / DT, 6)}

    def render(self, mode: str = "rgb_array"):
        """The first ant, as a picture (360, 480, 3) uint8 from a camera that follows it."""
        if self.renderer is None:
            try:
                self.renderer = mujoco.Renderer(self.model, height=360, width=480)
            except Exception as error:  # every OpenGL library has errors of its own
                hint = "set MUJOCO_GL=egl (apt install libegl1) or osmesa (apt install libosmesa6)"
                raise RuntimeError(f"MuJoCo cannot draw without OpenGL: {hint}") from error
        data = mujoco.MjData(self.model)
        mujoco.mj_setState(self.model, data, self.physics[0].numpy(), STATE)
        mujoco.mj_forward(self.model, data)
        self.renderer.update_scene(data, camera="follow")
        return self.renderer.render()

    def close(self) -> None:
        self.pool.close()
        if self.renderer is not None:
            self.renderer.close()


def make_env(num_envs: int, device: Any, seed: int) -> MujocoAnt:
    """The factory for --env-id. It needs no seed: all noise is from torch's global generator."""
    return MujocoAnt(num_envs, device)
