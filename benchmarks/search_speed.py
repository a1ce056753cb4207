"""
Gumbel search on one core: ours beside mctx, 16 simulations, 4 actions, all considered.

    uv run --all-extras benchmarks/search_speed.py

1. tree: the model costs (nearly) nothing. Ours gets numbers drawn beforehand; "tree, numpy model" computes mctx's
   trivial function of the state in numpy instead: the same work, with the overhead of numpy calls.
2. scalar, 51, 601: whole search with an MLP of 128 units: dynamics 132-128-128 with residual, reward 128-128-n,
   prediction 128-128-(4 + n), n bins decoded by softmax, expectation and h^-1. Ours runs it through ``compile_mlp``,
   mctx inside XLA. mctx has the same heads as ours in each row.

Each side is a process on the same core, mctx in its own environment that uv makes. Blocks alternate; medians over
blocks, quartiles as spread; ratios are medians of ratios within a round. "Others" is the share of the machine that
other processes used meanwhile. LightZero's times come from another machine and were not measured here.

numpy's matrix products follow the variable OPENBLAS_CORETYPE: unset, the processor is detected. It is in the results.

--quick only shows that everything works. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from speed import blocks

N, A, WIDTH, GAMMA = 16, 4, 128, 0.99
BATCHES = (1, 8, 64, 256, 1536)
TASKS = ("tree", "tree-numpy", "scalar", "51", "601")
PACKAGES = ("mctx==0.0.71", "jax[cpu]==0.10.2")
# milliseconds, from another machine: the C++ Gumbel tree alone; the whole search with 601 bins
LIGHTZERO = {
    "tree": {1: 0.167, 8: 1.14, 64: 7.42, 256: 33.2, 1536: 214.0},
    "601": {1: 3.62, 8: 5.67, 64: 24.2, 256: 83.6, 1536: 444.0},
}
WANTED = {  # largest ratio of our time to mctx's
    "tree": {1: 1.0, 8: 1.0, 64: 1.0, 1536: 1 / 1.3},
    "scalar": dict.fromkeys(BATCHES, 1.5),
    "51": dict.fromkeys(BATCHES, 1.5),
}
LIGHTZERO_WANTED = {"tree": {1536: 30.0}, "601": {8: 2.5, 64: 3.0}}  # how many times faster


def bins(task: str) -> int:
    """Outputs of a head."""
    return 1 if task == "scalar" else int(task)


# ---------------------------------------------------------------------------------------------------------- the workers


def our_search(task: str, batch: int) -> Callable[[], None]:
    import numpy as np
    import torch as th
    from torch import nn

    from sb3_ext.search import CHUNK, RecurrentOutput, compile_mlp, decode, gumbel_search

    th.set_num_threads(1)
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return rng.normal(size=shape).astype(np.float32)

    logits, values, embedding = normal(batch, A), np.zeros(batch, np.float32), normal(batch, 1)
    if task == "tree":
        drawn = [RecurrentOutput(normal(batch) * 0.1, normal(batch), normal(batch, A), embedding) for _ in range(N)]
        count = [0]

        def model(states: Any, actions: Any) -> RecurrentOutput:
            count[0] = (count[0] + 1) % N
            return drawn[count[0]]

    elif task == "tree-numpy":
        numbers = np.arange(A, dtype=np.float32)

        def model(states: Any, actions: Any) -> RecurrentOutput:
            new = states + np.float32(0.1) * actions[:, None].astype(np.float32)
            flat = new[:, 0]
            return RecurrentOutput(np.cos(flat) * np.float32(0.1), np.sin(flat), np.sin(new + numbers), new)

    else:
        n = bins(task)
        embedding = normal(batch, WIDTH)
        th.manual_seed(0)

        def net(n_in: int, n_out: int) -> Any:
            return compile_mlp(nn.Sequential(nn.Linear(n_in, WIDTH), nn.ReLU(), nn.Linear(WIDTH, n_out)))

        dynamics, reward, prediction = net(WIDTH + A, WIDTH), net(WIDTH, n), net(WIDTH, A + n)
        buffer, one_hot = np.empty((batch, WIDTH + A), np.float32), np.eye(A, dtype=np.float32)
        support = np.linspace(-18, 18, n, dtype=np.float32)

        def head(out: Any) -> Any:
            return out[:, 0] if n == 1 else decode(out, support, 0.001)

        def model(states: Any, actions: Any) -> RecurrentOutput:
            x = buffer[: len(states)]
            x[:, :WIDTH] = states
            x[:, WIDTH:] = one_hot[actions]
            new = dynamics(x)
            new += states
            out = prediction(new)
            return RecurrentOutput(head(reward(new)), head(out[:, A:]), out[:, :A], new)

    chunk = None if task.startswith("tree") else CHUNK  # as the policy does it

    def step() -> None:
        gumbel_search(
            logits, values, embedding, model, num_simulations=N, max_num_considered_actions=A, gamma=GAMMA,
            roots_at_once=chunk,
        )  # fmt: skip

    return step


def mctx_search(task: str, batch: int) -> Callable[[], None]:
    import jax
    import mctx
    from jax import numpy as jnp

    keys = jax.random.split(jax.random.PRNGKey(0), 8)
    discount = jnp.full((batch,), GAMMA)
    if task.startswith("tree"):
        params: Any = {}
        embedding = jax.random.normal(keys[0], (batch, 1))

        def model(params: Any, key: Any, action: Any, state: Any) -> Any:
            new = state + 0.1 * action[:, None].astype(jnp.float32)
            out = mctx.RecurrentFnOutput(
                reward=0.1 * jnp.cos(new[:, 0]),
                discount=discount,
                prior_logits=jnp.sin(new + jnp.arange(A)[None]),
                value=jnp.sin(new[:, 0]),
            )
            return out, new

    else:
        n = bins(task)
        embedding = jax.random.normal(keys[0], (batch, WIDTH))
        sizes = [(WIDTH + A, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, n), (WIDTH, WIDTH), (WIDTH, A + n)]
        params = [
            (0.05 * jax.random.normal(key, size), jnp.zeros(size[1]))
            for key, size in zip(keys[1:], sizes, strict=False)
        ]
        support = jnp.linspace(-18, 18, n)

        def net(x: Any, first: Any, second: Any) -> Any:
            return jax.nn.relu(x @ first[0] + first[1]) @ second[0] + second[1]

        def head(out: Any) -> Any:
            if n == 1:
                return out[:, 0]
            h = jax.nn.softmax(out) @ support
            root = (jnp.sqrt(1 + 0.004 * (jnp.abs(h) + 1.001)) - 1) / 0.002
            return jnp.sign(h) * (root**2 - 1)

        def model(params: Any, key: Any, action: Any, state: Any) -> Any:
            x = jnp.concatenate([state, jax.nn.one_hot(action, A)], 1)
            new = state + net(x, params[0], params[1])
            out = net(new, params[4], params[5])
            reward = head(net(new, params[2], params[3]))
            return mctx.RecurrentFnOutput(
                reward=reward, discount=discount, prior_logits=out[:, :A], value=head(out[:, A:])
            ), new

    root = mctx.RootFnOutput(
        prior_logits=jax.random.normal(keys[7], (batch, A)), value=jnp.zeros(batch), embedding=embedding
    )

    @jax.jit
    def search(params: Any, key: Any, root: Any) -> Any:
        out = mctx.gumbel_muzero_policy(params, key, root, model, num_simulations=N, max_num_considered_actions=A)
        return out.action, out.action_weights, out.search_tree.node_values[:, 0]

    def step() -> None:
        jax.block_until_ready(search(params, keys[0], root))

    return step


def work(who: str) -> None:
    """Answer lines "task batch steps" with the time that so many searches took."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    make = our_search if who == "ours" else mctx_search
    packages = ("numpy", "numba", "torch") if who == "ours" else ("jax", "mctx")
    pacer = blocks.Pacer({})
    pacer.answer({"ready": blocks.versions(*packages)})
    steps: dict[str, Callable[[], None]] = {}
    for line in sys.stdin:
        task, batch, count = line.split()
        key = f"{task} {batch}"
        if key not in steps:
            steps[key] = make(task, int(batch))
            steps[key]()
        step = steps[key]
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(int(count)):
            step()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        pacer.answer({"steps": int(count), "seconds": seconds, "cpu_seconds": cpu})


