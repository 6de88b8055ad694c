"""Turn a checkpoint of rl_games 1.x into one that train_ppo.py continues, evaluates and exports.

    python tools/from_rl_games.py IsaacGymEnvs/runs/Ant/nn/Ant.pth ours.pth --env-id Ant
    python train_ppo.py --env-id Ant --checkpoint ours.pth --max-epochs 1000

It takes a2c_continuous with the model continuous_a2c_logstd on an MLP, as IsaacGymEnvs' tasks have
them. Weights, normalisers, Adam's state, the learning rate, epoch, frame and best reward are kept.
rl_games saves neither its settings nor its mean reward. So layer sizes are read off the weights,
other settings come from the flags of train_ppo.py and the task's yaml, and the mean starts anew.

The other way needs no tool: rl_games reads our checkpoints as they are.
"""

import codecs
import math
import os
import re
import shlex
import sys
from dataclasses import dataclass
from typing import Any, Dict, Optional, Sequence
from unittest import mock

import numpy as np
import torch
import tyro
from torch import Tensor

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import train_ppo
from train_ppo import ActorCritic, Args, UserError, log


@dataclass
class Options:
    theirs: tyro.conf.Positional[str]  # a checkpoint of rl_games
    ours: tyro.conf.Positional[str]  # a new file
    env_id: str = "TASK"  # for the commands that are printed; train_ppo.py takes its settings


def allow_numpy_scalars() -> None:
    """rl_games saves its best reward as a numpy number: let weights_only loading read those.

    torch compares names. numpy 1 wrote `numpy.core.multiarray.scalar` into the file and numpy 2
    writes `numpy._core.multiarray.scalar`, but the function itself has only the name that the
    installed numpy gives it. So each name gets a function of its own.
    """
    scalar = np.float32(0).__reduce__()[0]

    def named(module: str) -> Any:
        def read(*args):
            return scalar(*args)

        read.__module__ = module
        read.__name__ = read.__qualname__ = "scalar"
        return read

    functions = [named("numpy.core.multiarray"), named("numpy._core.multiarray"), codecs.encode]
    dtypes = [type(np.dtype(name)) for name in ("float32", "float64", "int64")]
    torch.serialization.add_safe_globals([*functions, np.dtype, *dtypes])


def read(path: str) -> Dict[str, Any]:
    """What rl_games wrote, read to the CPU without running code from it."""
    allow_numpy_scalars()
    with mock.patch.object(train_ppo, "FORMAT_VERSION", mock.ANY):  # theirs has none
        state = train_ppo.load_checkpoint(path)
    if "format_version" in state:
        raise UserError(f"{path} is a checkpoint of train_ppo.py: give it to --checkpoint as it is")
    for key in ("model", "optimizer", "epoch", "frame"):
        if key not in state:
            raise UserError(f"{path} is not a checkpoint of rl_games' PPO: it lacks {key}")
    return state


def read_sizes(state: Dict[str, Any], weights: Dict[str, Tensor], path: str) -> Dict[str, Any]:
    """Sizes and arguments that the weights tell. UserError if our network has other weights."""
    try:
        bias = re.compile(r"a2c_network\.actor_mlp\.\d+\.bias")
        units = [weights[name].numel() for name in weights if bias.fullmatch(name)]
        args = dict(units=units, separate="a2c_network.critic_mlp.0.weight" in weights)
        args["normalize_input"] = "running_mean_std.count" in weights
        args["normalize_value"] = "value_mean_std.count" in weights
        num_obs = weights["a2c_network.actor_mlp.0.weight"].shape[-1]
        num_acts = weights["a2c_network.sigma"].numel()
        sizes = dict(num_obs=num_obs, num_acts=num_acts, num_states=0, args=args)
        odd = sorted(set(weights) ^ set(our_network(sizes).state_dict()))
    except KeyError as exc:
        odd = [exc.args[0]]
    # A central value network is saved beside the model; before 1.3 the normalisers were too.
    odd += [key for key in ("assymetric_vf_nets", "running_mean_std") if key in state]
    if odd:
        takes = "a2c_continuous with continuous_a2c_logstd, an MLP and a fixed sigma"
        what = (
            f"{path} is of an rl_games network that train_ppo.py does not have (it takes {takes})"
        )
        raise UserError(f"{what}: {', '.join(odd[:3])}")
    return sizes


