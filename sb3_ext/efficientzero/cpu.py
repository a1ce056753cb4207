"""The parts of an MLP policy's network that the search calls, without torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from numpy.typing import NDArray

from sb3_ext.efficientzero.gaussian import INNER_ACTIONS, inner_samples
from sb3_ext.efficientzero.networks import MlpNetwork, Roots
from sb3_ext.losses import TRANSFORM_EPS
from sb3_ext.search.gumbel import RecurrentOutput
from sb3_ext.search.mlp import FastMlp, compile_mlp, decode
from sb3_ext.threads import blas_threads


class FastNetwork:
    """
    The parts of an MLP network without value prefixes, compiled; their parameters are read again when torch changed
    them. ``num_sampled_actions`` are the slots of a node in continuous control; None: actions are discrete.
    """

    def __init__(
        self, network: MlpNetwork, support: NDArray[np.float32], action_size: int, num_sampled_actions: int | None
    ) -> None:
        parts: Any = network.step, network.settle, network.reward_head, network.prediction
        self._parts: list[FastMlp] = [compile_mlp(part) for part in parts]
        self._parameters = list(network.parameters())
        self._version = -1
        self._support, self._bins, self._slots = support, len(support), num_sampled_actions
        self._one_hot = np.eye(action_size, dtype=np.float32)

    def refresh(self, optimizer_steps: int) -> None:
        """Read the parameters if they changed, after so many steps of the optimizer."""
        # fused optimizers leave torch's version counters as they are
        version = sum(p._version for p in self._parameters) + optimizer_steps
        if version != self._version:
            for part in self._parts:
                part.refresh()
            self._version = version

    def roots(self, latent: NDArray[np.float32]) -> Roots:
        """See :meth:`EfficientZeroPolicy.roots`."""
        with blas_threads():
            out = self._parts[3](latent)
        return Roots(latent, decode(out[:, : self._bins], self._support, TRANSFORM_EPS), out[:, self._bins :])

    def recurrent(
        self, embedding: Any, slots: NDArray[np.int64], inner_noise: th.Tensor | None = None
    ) -> RecurrentOutput:
        """One step of the network."""
        step, settle, reward_head, prediction = self._parts
        if self._slots is None:
            latent, action = embedding, self._one_hot[slots]
        else:
            latent, actions = embedding
            action = actions[np.arange(len(slots)), slots]
        change = step(np.concatenate([latent, action], axis=1))
        change += latent
        latent = settle(change)
        out = prediction(latent)
        reward = decode(reward_head(latent), self._support, TRANSFORM_EPS)
        value, policy = decode(out[:, : self._bins], self._support, TRANSFORM_EPS), out[:, self._bins :]
        if self._slots is None:
            return RecurrentOutput(reward, value, policy, latent)
        inner = inner_samples(th.from_numpy(policy), self._slots, inner_noise).numpy()
        return RecurrentOutput(reward, value, np.zeros((len(inner), INNER_ACTIONS), np.float32), (latent, inner))
