"""Write the policy of a run for use outside of training, on a robot for example.

    python tools/export_policy.py runs/NAME policy                its best.pth, or its newest file
    python tools/export_policy.py runs/NAME/nn/last.pth policy    a certain file

The folder gets policy.onnx, policy.pt (TorchScript, for LibTorch) and policy.json, which says what
goes in and out. Each policy takes raw observations and returns the actions that tools/evaluate.py
takes: clipping of the observations, normalisation, the mean action and clipping of the actions are
inside. Both are compared with the checkpoint before they are written. Neither Isaac Gym nor the
environment is needed. For policy.onnx: pip install onnx onnxruntime

On the robot:

    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession("policy/policy.onnx")
    obs = np.zeros((1, session.get_inputs()[0].shape[1]), dtype=np.float32)
    print(session.run(None, {"obs": obs})[0])
"""

import io
import json
import math
import os
import shutil
import sys
import warnings
from dataclasses import dataclass, fields, replace
from typing import Any, Dict, Optional, Sequence

import torch
import tyro
from torch import Tensor, nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import train_ppo
from train_ppo import ActorCritic, Args, UserError, log

TOLERANCE = 1e-5  # largest difference between an exported policy's actions and the checkpoint's


@dataclass
class Options:
    path: tyro.conf.Positional[str]  # run folder (best.pth, else its newest file), or a .pth file
    folder: tyro.conf.Positional[str]  # for the policy; an earlier export in it is replaced

    # These win over the file, and one that tools/from_rl_games.py has made does not say them.
    env_id: Optional[str] = None  # the task, for policy.json
    activation: Optional[Args.__annotations__["activation"]] = None  # of the hidden layers
    clip_actions: bool = True  # clip the actions to [-1, 1]


class ExportedPolicy(nn.Module):
    """Raw observations (n, O) -> mean actions (n, A), both clipped as in training."""

    def __init__(self, model: ActorCritic, clip_obs: float, clip_actions: bool):
        super().__init__()
        self.model = model
        self.clip_obs = clip_obs
        self.clip_actions = clip_actions

    def forward(self, obs: Tensor) -> Tensor:
        if self.clip_obs < math.inf:
            obs = obs.clamp(-self.clip_obs, self.clip_obs)
        mu = self.model.mean_action(obs)
        return mu.clamp(-1.0, 1.0) if self.clip_actions else mu


def load_policy(path: str, state: Dict[str, Any], told: Dict[str, Any]) -> ExportedPolicy:
    """The policy of a checkpoint, with the arguments in told."""
    for name in ("activation", "clip_actions"):
        if name not in told:
            log(f"{name} {getattr(Args, name)}: {path} was rl_games' and does not say it")
    known = {field.name for field in fields(Args)}  # another copy of train_ppo.py may have more
    args = replace(Args(), **{name: value for name, value in told.items() if name in known})
    model = ActorCritic(state["num_obs"], state["num_acts"], args, state["num_states"])
    train_ppo.load_weights(model, state, path)
    return ExportedPolicy(model, state["clip_obs"], args.clip_actions).eval()


def example_observations(num_obs: int, normalized: bool) -> Tensor:
    """1,000 observations of all magnitudes, zero and the largest float32 numbers among them. A
    policy without a normaliser gets ordinary ones: on others its rounding errors have no bound."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-3, 7, (1000, 1), generator=generator)
    obs = torch.randn(1000, num_obs, generator=generator) * 10.0**exponents
    obs[0] = 0.0
    obs[1] = 3e38
    obs[2] = -3e38
    return obs if normalized else obs.clamp(-6.0, 6.0)


def to_torchscript(policy: ExportedPolicy, obs: Tensor) -> bytes:
    """policy.pt. torch advises torch.export by now, but TorchScript is the one format that LibTorch
    2.4 and 2.13 both load without a compiler."""
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(policy, obs[:2]), buffer)
    return buffer.getvalue()


def to_onnx(policy: ExportedPolicy, obs: Tensor, metadata: Dict[str, Any]) -> bytes:
    """policy.onnx, for a batch of any size, with the metadata as JSON in its metadata_props."""
    import onnx

    buffer = io.BytesIO()
    names = dict(input_names=["obs"], output_names=["action"])
    names["dynamic_axes"] = {"obs": {0: "batch"}, "action": {0: "batch"}}
    torch.onnx.export(policy, (obs[:2],), buffer, opset_version=17, dynamo=False, **names)
    model = onnx.load_from_string(buffer.getvalue())
    onnx.helper.set_model_props(model, {key: json.dumps(x) for key, x in metadata.items()})
    return model.SerializeToString()


def export(policy: ExportedPolicy, obs: Tensor, metadata: Dict[str, Any]) -> Dict[str, bytes]:
    """The files by name. Without onnx and onnxruntime there is no policy.onnx."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls both ways of exporting legacy
        files = {"policy.pt": to_torchscript(policy, obs)}
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
        except ImportError as exc:
            what = f"policy.onnx is not written, {exc.name} is missing"
            train_ppo.warn(f"{what}: pip install onnx onnxruntime")
        else:
            files["policy.onnx"] = to_onnx(policy, obs, metadata)
    return files


