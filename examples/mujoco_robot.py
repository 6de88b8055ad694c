"""A walking robot from an XML, on the CPU: a file to copy for a robot of your own.

    pip install "mujoco>=3.3.3"
    python train_ppo.py --env-id examples.mujoco_robot:make_env   the quadruped at the end
    pip install --no-deps mjlab==1.6.0                            for the XML of Unitree's Go1
    python train_ppo.py --env-id examples.mujoco_robot:go1

MujocoRobot simulates any robot and keeps the books of its episodes. Quadruped is a task: walk as
commanded, by joints that a PD controller holds. It has some of what a policy for a real robot is
trained with: noisy observations, a critic that sees more, random friction and payload. Delays,
pushes and motors that differ are left to you. MuJoCo steps all robots in threads of its own: one
for each core, or as many as the environment variable MUJOCO_THREADS says. Torch computes
observations and rewards of all at once.
"""

import copy
import importlib.util
import os
from typing import Any, Dict, List, Tuple

import mujoco
import numpy as np
import torch
from mujoco.rollout import Rollout
from torch import Tensor

# The trainer's arguments, for the quadruped.
SETTINGS = dict(num_envs=1024, num_steps=24, minibatch_size=6144, update_epochs=5, max_epochs=250)
SETTINGS.update(learning_rate=1e-3, kl_threshold=0.01, max_lr=3e-3, ent_coef=0.005, vf_coef=2.0)
SETTINGS.update(reward_scale=1.0, units=(128, 64, 32), critic_units=(128, 64, 32), sigma_init=-0.5)
SETTINGS.update(clip_actions=False, bounds_loss_coef=0.0, save_best_after=100, save_frequency=50)

PHYSICS = mujoco.mjtState.mjSTATE_FULLPHYSICS  # time, nq positions, nv velocities, and more


def body_axes(quaternion: Tensor) -> Tensor:
    """Quaternions (E, 4) of bodies, w first -> their axes (E, 3, 3) in the world: rows forward,
    left, up. `axes @ v` turns a vector of the world into one as the body sees it."""
    w, v = quaternion[:, None, :1], quaternion[:, None, 1:]
    unit = torch.eye(3, dtype=torch.float64).unsqueeze(0)
    twice = 2.0 * torch.linalg.cross(v, unit)
    return unit + w * twice + torch.linalg.cross(v, twice)


def add_scene(spec: mujoco.MjSpec) -> None:
    """To an XML that has none, add a floor in checks, called "floor", a sky and a sun. What could
    touch something touches that floor, but the robot no longer touches itself, to save time."""
    for geom in spec.geoms:  # two collide if the contype of one meets the conaffinity of the other
        geom.conaffinity = int(geom.contype > 0 or geom.conaffinity > 0)
        geom.contype = 0
    sky = dict(type=mujoco.mjtTexture.mjTEXTURE_SKYBOX, builtin=mujoco.mjtBuiltin.mjBUILTIN_FLAT)
    spec.add_texture(name="sky", **sky, width=8, height=8, rgb1=[0.7, 0.85, 1.0])
    checks = dict(type=mujoco.mjtTexture.mjTEXTURE_2D, builtin=mujoco.mjtBuiltin.mjBUILTIN_CHECKER)
    spec.add_texture(name="checks", **checks, width=64, height=64, rgb1=[1, 1, 1])
    material = spec.add_material(name="checks", texuniform=True)
    material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = "checks"
    floor = dict(type=mujoco.mjtGeom.mjGEOM_PLANE, size=[0, 0, 1], contype=1, material="checks")
    spec.worldbody.add_geom(name="floor", **floor, rgba=[0.8, 0.8, 0.8, 1])
    sun = dict(type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL, dir=[0.3, 0.3, -1], castshadow=False)
    spec.worldbody.add_light(**sun, diffuse=[0.4, 0.4, 0.4])


