"""examples/mujoco_ant.py: what IsaacGymEnvs' Ant observes and is rewarded for."""

import math

import pytest
import torch

pytest.importorskip("mujoco", minversion="3.3.3")
from examples import mujoco_ant as ant

E = 16


@pytest.fixture
def env():
    torch.manual_seed(0)
    env = ant.make_env(E, "cpu", seed=0)
    yield env
    env.close()


def test_ant_episodes_end_by_the_clock_or_by_a_fall(env):
    env.clock[:] = 998
    assert not env.step(torch.zeros(E, 8))[2].any()
    state = {name: value.clone() for name, value in env.get_env_state().items()}
    state["physics"][:2, 4:8] = torch.tensor([0.0, 1.0, 0.0, 0.0])  # two of them upside down
    state["physics"][0, 1:4] = torch.tensor([7.0, 0.0, 0.30])
    state["physics"][1, 3] = 0.32  # low, but not fallen yet
    env.set_env_state(state)
    obs, reward, done, infos = env.step(torch.zeros(E, 8))
    assert done.all() and infos["time_outs"].tolist() == [False] + [True] * (E - 1)
    assert reward[0] == -2.0 and (reward[2:] > 0).all()
    assert infos["episode"]["falls"].tolist() == [1.0] + [0.0] * (E - 1)
    assert infos["episode"]["metres"].tolist() == pytest.approx([7.0] + [0.0] * (E - 1), abs=0.5)
    assert torch.allclose(obs["obs"][:, 0], torch.tensor(0.44))  # the next episode's first one


def test_ant_observes_in_the_torsos_frame_and_is_rewarded_for_it(env):
    physics, yaw = env.physics[:1].clone(), 2.0
    physics[0, 1:4] = torch.tensor([1000.0, -1000.0, 0.5])  # so the target is at 90 degrees
    physics[0, 4:8] = torch.tensor([math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)])
    physics[0, 16:22] = torch.tensor([3 * math.cos(yaw), 3 * math.sin(yaw), 0.2, 0.1, 0.2, 0.3])
    physics[0, 8:16] = 0.0  # two of the ankles are beyond their upper limits
    physics[0, 22:30] = 2.0
    obs = ant.observe(physics, torch.ones(1, 24), torch.full((1, 8), 0.5), env.limits)[0]
    turn = math.pi / 2 - yaw
    expected = [0.5, 3.0, 0.0, 0.2, 0.1, 0.2, 0.3, yaw, 0.0, turn, 1.0, math.cos(turn)]
    assert obs[:12].tolist() == pytest.approx(expected, abs=1e-6)
    assert obs[28:52].tolist() == pytest.approx([0.1] * 24)
    reward = ant.compute_reward(obs.unsqueeze(0), torch.tensor([3.0]))
    parts = (3.0, 0.5, 0.1, 0.5, -0.005 * 8 * 0.25, -0.05 * 8 * 0.5 * 0.4, -0.1 * 2)
    assert float(reward) == pytest.approx(sum(parts), abs=1e-6)


def test_ant_says_what_a_robot_needs(env):
    metadata = env.policy_metadata()
    joints = [env.model.joint(j).name for j in env.model.actuator_trnid[:, 0]]
    assert metadata["action_names"] == joints
    assert len(metadata["observation_names"]) == env.num_obs
    assert (metadata["control_hz"], metadata["torque_per_action_nm"]) == (60.0, 15.0)
