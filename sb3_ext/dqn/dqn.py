"""SB3's DQN and sb3-contrib's QR-DQN with the loss kept per sample, so that importance weights reach the gradient."""

from __future__ import annotations

from typing import Any, ClassVar

import sb3_contrib
import stable_baselines3 as sb3
import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch.nn import functional as F

from sb3_ext.dqn import rainbow
from sb3_ext.losses import LossOutput, quantile_huber_loss
from sb3_ext.off_policy import OffPolicy
from sb3_ext.threads import with_loop_threads


class DQN(OffPolicy, sb3.DQN):
    """
    Deep Q-Network (Mnih et al., 2015): SB3's ``DQN``, same constructor, bit-identical results under a uniform buffer.

    Unlike SB3's, its loss stays per sample until importance weights are applied, and TD errors go back to a prioritized
    buffer. ``policy_kwargs`` may also have ``double_q=True`` and ``dueling=True``.
    """

    policy_aliases: ClassVar[dict[str, Any]] = {
        "MlpPolicy": rainbow.DQNPolicy,
        "CnnPolicy": rainbow.DQNCnnPolicy,
        "MultiInputPolicy": rainbow.DQNMultiInputPolicy,
    }

    def compute_loss(self, batch: ReplayBufferSamples) -> LossOutput:
        """Huber loss on the one-step (or n-step) TD error, kappa = 1, and the TD error, ``[B]``."""
        discounts = batch.discounts if batch.discounts is not None else self.gamma
        with th.no_grad():
            next_q = self.q_net_target(batch.next_observations)
            chooser = self.q_net(batch.next_observations) if getattr(self.policy, "double_q", False) else next_q
            next_q = next_q.gather(1, chooser.argmax(dim=1, keepdim=True))
            target = batch.rewards + (1 - batch.dones) * discounts * next_q
        q = self.q_net(batch.observations).gather(1, batch.actions.long())
        loss = F.smooth_l1_loss(q, target, reduction="none")
        return LossOutput(loss.squeeze(1), (target - q.detach()).squeeze(1), {})

    learn = with_loop_threads(sb3.DQN.learn)
    """See SB3; small networks on a CPU take one thread, see :func:`~sb3_ext.threads.loop_threads`."""


class QRDQN(OffPolicy, sb3_contrib.QRDQN):
    """
    Quantile-regression DQN (Dabney et al., 2018): sb3-contrib's ``QRDQN``, same constructor.

    Equal to it under a uniform buffer up to float rounding, because the quantile Huber loss is summed in sorted order
    on a CPU. Importance weights, priorities and ``policy_kwargs`` work as in :class:`DQN`; the TD error is that of the
    mean over quantiles.
    """

    policy_aliases: ClassVar[dict[str, Any]] = {
        "MlpPolicy": rainbow.QRDQNPolicy,
        "CnnPolicy": rainbow.QRDQNCnnPolicy,
        "MultiInputPolicy": rainbow.QRDQNMultiInputPolicy,
    }

    def compute_loss(self, batch: ReplayBufferSamples) -> LossOutput:
        """Quantile Huber loss, see :func:`~sb3_ext.losses.quantile_huber_loss`, and TD error, ``[B]``."""
        quantiles = self.quantile_net(batch.observations)
        with th.no_grad():
            following = self.quantile_net_target(batch.next_observations)
            double_q = getattr(self.policy, "double_q", False)
            chooser = self.quantile_net(batch.next_observations) if double_q else following
            following = _of_action(following, chooser.mean(dim=1).argmax(dim=1, keepdim=True))
        return quantile_td(batch, quantiles, following, self.gamma)

    learn = with_loop_threads(sb3_contrib.QRDQN.learn)
    """See SB3; small networks on a CPU take one thread, see :func:`~sb3_ext.threads.loop_threads`."""


def quantile_td(
    batch: ReplayBufferSamples, quantiles: th.Tensor, next_quantiles: th.Tensor, gamma: float
) -> LossOutput:
    """
    QR-DQN's loss of the actions taken and TD error of the means over quantiles, ``[B]``.

    :param quantiles: of the online network at the observations, ``[B, N, A]``
    :param next_quantiles: of the target network at the next observations, of the action chosen there, ``[B, N]``
    :param gamma: discount factor where the batch has none of its own
    """
    discounts = batch.discounts if batch.discounts is not None else gamma
    with th.no_grad():
        target = batch.rewards + (1 - batch.dones) * discounts * next_quantiles
    current = _of_action(quantiles, batch.actions)
    return LossOutput(quantile_huber_loss(current, target), target.mean(1) - current.detach().mean(1), {})


def _of_action(quantiles: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """Pick each sample's action: ``[B, N, A]``, ``[B, 1]`` -> ``[B, N]``."""
    index = actions.long().reshape(-1, 1, 1).expand(-1, quantiles.shape[1], 1)
    return quantiles.gather(2, index).squeeze(2)
