"""``sb3x train``."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import minari
import numpy as np
import yaml
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.vec_env import VecEnv
from tqdm import TqdmExperimentalWarning

from sb3_ext import OfflineEvalCallback, split_dataset
from sb3_ext.data import policy_for
from sb3_ext.zoo import runs
from sb3_ext.zoo.config import (
    BY_ACTIONS,
    Algo,
    Config,
    ZooError,
    for_actions,
    load_algo,
    one_line_errors,
    parse_overrides,
    read_entries,
    resolve,
)
from sb3_ext.zoo.runs import Run, slug, steps_of
from sb3_ext.zoo.settings import TrainSettings
from sb3_ext.zoo.tasks import Task, find_task, make_envs, make_model_envs, use_threads

EVAL_FREQ = 25_000
"""Steps between evaluations if the user does not say, as in rl_zoo3."""


class StopOnSignal(BaseCallback):
    """Stop between two steps, so that the model that is saved afterwards is whole, once :attr:`requested` is set."""

    requested = False

    def _on_step(self) -> bool:
        return not self.requested


@contextmanager
def stop_on_signal() -> Iterator[StopOnSignal]:
    """Give a callback that ends ``learn`` at the first SIGINT or SIGTERM; the second one interrupts at once."""
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


def train(settings: TrainSettings, words: list[str]) -> None:
    """Train an agent."""
    algo = load_algo(settings.algo)
    _check_flags(settings, algo)
    if algo.name in BY_ACTIONS:  # the dataset decides which settings there are
        with one_line_errors():
            algo = for_actions(algo, find_task(settings, algo, download=not settings.dry_run).actions)
    overrides = parse_overrides(algo, settings.hyperparams)
    file, entries = read_entries(algo, settings.conf_file)
    if algo.offline and (settings.transforms or settings.build_env):
        reading = {"transforms": settings.transforms and list(settings.transforms), "build_env": settings.build_env}
        overrides["dataset_kwargs"] = {**overrides.get("dataset_kwargs", {}), **{k: v for k, v in reading.items() if v}}
    with one_line_errors():
        task = find_task(settings, algo, download=not settings.dry_run)
        config = resolve(algo, file, entries, task.entries, overrides, settings.n_timesteps, task.policy)
    run, start, seed = _find_start(settings, algo, config, slug(task.name))
    settings = replace(
        settings,
        seed=seed,
        eval_freq=_eval_freq(settings, algo),
        # a run in parts would begin each of them with an empty buffer
        save_replay_buffer=settings.save_replay_buffer or (settings.resume and algo.replays and not algo.offline),
    )
    if settings.dry_run:
        _print_plan(settings, task, config, start)
        return
    if start is not None and settings.resume and (done := steps_of(start) or 0) >= config.n_timesteps:
        print(f"The run in {start.parent} has {done} steps; nothing is left to do.")
        return
    if settings.seed < 0:
        settings = replace(settings, seed=int(np.random.default_rng().integers(2**31)))
    use_threads(settings.num_threads)
    fresh = run is None
    if run is not None:
        runs.tidy(run)
    run = run or runs.new_run(settings.log_folder, algo.name, slug(task.name), settings.uuid)
    with ExitStack() as envs:
        try:
            with one_line_errors():
                data, held_out = _split(settings, task)
                model = _build_model(settings, algo, task, config, run, start, envs, data)
                callbacks = _callbacks(settings, model, task, config, run, envs, held_out)
                run.write_start(replace(settings, dataset=task.dataset, env=task.env_id), config.hyperparams, words)
        except BaseException:
            envs.close()
            if fresh:
                shutil.rmtree(run.path)
            raise
        if settings.verbose > 0:
            print(f"Settings: {config.source}\nSeed: {settings.seed}\nLog path: {run.path}")
        _learn(settings, model, config, callbacks, run)


def _check_flags(settings: TrainSettings, algo: Algo) -> None:
    if settings.eval_episodes < 1:
        raise ZooError(f"--eval-episodes must be at least 1, got {settings.eval_episodes}.")
    if settings.trained_agent and steps_of(Path(settings.trained_agent)) is None:
        raise ZooError(f"--trained-agent: {settings.trained_agent} is not a saved model (a .zip file).")
    if algo.imitates and not settings.dataset:
        raise ZooError(f"{algo.name} learns from demonstrations: pass --dataset ID as well.")
    _check_validation(settings, algo)
    if settings.save_replay_buffer and algo.offline:
        raise ZooError(f"--save-replay-buffer: {algo.name} learns from a dataset, which is not saved again.")
    if settings.save_replay_buffer and not algo.replays:
        raise ZooError(f"--save-replay-buffer: {algo.name} keeps no replay buffer.")
    if settings.tensorboard_log and find_spec("tensorboard") is None:
        raise ZooError('--tensorboard-log needs: pip install "sb3-ext[report]"')


def _check_validation(settings: TrainSettings, algo: Algo) -> None:
    if settings.validation is None:
        for flag in ("validation_freq", "validation_criterion"):
            if getattr(settings, flag) is not None:
                raise ZooError(f"--{flag.replace('_', '-')} needs --validation SHARE, for instance --validation 0.1.")
        return
    if not algo.offline:
        raise ZooError(f"--validation: {algo.name} learns in an environment, which evaluates it (--eval-freq).")
    if not 0 < settings.validation < 1:
        raise ZooError(f"--validation must be between 0 and 1, without them, got {settings.validation}.")
    if settings.validation_freq is not None and settings.validation_freq < 1:
        raise ZooError(f"--validation-freq must be at least 1, got {settings.validation_freq}.")


def _find_start(settings: TrainSettings, algo: Algo, config: Config, name: str) -> tuple[Run | None, Path | None, int]:
    """Run to go on with and model to start from, if there are any; and the seed."""
    if settings.trained_agent:
        return None, Path(settings.trained_agent), settings.seed
    there = runs.list_runs(settings.log_folder, settings.algo) if settings.resume else []
    earlier = [run for run in there if run.name == name]
    if not earlier:
        return None, None, settings.seed
    run = earlier[-1]
    started, anew = f"{run.path} was started with", "start a new run without --resume."
    now, then = config.hyperparams, run.read("config")
    for key in sorted({*now, *then} - {"n_timesteps"}) if then else ():
        if now.get(key) != then.get(key):
            change = f"{key} {then.get(key)!r}, not {now.get(key)!r}"
            raise ZooError(f"{started} {change}; give the same settings, or {anew}")
    flags = run.read("args")
    dataset = flags.get("dataset", settings.dataset)
    if algo.imitates and dataset != settings.dataset:  # the others' runs have the dataset's name
        raise ZooError(f"{started} the dataset {dataset}, not {settings.dataset}; {anew}")
    share = flags.get("validation", settings.validation)
    if share != settings.validation:
        raise ZooError(f"{started} --validation {share}, not {settings.validation}; {anew}")
    seed = flags.get("seed", settings.seed)
    if settings.seed not in (-1, seed):
        raise ZooError(f"{started} seed {seed}, not {settings.seed}; {anew}")
    newest = run.newest()
    return run, newest[1] if newest else None, seed


def _eval_freq(settings: TrainSettings, algo: Algo) -> int:
    """Steps between evaluations, 0 for none."""
    if settings.eval_freq is not None:
        return max(settings.eval_freq, 0)
    if not algo.offline or settings.env:
        return EVAL_FREQ
    if settings.verbose > 0 and not settings.dry_run and settings.validation is None:
        print(
            "No evaluation: it would run the environment that the dataset's metadata names. "
            "Pass --eval-freq N or --env ID to evaluate there, or --validation 0.1 to evaluate on held-out episodes."
        )
    return 0


def _print_plan(settings: TrainSettings, task: Task, config: Config, start: Path | None) -> None:
    plan = {
        "algo": settings.algo,
        "dataset": task.dataset,
        "env": task.env_id,
        "entry": config.source,
        "seed": settings.seed if settings.seed >= 0 else "random",
        "run": str(Path(settings.log_folder) / settings.algo / slug(task.name)) + "_<number>",
        "start_from": str(start) if start else None,
        "eval_freq": settings.eval_freq,
        "validation": settings.validation,
        "validation_freq": _validation_freq(settings, config),
        "save_freq": _save_freq(settings, config),
        "hyperparams": config.hyperparams,
    }
    print(yaml.safe_dump(plan, sort_keys=False), end="")


def _save_freq(settings: TrainSettings, config: Config) -> int:
    if settings.save_freq > 0 or not settings.resume:
        return max(settings.save_freq, 0)
    return max(config.n_timesteps // 20, 1)


def _validation_freq(settings: TrainSettings, config: Config) -> int:
    """Steps between evaluations on held-out episodes, 0 for none."""
    if settings.validation is None:
        return 0
    return settings.validation_freq or max(config.n_timesteps // 20, 1)


def _split(
    settings: TrainSettings, task: Task
) -> tuple[str | minari.MinariDataset | None, minari.MinariDataset | None]:
    """Data to learn from, and held-out episodes if there are any: the same ones in all runs, whatever their seed."""
    if settings.validation is None:
        return task.dataset, None
    assert task.dataset is not None
    return split_dataset(task.dataset, settings.validation, build_env=settings.build_env)


def _build_model(
    settings: TrainSettings,
    algo: Algo,
    task: Task,
    config: Config,
    run: Run,
    start: Path | None,
    envs: ExitStack,
    dataset: str | minari.MinariDataset | None,
) -> BaseAlgorithm:
    env: VecEnv | None = None
    arguments = dict(config.arguments)
    if not algo.offline:
        assert task.env is not None
        env = make_envs(
            task.env,
            n_envs=config.n_envs,
            seed=settings.seed,
            frame_stack=config.frame_stack,
            transforms=settings.transforms,
            monitor=run.path,
            training=True,
        )
        envs.callback(env.close)
        if arguments["policy"] == "auto":
            arguments["policy"] = policy_for(env.observation_space)
    board = os.path.join(settings.tensorboard_log, slug(task.name)) if settings.tensorboard_log else None
    common: dict[str, Any] = {"tensorboard_log": board, "verbose": settings.verbose, "device": settings.device}
    if start is None:
        data: dict[str, Any] = {"dataset": dataset} if algo.offline else {"env": env}
        if algo.imitates:
            data["demonstrations"] = task.dataset
        return algo.cls(**arguments, **data, **common, seed=settings.seed)
    if settings.verbose > 0:
        print(f"Loading {start} ({steps_of(start)} steps)")
    if not settings.resume:
        # as rl_zoo3: today's settings, but the network is the model's own
        common |= {k: v for k, v in arguments.items() if k not in ("policy", "policy_kwargs")} | {"seed": settings.seed}
    model: Any = algo.cls.load(start, env=env, **common)
    if algo.offline:
        model.set_dataset(dataset)
    elif algo.imitates:
        model.set_demonstrations(task.dataset)
    elif (buffer := runs.replay_buffer_of(start)).is_file():
        model.load_replay_buffer(buffer)
    elif settings.verbose > 0:
        print(f"{buffer.name} was not saved (--save-replay-buffer), so the replay buffer starts empty.")
    return model  # type: ignore[no-any-return]


def _callbacks(
    settings: TrainSettings,
    model: BaseAlgorithm,
    task: Task,
    config: Config,
    run: Run,
    envs: ExitStack,
    held_out: minari.MinariDataset | None,
) -> list[BaseCallback]:
    folder = str(run.path)
    callbacks: list[BaseCallback] = []
    if save_freq := _save_freq(settings, config):
        every = max(save_freq // config.n_envs, 1)
        callbacks.append(runs.Checkpoints(every, run, settings.save_replay_buffer, in_parts=settings.resume))
    if settings.eval_freq:
        eval_env = make_model_envs(
            task,
            model,
            build_env=settings.build_env,
            n_envs=settings.n_eval_envs,
            seed=settings.seed,
            frame_stack=config.frame_stack,
            transforms=settings.transforms,
        )
        envs.callback(eval_env.close)
        evaluation = EvalCallback(
            eval_env,
            n_eval_episodes=settings.eval_episodes,
            eval_freq=max(settings.eval_freq // config.n_envs, 1),
            log_path=folder,
            best_model_save_path=folder,
            deterministic=not task.atari,  # as in rl_zoo3
            verbose=min(settings.verbose, 1),
        )
        if settings.resume:
            runs.continue_evaluations(evaluation, run.path / "evaluations.npz", model.num_timesteps)
        callbacks.append(evaluation)
    if held_out is not None:
        validation = OfflineEvalCallback(
            held_out,
            eval_freq=_validation_freq(settings, config),
            criterion=settings.validation_criterion,
            log_path=folder,
            # returns in the environment choose the best model where there are some
            best_model_save_path=None if settings.eval_freq else folder,
            verbose=min(settings.verbose, 1),
        )
        if settings.resume:
            validation.continue_from(model.num_timesteps)
        validation.init_callback(model)  # what does not fit is said before training
        callbacks.append(validation)
    if settings.resume:
        for callback in callbacks:  # save and evaluate at the same steps as without the interruption
            callback.n_calls = model.num_timesteps // config.n_envs
    return callbacks


def _learn(
    settings: TrainSettings, model: BaseAlgorithm, config: Config, callbacks: list[BaseCallback], run: Run
) -> None:
    kwargs: dict[str, Any] = {}
    if settings.log_interval != -1:
        kwargs["log_interval"] = settings.log_interval if settings.log_interval > 0 else None
    with stop_on_signal() as stop, warnings.catch_warnings():
        warnings.simplefilter("ignore", TqdmExperimentalWarning)
        try:
            model.learn(
                config.n_timesteps - (model.num_timesteps if settings.resume else 0),
                callback=[*callbacks, stop],
                reset_num_timesteps=model.num_timesteps == 0,
                progress_bar=settings.progress,
                **kwargs,
            )
        except FloatingPointError as error:
            raise ZooError(f"Training stopped at step {model.num_timesteps}: {error}") from error
        buffer = run.path / "replay_buffer.pkl"
        if settings.resume:
            buffer = runs.numbered_buffer(run.final, model.num_timesteps)
        runs.save(model, run.final, buffer if settings.save_replay_buffer else None)
        if settings.resume:
            runs.tidy(run)
    if settings.verbose > 0:
        print(f"{'Interrupted' if stop.requested else 'Finished'} at step {model.num_timesteps}, saved {run.final}")
