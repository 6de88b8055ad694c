"""Does train_ppo.py compute and report what rl_games 1.6.1 does? From the same weights and the same
random draws, epoch by epoch.

    pip install gym==0.23.1 tensorboardX psutil setproctitle pyyaml
    pip install --no-deps --ignore-requires-python rl-games==1.6.1
    python benchmarks/fidelity.py                      every row of the table, some minutes
    python benchmarks/fidelity.py --rows default relu  these rows alone
    python benchmarks/fidelity.py --list               the names of the rows
    python benchmarks/fidelity.py --rows ant           MuJoCo's Ant, for which alone it needs mujoco

A row is an environment with one option changed. Both trainers run it for five epochs, and the table
shows the largest relative differences: of a tensor among weights and statistics after an epoch,
relative to its largest number; of the learning rate; and of the mean reward, shaped reward and
episode length that an epoch logs, which rl_games computes by its AverageMeter. "Same kernels":
train_ppo.py with torch's plain Adam, Linear and ELU, as rl_games has them; its own are faster, and
round differently. Both are reseeded after each epoch, because rl_games draws one random number more
at the end of a rollout.

From a test:

    row(name, seed=1, same_kernels=False) -> {what: [relative difference after epoch 1, 2 ... 5]}

`what` is "weights", "learning_rate" and each of METERS. A difference is 0 if no episode has ended
in either trainer, and inf if one has ended in only one of them. `rl_games_params(args)` and
`rl_games_runner(env, args)` give rl_games' settings and Runner for the same job.
"""

import argparse
import contextlib
import io
import math
import os
import sys
import tempfile
import warnings
from unittest import mock

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch

import train_ppo

EPOCHS = 5
# What an epoch logs under NAME/iter: the meter of rl_games that has it.
METERS = {
    "rewards": "game_rewards",
    "shaped_rewards": "game_shaped_rewards",
    "episode_lengths": "game_lengths",
}


class Reach:
    """Points that are pushed towards a goal: three actions, staggered clocks, time-outs, and early
    ends where a point leaves the field."""

    num_obs, num_acts, max_episode_length, field = 7, 3, 40, 1.2

    def __init__(self, num_envs, device):
        self.num_envs, self.device = num_envs, torch.device(device)
        self.position = torch.rand(num_envs, 3, device=device) - 0.5
        self.velocity = torch.zeros(num_envs, 3, device=device)
        self.progress = torch.arange(num_envs, device=device) % self.max_episode_length

    def reset(self):
        clock = self.progress.unsqueeze(1) / self.max_episode_length
        return {"obs": torch.cat((self.position, 3.0 * self.velocity + 1.0, clock), dim=1)}

    def step(self, actions):
        fresh = torch.rand_like(self.position) - 0.5
        self.velocity = 0.9 * self.velocity + 0.05 * actions
        self.position = self.position + self.velocity
        self.progress = self.progress + 1
        reward = 1.0 - self.position.norm(dim=1)
        late = self.progress >= self.max_episode_length
        done = late | (self.position.norm(dim=1) > self.field)
        self.position = torch.where(done.unsqueeze(1), fresh, self.position)
        self.velocity = self.velocity * ~done.unsqueeze(1)
        self.progress = self.progress * ~done
        return self.reset(), reward, done.long(), {"time_outs": late}


class Together(Reach):
    """Reach without early ends and with one clock: all episodes end in the same step."""

    max_episode_length, field = 12, math.inf

    def __init__(self, num_envs, device):
        super().__init__(num_envs, device)
        self.progress.zero_()


def ant(num_envs, device):
    from examples import mujoco_ant

    return mujoco_ant.make_env(num_envs, device, torch.initial_seed())


ENVS = {"cartpole": train_ppo.Cartpole, "reach": Reach, "together": Together, "ant": ant}
SMALL = dict(num_envs=128, num_steps=16, minibatch_size=512, update_epochs=5, units=(32, 16))
REACH = dict(SMALL, env="reach", learning_rate=1e-3, reward_scale=1.0)

