"""What tells expert from generator, and what reward that makes. Logits are high for the expert, as in ``imitation``."""

from __future__ import annotations

from typing import Any, TypeAlias

import gymnasium as gym
import torch as th
from imitation.algorithms.adversarial.common import compute_train_stats
from imitation.rewards.reward_nets import RewardNet
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule, update_learning_rate
from torch.nn import functional as F

Batch: TypeAlias = tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]
"""Observations, actions, next observations ``[B, ...]`` each, and whether the task ended ``[B]``."""

SCORED_AT_ONCE = 2048


class Discriminator:
    """
    Network, optimizer and training step of the discriminator, with the loss of ``imitation``'s adversarial trainer.

    :param penalty: weight of the gradient penalty, 0 for none
    :param penalty_every: steps from one penalty to the next; each weighs as many times as much
    """

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        net: RewardNet,
        learning_rate: float | Schedule,
        penalty: float,
        device: th.device,
        penalty_every: int = 1,
    ) -> None:
        self.observation_space, self.action_space = observation_space, action_space
        self.net, self.penalty, self.device = net.to(device).eval(), penalty, device
        self.penalty_every, self._steps = penalty_every, 0
        self._schedule = FloatSchedule(learning_rate)
        self.optimizer = th.optim.Adam(self.net.parameters(), lr=self._schedule(1.0), fused=True)
        self._modules = list(self.net.modules())
        # a network of another class may look at the next observation without saying so
        self.needs_next = bool(getattr(self.net, "use_next_state", True))
        self._last: tuple[th.Tensor, th.Tensor, th.Tensor] | None = None

    def set_progress(self, remaining: float) -> None:
        """Follow the learning-rate schedule; ``remaining`` is the share of the training to come, from 1 to 0."""
        update_learning_rate(self.optimizer, self._schedule(remaining))

    def _preprocess(self, batch: Batch) -> Batch:
        """One-hot actions, pixels in [0, 1]."""
        observations, actions, after, ended = batch
        scale = self.net.normalize_images
        now = preprocess_obs(observations, self.observation_space, scale)
        then = preprocess_obs(after, self.observation_space, scale) if self.needs_next else now
        return now, preprocess_obs(actions, self.action_space, scale), then, ended  # type: ignore[return-value]

    def _train_mode(self, on: bool) -> None:
        for module in self._modules:  # what net.train(on) does, without walking the tree
            module.training = on

    def train(
        self, expert: Batch, generator: Batch, log_probs: tuple[th.Tensor, th.Tensor] | None = None, n_steps: int = 1
    ) -> None:
        """
        Steps on the mean binary cross-entropy between expert (1) and generator (0), who have B transitions for each.

        :param log_probs: log pi(a|s) of the expert's and of the agent's actions, ``[n_steps * B]`` each: subtracted
            from the network's output, which makes this AIRL's discriminator
        """
        e, g = self._preprocess(expert), self._preprocess(generator)
        size = len(e[0]) // n_steps
        labels = th.cat([th.ones(size, device=self.device), th.zeros(size, device=self.device)])
        self._train_mode(True)
        for step in range(n_steps):
            rows = slice(step * size, step * size + size)
            now_e: Batch = (e[0][rows], e[1][rows], e[2][rows], e[3][rows])
            now_g: Batch = (g[0][rows], g[1][rows], g[2][rows], g[3][rows])
            logits = self.net(*(th.cat(pair) for pair in zip(now_e, now_g, strict=True)))
            if log_probs is not None:
                logits = logits - th.cat([log_probs[0][rows], log_probs[1][rows]])
            loss = F.binary_cross_entropy_with_logits(logits, labels)
            self._last = (logits.detach(), labels, loss.detach())
            if self.penalty and self._steps % self.penalty_every == 0:
                loss = loss + self.penalty * self.penalty_every * self._gradient_penalty(now_e, now_g).mean()
            self._steps += 1
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        self._train_mode(False)

    def _gradient_penalty(self, expert: Batch, generator: Batch) -> th.Tensor:
        """
        Squared distance of the gradient's norm from 1 between expert and generator (Gulrajani et al., 2017, eq. 3).

        Unlike the paper, the network is no critic but gives logits; as in DAC (Kostrikov et al., 2019).
        """
        self._train_mode(False)  # these points are nobody's data: they stay out of the input normalisation
        share = th.rand(len(expert[0]), device=self.device)
        pairs = zip(expert, generator, strict=True)
        between = [th.lerp(g, e, share.view(-1, *[1] * (e.ndim - 1))).requires_grad_(True) for e, g in pairs]
        gradients = th.autograd.grad(self.net(*between).sum(), between, create_graph=True, allow_unused=True)
        self._train_mode(True)
        flat = th.cat([g.reshape(len(g), -1) for g in gradients if g is not None], 1)
        penalty: th.Tensor = (th.linalg.vector_norm(flat, dim=1) - 1).square()
        return penalty

    def logits(self, batch: Batch, log_prob: th.Tensor | None = None) -> th.Tensor:
        """Logits of transitions on any device, high for the expert, ``[B]``; ``log_prob`` as in :meth:`train`."""
        found = []
        with th.no_grad():
            for start in range(0, len(batch[0]), SCORED_AT_ONCE):
                o, a, n, d = (part[start : start + SCORED_AT_ONCE].to(self.device) for part in batch)
                found.append(self.net(*self._preprocess((o, a, n, d))))
        logits = th.cat(found)
        return logits if log_prob is None else logits - log_prob.to(self.device)

    def statistics(self) -> dict[str, float]:
        """Loss, accuracies and entropy of the last step by ``imitation``'s names; empty if there was none."""
        if self._last is None:
            return {}
        stats = compute_train_stats(*self._last)
        return {k: stats[k] for k in ("disc_loss", "disc_acc", "disc_acc_expert", "disc_acc_gen", "disc_entropy")}
