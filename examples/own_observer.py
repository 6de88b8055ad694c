"""An observer of your own: a logging backend, as short as it can be.

    python examples/own_observer.py [any argument of train_ppo.py]

It writes each epoch's metrics as one line of JSON to runs/<name>/metrics.jsonl. The training loop
knows no backend, so a new one is a class with one method. `train_ppo.AlgoObserver` has all hooks.
"""

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import train_ppo


class JsonLines(train_ppo.AlgoObserver):
    def after_print_stats(self, frame: int, epoch_num: int, total_time: float) -> None:
        # What the environment and the other observers have logged is in writer.scalars, too.
        metrics = {"epoch": epoch_num, "frame": frame, **self.algo.writer.scalars}
        with open(os.path.join(self.algo.config["run_dir"], "metrics.jsonl"), "a") as file:
            file.write(json.dumps(metrics) + "\n")


if __name__ == "__main__":
    train_ppo.main(observers=[JsonLines()])
