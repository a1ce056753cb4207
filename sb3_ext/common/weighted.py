"""SB3's off-policy algorithms on the shared gradient loop."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Iterable
from typing import Any

from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import MaybeCallback, RolloutReturn

from sb3_ext.common.checkpoint import atomic_path
from sb3_ext.common.mixed import MixedReplayBuffer
from sb3_ext.common.prioritized import PrioritizedReplayBuffer
from sb3_ext.common.training import LossOutput, MetricMeans, train_weighted

_OURS = (PrioritizedReplayBuffer, MixedReplayBuffer)


class WeightedMixin(OffPolicyAlgorithm):
    """Replace ``train`` by the shared weighted loop and make ``save`` atomic; the class says what its loss is."""

    def compute_loss(self, batch: Any) -> LossOutput:
        """
        Compute the loss of each sample.

        :param batch: samples of the replay buffer
        :return: per-sample loss and TD error, ``[B]``, and metrics
        """
        raise NotImplementedError

    def _after_update(self) -> None:
        """Called after each gradient step."""

    def _setup_model(self) -> None:
        # SB3 passes n_steps on to its own buffers only
        kind, n_steps = self.replay_buffer_class, self.n_steps
        if kind is None or not issubclass(kind, PrioritizedReplayBuffer):
            super()._setup_model()
            return
        given = self.replay_buffer_kwargs
        self.replay_buffer_kwargs = {"n_steps": n_steps, "gamma": self.gamma, **given}
        self.n_steps = 1
        super()._setup_model()
        self.n_steps, self.replay_buffer_kwargs = n_steps, given

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[int, BaseCallback]:
        # SB3 marks the newest transition as terminal where its own buffer loses final observations; ours keeps them
        optimize = self.optimize_memory_usage
        if isinstance(self.replay_buffer, _OURS):
            self.optimize_memory_usage = False
            if reset_num_timesteps or self._last_obs is None:
                self.replay_buffer.end_sequences()
        try:
            return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, *args, **kwargs)
        finally:
            self.optimize_memory_usage = optimize

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> RolloutReturn:
        """
        Collect as SB3 does. Where a callback or an error stops it, the environment has made a step that is not stored,
        so with our buffers, which can end their sequences there, the next ``learn`` resets it.

        :param args: see SB3
        :param kwargs: see SB3
        :return: see SB3
        """
        goes_on = False
        try:
            rollout = super().collect_rollouts(*args, **kwargs)
            goes_on = rollout.continue_training
        finally:
            if not goes_on and isinstance(self.replay_buffer, _OURS):
                self._last_obs = None
        return rollout

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """
        Run gradient steps; see :func:`~sb3_ext.common.training.train_weighted`.

        :param gradient_steps: number of steps
        :param batch_size: samples per step
        """
        metrics = MetricMeans()
        train_weighted(self, self.compute_loss, gradient_steps, batch_size, metrics, self._after_update)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for key, value in metrics.flush().items():
            self.logger.record(f"train/{key}", value)

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save as SB3 does, but never leave a half-written file under ``path``: an older good one stays until the new is
        complete.

        :param path: file name (``.zip`` is added) or open file
        :param exclude: see SB3
        :param include: see SB3
        """
        if isinstance(path, (str, pathlib.Path)):
            with atomic_path(_named(path, ".zip")) as partial, partial.open("wb") as file:
                super().save(file, exclude, include)
        else:
            super().save(path, exclude, include)

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer as SB3 does, if it fits this model's settings; otherwise the model keeps the one it has.

        :param path: see SB3
        :param truncate_last_traj: see SB3
        :raises ValueError: if it does not fit
        """
        before = self.replay_buffer
        try:
            super().load_replay_buffer(path, truncate_last_traj)
            self._check_loaded_buffer(before)
        except BaseException:
            self.replay_buffer = before
            raise

    def _check_loaded_buffer(self, before: ReplayBuffer | None) -> None:
        """Refuse a buffer whose returns are of other lengths than the model's; discount as the model does."""
        loaded = self.replay_buffer
        if isinstance(loaded, PrioritizedReplayBuffer) and isinstance(before, PrioritizedReplayBuffer):
            if loaded.n_steps != before.n_steps:
                raise ValueError(
                    f"The saved replay buffer has n_steps={loaded.n_steps}, the model {before.n_steps}. Load the model "
                    "with the same n_steps, or begin with an empty buffer."
                )
            loaded.gamma = before.gamma

    def save_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:
        """
        Save the replay buffer as SB3 does, and as :meth:`save` never leave a half-written file.

        :param path: file name (``.pkl`` is added) or open file
        """
        if isinstance(path, (str, pathlib.Path)):
            with atomic_path(_named(path, ".pkl")) as partial, partial.open("wb") as file:
                super().save_replay_buffer(file)
        else:
            super().save_replay_buffer(path)


def _named(path: str | pathlib.Path, suffix: str) -> pathlib.Path:
    final = pathlib.Path(path)
    return final if final.suffix else final.with_suffix(suffix)
