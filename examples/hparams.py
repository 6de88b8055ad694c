"""Compare the runs of a sweep in TensorBoard's HPARAMS page: arguments beside the best reward.

    for rate in 1e-3 3e-3 1e-2; do python examples/hparams.py --learning-rate $rate; done
    tensorboard --logdir runs

It takes all arguments of train_ppo.py. W&B's page compares them without this.
"""

import os
import sys
from dataclasses import asdict

from torch.utils.tensorboard.summary import hparams

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import train_ppo


class Hparams(train_ppo.AlgoObserver):
    def close(self) -> None:
        settings = asdict(self.algo.args)
        for name, value in settings.items():
            if not isinstance(value, (bool, int, float, str)):
                settings[name] = str(value)  # such as units
        for summary in hparams(settings, {"best_reward": self.algo.best_score}):
            self.writer.file_writer.add_summary(summary)
        self.writer.add_scalar("best_reward", self.algo.best_score, self.algo.epoch_num)


if __name__ == "__main__":
    train_ppo.main(observers=[Hparams()])
