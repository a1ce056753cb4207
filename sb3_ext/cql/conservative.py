"""What conservative Q-learning shares between discrete and continuous actions: learning on, and looks at the values."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, Self

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.save_util import load_from_pkl
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback

from sb3_ext.cql.mixed import MixedReplayBuffer, OnlineReplayBuffer
from sb3_ext.cql.offline import NO_DATASET, OfflineAlgorithm
from sb3_ext.data.load import DatasetLike
from sb3_ext.off_policy import OffPolicy
from sb3_ext.replay.batch import OfflineSamples
from sb3_ext.replay.dataset import OfflineReplayBuffer
from sb3_ext.replay.priorities import Priorities
from sb3_ext.saving import FileLike
from sb3_ext.threads import with_loop_threads


class ConservativeAlgorithm(OfflineAlgorithm, OffPolicy):
    """
    CQL, offline and then online if wanted.

    A class derives from this one and from an off-policy algorithm, in that order.
    """

    cql_alpha: float
    calibrated: bool
    judged: ClassVar[str]
    """The metric that says how high the policy values its own actions."""
    _warned_of_overestimation = False
    _online_buffer: OnlineReplayBuffer | None = None

    def _attach(self, dataset: DatasetLike | ReplayBuffer | None) -> None:
        super()._attach(dataset)
        buffer = self._dataset
        # largest discounted return in the data, in the units of the Q values
        self._bound = float("nan")
        if isinstance(buffer, OfflineReplayBuffer):
            rewards = np.clip(buffer.rewards, -1, 1) if self.clip_rewards else None
            self._bound = buffer.largest_return(self.gamma, rewards)

    def _check_replay_buffer(self, buffer: ReplayBuffer) -> None:
        super()._check_replay_buffer(buffer)
        if self.calibrated and not isinstance(buffer, OfflineReplayBuffer):
            raise ValueError(
                f"calibrated=True needs the returns of whole episodes, and {type(buffer).__name__} does not keep "
                "episodes together. Pass a Minari dataset (sb3_ext.record makes one of an environment and a policy), "
                "or leave calibrated out."
            )

    def _set_returns(self) -> None:
        super()._set_returns()
        if isinstance(self._dataset, OfflineReplayBuffer):
            self._dataset.keep_returns_to_go(self.calibrated)

    def _forget_graphs(self) -> None:
        """Graph the losses again when they are next computed."""
        raise NotImplementedError

    def _setup_learn(self, *args: Any, **kwargs: Any) -> Any:
        self._forget_graphs()  # they have the coefficients of then
        return super()._setup_learn(*args, **kwargs)

    def _inputs(self, batch: Any) -> list[th.Tensor]:
        """The tensors of a batch that the loss needs; :meth:`_named` undoes it."""
        return [getattr(batch, name) for name in self._input_names]

    def _named(self, *inputs: th.Tensor) -> OfflineSamples:
        return OfflineSamples(**dict(zip(self._input_names, inputs, strict=False)))

    @property
    def _input_names(self) -> list[str]:
        always = ["observations", "actions", "next_observations", "dones", "rewards"]
        return always + ["discounts"] * (self.n_steps > 1) + ["returns_to_go"] * self.calibrated

    def _judge(self, means: dict[str, float]) -> None:
        if not np.isfinite(self._bound) or self.judged not in means:
            return
        self.logger.record("train/largest_data_return", self._bound)
        too_high = means[self.judged] > self._bound + max(1.0, abs(self._bound))
        self.logger.record("train/overestimation", float(too_high))
        if too_high and not self._warned_of_overestimation:
            self._warned_of_overestimation = True
            warnings.warn(
                f"Q of the best actions is {means[self.judged]:.3g} on average, but no episode of the data returned "
                f"more than {self._bound:.3g} (discounted): the values are overestimated, and the policy will likely "
                "fail. Raise cql_alpha.",
                stacklevel=3,
            )

    @with_loop_threads
    def learn_online(
        self,
        total_timesteps: int,
        env: GymEnv | str | None = None,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "CQL_online",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        *,
        offline_fraction: float = 0.5,
        cql_alpha: float | None = None,
    ) -> Self:
        """
        Go on in an environment, from the same data plus new transitions. Here one timestep is one environment step.

        New transitions are kept over calls, as in SB3, as long as the number of environments stays the same.

        :param total_timesteps: environment steps
        :param env: the environment; default the one given before
        :param callback: SB3 callbacks
        :param log_interval: episodes between log lines
        :param tb_log_name: name of the run for TensorBoard
        :param reset_num_timesteps: False continues counting
        :param progress_bar: show progress
        :param offline_fraction: share of offline transitions in each batch, 0 to 1
        :param cql_alpha: weight of the conservative term from now on; lower lets the agent leave the data. Default:
            unchanged
        :return: self
        :raises ValueError: if there is no environment or no dataset, or a number is out of range
        """
        if self._dataset is None:
            raise ValueError(NO_DATASET)
        if env is not None:
            self.set_env(gym.make(env) if isinstance(env, str) else env)
        if self.env is None:
            raise ValueError(
                "learn_online() needs an environment: pass env=, for instance sb3_ext.data.make_eval_env(dataset)."
            )
        if cql_alpha is not None:
            check_alpha(cql_alpha)
            self.cql_alpha = cql_alpha
        online = self._new_transitions()
        self.replay_buffer, self._online = MixedReplayBuffer(self._dataset, online, offline_fraction), True
        # SB3's learn, which comes after the offline one
        return super(OfflineAlgorithm, self).learn(
            total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar
        )

    def _new_transitions(self) -> OnlineReplayBuffer:
        """The online buffer, made when it is first needed or no longer fits the environments."""
        kept, offline = self._online_buffer, self._dataset
        if kept is not None and kept.n_envs != self.n_envs:
            if kept.size():
                warnings.warn(
                    f"The {kept.size() * kept.n_envs} transitions of {kept.n_envs} environment(s) are forgotten: there "
                    f"are {self.n_envs} environment(s) now. Use as many as before to keep them.",
                    stacklevel=3,
                )
            kept = None
        if kept is None:
            state = offline.sampler_state if isinstance(offline, OfflineReplayBuffer) else None
            # images take a frame per transition, as in the dataset; alpha 0 draws uniformly
            images = isinstance(offline, OfflineReplayBuffer) and is_image_space(self.observation_space)
            kept = self._online_buffer = OnlineReplayBuffer(
                self.buffer_size,
                self.observation_space,
                self.action_space,
                self.device,
                self.n_envs,
                optimize_memory_usage=images,
                frame_stack=getattr(offline, "frame_stack", None),
                n_steps=self.n_steps,
                gamma=self.gamma,
                **(state.settings if isinstance(state, Priorities) else {"alpha": 0.0}),
            )
        kept.clip_rewards, kept.gamma = self.clip_rewards, self.gamma
        kept.keep_returns_to_go(self.calibrated)
        return kept

    def load_replay_buffer(self, path: FileLike, truncate_last_traj: bool = True) -> None:
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
        self._compare_spaces(online)
        if not isinstance(online, OnlineReplayBuffer) or online.n_steps != self.n_steps:
            raise ValueError(
                f"The new transitions in the file ({type(online).__name__}, n_steps={getattr(online, 'n_steps', 1)}) "
                f"are of another kind than this model's (OnlineReplayBuffer, n_steps={self.n_steps}). Load them into a "
                "model like the one that saved them."
            )
        if self._dataset is None:
            self.set_dataset(loaded.offline)
        online.device = self.device
        self._online_buffer = online

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_online_buffer"]


def check_alpha(cql_alpha: float) -> None:
    """Refuse a negative weight."""
    if not cql_alpha >= 0:
        raise ValueError(f"cql_alpha must not be negative, got {cql_alpha}.")
