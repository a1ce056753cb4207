"""
What each setting gains on a GPU: updates of the full Atari configuration (entry ``atari`` of efficientzero.yml).

    uv run --all-extras benchmarks/efficientzero_gpu.py --out results.json

All settings share one replay buffer of random play of Breakout. For each: updates per second with nothing between
them; then again with a clock around every part, which waits for the GPU and is a little slower; the most memory that
torch held. ``--profile`` adds the kernels of one update of the last setting.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch as th
from cql_learning import machine
from efficientzero_atari import build, fill, measure

SETTINGS: dict[str, dict[str, Any]] = {
    "kernels one by one": {"cuda_graphs": False},
    "recorded": {},
    "recorded, bf16": {"bf16": True},
    "compiled, bf16": {"bf16": True, "torch_compile": True},
}


def run(name: str, settings: dict[str, Any], buffer: Any, updates: int) -> dict[str, Any]:
    """One setting."""
    model, _ = build("cuda", settings)
    if buffer is None:
        fill(model, 4000)
    else:
        model.replay_buffer = buffer
    model.learning_starts, model.gradient_steps = 0, 0
    model.learn(4)  # logger
    th.cuda.reset_peak_memory_stats()
    model.train(5, model.batch_size)
    th.cuda.synchronize()
    start = time.perf_counter()
    model.train(updates, model.batch_size)
    th.cuda.synchronize()
    seconds = time.perf_counter() - start
    facts = {"name": name, "settings": settings, "updates_per_second": updates / seconds}
    facts["peak_gigabytes"] = th.cuda.max_memory_allocated() / 1e9
    facts["clocked"] = measure(model, 200, updates // 2)
    return {"model": model, **facts}


def profile(model: Any) -> str:
    """The kernels of one update."""
    activities = [th.profiler.ProfilerActivity.CPU, th.profiler.ProfilerActivity.CUDA]
    with th.profiler.profile(activities=activities) as prof:
        model.train(2, model.batch_size)
        th.cuda.synchronize()
    return str(prof.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=70))


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    buffer, model = None, None
    print("| setting | updates/s | simulations/s | GB | network | tree | data | environment steps/s |")
    print("|---|---|---|---|---|---|---|---|")
    for name in args.only:
        row = run(name, SETTINGS[name], buffer, args.updates)
        model = row.pop("model")
        buffer = model.replay_buffer
        spent = row["clocked"]["updating"]
        total = sum(spent.values())
        print(
            f"| {name} | {row['updates_per_second']:.1f} | {row['clocked']['simulations_per_second']:,.0f} | "
            f"{row['peak_gigabytes']:.1f} | {100 * row['clocked']['network_share_of_updates']:.0f} % | "
            f"{100 * spent['tree'] / total:.0f} % | {100 * spent['data'] / total:.0f} % | "
            f"{row['clocked']['steps_per_second']:.0f} |",
            flush=True,
        )
        print({part: round(1e3 * s / (args.updates // 2), 2) for part, s in spent.items()}, "ms an update", flush=True)
        rows.append(row)
        if args.out:
            facts = {"benchmark": "efficientzero_gpu", "rows": rows, **machine(th.cuda.get_device_name())}
            args.out.write_text(json.dumps(facts, indent=1))
    if args.profile:
        print(profile(model))


if __name__ == "__main__":
    main()
