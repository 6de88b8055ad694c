"""examples/hparams.py: what TensorBoard's HPARAMS page reads."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import train_ppo
from examples.hparams import Hparams


def test_arguments_stand_beside_the_best_reward(tmp_path):
    flags = ["--sim=torch", "--num-envs=32", "--learning-rate=2e-3", "--units", "8", "16"]
    flags += ["--max-epochs=60", "--games-to-track=32", f"--train-dir={tmp_path}"]
    result = train_ppo.main(flags, observers=[Hparams()])
    assert result["best_epoch"] > 0, "else there is nothing to compare"
    events = EventAccumulator(result["run_dir"] + "/summaries").Reload()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    shown = HParamsPluginData.FromString(content).session_start_info.hparams
    assert shown["learning_rate"].number_value == 2e-3
    assert shown["units"].string_value == "(8, 16)"
    assert shown["track"].bool_value is False
    best = events.Scalars("best_reward")[-1]
    assert (best.step, best.value) == (60, result["best_score"])
