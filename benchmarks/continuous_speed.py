"""
Gradient steps per second of CQL for continuous actions on a CPU: ours, d3rlpy, TorchRL, and a bare torch loop.

    uv run python benchmarks/continuous_speed.py --threads 2
    uv run python benchmarks/continuous_speed.py --shape halfcheetah

All do the same: batches of 256 of a million random transitions, drawn while training; two critics and an actor of 256
and 256 units with ReLU, 10 random actions, 10 of the policy and 10 of the policy at the next observation, conservative
weight 5 without a Lagrange multiplier, automatic temperature, the actor's most probable action in the target, Adam with
3e-4 and 1e-4, tau 0.005, gamma 0.99, float32. Ours runs its real ``learn`` with callback, metrics and a log line every
20 calls; d3rlpy and TorchRL run sampling and update only. TorchRL's loss draws the target's action, computes a cloning
loss as well, and takes its log-sum-exp over three actions at a time. The bare loop, ``speed/continuous_bare.py``, has
no sampling at all; its ``autograd`` row is the loop as one would write it first. bf16 is worth it only where the
processor has it. The time of drawing a batch comes from processes of their own.

Every contestant is a process, the peers in isolated environments that uv builds. Blocks are interleaved, ratios are
taken within a round, see ``cql_speed.py``. --by-cpu compares CPU seconds, for a machine that is not quiet: then take
one thread. --quick only shows that everything works.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from cql_speed import Goals, report, summary
from speed import blocks
from speed.frames import environ, work_folder

SHAPES = {"hopper": (11, 3), "halfcheetah": (17, 6)}
OURS = {
    "ours": "ours",
    "ours, bf16": "ours_bf16",
    "bare loop": "bare",
    "bare loop, bf16": "bare_bf16",
    "bare loop, autograd": "bare_autograd",
}
# TorchRL's C++ trees load beside some versions of torch only
PEERS = {"d3rlpy": blocks.PEERS["d3rlpy"], "torchrl": ("torchrl==0.14.1", "torch==2.15.0")}
SAMPLERS = ("ours", "sb3", *PEERS)
GOALS: Goals = (  # what, slower, faster, goal, at least
    ("ours is x times as fast as d3rlpy", "d3rlpy", "ours", 2.0, True),
    ("ours is x times as fast as TorchRL", "torchrl", "ours", 1.5, True),
    ("ours takes x times as long as the bare loop", "ours", "bare loop", 1.15, False),
    ("ours in bf16 is x times as fast as d3rlpy", "d3rlpy", "ours, bf16", 2.0, True),
    ("ours in bf16 takes x times as long as the bare loop in bf16", "ours, bf16", "bare loop, bf16", 1.15, False),
)
SAMPLE_GOAL = 0.25
"""Milliseconds that drawing a batch of 256 may take."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*OURS, *PEERS]
    parser.add_argument("--shape", choices=SHAPES, default="hopper", help="whose observations and actions")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of each contestant (default 2)")
    parser.add_argument("--quick", action="store_true", help="tiny: does everything run?")
    parser.add_argument("--only", nargs="*", metavar="NAME", choices=names, help=f"some of: {', '.join(names)}")
    parser.add_argument("--no-sampling", action="store_true", help="leave out the time of drawing a batch")
    parser.add_argument("--by-cpu", action="store_true", help="compare CPU seconds instead of the clock's")
    parser.add_argument("--rounds", type=int, help="timed blocks of each contestant (default 25)")
    parser.add_argument("--work", type=Path, help="folder that keeps the data (default: in the temporary folder)")
    parser.add_argument("--out", type=Path, help="results file (default: benchmarks/results/speed; --quick: in --work)")
    args = parser.parse_args()

    started = time.time()
    folder = work_folder(args.work, args.quick)
    machine = blocks.machine()
    rounds = args.rounds or (2 if args.quick else 25)
    numbers = [str(n) for n in (20_000 if args.quick else 1_000_000, *SHAPES[args.shape], args.threads)]
    writer = start("ours", "write", numbers, folder)
    writer.wait_ready()
    writer.close()
    train = {name: start(name, "train", numbers, folder) for name in (names if args.only is None else args.only)}
    run(train, rounds, dict.fromkeys(train, 2 if args.quick else 20), args.by_cpu)
    sample = {} if args.no_sampling else {name: start(name, "sample", numbers, folder) for name in SAMPLERS}
    # d3rlpy's is a loop over transitions; 40 times as slow
    steps = {name: 5 if args.quick else 20 if name == "d3rlpy" else 400 for name in SAMPLERS}
    run(sample, rounds, steps, args.by_cpu)

    print(f"\n{args.shape}: observations of {numbers[1]}, actions of {numbers[2]}")
    if train:
        report(train, args.threads, GOALS, "bare loop")
    draws = sampling(sample)
    out = args.out or (folder if args.quick else Path(__file__).parent / "results" / "speed")
    if out.suffix != ".json":
        out = out / f"continuous_speed_{args.shape}_{args.threads}_threads.json"
    blocks.write_results(
        out,
        {
            "benchmark": "continuous_speed",
            "quick": args.quick,
            "shape": args.shape,
            "threads": args.threads,
            "by_cpu": args.by_cpu,
            "machine": machine,
            "seconds": round(time.time() - started),
            "summary": summary(train, GOALS),
            "milliseconds_per_draw": draws,
            "contestants": {name: c.raw() for name, c in train.items()},
            "samplers": {name: c.raw() for name, c in sample.items()},
        },
    )


def start(name: str, task: str, numbers: list[str], folder: Path) -> blocks.Contestant:
    """Start a worker."""
    script = "continuous_workers.py"
    if name in PEERS:
        command = blocks.peer_command(name, task, *numbers, script=script, packages=PEERS[name])
    else:
        command = blocks.own_command(OURS.get(name, name), task, *numbers, script=script)
    return blocks.Contestant(name, command, int(numbers[-1]), folder, environ(folder))


def run(contestants: dict[str, blocks.Contestant], rounds: int, steps: dict[str, int], by_cpu: bool) -> None:
    """Measure, and end the workers."""
    try:
        blocks.measure(list(contestants.values()), rounds, steps, warm_up=1)
    finally:
        for contestant in contestants.values():
            contestant.close()
    if by_cpu:
        for contestant in contestants.values():
            for block in contestant.blocks:
                block["wall_seconds"], block["seconds"] = block["seconds"], block["cpu_seconds"]


def sampling(contestants: dict[str, blocks.Contestant]) -> dict[str, float]:
    """Print what drawing a batch takes, and return its milliseconds by name."""
    found, rows = {}, []
    for name, contestant in contestants.items():
        times = contestant.per_step()
        if not times:
            rows.append([name, f"not available: {(contestant.error or 'no block')[:60]}", "", ""])
            continue
        low, high = blocks.spread(times)
        found[name] = 1e3 * blocks.middle(times)
        goal = f"<= {SAMPLE_GOAL:g}: {blocks.verdict(found[name], SAMPLE_GOAL, False)}" if name == "ours" else ""
        rows.append([name, f"{found[name]:.3f}", f"{1e3 * low:.3f} to {1e3 * high:.3f}", goal])
    if rows:
        print("\n" + blocks.table(["drawing a batch", "ms", "quartiles", "goal"], rows))
    return found


if __name__ == "__main__":
    main()
