"""recipes/: each patch applies to train_ppo.py, and does there what its head says."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import harness
from harness import ROOT, SMALL, differences, refused, run, same_state

import train_ppo as unpatched
from benchmarks import fidelity
from examples.nan_guard import NanGuard

here = harness.here  # the fixture
OWN = "--env-id=test_recipes:make_env"
ON = {"state_sigma": ["--no-fixed-sigma"], "final_obs": [], "eval_envs": ["--eval-envs=8"]}
ON.update(mirror=["--mirror-coef=1", "--mirror-augment"], rnd=["--rnd-coef=1"])  # by flags


class Cartpole(unpatched.Cartpole):
    """Ends after 7 steps, whose last observation is in infos; a mirror turns all signs."""

    max_episode_length = 7

    def step(self, actions):
        obs, reward, done, infos = super().step(actions)
        return obs, reward, done, dict(infos, final_obs=obs)

    def mirror(self, x, kind):
        return -x


def make_env(num_envs, device, seed):
    return Cartpole(num_envs, torch.device(device))


@pytest.fixture
def patched(here, monkeypatch):
    """patched(NAMES): the module train_ppo, from now on, with these recipes."""

    def apply(*names):
        shutil.copytree(str(ROOT / "tools"), "tools")
        shutil.copy(str(ROOT / "train_ppo.py"), ".")
        for name in names:
            subprocess.run(["git", "apply", str(ROOT / "recipes" / f"{name}.patch")], check=True)
        monkeypatch.delitem(sys.modules, "train_ppo")
        monkeypatch.syspath_prepend(str(here))
        module = importlib.import_module("train_ppo")
        monkeypatch.setattr(harness, "train_ppo", module)
        return module

    return apply


@pytest.mark.parametrize("name", ON)
def test_off_it_changes_nothing_and_on_it_continues_to_the_last_bit(name, patched):
    plain = run(*SMALL).state()["model"]
    patched(name)
    assert differences(run(*SMALL).state()["model"], plain) == []
    flags = [*SMALL, OWN, *ON[name]]
    whole = run(*flags, "--experiment=whole").state()
    run(*flags, "--max-epochs=2", "--experiment=parts")
    parts = run("--checkpoint=runs/parts", "--max-epochs=4", OWN).state()
    assert same_state(whole, parts) == []
    run("runs/whole", "--stochastic", OWN, script="tools/evaluate.py")


def test_state_sigma_computes_what_rl_games_does(patched, monkeypatch):
    pytest.importorskip("rl_games.torch_runner")
    train_ppo, params = patched("state_sigma"), fidelity.rl_games_params
    monkeypatch.setattr(fidelity, "train_ppo", train_ppo)

    def with_layer(args, **config):
        found = params(args, **config)
        found["network"]["space"]["continuous"]["fixed_sigma"] = False
        return found

    monkeypatch.setattr(fidelity, "rl_games_params", with_layer)
    monkeypatch.setattr(fidelity, "EPOCHS", 3)
    job = dict(fidelity.REACH, fixed_sigma=False, sigma_init=-0.02, ent_coef=0.01)
    monkeypatch.setitem(fidelity.ROWS, "state sigma", job)
    sigma = train_ppo.ActorCritic(7, 3, fidelity.make_args(job, 1, "")).a2c_network.sigma
    assert (sigma.weight == -0.02).all() and (sigma.bias == 0).all()
    assert max(fidelity.row("state sigma", same_kernels=True)["weights"]) <= 1e-5


def test_final_obs_is_valued_where_the_clock_cut(patched, monkeypatch):
    train_ppo, learned = patched("final_obs"), []
    gae = train_ppo.gae
    monkeypatch.setattr(train_ppo, "gae", lambda *x: learned.append(x[0]) or gae(*x))
    monkeypatch.setattr(train_ppo.ActorCritic, "value", lambda self, obs: obs.sum(1))
    infos = {"final_obs": {"obs": torch.full((32, 2), 3.0), "states": torch.full((32, 1), 5.0)}}
    run(*SMALL, env=dict(lengths=4, infos=infos, num_states=1))
    assert (torch.stack(learned) > 10).float().mean(2).tolist() == [[0, 0, 1, 0, 0, 0, 1, 0]] * 4


def test_eval_envs_are_scored_by_their_means_and_not_learned_from(patched):
    patched("eval_envs")
    agents, done = [], []
    keep = SimpleNamespace(after_init=agents.append)
    best = ["--games-to-track=10", "--save-best-after=1", "--best-metric=eval/reward"]
    for pay in (1.0, 1000.0):
        env = dict(lengths=6, infos=lambda env, pay=pay: {"paid": env.reward[-8:].fill_(pay)})
        done.append(run(*SMALL, *ON["eval_envs"], *best, env=env, observers=[keep]))
    noisy = (agents[0].buffer["actions"] != agents[0].buffer["mus"]).all(2).all(0)
    assert noisy.tolist() == [True] * 24 + [False] * 8
    assert differences(*(x.state()["model"] for x in done)) == []
    assert differences(*(x.curves["rewards/iter"] for x in done)) == []
    assert [x for _, x in done[1].curves["eval/reward"]] == [5000, 6000, 6000, 6000]  # from step 2
    assert done[1].state("best.pth")["last_mean_rewards"] == 6000


def test_mirror_images_are_learned_from(patched, monkeypatch):
    train_ppo, agents = patched("mirror", "rnd"), []  # they go together
    keep = SimpleNamespace(after_init=agents.append)
    run(*SMALL, OWN, "--mirror-coef=10", *ON["rnd"], observers=[keep])
    act, x = agents[0].model.mean_action, torch.randn(99, 4)
    assert (act(x) + act(-x)).abs().mean() < 0.5 * act(x).abs().mean()
    images = train_ppo.with_images(agents[0].model, dict(obs=x, actions=x[:, :1], values=x[:, 0]))
    expected = dict(obs=torch.cat((x, -x)), actions=torch.cat((x, -x))[:, :1])
    assert differences(images, dict(expected, values=x[:, 0].repeat(2))) == []
    monkeypatch.setattr(train_ppo, "with_images", None)
    pytest.raises(TypeError, run, *SMALL, OWN, "--mirror-augment")


def test_with_an_lstm_the_mirror_loss_starts_from_an_empty_memory(patched, monkeypatch):
    train_ppo, errors = patched("lstm", "mirror"), []
    original = train_ppo.mirror_loss

    def mirror_loss(model, batch, mu):
        obs, empty = batch["obs"], torch.zeros_like(batch["memory"])
        sums = model(-obs, empty, batch["starts"])[0] + model(obs, empty, batch["starts"])[0]
        errors.append(float(original(model, batch, mu) - sums.square().sum(1).mean()))
        return original(model, batch, mu)

    monkeypatch.setattr(train_ppo, "mirror_loss", mirror_loss)
    done = run(*SMALL, OWN, "--rnn-units=8", "--mirror-coef=1")
    assert max(map(abs, errors)) < 1e-6 and done.state()["memory"].any()
    assert "has no mirror image" in refused(*SMALL, OWN, "--rnn-units=8", "--mirror-augment")


def test_a_mirror_that_is_none_is_refused(patched, monkeypatch):
    patched("mirror")
    monkeypatch.setattr(Cartpole, "mirror", lambda self, x, kind: 1.0 - 2.0 * x)
    assert "mirror(mirror(x, 'obs'), 'obs') of the env is not x" in refused(
        *SMALL, OWN, "--mirror-coef=1"
    )


def test_mirrored_ants_stay_mirrored():
    ants = pytest.importorskip("examples.mujoco_ant", reason="needs mujoco")
    one, other = ants.MujocoAnt(16), ants.MujocoAnt(16)
    for _ in range(20):
        one.step(torch.rand(16, 8) * 2 - 1)
    other.physics = one.physics.clone()
    other.physics[:, [2, 5, 7, 17, 19, 21]] *= -1  # y; x and z of the quaternion; of velocity, spin
    for joints in (slice(8, 16), slice(22, 30)):
        other.physics[:, joints] = one.mirror(one.physics[:, joints], "actions")
    actions = torch.rand(16, 8) * 2 - 1
    seen, image = one.step(actions)[0], other.step(one.mirror(actions, "actions"))[0]
    assert (one.mirror(seen["obs"], "obs") - image["obs"]).abs().max() < 1e-4


def test_rnd_bonus_is_learned_from_and_not_logged(patched, monkeypatch):
    actor_critic = patched("rnd").ActorCritic
    monkeypatch.setattr(actor_critic, "bonus", lambda self, obs: obs.new_full((8, 32), 99))
    done = run(*SMALL, OWN, "--rnd-coef=2", "--no-value-bootstrap")
    assert done.state()["model"]["value_mean_std.running_mean"] > 100
    assert max(value for _, value in done.curves["shaped_rewards/iter"]) < 1
    losses = done.curves["losses/rnd_loss"]
    assert losses[-1][1] < 0.5 * losses[0][1]


def test_nan_guard_ends_the_broken_environment_alone():
    env = NanGuard(unpatched.Cartpole(8, "cpu"))
    for t in range(1, 5):
        env.state[1, 7] += float("nan") if t == 3 else 0.0
        obs, reward, done, infos = env.step(torch.zeros(8, 1))
        assert done.tolist() == (reward == 0).tolist() == [False] * 7 + [t == 3]
        assert infos["broken_envs"] == (obs["obs"] == 0).all(1).sum() == (t == 3)
    assert env.progress.tolist() == [3] * 7 + [0], "a new episode"
