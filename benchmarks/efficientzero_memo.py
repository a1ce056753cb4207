"""
What memoised reanalysis saves: CPU time of an update, and positions that are searched, with and without.

    uv run --all-extras benchmarks/efficientzero_memo.py        # 8 minutes beside other work

The replay buffer is filled with random play, then some copies of the target network are trained through. The longer a
copy lasts and the smaller the buffer, the more is known already. Blocks of updates with and without alternate, one
copy of the target network each.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from cql_learning import machine
from efficientzero_learning import TASKS
from per_learning import make_env

from sb3_ext import EfficientZeroV2
from sb3_ext.efficientzero import SequenceReplayBuffer

OUT = Path(__file__).parent / "results" / "speed" / "efficientzero_memo.json"
CASES = (("cartpole", 2_000, 100), ("cartpole", 20_000, 100), ("minatar", 20_000, 100), ("minatar", 20_000, 400))
"""Task, transitions in the buffer, updates per copy of the target network."""


def fill(task: str, steps: int) -> EfficientZeroV2:
    """A model of the learning benchmark with so many random steps in its buffer."""
    settings = TASKS[task]
    env = make_env(settings["env"], 1, 0, training=True)
    changes = {**settings["settings"], "learning_starts": 2 * steps}
    return EfficientZeroV2(settings["policy"], env, seed=0, device="cpu", **changes).learn(steps)


def measure(model: EfficientZeroV2, interval: int, copies: int) -> dict[str, Any]:
    """CPU milliseconds per update of each copy of the target network, and the share of places that were searched."""
    buffer, policy = model.replay_buffer, model.policy_target
    assert isinstance(buffer, SequenceReplayBuffer)
    model.target_update_interval = interval
    plan, searched = policy.plan, 0

    def counted(roots: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal searched
        searched += len(roots.values)
        return plan(roots, *args, **kwargs)

    policy.plan = counted  # type: ignore[method-assign]
    model.train(interval - model._n_updates % interval, model.batch_size)  # up to a copy; warms everything up
    found: dict[str, list[float]] = {"without": [], "with": [], "share": []}
    places = interval * model.batch_size * (model.unroll_steps + 1)
    for _ in range(copies):
        for name in ("without", "with"):
            model.memoize_reanalysis, searched = name == "with", 0
            started = time.process_time()
            model.train(interval, model.batch_size)
            found[name].append((time.process_time() - started) * 1000 / interval)
        found["share"].append(searched / places)
    return found


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", type=int, default=3, help="of the target network, with and without each")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    th.set_num_threads(1)
    rows = []
    print("| task | transitions | updates per copy | positions searched | ms an update without | with | ratio |")
    print("|---|---|---|---|---|---|---|")
    for task, steps, interval in CASES:
        found = measure(fill(task, steps), interval, args.copies)
        rows.append({"task": task, "transitions": steps, "interval": interval, **found})
        without, with_memo, share = (np.median(found[name]) for name in ("without", "with", "share"))
        print(
            f"| {task} | {steps:,} | {interval} | {100 * share:.0f} % | {without:.1f} | {with_memo:.1f} | "
            f"{with_memo / without:.2f} |",
            flush=True,
        )
    args.out.write_text(json.dumps({"benchmark": "efficientzero_memo", **machine(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
