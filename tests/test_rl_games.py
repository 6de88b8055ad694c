"""rl_games 1.6.1 and train_ppo.py: the same numbers, and checkpoints and observers that move."""

import math
import re
import shlex
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import ROOT, SCRIPT, differences, refused, run

import train_ppo
from benchmarks import fidelity
from train_ppo import Args, load_checkpoint

pytest.importorskip("rl_games.torch_runner", reason="see the command for the tests in README.md")
CONVERT = ROOT / "tools" / "from_rl_games.py"
FEW = ("--num-envs=64", "--minibatch-size=1024")


# THE SAME NUMBERS =================================================================================


@pytest.mark.parametrize("name", fidelity.ROWS)
def test_weights_rates_and_mean_rewards_are_those_of_rl_games(name, monkeypatch):
    """With torch's plain Adam, Linear and ELU and one thread, so that rounding has little to start
    from. Later, rounding may decide on which side of its threshold a KL divergence is."""
    monkeypatch.setattr(fidelity, "EPOCHS", 3)
    found = fidelity.row(name, same_kernels=True)
    weights = found.pop("weights")
    assert weights[0] <= 1e-6 and max(weights) <= 1e-5, weights
    assert set(found) == {"learning_rate", "rewards", "shaped_rewards", "episode_lengths"}
    assert {what: x for what, x in found.items() if max(x) > 1e-5} == {}


def test_with_our_own_kernels_the_first_epoch_is_the_same(monkeypatch):
    monkeypatch.setattr(fidelity, "EPOCHS", 1)
    assert fidelity.row("adaptive legacy")["weights"][0] <= 1e-5


@pytest.mark.parametrize("separate", [False, True])
def test_parameters_have_rl_games_names_in_its_order(separate):
    """Adam's state in a checkpoint goes by the order."""
    from rl_games.algos_torch.model_builder import ModelBuilder

    args = Args(units=(16, 8), separate=separate)
    network = ModelBuilder().load(fidelity.rl_games_params(args))
    shape = dict(actions_num=2, input_shape=(5,), num_seqs=1, value_size=1)
    theirs = network.build(dict(shape, normalize_value=True, normalize_input=True))
    ours = train_ppo.ActorCritic(5, 2, args)
    named = [[(n, x.shape) for n, x in model.named_parameters()] for model in (ours, theirs)]
    assert named[0] == named[1]
    ours.load_state_dict(theirs.state_dict())


# CHECKPOINTS AND OBSERVERS THAT MOVE ==============================================================


def rl_games_runner(observer=None, folder="theirs", max_epochs=6, **config):
    """rl_games' own Runner on our Cartpole; `config` as in its yaml files."""
    torch.set_num_threads(1)  # as ours does
    args = Args(num_envs=64, minibatch_size=1024, max_epochs=max_epochs, seed=7)
    env = train_ppo.Cartpole(64, torch.device("cpu"))
    return fidelity.rl_games_runner(env, args, observer, train_dir=str(folder), **config)


def last_of(folder, epoch):
    (path,) = Path(folder).glob(f"*/nn/last_theirs_ep_{epoch}_*.pth")
    return path


class Counts(train_ppo.AlgoObserver):
    """What the normaliser has counted after each epoch of whichever trainer calls it."""

    def __init__(self):
        self.seen = []

    def after_print_stats(self, frame, epoch_num, total_time):
        count = float(self.algo.model.state_dict()["running_mean_std.count"])
        self.seen.append((epoch_num, count))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What rl_games' Runner has written, and an observer of ours that has watched it."""
    folder, counts = tmp_path_factory.mktemp("theirs"), Counts()
    rl_games_runner(counts, folder).run(dict(train=True, play=False))
    return last_of(folder, 6), counts


@pytest.fixture
def theirs(here, trained):
    """The content of theirs.pth, which rl_games has written after six epochs."""
    shutil.copy(str(trained[0]), "theirs.pth")
    return torch.load("theirs.pth", weights_only=False)


def convert(source, target, *flags):
    """The content of the converted file, and what the tool printed."""
    out = run(source, target, *flags, script=CONVERT).out
    return load_checkpoint(target), out


