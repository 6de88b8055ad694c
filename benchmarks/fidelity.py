"""Does train_ppo.py compute what rl_games 1.6.1 computes? From the same weights and the same random
draws, epoch by epoch.

    pip install gym==0.23.1 tensorboardX psutil setproctitle pyyaml
    pip install --no-deps --ignore-requires-python rl-games==1.6.1
    python benchmarks/fidelity.py                      every row of the table, some minutes
    python benchmarks/fidelity.py --rows default relu  these rows alone
    python benchmarks/fidelity.py --list               the names of the rows

A row is an environment with one option changed. Both trainers run it for five epochs. The table
shows the largest difference between their weights and statistics after an epoch, relative to the
largest number in the tensor, and whether their learning rates are equal. "Same kernels":
train_ppo.py with torch's plain Adam, Linear and ELU, as rl_games has them; its own are faster, and
round differently. Both are reseeded after each epoch, because rl_games draws one random number more
at the end of a rollout.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
import warnings

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import torch

import train_ppo

EPOCHS = 5


class Reach:
    """Points that are pushed towards a goal: three actions, staggered clocks, time-outs, and early
    ends where a point leaves the field."""

    num_obs, num_acts, max_episode_length = 7, 3, 40

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
        done = late | (self.position.norm(dim=1) > 1.2)
        self.position = torch.where(done.unsqueeze(1), fresh, self.position)
        self.velocity = self.velocity * ~done.unsqueeze(1)
        self.progress = self.progress * ~done
        return self.reset(), reward, done.long(), {"time_outs": late}


ENVS = {"cartpole": train_ppo.Cartpole, "reach": Reach}
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
}


class Recorder(train_ppo.AlgoObserver):
    """Runs in either trainer. It sets the initial weights; after each epoch it notes the state and
    reseeds."""

    def __init__(self, weights, seed, same_kernels=False):
        self.weights, self.seed, self.same_kernels = weights, seed, same_kernels
        self.states, self.rates = [], []

    def after_init(self, algo):
        self.algo = algo
        algo.model.load_state_dict(self.weights)
        if self.same_kernels:
            algo.lr = torch.tensor(algo.args.learning_rate, dtype=torch.float64)
            algo.optimizer = torch.optim.Adam(algo.model.parameters(), lr=algo.lr, eps=1e-8)
            for module in algo.model.modules():
                if isinstance(module, train_ppo.Linear):
                    module.__class__ = torch.nn.Linear
                elif isinstance(module, torch.nn.ELU):
                    module.inplace = False
        torch.manual_seed(self.seed)

    def after_print_stats(self, frame, epoch_num, total_time):
        state = self.algo.model.state_dict()
        self.states.append({name: value.detach().clone() for name, value in state.items()})
        self.rates.append(float(self.algo.optimizer.param_groups[0]["lr"]))
        torch.manual_seed(self.seed + epoch_num)


def make_env(row, seed):
    torch.manual_seed(seed)
    return ENVS[row["env"]](row["num_envs"], torch.device("cpu"))


def make_args(row, seed, folder):
    values = {name: value for name, value in row.items() if name != "env"}
    values.update(max_epochs=EPOCHS, save_frequency=0, train_dir=folder, seed=seed, device="cpu")
    return train_ppo.Args(**values)


def train_ours(row, recorder, folder):
    args = make_args(row, recorder.seed, folder)
    env, made = make_env(row, recorder.seed), train_ppo.make_env
    train_ppo.make_env = lambda _: env
    try:
        train_ppo.Runner(args, train_ppo.MultiObserver([recorder])).run()
    finally:
        train_ppo.make_env = made


def rl_games_params(args, **config):
    """`args` as the `params` of an rl_games yaml file; `config` is added to its config."""
    none = {"name": "None"}
    default = {"name": "default"}
    normal = {
        "mu_activation": "None",
        "sigma_activation": "None",
        "mu_init": default,
        "sigma_init": {"name": "const_initializer", "val": args.sigma_init},
        "fixed_sigma": True,
    }
    mlp = {
        "units": list(args.units),
        "activation": args.activation,
        "initializer": default,
        "regularizer": none,
    }
    network = {
        "name": "actor_critic",
        "separate": args.separate,
        "mlp": mlp,
        "space": {"continuous": normal},
    }
    settings = {
        "name": "theirs",
        "env_name": "fidelity",
        "device": "cpu",
        "device_name": "cpu",
        "ppo": True,
        "multi_gpu": False,
        "mixed_precision": False,
        "print_stats": False,
        "save_frequency": 0,
        "save_best_after": 10**9,
        "score_to_win": 1e9,
        "seq_length": 4,
        "max_epochs": args.max_epochs,
        "num_actors": args.num_envs,
        "horizon_length": args.num_steps,
        "minibatch_size": min(args.minibatch_size, args.num_envs * args.num_steps),
        "mini_epochs": args.update_epochs,
        "learning_rate": args.learning_rate,
        "lr_schedule": args.lr_schedule,
        "schedule_type": args.schedule_type,
        "kl_threshold": args.kl_threshold,
        "gamma": args.gamma,
        "tau": args.gae_lambda,
        "e_clip": args.clip_coef,
        "clip_value": args.clip_vloss,
        "critic_coef": args.vf_coef,
        "entropy_coef": args.ent_coef,
        "bounds_loss_coef": args.bounds_loss_coef,
        "truncate_grads": args.max_grad_norm > 0,
        "grad_norm": args.max_grad_norm,
        "normalize_advantage": args.norm_adv,
        "normalize_input": args.normalize_input,
        "normalize_value": args.normalize_value,
        "value_bootstrap": args.value_bootstrap,
        "clip_actions": args.clip_actions,
        "reward_shaper": {"scale_value": args.reward_scale},
        **config,
    }
    return {
        "seed": args.seed,
        "algo": {"name": "a2c_continuous"},
        "model": {"name": "continuous_a2c_logstd"},
        "network": network,
        "config": settings,
    }


def rl_games_runner(env, args, observer=None, **config):
    """rl_games' own Runner with `args` as its settings, on an env of ours."""
    import gym
    from rl_games.common import env_configurations, vecenv
    from rl_games.torch_runner import Runner

    class VecEnv(vecenv.IVecEnv):
        def step(self, actions):
            return env.step(actions)

        def reset(self):
            return env.reset()

        def set_env_state(self, env_state):
            pass  # its file has a state where ours has, but rl_games' own env classes ignore it too

        def get_env_info(self):
            box = gym.spaces.Box
            return {
                "action_space": box(-1, 1, (env.num_acts,)),
                "observation_space": box(-9, 9, (env.num_obs,)),
            }

    vecenv.register("FIDELITY", lambda *_, **__: VecEnv())
    env_configurations.register("fidelity", {"vecenv_type": "FIDELITY", "env_creator": None})
    runner = Runner(observer)
    runner.load({"params": rl_games_params(args, **config)})
    return runner


