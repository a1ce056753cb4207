"""
Prioritized replay: ours beside cpprb, TorchRL, tianshou and SB3's uniform buffer.

    uv run --all-extras benchmarks/per.py

1. index: draw indices and weights, give new priorities back; no observations. cpprb draws a payload of one byte.
2. add: one transition of four floats, one environment, into a full buffer of 100,000.
3. buffer: the same as 1 through ``sample()`` and ``update_priorities``, with four-float observations. Ours and SB3 give
   torch tensors, TorchRL a TensorDict, cpprb and tianshou numpy arrays.
4. frames: the same with 4x84x84 stacks out of 100,000 steps that keep each frame once (TorchRL is not there: it keeps
   stacks); SB3's uniform buffer has 5,000 ready stacks, because 100,000 are 5.6 GB. And our anonymous memory per
   transition in a fresh process, as in data_speed.py.
5. kernels: the first use of the sum tree in a fresh process after ``import sb3_ext``, with and without numba's cache.
6. train: gradient steps of DQN on CartPole's network and 50,000 random transitions, ``train(1, 32)``.
7. memory: bytes of all arrays beyond those of SB3's uniform buffer, four-float observations.

Priorities are heavy-tailed, buffers full and touched, one thread. Blocks are interleaved, all of about the same time;
medians over blocks, quartiles as spread; ratios are medians of ratios within a round. "Fastest peer" is the peer with
the smallest median; "others" is the share of the machine that other processes used meanwhile.

--quick only shows that everything works. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speed import blocks

PEERS = {
    "cpprb": ("cpprb==11.0.0",),
    # its C++ trees load beside some versions of torch only
    "torchrl": ("torchrl==0.14.1", "torch==2.15.0"),
    "tianshou": ("tianshou==2.0.1",),
}
SCRIPT = "per_workers.py"
PARTS = ("index", "add", "buffer", "frames", "kernels", "train", "memory")
BATCHES = (32, 256, 1024)
FASTEST = "fastest peer"
INDEX_GOALS = {32: 0.35, 256: 0.65, 1024: 0.9}
BUFFER_GOALS = {FASTEST: 0.55, "sb3": 1.0}

Found = tuple[Any, list[list[str]]]


class Key(blocks.Contestant):
    """
    One step function of a worker that serves several, see ``speed/per_workers.py``.

    :param worker: the process
    :param key: which step function
    """

    def __init__(self, worker: blocks.Contestant, key: str) -> None:
        self.worker, self.key, self.name = worker, key, worker.name
        self.meta, self.error, self.blocks = {}, None, []

    def wait_ready(self) -> None:
        """Wait for the process, unless another one did."""
        if not self.worker.meta:
            self.worker.wait_ready()
        self.meta, self.error = self.worker.meta, self.worker.error

    def ask(self, line: str) -> dict[str, Any]:
        """See :meth:`blocks.Contestant.ask`; the key comes first."""
        return self.worker.ask(f"{self.key} {line}")


class Bench:
    """
    What all parts share.

    :param folder: for logs and caches
    :param quick: far too little to measure anything
    """

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder, self.quick = folder, quick
        self.rounds, self.warm_up, self.seconds = (3, 0, 0.005) if quick else (21, 2, 0.1)

    def size(self, size: int) -> int:
        """Capacity."""
        return max(size // 50, 2000) if self.quick else size

    def worker(self, name: str, task: str, size: int, environ: dict[str, str] | None = None) -> blocks.Contestant:
        """Start a worker."""
        arguments = (name, task, str(self.size(size)))
        if name in PEERS:
            command = blocks.peer_command(*arguments, script=SCRIPT, packages=PEERS[name])
        else:
            command = blocks.own_command(*arguments, script=SCRIPT)
        return blocks.Contestant(name, command, 1, self.folder, environ)

    def once(self, task: str, size: int = 0, environ: dict[str, str] | None = None) -> dict[str, Any]:
        """Answer of a fresh process of ours that does one thing."""
        worker = self.worker("ours", task, size, environ)
        try:
            return worker.read()
        finally:
            worker.close()

    def race(self, names: Sequence[str], task: str, size: int, keys: Sequence[str]) -> dict[str, list[Key]]:
        """Measure workers against each other, one key after the other."""
        print(f"\n{task}, {size:,}: {', '.join(names)}", flush=True)
        workers = [self.worker(name, task, size) for name in names]
        found = {key: [Key(worker, key) for worker in workers] for key in keys}
        try:
            for contestants in found.values():
                steps = {c.name: self._steps(c) for c in contestants}
                blocks.measure(contestants, self.rounds, steps, self.warm_up)
        finally:
            for worker in workers:
                worker.close()
        return found

    def _steps(self, contestant: Key) -> int:
        """Steps that fill a block."""
        contestant.wait_ready()
        contestant.block(20, keep=False)
        contestant.block(20)
        if contestant.error:
            return 1
        return max(1, round(self.seconds / contestant.per_step().pop()))


def rows_of(title: str, contestants: list[Key], goals: dict[str, float]) -> list[list[str]]:
    """
    One row per contestant, ours first.

    :param title: comes before the name
    :param contestants: measured
    :param goals: largest wanted ratio of our time to theirs, by name or :data:`FASTEST`
    """
    ours = contestants[0]
    peers = [c for c in contestants if c.name in PEERS and c.blocks]
    fastest = min(peers, key=lambda c: blocks.middle(c.per_step()), default=None)
    rows = []
    for contestant in contestants:
        us = [1e6 * t for t in contestant.per_step()]
        low, high = blocks.spread(us)
        ratio = blocks.middle(blocks.ratios(ours, contestant))
        goal, wanted = goals.get(contestant.name), ""
        if contestant is fastest and FASTEST in goals:
            goal, wanted = goals[FASTEST], f"{FASTEST}: "
        rows.append(
            [
                f"{title}: {contestant.name}",
                f"{blocks.middle(us):,.2f}" if us else f"not available: {(contestant.error or '')[:60]}",
                f"{low:,.2f} to {high:,.2f}" if us else "",
                f"{ratio:.2f}" if us else "",
                f"{100 * statistics.fmean(b['other_load'] for b in contestant.blocks):.0f} %" if us else "",
                f"{wanted}<= {goal:.2f}" if goal else "",
                blocks.verdict(ratio, goal, at_least=False) if goal else "",
            ]
        )
    if fastest is None and FASTEST in goals:
        rows[0][-2:] = [f"{FASTEST}: <= {goals[FASTEST]:.2f}", "not measured"]
    return rows


def raw_of(contestants: list[Key]) -> dict[str, Any]:
    """Everything measured."""
    return {c.name: c.raw() for c in contestants}


def index(bench: Bench) -> Found:
    """Part 1."""
    raw, rows = {}, []
    for size in (1_000_000, 100_000):
        found = bench.race(["ours", *PEERS], "index", size, [str(b) for b in BATCHES])
        for batch in BATCHES:
            goals = {FASTEST: INDEX_GOALS[batch]} if size == 1_000_000 else {}
            raw[f"{size}, {batch}"] = raw_of(found[str(batch)])
            rows += rows_of(f"{size:,}, batch {batch}", found[str(batch)], goals)
    return raw, rows


def add(bench: Bench) -> Found:
    """Part 2."""
    found = bench.race(["ours", "sb3", *PEERS], "add", 100_000, ["add"])["add"]
    return raw_of(found), rows_of("add", found, {"sb3": 1.3})


def buffer(bench: Bench) -> Found:
    """Part 3."""
    found = bench.race(["ours", "sb3", *PEERS], "buffer", 1_000_000, [str(b) for b in BATCHES])
    raw, rows = {}, []
    for batch in BATCHES:
        raw[str(batch)] = raw_of(found[str(batch)])
        rows += rows_of(f"batch {batch}", found[str(batch)], BUFFER_GOALS if batch == 32 else {})
    return raw, rows


def frames(bench: Bench) -> Found:
    """Part 4."""
    found = bench.race(["ours", "sb3", "cpprb", "tianshou"], "frames", 100_000, ["32"])["32"]
    rows = rows_of("batch 32", found, {"cpprb": 0.8})
    memory = bench.once("memory", 100_000)
    each = memory["private_bytes"] / memory["transitions"]
    verdict = blocks.verdict(each, 7300, at_least=False)
    rows.append(["ours, bytes per transition", f"{each:,.0f}", "", "", "", "<= 7,300", verdict])
    return {"sampling": raw_of(found), "memory": memory}, rows


def kernels(bench: Bench) -> Found:
    """Part 5."""

    def first_use(cache: str) -> float:
        return float(bench.once("kernels", environ={"NUMBA_CACHE_DIR": cache})["seconds"])

    times: dict[str, list[float]] = {"without cache": [], "with cache": []}
    with tempfile.TemporaryDirectory(dir=bench.folder) as kept:
        # bytecode, page cache, and the cache of the second row
        first_use(kept)
        for _ in range(1 if bench.quick else 5):
            with tempfile.TemporaryDirectory(dir=bench.folder) as empty:
                times["without cache"].append(first_use(empty))
            times["with cache"].append(first_use(kept))
    rows = []
    for (name, seconds), goal in zip(times.items(), (5, 0.3), strict=True):
        middle, (low, high) = blocks.middle(seconds), blocks.spread(seconds)
        verdict = blocks.verdict(middle, goal, at_least=False)
        rows.append([name, f"{middle:.2f} s", f"{low:.2f} to {high:.2f}", "", "", f"<= {goal} s", verdict])
    return times, rows


def train(bench: Bench) -> Found:
    """Part 6; "loses at most 5 %" of the steps per second is 1 / 0.95 of the time."""
    found = bench.race(["ours", "uniform", "sb3"], "train", 50_000, ["train"])["train"]
    rows = rows_of("DQN", found, {"uniform": 1 / 0.95})
    for row, contestant, what in zip(rows, found, ("ours", "ours, uniform buffer", "SB3's DQN, uniform"), strict=True):
        per_second = 1 / blocks.middle(contestant.per_step())
        row[0] = f"{what}: {per_second:,.0f} steps/s"
    return raw_of(found), rows


def memory(bench: Bench) -> Found:
    """Part 7."""
    found = bench.once("extra", 1_000_000)
    each = (found["ours"] - found["sb3"]) / found["transitions"]
    row = ["bytes above SB3's", f"{each:.1f}", "", "", "", "<= 25", blocks.verdict(each, 25, at_least=False)]
    return found, [row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny: does everything run?")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some of the parts")
    parser.add_argument("--out", type=Path, help="results file (default: benchmarks/results/speed; --quick: none)")
    args = parser.parse_args()

    started = time.time()
    # a worker's second start should find what a user's does
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    results: dict[str, Any] = {"benchmark": "per", "quick": args.quick, "threads": 1, "machine": blocks.machine()}
    results["versions"] = blocks.versions("sb3-ext", "stable-baselines3", "torch", "numpy", "numba", "gymnasium")
    titles = {
        "index": (index, "Index cycle: capacity"),
        "add": (add, "One transition"),
        "buffer": (buffer, "Whole buffer, 1,000,000 x 4 floats"),
        "frames": (frames, "Frames once, 100,000 x 4x84x84"),
        "kernels": (kernels, "First use of the sum tree"),
        "train": (train, "Gradient step"),
        "memory": (memory, "Arrays, per transition"),
    }
    with tempfile.TemporaryDirectory(prefix="sb3_ext_per_") as folder:
        bench, tables = Bench(Path(folder), args.quick), []
        for part in args.only:
            measure, title = titles[part]
            results[part], rows = measure(bench)
            unit = {"kernels": "seconds", "memory": "bytes"}.get(part, "us")
            tables.append(blocks.table([title, unit, "quartiles", "ours / it", "others", "wanted", ""], rows))
    print("\n" + "\n\n".join(tables))
    results["seconds"] = round(time.time() - started)
    print(f"\n{results['seconds']} s")
    out = args.out or (None if args.quick else Path(__file__).parent / "results" / "speed" / "per.json")
    if out is not None:
        blocks.write_results(out, results)


if __name__ == "__main__":
    main()