class MujocoRobot:
    """E = num_envs robots, simulated on the CPU; observations and rewards go to `device`.

    The step that ends an episode starts the next one too: the observation returned with done=True
    is the first of the new episode, while reward and infos belong to the old one. All noise comes
    from torch's global generator, so the trainer's seed decides it.

    The state is physics (E, ...), sensors (E, nsensordata) at the start of the last substep,
    actions (E, num_acts), clock (E,), and what the task adds, each an attribute. A task says what
    num_obs and num_acts are, and has four methods, of which the first is needed by __init__:

    new_episodes(count)  the state of `count` robots at the start of an episode, as tensors by name
    controls()           what the actuators are told for self.actions: (E, nu)
    observe()            {"obs": (E, num_obs)}, and for a critic that sees more {"states": ...}
    judge(before)        of the step from the state `before` to this one reward (E,), fell (E,) and
                         infos; the place to change what the task has added to the state.
                         infos["episode"][name] (E,) is reported where an episode ends here
    """

    max_episode_length = 1000  # steps
    substeps = 4  # simulation steps between two actions, each as long as the model says
    action_limit = 1.0
    view = dict(distance=3.0, azimuth=90.0, elevation=-20.0)  # of the camera [m, degrees]
    exact_state = True  # get_env_state() returns all that later steps depend on

    def __init__(self, models: List[mujoco.MjModel], num_envs: int, device: Any):
        """Robot i is simulated with models[i % len(models)]."""
        self.num_envs, self.device, self.renderer = num_envs, device, None
        self.model = models[0]
        self.models = [models[i % len(models)] for i in range(num_envs)]
        self.dt = self.substeps * self.model.opt.timestep  # seconds between two actions
        threads = int(os.environ.get("MUJOCO_THREADS", os.cpu_count() or 1))
        self.pool = Rollout(nthread=threads)
        self.datas = [mujoco.MjData(self.model) for _ in range(threads)]
        # A step puts new tensors here and never writes into those of an earlier one.
        self.clock = torch.zeros(num_envs, dtype=torch.long)  # steps of the episode so far
        for name, value in self.new_episodes(num_envs).items():
            setattr(self, name, value)
        self.state_names = ["clock", *self.new_episodes(0)]

    def at_rest(self, count: int) -> Dict[str, Tensor]:
        """The state of robots in the model's own pose qpos0, with all else at 0."""
        model = self.model
        physics = torch.zeros(count, mujoco.mj_stateSize(model, PHYSICS)).double()
        physics[:, 1 : 1 + model.nq] = torch.tensor(model.qpos0)
        sensors = torch.zeros(count, model.nsensordata).double()
        actions = torch.zeros(count, self.num_acts).double()
        return {"physics": physics, "sensors": sensors, "actions": actions}

    def split(self, physics: Tensor) -> Tuple[Tensor, Tensor]:
        """Views of the positions (E, nq) and the velocities (E, nv) in physics."""
        end = 1 + self.model.nq
        return physics[:, 1:end], physics[:, end : end + self.model.nv]

    def reset(self) -> Dict[str, Tensor]:
        """The current observation. It resets nothing: `step` does so when it is due."""
        return {name: x.float().to(self.device) for name, x in self.observe().items()}

    def step(self, actions: Tensor) -> Tuple[Dict[str, Tensor], Tensor, Tensor, Dict[str, Any]]:
        """Actions (E, num_acts) -> observations, reward (E,), done (E,), infos."""
        before = self.get_env_state()
        actions = actions.detach().cpu().double()
        self.actions = actions.clamp(-self.action_limit, self.action_limit)
        controls = self.controls().unsqueeze(1).numpy()
        physics, sensors = self.pool.rollout(
            self.models, self.datas, before["physics"].numpy(), controls, nstep=self.substeps
        )
        self.physics = torch.from_numpy(physics[:, -1].copy())  # after the last of the substeps
        self.sensors = torch.from_numpy(sensors[:, -1].copy())
        self.clock = self.clock + 1

        reward, fell, infos = self.judge(before)
        # Where a simulation has become unstable, MuJoCo has reset it, and its time with it.
        unstable = self.physics[:, 0] < before["physics"][:, 0] + 0.9 * self.dt
        reward, fell = torch.where(unstable, 0.0, reward), fell | unstable
        time_outs = (self.clock >= self.max_episode_length) & ~fell
        done = fell | time_outs
        episode = {"falls": fell, "unstable": unstable, **infos.pop("episode", {})}
        infos["time_outs"] = time_outs.to(self.device)
        if done.any():
            infos["episode"] = {name: x[done].float() for name, x in episode.items()}
            self.clock = torch.where(done, 0, self.clock)
            for name, fresh in self.new_episodes(int(done.sum())).items():
                value = getattr(self, name).clone()
                value[done] = fresh
                setattr(self, name, value)
        return self.reset(), reward.float().to(self.device), done.to(self.device), infos

    def get_env_state(self) -> Dict[str, Tensor]:
        """All that `step` and `reset` read. MuJoCo's solver starts anew in each step."""
        return {name: getattr(self, name) for name in self.state_names}

    def set_env_state(self, state: Dict[str, Tensor]) -> None:
        """Continue exactly where `get_env_state` was called."""
        for name in self.state_names:
            setattr(self, name, state[name].cpu())

    def render(self, mode: str = "rgb_array"):
        """The first robot, as a picture (360, 480, 3) uint8 from a camera that follows it."""
        if self.renderer is None:
            try:
                self.renderer = mujoco.Renderer(self.model, height=360, width=480)
            except Exception as error:  # every OpenGL library has errors of its own
                hint = "set MUJOCO_GL=egl (apt install libegl1) or osmesa (apt install libosmesa6)"
                raise RuntimeError(f"MuJoCo cannot draw without OpenGL: {hint}") from error
            self.camera = mujoco.MjvCamera()
            self.camera.type, self.camera.trackbodyid = mujoco.mjtCamera.mjCAMERA_TRACKING, 1
            for name, value in self.view.items():
                setattr(self.camera, name, value)
        data = mujoco.MjData(self.model)
        mujoco.mj_setState(self.model, data, self.physics[0].numpy(), PHYSICS)
        mujoco.mj_forward(self.model, data)
        self.renderer.update_scene(data, camera=self.camera)
        self.decorate(self.renderer.scene)
        return self.renderer.render()

    def decorate(self, scene: mujoco.MjvScene) -> None:
        """A task may draw something into the picture."""

    def close(self) -> None:
        self.pool.close()
        if self.renderer is not None:
            self.renderer.close()


