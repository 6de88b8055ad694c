"""The algorithm, piece by piece: expectations are worked out by hand, or come from torch, numpy and
rl_games."""

import ctypes
import itertools
import math
import resource
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import SMALL, Env, differences, run

import train_ppo
from train_ppo import Args, Cartpole, EpisodeMeter, RunningMeanStd

CPU, META = torch.device("cpu"), torch.device("meta")


def agent_of(**arguments):
    """An agent for four environments of `Env`, with eight steps and four minibatches."""
    torch.manual_seed(0)
    env = Env(4, "cpu", 0, lengths=torch.tensor([3, 5, 50, 50]))
    settings = dict(num_envs=4, num_steps=8, minibatch_size=8, device="cpu")
    args = Args(**dict(settings, **arguments))
    return train_ppo.PPOAgent(args, env, train_ppo.MultiObserver([]))


def roll_out(agent, policy=None, after_step=lambda infos, dones: None):
    parts = (agent.env, agent.obs, agent.buffer, agent.args, after_step)
    agent.obs, _ = train_ppo.rollout(policy or agent.act, *parts)
    return agent.buffer


def batch_of(agent):
    return train_ppo.make_batch(roll_out(agent), torch.randn(8, 4))


# ROLLOUT AND BATCH ================================================================================


@pytest.mark.parametrize("clip_actions", [True, False])
def test_rollout_copies_what_the_env_overwrites_and_keeps_what_the_policy_returns(clip_actions):
    """Each row is of its own step. The env gets the clipped action, the buffer the sampled one."""
    agent, seen = agent_of(sigma_init=0.5, clip_actions=clip_actions), []
    agent.env.done = agent.env.done.bool()  # so that a cast copies nothing

    def policy(obs, noise):
        return dict(agent.act(obs, noise), memory=torch.full((4, 2, 3), float(len(seen))))

    buffer = roll_out(agent, policy, lambda *step: seen.append(step))
    assert len({tuple(row.flatten().tolist()) for row in buffer["obs"]}) == 8
    assert buffer["actions"].abs().max() > 1
    given = buffer["actions"].clamp(-1, 1) if clip_actions else buffer["actions"]
    assert torch.allclose(buffer["rewards"], 1 - (given - buffer["obs"]).abs().mean(-1))
    ends = [[0, 0, 1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0], [0] * 8, [0] * 8]
    assert buffer["dones"].t().tolist() == buffer["time_outs"].t().tolist() == ends
    assert buffer["memory"][:, 3, 1].tolist() == [[t] * 3 for t in range(8)]
    assert [dones.tolist() for _, dones in seen] == buffer["dones"].bool().tolist()
    assert [list(infos) for infos, _ in seen] == [["time_outs"]] * 8
    assert torch.equal(agent.obs, agent.env.obs)


def test_nothing_writes_into_the_tensors_of_the_env(here, monkeypatch):
    """They may be its own state."""
    step, returned = Env.step, []

    def watched(env, actions):
        obs, reward, done, infos = step(env, actions)
        parts = [obs["obs"].clone(), reward.clone(), done.bool(), infos["time_outs"].clone()]
        returned.append((parts, [x.clone() for x in parts]))
        return {"obs": parts[0]}, parts[1], parts[2], {"time_outs": parts[3]}

    monkeypatch.setattr(Env, "step", watched)
    run(*SMALL, env=dict(lengths=3))
    assert len(returned) == 1 + 4 * 8
    assert differences(*zip(*returned)) == []


@pytest.mark.parametrize("bootstrap, second", [(True, 19.0), (False, 1.0)])
def test_rewards_are_scaled_and_bootstrapped_at_time_limits(bootstrap, second):
    buffer = dict(rewards=[1.0, 2.0], values=[9.0, 20.0], time_outs=[0.0, 1.0])
    buffer = {name: torch.tensor([numbers]) for name, numbers in buffer.items()}
    args = Args(reward_scale=0.5, gamma=0.9, value_bootstrap=bootstrap)
    assert train_ppo.scale_and_bootstrap(buffer, args).tolist() == [[0.5, second]]
    assert buffer["rewards"].tolist() == [[1, 2]], "the buffer stays as it is"


