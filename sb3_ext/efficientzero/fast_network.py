"""The parts of an MLP policy's network that the search calls, without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch as th
from numpy.typing import NDArray

from sb3_ext.efficientzero.fast import FastMlp, compile_mlp, decode
from sb3_ext.efficientzero.gaussian import INNER_ACTIONS, inner_samples
from sb3_ext.efficientzero.search import RecurrentOutput
from sb3_ext.efficientzero.threads import blas_threads

if TYPE_CHECKING:
    from sb3_ext.efficientzero.policies import EfficientZeroPolicy

EPS = 1e-3
"""Of the transform h of values and rewards."""


class Roots(NamedTuple):
    """
    What the network says of observations.

    :param latent: latent states, ``[B, ...]``, tensor or numpy array
    :param values: ``[B]``, in units of return
    :param policy: output of the policy head, ``[B, policy_size]``
    """

    latent: Any
    values: Any
    policy: Any


class FastNetwork:
    """
    The parts of an MLP network that the search calls, compiled; their parameters are read again when torch changed
    them.

    :param policy: the policy
    """

    def __init__(self, policy: EfficientZeroPolicy) -> None:
        net = policy.network
        self._policy = policy
        self._parts: list[FastMlp] = [
            compile_mlp(part) for part in (net.step, net.settle, net.reward_head, net.prediction)
        ]
        self._parameters = list(net.parameters())
        self._version = -1
        self._support, self._bins = policy.support.numpy(), policy.support_size
        self._one_hot = np.eye(policy.action_size, dtype=np.float32)

    def refresh(self) -> None:
        """Read the parameters if they changed; fused optimizers leave torch's version counters as they are."""
        version = sum(p._version for p in self._parameters) + self._policy.optimizer_steps
        if version != self._version:
            for part in self._parts:
                part.refresh()
            self._version = version

    def roots(self, latent: NDArray[np.float32]) -> Roots:
        """See :meth:`EfficientZeroPolicy.roots`."""
        with blas_threads():
            out = self._parts[3](latent)
        return Roots(latent, decode(out[:, : self._bins], self._support, EPS), out[:, self._bins :])

    def recurrent(
        self, embedding: Any, slots: NDArray[np.int64], inner_noise: th.Tensor | None = None
    ) -> RecurrentOutput:
        """One step of the network."""
        step, settle, reward_head, prediction = self._parts
        if self._policy.discrete:
            latent, action = embedding, self._one_hot[slots]
        else:
            latent, actions = embedding
            action = actions[np.arange(len(slots)), slots]
        change = step(np.concatenate([latent, action], axis=1))
        change += latent
        latent = settle(change)
        out = prediction(latent)
        reward = decode(reward_head(latent), self._support, EPS)
        value, policy = decode(out[:, : self._bins], self._support, EPS), out[:, self._bins :]
        if self._policy.discrete:
            return RecurrentOutput(reward, value, policy, latent)
        inner = inner_samples(th.from_numpy(policy), self._policy.num_sampled_actions, inner_noise).numpy()
        return RecurrentOutput(reward, value, np.zeros((len(inner), INNER_ACTIONS), np.float32), (latent, inner))
