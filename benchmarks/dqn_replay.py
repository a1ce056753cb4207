"""
Converting a log of the DQN Replay Dataset's format: frames per second, memory, size, and a 1 % subset of 50 files.

    uv run --all-extras benchmarks/dqn_replay.py
    uv run --all-extras benchmarks/dqn_replay.py --play        # every row is played: about 8 minutes of CPU more

1. A file of a million rows (--rows) is written by ``ReplayLog``: 20,000 steps of Breakout by a player that follows the
   ball and moves at random 30 % of the time, again and again until the file is full. With --play ``ReplayLogger`` logs
   the player's games until then; the emulator and the player are part of the time.
2. ``gunzip`` of its frames to nowhere is the floor; the conversion, checksums included, runs in one process. Both CPU
   seconds. Memory is the largest resident set of the process, and how much of it the imports had taken before.
3. 10,000 transitions drawn at random are compared with the source bit for bit.
4. 50 links to the file stand for 50 files: the first 10,000 rows of each, without checksums, against loading a file
   whole with ``numpy.load`` (timed once, times 50); CPU seconds.
5. The largest resident set for the longest episode that Dopamine logs, 27,000 steps, of noise, which does not shrink
   when it is compressed. --longest does this alone and adds it to the results.

It takes about ten minutes and 1 GB of disk; the log is kept in --work.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from speed import blocks

from sb3_ext.data import ReplayLog, ReplayLogger, collect_episodes, make_atari_env

sys.path.insert(0, str(Path(__file__).parents[1] / "datasets"))
from breakout_scripted import scripted_player

SHARDS = 50
JOB = """
import json, sys, time
from pathlib import Path
from sb3_ext.data import convert_dqn_replay, make_atari_env
folder, name, subset, fraction, verify = sys.argv[1:]
make_atari_env("Breakout")
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM"))
before = peak()
wall, cpu = time.perf_counter(), time.process_time()
options = {"subset": subset, "fraction": float(fraction)} if subset else {}
dataset = convert_dqn_replay(folder, name, game="Breakout", verify=verify == "yes", overwrite=True, **options)
print(json.dumps({
    "seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu, "steps": dataset.total_steps,
    "episodes": dataset.total_episodes, "peak_mb": peak(), "imports_mb": before,
    "megabytes": float(dataset.storage.metadata["dataset_size"]),
}))
"""


def repeat_games(folder: Path, rows: int) -> float:
    """Write the file from a few games; return the CPU seconds."""
    env = make_atari_env("Breakout")
    episodes = collect_episodes(scripted_player(env, 0.3, 0), env, n_steps=20_000, seed=0)
    start, added = time.process_time(), 0
    log = ReplayLog(folder, (84, 84), rows)
    while added < rows - 1:
        for episode in episodes:
            frames, last = episode.observations, len(episode.actions) - 1
            added += 3
            for t in range(min(last + 1, max(rows - 1 - added, 0))):
                log.add(frames[t], int(episode.actions[t]), float(np.clip(episode.rewards[t], -1, 1)), t == last)
            added += last + 1
    return time.process_time() - start


def play_games(folder: Path, rows: int) -> float:
    """Play until the file is full; return the CPU seconds."""
    start = time.process_time()
    env = ReplayLogger(make_atari_env("Breakout"), folder.parents[2], "Breakout", capacity=rows)
    player, done, seed = scripted_player(env, 0.3, 0), True, 0
    while not (folder / "add_count_ckpt.0.gz").exists():
        if done:
            observation, _ = env.reset(seed=seed)
            seed += 1
        observation, _, terminated, truncated, _ = env.step(player(observation))
        done = terminated or truncated
    return time.process_time() - start


def make_log(folder: Path, rows: int, play: bool) -> float:
    """Write the file; return the CPU seconds."""
    seconds = (play_games if play else repeat_games)(folder, rows)
    # not closed: a second, almost empty file would be written; its beginning is removed
    for part in folder.glob(".*"):
        part.unlink(missing_ok=True)
    return seconds


def longest_episode(work: Path) -> dict[str, Any]:
    """Convert a log of one episode of 27,000 frames of noise."""
    shutil.rmtree(work / "longest", ignore_errors=True)
    log = ReplayLog(work / "longest" / "Breakout" / "1" / "replay_logs", (84, 84), 30_000, level=1)
    rng = np.random.default_rng(0)
    for step in range(27_000):
        log.add(rng.integers(0, 256, (84, 84), np.uint8), 1, 0.0, step == 26_999)
    log.close()
    return job(work / "longest", "bench/longest-v0")


def job(folder: Path, name: str, subset: str = "", fraction: float = 1.0, verify: bool = True) -> dict[str, Any]:
    """Convert in a fresh process."""
    words = [sys.executable, "-c", JOB, str(folder), name, subset, str(fraction), "yes" if verify else "no"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(folder: Path, name: str, rows: int, n: int) -> dict[str, int]:
    """Compare transitions drawn at random, and all returns, with the arrays that ``numpy.load`` reads."""
    arrays = {}
    for store in ("observation", "action", "reward", "terminal"):
        with gzip.open(folder / f"$store$_{store}_ckpt.0.gz") as file:
            arrays[store] = np.load(file)
    import minari

    dataset = minari.load_dataset(name)
    ends = np.flatnonzero(arrays["terminal"][: rows - 1])
    starts = np.concatenate([[3], ends + 4])
    lengths = np.array([m["total_steps"] for m in dataset.storage.get_episode_metadata(range(dataset.total_episodes))])
    chosen = np.random.default_rng(0).integers(dataset.total_steps, size=n)
    owners = np.searchsorted(np.cumsum(lengths), chosen, side="right")
    first = np.cumsum(lengths) - lengths
    different = wrong_returns = 0
    for number in range(dataset.total_episodes):
        mine_rows = starts[number] + np.arange(lengths[number])
        mine = chosen[owners == number] - first[number]
        if not len(mine) and number % 10:
            continue
        episode = dataset[number]
        wrong_returns += episode.rewards.sum() != arrays["reward"][mine_rows].sum()
        for t in mine:
            row = mine_rows[t]
            follows = row + 1 if not arrays["terminal"][row] else row
            same = (
                np.array_equal(episode.observations[t], arrays["observation"][row])
                and np.array_equal(episode.observations[t + 1], arrays["observation"][follows])
                and episode.actions[t] == arrays["action"][row]
                and episode.rewards[t] == arrays["reward"][row]
                and episode.terminations[t] == arrays["terminal"][row]
            )
            different += not same
    return {"transitions": n, "different": different, "wrong_returns": int(wrong_returns)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the file")
    parser.add_argument("--play", action="store_true", help="play every row instead of repeating 20,000 of them")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "sb3_ext_dqn_replay"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "speed" / "dqn_replay.json")
    parser.add_argument("--longest", action="store_true", help="see 5")
    args = parser.parse_args()
    os.environ["MINARI_DATASETS_PATH"] = str(args.work / "datasets")
    results: dict[str, Any] = {"benchmark": "dqn_replay", "machine": blocks.machine()}
    results["versions"] = blocks.versions("sb3-ext", "minari", "numpy", "pyarrow")
    if args.longest:
        results = json.loads(args.out.read_text())
        results["longest_episode"] = longest_episode(args.work)
        print(json.dumps(results["longest_episode"], indent=1))
        blocks.write_results(args.out, results)
        return
    results |= {"rows": args.rows, "played": args.play}
    log = args.work / f"{'play' if args.play else 'log'}-{args.rows}"
    folder = log / "Breakout" / "1" / "replay_logs"
    if not (folder / "add_count_ckpt.0.gz").exists():
        shutil.rmtree(folder, ignore_errors=True)
        results["writing_cpu_seconds"] = make_log(folder, args.rows, args.play)
    frames = folder / "$store$_observation_ckpt.0.gz"
    results["source_bytes_per_frame"] = frames.stat().st_size / args.rows

    before = os.times()
    subprocess.run(["gunzip", "-c", str(frames)], stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    floor = after.children_user + after.children_system - before.children_user - before.children_system
    whole = job(log, "bench/whole-v0")
    whole |= {"gunzip_cpu_seconds": floor, "cpu_ratio_to_gunzip": whole["cpu_seconds"] / floor}
    whole |= {"frames_per_cpu_second": args.rows / whole["cpu_seconds"]}
    whole["bytes_per_frame"] = 1e6 * whole["megabytes"] / args.rows
    results["whole"] = whole
    print(json.dumps(whole, indent=1), flush=True)

    results["comparison"] = compare(folder, "bench/whole-v0", args.rows, 10_000)
    print(results["comparison"], flush=True)

    shards = args.work / "shards" / "Breakout" / "1" / "replay_logs"
    shutil.rmtree(shards, ignore_errors=True)
    shards.mkdir(parents=True)
    for k in range(SHARDS):
        for path in folder.glob("*_ckpt.0.gz"):
            target = shards / path.name.replace(".0.gz", f".{k}.gz")
            if path.name.startswith("add_count"):
                with gzip.open(target, "wb") as file:
                    np.save(file, np.array(args.rows * k + args.rows - 1))
            else:
                os.link(path, target)
    start = time.process_time()
    with gzip.open(frames) as file:
        np.load(file)
    loading = time.process_time() - start
    subset = job(args.work / "shards", "bench/one-percent-v0", "author", 0.01, verify=False)
    subset |= {"load_one_file_cpu_seconds": loading}
    subset |= {"times_faster_cpu": SHARDS * loading / subset["cpu_seconds"]}
    results["one_percent"] = subset
    print(json.dumps(subset, indent=1), flush=True)
    results["longest_episode"] = longest_episode(args.work)
    results["load_average_after"] = os.getloadavg()
    blocks.write_results(args.out, results)


if __name__ == "__main__":
    main()