# --------------------------------------------------------------------------------------------------
# the task: a robot with four legs of three joints each walks as commanded

FEET = ("FR", "FL", "RR", "RL")  # front and rear, right and left; also the names of sites there
JOINTS = [f"{foot}_{joint}_joint" for foot in FEET for joint in ("hip", "thigh", "calf")]
POSE = torch.tensor([0.1, 0.9, -1.8, -0.1, 0.9, -1.8] * 2).double()  # [rad], feet inwards
HEIGHT, LOW = 0.30, 0.15  # of the trunk [m]: at the start, and where the robot has fallen
DT = 0.02  # seconds between two actions
KP, KD, TORQUE = 35.0, 0.6, 23.7  # N m/rad, N m s/rad, N m; a Go1's knees can do more
ACTION_SCALE = 0.3  # rad that an action of 1 moves a joint's target away from its pose
COMMANDS = torch.tensor([[0.2, 1.0], [-0.2, 0.2], [-0.5, 0.5]]).double()  # m/s, m/s, rad/s
STAND, NEW_COMMAND = 0.1, 250  # part of the commands that are 0; steps until they change
FRICTION, PAYLOAD = (0.4, 1.2), (-0.5, 1.5)  # of the feet on the floor; of the trunk [kg]
VARIANTS = 16  # models with friction and payload of their own
# What the actor sees: rad/s, the direction of gravity, the command, rad from the pose, rad/s.
OBSERVATIONS = [f"{what}_{axis}" for what in ("spin", "gravity") for axis in "xyz"]
OBSERVATIONS += ["command_forward", "command_left", "command_turn"]
OBSERVATIONS += [f"{what}_{x}" for what in ("position", "velocity", "last_action") for x in JOINTS]
NOISE = dict(spin=0.1, gravity=0.03, position=0.02, velocity=0.6)  # of the sensors, at most
NOISE = torch.tensor([NOISE.get(name.split("_")[0], 0.0) for name in OBSERVATIONS]).double()


