"""``sb3x train``."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch as th
import yaml
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.vec_env import VecEnv
from tqdm import TqdmExperimentalWarning

from sb3_ext.zoo.config import (
    Algo,
    Config,
    ZooError,
    load_algo,
    one_line_errors,
    parse_overrides,
    read_entries,
    resolve,
)
from sb3_ext.zoo.runs import (
    Checkpoints,
    Run,
    continue_evaluations,
    list_runs,
    new_run,
    numbered_buffer,
    replay_buffer_of,
    save,
    slug,
    steps_of,
    tidy,
)
from sb3_ext.zoo.tasks import Task, find_task, make_dataset_envs, make_envs, policy_for

EVAL_FREQ = 25_000
"""Steps between evaluations if the user does not say, as in rl_zoo3."""


class StopOnSignal(BaseCallback):
    """Stop between two steps, so that the model that is saved afterwards is whole, once :attr:`requested` is set."""

    requested = False

    def _on_step(self) -> bool:
        return not self.requested


@contextmanager
def stop_on_signal() -> Iterator[StopOnSignal]:
    """
    Let the first SIGINT or SIGTERM end ``learn`` early; the second one interrupts at once.

    :return: the callback for ``learn``
    """
    callback = StopOnSignal()

    def handle(number: int, frame: FrameType | None) -> None:
        if callback.requested:
            raise KeyboardInterrupt
        callback.requested = True
        print("Stopping after this step and saving; once more to stop at once.", flush=True)

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield callback
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(args: argparse.Namespace, words: list[str]) -> None:
    """
    Train an agent.

    :param args: the command line's flags
    :param words: the command line
    :raises ZooError: if something is wrong that the user can put right
    """
    algo = load_algo(args.algo)
    overrides = parse_overrides(algo, args.hyperparams)
    file, entries = read_entries(algo, args.conf_file)
    _check_flags(args, algo)
    with one_line_errors():
        task = find_task(args, algo, download=not args.dry_run)
    config = resolve(algo, file, entries, task.entries, overrides, args.n_timesteps, task.policy)
    run, start = _find_start(args, algo, config, slug(task.name))
    args.eval_freq = _eval_freq(args, algo)
    # a run in parts would begin each of them with an empty buffer
    args.save_replay_buffer |= args.resume and algo.replays and not algo.offline
    if args.dry_run:
        _print_plan(args, task, config, start)
        return
    if start is not None and args.resume and (steps_of(start) or 0) >= config.n_timesteps:
        print(f"The run in {start.parent} has {steps_of(start)} steps; nothing is left to do.")
        return
    if args.seed < 0:
        args.seed = int(np.random.default_rng().integers(2**31))
    if args.num_threads > 0:
        th.set_num_threads(args.num_threads)
    fresh = run is None
    if run is not None:
        tidy(run)
    run = run or new_run(args.log_folder, algo.name, slug(task.name), args.uuid)
    with ExitStack() as envs:
        try:
            with one_line_errors():
                model = _build_model(args, algo, task, config, run, start, envs)
                eval_env = _build_eval_env(args, task, config, model, envs) if args.eval_freq else None
                args.dataset, args.env = task.dataset, task.env_id
                run.write_start(args, config.settings, words)
                callbacks = _callbacks(args, model, task, config, run, eval_env)
        except BaseException:
            envs.close()
            if fresh:
                shutil.rmtree(run.path)
            raise
        if args.verbose > 0:
            print(f"Settings: {config.source}\nSeed: {args.seed}\nLog path: {run.path}")
        _learn(args, model, config, callbacks, run)


def _check_flags(args: argparse.Namespace, algo: Algo) -> None:
    if args.eval_episodes < 1:
        raise ZooError(f"--eval-episodes must be at least 1, got {args.eval_episodes}.")
    if args.trained_agent and steps_of(Path(args.trained_agent)) is None:
        raise ZooError(f"--trained-agent: {args.trained_agent} is not a saved model (a .zip file).")
    if algo.imitates and not args.dataset:
        raise ZooError(f"{algo.name} learns from demonstrations: pass --dataset ID as well.")
    if args.save_replay_buffer and algo.offline:
        raise ZooError(f"--save-replay-buffer: {algo.name} learns from a dataset, which is not saved again.")
    if args.save_replay_buffer and not algo.replays:
        raise ZooError(f"--save-replay-buffer: {algo.name} keeps no replay buffer.")
    if args.tensorboard_log and find_spec("tensorboard") is None:
        raise ZooError('--tensorboard-log needs: pip install "sb3-ext[report]"')


def _find_start(args: argparse.Namespace, algo: Algo, config: Config, name: str) -> tuple[Run | None, Path | None]:
    """Run to go on with and model to start from, if there are any."""
    if args.trained_agent:
        return None, Path(args.trained_agent)
    runs = [run for run in list_runs(args.log_folder, args.algo) if run.name == name] if args.resume else []
    if not runs:
        return None, None
    run = runs[-1]
    now, then = config.settings, run.read("config")
    changed = [k for k in sorted({*now, *then}) if then and k != "n_timesteps" and now.get(k) != then.get(k)]
    if changed:
        key = changed[0]
        raise ZooError(
            f"{run.path} was started with {key} {then.get(key)!r}, not {now.get(key)!r}; give the same settings, or "
            "start a new run without --resume."
        )
    dataset = run.read("args").get("dataset", args.dataset)
    if algo.imitates and dataset != args.dataset:  # the others' runs have the dataset's name
        raise ZooError(
            f"{run.path} was started with the dataset {dataset}, not {args.dataset}; start a new run without --resume."
        )
    seed = run.read("args").get("seed", args.seed)
    if args.seed not in (-1, seed):
        raise ZooError(f"{run.path} was started with seed {seed}, not {args.seed}; start a new run without --resume.")
    args.seed = seed
    newest = run.newest()
    return run, newest[1] if newest else None


def _eval_freq(args: argparse.Namespace, algo: Algo) -> int:
    """Steps between evaluations, 0 for none."""
    if args.eval_freq is not None:
        return max(int(args.eval_freq), 0)
    if not algo.offline or args.env:
        return EVAL_FREQ
    if args.verbose > 0 and not args.dry_run:
        print(
            "No evaluation: it would run the environment that the dataset's metadata names. "
            "Pass --eval-freq N or --env ID to evaluate."
        )
    return 0


def _print_plan(args: argparse.Namespace, task: Task, config: Config, start: Path | None) -> None:
    plan = {
        "algo": args.algo,
        "dataset": task.dataset,
        "env": task.env_id,
        "entry": config.source,
        "seed": args.seed if args.seed >= 0 else "random",
        "run": str(Path(args.log_folder) / args.algo / slug(task.name)) + "_<number>",
        "start_from": str(start) if start else None,
        "eval_freq": args.eval_freq,
        "save_freq": _save_freq(args, config),
        "hyperparams": config.settings,
    }
    print(yaml.safe_dump(plan, sort_keys=False), end="")


def _save_freq(args: argparse.Namespace, config: Config) -> int:
    if args.save_freq > 0 or not args.resume:
        return max(int(args.save_freq), 0)
    return max(config.n_timesteps // 20, 1)


def _build_model(
    args: argparse.Namespace, algo: Algo, task: Task, config: Config, run: Run, start: Path | None, envs: ExitStack
) -> BaseAlgorithm:
    env: VecEnv | None = None
    arguments = dict(config.arguments)
    if not algo.offline:
        assert task.env is not None
        env = make_envs(
            task.env,
            n_envs=config.n_envs,
            seed=args.seed,
            frame_stack=config.frame_stack,
            monitor=run.path,
            training=True,
        )
        envs.callback(env.close)
        if arguments["policy"] == "auto":
            arguments["policy"] = policy_for(env.observation_space)
    board = os.path.join(args.tensorboard_log, slug(task.name)) if args.tensorboard_log else None
    common: dict[str, Any] = {"tensorboard_log": board, "verbose": args.verbose, "device": args.device}
    if start is None:
        data: dict[str, Any] = {"dataset": task.dataset} if algo.offline else {"env": env}
        if algo.imitates:
            data["demonstrations"] = task.dataset
        return algo.cls(**arguments, **data, **common, seed=args.seed)
    if args.verbose > 0:
        print(f"Loading {start} ({steps_of(start)} steps)")
    if not args.resume:
        # as rl_zoo3: today's settings, but the network is the model's own
        common |= {k: v for k, v in arguments.items() if k not in ("policy", "policy_kwargs")} | {"seed": args.seed}
    model: Any = algo.cls.load(start, env=env, **common)
    if algo.offline:
        model.set_dataset(task.dataset)
    elif algo.imitates:
        model.set_demonstrations(task.dataset)
    elif (buffer := replay_buffer_of(start)).is_file():
        model.load_replay_buffer(buffer)
    elif args.verbose > 0:
        print(f"{buffer.name} was not saved (--save-replay-buffer), so the replay buffer starts empty.")
    return model  # type: ignore[no-any-return]


def _build_eval_env(
    args: argparse.Namespace, task: Task, config: Config, model: BaseAlgorithm, envs: ExitStack
) -> VecEnv:
    kwargs: dict[str, Any] = {"n_envs": args.n_eval_envs, "seed": args.seed, "frame_stack": config.frame_stack}
    like = model.observation_space
    env = make_envs(task.env, like=like, **kwargs) if task.env else make_dataset_envs(task, **kwargs)
    envs.callback(env.close)
    check_fits(model, env)
    return env


def check_fits(model: BaseAlgorithm, env: VecEnv) -> None:
    """
    Make sure that a model can play in an environment.

    :param model: the model
    :param env: the environment
    :raises ZooError: if their spaces differ
    """
    for what in ("observation_space", "action_space"):
        ours, theirs = getattr(model, what), getattr(env, what)
        if ours != theirs:
            raise ZooError(f"The model's {what} is {ours}, the environment's is {theirs}; they must be the same.")


def _callbacks(
    args: argparse.Namespace, model: BaseAlgorithm, task: Task, config: Config, run: Run, eval_env: VecEnv | None
) -> list[BaseCallback]:
    folder = str(run.path)
    callbacks: list[BaseCallback] = []
    if save_freq := _save_freq(args, config):
        every = max(save_freq // config.n_envs, 1)
        callbacks.append(Checkpoints(every, run, args.save_replay_buffer, in_parts=args.resume))
    if eval_env is not None:
        evaluation = EvalCallback(
            eval_env,
            n_eval_episodes=args.eval_episodes,
            eval_freq=max(args.eval_freq // config.n_envs, 1),
            log_path=folder,
            best_model_save_path=folder,
            deterministic=not task.atari,  # as in rl_zoo3
            verbose=min(args.verbose, 1),
        )
        if args.resume:
            continue_evaluations(evaluation, run.path / "evaluations.npz", model.num_timesteps)
        callbacks.append(evaluation)
    if args.resume:
        for callback in callbacks:  # save and evaluate at the same steps as without the interruption
            callback.n_calls = model.num_timesteps // config.n_envs
    return callbacks


def _learn(
    args: argparse.Namespace, model: BaseAlgorithm, config: Config, callbacks: list[BaseCallback], run: Run
) -> None:
    kwargs: dict[str, Any] = {}
    if args.log_interval != -1:
        kwargs["log_interval"] = args.log_interval if args.log_interval > 0 else None
    with stop_on_signal() as stop, warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmExperimentalWarning)
        try:
            model.learn(
                config.n_timesteps - (model.num_timesteps if args.resume else 0),
                callback=[*callbacks, stop],
                reset_num_timesteps=model.num_timesteps == 0,
                progress_bar=args.progress,
                **kwargs,
            )
        except FloatingPointError as error:
            raise ZooError(f"Training stopped at step {model.num_timesteps}: {error}") from error
        buffer = numbered_buffer(run.final, model.num_timesteps) if args.resume else run.path / "replay_buffer.pkl"
        save(model, run.final, buffer if args.save_replay_buffer else None)
        if args.resume:
            tidy(run)
    if args.verbose > 0:
        print(f"{'Interrupted' if stop.requested else 'Finished'} at step {model.num_timesteps}, saved {run.final}")