def our_network(sizes: Dict[str, Any]) -> ActorCritic:
    return ActorCritic(sizes["num_obs"], sizes["num_acts"], Args(**sizes["args"]))


def without_numpy(value: Any) -> Any:
    """The same value, with Python's numbers for numpy's."""
    if isinstance(value, dict):
        return {key: without_numpy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_numpy(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def convert(state: Dict[str, Any], path: str) -> Dict[str, Any]:
    """rl_games' checkpoint `state`, read from `path`, as one of train_ppo.py."""
    # torch.compile puts a prefix before the names of the weights.
    weights = {name.replace("_orig_mod.", "", 1): x for name, x in state["model"].items()}
    sizes = read_sizes(state, weights, path)
    optimizer = without_numpy(state["optimizer"])
    group = optimizer["param_groups"][0]
    group["lr"] = float(group["lr"])
    for moments in optimizer["state"].values():
        moments["step"] = torch.tensor(float(moments["step"]))  # an int in older versions of torch
    best = float(state.get("last_mean_rewards", -math.inf))
    converted = dict(
        sizes,
        format_version=train_ppo.FORMAT_VERSION,
        version=train_ppo.__version__,
        model=weights,
        optimizer=optimizer,
        epoch=int(state["epoch"]),
        frame=int(state["frame"]),
        # rl_games starts from -100500 or -1000000000, and only ever raises it.
        last_mean_rewards=best if best > -100500 else -math.inf,
        env_state=without_numpy(state.get("env_state")),
        # What rl_games does not save.
        total_time=0.0,
        best_epoch=0,
        clip_obs=math.inf,
        policy_metadata={},
        wandb_run_id="",
        device="",
        processes=0,
        episodes=dict(mean=torch.zeros(3, dtype=torch.float64), count=0),
        obs=torch.zeros(0),
    )
    train_ppo.load_weights(our_network(sizes), converted, path)
    return converted


def main(argv: Optional[Sequence[str]] = None) -> None:
    options = tyro.cli(Options, args=argv, description=__doc__)
    theirs, ours = options.theirs, options.ours
    if os.path.lexists(ours):
        raise UserError(f"{ours} exists already: give a new name")
    try:
        converted = convert(read(theirs), theirs)
    except Exception as exc:  # not UserError, which is a SystemExit
        what = f"{type(exc).__name__}: {exc}".splitlines()[0]
        raise UserError(f"{theirs} cannot be converted: {what}") from exc
    try:
        with open(f"{ours}.tmp", "wb") as file:
            torch.save(converted, file)
        os.rename(f"{ours}.tmp", ours)
    except (OSError, RuntimeError) as exc:  # RuntimeError: torch's word for a full disk
        raise UserError(f"{ours} cannot be written: {exc}") from exc

    epoch, units = converted["epoch"], " ".join(map(str, converted["args"]["units"]))
    best = f"best {converted['last_mean_rewards']:.2f}"
    sizes = f"{converted['num_obs']} observations, {converted['num_acts']} actions, units {units}"
    log(f"wrote {ours}: epoch {epoch}, frame {converted['frame']:,}, {best}; {sizes}")
    env_id, file = f"--env-id {shlex.quote(options.env_id)}", shlex.quote(ours)
    trainer = shlex.quote(os.path.relpath(train_ppo.__file__))
    evaluate = os.path.join(os.path.dirname(os.path.relpath(__file__)), "evaluate.py")
    log(f"continue  python {trainer} {env_id} --checkpoint {file} --max-epochs {2 * epoch}")
    log(f"evaluate  python {shlex.quote(evaluate)} {file} {env_id}")


if __name__ == "__main__":
    main()