def make_models(spec: mujoco.MjSpec) -> List[mujoco.MjModel]:
    """Put a robot without motors on a floor, with PD control, and vary friction and payload."""
    spec.option.timestep = DT / Quadruped.substeps
    spec.option.iterations, spec.option.ls_iterations = 10, 20
    add_scene(spec)
    spec.geom("floor").priority = 1  # its friction and softness count, not those of the feet
    for name in JOINTS:
        spec.joint(name).armature = 0.005
        motor = spec.add_actuator(name=name, target=name, trntype=mujoco.mjtTrn.mjTRN_JOINT)
        motor.set_to_position(kp=KP, kv=KD)
        motor.forcelimited, motor.forcerange = 1, [-TORQUE, TORQUE]
    for foot in FEET:
        spec.site(foot).size = [0.03] * 3  # contacts inside count
        touch = dict(type=mujoco.mjtSensor.mjSENS_TOUCH, objtype=mujoco.mjtObj.mjOBJ_SITE)
        spec.add_sensor(name=f"touch_{foot}", objname=foot, **touch)
    model = spec.compile()
    trunk, floor = 1, model.geom("floor").id
    models = []
    for i in range(VARIANTS):
        models.append(copy.copy(model))
        friction, payload = i / (VARIANTS - 1), (7 * i % VARIANTS) / (VARIANTS - 1)  # 0 to 1
        models[i].geom_friction[floor, 0] = FRICTION[0] + friction * (FRICTION[1] - FRICTION[0])
        models[i].body_mass[trunk] += PAYLOAD[0] + payload * (PAYLOAD[1] - PAYLOAD[0])
        mujoco.mj_setConst(models[i], mujoco.MjData(models[i]))
    return models


