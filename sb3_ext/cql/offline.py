"""Learning from a fixed dataset with SB3's face: what CQL and its baselines share."""

from __future__ import annotations

import io
import pathlib
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Self

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib.qrdqn.policies import QuantileNetwork
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.save_util import load_from_pkl
from stable_baselines3.common.torch_layers import NatureCNN
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, ReplayBufferSamples
from stable_baselines3.common.utils import configure_logger, polyak_update
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_ext.cql.mixed import MixedReplayBuffer
from sb3_ext.cql.support import (
    OfflineEnv,
    OfflineProgressBar,
    OnlineReplayBuffer,
    check_policy,
    check_replay_buffer,
    sampler_mismatch,
    short_space,
    warn_on_overestimation,
)
from sb3_ext.cuda_graphs import GraphedLoss
from sb3_ext.data.load import DatasetLike, load_minari
from sb3_ext.data.verify import action_coverage
from sb3_ext.dqn.dqn import QRDQN
from sb3_ext.losses import LossOutput
from sb3_ext.normalize import begin_statistics_of
from sb3_ext.replay.dataset import OfflineReplayBuffer


class OfflineQRDQN(QRDQN):
    """
    QR-DQN whose timesteps are gradient steps on a dataset.

    Subclasses set the attributes below before ``_attach``, and define ``compute_loss``.
    """

    clip_rewards: bool
    dataset_kwargs: dict[str, Any]
    dataset_info: dict[str, Any]
    torch_compile: bool
    cuda_graphs: bool
    _last_means: dict[str, float]
    _offline: bool
    _offline_buffer: ReplayBuffer | None
    _online_buffer: OnlineReplayBuffer | None
    _policy_name: str | None
    _recorded_loss: GraphedLoss
    _sampler_state: Any
    _online_forward: Callable[[th.Tensor], th.Tensor]
    _target_forward: Callable[[th.Tensor], th.Tensor]

    def _attach(self, dataset: DatasetLike | ReplayBuffer) -> None:
        """Load and check the dataset; take the spaces from it, or compare them with the environment's."""
        if isinstance(dataset, ReplayBuffer):
            buffer = dataset
            check_replay_buffer(buffer, self.n_steps, self.gamma, self.clip_rewards)
            buffer.device = self.device
        else:
            buffer = load_minari(
                dataset, n_steps=self.n_steps, gamma=self.gamma, device=self.device, **self.dataset_kwargs
            )
        if not isinstance(buffer.action_space, spaces.Discrete):
            raise ValueError(f"{type(self).__name__} needs Discrete actions, the dataset has {buffer.action_space}.")
        if getattr(self, "observation_space", None) is None:
            self.observation_space, self.action_space, self.n_envs = buffer.observation_space, buffer.action_space, 1
        else:
            self._check_spaces(buffer)
        if self._policy_name is not None:
            check_policy(self._policy_name, buffer.observation_space, self.policy_kwargs)
        self.dataset_info = dict(getattr(buffer, "info", {}))
        self._offline_buffer = buffer
        self.replay_buffer = buffer
        self._set_returns()
        self._bound = self._largest_return(buffer)

    def _set_returns(self) -> None:
        """Let the data give returns as this model wants them; another model may have the same buffer."""
        buffer = self._offline_buffer
        if isinstance(buffer, OfflineReplayBuffer):
            buffer.n_steps, buffer.gamma, buffer.clip_rewards = self.n_steps, self.gamma, self.clip_rewards

    def _check_spaces(self, buffer: ReplayBuffer) -> None:
        for what, ours, theirs in (
            ("observation_space", buffer.observation_space, self.observation_space),
            ("action_space", buffer.action_space, self.action_space),
        ):
            if ours != theirs:
                raise ValueError(
                    f"The {what} of the dataset and of the model or environment differ: {short_space(ours)} and "
                    f"{short_space(theirs)}. Build the environment with sb3_ext.make_eval_env(dataset), or set "
                    "frame_stack in dataset_kwargs."
                )

    def _largest_return(self, buffer: ReplayBuffer) -> float:
        """Largest discounted return in the data, in the units of the Q values."""
        if isinstance(buffer, OfflineReplayBuffer):
            return buffer.largest_return(self.gamma, np.clip(buffer.rewards, -1, 1) if self.clip_rewards else None)
        return float("nan")

    def set_dataset(self, dataset: DatasetLike | ReplayBuffer) -> None:
        """
        Give a loaded model its data back, or other data of the same spaces.

        In its own data the sampler of a loaded model goes on where it stood, so that training continues bit for bit.
        Otherwise it starts anew, with a warning if the data of a loaded model has another size or is drawn another way.

        :param dataset: as in the constructor
        :raises ValueError: if the spaces differ
        """
        self._attach(dataset)
        self._seed_sampler()

    def _seed_sampler(self) -> None:
        buffer = self.replay_buffer
        if not isinstance(buffer, OfflineReplayBuffer):
            return
        priorities = self.dataset_kwargs.get("prioritized")
        given = {**self.dataset_kwargs, **(priorities if isinstance(priorities, dict) else {})}
        buffer.seed(given.get("seed", self.seed))
        if self._sampler_state is None:
            return
        problem = sampler_mismatch(buffer, self._sampler_state)
        if problem is None:
            buffer.sampler_state, self._sampler_state = self._sampler_state, None
        else:
            warnings.warn(f"{problem}; so the sampler starts anew.", stacklevel=3)

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load what ``save_replay_buffer`` saved: the dataset; after :meth:`learn_online` the new transitions, and the
        dataset with them if the model has none yet.

        :param path: as in SB3
        :param truncate_last_traj: as in SB3
        :raises ValueError: if the spaces or ``n_steps`` differ from the model's
        """
        loaded = load_from_pkl(path, self.verbose)
        if not isinstance(loaded, MixedReplayBuffer):
            self.set_dataset(loaded)
            return
        online = loaded.online
        self._check_spaces(online)
        if not isinstance(online, OnlineReplayBuffer) or online.n_steps != self.n_steps:
            raise ValueError(
                f"The new transitions in the file ({type(online).__name__}, n_steps={getattr(online, 'n_steps', 1)}) "
                f"are of another kind than this model's (OnlineReplayBuffer, n_steps={self.n_steps}). Load them into a "
                "model like the one that saved them."
            )
        if self._offline_buffer is None:
            self.set_dataset(loaded.offline)
        online.device = self.device
        self._online_buffer = online

    def _setup_model(self) -> None:
        # load() comes here without data; the smallest buffer keeps SB3 from allocating one for a million transitions
        buffer, self.buffer_size, size = self.replay_buffer, 1, self.buffer_size
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The number of environments used is greater than the target")
            super()._setup_model()
        self.buffer_size, self.replay_buffer = size, buffer
        self.replay_buffer_class, self.replay_buffer_kwargs = None, {}
        nature = type(self.quantile_net.features_extractor) is NatureCNN  # others may not bear another layout
        if nature:
            self.policy.to(memory_format=th.channels_last)
        self._online_forward, self._target_forward = self.quantile_net.forward, self.quantile_net_target.forward
        if nature and self.quantile_net.normalize_images and is_image_space(self.observation_space):
            self._online_forward = partial(_quantiles_of_images, self.quantile_net)
            self._target_forward = partial(_quantiles_of_images, self.quantile_net_target)
        if self.torch_compile:
            self._online_forward = th.compile(self._online_forward)
            self._target_forward = th.compile(self._target_forward)
        self._forget_recordings()
        self._seed_sampler()

    def _forget_recordings(self) -> None:
        self._recorded_loss = GraphedLoss(self.quantile_net, lambda *x: self._loss(ReplayBufferSamples(*x)))

    def get_env(self) -> VecEnv | None:
        """
        Return the environment; without one, a stand-in with the right spaces that refuses to step.

        :return: the environment
        """
        if self.env is None:
            return DummyVecEnv([lambda: OfflineEnv(self.observation_space, self.action_space)])
        return self.env

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Set the environment for :meth:`learn_online`.

        :param env: environment with the dataset's spaces
        :param force_reset: as in SB3
        """
        self.n_envs = env.num_envs if isinstance(env, VecEnv) else 1
        super().set_env(env, force_reset)

    def compute_loss(self, batch: Any) -> LossOutput:
        """
        The loss of each sample, graphed if that is wanted.

        :param batch: samples of the replay buffer
        :return: loss and TD error, ``[B]``, and metrics
        """
        if not self.cuda_graphs or self.device.type != "cuda":
            return self._loss(batch)
        # weights and indices of a batch are not its business
        return self._recorded_loss(*(part for part in batch[: len(ReplayBufferSamples._fields)] if part is not None))

    def _log_metrics(self) -> None:
        """Not after each gradient step; see :meth:`dump_logs`."""

    def _loss(self, batch: ReplayBufferSamples) -> LossOutput:
        raise NotImplementedError

    def _after_update(self) -> None:
        if self._n_updates % self.target_update_interval == 0:
            self._update_target()

    def _update_target(self) -> None:
        polyak_update(self.quantile_net.parameters(), self.quantile_net_target.parameters(), self.tau)
        polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)

    def _on_step(self) -> None:
        # QRDQN counts environment steps to update the target network; here train() counts gradient steps
        self.exploration_rate = self.exploration_schedule(self._current_progress_remaining)
        self.logger.record("rollout/exploration_rate", self.exploration_rate)

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 1000,
        tb_log_name: str = "CQL",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """
        Learn offline. **One timestep is one gradient step.**

        :param total_timesteps: gradient steps
        :param callback: SB3 callbacks, called once per gradient step
        :param log_interval: gradient steps between log lines; None for none
        :param tb_log_name: name of the run for TensorBoard
        :param reset_num_timesteps: False continues counting, after ``load`` for instance
        :param progress_bar: show progress with the losses and values of the last log line
        :return: self
        :raises ValueError: if a loaded model was not given its dataset
        :raises FloatingPointError: if the loss is not finite
        """
        if self.replay_buffer is None:
            raise ValueError("There is no dataset: call set_dataset(dataset) after load().")
        if isinstance(self.replay_buffer, MixedReplayBuffer):
            self.replay_buffer = self._offline_buffer
        self._offline = True
        begin_statistics_of(self._vec_normalize_env, self.replay_buffer)
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        callback.on_training_start(locals(), globals())
        self.exploration_rate = self.exploration_final_eps  # nothing is explored: what predict() does when not greedy
        self._log_coverage()
        while self.num_timesteps < total_timesteps:
            self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
            self.num_timesteps += 1
            self.train(gradient_steps=1, batch_size=self.batch_size)
            callback.update_locals(locals())
            if not callback.on_step():
                break
            if log_interval and self.num_timesteps % log_interval == 0:
                self.dump_logs()
        callback.on_training_end()
        return self

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        self._forget_recordings()  # they have the coefficients of then
        self._set_returns()
        if not self._offline:
            return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        # BaseAlgorithm._setup_learn without its reset of the environment
        self.start_time = time.time_ns()
        if self.ep_info_buffer is None or reset_num_timesteps:
            self.ep_info_buffer = deque(maxlen=self._stats_window_size)
            self.ep_success_buffer = deque(maxlen=self._stats_window_size)
        if reset_num_timesteps:
            self.num_timesteps, self._episode_num = 0, 0
        self._total_timesteps = total_timesteps + self.num_timesteps
        self._num_timesteps_at_start = self.num_timesteps
        if not self._custom_logger:
            self._logger = configure_logger(self.verbose, self.tensorboard_log, tb_log_name, reset_num_timesteps)
        with warnings.catch_warnings():
            # EvalCallback compares its environment with the training environment, which does not exist
            warnings.filterwarnings("ignore", message="Training and eval env are not of the same type")
            return self._total_timesteps, self._init_callback(callback, progress_bar)

    def _init_callback(self, callback: MaybeCallback, progress_bar: bool = False) -> BaseCallback:
        if not (progress_bar and self._offline):
            return super()._init_callback(callback, progress_bar)
        inner = super()._init_callback(callback, progress_bar=False)
        both = CallbackList([inner, OfflineProgressBar()])
        both.init_callback(self)
        return both

    def dump_logs(self) -> None:
        """Write the means since the last call to the logger, and look whether the values are plausible."""
        means = self._train_metrics.flush()
        self._last_means = means or self._last_means
        for key, value in means.items():
            self.logger.record(f"train/{key}", value)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if np.isfinite(self._bound) and "q_best" in means:
            self.logger.record("train/largest_data_return", self._bound)
            warn_on_overestimation(self, means["q_best"], self._bound)
        super().dump_logs()

    def _log_coverage(self) -> None:
        if isinstance(self.replay_buffer, OfflineReplayBuffer):
            share = self.replay_buffer.action_counts() / self.replay_buffer.buffer_size
            self.logger.record("dataset/action_coverage", action_coverage(share))
            self.logger.record("dataset/rarest_action_share", float(share.min()))
            self.logger.record("dataset/behaviour_return", float(self.replay_buffer.episode_returns().mean()))

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """See SB3; without the dataset, with the place of the sampler in it."""
        loaded = self._sampler_state
        if isinstance(self._offline_buffer, OfflineReplayBuffer):
            self._sampler_state = self._offline_buffer.sampler_state
        try:
            super().save(path, exclude, include)
        finally:
            self._sampler_state = loaded

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            "_offline_buffer",
            "_online_buffer",
            "_last_means",
            "_online_forward",
            "_target_forward",
            "_recorded_loss",
            "_offline",
        ]


def _quantiles_of_images(net: QuantileNetwork, observations: th.Tensor) -> th.Tensor:
    """``net(observations)``, bit for bit; pixels are laid out channels last and scaled in place, without copies."""
    pixels = observations.to(th.float32, memory_format=th.channels_last, copy=True).div_(255.0)
    flat: th.Tensor = net.quantile_net(net.features_extractor(pixels))
    return flat.view(-1, net.n_quantiles, int(net.action_space.n))