# name: arguments
ROWS = {
    "default": dict(
        env="cartpole", num_envs=512, num_steps=16, minibatch_size=8192, update_epochs=8
    ),
    "cartpole, minibatches": dict(SMALL, env="cartpole", num_envs=256, minibatch_size=1024),
    "adaptive legacy": dict(REACH),
    "adaptive standard": dict(REACH, schedule_type="standard"),
    "small KL threshold": dict(REACH, learning_rate=1e-4, kl_threshold=1e-4),
    "linear": dict(REACH, lr_schedule="linear"),
    "linear standard": dict(REACH, lr_schedule="linear", schedule_type="standard"),
    "fixed": dict(REACH, lr_schedule="fixed"),
    "one minibatch": dict(REACH, minibatch_size=2048),
    "separate": dict(REACH, separate=True),
    "no input normalisation": dict(REACH, normalize_input=False),
    "no value normalisation": dict(REACH, normalize_value=False),
    "no advantage normalisation": dict(REACH, norm_adv=False),
    "no value bootstrap": dict(REACH, value_bootstrap=False),
    "no value clipping": dict(REACH, clip_vloss=False),
    "no gradient clipping": dict(REACH, max_grad_norm=0.0),
    "no action clipping": dict(REACH, clip_actions=False),
    "entropy": dict(REACH, ent_coef=0.01),
    "no bounds loss": dict(REACH, bounds_loss_coef=0.0),
    "bounds loss": dict(REACH, bounds_loss_coef=0.01, sigma_init=0.5),
    "reward scale": dict(REACH, reward_scale=0.05),
    "relu": dict(REACH, activation="relu"),
    "tanh": dict(REACH, activation="tanh"),
    "selu": dict(REACH, activation="selu"),
    "gelu": dict(REACH, activation="gelu"),
    "swish": dict(REACH, activation="swish"),
    "10 games": dict(REACH, games_to_track=10),
    "10 games that end together": dict(REACH, env="together", games_to_track=10),
    "100 games that end together": dict(REACH, env="together", games_to_track=100),
    "300 games that end together": dict(REACH, env="together", games_to_track=300),
}


class Recorder(train_ppo.AlgoObserver):
    """Runs in either trainer. It sets the initial weights; after each epoch it notes the state, the
    learning rate and what the meters say, and reseeds."""

    def __init__(self, weights, seed, same_kernels=False):
        self.weights, self.seed, self.same_kernels = weights, seed, same_kernels
        self.epochs = []

    def after_init(self, algo):
        self.algo = algo
        algo.model.load_state_dict(self.weights)
        if self.same_kernels:
            algo.lr = torch.tensor(algo.args.learning_rate, dtype=torch.float64)
            algo.optimizer = torch.optim.Adam(algo.model.parameters(), lr=algo.lr, eps=1e-8)
            for module in algo.model.modules():
                if isinstance(module, train_ppo.TransposedLinear):
                    module.__class__ = torch.nn.Linear
                elif isinstance(module, torch.nn.ELU):
                    module.inplace = False
        torch.manual_seed(self.seed)

    def after_print_stats(self, frame, epoch_num, total_time):
        algo = self.algo
        state = algo.model.state_dict()
        weights = {name: value.detach().clone() for name, value in state.items()}
        rate = float(algo.optimizer.param_groups[0]["lr"])
        logged = {}
        for name, meter in METERS.items():
            if isinstance(algo, train_ppo.PPOAgent):
                logged[name] = algo.writer.scalars.get(f"{name}/iter")
            else:
                meter = getattr(algo, meter)
                logged[name] = float(meter.mean) if len(meter) else None
        self.epochs.append(dict(logged, weights=weights, learning_rate=rate))
        torch.manual_seed(self.seed + epoch_num)


def job_of(name):
    """A row's arguments. The Ant, whose contacts amplify rounding, is no row of the table."""
    if name != "ant":
        return ROWS[name]
    from examples import mujoco_ant

    return dict(mujoco_ant.SETTINGS, env="ant")


def make_env(job, seed):
    torch.manual_seed(seed)
    return ENVS[job["env"]](job["num_envs"], torch.device("cpu"))


def make_args(job, seed, folder):
    values = {name: value for name, value in job.items() if name != "env"}
    values.update(max_epochs=EPOCHS, save_frequency=0, train_dir=folder, seed=seed, device="cpu")
    return train_ppo.Args(**values)


def train_ours(job, recorder, folder):
    env = make_env(job, recorder.seed)
    args = make_args(job, recorder.seed, folder)
    with mock.patch("train_ppo.make_env", lambda *_: env):
        train_ppo.run(args, train_ppo.MultiObserver([recorder], strict=True))


def train_theirs(job, recorder, folder):
    env = make_env(job, recorder.seed)
    args = make_args(job, recorder.seed, folder)
    rl_games_runner(env, args, recorder, train_dir=folder).run({"train": True, "play": False})


