"""
Data layer: time to draw a batch, memory per transition, time to open a Minari dataset; ours and the peers'.

    uv run python benchmarks/data_speed.py

1. Sampling 32 pairs (s, s') of four stacked 84x84 frames, from 100,000 steps of Breakout (20,000 recorded, repeated),
   one thread, page cache warm: ours from RAM, from a memory map and from compressed blocks; the samplers of d3rlpy
   and tianshou over the same frames, and SB3's ReplayBuffer (5,000 ready-made stacks, because 100,000 are 5.6 GB).
   Blocks are interleaved; medians over blocks, quartiles as spread.
2. Memory: anonymous memory of a fresh process after loading those 100,000 steps (ours: and after drawing 200 batches)
   minus before, free heap given back, per transition. "Each further one" is the difference to loading 20,000 steps,
   without what the readers keep once. SB3's is arithmetic. Bytes on disk are those of our cache.
3. Opening 20,000 steps the first time and the second time, against Minari's own ``for ep in load_dataset(id):
   ep.observations``, for HDF5, Arrow and Parquet (raw frames); every time in a fresh process with the imports done,
   medians of 5.

--quick only shows that everything works. Nothing else should run on the machine. The first run records frames and
fetches the peers, which takes a few minutes more.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from speed import blocks
from speed.frames import FORMATS, environ, prepare, work_folder

STORAGES = ("ram", "mmap", "compressed")
PARTS = ("sampling", "memory", "opening")
STACK_BYTES = 4 * 84 * 84


def sampling(folder: Path, quick: bool) -> tuple[dict[str, Any], list[list[str]]]:
    """Part 1."""
    dataset, frames = "speed/tiled-v0", str(folder / "tiled")
    commands = {f"ours, {s}": blocks.own_command("sample", s, dataset, "1") for s in STORAGES}
    commands |= {peer: blocks.peer_command(peer, "sample", frames, "1") for peer in blocks.PEERS}
    commands["SB3 ReplayBuffer, 5,000 stacks"] = blocks.own_command("sample", "sb3", dataset, "1")
    contestants = [blocks.Contestant(name, c, 1, folder, environ(folder)) for name, c in commands.items()]
    try:
        rounds, steps, warm_up = (3, 20, 1) if quick else (31, 200, 10)
        blocks.measure(contestants, rounds, dict.fromkeys(commands, steps), warm_up)
    finally:
        for contestant in contestants:
            contestant.close()
    rows = []
    for contestant in contestants:
        ms = [1e3 * t for t in contestant.per_step()]
        low, high = blocks.spread(ms)
        goal = contestant.name in ("ours, ram", "ours, mmap")
        rows.append(
            [
                contestant.name,
                f"{blocks.middle(ms):.3f}" if ms else f"not available: {(contestant.error or '')[:60]}",
                f"{low:.3f} to {high:.3f}",
                f"{blocks.middle(blocks.ratios(contestant, contestants[1])):.2f}",
                "<= 0.16" if goal else "",
                blocks.verdict(blocks.middle(ms), 0.16, at_least=False) if goal else "",
            ]
        )
    return {c.name: c.raw() for c in contestants}, rows


class Opener:
    """The process that forks a fresh one for every job."""

    def __init__(self, folder: Path) -> None:
        self._worker = blocks.Contestant("openers", blocks.own_command(script="openers.py"), 1, folder, environ(folder))
        self._worker.wait_ready()
        if self._worker.error:
            raise RuntimeError(self._worker.error)

    def __call__(self, **job: Any) -> dict[str, Any]:
        """Run a job; see ``speed/openers.py``."""
        return self._worker.ask(json.dumps(job))

    def close(self) -> None:
        """End the process."""
        self._worker.close()


def _disk(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def memory(folder: Path, opener: Opener) -> tuple[dict[str, Any], list[list[str]]]:
    """Part 2."""
    raw: dict[str, Any] = {}
    rows = []
    for storage, goal in zip(STORAGES, (7300, 100, None), strict=True):
        cache = folder / f"cache-memory-{storage}"
        job = {"dataset": "speed/tiled-v0", "storage": storage, "cache": str(cache)}
        tiny = job | {"dataset": "speed/parquet-v0", "cache": str(cache) + "-small"}
        if storage != "ram":  # write the caches, so that the readers of the dataset are not counted
            opener(what="open", **job)
            opener(what="open", **tiny)
        found = raw[f"ours, {storage}"] = opener(what="memory", **job)
        if "error" in found:
            rows.append([f"ours, {storage}", f"not available: {found['error'][:60]}", "", "", "", ""])
            continue
        found["disk_bytes"] = _disk(cache) if cache.exists() else 0
        each, disk = found["private_bytes"] / found["transitions"], found["disk_bytes"] / found["frames"]
        small = found["small"] = opener(what="memory", **tiny)
        more = found["transitions"] - small["transitions"]
        found["marginal_bytes"] = (found["private_bytes"] - small["private_bytes"]) / more
        wanted, verdict = ("", "")
        if goal is not None:
            wanted, verdict = f"RAM <= {goal}", blocks.verdict(each, goal, at_least=False)
        elif storage == "compressed":
            wanted, verdict = "disk <= 400", blocks.verdict(disk, 400, at_least=False)
        marginal = f"{found['marginal_bytes']:,.0f}"
        rows.append([f"ours, {storage}", f"{each:,.0f}", marginal, f"{disk:,.0f}", wanted, verdict])
        shutil.rmtree(cache, ignore_errors=True)
        shutil.rmtree(tiny["cache"], ignore_errors=True)
    for peer in blocks.PEERS:
        contestant = blocks.Contestant(
            peer, blocks.peer_command(peer, "memory", str(folder / "tiled"), "1"), 1, folder, environ(folder)
        )
        try:
            found = raw[peer] = contestant.read()
            rows.append([peer, f"{found['private_bytes'] / found['transitions']:,.0f}", "", "", "", ""])
        except (RuntimeError, AssertionError) as error:
            raw[peer] = {"error": str(error)}
            rows.append([peer, f"not available: {str(error)[:60]}", "", "", "", ""])
        contestant.close()
    # two stacks, action int64, reward, done and timeout float32
    for name, stacks in (("SB3 (arithmetic)", 2), ("SB3, optimize_memory_usage (arithmetic)", 1)):
        each = stacks * STACK_BYTES + 20
        raw[name] = {"bytes_per_transition": each}
        rows.append([name, f"{each:,}", "", "", "", ""])
    return raw, rows


def opening(folder: Path, opener: Opener, repeats: int) -> tuple[dict[str, Any], list[list[str]]]:
    """Part 3."""
    raw: dict[str, dict[str, list[float]]] = {f: {} for f in FORMATS}

    def note(data_format: str, what: str, answer: dict[str, Any]) -> None:
        if "error" in answer:
            raise RuntimeError(f"{what} of {data_format}: {answer['error']}")
        raw[data_format].setdefault(what, []).append(answer["seconds"])

    for repeat in range(-1, repeats):  # the first round only warms the page cache
        for data_format in FORMATS:
            dataset = f"speed/{data_format}-v0"
            answers = {"Minari": opener(what="minari", dataset=dataset)}
            for storage in STORAGES:
                with tempfile.TemporaryDirectory(dir=folder, prefix="cache-") as cache:
                    job = {"what": "open", "dataset": dataset, "storage": storage, "cache": cache}
                    answers[f"first, {storage}"] = opener(**job)
                    if storage != "ram":
                        answers[f"second, {storage}"] = opener(**job)
            if repeat >= 0:
                for what, answer in answers.items():
                    note(data_format, what, answer)
    return dict(raw), [row for data_format, times in raw.items() for row in _opening_rows(data_format, times)]


def _opening_rows(data_format: str, times: dict[str, list[float]]) -> list[list[str]]:
    rows = []
    for what, seconds in times.items():
        low, high = blocks.spread([1e3 * s for s in seconds])
        ratio = blocks.middle([a / b for a, b in zip(seconds, times["Minari"], strict=True)])
        wanted, verdict = "", ""
        if what.startswith("first"):
            wanted, verdict = "<= 2 x", blocks.verdict(ratio, 2, at_least=False)
        elif what.startswith("second"):
            wanted, verdict = "<= 50 ms", blocks.verdict(1e3 * blocks.middle(seconds), 50, at_least=False)
        name = f"{data_format}: {'Minari, iterate' if what == 'Minari' else 'ours, ' + what}"
        median = f"{1e3 * blocks.middle(seconds):.1f}"
        rows.append([name, median, f"{low:.1f} to {high:.1f}", f"{ratio:.2f}", wanted, verdict])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny: does everything run?")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some of the parts")
    parser.add_argument("--work", type=Path, help="folder that keeps the frames (default: in the temporary folder)")
    parser.add_argument("--out", type=Path, help="results file (default: benchmarks/results/speed; --quick: in --work)")
    args = parser.parse_args()

    started = time.time()
    folder = work_folder(args.work, args.quick)
    prepare(folder, args.quick)
    results: dict[str, Any] = {"benchmark": "data_speed", "quick": args.quick, "machine": blocks.machine()}
    results["versions"] = blocks.versions("sb3-ext", "stable-baselines3", "minari", "torch", "numpy", "h5py", "pyarrow")

    def section(part: str, title: str, header: list[str], found: tuple[dict[str, Any], list[list[str]]]) -> None:
        results[part] = found[0]
        print(f"\n{title}\n\n{blocks.table(header, found[1])}", flush=True)

    if "sampling" in args.only:
        header = ["batch of 32 (s, s')", "ms", "quartiles", "time / ours, mmap", "wanted", ""]
        section("sampling", "Sampling", header, sampling(folder, args.quick))
    opener = Opener(folder)
    try:
        if "memory" in args.only:
            header = ["memory", "bytes per transition", "each further one", "disk bytes per frame", "wanted", ""]
            section("memory", "Memory", header, memory(folder, opener))
        if "opening" in args.only:
            header = ["opening", "ms", "quartiles", "time / Minari", "wanted", ""]
            section("opening", "Opening a dataset", header, opening(folder, opener, 1 if args.quick else 5))
    finally:
        opener.close()
    results["seconds"] = round(time.time() - started)
    out = args.out or (folder if args.quick else Path(__file__).parent / "results" / "speed") / "data_speed.json"
    blocks.write_results(out, results)


if __name__ == "__main__":
    main()
