"""
Gradient steps per second of CQL on Atari frames, on a CPU: ours, d3rlpy, tianshou, and a bare torch loop.

    uv run python benchmarks/cql_speed.py --threads 2

All do the same: batches of 32 stacks of four 84x84 frames of real Breakout, drawn while training; Nature CNN, 200
quantiles, 4 actions, float32, Adam with lr 5e-5 and eps 1e-2/32, gamma 0.99, cql_alpha 4, target update every 2000
steps, rewards in [-1, 1]. Ours runs its real ``learn`` with callback, metrics and a log line every 15 steps (the
default is every 1000); d3rlpy and tianshou run sampling and ``update`` only, without the bookkeeping of their ``fit``
and trainer. The bare loop has no sampling at all: one forward pass of each network, the same loss, fused Adam,
channels_last. bf16 is worth it only where the processor has it.

Every contestant is a process of its own, the peers in isolated environments that uv builds. Blocks are interleaved (A
B C A B C ...). Steps per second come from the median block, ratios from the median over rounds of the ratio within a
round; the spread is from the first to the third quartile. "others" is the share of the machine that other processes
used meanwhile; it should be near zero. --quick only shows that everything works. The first run records frames and
fetches the peers, which takes a few minutes more.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from speed import blocks
from speed.frames import environ, prepare, work_folder

OURS = {
    "ours, mmap": "mmap",
    "ours, ram": "ram",
    "ours, compressed": "compressed",
    "ours, mmap, torch_compile": "compile",
    "ours, mmap, bf16": "bf16",
    "bare loop": "bare",
    "bare loop, torch.compile": "bare_compile",
}
Goals = Sequence[tuple[str, str, str, float, bool]]
GOALS: Goals = (  # what, slower, faster, goal, at least
    ("ours is x times as fast as d3rlpy", "d3rlpy", "ours, mmap", 2.7, True),
    ("ours is x times as fast as tianshou", "tianshou", "ours, mmap", 1.6, True),
    ("ours takes x times as long as the bare loop", "ours, mmap", "bare loop", 1.10, False),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*OURS, *blocks.PEERS]
    parser.add_argument("--threads", type=int, default=2, help="torch threads of each contestant (default 2)")
    parser.add_argument("--quick", action="store_true", help="tiny: does everything run?")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help=f"some of: {', '.join(names)}")
    parser.add_argument("--rounds", type=int, help="timed blocks of each contestant (default 25)")
    parser.add_argument("--work", type=Path, help="folder that keeps the frames (default: in the temporary folder)")
    parser.add_argument("--out", type=Path, help="results file (default: benchmarks/results/speed; --quick: in --work)")
    args = parser.parse_args()
    names = args.only or names

    started = time.time()
    folder = work_folder(args.work, args.quick)
    prepare(folder, args.quick)
    machine = blocks.machine()
    contestants: dict[str, blocks.Contestant] = {}
    print("starting the contestants (the first time uv fetches the peers) ...", flush=True)
    for name in names:
        if name in OURS:
            command = blocks.own_command("train", OURS[name], "speed/parquet-v0", str(args.threads))
        else:
            command = blocks.peer_command(name, "train", str(folder / "frames"), str(args.threads))
        contestants[name] = blocks.Contestant(name, command, args.threads, folder, environ(folder))
    steps = {name: 2 if args.quick else 15 for name in names}
    try:
        rounds = args.rounds or (2 if args.quick else 25)
        blocks.measure(list(contestants.values()), rounds, steps, warm_up=1 if args.quick else 2)
    finally:
        for contestant in contestants.values():
            contestant.close()
    report(contestants, args.threads)
    out = args.out or (folder if args.quick else Path(__file__).parent / "results" / "speed")
    if out.suffix != ".json":
        out = out / f"cql_speed_{args.threads}_threads.json"
    blocks.write_results(
        out,
        {
            "benchmark": "cql_speed",
            "quick": args.quick,
            "threads": args.threads,
            "machine": machine,
            "seconds": round(time.time() - started),
            "summary": summary(contestants),
            "contestants": {name: c.raw() for name, c in contestants.items()},
        },
    )


def summary(contestants: dict[str, blocks.Contestant], goals: Goals = GOALS) -> dict[str, dict[str, float]]:
    """Figures of the goals: median ratio, quartiles, goal."""
    result = {}
    for what, slow, fast, goal, _ in goals:
        if slow in contestants and fast in contestants:
            values = blocks.ratios(contestants[slow], contestants[fast])
            if not values:
                continue
            low, high = blocks.spread(values)
            fastest = min(contestants[slow].per_step()) / min(contestants[fast].per_step())
            result[what] = {
                "ratio": blocks.middle(values),
                "quartile_1": low,
                "quartile_3": high,
                "ratio_of_fastest_blocks": fastest,
                "goal": goal,
            }
    return result


def report(
    contestants: dict[str, blocks.Contestant], threads: int, goals: Goals = GOALS, against: str = "ours, mmap"
) -> None:
    """
    Print the tables.

    :param contestants: what was measured
    :param threads: of each
    :param goals: see ``GOALS``
    :param against: the contestant by whose time the others' are divided
    """
    reference = contestants.get(against)
    rows = []
    for name, contestant in contestants.items():
        times = contestant.per_step()
        if not times:
            rows.append([name, f"not available: {(contestant.error or 'no block')[:60]}", "", "", "", "", ""])
            continue
        low, high = blocks.spread(times)
        ratio = blocks.middle(blocks.ratios(contestant, reference)) if reference else float("nan")
        cpu = blocks.middle([b["cpu_seconds"] / b["steps"] for b in contestant.blocks])
        rows.append(
            [
                name,
                f"{1 / blocks.middle(times):.1f}",
                f"{1e3 * blocks.middle(times):.1f}",
                f"{1e3 * low:.1f} to {1e3 * high:.1f}",
                f"{1e3 * cpu:.1f}",
                f"{ratio:.2f}",
                f"{blocks.middle([b['other_load'] for b in contestant.blocks]):.0%}",
            ]
        )
    print(f"\n{threads} threads, CPU, fp32 unless said otherwise\n")
    header = ["", "steps/s", "ms/step", "quartiles", "CPU ms/step", f"time / {against}", "others"]
    print(blocks.table(header, rows))
    rows = []
    figures = summary(contestants, goals)
    for what, _, _, goal, at_least in goals:
        if what in figures:
            f = figures[what]
            bound = f"{'>=' if at_least else '<='} {goal:g}"
            rows.append(
                [
                    what,
                    f"{f['ratio']:.2f}",
                    f"{f['quartile_1']:.2f} to {f['quartile_3']:.2f}",
                    f"{f['ratio_of_fastest_blocks']:.2f}",
                    bound,
                    blocks.verdict(f["ratio"], goal, at_least),
                ]
            )
    if rows:
        print("\n" + blocks.table(["goal", "x", "quartiles", "fastest blocks", "wanted", ""], rows))


if __name__ == "__main__":
    main()