def rl_games_params(args, **config):
    """`args` as the `params` of an rl_games yaml file; `config` is added to its config."""
    default = {"name": "default"}
    sigma = {"name": "const_initializer", "val": args.sigma_init}
    normal = dict(mu_activation="None", sigma_activation="None", fixed_sigma=True)
    normal.update(mu_init=default, sigma_init=sigma)
    mlp = dict(units=list(args.units), activation=args.activation, initializer=default)
    mlp.update(regularizer={"name": "None"})
    network = dict(name="actor_critic", separate=args.separate, mlp=mlp)
    network.update(space={"continuous": normal})

    settings = dict(name="theirs", env_name="fidelity", device="cpu", device_name="cpu", ppo=True)
    settings.update(multi_gpu=False, mixed_precision=False, print_stats=False, seq_length=4)
    settings.update(save_frequency=0, save_best_after=10**9, score_to_win=1e9)
    settings.update(max_epochs=args.max_epochs, games_to_track=args.games_to_track)
    samples = args.num_envs * args.num_steps
    settings.update(num_actors=args.num_envs, horizon_length=args.num_steps)
    settings.update(minibatch_size=min(args.minibatch_size, samples))
    settings.update(mini_epochs=args.update_epochs, learning_rate=args.learning_rate)
    settings.update(lr_schedule=args.lr_schedule, schedule_type=args.schedule_type)
    settings.update(kl_threshold=args.kl_threshold, gamma=args.gamma, tau=args.gae_lambda)
    settings.update(e_clip=args.clip_coef, clip_value=args.clip_vloss)
    settings.update(critic_coef=args.vf_coef, entropy_coef=args.ent_coef)
    settings.update(bounds_loss_coef=args.bounds_loss_coef)
    settings.update(truncate_grads=args.max_grad_norm > 0, grad_norm=args.max_grad_norm)
    settings.update(normalize_input=args.normalize_input, normalize_value=args.normalize_value)
    settings.update(normalize_advantage=args.norm_adv, value_bootstrap=args.value_bootstrap)
    settings.update(clip_actions=args.clip_actions)
    settings.update(reward_shaper={"scale_value": args.reward_scale}, **config)
    model = {"name": "continuous_a2c_logstd"}
    algo = {"name": "a2c_continuous"}
    return dict(seed=args.seed, algo=algo, model=model, network=network, config=settings)


def rl_games_runner(env, args, observer=None, **config):
    """rl_games' own Runner with `args` as its settings, on an env of ours."""
    import gym
    from rl_games.common import env_configurations, vecenv
    from rl_games.torch_runner import Runner

    class VecEnv(vecenv.IVecEnv):
        step = staticmethod(env.step)
        reset = staticmethod(env.reset)

        def set_env_state(self, env_state):
            pass  # its file has a state where ours has, but rl_games' own env classes ignore it too

        def get_env_info(self):
            box = gym.spaces.Box
            spaces = {"observation_space": box(-9, 9, (env.num_obs,))}
            return {**spaces, "action_space": box(-1, 1, (env.num_acts,))}

    vecenv.register("FIDELITY", lambda *_, **__: VecEnv())
    env_configurations.register("fidelity", {"vecenv_type": "FIDELITY", "env_creator": None})
    runner = Runner(observer)
    runner.load({"params": rl_games_params(args, **config)})
    return runner


def difference(ours, theirs, floor=1e-9):
    """The largest difference between two tensors or numbers, relative to their largest number."""
    if ours is None or theirs is None:
        return 0.0 if ours is theirs else math.inf
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=floor))


def row(name, seed=1, same_kernels=False):
    """Train both and compare them, see above."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # rl_games uses old names of torch's autocast
    job = job_of(name)
    env = make_env(job, seed)
    model = train_ppo.ActorCritic(env.num_obs, env.num_acts, make_args(job, seed, ""))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    ours, theirs = Recorder(weights, seed, same_kernels), Recorder(weights, seed)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        train_ours(job, ours, folder)
        train_theirs(job, theirs, folder)
    assert len(ours.epochs) == len(theirs.epochs) == EPOCHS
    assert theirs.epochs[-1]["rewards"] is not None, "no episode has ended: nothing is compared"
    found = {what: [] for what in ("weights", "learning_rate", *METERS)}
    for a, b in zip(ours.epochs, theirs.epochs):
        weights, expected = a.pop("weights"), b.pop("weights")
        assert weights.keys() == expected.keys()
        found["weights"].append(max(difference(weights[k], expected[k], 1e-3) for k in expected))
        for what in a:
            found[what].append(difference(a[what], b[what]))
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, "ant"], default=list(ROWS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    options = parser.parse_args()
    if options.list:
        print("\n".join(ROWS))
        return
    print("| | own kernels | | same kernels | | | | | |")
    print(
        "| row | epoch 1 | epoch 5 | epoch 1 | epoch 5 | learning rate | reward | shaped | length |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name in options.rows:
        own = row(name, options.seed)["weights"]
        same = row(name, options.seed, same_kernels=True)
        weights = same.pop("weights")
        figures = (own[0], own[-1], weights[0], weights[-1], *map(max, same.values()))
        print("| " + " | ".join([name, *(f"{x:.0e}" if x else "0" for x in figures)]) + " |")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