# ----------------------------------------------------------------------------------------------------------- the driver


class Side(blocks.Contestant):
    """One worker in one of its tasks."""

    def __init__(self, worker: blocks.Contestant, key: str) -> None:
        self.worker, self.key, self.name = worker, key, worker.name
        self.meta, self.error, self.blocks = worker.meta, worker.error, []

    def ask(self, line: str) -> dict[str, Any]:
        """See :meth:`blocks.Contestant.ask`."""
        return self.worker.ask(f"{self.key} {line}")


def race(workers: list[blocks.Contestant], task: str, batch: int, quick: bool) -> list[Side]:
    sides = [Side(worker, f"{task} {batch}") for worker in workers]
    counts = []
    for side in sides:
        side.block(1, keep=False)  # compiles
        side.block(3)
        counts.append(1 if side.error or quick else max(1, round(0.03 / side.per_step()[0])))
        side.blocks.clear()
    for turn in range(3 if quick else 17):
        for side, count in zip(sides, counts, strict=True):
            side.block(count, keep=turn > 1 or quick)
    return sides


def row_of(task: str, batch: int, ours: Side, mctx: Side) -> list[str]:
    mine, theirs = ([1e3 * t for t in side.per_step()] for side in (ours, mctx))
    ratio = blocks.middle(blocks.ratios(ours, mctx))
    goal = WANTED.get(task, {}).get(batch)
    row = [f"{'tree, numpy model' if task == 'tree-numpy' else task}, {batch}"]
    row += [
        f"{blocks.middle(mine):.3f}",
        "{:.3f} to {:.3f}".format(*blocks.spread(mine)),
        f"{blocks.middle(theirs):.3f}",
    ]
    row += ["{:.3f} to {:.3f}".format(*blocks.spread(theirs)), f"{ratio:.2f}", f"<= {goal:.2f}" if goal else ""]
    row.append(blocks.verdict(ratio, goal, at_least=False) if goal else "")
    other = LIGHTZERO.get(task, {}).get(batch)
    times = other / blocks.middle(mine) if other else float("nan")
    wanted = LIGHTZERO_WANTED.get(task, {}).get(batch)
    row.append(f"{other} ({times:.1f}x)" if other else "")
    row.append(f">= {wanted}x: {blocks.verdict(times, wanted, at_least=True)}" if wanted else "")
    load = [b["other_load"] for side in (ours, mctx) for b in side.blocks]
    return [*row, f"{100 * statistics.fmean(load):.0f} %" if load else ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny: does everything run?")
    parser.add_argument("--only", nargs="+", choices=TASKS, default=TASKS, help="some of the tasks")
    parser.add_argument("--out", type=Path, help="results file (default: benchmarks/results/speed; --quick: none)")
    args = parser.parse_args()

    started = time.time()
    results: dict[str, Any] = {"benchmark": "search", "quick": args.quick, "threads": 1, "machine": blocks.machine()}
    # OpenBLAS may be told to use kernels for an older processor
    blas = os.environ.get("OPENBLAS_CORETYPE", "detected")
    results["setting"] = {"simulations": N, "actions": A, "width": WIDTH, "OPENBLAS_CORETYPE": blas}
    results["lightzero_ms_from_another_machine"] = LIGHTZERO
    rows = []
    script = "../search_speed.py"
    with tempfile.TemporaryDirectory(prefix="sb3_ext_search_") as folder:
        place = Path(folder)
        workers = [
            blocks.Contestant("ours", blocks.own_command("ours", script=script), 1, place),
            blocks.Contestant("mctx", blocks.peer_command("mctx", script=script, packages=PACKAGES), 1, place),
        ]
        try:
            for worker in workers:
                worker.wait_ready()
                print(f"{worker.name}: {worker.error or worker.meta}", flush=True)
            results["versions"] = {worker.name: worker.meta for worker in workers}
            for task in args.only:
                for batch in BATCHES:
                    sides = race(workers, task, batch, args.quick)
                    results[f"{task}, {batch}"] = {side.name: side.raw() for side in sides}
                    rows.append(row_of(task, batch, *sides))
                    print("  ".join(rows[-1]), flush=True)
        finally:
            for worker in workers:
                worker.close()
    header = ["task, batch", "ours, ms", "quartiles", "mctx, ms", "quartiles", "ours / mctx", "wanted", ""]
    header += ["LightZero, ms, from another machine, not measured here", "wanted", "others"]
    print("\n" + blocks.table(header, rows))
    results["seconds"] = round(time.time() - started)
    print(f"\n{results['seconds']} s")
    out = args.out or (None if args.quick else Path(__file__).parent / "results" / "speed" / "search.json")
    if out is not None:
        blocks.write_results(out, results)


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1] in ("ours", "mctx"):
        work(sys.argv[1])
    else:
        main()
