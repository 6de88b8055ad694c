"""Tests of mujoco_ant.py: the contract, the reward, exact continuation, threads, physics."""

import math

import pytest
import torch

mujoco = pytest.importorskip("mujoco", minversion="3.3", reason='needs pip install "mujoco>=3.3"')
import mujoco_ant  # noqa: E402 - it needs mujoco

E = 16


@pytest.fixture
def env():
    torch.manual_seed(0)
    env = mujoco_ant.make_env(E, "cpu", seed=0)
    yield env
    env.close()


def random_actions():
    return 2.0 * torch.rand(E, 8) - 1.0


def test_contract(env):
    first = env.reset()["obs"]
    assert (first.shape, first.dtype) == ((E, 60), torch.float32)
    assert torch.equal(first, env.reset()["obs"])  # reset() resets nothing
    assert len(mujoco_ant.OBSERVATIONS) == env.num_obs

    for _ in range(100):
        obs, reward, done, infos = env.step(random_actions())
        assert (obs["obs"].shape, obs["obs"].dtype) == ((E, 60), torch.float32)
        assert obs["obs"].abs().max() <= env.clip_obs
        assert (reward.shape, reward.dtype) == ((E,), torch.float32)
        assert (done.shape, done.dtype) == ((E,), torch.bool)
        assert (infos["time_outs"].shape, infos["time_outs"].dtype) == ((E,), torch.bool)
        assert ("episode" in infos) == bool(done.any())


def test_an_ant_that_stands_times_out_after_1000_steps(env):
    for _ in range(999):
        _, _, done, infos = env.step(torch.zeros(E, 8))
        assert not done.any()
    obs, reward, done, infos = env.step(torch.zeros(E, 8))
    assert done.all() and infos["time_outs"].all()
    assert infos["episode"]["metres"].abs().max() < 0.5
    assert not infos["episode"]["falls"].any()
    assert (reward > 0).all()
    assert torch.allclose(obs["obs"][:, 0], torch.tensor(0.44))  # the next episode's first one


def test_a_fall_ends_the_episode(env):
    state = env.get_env_state()
    state["physics"] = state["physics"].clone()
    state["physics"][:2, 4:8] = torch.tensor([0.0, 1.0, 0.0, 0.0])  # two of them upside down
    state["physics"][0, 1:4] = torch.tensor([7.0, 0.0, 0.30])
    state["physics"][1, 3] = 0.32  # low, but not fallen yet
    env.set_env_state(state)
    obs, reward, done, infos = env.step(torch.zeros(E, 8))
    assert done.tolist() == [True] + [False] * (E - 1)
    assert reward[0] == -2.0 and not infos["time_outs"].any()
    assert infos["episode"]["falls"].tolist() == [1.0]
    assert infos["episode"]["metres"].item() == pytest.approx(7.0, abs=0.1)
    assert obs["obs"][0, 0].item() == pytest.approx(0.44)
    assert not obs["obs"][0, 28:].any()  # neither contact nor action yet


def test_new_episodes_start_as_the_original_does(env):
    low, high = env.limits.unbind(1)
    degrees = torch.tensor([0.0, 30.0, 0.0, -30.0, 0.0, -30.0, 0.0, 30.0], dtype=torch.float64)
    physics = env._new_episodes(1000)[0]
    angles = physics[:, 8:16]
    assert (angles >= low).all() and (angles <= high).all()
    assert (angles - degrees.deg2rad()).abs().max() <= 0.2 + 1e-9
    assert 0.09 < physics[:, 22:30].abs().max() <= 0.1
    assert torch.equal(physics[:, 1:8], env.physics[:1, 1:8].expand(1000, 7))
    assert physics[0, 1:8].tolist() == [0.0, 0.0, 0.44, 1.0, 0.0, 0.0, 0.0]


def test_reward_without_torques_is_the_written_formula(env):
    for _ in range(20):
        env.step(random_actions())
    before = env.physics.numpy()
    _, reward, done, _ = env.step(torch.zeros(E, 8))
    after = env.physics.numpy()
    low, high = env.model.jnt_range[1:].T
    checked = 0
    for i in range(E):
        if done[i]:
            continue
        distances = [math.hypot(1000.0 - p[i, 1], p[i, 2]) for p in (before, after)]
        matrix = torch.zeros(9, dtype=torch.float64).numpy()
        mujoco.mju_quat2Mat(matrix, after[i, 4:8].copy())
        to_target_x = (1000.0 - after[i, 1]) / distances[1]
        to_target_y = -after[i, 2] / distances[1]
        heading = matrix[0] * to_target_x + matrix[3] * to_target_y
        at_limit = (after[i, 8:16] - low) / (high - low) > 0.995
        expected = (distances[0] - distances[1]) * 60.0 + 0.5
        expected += 0.1 if matrix[8] > 0.93 else 0.0
        expected += 0.5 if heading > 0.8 else 0.5 * heading / 0.8
        expected -= 0.1 * at_limit.sum()
        assert reward[i].item() == pytest.approx(expected, abs=1e-4)
        checked += 1
    assert checked > E // 2


