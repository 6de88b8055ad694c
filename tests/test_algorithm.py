"""The algorithm, piece by piece: expectations are worked out by hand, or come from torch and numpy.
That the whole is rl_games', see test_rl_games.py."""

import itertools
import math

import numpy as np
import pytest
import torch
from harness import SMALL, Env, differences, run

import train_ppo
from train_ppo import Args, Cartpole, EpisodeMeter, RunningMeanStd

CPU = torch.device("cpu")


def agent_of(**arguments):
    """An agent for four environments of `Env`, with eight steps and four minibatches."""
    torch.manual_seed(0)
    env = Env(4, "cpu", 0, lengths=torch.tensor([3, 5, 50, 50]))
    settings = dict(num_envs=4, num_steps=8, minibatch_size=8, device="cpu")
    args = Args(**dict(settings, **arguments))
    return train_ppo.PPOAgent(args, env, train_ppo.MultiObserver([]))


def roll_out(agent, after_step=lambda infos, dones: None):
    parts = (agent.env, agent.obs, agent.buffer, agent.args, after_step)
    agent.obs, _ = train_ppo.rollout(agent.act, *parts)
    return agent.buffer


def batch_of(agent):
    return train_ppo.make_batch(roll_out(agent), torch.randn(8, 4))


# ROLLOUT AND BATCH ================================================================================


@pytest.mark.parametrize("clip_actions", [True, False])
def test_rollout_copies_what_the_env_overwrites(clip_actions):
    """Each row is of its own step. The env gets the clipped action, the buffer the sampled one."""
    agent, seen = agent_of(sigma_init=0.5, clip_actions=clip_actions), []
    agent.env.done = agent.env.done.bool()  # so that a cast copies nothing
    buffer = roll_out(agent, lambda *step: seen.append(step))
    assert len({tuple(row.flatten().tolist()) for row in buffer["obs"]}) == 8
    assert buffer["actions"].abs().max() > 1
    given = buffer["actions"].clamp(-1, 1) if clip_actions else buffer["actions"]
    assert torch.allclose(buffer["rewards"], 1 - (given - buffer["obs"]).abs().mean(-1))
    ends = [[0, 0, 1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0], [0] * 8, [0] * 8]
    assert buffer["dones"].t().tolist() == buffer["time_outs"].t().tolist() == ends
    assert [dones.tolist() for _, dones in seen] == buffer["dones"].bool().tolist()
    assert [list(infos) for infos, _ in seen] == [["time_outs"]] * 8
    assert torch.equal(agent.obs, agent.env.obs)


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


def test_statistics_by_hand():
    """They start as if one row with mean 0 and variance 1 had been seen."""
    statistics = RunningMeanStd(1)
    statistics.update(torch.tensor([[1.0], [3.0]]))  # mean 2, variance 2
    mean, var = 4 / 3, (1 * 1 + 2 * 2 + 2**2 * 1 * 2 / 3) / 3
    found = (statistics.running_mean, statistics.running_var, statistics.count)
    assert [float(x) for x in found] == pytest.approx([mean, var, 3])
    x, std = torch.tensor([[2.0], [1e6], [-1e6]]), math.sqrt(var)
    assert statistics(x).flatten().tolist() == pytest.approx([(2 - mean) / std, 5, -5], rel=1e-4)
    expected = [mean + 2 * std, mean + 5 * std, mean - 5 * std]
    assert statistics.denormalize(x).flatten().tolist() == pytest.approx(expected, rel=1e-4)


