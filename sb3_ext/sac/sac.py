"""SB3's SAC with the losses kept per sample, so that importance weights reach the critics' gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import stable_baselines3 as sb3
import torch as th
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.utils import polyak_update
from torch.nn import functional as F

from sb3_ext.losses import LossOutput
from sb3_ext.off_policy import OffPolicy, minimise
from sb3_ext.threads import with_loop_threads


class SAC(OffPolicy, sb3.SAC):
    """
    Soft actor-critic (Haarnoja et al., 2018, https://arxiv.org/abs/1801.01290, with the entropy coefficient of
    https://arxiv.org/abs/1812.05905): SB3's ``SAC``, same constructor, bit-identical results under a uniform buffer.

    Unlike SB3's, its critics' loss stays per sample until importance weights are applied, and TD errors go back to a
    prioritized buffer. The losses of the actor and of the entropy coefficient are not weighted. The log has the means
    of what SB3 logs.
    """

    def compute_loss(self, batch: ReplayBufferSamples) -> LossOutput:
        """
        Half the squared TD error of each critic, summed over critics (eq. 5), ``[B]``.

        :param batch: samples of the replay buffer, actions scaled to [-1, 1] as SB3 stores them
        :return: loss; the TD error is the mean over critics of target less value, ``[B]``
        """
        return self._critic_loss(batch, self._entropy_coefficient())

    def _critic_loss(self, batch: ReplayBufferSamples, ent_coef: th.Tensor) -> LossOutput:
        discounts = batch.discounts if batch.discounts is not None else self.gamma
        with th.no_grad():
            # smallest target value of the policy's action, less its log-probability: the soft value, [B, 1]
            next_actions, next_log_prob = self.actor.action_log_prob(batch.next_observations)
            next_q = th.cat(self.critic_target(batch.next_observations, next_actions), dim=1)
            next_value = next_q.min(dim=1, keepdim=True).values - ent_coef * next_log_prob.reshape(-1, 1)
            target = batch.rewards + (1 - batch.dones) * discounts * next_value
        q_values = self.critic(batch.observations, batch.actions)
        loss = th.stack([F.mse_loss(q, target, reduction="none").squeeze(1) for q in q_values]).sum(dim=0)
        error = target - th.cat(q_values, dim=1).detach()
        return LossOutput(0.5 * loss, error.mean(dim=1), {})

    def _entropy_coefficient(self) -> th.Tensor:
        """Weight of the entropy at the moment, ``[1]`` or 0-dim, without gradient."""
        return self.ent_coef_tensor if self.log_ent_coef is None else th.exp(self.log_ent_coef.detach())

    def _update(self, batch: Any, weights: th.Tensor | None) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        if self.use_sde:
            self.actor.reset_noise()
        # the policy's actions, whose gradient the actor's loss needs below
        actions, log_prob = self.actor.action_log_prob(batch.observations)
        # entropy coefficient; this step still takes the one of before
        ent_coef = self._entropy_coefficient()
        metrics = {"ent_coef": ent_coef.reshape(()), **self._tune_entropy(log_prob)}
        # critics
        output = self._critic_loss(batch, ent_coef)
        metrics["critic_loss"] = self._minimise(self.critic.optimizer, output, weights)
        # actor, judged by the critics that have just learnt
        loss = self._actor_loss(batch.observations, actions, log_prob, ent_coef)
        metrics["actor_loss"] = self._minimise(self.actor.optimizer, LossOutput(loss, loss.detach(), {}))
        return output.td_error, {**metrics, **output.metrics}

    def _minimise(
        self, optimizer: th.optim.Optimizer, output: LossOutput, weights: th.Tensor | None = None
    ) -> th.Tensor:
        return minimise(optimizer, output, weights, self.max_grad_norm, self._n_updates)

    def _tune_entropy(self, log_prob: th.Tensor) -> dict[str, th.Tensor]:
        """Move the entropy, ``-log_prob``, towards ``target_entropy`` (eq. 18 of the second paper), if it is tuned."""
        if self.ent_coef_optimizer is None or self.log_ent_coef is None:
            return {}
        assert isinstance(self.target_entropy, float)
        excess = (log_prob.reshape(-1) + self.target_entropy).detach()
        loss = -(self.log_ent_coef * excess)
        return {"ent_coef_loss": self._minimise(self.ent_coef_optimizer, LossOutput(loss, excess, {}))}

    def _actor_loss(self, observations: Any, actions: th.Tensor, log_prob: th.Tensor, ent_coef: th.Tensor) -> th.Tensor:
        """Weighted log-probability less the smallest value of the policy's actions (eq. 7), ``[B]``."""
        with self._fixed_critic():
            q_values = th.cat(self.critic(observations, actions), dim=1)
        return ent_coef * log_prob.reshape(-1) - q_values.min(dim=1).values

    @contextmanager
    def _fixed_critic(self) -> Iterator[None]:
        """Gradients flow through the critics, but none is computed for their weights."""
        parameters = [p for group in self.critic.optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    def _optimizers(self) -> list[th.optim.Optimizer]:
        tuned = [] if self.ent_coef_optimizer is None else [self.ent_coef_optimizer]
        return [self.actor.optimizer, self.critic.optimizer, *tuned]

    def _after_update(self, number: int) -> None:
        if number % self.target_update_interval == 0:
            polyak_update(self.critic.parameters(), self.critic_target.parameters(), self.tau)
            polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)

    learn = with_loop_threads(sb3.SAC.learn)
    """See SB3; small networks on a CPU take one thread, see :func:`~sb3_ext.threads.loop_threads`."""
