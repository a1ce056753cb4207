"""
Steps per second of CQL, cloning, DQN with prioritized replay, and GAIL on a GPU, and how often each step waits for it.

    uv run --all-extras benchmarks/gpu_smoke.py --out results.json

Offline: gradient steps on 5,000 frames of random Breakout, batches of 32, frames on the GPU; without recorded kernels
and with frames in RAM for comparison. DQN and QR-DQN: environment steps of Breakout, one environment, one gradient step
in four steps. GAIL: CartPole-v1, where a GPU gains nothing. "Waits" counts the synchronisations that torch reports.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch as th
from cql_learning import machine
from stable_baselines3.common.env_util import make_vec_env

from sb3_ext import BC, CQL, DQN, QRDQN, PrioritizedReplayBuffer, record
from sb3_ext.data import StackFrames, make_atari_env


def timed(advance: Callable[[int], Any], steps: int, warm_up: int) -> dict[str, float]:
    """Steps per second, and waits per step."""
    advance(warm_up)
    th.cuda.synchronize()
    start = time.perf_counter()
    advance(steps)
    th.cuda.synchronize()
    rate = steps / (time.perf_counter() - start)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        th.cuda.set_sync_debug_mode("warn")
        advance(100)
        th.cuda.set_sync_debug_mode("default")
    waits = sum("synchroniz" in str(w.message) for w in caught) / 100
    return {"steps_per_second": rate, "waits_per_step": waits}


def offline(algo: Any, dataset: Any, steps: int, storage: str = "device", **kwargs: Any) -> dict[str, float]:
    """Gradient steps on a dataset; ``learn`` with everything that belongs to it."""
    model = algo("CnnPolicy", dataset, seed=0, device="cuda", dataset_kwargs={"storage": storage}, **kwargs)
    assert all(p.is_cuda for p in model.policy.parameters())
    return timed(model.learn, steps, 100)


def online(algo: Any, steps: int, **kwargs: Any) -> dict[str, float]:
    """Environment steps."""
    env = make_vec_env(lambda: StackFrames(make_atari_env("Breakout"), 4), seed=0)
    model = algo("CnnPolicy", env, buffer_size=10_000, learning_starts=100, seed=0, device="cuda", **kwargs)
    return timed(lambda n: model.learn(n, reset_num_timesteps=False), steps, 300)


def gail(steps: int, device: str) -> dict[str, float]:
    """Environment steps of GAIL on CartPole."""
    import gymnasium as gym

    from sb3_ext.gail import GAIL

    dataset = record(None, gym.make("CartPole-v1"), f"cartpole/random-{device}-v0", n_steps=1000)
    env = make_vec_env("CartPole-v1", 8, seed=0)
    model = GAIL("MlpPolicy", env, dataset, n_steps=128, batch_size=256, seed=0, device=device)
    model.learn(1024)
    start = time.perf_counter()
    model.learn(steps)
    return {"steps_per_second": steps / (time.perf_counter() - start)}


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases by name")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"MINARI_DATASETS_PATH": f"{folder}/data", "SB3_EXT_CACHE": f"{folder}/cache"}
        dataset = record(None, make_atari_env("Breakout"), "breakout/random-v0", n_steps=5000)
        prioritized = {"replay_buffer_class": PrioritizedReplayBuffer, "optimize_memory_usage": True}
        cases: dict[str, Callable[[], dict[str, float]]] = {
            "CQL": lambda: offline(CQL, dataset, args.steps),
            "CQL, bf16": lambda: offline(CQL, dataset, args.steps, bf16=True),
            "CQL, frames in RAM": lambda: offline(CQL, dataset, args.steps, "ram"),
            "CQL, frames in RAM, kernels one by one": lambda: offline(
                CQL, dataset, args.steps, "ram", cuda_graphs=False
            ),
            "cloning": lambda: offline(BC, dataset, args.steps),
            "DQN": lambda: online(DQN, args.steps),
            "DQN, prioritized": lambda: online(DQN, args.steps, **prioritized),
            "QR-DQN, prioritized": lambda: online(QRDQN, args.steps, **prioritized),
            "GAIL": lambda: gail(8192, "cuda"),
            "GAIL on the CPU": lambda: gail(8192, "cpu"),
        }
        for name, case in cases.items():
            if args.only and name not in args.only:
                continue
            rows[name] = case()
            print(name, {key: round(value, 2) for key, value in rows[name].items()}, flush=True)
    if args.out:
        facts = {"benchmark": "gpu_smoke", "steps": args.steps, "rows": rows}
        args.out.write_text(json.dumps({**facts, **machine(th.cuda.get_device_name())}, indent=1))


if __name__ == "__main__":
    main()
