"""examples/mujoco_robot.py: its quadruped, and Unitree's Go1 where mjlab is."""

import importlib.util
import math

import pytest
import torch

mujoco = pytest.importorskip("mujoco", minversion="3.3.3")
from examples import mujoco_robot as robot

E = 32
STAND = torch.zeros(E, 12)  # actions


@pytest.fixture(params=["make_env", "go1"])
def env(request):
    if request.param == "go1" and not importlib.util.find_spec("mjlab"):
        pytest.skip("needs mjlab's files")
    torch.manual_seed(0)
    env = getattr(robot, request.param)(E, "cpu", seed=0)
    env.clock[:] = 0
    yield env
    env.close()


def test_it_stands_in_its_pose_on_four_feet(env):
    for _ in range(50):
        _, reward, done, _ = env.step(STAND)
        assert not done.any() and (reward >= 0).all()
    now = env.measure()
    assert now["contact"].double().mean() > 0.9 and now["velocity"].norm(dim=1).mean() < 0.1
    assert (now["height"] - 0.25).abs().max() < 0.03 and (now["gravity"][:, 2] < -0.97).all()
    assert (now["joints"].abs() < 0.4).all(), "what PD control leaves under the robot's weight"


def test_velocities_are_as_the_trunk_sees_them_and_the_command_is_rewarded(env):
    state = {name: value.clone() for name, value in env.get_env_state().items()}
    positions, velocities = env.split(state["physics"])
    positions[:, 3:7] = torch.tensor([math.cos(1.0), 0.0, 0.0, math.sin(1.0)])  # turned by 2 rad
    velocities[:] = 0.0
    velocities[:, 0], velocities[:, 1] = 0.5 * math.cos(2.0), 0.5 * math.sin(2.0)
    state["command"][:] = torch.tensor([0.5, 0.0, 0.0])
    env.set_env_state(state)
    now = env.measure()
    assert torch.allclose(now["velocity"], torch.tensor([0.5, 0.0, 0.0]).double(), atol=1e-6)
    obs = env.observe()
    assert torch.equal(obs["obs"][:, 6:9], env.command), "no noise on the command"
    assert torch.allclose(obs["obs"] - env.noise, obs["states"][:, :45])
    assert (env.noise.abs() <= robot.NOISE).all() and (env.noise[:, :6] != 0).all()
    _, fell, infos = env.judge(state)
    assert not fell.any() and infos["speed_error"] < 1e-6
    terms = infos["episode_cumulative"]
    assert torch.allclose(terms["velocity"], torch.tensor(0.02).double())
    assert torch.allclose(terms["turn"], torch.tensor(0.01).double())
    state["command"][:, 1] = 0.5
    env.set_env_state(state)
    assert env.judge(state)[2]["speed_error"] == pytest.approx(0.5)


def test_episodes_end_by_a_fall_or_by_the_clock_and_commands_change(env):
    command = env.command.clone()
    env.clock[:] = 998
    env.clock[4:] = robot.NEW_COMMAND - 2
    assert not env.step(STAND)[2].any() and torch.equal(env.command, command)
    state = {name: value.clone() for name, value in env.get_env_state().items()}
    env.split(state["physics"])[0][0, 3:7] = torch.tensor([0.0, 1.0, 0.0, 0.0])  # upside down
    env.set_env_state(state)
    _, reward, done, infos = env.step(STAND)
    assert done.tolist() == [True] * 4 + [False] * (E - 4)
    assert infos["time_outs"].tolist() == [False] + [True] * 3 + [False] * (E - 4)
    assert infos["episode"]["falls"].tolist() == [1.0, 0.0, 0.0, 0.0] and reward[0] < -0.1
    assert (env.command != command).any(1).all() and (env.clock[:4] == 0).all()
    stands = (env.new_commands(10_000) == 0.0).all(1).double().mean()
    assert stands == pytest.approx(robot.STAND, abs=0.02)


def test_an_unstable_simulation_ends_the_episode_without_reward(env, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log
    env.step(STAND)
    state = {name: value.clone() for name, value in env.get_env_state().items()}
    env.split(state["physics"])[1][0, 0] = 1e12  # MuJoCo resets such a simulation
    env.set_env_state(state)
    _, reward, done, infos = env.step(STAND)
    assert done.tolist() == [True] + [False] * (E - 1) and not infos["time_outs"].any()
    assert reward[0] == 0.0 and infos["episode"]["unstable"].tolist() == [1.0]


def test_targets_stay_within_the_joints_limits(env):
    env.actions = torch.full((E, 12), 5.0).double()
    ranges = torch.tensor(env.model.jnt_range[1:])
    assert (env.controls() <= ranges[:, 1]).all() and (env.controls() == ranges[:, 1]).any()


def test_friction_and_payload_differ_and_only_the_critic_sees_them(env):
    assert len(env.varied.unique(dim=0)) == robot.VARIANTS
    assert torch.equal(env.observe()["states"][:, -2:], env.varied)
    for _ in range(10):
        env.step(STAND)  # all feet have come down
    found = []
    for model, physics in zip(env.models, env.physics):
        data = mujoco.MjData(model)
        mujoco.mj_setState(model, data, physics.numpy(), robot.PHYSICS)
        mujoco.mj_forward(model, data)
        found.append([data.contact.friction[0, 0], model.body_subtreemass[1]])
    friction, mass = torch.tensor(found).double().T
    assert torch.equal(friction, env.varied[:, 0]) and friction.min() == 0.4
    assert friction.max() == 1.2 and mass.max() - mass.min() == pytest.approx(2.0)


def test_metadata_has_the_order_of_the_motors(env):
    metadata = env.policy_metadata()
    assert metadata["joint_names"] == [env.model.actuator(i).name for i in range(env.model.nu)]
    motors = [env.model.joint(j).name for j in env.model.actuator_trnid[:, 0]]
    order = [env.model.joint(j).name for j in range(1, env.model.njnt)]  # 0 is the free joint
    assert motors == order == metadata["action_names"]
    assert env.model.actuator_gainprm[0, 0] == metadata["kp"]
    assert len(metadata["observation_names"]) == env.num_obs
