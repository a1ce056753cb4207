"""
d3rlpy's DiscreteCQL and DiscreteBC with their defaults, in their own environment; started by cql_defaults.py.

A job is one line of JSON: ``{"algo": "cql", "data": "x.npz", "seed": 0, "steps": [5000, 20000], "folder": "."}``. The
policy after each of the steps is written as TorchScript, ``folder/<steps>.pt``; the answer has CPU seconds. The dataset
is built from arrays: d3rlpy's reader of Minari datasets pairs observations with the wrong actions.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import d3rlpy
import numpy as np
import torch as th
from blocks import versions


def learn(algo: str, data: str, seed: int, steps: list[int], folder: str) -> list[float]:
    """
    Learn, and write the policies.

    :return: CPU seconds of learning until each of ``steps``
    """
    d3rlpy.seed(seed)
    with np.load(data) as file:
        arrays: dict[str, Any] = {key: file[key] for key in file.files}
    dataset = d3rlpy.dataset.MDPDataset(
        observations=arrays["observations"],
        actions=arrays["actions"].reshape(-1, 1),
        rewards=arrays["rewards"].reshape(-1, 1).astype(np.float32),
        terminals=arrays["terminated"].astype(np.float32),
        timeouts=arrays["truncated"].astype(np.float32),
        action_size=int(arrays["n_actions"]),
    )
    configs = {"cql": d3rlpy.algos.DiscreteCQLConfig, "bc": d3rlpy.algos.DiscreteBCConfig}
    learner = configs[algo]().create(device="cpu:0")
    learner.build_with_dataset(dataset)
    done, cpu, seconds = 0, 0.0, []
    for wanted in steps:
        started = time.process_time()
        while done < wanted:  # what fit() does, without its log
            learner.update(dataset.sample_transition_batch(learner.batch_size))
            done += 1
        cpu += time.process_time() - started
        seconds.append(round(cpu, 2))
        learner.save_policy(f"{folder}/{wanted}.pt")
    return seconds


if __name__ == "__main__":
    th.set_num_threads(1)
    print(json.dumps({"ready": versions("d3rlpy", "torch", "numpy", "gymnasium")}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"cpu_seconds": learn(**json.loads(line))}), flush=True)