def assert_same_policy(theirs, ours):
    """rl_games' own player, with its file, acts and values as our network does with ours."""
    obs = torch.randn(1000, 4) * torch.tensor([2.0, 2.0, 0.5, 3.0])
    player = rl_games_runner(player=dict(use_vecenv=True)).create_player()
    player.restore(str(theirs))
    player.has_batch_dimension = True
    acts = player.get_action(obs.clone(), is_deterministic=True)
    inputs = dict(is_train=False, obs=obs.clone(), prev_actions=None, rnn_states=None)
    values = player.model(inputs)["values"].squeeze(-1)
    state = load_checkpoint(str(ours))
    model = train_ppo.ActorCritic(4, 1, Args(**state["args"]))
    model.load_state_dict(state["model"])
    assert (acts - model.mean_action(obs).clamp(-1, 1)).abs().max() <= 1e-6
    assert (values - model.value(obs)).abs().max() <= 1e-5


def test_checkpoints_move_between_rl_games_and_here(theirs, trained):
    """Six epochs there, three here, two there: nothing starts over, and both act alike. An observer
    of ours watches all of it."""
    counts = trained[1]
    moved, out = convert("theirs.pth", "moved.pth", "--env-id", "Cartpole")
    assert out.startswith("wrote moved.pth: epoch 6, frame 6,144")
    error = refused("theirs.pth", "moved.pth", script=CONVERT)
    assert error.startswith("error: moved.pth exists already")
    assert_same_policy("theirs.pth", "moved.pth")
    for name in ("model", "epoch", "frame"):
        assert differences(moved[name], theirs[name]) == [], name
    assert differences(moved["optimizer"]["state"], theirs["optimizer"]["state"]) == []
    rate = moved["optimizer"]["param_groups"][0]["lr"]
    assert rate == pytest.approx(theirs["optimizer"]["param_groups"][0]["lr"]) != Args.learning_rate
    only_the_weights_say = dict(units=[32, 32], separate=False)
    only_the_weights_say.update(normalize_input=True, normalize_value=True)
    assert moved["args"] == only_the_weights_say, "the rest comes from flags and the task's yaml"

    command = shlex.split(re.search(r"continue  python (.*)", out)[1])
    assert Path(command[0]).resolve() == Path(SCRIPT)
    flags = (*FEW, "--max-epochs=9", "--experiment=r")
    done = run(*command[1:], *flags, observers=[counts])
    assert "branching off moved.pth at epoch 6, frame 6,144" in done.out
    assert_same_policy("runs/r/nn/last.pth", "runs/r/nn/last.pth")

    runner = rl_games_runner(counts, max_epochs=11)
    runner.run(dict(train=True, play=False, checkpoint="runs/r/nn/last.pth"))
    back, _ = convert(last_of("theirs", 11), "back.pth")
    assert_same_policy(last_of("theirs", 11), "back.pth")
    assert counts.seen == [(epoch, 1 + 1024 * epoch) for epoch in range(1, 12)]
    for state, epochs in ((done.state(), 9), (back, 11)):
        steps = [int(moment["step"]) for moment in state["optimizer"]["state"].values()]
        assert steps == [8 * epochs] * 9, "Adam"
        assert state["frame"] == epochs * 1024


def test_checkpoints_of_compiled_and_mixed_precision_rl_games(theirs):
    """A prefix before every name and a numpy number, as 1.6.5 writes them; with mixed precision a
    scaler; and Adam's steps as ints, as in torch before 1.12."""
    theirs["model"] = {f"_orig_mod.{name}": x for name, x in theirs["model"].items()}
    for moment in theirs["optimizer"]["state"].values():
        moment["step"] = int(moment["step"])
    theirs.update(last_mean_rewards=np.float32(12.5), scaler={"scale": 65536.0})
    torch.save(theirs, "compiled.pth")
    state, _ = convert("compiled.pth", "ours.pth")
    assert state["last_mean_rewards"] == 12.5
    assert_same_policy("theirs.pth", "ours.pth")
    state = run("--checkpoint=ours.pth", "--max-epochs=7", *FEW).state()
    assert [int(m["step"]) for m in state["optimizer"]["state"].values()] == [7 * 8] * 9
    state = run("--init-from=ours.pth", "--max-epochs=1", *FEW).state()
    assert (state["epoch"], state["model"]["running_mean_std.count"]) == (1, 1 + 7 * 1024)


