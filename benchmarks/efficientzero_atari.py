"""
The full Atari configuration of EfficientZeroV2 (entry ``atari`` of efficientzero.yml): where the time goes, and memory.

    uv run --all-extras benchmarks/efficientzero_atari.py                     # on a CPU: 3 updates, some minutes
    uv run --all-extras benchmarks/efficientzero_atari.py --updates 200 --device cuda

1. Memory: the replay buffer is filled with 100,000 steps of random play of Breakout; private memory before and after.
2. Time: some hundred steps are collected with search, then some updates run. Every part's own time is taken, without
   that of the parts it calls. "Network" counts the encoder, the model inside the search, and forward and backward pass
   of the loss; "tree" is the search without the network; "data" is storing and drawing windows; the rest is Python,
   targets and SB3. On a GPU each part waits for the device, which makes the whole slower than a plain run: nothing
   overlaps.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from cql_learning import machine, parse_settings

from sb3_ext import EfficientZeroV2
from sb3_ext.cuda_graphs import GraphedPass
from sb3_ext.search.gpu import DeviceSteps
from sb3_ext.zoo.config import load_algo, read_entries, resolve
from sb3_ext.zoo.tasks import check_env_id, make_envs

OUT = Path(__file__).parent / "results" / "speed" / "efficientzero_atari.json"


class Clock:
    """Own time of nested parts."""

    def __init__(self, device: th.device) -> None:
        self.device, self.spent, self.stack = device, defaultdict(float), list[str]()
        self.wrapped: list[tuple[Any, str, Any]] = []
        self.last = time.perf_counter()

    def turn(self) -> None:
        """Give the time since the last turn to the innermost part."""
        if self.device.type == "cuda":
            th.cuda.synchronize()
        now = time.perf_counter()
        self.spent[self.stack[-1] if self.stack else "rest"] += now - self.last
        self.last = now

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Replace a method by one whose time is taken."""
        method: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.turn()
            self.stack.append(part)
            try:
                return method(*args, **kwargs)
            finally:
                self.turn()
                self.stack.pop()

        self.wrapped.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, timed)

    def unwrap(self) -> None:
        """Give everything its own methods back."""
        for owner, name, before in reversed(self.wrapped):
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

    def flush(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        self.turn()
        spent, self.spent = dict(self.spent), defaultdict(float)
        return spent


def private_mb() -> float:
    """Memory that only this process has."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))) / 1e3


def build(device: str, overrides: dict[str, Any]) -> tuple[EfficientZeroV2, Any]:
    """The model of the zoo's entry, and its settings."""
    algo = load_algo("efficientzero")
    config = resolve(algo, *read_entries(algo, None), ["atari"], overrides)
    check_env_id("ALE/Breakout-v5")
    env = make_envs("ALE/Breakout-v5", n_envs=config.n_envs, seed=0, frame_stack=config.frame_stack, training=True)
    return EfficientZeroV2(env=env, seed=0, device=device, **config.arguments), config.hyperparams


def fill(model: EfficientZeroV2, steps: int) -> dict[str, float]:
    """Memory that the replay buffer takes for so many steps of random play."""
    buffer, env = model.replay_buffer, model.env
    before, last, rng = private_mb(), env.reset(), np.random.default_rng(0)
    for _ in range(steps // env.num_envs):
        actions = rng.integers(env.action_space.n, size=env.num_envs)
        new, rewards, dones, infos = env.step(actions)
        final = np.stack([info.get("terminal_observation", o) for info, o in zip(infos, new, strict=True)])
        buffer.add(last, final, actions.reshape(-1, 1), rewards, dones, infos)
        last = new
    megabytes = private_mb() - before
    return {"steps": steps, "megabytes": round(megabytes), "bytes_per_step": round(megabytes * 1e6 / steps)}


def measure(model: EfficientZeroV2, steps: int, updates: int) -> dict[str, Any]:
    """Time of collecting and of updating, by part."""
    clock = Clock(model.device)
    for policy in (model.policy, model.policy_target):
        clock.wrap(policy, "plan", "tree")
        clock.wrap(policy, "_recurrent", "network, search")
        clock.wrap(policy, "_roots", "network, encoder")
    clock.wrap(DeviceSteps, "launch", "network, search")  # instead of _recurrent, with CUDA graphs
    clock.wrap(DeviceSteps, "collect", "network, search")
    clock.wrap(model.replay_buffer, "sample", "data")
    clock.wrap(model.replay_buffer, "add", "data")
    clock.wrap(model.env, "step", "environment")
    model.learning_starts, model.gradient_steps = model.num_timesteps, 0
    clock.flush()
    model.learn(steps, reset_num_timesteps=False)
    collecting = clock.flush()
    clock.wrap(model, "reanalyze", "targets")
    clock.wrap(model, "compute_loss", "network, loss")
    clock.wrap(model.policy.optimizer, "step", "network, optimizer")
    clock.wrap(th.Tensor, "backward", "network, backward")
    clock.wrap(GraphedPass, "backward", "network, backward")
    model.train(1, model.batch_size)
    clock.flush()
    model.train(updates, model.batch_size)
    updating = clock.flush()
    clock.unwrap()
    roots = model.batch_size * (model.unroll_steps + 1)
    total = sum(updating.values())
    network = sum(s for part, s in updating.items() if part.startswith("network"))
    simulations = roots * model.num_simulations * updates
    in_search = updating["tree"] + updating["network, search"]
    return {
        "steps": steps, "updates": updates, "collecting": collecting, "updating": updating,
        "steps_per_second": steps / sum(collecting.values()), "updates_per_second": updates / total,
        "simulations_per_second": simulations / in_search, "network_share_of_updates": network / total,
    }  # fmt: skip


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--fill", type=int, default=100_000)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=JSON", help="other settings; no result is written")
    args = parser.parse_args()
    overrides = parse_settings(args.set)
    model, settings = build(args.device, overrides)
    memory = fill(model, args.fill)
    print(memory)
    facts = measure(model, args.steps, args.updates)
    for phase in ("collecting", "updating"):
        total = sum(facts[phase].values())
        for part, seconds in sorted(facts[phase].items(), key=lambda item: -item[1]):
            print(f"{phase}: {part}: {seconds:.2f} s, {100 * seconds / total:.1f} %")
    print({k: round(v, 3) for k, v in facts.items() if isinstance(v, float)})
    if not overrides:
        OUT.write_text(
            json.dumps({"settings": settings, "memory": memory, **facts, **machine(str(model.device))}, indent=1)
        )


if __name__ == "__main__":
    main()
