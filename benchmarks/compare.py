"""How fast train_ppo.py trains next to other PPO libraries: same environments, same settings, same
clock; one table.

    pip install -r benchmarks/requirements.txt
    python benchmarks/compare.py                             Cartpole, ten minutes on 2 cores
    python benchmarks/compare.py --env ant --epochs 7        a task of Ant's size
    python benchmarks/compare.py --env mujoco-ant            examples/mujoco_ant.py; hours
    python benchmarks/compare.py --env gymnasium --epochs 15 HalfCheetah-v5, of which a step is slow
    python benchmarks/compare.py --one skrl                  one training run: one line of JSON

Every run is a process of its own, one at a time. A round runs all trainers once, the next round in
reverse order, so that a machine that gets slower or faster favours none.

    env steps/s   from the 4th rollout to the end of training, all included
    to 470        from process start, imports included, until the last 256 finished episodes have a
                  mean return of 470; 3000 for mujoco-ant, 1000 for gymnasium
    peak memory   the largest resident set of the process

All of this is measured by the same code, in a wrapper around the env, and everyone trains the same
number of epochs. Nobody saves during training (train_ppo.py alone before and after it); it and
rl_games write their curves, and the others are freed of theirs.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

# `run` sets it, just before it starts this process.
STARTED = float(os.environ.get("COMPARE_STARTED") or time.time())
TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# The process that starts the others stays small, because Linux counts a parent's memory in its
# child's peak.
if "--one" in sys.argv:
    sys.path.insert(0, TOP)
    import torch

    began = time.time(), time.process_time()
    import train_ppo

    # The others take only Cartpole and the settings from train_ppo: importing it is not on their
    # clocks.
    BORROWED = time.time() - began[0], time.process_time() - began[1]

EPOCHS = {"cartpole": 100, "ant": 23, "mujoco-ant": 300, "gymnasium": 488}
TARGETS = {"cartpole": 470.0, "ant": math.inf, "mujoco-ant": 3000.0, "gymnasium": 1000.0}
EXAMPLES = {"mujoco-ant": "mujoco_ant:make_env", "gymnasium": "gymnasium_env:HalfCheetah-v5"}
WARM_UP = 3  # epochs before the clock of env steps/s starts
# As in AntPPO.yaml; the rest as for Cartpole.
ANT = dict(num_envs=4096, minibatch_size=32768, update_epochs=4, units=(256, 128, 64))


# --------------------------------------------------------------------------------------------------
# the environments beside train_ppo's Cartpole, and the wrapper that measures


class Synthetic:
    """An env of Ant's size that costs next to nothing: what is left is the trainer. Its episodes of
    1000 steps are staggered."""

    max_episode_length = 1000

    def __init__(self, num_envs, num_obs=60, num_acts=8, device="cpu"):
        self.num_envs = num_envs
        self.num_obs = num_obs
        self.num_acts = num_acts
        self.device = torch.device(device)
        self.pool = torch.randn(num_envs + 256, num_obs, device=device)
        self.progress = torch.arange(num_envs, device=device) * self.max_episode_length // num_envs
        self.t = 0

    def reset(self):
        self.t = (self.t + 1) % 256
        return {"obs": self.pool[self.t : self.t + self.num_envs]}

    def step(self, actions):
        self.progress += 1
        late = self.progress >= self.max_episode_length
        self.progress.masked_fill_(late, 0)
        wanted = self.pool[self.t : self.t + self.num_envs, : self.num_acts]
        reward = 1.0 - (actions - wanted).square().mean(1)
        return self.reset(), reward, late.long(), {"time_outs": late}


class Meter:
    """Wraps the env of every trainer alike. It notes when each rollout began, and the returns of
    finished episodes, looked at once a rollout."""

    compilable = False  # ours_compiled compiles the env inside

    def __init__(self, env, num_steps, target):
        self.env = env
        self.target = target
        self.steps = 0
        self.rollouts = []
        self.solved = None
        self.running = torch.zeros(env.num_envs)
        self.finished = torch.zeros(num_steps, env.num_envs)  # where no episode ended: nan
        self.window = torch.zeros(0)
        self.returns = []

    def __getattr__(self, name):
        return getattr(self.env, name)

    def reset(self):
        return self.env.reset()

    def step(self, actions):
        t = self.steps % len(self.finished)
        if t == 0:
            self.rollouts.append(time.time())
        obs, reward, done, infos = self.env.step(actions)
        self.steps += 1
        over = done.bool()
        self.running += reward
        self.finished[t] = torch.where(over, self.running, math.nan)
        self.running.masked_fill_(over, 0.0)
        if t == len(self.finished) - 1:
            self.window = torch.cat((self.window, self.finished[~self.finished.isnan()]))[-256:]
            self.returns.append(round(float(self.window.mean()), 1) if len(self.window) else None)
            solved = len(self.window) == 256 and self.window.mean() >= self.target
            if solved and self.solved is None:
                seconds = time.time() - STARTED, time.process_time()
                self.solved = (*seconds, self.steps * self.num_envs)
        return obs, reward, done, infos


# --------------------------------------------------------------------------------------------------
# the trainers: each trains args.max_epochs epochs with the settings in args, and may write to the
# folder. "Differs:" says where its own options do not go as far, or lead to a better result when
# set otherwise.


def spaces(env):
    from gymnasium.spaces import Box

    return Box(-math.inf, math.inf, (env.num_obs,)), Box(-1.0, 1.0, (env.num_acts,))


def mlp(size, units):
    layers = []
    for width in units:
        layers += [torch.nn.Linear(size, width), torch.nn.ELU()]
        size = width
    return torch.nn.Sequential(*layers)


def ours(env, args, folder):
    train_ppo.make_env = lambda *_: env
    unsaved = dict(save_frequency=0, save_best_after=args.max_epochs + 1)
    args = dataclasses.replace(args, train_dir=folder, **unsaved)
    train_ppo.run(args, train_ppo.MultiObserver([train_ppo.RLGPUAlgoObserver()]))


def ours_compiled(env, args, folder):
    if getattr(env.env, "compilable", False):
        env.env.step = torch.compile(env.env.step, options=dict(fallback_random=True))
    ours(env, dataclasses.replace(args, compile=True), folder)


def rl_games(env, args, folder, torch_compile=False):
    # Differs: TensorBoard cannot be turned off; 1.6.5 lets the statistics of the observations move
    # in every pass.
    from fidelity import rl_games_params
    from rl_games.common import env_configurations, experience, vecenv
    from rl_games.torch_runner import Runner

    Box = experience.gym.spaces.Box  # of gym with 1.6.1, of gymnasium with 1.6.5

    class Env(vecenv.IVecEnv):
        step = staticmethod(env.step)
        reset = staticmethod(env.reset)

        def get_number_of_agents(self):
            return 1

        def get_env_info(self):
            observations = Box(-math.inf, math.inf, (env.num_obs,))
            return {"observation_space": observations, "action_space": Box(-1, 1, (env.num_acts,))}

    vecenv.register("compare", lambda *_, **__: Env())
    env_configurations.register("compare", {"vecenv_type": "compare", "env_creator": None})
    names = {"name": "compare", "env_name": "compare", "train_dir": folder}
    params = rl_games_params(args, **names, torch_compile=torch_compile)
    runner = Runner()
    runner.load({"params": {**params, "torch_threads": args.torch_threads}})
    runner.run({"train": True, "play": False})


def rl_games_compiled(*args):
    # Its default. What it compiles is cached on disk, as ours is, so only the very first run waits
    # for all of it.
    rl_games(*args, torch_compile=True)


def rsl_rl(env, args, folder):
    # Differs: actor and critic share no layers, and their gradients are clipped apart; no value
    # normalisation; no bounds loss; the learning rate goes down to 1e-5 only; minibatches are
    # shuffled.
    from rsl_rl.env import VecEnv
    from rsl_rl.runners import OnPolicyRunner
    from tensordict import TensorDict

    class Env(VecEnv):
        num_envs = env.num_envs
        num_actions = env.num_acts
        max_episode_length = env.max_episode_length
        device = "cpu"
        cfg = {}
        obs = env.reset()

        def get_observations(self):
            return TensorDict(self.obs, batch_size=[self.num_envs])

        def step(self, actions):
            self.obs, reward, done, infos = env.step(actions)
            return self.get_observations(), args.reward_scale * reward, done, infos

    net = dict(class_name="MLPModel", hidden_dims=list(args.units), activation=args.activation)
    net.update(obs_normalization=True)
    std = math.exp(args.sigma_init)
    gaussian = dict(class_name="GaussianDistribution", init_std=std, std_type="log")
    minibatches = args.num_envs * args.num_steps // args.minibatch_size
    ppo = dict(class_name="PPO", num_learning_epochs=args.update_epochs)
    ppo.update(num_mini_batches=minibatches, clip_param=args.clip_coef)
    ppo.update(use_clipped_value_loss=args.clip_vloss, value_loss_coef=0.5 * args.vf_coef)
    ppo.update(gamma=args.gamma, lam=args.gae_lambda, entropy_coef=args.ent_coef)
    ppo.update(learning_rate=args.learning_rate, schedule="adaptive")
    ppo.update(desired_kl=args.kl_threshold, max_grad_norm=args.max_grad_norm)
    config = dict(num_steps_per_env=args.num_steps, save_interval=10**9, check_for_nan=False)
    config.update(algorithm=ppo, obs_groups={"actor": ["obs"], "critic": ["obs"]})
    config.update(actor={**net, "distribution_cfg": gaussian}, critic=net)
    OnPolicyRunner(Env(), config, log_dir=None, device="cpu").learn(args.max_epochs)


def skrl(env, args, folder):
    # Differs: the KL divergence is an estimate from the sampled actions, looked at once a pass;
    # values are not clipped (its clipped loss has no gradient outside the range, and learns
    # slower); no bounds loss; where the clock cut an episode, gamma times the value of its last
    # observation is added, not of the one before; minibatches are shuffled.
    from skrl.agents.torch.ppo import PPO
    from skrl.envs.wrappers.torch import Wrapper
    from skrl.memories.torch import RandomMemory
    from skrl.models.torch import DeterministicMixin, GaussianMixin, Model
    from skrl.resources.preprocessors.torch import RunningStandardScaler
    from skrl.resources.schedulers.torch import KLAdaptiveLR
    from skrl.trainers.torch import SequentialTrainer

    class Env(Wrapper):
        observation_space, action_space = spaces(env)
        state = render = close = lambda *_, **__: None

        def reset(self):
            return env.reset()["obs"], {}

        def step(self, actions):
            obs, reward, done, infos = env.step(actions)
            late = infos["time_outs"].unsqueeze(1)
            return obs["obs"], reward.unsqueeze(1), done.bool().unsqueeze(1) & ~late, late, {}

    class Net(GaussianMixin, DeterministicMixin, Model):
        """Policy and value on one MLP, which runs once for both."""

        def __init__(self, **shapes):
            Model.__init__(self, **shapes)
            GaussianMixin.__init__(self, role="policy")
            DeterministicMixin.__init__(self, role="value")
            self.body = mlp(env.num_obs, args.units)
            self.mu = torch.nn.Linear(args.units[-1], env.num_acts)
            self.value = torch.nn.Linear(args.units[-1], 1)
            self.log_std = torch.nn.Parameter(torch.full((env.num_acts,), args.sigma_init))
            self.features = None

        def act(self, inputs, *, role=""):
            mixin = GaussianMixin if role == "policy" else DeterministicMixin
            return mixin.act(self, inputs, role=role)

        def compute(self, inputs, role=""):
            if role == "policy":
                self.features = self.body(inputs["observations"])
                return self.mu(self.features), {"log_std": self.log_std}
            features, self.features = self.features, None
            if features is None:
                features = self.body(inputs["observations"])
            return self.value(features), {}

    wrapped = Env(env)
    shapes = dict(observation_space=wrapped.observation_space, action_space=wrapped.action_space)
    net = Net(**shapes, device="cpu")
    minibatches = args.num_envs * args.num_steps // args.minibatch_size
    config = dict(rollouts=args.num_steps, learning_epochs=args.update_epochs)
    config.update(mini_batches=minibatches, discount_factor=args.gamma, gae_lambda=args.gae_lambda)
    config.update(learning_rate=args.learning_rate, learning_rate_scheduler=KLAdaptiveLR)
    config["learning_rate_scheduler_kwargs"] = {"kl_threshold": args.kl_threshold}
    config.update(grad_norm_clip=args.max_grad_norm, ratio_clip=args.clip_coef, value_clip=0.0)
    config.update(value_loss_scale=0.5 * args.vf_coef, entropy_loss_scale=args.ent_coef)
    config.update(time_limit_bootstrap=True, rewards_shaper=lambda r, *_: args.reward_scale * r)
    for name, size in (("observation", env.num_obs), ("value", 1)):
        config[f"{name}_preprocessor"] = RunningStandardScaler
        config[f"{name}_preprocessor_kwargs"] = {"size": size, "device": "cpu"}
    config["experiment"] = {"directory": folder, "write_interval": 0, "checkpoint_interval": 0}
    memory = dict(memory_size=args.num_steps, num_envs=args.num_envs, device="cpu")
    memory = RandomMemory(replacement=False, **memory)
    models = {"policy": net, "value": net}
    agent = PPO(models=models, memory=memory, cfg=config, device="cpu", **shapes)
    trainer = dict(timesteps=args.max_epochs * args.num_steps, headless=True)
    trainer.update(disable_progressbar=True, close_environment_at_exit=False)
    SequentialTrainer(cfg=trainer, env=wrapped, agents=agent).train()


def stable_baselines3(env, args, folder):
    # Differs: no adaptive learning rate, so a fixed one, for Cartpole the best of four; no
    # value normalisation, and therefore no value clipping, which would go by absolute size;
    # observation statistics move at every step; advantages are normalised by minibatch; no bounds
    # loss; orthogonal initial weights, Adam's epsilon is 1e-5; where the clock cut an episode, as
    # skrl; minibatches are shuffled; numpy to and from the env.
    from stable_baselines3 import PPO
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
    from stable_baselines3.common.vec_env import VecEnv, VecNormalize

    class Env(VecEnv):
        def reset(self):
            return env.reset()["obs"].numpy()

        def step_async(self, actions):
            self.actions = torch.from_numpy(actions)

        def step_wait(self):
            obs, reward, done, infos = env.step(self.actions)
            obs = obs["obs"].numpy()
            done = done.bool().numpy()
            late = infos["time_outs"].numpy()
            rows = [{}] * env.num_envs
            for i in done.nonzero()[0]:
                rows[i] = {"terminal_observation": obs[i], "TimeLimit.truncated": late[i]}
            return obs, (args.reward_scale * reward).numpy(), done, rows

        def env_is_wrapped(self, *_, **__):
            return [False] * env.num_envs

        close = set_attr = env_method = lambda *_, **__: None
        get_attr = lambda *_, **__: [None] * env.num_envs  # noqa: E731

    class Body(BaseFeaturesExtractor):
        """The MLP that policy and value share."""

        def __init__(self, observation_space):
            super().__init__(observation_space, args.units[-1])
            self.mlp = mlp(env.num_obs, args.units)

        def forward(self, obs):
            return self.mlp(obs)

    venv = Env(env.num_envs, *spaces(env))
    venv = VecNormalize(venv, norm_reward=False, clip_obs=5.0, gamma=args.gamma)
    settings = dict(n_steps=args.num_steps, batch_size=args.minibatch_size)
    settings.update(learning_rate=5e-3 if env.num_obs == 4 else args.learning_rate)
    settings.update(n_epochs=args.update_epochs, gamma=args.gamma, gae_lambda=args.gae_lambda)
    settings.update(clip_range=args.clip_coef, ent_coef=args.ent_coef, vf_coef=0.5 * args.vf_coef)
    settings.update(max_grad_norm=args.max_grad_norm, seed=args.seed, device="cpu")
    net = dict(net_arch=[], features_extractor_class=Body, log_std_init=args.sigma_init)
    ppo = PPO("MlpPolicy", venv, policy_kwargs=net, **settings)
    ppo.learn(args.max_epochs * args.num_envs * args.num_steps, log_interval=None)


TRAINERS = {  # name: function, the package that must be installed
    "train_ppo": (ours, "torch"),
    "train_ppo compiled": (ours_compiled, "torch"),
    "rl_games": (rl_games, "rl-games"),
    "rl_games compiled": (rl_games_compiled, "rl-games"),
    "rsl_rl": (rsl_rl, "rsl-rl-lib"),
    "skrl": (skrl, "skrl"),
    "stable-baselines3": (stable_baselines3, "stable-baselines3"),
}


# --------------------------------------------------------------------------------------------------
# one run, and all of them


def peak_mb():
    """The largest resident set that this process has had."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024**2 if sys.platform == "darwin" else peak / 1024