class Quadruped(MujocoRobot):
    """Actions are targets of the joints. The actor sees what a robot can measure, with noise; the
    critic sees that without noise, and velocity, height, contacts, friction and mass, too."""

    num_obs, num_states, num_acts = len(OBSERVATIONS), len(OBSERVATIONS) + 14, len(JOINTS)
    action_limit = 5.0
    view = dict(distance=1.8, azimuth=120.0, elevation=-15.0)

    def __init__(self, spec: mujoco.MjSpec, num_envs: int, device: Any):
        super().__init__(make_models(spec), num_envs, device)
        floor = self.model.geom("floor").id
        varied = [[model.geom_friction[floor, 0], model.body_mass[1]] for model in self.models]
        self.varied = torch.tensor(varied).double()  # (E, 2)
        self.limits = torch.tensor(self.model.jnt_range[1:]).unbind(1)  # 0 is the free joint
        self.touch = self.model.nsensordata - 4  # the feet's sensors are the last ones
        self.clock = torch.randint(self.max_episode_length, (num_envs,))  # not all at once

    def new_episodes(self, count: int) -> Dict[str, Tensor]:
        state = self.at_rest(count)
        positions, velocities = self.split(state["physics"])
        noise = 2.0 * torch.rand(count, 18).double() - 1.0
        positions[:, 2] = HEIGHT
        positions[:, 7:] = POSE + 0.1 * noise[:, :12]
        velocities[:, :6] = 0.2 * noise[:, 12:]
        state["command"] = self.new_commands(count)
        state["noise"] = self.new_noise(count)  # of the observation
        state["air"] = torch.zeros(count, 4).double()  # for how long each foot has been off [s]
        return state

    def new_commands(self, count: int) -> Tensor:
        low, high = COMMANDS.unbind(1)
        commands = low + (high - low) * torch.rand(count, 3).double()
        return commands * (torch.rand(count, 1) > STAND)

    def new_noise(self, count: int) -> Tensor:
        return NOISE * (2.0 * torch.rand(count, self.num_obs).double() - 1.0)

    def controls(self) -> Tensor:
        """Targets that the joints' own limits allow."""
        return (POSE + ACTION_SCALE * self.actions).clamp(*self.limits)

    def measure(self) -> Dict[str, Tensor]:
        """What observations and rewards are made of, velocities as the trunk sees them."""
        positions, velocities = self.split(self.physics)
        axes = body_axes(positions[:, 3:7])
        velocity = (axes @ velocities[:, :3].unsqueeze(2)).squeeze(2)
        contact = self.sensors[:, self.touch :] > 1.0  # N
        found = dict(height=positions[:, 2:3], gravity=-axes[:, :, 2], velocity=velocity)
        found.update(spin=velocities[:, 3:6], contact=contact)
        return dict(found, joints=positions[:, 7:] - POSE, rates=velocities[:, 6:])

    def observe(self) -> Dict[str, Tensor]:
        now = self.measure()
        seen = (now["spin"], now["gravity"], self.command, now["joints"], now["rates"])
        seen = torch.cat((*seen, self.actions), 1)
        hidden = (now["velocity"], now["height"], now["contact"].double(), self.air, self.varied)
        return {"obs": seen + self.noise, "states": torch.cat((seen, *hidden), 1)}

    def judge(self, before: Dict[str, Tensor]) -> Tuple[Tensor, Tensor, Dict[str, Any]]:
        now = self.measure()
        error = (self.command[:, :2] - now["velocity"][:, :2]).norm(dim=1)
        landing = now["contact"] & (self.air > 0.0)
        torques = KP * (self.controls() - POSE - now["joints"]) - KD * now["rates"]
        torques = torques.clamp(-TORQUE, TORQUE)
        terms = {
            "velocity": torch.exp(-4.0 * error.square()),
            "turn": 0.5 * torch.exp(-4.0 * (self.command[:, 2] - now["spin"][:, 2]).square()),
            "bounce": -2.0 * now["velocity"][:, 2].square(),
            "sway": -0.05 * now["spin"][:, :2].square().sum(1),
            "tilt": -1.0 * now["gravity"][:, :2].square().sum(1),
            "jerk": -0.01 * (self.actions - before["actions"]).square().sum(1),
            "effort": -2e-4 * torques.square().sum(1),
            "pose": -0.1 * now["joints"].square().sum(1),
            "air": 0.5 * ((self.air - 0.2) * landing).sum(1),
        }
        terms = {name: self.dt * term for name, term in terms.items()}
        fell = (now["gravity"][:, 2] > -0.6) | (now["height"][:, 0] < LOW)
        infos = {"episode_cumulative": terms, "speed_error": error.mean()}  # m/s

        self.air = torch.where(now["contact"], 0.0, self.air + self.dt)
        self.noise = self.new_noise(self.num_envs)
        change = (self.clock % NEW_COMMAND == 0).unsqueeze(1)
        self.command = torch.where(change, self.new_commands(self.num_envs), self.command)
        # At least 0 but for a fall, or falling at once would be the best that a beginner can do.
        reward = torch.stack(list(terms.values())).sum(0).clamp(min=0.0)
        return reward - 0.2 * fell, fell, infos

    def policy_metadata(self) -> Dict[str, Any]:
        """What one must know to run a policy on the robot, apart from its weights. Actions are
        clipped to +- action_limit, also where the next observation has them as last_action."""
        found = dict(joint_names=JOINTS, default_pose=POSE.tolist(), action_scale=ACTION_SCALE)
        found.update(kp=KP, kd=KD, torque_limit_nm=TORQUE, control_hz=round(1 / self.dt, 6))
        found.update(action_limit=self.action_limit, command_ranges=COMMANDS.tolist())
        return dict(found, observation_names=OBSERVATIONS, action_names=JOINTS)

    def decorate(self, scene: mujoco.MjvScene) -> None:
        """Above the trunk: its way in half a second, in green as commanded, in blue as it goes."""
        positions, _ = self.split(self.physics[:1])
        axes, velocity = body_axes(positions[:, 3:7])[0], self.measure()["velocity"][0]
        arrow, zeros = mujoco.mjtGeom.mjGEOM_ARROW, np.zeros(9)
        commanded, own = (0.23, self.command[0], [0, 0.7, 0, 1]), (0.2, velocity, [0, 0.3, 1, 1])
        for height, vector, rgba in (commanded, own):
            start = positions[0, :3] + torch.tensor([0.0, 0.0, height])
            end = start + 0.5 * (vector[:2] @ axes[:2])
            geom = scene.geoms[scene.ngeom]
            color = np.array(rgba, np.float32)
            mujoco.mjv_initGeom(geom, arrow, zeros[:3], zeros[:3], zeros, color)
            mujoco.mjv_connector(geom, arrow, 0.015, start.numpy(), end.numpy())
            scene.ngeom += 1


