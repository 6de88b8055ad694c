"""Evaluate the policy of a run, or film it.

    python tools/evaluate.py runs/NAME                    an episode of each of 64 environments
    python tools/evaluate.py runs/NAME --json eval.json   and write the result as JSON
    python tools/evaluate.py runs/NAME --film policy.gif  film it instead; with --json, do both

The second episode of each environment counts. Its first one may have begun before, and the first N
of all to end would be the short ones. The environment's metrics are those of the same episodes;
one number for all environments is its mean while any of them runs.
"""

import json
import os
import sys
from dataclasses import dataclass, replace
from itertools import count, islice
from types import SimpleNamespace
from typing import Any, Dict, Iterator, Optional, Sequence

import tyro

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "examples")]
import train_ppo
from train_ppo import Tensor, UserError, log, torch  # which imports isaacgym before torch


@dataclass
class Options:
    path: tyro.conf.Positional[str]  # run folder (best.pth, else its newest file), or a .pth file
    json: str = ""  # a file for the result
    film: str = ""  # a .gif file: film the first steps instead of evaluating
    length: int = 300  # steps in the film, which shows 50 a second
    stochastic: bool = False  # sample the actions as training does, instead of their means
    num_envs: int = 0  # environments, and so episodes; 0: as many as the run had, but at most 64
    env_id: str = ""  # module:factory once more, if the run has an environment of its own
    device: str = "auto"  # auto, cpu, cuda, cuda:1


def play(env, model: train_ppo.ActorCritic, device, clip: bool, stochastic: bool) -> Iterator[Any]:
    """Run the policy. Yields rewards and dones (E,), on the CPU, and infos of each step."""
    obs = train_ppo.read_obs(env.reset(), env, device)
    for t in count(1):
        actions = model.mean_action(obs)
        if stochastic:
            actions = actions + model.a2c_network.sigma.exp() * torch.randn_like(actions)
        step = env.step(actions.clamp(-1.0, 1.0) if clip else actions)
        obs, rewards, dones, _, infos = train_ppo.read_step(step, env, device)
        yield rewards.cpu(), dones.cpu(), infos
        if t % 100 == 0:
            log(f"step {t:,}")


def evaluate(steps: Iterator[Any], num_envs: int) -> Dict[str, Any]:
    """Returns and metrics of the second episode of each environment, as far as it ends."""
    returns, lengths, ended = torch.zeros(3, num_envs)  # ended: episodes that each env has ended
    observer = train_ppo.RLGPUAlgoObserver()
    algo = SimpleNamespace(dones=ended, device=ended.device, games_to_track=num_envs, writer=None)
    observer.after_init(algo)
    for rewards, dones, infos in steps:
        counts = ended == 1
        returns += rewards.masked_fill(~counts, 0.0)
        lengths += counts
        ended += dones
        algo.dones = dones & counts
        observer.process_infos(counted(infos, counts, dones), None)
        if (ended >= 2).all():
            break
    returns, lengths = returns[ended >= 2], lengths[ended >= 2]
    if len(returns) == 0:
        raise UserError("no env has ended its second episode, so there is nothing to report")
    result = dict(mean=returns.mean().item(), std=returns.std(unbiased=False).item())
    result.update(min=returns.min().item(), max=returns.max().item(), count=len(returns))
    metrics = dict.fromkeys(observer.values, float("nan"))  # nan: it was never finite
    metrics.update(observer.means())
    return dict(result, length=lengths.mean().item(), metrics=metrics)


def counted(infos: Dict[str, Any], counts: Tensor, dones: Tensor) -> Dict[str, Any]:
    """What in infos belongs to episodes that count. counts (E,): which envs are in theirs, dones
    (E,): which end one in this step. A number for all envs is taken while any of them counts."""
    found, ended = {}, dones & counts
    for tag, value in train_ppo.flatten(infos, "/").items():
        if tag.startswith("episode_cumulative/"):
            found[tag] = value.cpu().masked_fill(~counts, 0)
        elif (ended if tag.startswith("episode/") else counts).any():
            rows = len(value) if isinstance(value, Tensor) and value.dim() else 0
            if rows and rows in (len(dones), int(dones.sum())):  # each env's, or each that ends
                value = value.cpu()[ended if rows == len(dones) else ended[dones]]
            found[tag] = value
    return found


@torch.no_grad()
def main(argv: Optional[Sequence[str]] = None) -> Dict[str, Any]:
    """The command. Returns what --json writes; if it only films, nothing."""
    options = tyro.cli(Options, args=argv, description=__doc__)
    best = os.path.join(options.path, "nn", "best.pth")
    flags = ["--checkpoint", best if os.path.exists(best) else options.path]
    flags += ["--env-id", options.env_id] if options.env_id else []
    args, path, state = train_ppo.parse_args([*flags, "--device", options.device])
    args = replace(args, num_envs=options.num_envs or min(args.num_envs, 64))
    if args.num_envs < 1 or options.length < 1:
        raise UserError("--num-envs and --length must be at least 1")
    for name in ("json", "film"):
        file = getattr(options, name) and os.path.abspath(getattr(options, name))
        if file and not os.access(os.path.dirname(file), os.W_OK):
            raise UserError(f"{file} cannot be written: its folder is missing or read-only")
        setattr(options, name, file)  # absolute: an env may change the working directory
    if options.film:
        import record_video  # needs pillow

        record_video.use_a_virtual_screen()
    torch.set_num_threads(args.torch_threads or os.cpu_count())
    train_ppo.seed_everything(args, args.seed)
    env, device = train_ppo.make_env(args, args.seed), train_ppo.pick_device(args.device)
    try:
        # The policy does without the critic's states, so this env may have other ones or none.
        model = train_ppo.ActorCritic(env.num_obs, env.num_acts, args, state["num_states"])
        train_ppo.load_weights(model.to(device), state, path)
        if state["env_state"] is not None and not getattr(env, "exact_state", False):
            env.set_env_state(state["env_state"])  # a curriculum's level
        steps = play(env, model, device, args.clip_actions, options.stochastic)
        what = f"{train_ppo.shown(path)}, epoch {state['epoch']}, {args.num_envs} envs, "
        what += "sampled actions" if options.stochastic else "mean actions"
        if options.film:
            log(f"filming {options.length} steps: {what}")
            record_video.film(islice(steps, options.length), env, options.film)
            if not options.json:
                return {}
        log(f"evaluating a whole episode of each env: {what}")
        limit = int(4 * (getattr(env, "max_episode_length", None) or 25_000))
        result = evaluate(islice(steps, limit), args.num_envs)
    finally:
        if hasattr(env, "close"):
            env.close()
    for tag, value in result["metrics"].items():
        log(f"{tag} {value:.5g}")
    log("{count} episodes of mean length {length:.1f}".format(**result))
    log("reward mean {mean:.2f} std {std:.2f} min {min:.2f} max {max:.2f}".format(**result))
    result.update(checkpoint=path, epoch=state["epoch"], env_id=args.env_id, seed=args.seed)
    result = json.loads(json.dumps(result), parse_constant=lambda _: None)  # nan is no JSON
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=2)
    return result


if __name__ == "__main__":
    main()