def commit():
    """The git commit, with "-dirty" if code was changed. results.py's list of runs may grow."""
    git = ["git", "-C", TOP]
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"]).returncode
    found = subprocess.check_output([*git, "describe", "--always"], text=True).strip()
    return found + "-dirty" * bool(changed)


def versions(name):
    """What was run: the trainer's package (of ours the git commit), torch, mujoco where it is."""
    found = {"python": platform.python_version()}
    for package in (TRAINERS[name][1], "torch", "mujoco"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if name.startswith("train_ppo"):
        found["train_ppo"] = commit()
    return found


def one(name, which, threads, epochs, seed):
    """Train in this process; returns what was measured."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    settings = dict(max_epochs=epochs, seed=seed, torch_threads=threads, device="cpu", sim="torch")
    if which == "ant":
        settings.update(ANT)
    if which in EXAMPLES:
        module, factory = EXAMPLES[which].split(":")
        module = importlib.import_module(f"examples.{module}")
        settings = {**module.SETTINGS, **settings}
    args = train_ppo.Args(**settings)  # all else as in CartpolePPO.yaml
    if which == "ant":
        env = Synthetic(args.num_envs)
    elif which in EXAMPLES:
        env = getattr(module, factory)(num_envs=args.num_envs, device="cpu", seed=seed)
    else:
        env = train_ppo.Cartpole(args.num_envs, torch.device("cpu"))
    env = Meter(env, args.num_steps, TARGETS[which])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        TRAINERS[name][0](env, args, folder)
        end = time.time()
    assert env.steps == epochs * args.num_steps, f"{env.steps} steps were taken"
    steps = (epochs - WARM_UP) * args.num_steps * env.num_envs
    seconds, cpu_seconds, env_steps = env.solved or (None, None, None)
    if seconds and not name.startswith("train_ppo"):
        seconds, cpu_seconds = seconds - BORROWED[0], cpu_seconds - BORROWED[1]
    return {
        "trainer": name,
        "env": which,
        "threads": threads,
        "seed": seed,
        "env_steps": env.steps * env.num_envs,
        "env_steps_per_second": steps / (end - env.rollouts[WARM_UP]),
        "seconds_to_target": seconds,
        "cpu_seconds_to_target": cpu_seconds,  # of all threads
        "env_steps_to_target": env_steps,
        "peak_mb": peak_mb(),
        "versions": versions(name),
        # Of the last 256 episodes, after each epoch.
        "returns": env.returns,
    }


def run(name, which, threads, epochs, seed):
    """`one` in a process of its own."""
    command = [sys.executable, os.path.abspath(__file__), "--one", name, "--env", which]
    command += ["--threads", str(threads), "--epochs", str(epochs), "--seed", str(seed)]
    environ = {**os.environ, "OMP_NUM_THREADS": str(threads), "COMPARE_STARTED": repr(time.time())}
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed on {which}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


def median(runs, key):
    return statistics.median(math.inf if run[key] is None else run[key] for run in runs)


def reference(names):
    return "rl_games" if "rl_games" in names else names[0]


def table(results, names, which):
    """Markdown, of medians; results[name] are the runs."""
    target = TARGETS[which]
    header = ["", f"{which}: env steps/s", "peak MB"]
    if math.isfinite(target):
        header += [f"seconds to {target:.0f}", f"env steps to {target:.0f}"]
    rows = [header, ["---"] + ["---:"] * (len(header) - 1)]
    base = median(results[reference(names)], "env_steps_per_second")
    for name in names:
        runs = results[name]
        rate = median(runs, "env_steps_per_second")
        row = [name, f"{rate / 1000:.0f}k ({rate / base:.2f})", f"{median(runs, 'peak_mb'):.0f}"]
        if math.isfinite(target):
            seconds, env_steps = (median(runs, f"{x}_to_target") for x in ("seconds", "env_steps"))
            reached = math.isfinite(seconds)
            row += [f"{seconds:.1f}", f"{env_steps / 1000:.0f}k"] if reached else ["-", "-"]
            solved = sum(run["env_steps_to_target"] is not None for run in runs)
            row[-1] += f" ({solved} of {len(runs)} runs)" if solved < len(runs) else ""
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def describe_machine():
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError), open("/proc/cpuinfo") as file:
        model = file.read().split("model name\t: ")[1].split("\n")[0]
    return f"{model}, {os.cpu_count()} cores, {platform.system()}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--env", choices=EPOCHS, default="cartpole")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of each trainer")
    parser.add_argument("--epochs", type=int, help=f"instead of {EPOCHS}; more than {WARM_UP}")
    out = os.path.join(tempfile.gettempdir(), "compare.jsonl")
    parser.add_argument("--out", default=out, help=f"each run's JSON, a line each ({out})")
    parser.add_argument("--one", choices=TRAINERS, help="one training run in this process")
    parser.add_argument("--seed", type=int, default=1, help="of --one; else the round is the seed")
    options = parser.parse_args()
    if options.epochs is not None and options.epochs <= WARM_UP:
        parser.error(f"--epochs must be more than {WARM_UP}")
    which = options.env
    job = (which, options.threads, options.epochs or EPOCHS[which])
    if options.one:
        print(json.dumps(one(options.one, *job, options.seed)))
        return

    names = []
    for name in options.trainers:
        try:
            importlib.metadata.version(TRAINERS[name][1])
            names.append(name)
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is left out: {TRAINERS[name][1]} is not installed", file=sys.stderr)
    results = {name: [] for name in names}
    found = {}
    with open(options.out, "w") as file:
        for i in range(options.repeats):
            for name in names[::-1] if i % 2 else names:
                result = run(name, *job, i + 1)
                print(json.dumps(result), file=file, flush=True)
                print(f"round {i + 1} of {options.repeats}: {name}", file=sys.stderr)
                results[name].append(result)
                found.update(result["versions"])
    print(table(results, names, which), end="\n\n")
    what = f"{options.threads} thread{'s' if options.threads > 1 else ''}"
    print(f"Medians of {options.repeats} runs, {what}; in brackets relative to {reference(names)}.")
    packages = ", ".join(f"{package} {version}" for package, version in found.items())
    print(f"{describe_machine()}; {packages}.")


if __name__ == "__main__":
    main()
