"""
Vectors and observations with entries: time to draw a batch, and to open a large Minari dataset.

    uv run --all-extras benchmarks/entries_speed.py

1. Drawing 32 transitions from 100,000: ``Dict`` observations with three entries (27 + 2 + 2 numbers, as antmaze's)
   against one vector of as many numbers, from RAM and from a memory map. Blocks alternate; the ratio is the median over
   rounds.
2. Opening 1,000 episodes of 1,000 steps with Hopper's 11 numbers, 3 actions and the infos that Minari's set has, the
   first time: against ``for episode in minari.load_dataset(id): episode.observations``, HDF5, both in turn, 5 times,
   every time in a fresh process with the imports done.

One thread. --quick only shows that everything works.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import minari
import numpy as np
import torch as th
from gymnasium import spaces
from minari.data_collector.episode_buffer import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage
from minari.storage.datasets_root_dir import get_dataset_path
from speed import blocks

from sb3_ext import load_minari

PARTS = {"achieved_goal": 2, "desired_goal": 2, "observation": 27}
RESULT = Path(__file__).resolve().parent / "results" / "speed" / "entries.json"


def write(dataset_id: str, space: spaces.Space[Any], n_episodes: int, steps: int, infos: bool = False) -> str:
    """Write a dataset of noise; its id."""
    rng, path = np.random.default_rng(0), get_dataset_path(dataset_id) / "data"
    path.parent.mkdir(parents=True)
    storage = MinariStorage.new(path, observation_space=space, action_space=spaces.Box(-1, 1, (3,)), data_format="hdf5")

    def draw(n: int, entry: Any) -> Any:
        if isinstance(entry, spaces.Dict):
            return {key: draw(n, part) for key, part in entry.spaces.items()}
        return rng.normal(size=(n, *entry.shape))

    def episodes() -> Any:
        for number in range(n_episodes):
            last = np.arange(steps) == steps - 1
            more = {"x_position": rng.normal(size=steps + 1), "qpos": rng.normal(size=(steps + 1, 6))}
            yield EpisodeBuffer(
                id=number,
                observations=draw(steps + 1, space),
                actions=rng.uniform(-1, 1, (steps, 3)).astype(np.float32),
                rewards=rng.normal(size=steps),
                terminations=last,
                truncations=np.zeros(steps, bool),
                infos=more if infos else None,
            )

    storage.update_episodes(episodes())
    storage.update_metadata({"dataset_id": dataset_id, "minari_version": minari.__version__})
    return dataset_id


def drawing(quick: bool) -> dict[str, Any]:
    """Part 1: seconds per batch of every block."""
    n = 5 if quick else 100
    entries = spaces.Dict({key: spaces.Box(-np.inf, np.inf, (size,), np.float64) for key, size in PARTS.items()})
    flat = spaces.Box(-np.inf, np.inf, (sum(PARTS.values()),), np.float64)
    names = write("entries/dict-v0", entries, n, 1000), write("entries/flat-v0", flat, n, 1000)
    found: dict[str, Any] = {}
    for storage in ("ram", "mmap"):
        buffers = [load_minari(name, storage=storage, device="cpu", seed=0) for name in names]
        times: list[list[float]] = [[], []]
        for _ in range(3 if quick else 41):
            for buffer, mine in zip(buffers, times, strict=True):
                start = time.perf_counter()
                for _ in range(20 if quick else 500):
                    buffer.sample(32)
                mine.append((time.perf_counter() - start) / (20 if quick else 500))
        found[storage] = {"dict": times[0], "flat": times[1]}
    return found


def _in_a_child(function: Any) -> float:
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        start = time.perf_counter()
        function()
        os.write(into, str(time.perf_counter() - start).encode())
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return float(text)


def opening(folder: Path, quick: bool) -> dict[str, list[float]]:
    """Part 2: seconds of every time."""
    space = spaces.Box(-np.inf, np.inf, (11,), np.float64)
    name = write("entries/hopper-v0", space, 20 if quick else 1000, 1000, infos=True)
    times: dict[str, list[float]] = {"Minari, iterate": [], "ours, ram": [], "ours, mmap": []}

    def iterate() -> None:
        for episode in minari.load_dataset(name):
            assert len(episode.observations)

    for _ in range(1 if quick else 5):
        times["Minari, iterate"].append(_in_a_child(iterate))
        for storage in ("ram", "mmap"):
            cache = folder / "opened"
            times[f"ours, {storage}"].append(
                _in_a_child(lambda s=storage, c=cache: load_minari(name, storage=s, cache_dir=c, device="cpu"))
            )
            shutil.rmtree(cache, ignore_errors=True)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny: does everything run?")
    args = parser.parse_args()
    th.set_num_threads(1)
    started = time.time()
    with tempfile.TemporaryDirectory() as place:
        os.environ["MINARI_DATASETS_PATH"] = os.path.join(place, "datasets")
        os.environ["SB3_EXT_CACHE"] = os.path.join(place, "cache")
        machine, drawn = blocks.machine(), drawing(args.quick)
        opened = opening(Path(place), args.quick)
    rows = []
    for storage, times in drawn.items():
        ratio = statistics.median(a / b for a, b in zip(times["dict"], times["flat"], strict=True))
        us = [f"{1e6 * statistics.median(times[what]):.1f}" for what in ("dict", "flat")]
        rows.append([storage, *us, f"{ratio:.2f}", "<= 1.20", blocks.verdict(ratio, 1.2, at_least=False)])
    print(blocks.table(["batches of 32", "Dict, us", "vector, us", "ratio", "wanted", ""], rows))
    rows, minaris = [], opened["Minari, iterate"]
    for what, seconds in opened.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, minaris, strict=True))
        goal = ["<= 2.00", blocks.verdict(ratio, 2, at_least=False)] if what.startswith("ours") else ["", ""]
        rows.append([what, f"{statistics.median(seconds):.2f}", f"{ratio:.2f}", *goal])
    print("\n" + blocks.table(["opening 1,000,000 steps", "s", "ratio", "wanted", ""], rows))
    if not args.quick:
        versions = blocks.versions("sb3-ext", "minari", "torch", "numpy", "h5py")
        facts = {"benchmark": "entries_speed", "machine": machine, "versions": versions}
        blocks.write_results(RESULT, {**facts, "drawing": drawn, "opening": opened, "seconds": time.time() - started})


if __name__ == "__main__":
    main()
