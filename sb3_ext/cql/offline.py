"""Learning from a fixed dataset with SB3's face: what the offline algorithms share."""

from __future__ import annotations

import sys
import time
import warnings
from collections import deque
from collections.abc import Iterable
from typing import Any, ClassVar, Self

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ProgressBarCallback
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, ReplayBufferSamples
from stable_baselines3.common.utils import configure_logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_ext.cql.extractor import SmallPicturesExtractor, is_small_picture
from sb3_ext.data.envs import SMALLEST_PICTURE, policy_for, stacked_space
from sb3_ext.data.load import DatasetLike, load_minari, match_padding
from sb3_ext.data.source import open_source
from sb3_ext.data.trees import leaves, short_space
from sb3_ext.data.verify import action_coverage
from sb3_ext.normalize import begin_statistics_of
from sb3_ext.off_policy import MetricMeans
from sb3_ext.replay.dataset import OfflineReplayBuffer
from sb3_ext.replay.priorities import Priorities
from sb3_ext.saving import FileLike, save_whole
from sb3_ext.threads import with_loop_threads

NO_DATASET = "There is no dataset: call set_dataset(dataset) after load()."


class OfflineEnv(gym.Env[Any, Any]):
    """Stand-in for the training environment, which offline learning does not have: spaces, but no dynamics."""

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("Offline learning has no environment. Pass env= to the constructor or to learn_online().")

    reset = step = _refuse


class MissingDataset(ReplayBuffer):
    """Stand-in for the data of a model that was loaded without it."""

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        BaseBuffer.__init__(self, 1, observation_space, action_space)

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """Refuse."""
        raise ValueError(NO_DATASET)


class OfflineProgressBar(ProgressBarCallback):
    """SB3's progress bar, with the losses and values of the last log line in front of it."""

    _LABELS: ClassVar = {
        "td_loss": "td",
        "conservative_gap": "gap",
        "q_data": "Q data",
        "q_best": "Q best",
        "q_policy": "Q policy",
    }

    def _on_step(self) -> bool:
        values: dict[str, float] = self.model._last_means  # type: ignore[attr-defined]
        known = [key for key in ("nll", *self._LABELS, "loss") if key in values]
        shown = [f"{self._LABELS.get(key, key)} {values[key]:.3g}" for key in known]
        if shown:
            self.pbar.set_description(", ".join(shown), refresh=False)
        self.pbar.update(1)
        return True


