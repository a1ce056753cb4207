"""Conservative Q-learning on SAC, for continuous actions: offline from a Minari dataset, then online if wanted."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.distributions import TanhBijector
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import FloatSchedule, update_learning_rate
from stable_baselines3.sac.policies import SACPolicy

from sb3_ext.arguments import check_least
from sb3_ext.cql.conservative import ConservativeAlgorithm, check_alpha
from sb3_ext.cql.offline import with_adam
from sb3_ext.cuda_graphs import GraphedLoss
from sb3_ext.data.load import DatasetLike
from sb3_ext.data.trees import short_space
from sb3_ext.losses import LossOutput, sampled_conservative_gap
from sb3_ext.sac.sac import SAC
from sb3_ext.sac.values import values_of_actions
from sb3_ext.saving import FileLike

_LARGEST_MULTIPLIER = 1e6
"""As in the authors' code."""
_EPSILON = 1e-6
"""Added to the slope of the squashing function before its logarithm is taken, as SB3 does."""


class ContinuousCQL(ConservativeAlgorithm, SAC):
    """
    Conservative Q-learning CQL(H) (Kumar et al., 2020, https://arxiv.org/abs/2006.04779) on SAC, for continuous
    actions.

    Each critic's loss is its squared TD error plus ``cql_alpha * (log sum_n exp(Q(s, a_n) - log p(a_n)) - Q(s,
    a_data))`` (eq. 4, estimated as in appendix F): of ``3 * cql_n_actions`` actions a third is uniform, a third the
    policy's and a third its actions in the next state. The actor is SAC's. **One timestep of** ``learn`` **is one
    gradient step**, so that schedules, loggers, the progress bar and every SB3 callback mean gradient steps.
    ``learn_online`` continues in an environment.

    The defaults are those that the authors recommend for MuJoCo, with two hidden layers where they have three.

    :param policy: ``"MlpPolicy"``, ``"CnnPolicy"`` for pictures, ``"MultiInputPolicy"`` for ``Dict`` observations, or a
        class, as in SAC
    :param dataset: a ``minari.MinariDataset``, its id (downloaded if it is not here) or path, or a filled replay buffer
    :param env: environment for :meth:`learn_online`; its spaces must be the dataset's. Not needed to learn offline
    :param learning_rate: of the critics, or a schedule of the remaining progress (1 to 0)
    :param actor_learning_rate: likewise of the actor and of the entropy coefficient; higher learns faster from little
        training and is less stable
    :param buffer_size: capacity for *new* transitions in :meth:`learn_online`
    :param learning_starts: online steps with random actions before the first online gradient step
    :param batch_size: transitions per gradient step
    :param tau: share of the critics that the target critics take over
    :param gamma: discount factor; higher looks further ahead, and learns slower
    :param train_freq: online: steps between updates, as in SB3
    :param gradient_steps: online: gradient steps per update, as in SB3
    :param action_noise: online: as in SB3
    :param n_steps: rewards summed before bootstrapping
    :param ent_coef: as in SAC; ``"auto"`` keeps the policy's entropy at ``target_entropy``
    :param target_update_interval: **gradient steps** between target updates
    :param target_entropy: as in SAC
    :param max_grad_norm: gradient clipping; None for none
    :param cql_alpha: weight of the conservative term. Higher stays closer to the data (use it for little or narrow
        data), lower trusts the values more; 0 is offline SAC. The authors use 5 or 10 for MuJoCo
    :param cql_n_actions: actions of each of the three kinds; more estimate the term better, and take longer
    :param target_action_gap: the Lagrange version: ``cql_alpha`` is multiplied by a number that grows while the gap is
        above this and falls while it is below. The authors use 5 for mazes. None: ``cql_alpha`` is fixed
    :param soft_q_backup: bootstrap from the value less the policy's log-probability, as SAC does
    :param max_q_backup: bootstrap from the best of ``cql_n_actions`` actions of the policy, for sparse rewards
    :param calibrated: Cal-QL (Nakamoto et al., 2023, https://arxiv.org/abs/2303.05479): values of the policy's actions
        are not pushed below the return that the data got from there on, so that they do not have to rise again before
        :meth:`learn_online` gets better
    :param bc_steps: gradient steps in which the actor clones the data before it follows the critics. The authors have
        used up to 40,000, and say that it makes little difference
    :param clip_rewards: clip each reward to [-1, 1]
    :param dataset_kwargs: further arguments of :func:`~sb3_ext.data.load_minari`: ``transforms``, ``subset``,
        ``storage``, ``prioritized``, ``seed`` (of the sampler; default: this model's), ...
    :param bf16: run the critics in bfloat16 where they see many actions (fast where the processor has it)
    :param cuda_graphs: on a GPU, unless observations are a ``Dict``: record the kernels of the losses once in each
        ``learn`` and replay them
    :param stats_window_size: as in SB3
    :param tensorboard_log: as in SB3
    :param policy_kwargs: as in SAC, for instance ``dict(net_arch=[256, 256, 256])``
    :param verbose: 0 none, 1 info, 2 debug
    :param seed: seed of the networks, of the sampled actions and of the sampler
    :param device: as in SB3
    :param _init_setup_model: build the networks now
    :raises TypeError: if an environment is given as the dataset or the reverse
    :raises ValueError: if dataset, environment and policy do not fit together, or a number is out of range
    """

    action_kinds = (spaces.Box,)
    other_actions = " CQL learns from Discrete ones, and BC clones all."
    scale_actions = True
    judged = "q_policy"
    _saved_noise: tuple[str, th.Tensor] | None = None

    def __init__(
        self,
        policy: str | type[SACPolicy],
        dataset: DatasetLike | ReplayBuffer | None = None,
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule = 3e-4,
        actor_learning_rate: float | Schedule = 1e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 0,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        n_steps: int = 1,
        ent_coef: str | float = "auto",
        target_update_interval: int = 1,
        target_entropy: str | float = "auto",
        max_grad_norm: float | None = None,
        cql_alpha: float = 5.0,
        cql_n_actions: int = 10,
        target_action_gap: float | None = None,
        soft_q_backup: bool = False,
        max_q_backup: bool = False,
        calibrated: bool = False,
        bc_steps: int = 0,
        clip_rewards: bool = False,
        dataset_kwargs: dict[str, Any] | None = None,
        bf16: bool = False,
        cuda_graphs: bool = True,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        self._check_env(env)
        check_least(
            1,
            batch_size=batch_size,
            target_update_interval=target_update_interval,
            n_steps=n_steps,
            cql_n_actions=cql_n_actions,
        )
        check_least(0, bc_steps=bc_steps, target_action_gap=target_action_gap, max_grad_norm=max_grad_norm)
        if not callable(actor_learning_rate):
            check_least(0, actor_learning_rate=actor_learning_rate)
        check_alpha(cql_alpha)
        if soft_q_backup and max_q_backup:
            raise ValueError("soft_q_backup and max_q_backup bootstrap from different values: choose one of them.")
        self.actor_learning_rate, self.max_grad_norm = actor_learning_rate, max_grad_norm
        self.cql_alpha, self.cql_n_actions, self.target_action_gap = cql_alpha, cql_n_actions, target_action_gap
        self.soft_q_backup, self.max_q_backup, self.calibrated = soft_q_backup, max_q_backup, calibrated
        self.bc_steps, self.clip_rewards, self.bf16, self.cuda_graphs = bc_steps, clip_rewards, bf16, cuda_graphs
        self.dataset_kwargs, self.dataset_info = dict(dataset_kwargs or {}), {}
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            buffer_size=buffer_size,
            learning_starts=learning_starts,
            batch_size=batch_size,
            tau=tau,
            gamma=gamma,
            train_freq=train_freq,
            gradient_steps=gradient_steps,
            action_noise=action_noise,
            n_steps=n_steps,
            ent_coef=ent_coef,
            target_update_interval=target_update_interval,
            target_entropy=target_entropy,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=with_adam(policy_kwargs, eps=1e-8),
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        if _init_setup_model:
            self._attach(dataset)
            self._setup_model()

    @property
    def actions_per_state(self) -> int:
        """Actions that the critics see of each state in a gradient step."""
        return 1 + 3 * self.cql_n_actions

    def _check_actions(self, space: spaces.Space[Any], name: str) -> None:
        super()._check_actions(space, name)
        assert isinstance(space, spaces.Box)
        if not space.is_bounded():
            raise ValueError(
                f"ContinuousCQL needs actions between bounds, those of {name} have none: {short_space(space)}. Give "
                "bounds with dataset_kwargs={'transforms': ['clip_actions:-1,1']}."
            )

    def _setup_model(self) -> None:
        if self.target_entropy == "auto":  # SB3 asks the environment, which need not be there
            self.target_entropy = -float(spaces.flatdim(self.action_space))
        super()._setup_model()
        # the Lagrange multiplier of cql_alpha
        self.log_cql_multiplier = th.zeros(1, device=self.device).requires_grad_(True)
        self.cql_multiplier_optimizer = th.optim.Adam([self.log_cql_multiplier], lr=self.lr_schedule(1))
        self.actor_lr_schedule = FloatSchedule(self.actor_learning_rate)
        # actions are sampled with a generator of their own, so that evaluation does not disturb training
        self._noise = th.Generator(self.device)
        self._noise.manual_seed(int(np.random.randint(2**31)) if self.seed is None else self.seed)
        kind, state = self._saved_noise or ("", None)
        if state is not None and kind == self.device.type:
            self._noise.set_state(state)
        self._forget_graphs()

    def _forget_graphs(self) -> None:
        self._graphed_critic = GraphedLoss(self.critic, self._conservative_loss)
        self._graphed_actor = GraphedLoss(self.actor, self._policy_loss)
        self._graphed_clone = GraphedLoss(self.actor, self._clone_loss)

    def _update_learning_rate(self, optimizers: Any) -> None:
        super()._update_learning_rate([self.critic.optimizer, self.cql_multiplier_optimizer])
        rate = self.actor_lr_schedule(self._current_progress_remaining)
        for optimizer in (self.actor.optimizer, self.ent_coef_optimizer):
            if optimizer is not None:
                update_learning_rate(optimizer, rate)

    def compute_loss(self, batch: Any) -> LossOutput:
        """
        Squared TD error plus ``cql_alpha`` times the conservative gap, summed over critics, ``[B]``.

        :param batch: samples of the replay buffer, actions scaled to [-1, 1]
        :return: loss; the TD error is the mean over critics of target less value, ``[B]``; metrics, means over critics:
            ``td_loss``, ``conservative_gap``, ``q_data`` (Q of the data's actions), ``q_policy`` (Q of the policy's)
        """
        return self._critic_loss(batch, self._entropy_coefficient())

    def _critic_loss(self, batch: Any, ent_coef: th.Tensor) -> LossOutput:
        n, size = self.cql_n_actions, (len(batch.actions), self.cql_n_actions, batch.actions.shape[1])
        noise = (
            self._normal(size[0], n + 1, size[2]),
            self._normal(*size),
            th.rand(size, generator=self._noise, device=self.device),
        )
        multiplier = self.log_cql_multiplier.detach().exp().clamp(max=_LARGEST_MULTIPLIER)
        function = self._graphed_critic if self._graphed(batch) else self._conservative_loss
        return function(ent_coef, multiplier, *noise, *self._inputs(batch))

    def _normal(self, *size: int) -> th.Tensor:
        return th.randn(size, generator=self._noise, device=self.device)

    def _graphed(self, batch: Any) -> bool:
        return self.cuda_graphs and self.device.type == "cuda" and not isinstance(batch.observations, dict)

    def _sample(self, observations: Any, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Actions of the policy, ``[B, N, D]``, and their log-probabilities, ``[B, N]``, by noise ``[B, N, D]``."""
        mean, log_std, _ = self.actor.get_action_dist_params(observations)
        log_std = log_std.unsqueeze(1)
        actions = th.tanh(mean.unsqueeze(1) + log_std.exp() * noise)
        return actions, _log_prob(actions, noise, log_std)

    def _conservative_loss(
        self,
        ent_coef: th.Tensor,
        multiplier: th.Tensor,
        next_noise: th.Tensor,
        noise: th.Tensor,
        uniform: th.Tensor,
        *inputs: th.Tensor,
    ) -> LossOutput:
        """The critics' loss as a function of tensors, with nothing in it that a CUDA graph could not hold."""
        batch = self._named(*inputs)
        rewards = batch.rewards.clamp(-1, 1) if self.clip_rewards and self.n_steps == 1 else batch.rewards
        with th.no_grad():
            next_actions, next_log_prob = self._sample(batch.next_observations, next_noise)
            actions, log_prob = self._sample(batch.observations, noise)
            target = rewards + (1 - batch.dones) * self._discounts(batch) * self._next_values(
                batch.next_observations, next_actions, next_log_prob, ent_coef
            )
        # values of all actions at the observations in one pass, [C, B, 1 + 3 N]
        candidates = th.cat([batch.actions.unsqueeze(1), 2 * uniform - 1, next_actions[:, 1:], actions], dim=1)
        with th.autocast(self.device.type, th.bfloat16, enabled=self.bf16):
            q_values = values_of_actions(self.critic, batch.observations, candidates)
        n = uniform.shape[1]
        q_data, q_uniform, q_policy = q_values[:, :, 0], q_values[:, :, 1 : 1 + n], q_values[:, :, 1 + n :]
        # squared TD error of each critic, [C, B]
        error = target.squeeze(1) - q_data
        # gap to the data's action, [C, B]
        pushed = q_policy if batch.returns_to_go is None else th.maximum(q_policy, batch.returns_to_go)
        density = th.full_like(log_prob, -actions.shape[2] * math.log(2))  # of actions between -1 and 1
        gap = sampled_conservative_gap(
            th.cat([q_uniform, pushed], dim=2), th.cat([density, next_log_prob[:, 1:], log_prob], dim=1), q_data
        )
        excess = gap - (self.target_action_gap or 0.0)
        loss = (error.square() + self.cql_alpha * multiplier * excess).sum(dim=0)
        with th.no_grad():
            metrics = {
                "td_loss": error.square().mean(),
                "conservative_gap": gap.mean(),
                "q_data": q_data.mean(),
                "q_policy": q_policy[:, :, n:].mean(),
            }
        return LossOutput(loss, error.mean(dim=0).detach(), metrics)

    def _discounts(self, batch: Any) -> Any:
        return self.gamma if batch.discounts is None else batch.discounts

    def _next_values(
        self, observations: Any, actions: th.Tensor, log_prob: th.Tensor, ent_coef: th.Tensor
    ) -> th.Tensor:
        """What is bootstrapped from, ``[B, 1]``: the smallest target value of one action, or of the best of many."""
        which = slice(1, None) if self.max_q_backup else slice(1)
        actions, log_prob = actions[:, which], log_prob[:, which]
        values = values_of_actions(self.critic_target, observations, actions).min(dim=0).values
        if self.soft_q_backup:
            values = values - ent_coef * log_prob
        return values.max(dim=1, keepdim=True).values

    def _policy_loss(self, ent_coef: th.Tensor, noise: th.Tensor, observations: Any) -> LossOutput:
        """SAC's loss of the actor, ``[B]``."""
        actions, log_prob = self._sample(observations, noise)
        loss = self._actor_loss(observations, actions.squeeze(1), log_prob, ent_coef)
        return LossOutput(loss, loss.detach(), {"entropy": -log_prob.mean()})

    def _clone_loss(
        self, ent_coef: th.Tensor, noise: th.Tensor, observations: Any, data_actions: th.Tensor
    ) -> LossOutput:
        """Behaviour cloning with SAC's entropy, ``[B]``."""
        _, log_prob = self._sample(observations, noise)
        mean, log_std, _ = self.actor.get_action_dist_params(observations)
        data_noise = (TanhBijector.inverse(data_actions) - mean) / log_std.exp()
        loss = ent_coef * log_prob.squeeze(1) - _log_prob(data_actions, data_noise, log_std)
        return LossOutput(loss, loss.detach(), {"entropy": -log_prob.mean()})

    def _update(self, batch: Any, weights: th.Tensor | None) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        ent_coef = self._entropy_coefficient()
        # critics
        output = self._critic_loss(batch, ent_coef)
        metrics = {"critic_loss": self._minimise(self.critic.optimizer, output, weights), **output.metrics}
        if self.target_action_gap is not None:
            metrics["cql_multiplier"] = self._tune_multiplier(metrics["conservative_gap"])
        # actor, judged by the critics that have just learnt
        noise = self._normal(len(batch.actions), 1, batch.actions.shape[1])
        inputs = ent_coef, noise, batch.observations
        if self._n_updates < self.bc_steps:
            clone = self._graphed_clone if self._graphed(batch) else self._clone_loss
            actor = clone(*inputs, batch.actions)
        else:
            follow = self._graphed_actor if self._graphed(batch) else self._policy_loss
            actor = follow(*inputs)
        metrics["actor_loss"] = self._minimise(self.actor.optimizer, actor)
        # entropy
        metrics |= {"ent_coef": ent_coef.reshape(()), **actor.metrics, **self._tune_entropy(-actor.metrics["entropy"])}
        return output.td_error, metrics

    def _tune_multiplier(self, gap: th.Tensor) -> th.Tensor:
        """Raise the multiplier of ``cql_alpha`` while the gap is above ``target_action_gap``, and lower it below."""
        multiplier = self.log_cql_multiplier.exp().clamp(max=_LARGEST_MULTIPLIER)
        loss = -multiplier * self.cql_alpha * (gap - (self.target_action_gap or 0.0))
        self._minimise(self.cql_multiplier_optimizer, LossOutput(loss, gap, {}))
        return multiplier.detach().reshape(())

    def save(self, path: FileLike, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:
        """See :meth:`OfflineAlgorithm.save`."""
        self._saved_noise = self.device.type, self._noise.get_state()
        super().save(path, exclude, include)

    def _excluded_save_params(self) -> list[str]:
        names = ("_noise", "_graphed_critic", "_graphed_actor", "_graphed_clone", "actor_lr_schedule")
        return [*super()._excluded_save_params(), *names]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        states, tensors = super()._get_torch_save_params()
        return [*states, "cql_multiplier_optimizer"], [*tensors, "log_cql_multiplier"]


def _log_prob(actions: th.Tensor, noise: th.Tensor, log_std: th.Tensor) -> th.Tensor:
    """
    Log-density of squashed Gaussian actions, as SB3 computes it, summed over their D numbers.

    :param actions: ``[..., D]``, between -1 and 1
    :param noise: how many standard deviations they are from the mean, before they are squashed, ``[..., D]``
    :param log_std: ``[..., D]``
    """
    gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    return (gaussian - th.log(1 - actions.square() + _EPSILON)).sum(dim=-1)