# A trunk of 6.5 kg and legs of 1.8 kg; each hangs below a hip that moves sideways.
MODEL = """<mujoco>
  <compiler angle="radian"/>
  <default>
    <geom type="capsule" rgba="0.3 0.3 0.35 1"/>
  </default>
  <worldbody>
    <body name="trunk" pos="0 0 0.4">
      <freejoint/>
      <light pos="0 0 2" mode="trackcom"/>
      <geom type="box" size="0.2 0.08 0.05" mass="6" rgba="0.9 0.5 0.1 1"/>
      <geom type="sphere" size="0.05" pos="0.22 0 0.02" mass="0.5"/>{legs}
    </body>
  </worldbody>
</mujoco>"""
LEG = """
<body name="{foot}_hip" pos="{x} {y} 0">
  <joint name="{foot}_hip_joint" axis="1 0 0" range="-0.86 0.86"/>
  <geom size="0.04" fromto="0 {inside} 0 0 {outside} 0" mass="0.7"/>
  <body name="{foot}_thigh" pos="0 {outside} 0">
    <joint name="{foot}_thigh_joint" axis="0 1 0" range="-0.69 4.5"/>
    <geom size="0.02" fromto="0 0 0 0 0 -0.21" mass="0.9"/>
    <body name="{foot}_calf" pos="0 0 -0.21">
      <joint name="{foot}_calf_joint" axis="0 1 0" range="-2.8 -0.89"/>
      <geom size="0.013" fromto="0 0 0 0 0 -0.2" mass="0.15"/>
      <geom type="sphere" size="0.023" pos="0 0 -0.21" mass="0.05"/>
      <site name="{foot}" pos="0 0 -0.21"/>
    </body>
  </body>
</body>"""


def make_env(num_envs: int, device: Any, seed: int) -> Quadruped:
    """A quadruped of boxes and capsules, of a Go1's size."""
    legs = ""
    for foot in FEET:
        side = 1 if foot[1] == "L" else -1
        place = dict(x=0.19 if foot[0] == "F" else -0.19, y=0.05 * side)
        legs += LEG.format(foot=foot, **place, inside=0.02 * side, outside=0.08 * side)
    return Quadruped(mujoco.MjSpec.from_string(MODEL.format(legs=legs)), num_envs, device)


def go1(num_envs: int, device: Any, seed: int) -> Quadruped:
    """Unitree's Go1: its XML and meshes are in the package mjlab, which need not run for it."""
    package = importlib.util.find_spec("mjlab")
    if package is None:
        raise SystemExit("error: the Go1's XML is missing: pip install --no-deps mjlab==1.6.0")
    robots = os.path.join(os.path.dirname(package.origin), "asset_zoo", "robots")
    path = os.path.join(robots, "unitree_go1", "xmls", "go1.xml")
    return Quadruped(mujoco.MjSpec.from_file(path), num_envs, device)
