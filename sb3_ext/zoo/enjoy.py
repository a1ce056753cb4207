"""``sb3x enjoy``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv
from tqdm import tqdm

from sb3_ext.zoo.config import BY_ACTIONS, Algo, ZooError, for_actions, load_algo, one_line_errors
from sb3_ext.zoo.runs import Run, find_run, list_runs, slug
from sb3_ext.zoo.settings import EnjoySettings
from sb3_ext.zoo.tasks import Task, check_env_id, find_task, is_atari, make_model_envs, use_threads

_INSTALL = 'pip install "sb3-ext[report]"'


def enjoy(settings: EnjoySettings) -> None:
    """Play with a trained agent."""
    algo = load_algo(settings.algo)
    if settings.video:
        _check_video(settings.video)
    with one_line_errors():
        task, algo = _find_task(settings, algo)
        run = find_run(settings.folder, algo.name, slug(task.name), settings.exp_id)
        path = _choose_model(settings, run)
        set_random_seed(settings.seed)
        use_threads(settings.num_threads)
        # nothing is learned, so the smallest buffer will do
        kwargs: dict[str, Any] = {"buffer_size": 1} if algo.replays else {}
        model = algo.cls.load(path, device=settings.device, **kwargs)
        if settings.verbose > 0:
            print(f"Loading {path} ({model.num_timesteps} steps)")
        trained = run.read("config")
        transforms = settings.transforms or run.read("args").get("transforms")
        stack = (trained.get("dataset_kwargs") or {}).get("frame_stack") or trained.get("frame_stack")

    def make(render_mode: str | None) -> VecEnv:
        with one_line_errors():
            return make_model_envs(
                task,
                model,
                build_env=settings.build_env,
                n_envs=settings.n_envs,
                seed=settings.seed,
                frame_stack=stack,
                transforms=transforms,
                render_mode=render_mode,
            )

    env, observation = _open(settings, make)
    deterministic = settings.deterministic or not (settings.stochastic or task.atari)
    try:
        with _video(settings.video, env) as on_frame:
            returns, lengths = _play(settings, model, env, observation, deterministic, on_frame)
    finally:
        env.close()
    if settings.verbose > 0:
        if settings.video:
            print(f"Video: {settings.video}")
        if returns:
            print(f"{len(returns)} Episodes")
            print(f"Mean reward: {np.mean(returns):.2f} +/- {np.std(returns):.2f}")
            print(f"Mean episode length: {np.mean(lengths):.2f} +/- {np.std(lengths):.2f}")
        else:
            print(f"No episode ended within {settings.n_timesteps} steps; play more with -n.")


def _find_task(settings: EnjoySettings, algo: Algo) -> tuple[Task, Algo]:
    """
    Like :func:`find_task`, but an offline agent may also be found by the environment of its dataset.

    The algorithm is the one that the name means for the dataset's actions.
    """
    if not algo.offline or settings.dataset or not settings.env:
        task = find_task(settings, algo, download=False)
        return task, for_actions(algo, task.actions)
    check_env_id(settings.env)
    meant = [algo, *map(load_algo, BY_ACTIONS.get(algo.name, {}).values())]
    runs = [(run, one) for one in meant for run in list_runs(settings.folder, one.name)]
    fitting = {run.name: one for run, one in runs if run.read("args").get("env") == settings.env}
    if len(fitting) > 1:
        names = ", ".join(sorted(fitting))
        raise ZooError(f"There are runs of several datasets of {settings.env}: {names}; pass --dataset.")
    name, algo = next(iter(fitting.items()), (settings.env, algo))
    return Task(name, None, settings.env, settings.env, is_atari(settings.env)), algo


def _choose_model(settings: EnjoySettings, run: Run) -> Path:
    there = run.checkpoints()
    if settings.load_best:
        path = run.best
    elif settings.load_checkpoint is not None:
        path = run.path / f"rl_model_{settings.load_checkpoint}_steps.zip"
    elif settings.load_last_checkpoint:
        if not there:
            raise ZooError(f"There is no checkpoint in {run.path}.")
        path = there[max(there)]
    else:
        path = run.final
    if not path.is_file():
        steps = ", ".join(map(str, there)) or "none"
        raise ZooError(f"There is no model {path.name} in {run.path}; checkpoints there: {steps}.")
    return path


def _open(settings: EnjoySettings, make: Callable[[str | None], VecEnv]) -> tuple[VecEnv, Any]:
    """Build the environment and reset it, with a window if one is asked for and can be opened."""
    reason = ""
    if settings.render:
        if sys.platform != "linux" or any(v in os.environ for v in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER")):
            env = make("human")
            try:
                return env, env.reset()
            except Exception as error:  # whatever the environment's graphics library raises
                env.close()
                reason = " ".join(str(error).split())
        print(f"No window can be opened ({reason or 'there is no display'}); going on without. --video FILE.gif works.")
    env = make("rgb_array" if settings.video else None)
    return env, env.reset()


def _play(
    settings: EnjoySettings,
    model: BaseAlgorithm,
    env: VecEnv,
    observation: Any,
    deterministic: bool,
    on_frame: Callable[[], None],
) -> tuple[list[float], list[int]]:
    """Returns (before any clipping) and lengths of the episodes that end."""
    returns: list[float] = []
    lengths: list[int] = []
    state = None
    starts = np.ones(env.num_envs, bool)
    on_frame()
    try:
        for _ in tqdm(range(settings.n_timesteps), disable=not settings.progress):
            action, state = model.predict(observation, state, starts, deterministic)
            observation, _, starts, infos = env.step(action)
            on_frame()
            for episode in (info["episode"] for info in infos if "episode" in info):
                returns.append(float(episode["r"]))
                lengths.append(int(episode["l"]))
                if settings.verbose > 0:
                    print(f"Episode Reward: {episode['r']:.2f}\nEpisode Length {episode['l']}")
    except KeyboardInterrupt:
        pass
    return returns, lengths


def _check_video(file: str) -> None:
    needs = {".gif": ["imageio"], ".mp4": ["imageio", "imageio_ffmpeg"]}.get(Path(file).suffix.lower())
    if needs is None:
        raise ZooError(f"--video: the file must end in .gif or .mp4, got {file}.")
    missing = [name for name in needs if find_spec(name) is None]
    if missing:
        raise ZooError(f"--video needs {' and '.join(missing)}: {_INSTALL}")


@contextmanager
def _video(file: str | None, env: VecEnv) -> Iterator[Callable[[], None]]:
    """Give a function that adds a picture of the first environment to the file, or does nothing."""
    if not file:
        yield lambda: None
        return
    import imageio.v2

    fps = int(env.get_attr("metadata")[0].get("render_fps", 30))
    gif = Path(file).suffix.lower() == ".gif"
    options: dict[str, Any] = {"duration": 1000 / fps, "loop": 0} if gif else {"fps": fps, "macro_block_size": 2}
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    writer: Any
    with imageio.v2.get_writer(file, mode="I", **options) as writer:

        def on_frame() -> None:
            image = env.get_images()[0]
            if image is None:
                raise ZooError("The environment cannot be drawn (it gives no rgb_array).")
            writer.append_data(image)

        yield on_frame