def test_gae_by_hand():
    """The second environment's episode ends in step 2, and nothing that follows counts there."""
    rewards, values = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[0.5], [1.5], [2.5]])
    dones = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    third = 3.0 + 0.9 * 4.0 - 2.5
    second = [2.0 + 0.9 * 2.5 - 1.5 + 0.9 * 0.8 * third, 2.0 - 1.5]
    first = [1.0 + 0.9 * 1.5 - 0.5 + 0.9 * 0.8 * x for x in second]
    args = Args(gamma=0.9, gae_lambda=0.8)
    found = train_ppo.gae(rewards, values.expand(3, 2), dones, torch.full((2,), 4.0), args)
    assert found.flatten().tolist() == pytest.approx([*first, *second, third, third])


def test_batch_has_the_steps_of_one_env_after_another():
    number = torch.arange(6.0).view(2, 3)  # 3 t + e
    obs = torch.stack((number, number + 100), dim=-1)
    batch = train_ppo.make_batch(dict(obs=obs, values=number + 20, rewards=-number), number / 4)
    order = [0, 3, 1, 4, 2, 5]  # both steps of env 0, of env 1, of env 2
    assert batch["obs"].tolist() == [[n, n + 100] for n in order]
    assert batch["rewards"].tolist() == [-n for n in order]
    assert batch["advantages"].tolist() == [n / 4 for n in order]
    assert batch["returns"].tolist() == [n / 4 + n + 20 for n in order]


def rl_games_statistics(size):
    module = pytest.importorskip("rl_games.algos_torch.running_mean_std")
    return module.RunningMeanStd((size,)).train()


def test_statistics_are_those_of_rl_games_and_of_all_rows_at_once():
    """It starts as if one row with mean 0 and variance 1 had been seen."""
    torch.manual_seed(0)
    ours, theirs = RunningMeanStd(3), rl_games_statistics(3)
    data = torch.randn(1000, 3, dtype=torch.float64) * torch.tensor([0.1, 1.0, 9.0])
    data += torch.linspace(-9, 9, 1000).unsqueeze(1)  # so that batches differ
    for chunk in data.split(137):
        ours.update(chunk)
        theirs(chunk)
    for name, value in theirs.eval().state_dict().items():
        assert torch.allclose(ours.state_dict()[name], value, rtol=1e-12), name
    rows = np.concatenate([np.zeros((1, 3)), data.numpy()])
    assert ours.count == 1001
    assert ours.running_mean.numpy() == pytest.approx(rows.mean(0), rel=1e-9)
    assert ours.running_var.numpy() == pytest.approx(rows.var(0) + 1 / 1001, rel=0.01)
    x = torch.tensor([[0.5, -1.0, 9.0], [1e6, 2.0, -1e6]])
    assert torch.allclose(ours(x), theirs(x)) and ours(x).max() == 5
    assert torch.allclose(ours.denormalize(x), theirs(x, denorm=True))


def test_values_returns_and_advantages_are_normalised():
    """Values go into the statistics first, then returns; advantages are taken over all rows."""
    agent, statistics = agent_of(), rl_games_statistics(1)
    batch = batch_of(agent)
    before = {name: x.clone() for name, x in batch.items()}
    found = train_ppo.normalize_batch(agent.model, batch, agent.args)
    for name in ("values", "returns"):
        expected = statistics(before[name].unsqueeze(1)).squeeze(1)
        assert torch.allclose(found[name], expected, atol=1e-6), name
    assert agent.model.value_mean_std.count == 1 + 2 * 32
    advantages = before["advantages"].numpy()
    expected = (advantages - advantages.mean()) / advantages.std(ddof=1)
    assert found["advantages"].numpy() == pytest.approx(expected, abs=1e-5)
    assert differences(batch, before) == [], "the batch itself stays"

    agent = agent_of(normalize_value=False, norm_adv=False)
    assert differences(train_ppo.normalize_batch(agent.model, batch, agent.args), before) == []