def train_theirs(row, recorder, folder):
    args = make_args(row, recorder.seed, folder)
    runner = rl_games_runner(make_env(row, recorder.seed), args, recorder, train_dir=folder)
    runner.run({"train": True, "play": False})


def compare(row, seed=1, same_kernels=False):
    """For each epoch the largest relative difference; our learning rates; and theirs."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # rl_games uses old names of torch's autocast
    env = make_env(row, seed)
    model = train_ppo.ActorCritic(env.num_obs, env.num_acts, make_args(row, seed, ""))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    ours, theirs = Recorder(weights, seed, same_kernels), Recorder(weights, seed)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        train_ours(row, ours, folder)
        train_theirs(row, theirs, folder)
    differences = []
    for a, b in zip(ours.states, theirs.states):
        assert a.keys() == b.keys()
        relative = [(a[k] - b[k]).abs().max() / b[k].abs().max().clamp(min=1e-3) for k in a]
        differences.append(max(float(x) for x in relative))
    return differences, ours.rates, theirs.rates


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    options = parser.parse_args()
    if options.list:
        print("\n".join(ROWS))
        return
    print("| row | epoch 1 | epoch 5 | same kernels: epoch 1 | epoch 5 | learning rates |")
    print("|---|---:|---:|---:|---:|---|")
    for name in options.rows:
        differences, ours, theirs = compare(ROWS[name], options.seed)
        exact, *_ = compare(ROWS[name], options.seed, same_kernels=True)
        same = all(abs(a - b) <= 1e-5 * b for a, b in zip(ours, theirs))
        rates = f"equal, {theirs[0]:.1e} to {theirs[-1]:.1e}" if same else f"{ours} and {theirs}"
        figures = (differences[0], differences[-1], exact[0], exact[-1])
        cells = [name, *(f"{x:.0e}" if x else "0" for x in figures), rates]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
