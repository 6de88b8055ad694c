"""recipes/lstm.patch, applied to a copy: rl_games' weights, and all that a run needs."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("rl_games.torch_runner", reason="see the command for the tests in README.md")
ROOT = Path(__file__).resolve().parent.parent
NAMES = ("train_ppo", "harness", "benchmarks.fidelity", "tools.evaluate", "test_isaacgym")
BEFORE = dict(rnn_before_mlp=True)
ALL = dict(separate=True, rnn_concat_input=True, rnn_layer_norm=True, rnn_layers=2)
OPTIONS = {  # what differs from one layer of 8 units after the hidden layers
    **{"plain": {}, "separate": dict(separate=True), "separate, all": ALL, "before": BEFORE},
    **{"concat input": dict(rnn_concat_input=True), "layer norm": dict(rnn_layer_norm=True)},
    **{"two layers": dict(rnn_layers=2, **BEFORE), "8 steps": dict(seq_length=8)},
    "separate, before": dict(separate=True, rnn_layer_norm=True, **BEFORE),
    **{"rollout": dict(seq_length=16, **BEFORE), "kept": dict(zero_rnn_on_done=False)},
}
SMALL = dict(num_envs=32, num_steps=16, minibatch_size=128, update_epochs=4, units=(16, 12))
REACH = dict(SMALL, env="reach", learning_rate=1e-3, reward_scale=1.0, rnn_units=8)
RUN = "--num-envs=32 --num-steps=8 --update-epochs=2 --save-frequency=0 --minibatch-size=64".split()


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The modules of a patched copy, as attributes; fidelity gives rl_games the same LSTM."""
    folder = tmp_path_factory.mktemp("copy") / "copy"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "runs"))
    subprocess.run(["git", "apply", ROOT / "recipes" / "lstm.patch"], cwd=folder, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # for rl_games to read its own files
        patch.setattr(sys, "path", [str(folder), str(folder / "tests"), *sys.path])
        for name in NAMES:
            patch.setitem(sys.modules, name, None)  # so that it is put back in the end
            del sys.modules[name]
        found = {name.split(".")[-1]: importlib.import_module(name) for name in NAMES}
        params = found["fidelity"].rl_games_params

        def with_lstm(args, **config):
            config.update(seq_length=args.seq_length, zero_rnn_on_done=args.zero_rnn_on_done)
            theirs = params(args, **config)
            rnn = {name[4:]: value for name, value in vars(args).items() if name[:4] == "rnn_"}
            theirs["network"]["rnn"] = dict(rnn, name="lstm")
            return theirs

        patch.setattr(found["fidelity"], "rl_games_params", with_lstm)
        yield SimpleNamespace(folder=folder, run=found["harness"].run, **found)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", OPTIONS)
def test_weights_are_those_of_rl_games(copy, name, monkeypatch):
    """With early ends, time-outs and staggered episodes."""
    monkeypatch.setattr(copy.fidelity, "EPOCHS", 3)
    monkeypatch.setitem(copy.fidelity.ROWS, name, dict(REACH, **OPTIONS[name]))
    found = copy.fidelity.row(name, same_kernels=True)
    assert max(map(max, found.values())) <= 1e-4, found


@pytest.mark.parametrize("more", ["--no-separate", "--separate"])
def test_without_units_every_weight_is_that_of_the_unpatched_file(copy, more):
    files = [folder / "train_ppo.py" for folder in (ROOT, copy.folder)]
    theirs, ours = [copy.run(*RUN, more, "--max-epochs=3", script=file).state() for file in files]
    assert copy.harness.differences(ours["model"], theirs["model"]) == []


CASES = [([], {}), (["--separate", "--rnn-before-mlp", "--rnn-layers=2"], {})]
CASES += [([], dict(num_states=3)), (["--rnn-critic", "--seq-length=8"], dict(num_states=3))]


@pytest.mark.parametrize("flags, env", CASES)
def test_a_run_continues_exactly_and_is_evaluated_and_exported(copy, flags, env):
    run, env = copy.run, dict(env, exact=True, lengths=5)
    size = 32 if "--rnn-layers=2" in flags else 16
    whole = run(*RUN, "--rnn-units=8", *flags, "--max-epochs=4", "--experiment=a", env=env).state()
    run(*RUN, "--rnn-units=8", *flags, "--max-epochs=2", "--experiment=b", env=env)
    continued = run("--checkpoint=runs/b", "--max-epochs=4", env=env).state()
    assert copy.harness.same_state(whole, continued) == [] and whole["memory"].any()
    run("runs/b", "--env-id=harness:make_env", script=copy.folder / "tools" / "evaluate.py")
    run("runs/b", "policy", script=copy.folder / "tools" / "export_policy.py")  # compares, too
    policy, memory = torch.jit.load("policy/policy.pt"), torch.ones(1, size)
    assert (policy(torch.ones(1, 2), memory)[0] != policy(torch.ones(1, 2), 0 * memory)[0]).any()


def test_evaluation_hands_on_the_memory_and_where_episodes_start(copy):
    def mean_action(obs, memory, starts):
        seen.append((memory[0].item(), starts[0].item()))
        return obs, memory + 1

    seen, env = [], copy.harness.Env(8, "cpu", 0, lengths=2)
    model = SimpleNamespace(memory_size=1, mean_action=mean_action)
    played = copy.evaluate.play(env, model, "cpu", False, False)
    assert len([next(played) for _ in range(5)]) == 5
    assert seen == [(0, 0), (1, 0), (2, 1), (3, 0), (4, 1)]


@pytest.mark.parametrize("name", ["concat input", "separate, before", "two layers"])
def test_checkpoints_move_between_rl_games_and_here(copy, name):
    """Both act alike with a file, over ten steps, and go on from the other's."""
    train_ppo, runner = copy.train_ppo, copy.fidelity.rl_games_runner
    args = train_ppo.Args(**SMALL, rnn_units=8, max_epochs=2, **OPTIONS[name])
    env, job = train_ppo.Cartpole(32, torch.device("cpu")), dict(train=True, play=False)
    runner(env, args, train_dir="theirs").run(job)
    (theirs,) = Path("theirs").glob("*/nn/last_theirs_ep_2_*.pth")
    copy.run(theirs, "ours.pth", script=copy.folder / "tools" / "from_rl_games.py")
    more = ("--num-envs=32", "--minibatch-size=128", "--max-epochs=4", "--experiment=r")
    assert "at epoch 2" in copy.run("--checkpoint=ours.pth", *more).out
    player = runner(env, args, player=dict(use_vecenv=True)).create_player()
    player.has_batch_dimension, player.batch_size = True, 32
    for file, ours in ((theirs, "ours.pth"), ("runs/r/nn/last.pth", "runs/r/nn/last.pth")):
        player.restore(str(file))
        player.init_rnn()
        state, memory = train_ppo.load_checkpoint(ours), torch.zeros(32, 8 * 2 * args.rnn_layers)
        model = train_ppo.ActorCritic(4, 1, train_ppo.Args(**state["args"]))
        model.load_state_dict(state["model"])
        for obs in torch.randn(10, 32, 4):
            action, memory = model.mean_action(obs, memory, torch.zeros(32))
            expected = player.get_action(obs.clone(), is_deterministic=True)
            assert (action.clamp(-1, 1) - expected).abs().max() <= 1e-6
    args.max_epochs = 5
    runner(env, args, train_dir="back").run(dict(job, checkpoint="runs/r/nn/last.pth"))


def test_official_settings_with_an_lstm_train_or_are_refused(copy):
    settings, found, refused = copy.test_isaacgym, [], {}
    for name in settings.FACTS["files"]:
        facts = settings.facts(name)
        try:
            found += [copy.train_ppo.settings_from_yaml(settings.nested(facts), name)]
        except SystemExit as exc:
            refused.update({name: str(exc)} if "network.rnn.name" in facts else {})
    assert list(refused) == ["AllegroHandDextremeADRPPO", "AllegroHandLSTM_BigPPO"]
    assert "central.network.rnn.units = 2048" in refused["AllegroHandDextremeADRPPO"]
    assert [x["rnn_critic"] for x in found if "rnn_units" in x].count(True) == 3
    assert [x.get("rnn_units", 0) > 0 for x in found].count(True) == 10