# LOSS AND UPDATE ==================================================================================


def test_log_prob_entropy_and_kl_are_those_of_gaussians():
    torch.manual_seed(0)
    mu, old_mu = torch.randn(2, 9, 3)
    logstd, old_logstd = torch.randn(2, 9, 3)
    new = torch.distributions.Normal(mu, logstd.exp())
    old = torch.distributions.Normal(old_mu, old_logstd.exp())
    found = train_ppo.mean_kl(mu, logstd.exp(), old_mu, old_logstd.exp())
    expected = torch.distributions.kl_divergence(new, old).sum(-1).mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-3)  # rl_games adds 1e-5 twice
    found = train_ppo.log_prob(old_mu, mu, logstd.exp(), logstd)
    assert torch.allclose(found, new.log_prob(old_mu).sum(-1), atol=1e-5)
    found = train_ppo.mean_entropy(logstd)
    assert float(found) == pytest.approx(float(new.entropy().sum(-1).mean()), rel=1e-5)


ENTROPY = 0.5 + 0.5 * math.log(2 * math.pi)
LOSSES = {  # of one row: keywords, value in the log, share of the loss, d loss / d log sigma
    "a_loss, inside": (dict(ratio=1.1, advantage=2.0), -2.2, -2.2, 2.2),
    "a_loss, above and pays": (dict(ratio=1.5, advantage=1.0), -1.2, -1.2, 0.0),
    "a_loss, above and costs": (dict(ratio=1.5, advantage=-1.0), 1.5, 1.5, -1.5),
    "a_loss, below and pays": (dict(ratio=0.5, advantage=-1.0), 0.8, 0.8, 0.0),
    "a_loss, below and costs": (dict(ratio=0.5, advantage=1.0), -0.5, -0.5, 0.5),
    "clipfrac, above": (dict(ratio=1.5), 1.0, 0.0, 0.0),
    "clipfrac, below": (dict(ratio=0.5), 1.0, 0.0, 0.0),
    "c_loss, clipped": (dict(value=1.5, old=0.5, vf_coef=2.0), 1.69, 1.69, 0.0),
    "c_loss, worse than clipped": (dict(value=0.5, old=1.5, vf_coef=2.0), 2.25, 2.25, 0.0),
    "c_loss, free": (dict(value=1.5, old=0.5, vf_coef=3.0, clip_vloss=False), 0.25, 0.375, 0.0),
    "entropy": (dict(ent_coef=0.1), ENTROPY, -0.1 * ENTROPY, -0.1),
    "bounds_loss, above": (dict(mu=1.6, bounds_loss_coef=0.1), 0.25, 0.025, 0.0),
    "bounds_loss, below": (dict(mu=-1.6, bounds_loss_coef=0.1), 0.25, 0.025, 0.0),
    "bounds_loss, inside": (dict(mu=1.1, bounds_loss_coef=0.1), 0.0, 0.0, 0.0),
    "kl": (dict(), 0.3**2 / 2, 0.0, 0.0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_each_term_of_the_loss_by_hand(name):
    """The action is the mean, the standard deviation is 1, and the return is 2."""
    row = dict(dict(mu=0.0, ratio=1.0, advantage=0.0, value=0.0, old=0.0), **LOSSES[name][0])
    mu, logstd = torch.full((1, 1), row.pop("mu")), torch.zeros(1, 1, requires_grad=True)
    value, logprob = torch.tensor([row.pop("value")]), 0.5 - ENTROPY - math.log(row.pop("ratio"))
    batch = dict(obs=mu, actions=mu, mus=mu + 0.3, sigmas=torch.ones(1, 1))
    columns = dict(logprobs=logprob, values=row.pop("old"), returns=2.0)
    columns["advantages"] = row.pop("advantage")
    batch.update({key: torch.tensor([number]) for key, number in columns.items()})
    args = Args(**dict(dict(vf_coef=0.0, ent_coef=0.0, bounds_loss_coef=0.0, clip_coef=0.2), **row))
    loss, new_mu, sigma, losses = train_ppo.ppo_loss(lambda _: (mu, logstd, value), batch, args)
    (gradient,) = torch.autograd.grad(loss, logstd)
    found = [float(x.detach()) for x in (losses[name.split(",")[0]], loss, gradient)]
    assert found == pytest.approx(LOSSES[name][1:], abs=1e-5)
    assert (new_mu.tolist(), sigma.tolist()) == (mu.tolist(), [[1.0]])


SCHEDULES = {  # rate, KL, arguments: next rate
    "just too much": (1e-3, 0.0165, {}, 1e-3 / 1.5),
    "just not too much": (1e-3, 0.0155, {}, 1e-3),
    "just not too little": (1e-3, 0.0045, {}, 1e-3),
    "just too little": (1e-3, 0.0035, {}, 1.5e-3),
    "another aim": (1e-3, 0.017, dict(kl_threshold=0.05), 1.5e-3),
    "at the top": (9e-3, 0.0, {}, 1e-2),
    "at another top": (9e-3, 0.0, dict(max_lr=9.5e-3), 9.5e-3),
    "at the bottom": (1.2e-6, 1.0, {}, 1e-6),
    "at another bottom": (1.2e-5, 1.0, dict(min_lr=1e-5), 1e-5),
    "linear": (1.0, 1.0, dict(lr_schedule="linear", learning_rate=1e-3), 1e-6 + 999e-6 * 0.7),
    "linear, longer": (1.0, 1.0, dict(lr_schedule="linear", max_epochs=20), 1e-6),
    "fixed, too much": (1e-3, 1.0, dict(lr_schedule="fixed"), 1e-3),
    "fixed, too little": (1e-3, 0.0, dict(lr_schedule="fixed"), 1e-3),
}


@pytest.mark.parametrize("lr, kl, arguments, expected", SCHEDULES.values(), ids=SCHEDULES)
def test_schedules(lr, kl, arguments, expected):
    found = train_ppo.next_lr(torch.tensor(lr), torch.tensor(kl), 30, Args(**arguments))
    assert found.shape == () and float(found) == pytest.approx(expected, rel=1e-6)


def update(agent, optimizer, loss_fn):
    parts = (agent.lr, batch_of(agent), 1, agent.args, loss_fn)
    return train_ppo.update(agent.model, optimizer, *parts)


UPDATES = {  # KL of six steps, two in a pass: rates of these steps and after them, in 1e-3
    "legacy": (1, 1 / 1.5, 1, 1 / 1.5, 1, 1.5, 1.5),
    "standard": (1, 1, 1, 1, 1 / 1.5, 1 / 1.5, 1),
}


@pytest.mark.parametrize("schedule_type, rates", UPDATES.items(), ids=UPDATES)
def test_update_takes_each_step_with_the_rate_of_its_schedule(schedule_type, rates):
    """With a constant gradient, Adam moves a weight by the learning rate."""
    settings = dict(update_epochs=3, minibatch_size=16, learning_rate=1e-3)
    agent = agent_of(schedule_type=schedule_type, **settings)
    lr, weight, seen = agent.lr, agent.model.a2c_network.sigma, []
    divergences = iter([0.03, 0.0, 0.05, 0.0, 0.0, 0.006])

    def loss_fn(model, minibatch, args):
        seen.append(float(weight.detach()[0]))
        losses = dict(mine=torch.tensor(len(seen) / 2), kl=torch.tensor(next(divergences)))
        return weight.sum(), minibatch["mus"], minibatch["sigmas"], losses

    means = update(agent, agent.optimizer, loss_fn)
    moves = -np.diff([*seen, float(weight.detach()[0])])
    assert moves == pytest.approx(1e-3 * np.array(rates[:-1]), rel=1e-3)
    assert agent.lr is lr and float(lr) == pytest.approx(1e-3 * rates[-1])
    assert {k: float(v) for k, v in means.items()} == pytest.approx(dict(mine=1.75, kl=0.086 / 6))


def test_update_measures_from_pass_to_pass_and_moves_statistics_in_the_first():
    agent, before, after, counts = agent_of(update_epochs=3), [], [], []

    def loss_fn(model, minibatch, args):
        counts.append(float(model.running_mean_std.count))
        before.append([minibatch["mus"].clone(), minibatch["sigmas"].clone()])
        result = train_ppo.ppo_loss(model, minibatch, args)
        after.append(list(result[1:3]))
        return result

    update(agent, agent.optimizer, loss_fn)
    sampled = [agent.buffer["mus"][:, i] for i in range(4)]  # a minibatch has one environment here
    assert differences([mus for mus, _ in before[:4]], sampled) == []
    assert differences(before[4:], after[:8]) == [] and len(after) == 12
    assert differences(after[:4], after[4:8]) != [], "the policy moves"
    assert counts == [9, 17, 25, 33] + [33] * 8, "each before it is used"


@pytest.mark.parametrize("max_grad_norm, norm", [(0.0, 50.0), (1.0, 1.0), (99.0, 50.0)])
def test_gradients_are_clipped_by_norm_unless_it_is_0(max_grad_norm, norm):
    agent = agent_of(update_epochs=1, minibatch_size=32, max_grad_norm=max_grad_norm)
    weight, factors = agent.model.a2c_network.sigma, torch.tensor([30.0, 40.0])

    def loss_fn(model, minibatch, args):
        return (weight * factors).sum(), minibatch["mus"], minibatch["sigmas"], dict(kl=agent.lr)

    update(agent, torch.optim.SGD([weight], lr=1.0), loss_fn)
    assert weight.tolist() == pytest.approx([-0.6 * norm, -0.8 * norm], rel=1e-4)


def test_transposed_linear_is_that_of_torch():
    results = []
    for kind in (train_ppo.TransposedLinear, torch.nn.Linear):
        torch.manual_seed(0)
        layer, x = kind(60, 32), torch.randn(99, 60, requires_grad=True)
        y = layer(x)
        y.square().sum().backward()
        results.append([y, x.grad, layer.weight.grad, layer.bias.grad])
    for a, b in zip(*results):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4) and a.abs().max() > 0
    assert results[0][2].is_contiguous(), "the fused optimizer needs it"


# EPISODES =========================================================================================


@pytest.mark.parametrize("size", [10, 100])
def test_mean_reward_is_rl_games_average_meter(size):
    """In steps in which no episode ends, a few, or hundreds at once."""
    meter_class = pytest.importorskip("rl_games.algos_torch.torch_ext").AverageMeter
    torch.manual_seed(0)
    ours, theirs = EpisodeMeter(512, size, 2, CPU), meter_class(2, size)
    running = torch.zeros(512, 2)
    for share in (0.0, 0.001, 0.01, 1.0, 0.0, 0.003, 0.4, 0.005):
        rewards = torch.randn(8, 512) + torch.arange(512) / 100
        dones, ended = torch.rand(8, 512) < share, []
        found = ours.add_rollout((rewards, torch.ones(8, 512)), dones.float())
        for t in range(8):
            running += torch.stack((rewards[t], torch.ones(512)), dim=1)
            ended.append(running[dones[t]])
            theirs.update(ended[-1])
            running[dones[t]] = 0
        assert ours.count == theirs.current_size
        assert ours.mean.tolist() == pytest.approx(theirs.mean.tolist(), rel=1e-4)
        assert torch.allclose(found, torch.cat(ended), atol=1e-4)
    assert ours.count == size


def test_episodes_that_end_together_count_alike(here, monkeypatch):
    """The last 100 rows of 512 would be those of the environments with the highest numbers."""
    step = Env.step

    def numbered(env, actions):
        obs, _, done, infos = step(env, actions)
        return obs, torch.arange(512) * done, done, infos

    monkeypatch.setattr(Env, "step", numbered)
    done = run("--num-envs=512", "--max-epochs=1", env=dict(lengths=4))
    assert done.curves["rewards/iter"] == [(1, 255.5)]
    assert "epoch 1/1 reward 255.50 length " in done.out


ALWAYS_BETTER = itertools.count()
BEST = {  # exact, epochs in all after continuing: first epoch of these episodes, epoch of the best
    "new episodes, too early": (False, 6, 4, 4),
    "new episodes, once they can have ended": (False, 7, 4, 7),
    "exactly": (True, 5, 0, 5),
}


@pytest.mark.parametrize("name", BEST)
def test_best_waits_for_whole_episodes_wherever_they_start(here, name):
    """The first episodes to end are the short ones. Here they take 20 steps, 2.5 epochs."""
    exact, epochs, *expected = BEST[name]
    env = dict(exact=exact, max_episode_length=20)
    env["infos"] = lambda _: {"score": float(next(ALWAYS_BETTER))}
    flags = ("--best-metric=score/iter", "--save-best-after=1", "--games-to-track=9")
    state = run(*SMALL, *flags, "--experiment=r", env=env).state()
    assert (state["first_epoch"], state["best_epoch"]) == (0, 4)
    state = run("--checkpoint=runs/r", f"--max-epochs={epochs}", env=env).state()
    assert [state["first_epoch"], state["best_epoch"]] == expected


# CARTPOLE =========================================================================================


def test_cartpole_follows_the_equations_of_motion():
    """Against the Lagrangian with tiny steps: closely if its own are tiny too, nearly as it is."""
    rng = np.random.default_rng(0)
    states = rng.uniform(-1, 1, (4, 50)) * [[1.0], [3.0], [0.8], [7.9]]
    actions = rng.uniform(-1.2, 1.2, (50, 1))  # the env itself clips them to [-1, 1]
    force = 400 * actions[:, 0].clip(-1, 1)
    x, v, angle, omega = states
    for _ in range(1000):
        cos, sin, inertia = np.cos(angle), np.sin(angle), (0.06**2 + 1.0**2) / 12 + 0.47**2
        mass = np.array([[2 + 0 * cos, -0.47 * cos], [-0.47 * cos, inertia + 0 * cos]])
        forces = np.array([[force - 0.47 * sin * omega**2], [9.81 * 0.47 * sin]])
        a, alpha = np.linalg.solve(mass.transpose(2, 0, 1), forces.transpose(2, 0, 1))[..., 0].T
        v = v + 1.66e-5 * a
        omega = (omega + 1.66e-5 * alpha).clip(-8, 8)  # the joint's limit
        x, angle = x + 1.66e-5 * v, angle + 1.66e-5 * omega
    expected = np.array([x, v, angle, omega])
    assert (abs(omega) == 8).any(), "the limit matters"
    env = Cartpole(50, CPU)
    env.state, env.reset_buf = torch.tensor(states), torch.zeros(50)
    assert abs(env.simulate(torch.tensor(force), substeps=1000).numpy() - expected).max() < 1e-3
    env.step(torch.tensor(actions))
    difference = abs(env.state.numpy() - expected).max(1)
    assert (difference < [0.03, 0.1, 0.05, 0.2]).all(), difference


def test_cartpole_keeps_isaacgymenvs_contract():
    """The first step resets, as does the step after a done, whatever the action."""
    torch.manual_seed(0)
    env = Cartpole(3, CPU)
    assert env.reset()["obs"].abs().sum() == 0, "reset() resets nothing"
    obs, reward, done, infos = env.step(torch.ones(3, 1))
    assert obs["obs"].shape == (3, 4) and 0.05 < obs["obs"].abs().max() <= 0.25
    assert done.dtype == torch.int64 and infos["time_outs"].dtype == torch.bool
    x, v, angle, omega = obs["obs"].double().t()
    expected = 1 - angle**2 - 0.01 * v.abs() - 0.005 * omega.abs()
    assert reward.tolist() == pytest.approx(expected.tolist())

    env.state[0, 0] = 3.1  # env 0: the cart leaves the track
    env.state[2, 1] = 2.0  # env 1: the pole is down
    obs, reward, done, infos = env.step(torch.zeros(3, 1))
    assert reward[:2].tolist() == [-2, -2] and done.tolist() == [1, 1, 0]
    assert infos["time_outs"].tolist() == [False] * 3
    assert obs["obs"][0, 0] > 3, "the observation with done=1 is the episode's last one"
    obs, reward, done, infos = env.step(torch.ones(3, 1))
    assert obs["obs"][:2].abs().max() <= 0.25 and done.tolist() == [0, 0, 0]

    steps = 0
    while not done[0]:
        env.state.zero_()  # held upright, it ends by the clock
        obs, reward, done, infos = env.step(torch.zeros(3, 1))
        steps += 1
    # Env 2 ended a step earlier than the others and has begun anew.
    assert steps == 499 and infos["time_outs"].tolist() == [True, True, False]

    other, results = Cartpole(3, CPU), []
    other.set_env_state({name: value.clone() for name, value in env.get_env_state().items()})
    for one in (env, other):
        torch.manual_seed(1)
        results.append([one.step(torch.rand(3, 1)) for _ in range(99)])
    assert differences(*results) == [], "the state is complete"


def test_nothing_waits_for_the_device_during_a_step_or_a_minibatch():
    """Tensors on the meta device have no numbers: whoever looks at them raises."""
    args, env, buffer = Args(minibatch_size=32, update_epochs=2), Cartpole(8, META), {}
    model = train_ppo.ActorCritic(4, 1, args).to(META)
    obs = env.reset()["obs"]
    obs, _ = train_ppo.rollout(model.act, env, obs, buffer, args, lambda infos, dones: None)
    rewards = train_ppo.scale_and_bootstrap(buffer, args)
    parts = (rewards, buffer["values"], buffer["dones"], model.value(obs), args)
    batch = train_ppo.make_batch(buffer, train_ppo.gae(*parts))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # the fused Adam has no meta
    lr = torch.tensor(1.0, device=META)
    losses = train_ppo.update(model, optimizer, lr, batch, 1, args, train_ppo.ppo_loss)
    assert losses["kl"].is_meta


# OPTIONS OF SPEED =================================================================================


def test_compile_learns_the_same_and_continues_without_it(here):
    short = ("--num-envs=32", "--num-steps=8", "--max-epochs=2", "--units=8")
    eager = run(*short, "--experiment=eager").state()["model"]
    compiled = run(*short, "--experiment=compiled", "--compile").state()["model"]
    assert list(eager) == list(compiled)
    for name, value in eager.items():
        assert torch.allclose(value, compiled[name], atol=1e-4), name
    done = run("--checkpoint=runs/compiled", "--max-epochs=3", "--no-compile")
    assert "exactly where it stopped" in done.out


def test_mixed_precision_does_nothing_on_a_cpu(here):
    """IsaacGymEnvs' Ant sets it. A CPU without bfloat16 would be ten times slower with it."""
    states = [run(*SMALL, "--device=cpu", f"--{x}mixed-precision").state() for x in ("no-", "")]
    assert differences(states[0]["model"], states[1]["model"]) == []


def test_freed_memory_is_kept(here):
    libc, faults = ctypes.CDLL(None), []
    if not hasattr(libc, "mallopt"):
        pytest.skip("another C library")
    libc.mallopt(-3, 2**17), libc.mallopt(-1, 2**17)  # as at the start of a process
    for t in range(9):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**23)  # 32 MB
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        if t == 3:
            run("--num-envs=2", "--max-epochs=1")
    assert faults[8] < faults[3] / 100, faults


def test_a_glibc_that_refuses_the_first_setting_does_not_get_the_second(here, monkeypatch):
    """It would make training slower. Glibc before 2.35 is not at hand: this is what it answers."""
    for taken, settings in ((0, [-3]), (1, [-3, -1])):
        asked = []
        libc = SimpleNamespace(mallopt=lambda what, _: asked.append(what) or taken)  # noqa: B023
        monkeypatch.setattr(train_ppo, "ctypes", SimpleNamespace(CDLL=lambda _: libc))  # noqa: B023
        run("--num-envs=2", "--max-epochs=1")
        assert asked == settings
