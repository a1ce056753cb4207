"""Behaviour cloning: the baseline that ignores rewards."""

from __future__ import annotations

from typing import Any

import torch as th
from sb3_contrib.qrdqn.policies import QRDQNPolicy
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, ReplayBufferSamples, Schedule

from sb3_ext.cql.cql import CQL
from sb3_ext.cql.support import with_adam
from sb3_ext.data.load import DatasetLike
from sb3_ext.losses import LossOutput, conservative_gap


class BC(CQL):
    """
    Behaviour cloning for discrete actions: maximise the log-likelihood of the dataset's actions.

    Its loss, ``logsumexp_a f(s, a) - f(s, a_data)``, is CQL's conservative term alone, so it is the limit of CQL for
    infinite ``cql_alpha``: same networks (with one output per action), same data, no rewards. ``predict`` takes the
    likeliest action.

    :param policy: as in :class:`CQL`
    :param dataset: as in :class:`CQL`
    :param env: as in :class:`CQL`
    :param learning_rate: Adam's step size, or a schedule
    :param batch_size: transitions per gradient step
    :param max_grad_norm: gradient clipping; None for none
    :param dataset_kwargs: as in :class:`CQL`
    :param torch_compile: as in :class:`CQL`
    :param bf16: as in :class:`CQL`
    :param cuda_graphs: as in :class:`CQL`
    :param stats_window_size: as in SB3
    :param tensorboard_log: as in SB3
    :param policy_kwargs: as in SB3
    :param verbose: as in SB3
    :param seed: as in SB3
    :param device: as in SB3
    :param _init_setup_model: build the networks now
    """

    def __init__(
        self,
        policy: str | type[QRDQNPolicy],
        dataset: DatasetLike | ReplayBuffer | None = None,
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule = 1e-4,
        batch_size: int = 32,
        max_grad_norm: float | None = None,
        dataset_kwargs: dict[str, Any] | None = None,
        torch_compile: bool = False,
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
        # Adam's usual eps: that of QR-DQN, which CQL takes, is larger than most of cloning's gradients
        policy_kwargs = {**with_adam(policy_kwargs, eps=1e-8), "n_quantiles": 1}
        super().__init__(
            policy,
            dataset,
            env,
            learning_rate=learning_rate,
            batch_size=batch_size,
            max_grad_norm=max_grad_norm,
            dataset_kwargs=dataset_kwargs,
            torch_compile=torch_compile,
            bf16=bf16,
            cuda_graphs=cuda_graphs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=_init_setup_model,
        )

    def _loss(self, batch: ReplayBufferSamples) -> LossOutput:
        """
        Negative log-likelihood of the data's actions.

        :param batch: samples of the replay buffer
        :return: loss, ``[B]``; the TD error is zero; metrics ``nll`` and ``action_match``
        """
        logits = self._forward(self._online_forward, batch.observations).squeeze(1)
        loss = conservative_gap(logits, batch.actions)
        with th.no_grad():
            match = (logits.argmax(dim=1) == batch.actions.squeeze(1)).float().mean()
        return LossOutput(loss, th.zeros_like(loss), {"nll": loss.mean(), "action_match": match})

    def _update_target(self) -> None:
        pass  # no target network is used

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 1000,
        tb_log_name: str = "BC",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> BC:
        """
        Learn offline; see :meth:`CQL.learn`.

        :param total_timesteps: gradient steps
        :param callback: SB3 callbacks
        :param log_interval: gradient steps between log lines
        :param tb_log_name: name of the run
        :param reset_num_timesteps: False continues counting
        :param progress_bar: show progress
        :return: self
        """
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def learn_online(self, *args: Any, **kwargs: Any) -> BC:
        """
        Refuse: cloning has no use for an environment.

        :raises NotImplementedError: always
        """
        raise NotImplementedError("Behaviour cloning learns from the dataset only; use CQL to go on online.")