def test_values_returns_and_advantages_are_normalised():
    """Values go into the statistics first, then returns; advantages are taken over all rows."""
    agent, statistics = agent_of(), RunningMeanStd(1)
    batch = batch_of(agent)
    before = {name: x.clone() for name, x in batch.items()}
    found = train_ppo.normalize_batch(agent.model, batch, agent.args)
    for name in ("values", "returns"):
        column = before[name].unsqueeze(1)
        statistics.update(column)
        assert torch.equal(found[name].unsqueeze(1), statistics(column)), name
    advantages = before["advantages"].numpy()
    expected = (advantages - advantages.mean()) / advantages.std(ddof=1)
    assert found["advantages"].numpy() == pytest.approx(expected, abs=1e-5)
    assert differences(batch, before) == [], "the batch itself stays"


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
    "c_loss, clipped": (dict(value=1.5, old=0.5, vf_coef=2.0), 1.69, 1.69, 0.0),
    "c_loss, worse than clipped": (dict(value=0.5, old=1.5, vf_coef=2.0), 2.25, 2.25, 0.0),
    "c_loss, free": (dict(value=1.5, old=0.5, vf_coef=3.0, clip_vloss=False), 0.25, 0.375, 0.0),
    "entropy": (dict(ent_coef=0.1), ENTROPY, -0.1 * ENTROPY, -0.1),
    "bounds_loss, above": (dict(mu=1.6, bounds_loss_coef=0.1), 0.25, 0.025, 0.0),
    "bounds_loss, inside": (dict(mu=1.1, bounds_loss_coef=0.1), 0.0, 0.0, 0.0),
    "kl": (dict(), 0.3**2 / 2, 0.0, 0.0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_each_term_of_the_loss_by_hand(name):
    """The action is the mean, the standard deviation is 1, and the return is 2."""
    keywords, *expected = LOSSES[name]
    row = dict(mu=0.0, ratio=1.0, advantage=0.0, value=0.0, old=0.0)
    settings = dict(vf_coef=0.0, ent_coef=0.0, bounds_loss_coef=0.0, clip_coef=0.2)
    for key, value in keywords.items():
        (row if key in row else settings)[key] = value
    mu, logstd = torch.full((1, 1), row["mu"]), torch.zeros(1, 1, requires_grad=True)
    batch = dict(obs=mu, actions=mu, mus=mu + 0.3, sigmas=torch.ones(1, 1))
    batch["logprobs"] = torch.tensor([0.5 - ENTROPY - math.log(row["ratio"])])
    batch["advantages"] = torch.tensor([row["advantage"]])
    batch["values"] = torch.tensor([row["old"]])
    batch["returns"] = torch.tensor([2.0])
    output = (mu, logstd, torch.tensor([row["value"]]))
    args = Args(**settings)
    loss, new_mu, sigma, losses = train_ppo.ppo_loss(lambda obs: output, batch, args)
    (gradient,) = torch.autograd.grad(loss, logstd)
    term = losses[name.split(",")[0]]
    found = [float(x.detach()) for x in (term, loss, gradient)]
    assert found == pytest.approx(expected, abs=1e-5)
    assert (new_mu.tolist(), sigma.tolist()) == (mu.tolist(), [[1.0]])


SCHEDULES = {  # rate, KL, arguments: next rate
    "just too much": (1e-3, 0.0165, {}, 1e-3 / 1.5),
    "just not too much": (1e-3, 0.0155, {}, 1e-3),
    "just too little": (1e-3, 0.0035, {}, 1.5e-3),
    "another aim": (1e-3, 0.017, dict(kl_threshold=0.05), 1.5e-3),
    "at the top": (9e-3, 0.0, {}, 1e-2),
    "at the bottom": (1.2e-6, 1.0, {}, 1e-6),
    "at another bottom": (1.2e-5, 1.0, dict(min_lr=1e-5), 1e-5),
    "linear": (1.0, 1.0, dict(lr_schedule="linear", learning_rate=1e-3), 1e-6 + 999e-6 * 0.7),
    "fixed": (1e-3, 1.0, dict(lr_schedule="fixed"), 1e-3),
}


@pytest.mark.parametrize("lr, kl, arguments, expected", SCHEDULES.values(), ids=SCHEDULES)
def test_schedules(lr, kl, arguments, expected):
    found = train_ppo.next_lr(torch.tensor(lr), torch.tensor(kl), 30, Args(**arguments))
    assert found.shape == () and float(found) == pytest.approx(expected, rel=1e-6)


UPDATES = {  # KL of six steps, two in a pass: rates of these steps and after them, in 1e-3
    "legacy": (1, 1 / 1.5, 1, 1 / 1.5, 1, 1.5, 1.5),
    "standard": (1, 1, 1, 1, 1 / 1.5, 1 / 1.5, 1),
}


@pytest.mark.parametrize("schedule_type, rates", UPDATES.items(), ids=UPDATES)
def test_update_takes_each_step_with_the_rate_of_its_schedule(schedule_type, rates):
    """With a constant gradient, Adam moves a weight by the learning rate."""
    settings = dict(update_epochs=3, minibatch_size=16, learning_rate=1e-3)
    agent, seen = agent_of(schedule_type=schedule_type, **settings), []
    lr, weight = agent.lr, agent.model.a2c_network.sigma
    divergences = iter([0.03, 0.0, 0.05, 0.0, 0.0, 0.006])

    def loss_fn(model, minibatch, args):
        seen.append(float(weight.detach()[0]))
        losses = dict(mine=torch.tensor(len(seen) / 2), kl=torch.tensor(next(divergences)))
        return weight.sum(), minibatch["mus"], minibatch["sigmas"], losses

    parts = (agent.optimizer, lr, batch_of(agent), 1, agent.args, loss_fn)
    means = train_ppo.update(agent.model, *parts)
    moves = -np.diff([*seen, float(weight.detach()[0])])
    assert moves == pytest.approx(1e-3 * np.array(rates[:-1]), rel=1e-3)
    assert float(lr) == pytest.approx(1e-3 * rates[-1])
    assert {k: float(v) for k, v in means.items()} == pytest.approx(dict(mine=1.75, kl=0.086 / 6))


def test_compile_learns_the_same_and_continues_without_it(here):
    short = ("--num-envs=32", "--num-steps=8", "--max-epochs=1", "--units=8")
    eager = run(*short, "--experiment=eager").state()["model"]
    compiled = run(*short, "--experiment=compiled", "--compile").state()["model"]
    assert list(eager) == list(compiled)
    for name, value in eager.items():
        assert torch.allclose(value, compiled[name], atol=1e-4), name
    done = run("--checkpoint=runs/compiled", "--max-epochs=2", "--no-compile")
    assert "exactly where it stopped" in done.out


# EPISODES =========================================================================================


def test_mean_reward_by_hand():
    """The rewards are 1, 2, 3 and 4 in each step. Episodes that end together count alike: as their
    mean, as often as there is room."""
    meter = EpisodeMeter(4, 3, 1, CPU)
    means = [  # the environments that end in a step: mean of the last three episodes, their number
        ([], 0, 0),
        ([0], 2, 1),
        ([0, 1, 2, 3], (1 + 6 + 9 + 12) / 4, 3),
        ([3], (7 + 7 + 4) / 3, 3),
    ]
    for ended, mean, count in means:
        rewards, dones = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.zeros(1, 4)
        dones[0, ended] = 1
        meter.add_rollout([rewards], dones)
        assert (meter.mean.tolist(), meter.count) == ([mean], count)


@pytest.mark.parametrize("exact, epochs, best", [(False, 6, 4), (False, 7, 7), (True, 5, 5)])
def test_best_waits_for_whole_episodes_wherever_they_start(here, exact, epochs, best):
    """The first episodes to end are the short ones. Here they take 20 steps, 2.5 epochs, and start
    anew after epoch 4 unless the environment is exact."""
    always_better = itertools.count()
    env = dict(exact=exact, max_episode_length=20)
    env["infos"] = lambda _: {"score": float(next(always_better))}
    flags = ("--best-metric=score/iter", "--save-best-after=1", "--games-to-track=9")
    assert run(*SMALL, *flags, "--experiment=r", env=env).state()["best_epoch"] == 4
    done = run("--checkpoint=runs/r", f"--max-epochs={epochs}", env=env)
    assert done.state()["best_epoch"] == best


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
    env = Cartpole(3, CPU)
    obs, _, done, _ = env.step(torch.ones(3, 1))
    assert 0.05 < obs["obs"].abs().max() <= 0.25 and done.dtype == torch.int64
    env.state[0, 0] = 3.1  # env 0: the cart leaves the track
    env.state[2, 1] = 2.0  # env 1: the pole is down
    obs, reward, done, infos = env.step(torch.zeros(3, 1))
    assert done.tolist() == [1, 1, 0] and infos["time_outs"].tolist() == [False] * 3
    _, v, angle, omega = obs["obs"][2].abs().tolist()
    upright = 1 - angle**2 - 0.01 * v - 0.005 * omega
    assert reward.tolist() == pytest.approx([-2, -2, upright])
    assert obs["obs"][0, 0] > 3, "the observation with done=1 is the episode's last one"
    obs, reward, done, infos = env.step(torch.ones(3, 1))
    assert obs["obs"][:2].abs().max() <= 0.25 and done.tolist() == [0, 0, 0]
    for _ in range(499):
        env.state.zero_()  # held upright, it ends by the clock
        obs, reward, done, infos = env.step(torch.zeros(3, 1))
    # Env 2 ended a step earlier than the others and has begun anew.
    assert done.tolist() == [1, 1, 0] and infos["time_outs"].tolist() == [True, True, False]