class OfflineAlgorithm(BaseAlgorithm):
    """
    An algorithm whose timesteps are gradient steps on a dataset.

    A class derives from this one and from one of SB3's, in that order; its ``train`` takes gradient steps.
    """

    action_kinds: ClassVar[tuple[type[spaces.Space[Any]], ...]] = (spaces.Discrete,)
    """Action spaces that the algorithm learns from."""
    other_actions: ClassVar = ""
    """Where to turn with other ones."""

    scale_actions: ClassVar = False
    """Whether its batches hold actions scaled to [-1, 1], as those of SB3's algorithms with a squashed policy do."""

    batch_size: int
    n_steps: int = 1
    gamma: float = 0.99
    clip_rewards: bool = False
    dataset_kwargs: dict[str, Any]
    dataset_info: dict[str, Any]
    replay_buffer: ReplayBuffer | None = None
    _dataset: ReplayBuffer | None = None
    _sampler_state: Any = None
    """Of the model that was loaded, until its data is back."""
    _saved_sampler: Any = None
    _given_padding = False
    """Whether the user said what stands before an episode's first frame."""
    _online = False
    """Whether the steps are those of an environment at the moment."""

    @staticmethod
    def _check_env(env: Any) -> None:
        """Tell environments from datasets before any data is read."""
        if env is not None and not isinstance(env, (gym.Env, VecEnv, str)):
            raise TypeError(
                f"env must be an environment or its id, not {type(env).__name__}; the dataset is the argument before "
                "it."
            )
        if isinstance(env, str) and env not in gym.registry and ":" not in env and not env.startswith("ALE/"):
            raise ValueError(f"{env!r} is no registered environment; if it is a dataset, pass it as dataset=.")

    def _attach(self, dataset: DatasetLike | ReplayBuffer | None) -> None:
        """Load and check the dataset; take the spaces from it, or compare them with the environment's."""
        if dataset is None:
            raise TypeError(
                f"{type(self).__name__} needs a dataset: a MinariDataset, its id or path, or a filled replay buffer."
            )
        if isinstance(dataset, ReplayBuffer):
            buffer = dataset
            self._check_actions(buffer.action_space, "the dataset")
            self._check_replay_buffer(buffer)
            if not hasattr(self, "policy"):
                self._check_policy(buffer.observation_space)
            buffer.device = self.device
        else:
            kwargs = dict(self.dataset_kwargs)
            if self._n_updates:  # what the model has learnt from
                kwargs.setdefault("padding_type", self.dataset_info.get("padding_type"))
                kwargs["transforms"] = self.dataset_info.get("transforms") or kwargs.get("transforms")
            # before the data is read
            source = open_source(dataset, kwargs.get("build_env", False), kwargs.get("transforms"))
            self._check_actions(source.action_space, source.name)
            if not hasattr(self, "policy"):
                self._check_policy(stacked_space(source.observation_space, 1))
            kwargs["transforms"] = source.pipeline.names  # with the vocabulary that was found
            buffer = load_minari(dataset, n_steps=self.n_steps, gamma=self.gamma, device=self.device, **kwargs)
        if getattr(self, "observation_space", None) is None:
            self.observation_space, self.action_space, self.n_envs = buffer.observation_space, buffer.action_space, 1
        else:
            self._compare_spaces(buffer)
        self._given_padding = isinstance(dataset, ReplayBuffer) or self.dataset_kwargs.get("padding_type") is not None
        self._match_padding(buffer)
        self.dataset_info = dict(getattr(buffer, "info", {}))
        self._dataset = self.replay_buffer = buffer
        self._set_returns()

    def _check_actions(self, space: spaces.Space[Any], name: str) -> None:
        if not isinstance(space, self.action_kinds):
            raise ValueError(
                f"{type(self).__name__} needs {' or '.join(k.__name__ for k in self.action_kinds)} actions, {name} has "
                f"{short_space(space)}.{self.other_actions}"
            )

    def _match_padding(self, buffer: ReplayBuffer | None) -> None:
        """Let episodes begin in the data as in the environment, or refuse if they cannot."""
        if self.env is None or not isinstance(buffer, OfflineReplayBuffer) or buffer.frame_stack == 1:
            return
        match_padding(buffer, self.env, fixed=self._given_padding or self._n_updates > 0)
        self.dataset_info["padding_type"] = buffer.padding_type
        self._last_obs = None  # the environment was reset

    def _set_returns(self) -> None:
        """Let the data give returns and actions as this model wants them; another model may have the same buffer."""
        buffer = self._dataset
        if isinstance(buffer, OfflineReplayBuffer):
            buffer.n_steps, buffer.gamma, buffer.clip_rewards = self.n_steps, self.gamma, self.clip_rewards
            buffer.scale_actions = self.scale_actions

    def _check_replay_buffer(self, buffer: ReplayBuffer) -> None:
        """Refuse a replay buffer that cannot be the dataset."""
        if buffer.size() == 0:
            raise ValueError("The replay buffer is empty; fill it before passing it as the dataset.")
        if isinstance(buffer, OfflineReplayBuffer):  # gives what the model wants
            return
        n_steps, gamma = getattr(buffer, "n_steps", 1), getattr(buffer, "gamma", self.gamma)
        if self.clip_rewards and n_steps > 1:
            raise ValueError(
                f"clip_rewards clips each reward, but {type(buffer).__name__} gives sums of n_steps={n_steps} of them. "
                "Pass a Minari dataset, or clip the rewards when you fill the buffer."
            )
        if (n_steps, gamma) != (self.n_steps, self.gamma):
            raise ValueError(
                f"The replay buffer has n_steps={n_steps} and gamma={gamma}, the model {self.n_steps} and {self.gamma}."
                " Set them alike, or pass a Minari dataset, which takes the model's."
            )

    def _compare_spaces(self, buffer: ReplayBuffer) -> None:
        for what in ("observation_space", "action_space"):
            ours, theirs = getattr(buffer, what), getattr(self, what)
            if ours != theirs:
                raise ValueError(
                    f"The {what} of the dataset and of the model or environment differ: {short_space(ours)} and "
                    f"{short_space(theirs)}. Build the environment with sb3_ext.make_eval_env(dataset), with the same "
                    "transforms and frame_stack as in dataset_kwargs."
                )

    def _check_policy(self, space: spaces.Space[Any]) -> None:
        """
        Compare the policy's name with the observations, as SB3's policies take them.

        A features extractor of the user's own is not questioned.
        """
        if self.policy_kwargs.get("features_extractor_class", FlattenExtractor) is not FlattenExtractor:
            return
        named = next((n for n, c in self.policy_aliases.items() if c is self.policy_class), None)
        if named not in ("MlpPolicy", "CnnPolicy", "MultiInputPolicy"):
            return
        seen = short_space(space)
        if isinstance(space, spaces.Dict) != (named == "MultiInputPolicy"):
            raise ValueError(f"{named} cannot see these observations: {seen}. Use {policy_for(space)!r}.")
        if named == "MlpPolicy" and policy_for(space) == "CnnPolicy":
            warnings.warn(f"MlpPolicy flattens these pictures: {seen}. 'CnnPolicy' is for them.", stacklevel=4)
        if named == "MultiInputPolicy" and any(is_small_picture(entry) for _, entry in leaves(space)):
            self.policy_kwargs.setdefault("features_extractor_class", SmallPicturesExtractor)
        if named != "CnnPolicy":
            return
        scaled = not self.policy_kwargs.get("normalize_images", True)
        if not is_image_space(space, normalized_image=scaled):
            wants = "pictures with three dimensions" if scaled else "pictures (uint8, 0 to 255, three dimensions)"
            raise ValueError(f"CnnPolicy needs {wants}, the dataset has {seen}. Use 'MlpPolicy'.")
        if is_small_picture(space, scaled):
            raise ValueError(
                f"CnnPolicy needs {SMALLEST_PICTURE} pixels on each side, the dataset has {seen}. Use 'MlpPolicy', "
                "which flattens them, or a features_extractor_class for small pictures in policy_kwargs."
            )

    def set_dataset(self, dataset: DatasetLike | ReplayBuffer) -> None:
        """
        Give a loaded model its data back, or other data of the same spaces.

        In its own data the sampler of a loaded model continues where it stood, so that training continues bit for bit.
        Otherwise it starts again, with a warning if the data of a loaded model has another size or is drawn another
        way.

        :param dataset: as in the constructor
        :raises ValueError: if the spaces differ
        """
        self._attach(dataset)
        self._seed_sampler()

    def _seed_sampler(self) -> None:
        buffer = self._dataset
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

    def _make_replay_buffer(self) -> ReplayBuffer:
        return MissingDataset(self.observation_space, self.action_space)

    def _setup_model(self) -> None:
        self._train_metrics = MetricMeans()
        self._last_means: dict[str, float] = {}
        self._sampler_state = self._saved_sampler
        super()._setup_model()  # type: ignore[safe-super]
        self._seed_sampler()

    def get_env(self) -> VecEnv | None:
        """Return the environment; without one, a stand-in with the right spaces that refuses to step."""
        if self.env is None:
            return DummyVecEnv([lambda: OfflineEnv(self.observation_space, self.action_space)])
        return self.env

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Set the environment; see SB3. It has the dataset's spaces, and any number of copies.

        :raises DatasetError: if its episodes begin otherwise than those of the dataset
        """
        self.n_envs = env.num_envs if isinstance(env, VecEnv) else 1
        super().set_env(env, force_reset)
        self._match_padding(self._dataset)

    @with_loop_threads
    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 1000,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """
        Learn offline. **One timestep is one gradient step.**

        :param total_timesteps: gradient steps
        :param callback: SB3 callbacks, called once per gradient step
        :param log_interval: gradient steps between log lines; None for none
        :param tb_log_name: name of the run for TensorBoard; default: the algorithm's
        :param reset_num_timesteps: False continues counting, after ``load`` for instance
        :param progress_bar: show progress with the losses and values of the last log line
        :return: self
        :raises ValueError: if a loaded model was not given its dataset
        :raises FloatingPointError: if the loss is not finite
        """
        if self._dataset is None:
            raise ValueError(NO_DATASET)
        self.replay_buffer, self._online = self._dataset, False
        begin_statistics_of(self._vec_normalize_env, self.replay_buffer)
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name or type(self).__name__, progress_bar
        )
        callback.on_training_start(locals(), globals())
        self._log_dataset()
        while self.num_timesteps < total_timesteps:
            self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
            self.num_timesteps += 1
            self.train(gradient_steps=1, batch_size=self.batch_size)  # type: ignore[attr-defined]
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
        self._set_returns()
        if self._online:
            return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        # as BaseAlgorithm does, but there is no environment to reset
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
        if not progress_bar or self._online:
            return super()._init_callback(callback, progress_bar)
        both = CallbackList([super()._init_callback(callback, progress_bar=False), OfflineProgressBar()])
        both.init_callback(self)
        return both

    def _log_metrics(self) -> None:
        """Not after each gradient step; see :meth:`dump_logs`."""

    def _judge(self, means: dict[str, float]) -> None:
        """Look whether the means since the last log line are plausible."""

    def dump_logs(self) -> None:
        """Write the means since the last call to the logger."""
        means = self._train_metrics.flush()
        self._last_means = means or self._last_means
        for key, value in means.items():
            self.logger.record(f"train/{key}", value)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self._judge(means)
        if self._online:
            super().dump_logs()
            return
        seconds = max((time.time_ns() - self.start_time) / 1e9, sys.float_info.epsilon)
        self.logger.record("time/fps", int((self.num_timesteps - self._num_timesteps_at_start) / seconds))
        self.logger.record("time/time_elapsed", int(seconds), exclude="tensorboard")
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(step=self.num_timesteps)

    def _log_dataset(self) -> None:
        if not isinstance(self._dataset, OfflineReplayBuffer):
            return
        known = self.dataset_info.get("behaviour_return")  # before transforms, unlike the buffer's rewards
        mean = known["mean"] if known else float(self._dataset.episode_returns().mean())
        self.logger.record("dataset/behaviour_return", mean)
        if isinstance(self.action_space, spaces.Discrete):
            share: NDArray[np.float64] = self._dataset.action_counts() / self._dataset.buffer_size
            self.logger.record("dataset/action_coverage", action_coverage(share))
            self.logger.record("dataset/rarest_action_share", float(share.min()))

    def save(self, path: FileLike, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:
        """See SB3; without the dataset, with the place of the sampler in it. An older file stays until it is whole."""
        data = self._dataset
        self._saved_sampler = data.sampler_state if isinstance(data, OfflineReplayBuffer) else self._sampler_state
        save_whole(super().save, path, ".zip", exclude=exclude, include=include)

    def _excluded_save_params(self) -> list[str]:
        names = ("replay_buffer", "_dataset", "_sampler_state", "_online", "_train_metrics", "_last_means")
        return [*super()._excluded_save_params(), *names]


def sampler_mismatch(buffer: OfflineReplayBuffer, state: Any) -> str | None:
    """Why a sampler cannot continue in this data, given the ``sampler_state`` that was saved; None if it can."""
    how = {True: "by priority", False: "uniformly"}
    before, now = isinstance(state, Priorities), isinstance(buffer.sampler_state, Priorities)
    if before != now:
        return f"The model was saved with data drawn {how[before]}, and this data is drawn {how[now]}"
    size = state.tree.capacity if before else state.get("items", buffer.buffer_size)
    if size != buffer.buffer_size:
        return f"The model was saved with data of {size} transitions, and this data has {buffer.buffer_size}"
    return None


def with_adam(policy_kwargs: dict[str, Any] | None, eps: float) -> dict[str, Any]:
    """Add the default optimizer, unless the user chose one: fused Adam, the same update in a fifth of the time."""
    given = policy_kwargs or {}
    if "optimizer_class" in given:
        return dict(given)
    return {"optimizer_class": th.optim.Adam, "optimizer_kwargs": {"eps": eps, "fused": True}, **given}