def test_torques_cost(env):
    state = env.get_env_state()
    obs = mujoco_ant.observe(env.physics, torch.zeros(E, 24), torch.ones(E, 8), env.limits)
    without = mujoco_ant.compute_reward(obs * (torch.arange(60) < 52), progress=0.0)
    cost = without - mujoco_ant.compute_reward(obs, progress=0.0)
    joint_speeds = state["physics"][:, 22:30].abs().sum(1)
    assert torch.allclose(cost, 0.005 * 8 + 0.05 * 0.2 * joint_speeds)


def test_observation_in_the_torsos_frame(env):
    physics = env.physics[:1].clone()
    yaw = 2.0
    physics[0, 1:4] = torch.tensor([1000.0, -1000.0, 0.5])  # so the target is at 90 degrees
    physics[0, 4:8] = torch.tensor([math.cos(yaw / 2), 0.0, 0.0, math.sin(yaw / 2)])
    physics[0, 16:22] = torch.tensor([3 * math.cos(yaw), 3 * math.sin(yaw), 0.2, 0.1, 0.2, 0.3])
    obs = mujoco_ant.observe(physics, torch.ones(1, 24), torch.zeros(1, 8), env.limits)[0]
    turn = math.pi / 2 - yaw
    expected = [0.5, 3.0, 0.0, 0.2, 0.1, 0.2, 0.3, yaw, 0.0, turn, 1.0, math.cos(turn)]
    assert obs[:12].tolist() == pytest.approx(expected, abs=1e-6)
    assert obs[28:52].tolist() == pytest.approx([0.1] * 24)


def test_a_new_env_continues_to_the_last_bit(env):
    for _ in range(30):
        env.step(random_actions())
    env.clock[:3] = 990  # episodes end, and new ones draw noise, in the steps that are compared
    state = {name: value.clone() for name, value in env.get_env_state().items()}
    generator = torch.get_rng_state()
    runs = []
    for continued in (env, mujoco_ant.make_env(E, "cpu", seed=1)):
        continued.set_env_state(state)
        torch.set_rng_state(generator)
        steps = [continued.reset()["obs"]]
        for _ in range(20):
            obs, reward, done, _ = continued.step(random_actions())
            steps += [obs["obs"], reward, done]
        assert any(step.any() for step in steps[3::3])
        runs.append(steps)
    continued.close()
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_the_number_of_threads_changes_nothing(monkeypatch):
    runs = []
    for threads in ("1", "2"):
        monkeypatch.setenv("ANT_THREADS", threads)
        torch.manual_seed(0)
        env = mujoco_ant.make_env(E, "cpu", seed=0)
        assert len(env.datas) == int(threads)
        for _ in range(50):
            env.step(random_actions())
        runs.append(env.get_env_state())
        env.close()
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_a_dropped_ant_comes_to_rest(env):
    state = env.get_env_state()
    state["physics"] = state["physics"].clone()
    state["physics"][:, 3] = 1.0
    env.set_env_state(state)
    for _ in range(300):
        _, _, done, _ = env.step(torch.zeros(E, 8))
        assert not done.any()
    assert env.physics[:, 16:].abs().max() < 0.02  # m/s and rad/s
    assert ((env.physics[:, 3] > 0.33) & (env.physics[:, 3] < 0.40)).all()


def test_the_model_is_the_originals(env):
    model = env.model
    assert model.opt.timestep * mujoco_ant.SUBSTEPS == pytest.approx(1 / 60)
    assert (model.actuator_gear[:, 0] == 15.0).all()
    joints = [model.joint(j).name for j in model.actuator_trnid[:, 0]]
    assert joints == mujoco_ant.JOINTS == [model.joint(j).name for j in range(1, 9)]
    assert model.nsensordata == 24
    assert model.body_mass.sum() == pytest.approx(0.91, abs=0.01)


def test_metadata_has_plain_types_only(env):
    metadata = env.policy_metadata()
    assert len(metadata["observation_names"]) == 60
    assert metadata["control_hz"] == 60.0
    for value in metadata.values():
        items = value if type(value) is list else [value]
        assert all(type(item) in (int, float, str) for item in items)


def test_render(env):
    try:
        picture = env.render(mode="rgb_array")
    except RuntimeError as error:
        assert "MUJOCO_GL=egl" in str(error) and "\n" not in str(error)
        pytest.skip(str(error))
    assert picture.shape == (360, 480, 3) and picture.dtype.name == "uint8"
    assert picture.std() > 10