OLD, NEW = b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n"


@pytest.mark.parametrize("wanted", [OLD, NEW], ids=["numpy 1", "numpy 2"])
def test_numpy_numbers_of_both_numpys_are_read(theirs, wanted):
    """They name the function that makes a number differently, and a file has either. The reward
    that rl_games starts from is no reward."""
    theirs["env_state"] = {"level": np.float64(0.5), "levels": [np.int64(3)]}
    torch.save(dict(theirs, last_mean_rewards=np.float32(-100500)), "installed.pth")
    with zipfile.ZipFile("installed.pth") as source, zipfile.ZipFile("x.pth", "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                assert OLD in content or NEW in content, "neither name: mend this test"
                content = content.replace(OLD, wanted).replace(NEW, wanted)
            target.writestr(name, content)
    state, _ = convert("x.pth", "ours.pth")
    assert differences(state["env_state"], {"level": 0.5, "levels": [3]}) == []
    assert state["last_mean_rewards"] == -math.inf


def test_rl_games_observers_run_here(here):
    """They log what they log there. IsaacAlgoObserver's Episode/ values are RLGPUAlgoObserver's."""
    from rl_games.common.algo_observer import DefaultAlgoObserver, IsaacAlgoObserver

    def infos(env):
        return dict(episode={"height": torch.full((3,), float(env.steps))}, scores=torch.ones(64))

    flags = ("--num-envs=64", "--num-steps=8", "--max-epochs=2", "--strict-observers")
    observers = [DefaultAlgoObserver(), IsaacAlgoObserver()]
    curves = run(*flags, env=dict(lengths=4, infos=infos), observers=observers).curves
    assert curves["scores/iter"] == [(1, 1), (2, 1)]
    assert curves["Episode/height"] == [(1, 5.5), (1, 5.5), (2, 13.5), (2, 13.5)]  # ours, theirs


# FILES THAT ARE REFUSED ===========================================================================


class RunsCode:
    def __reduce__(self):
        return open, ("ran", "w")


MLP, ZEROS = "a2c_network.actor_mlp.0.weight", torch.zeros(2, 5)
NOT_OURS = "of an rl_games network that train_ppo.py does not have .*: "
REFUSALS = {  # what is changed in the file's content: the message
    "recurrent": (lambda s: s["model"].update({"rnn.weight": 0}), NOT_OURS + "rnn.weight"),
    "central value": (lambda s: s.update(assymetric_vf_nets={}), NOT_OURS + "assymetric_vf_nets"),
    "discrete": (lambda s: s["model"].pop("a2c_network.sigma"), NOT_OURS + "a2c_network.sigma"),
    "before 1.3": (lambda s: s.update(running_mean_std={}), NOT_OURS + "running_mean_std"),
    "another shape": (lambda s: s["model"].update({MLP: ZEROS}), MLP),
    "optimizer": (lambda s: s["optimizer"]["state"][0].update(exp_avg=ZEROS), "Adam's moments"),
    "no frame": (lambda s: s.pop("frame"), "not a checkpoint of rl_games' PPO: it lacks frame"),
    "code": (lambda s: s.update(env_state=RunsCode()), "cannot be used: .*tensors, numbers"),
    "ours": (lambda s: s.update(format_version=3), "checkpoint of train_ppo.py: .*--checkpoint"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_files_that_are_not_ours_are_refused_by_name(theirs, name):
    """One line names what is in the way; nothing is written, and no code in the file runs."""
    change, message = REFUSALS[name]
    change(theirs)
    torch.save(theirs, "theirs.pth")
    error = refused("theirs.pth", "ours.pth", script=CONVERT)
    assert re.fullmatch(f"error: .*theirs.pth.*{message}.*", error)
