"""
d3rlpy's CQL for continuous actions in its own environment; started by continuous_learning.py.

A job is one line of JSON, see :func:`learn`. After each of its steps the policy is written as TorchScript,
``folder/<step>.pt``, and everything that going on needs as ``folder/model.pt``; then a line with CPU seconds follows.
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

NAMES = {
    "learning_rate": "critic_learning_rate",
    "actor_learning_rate": "actor_learning_rate",
    "batch_size": "batch_size",
    "tau": "tau",
    "gamma": "gamma",
    "cql_alpha": "conservative_weight",
    "cql_n_actions": "n_action_samples",
    "soft_q_backup": "soft_q_backup",
    "max_q_backup": "max_q_backup",
}
"""Our settings and what d3rlpy calls them."""


def learner_of(settings: dict[str, Any], net_arch: list[int]) -> Any:
    """
    CQL with the same settings as ours.

    :param settings: ours
    :param net_arch: hidden units of actor and critics
    :raises ValueError: for a setting that d3rlpy does not have
    """
    gap = settings.pop("target_action_gap", None)
    if unknown := settings.keys() - NAMES.keys():
        raise ValueError(f"d3rlpy has no {', '.join(sorted(unknown))}")
    multiplier = {"alpha_learning_rate": 0.0, "alpha_threshold": 0.0}
    if gap is not None:
        multiplier = {"alpha_learning_rate": settings["learning_rate"], "alpha_threshold": gap}
    encoder = d3rlpy.models.VectorEncoderFactory(net_arch)
    return d3rlpy.algos.CQLConfig(
        temp_learning_rate=settings["actor_learning_rate"],
        actor_encoder_factory=encoder,
        critic_encoder_factory=encoder,
        **multiplier,
        **{NAMES[name]: value for name, value in settings.items()},
    ).create(device="cpu:0")


def learn(data: str, seed: int, settings: dict[str, Any], net_arch: list[int], steps: list[int], folder: str) -> None:
    """
    Learn, and answer after each of ``steps``.

    :param data: file of arrays, one row for each step
    :param seed: of networks and batches
    :param settings: see :data:`NAMES`
    :param net_arch: hidden units
    :param steps: gradient steps at which the policy is wanted; the first one tells where a run goes on from if it is
        not 0, and then ``folder/model.pt`` is there
    :param folder: where to write
    """
    d3rlpy.seed(seed + steps[0])
    with np.load(data) as file:
        arrays: dict[str, Any] = {key: file[key] for key in file.files}
    dataset = d3rlpy.dataset.MDPDataset(
        observations=arrays["observations"].astype(np.float32),
        actions=arrays["actions"].astype(np.float32),
        rewards=arrays["rewards"].reshape(-1, 1).astype(np.float32),
        terminals=arrays["terminated"].astype(np.float32),
        timeouts=arrays["truncated"].astype(np.float32),
    )
    learner = learner_of(settings, net_arch)
    learner.build_with_dataset(dataset)
    done = steps[0]
    if done:
        learner.load_model(f"{folder}/model.pt")
    for wanted in steps[1:]:
        started = time.process_time()
        while done < wanted:  # what fit() does, without its log
            learner.update(dataset.sample_transition_batch(learner.batch_size))
            done += 1
        cpu = time.process_time() - started
        learner.save_policy(f"{folder}/{wanted}.pt")
        learner.save_model(f"{folder}/model.pt")
        print(json.dumps({"step": wanted, "cpu_seconds": round(cpu, 1)}), flush=True)


if __name__ == "__main__":
    print(json.dumps({"ready": versions("d3rlpy", "torch", "numpy", "gymnasium")}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        th.set_num_threads(job.pop("threads"))
        learn(**job)