def act(name: str, content: bytes, obs: Tensor) -> Tensor:
    """The actions of an exported policy, computed as a robot would."""
    if name == "policy.pt":
        return torch.jit.load(io.BytesIO(content))(obs)
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"obs": obs.numpy()})[0])


def describe(state: Dict[str, Any], policy: ExportedPolicy, env_id: Optional[str], path: str):
    """What policy.json says, but for the differences."""
    best = state["last_mean_rewards"]
    return {
        "format_version": 1,
        "env_id": env_id,
        "checkpoint": os.path.abspath(path),
        "epoch": state["epoch"],
        "mean_reward": best if math.isfinite(best) else None,
        "input": {
            "name": "obs",
            "dtype": "float32",
            "shape": f"(batch, {state['num_obs']})",
            "size": state["num_obs"],
            "clip": policy.clip_obs if math.isfinite(policy.clip_obs) else None,
            "meaning": "raw observations: clipping and normalisation are inside",
        },
        "output": {
            "name": "action",
            "dtype": "float32",
            "shape": f"(batch, {state['num_acts']})",
            "size": state["num_acts"],
            "clip": 1.0 if policy.clip_actions else None,
            "meaning": "normalised mean action: the task's own action scale is not applied",
        },
        "metadata": state["policy_metadata"],
    }


def check_folder(folder: str) -> None:
    """UserError if something is there that is not an earlier export."""
    ours = {"policy.onnx", "policy.pt", "policy.json"}
    if os.path.lexists(folder) and not (
        os.path.isdir(folder) and ours.issuperset(os.listdir(folder))
    ):
        raise UserError(f"{folder} exists already: give a new folder")


def write(folder: str, files: Dict[str, bytes]) -> None:
    """Make the folder with all the files in it and nothing else, or not at all."""
    temporary = f"{os.path.normpath(folder)}.{os.getpid()}.tmp"
    try:
        os.makedirs(temporary)
        for name, content in files.items():
            with open(os.path.join(temporary, name), "wb") as file:
                file.write(content)
        if os.path.exists(folder):
            shutil.rmtree(folder)
        os.rename(temporary, folder)
    except OSError as exc:
        raise UserError(f"{folder} cannot be written: {exc.strerror or exc}") from exc
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@torch.no_grad()
def main(argv: Optional[Sequence[str]] = None) -> None:
    options = tyro.cli(Options, args=argv, description=__doc__)
    check_folder(options.folder)
    best = os.path.join(options.path, "nn", "best.pth")
    path, state = train_ppo.find_checkpoint(best if os.path.exists(best) else options.path)
    told = dict(state["args"])
    if options.activation:
        told["activation"] = options.activation
    if not options.clip_actions:
        told["clip_actions"] = False
    policy = load_policy(path, state, told)
    obs = example_observations(state["num_obs"], told["normalize_input"])

    expected = policy(obs)  # before `export`, which might change the module
    files = export(policy, obs, state["policy_metadata"])
    differences = {}
    for name, content in files.items():
        batch = (act(name, content, obs) - expected).abs() / expected.abs().clamp(min=1.0)
        single = act(name, content, obs[:1]) - expected[:1]
        differences[name] = max(float(batch.max()), float(single.abs().max()))
    if not all(difference <= TOLERANCE for difference in differences.values()):  # also if NaN
        what = f"the exported policy differs from {path} by {differences}"
        raise UserError(f"{what}: nothing was written")
    about = describe(state, policy, options.env_id or told.get("env_id"), path)
    about["largest_difference"] = differences
    write(options.folder, {**files, "policy.json": json.dumps(about, indent=2).encode()})
    what = ", ".join(f"{difference:.1e} ({name})" for name, difference in differences.items())
    what = f"largest difference to it {what} on {len(obs)} observations"
    log(f"exported {path}, epoch {state['epoch']}, to {options.folder}: {what}")


if __name__ == "__main__":
    main()
