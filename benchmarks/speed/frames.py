"""Real Breakout frames for the speed benchmarks, recorded once and kept in the work folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

FORMATS = ("hdf5", "arrow", "parquet")


def work_folder(work: Path | None, quick: bool) -> Path:
    """Folder that keeps frames and datasets between runs; everything in it can be deleted at any time."""
    base = work if work is not None else Path(tempfile.gettempdir()) / "sb3_ext_speed"
    folder = base.resolve() / ("quick" if quick else "full")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def environ(folder: Path) -> dict[str, str]:
    """Environment variables that keep datasets and caches inside the work folder."""
    return {"MINARI_DATASETS_PATH": str(folder / "minari"), "SB3_EXT_CACHE": str(folder / "cache")}


def tracking_player(env: gym.Env[Any, Any], seed: int = 0) -> Callable[[Any], int]:
    """Breakout player that reads ball and paddle from the console's RAM; every tenth action is random."""
    rng = np.random.default_rng(seed)

    def act(_observation: Any) -> int:
        ram = env.unwrapped.ale.getRAM()  # type: ignore[attr-defined]
        ball, paddle, in_play = int(ram[99]), int(ram[72]), int(ram[101]) != 0
        if rng.random() < 0.1:
            return int(rng.integers(4))
        if not in_play:
            return 1  # fire
        return 2 if ball > paddle + 8 else 3 if ball < paddle + 2 else 0

    return act


def prepare(folder: Path, quick: bool) -> None:
    """
    Record the datasets and export their frames, if that was not done yet.

    ``speed/<format>-v0`` hold the recorded episodes in each of Minari's formats, ``speed/tiled-v0`` repeats them until
    there are ``tiled`` steps. The folders ``frames`` and ``tiled`` hold the same as plain arrays for the peers:
    ``frames.npy`` with T + 1 frames per episode of T steps, and ``arrays.npz``.

    :param folder: the work folder
    :param quick: far too little to measure anything
    """
    # steps to record, in whole episodes; where an episode is cut; steps of the large dataset
    steps, episode_steps, tiled = (1500, 300, 3000) if quick else (20_000, 1000, 100_000)
    marker = folder / f"recorded-{steps}-{episode_steps}-{tiled}"
    os.environ.update(environ(folder))
    if marker.exists():
        return
    from sb3_ext.data import collect_episodes, make_atari_env, write_dataset

    print(f"recording {steps} steps of Breakout into {folder} ...", flush=True)
    env = gym.wrappers.TimeLimit(make_atari_env("Breakout"), episode_steps)
    episodes = collect_episodes(tracking_player(env), env, n_steps=steps, seed=0)
    about = {
        "algorithm_name": "RAM-tracking player",
        "description": "Frames for speed measurements.",
        "overwrite": True,
    }
    for data_format in FORMATS:
        write_dataset(f"speed/{data_format}-v0", episodes, env, data_format=data_format, **about)

    def repeated() -> Iterator[Any]:
        written = 0
        while written < tiled:
            for episode in episodes:
                yield episode
                written += len(episode.rewards)

    write_dataset("speed/tiled-v0", repeated(), env, data_format="parquet", **about)
    _export("speed/parquet-v0", folder / "frames")
    _export("speed/tiled-v0", folder / "tiled")
    marker.touch()


def _export(dataset_id: str, folder: Path) -> None:
    import minari

    folder.mkdir(exist_ok=True)
    dataset = minari.load_dataset(dataset_id)
    n_rows = int(dataset.total_steps + dataset.total_episodes)
    frames = np.lib.format.open_memmap(folder / "frames.npy", "w+", np.uint8, (n_rows, 84, 84))
    actions, rewards, terminated, lengths, used = [], [], [], [], 0
    for episode in dataset:
        frames[used : used + len(episode.observations)] = episode.observations
        used += len(episode.observations)
        actions.append(np.append(episode.actions, 0))
        rewards.append(np.append(episode.rewards, 0))
        terminated.append(np.append(episode.terminations, False))
        lengths.append(len(episode.rewards))
    assert used == n_rows
    frames.flush()
    np.savez(
        folder / "arrays.npz",
        actions=np.concatenate(actions).astype(np.int64),
        rewards=np.clip(np.concatenate(rewards), -1, 1).astype(np.float32),
        terminated=np.concatenate(terminated),
        lengths=np.array(lengths),
    )
