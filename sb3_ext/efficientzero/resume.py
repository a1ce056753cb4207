"""Random state of a training run, so that a loaded model goes on as if it had never stopped."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm


def random_state(model: BaseAlgorithm) -> dict[str, Any]:
    """
    State of every generator that an SB3 algorithm draws from outside its replay buffer and its environment: torch's
    (CPU, and the model's GPU), numpy's and Python's global ones, and the action space's.
    """
    state: dict[str, Any] = {
        "torch": th.get_rng_state().numpy(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
        "action_space": model.action_space.np_random.bit_generator.state,
    }
    if model.device.type == "cuda":
        state["cuda"] = th.cuda.get_rng_state(model.device).numpy()
    return state


def restore_random_state(model: BaseAlgorithm, state: dict[str, Any]) -> None:
    """Set every generator back; a GPU's stays as it is if the state was read on a CPU."""
    th.set_rng_state(th.from_numpy(state["torch"]))
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    model.action_space.np_random.bit_generator.state = state["action_space"]
    if "cuda" in state and model.device.type == "cuda":
        th.cuda.set_rng_state(th.from_numpy(state["cuda"]), model.device)
