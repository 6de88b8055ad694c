"""Write the policy of a checkpoint for use outside of training, on a robot for example.

    python tools/export_policy.py runs/NAME policy                the newest checkpoint of a run
    python tools/export_policy.py runs/NAME/nn/best.pth policy

The new folder holds policy.onnx, policy.pt (TorchScript, for LibTorch) and policy.json, which says
what goes in and out. Each policy takes raw observations and returns the actions that
`train_ppo.py --play` would take: clipping of the observations, normalisation, the mean action and
clipping of the actions are inside. Both are compared with the checkpoint before they are written.
Neither Isaac Gym nor the environment is needed. For policy.onnx: pip install onnx onnxruntime

On the robot:

    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession("policy/policy.onnx")
    obs = np.zeros((1, session.get_inputs()[0].shape[1]), dtype=np.float32)
    print(session.run(None, {"obs": obs})[0])
"""

import argparse
import io
import json
import math
import os
import shutil
import sys
import warnings
from dataclasses import fields, replace
from typing import Any, Dict, Optional, Sequence

import torch
from torch import Tensor, nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import train_ppo
from train_ppo import ActorCritic, Args, TrainingError, UserError

TOLERANCE = 1e-5  # largest difference between an exported policy's actions and the checkpoint's


class ExportedPolicy(nn.Module):
    """Raw observations (n, O) -> mean actions (n, A), both clipped as in training."""

    def __init__(self, model: ActorCritic, clip_obs: Optional[float], clip_actions: bool):
        super().__init__()
        self.model = model
        self.clip_obs = clip_obs
        self.clip_actions = clip_actions

    def forward(self, obs: Tensor) -> Tensor:
        if self.clip_obs is not None:
            obs = obs.clamp(-self.clip_obs, self.clip_obs)
        mu = self.model.mean_action(obs)
        return mu.clamp(-1.0, 1.0) if self.clip_actions else mu


def load_policy(path: str, state: Dict[str, Any], flags: Dict[str, Any]) -> ExportedPolicy:
    """The policy of a checkpoint. `flags` are arguments that win over those in the checkpoint."""
    known = {field.name for field in fields(Args)}
    told = {**state["args"], **flags}
    args = replace(Args(), **{key: value for key, value in told.items() if key in known})
    for name in ("activation", "clip_actions"):
        if name not in told:
            train_ppo.log(f"{name} {getattr(args, name)}: {path} was rl_games' and does not say it")
    num_states = state.get("num_states", 0)  # of the critic, which is not exported
    model = ActorCritic(state["num_obs"], state["num_acts"], args, num_states)
    train_ppo.load_weights(model, state, path)
    clip_obs = state["clip_obs"] if math.isfinite(state["clip_obs"]) else None
    return ExportedPolicy(model, clip_obs, args.clip_actions).eval()


def example_observations(num_obs: int) -> Tensor:
    """1,000 observations of all magnitudes, zero and the largest float32 numbers among them."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-3, 7, (1000, 1), generator=generator)
    obs = torch.randn(1000, num_obs, generator=generator) * 10.0**exponents
    obs[0] = 0.0
    obs[1] = 3e38
    obs[2] = -3e38
    return obs


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
    torch.onnx.export(
        policy,
        (obs[:2],),
        buffer,
        input_names=["obs"],
        output_names=["action"],
        dynamic_axes={"obs": {0: "batch"}, "action": {0: "batch"}},
        opset_version=17,
        dynamo=False,
    )
    model = onnx.load_from_string(buffer.getvalue())
    onnx.helper.set_model_props(model, {k: json.dumps(v) for k, v in metadata.items()})
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
            train_ppo.warn(
                f"policy.onnx is not written, {exc.name} is missing: pip install onnx onnxruntime"
            )
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


def describe(
    path: str,
    state: Dict[str, Any],
    env_id: Optional[str],
    policy: ExportedPolicy,
    differences: Dict[str, float],
) -> Dict[str, Any]:
    """What policy.json says."""
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
            "clip": policy.clip_obs,
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
        "metadata": state.get("policy_metadata", {}),
        "largest_difference": differences,
    }


def write(folder: str, files: Dict[str, bytes]) -> None:
    """Make the folder with all the files in it, or not at all."""
    temporary = f"{os.path.normpath(folder)}.{os.getpid()}.tmp"
    try:
        os.makedirs(temporary)
        for name, content in files.items():
            with open(os.path.join(temporary, name), "wb") as file:
                file.write(content)
        os.rename(temporary, folder)
    except OSError as exc:
        raise UserError(f"{folder} cannot be written: {exc.strerror or exc}") from exc
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@torch.no_grad()
def export_policy(checkpoint: str, folder: str, flags: Dict[str, Any]) -> None:
    if os.path.lexists(folder):
        raise UserError(f"{folder} exists already: give a new folder")
    path, state = train_ppo.find_checkpoint(checkpoint)
    with train_ppo.reading(path):
        policy = load_policy(path, state, flags)
    obs = example_observations(state["num_obs"])
    expected = policy(obs)

    files = export(policy, obs, state.get("policy_metadata", {}))
    differences = {}
    for name, content in files.items():
        batch = (act(name, content, obs) - expected).abs().max()
        single = (act(name, content, obs[:1]) - expected[:1]).abs().max()
        differences[name] = max(float(batch), float(single))
    if not all(difference <= TOLERANCE for difference in differences.values()):  # also if NaN
        raise TrainingError(
            f"the exported policy differs from {path} by {differences}: nothing was written"
        )
    env_id = flags.get("env_id", state["args"].get("env_id"))
    about = describe(path, state, env_id, policy, differences)
    write(folder, {**files, "policy.json": json.dumps(about, indent=2).encode()})

    if policy.clip_obs is None:
        train_ppo.log(
            "no clipping of observations: the checkpoint does not say whether the env clips them "
            "(IsaacGymEnvs: clipObservations)"
        )
    figures = ", ".join(f"{figure:.1e} ({name})" for name, figure in differences.items())
    train_ppo.log(
        f"exported {path}, epoch {state['epoch']}, to {folder}: largest difference to it {figures} "
        f"on {len(obs)} observations"
    )


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("checkpoint", help="a .pth file or a run folder")
    parser.add_argument("folder", help="a new folder for the policy")
    given = parser.add_argument_group(
        "what a checkpoint that was rl_games' does not say", "They win over what a checkpoint says."
    )
    given.add_argument("--env-id", help="name of the task, for policy.json")
    given.add_argument(
        "--activation",
        choices=list(ActorCritic.ACTIVATIONS),
        help="of the hidden layers; otherwise elu",
    )
    given.add_argument(
        "--no-clip-actions",
        dest="clip_actions",
        action="store_const",
        const=False,
        help="do not clip the actions to [-1, 1]",
    )
    flags = vars(parser.parse_args(argv))
    try:
        export_policy(flags.pop("checkpoint"), flags.pop("folder"), flags)
    except (UserError, TrainingError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        sys.exit(2 if isinstance(exc, UserError) else 1)


if __name__ == "__main__":
    main()
