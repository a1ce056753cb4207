"""SB3's off-policy algorithms with one gradient loop: losses stay per sample until importance weights are applied."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import MaybeCallback, RolloutReturn

from sb3_ext.losses import LossOutput
from sb3_ext.replay.batch import ReplayHooks, hooks_of
from sb3_ext.replay.prioritized import PrioritizedReplayBuffer
from sb3_ext.saving import FileLike, save_whole

_GPU_CHECK_EVERY = 100
"""Gradient steps between looks at the loss on a GPU, because each look waits for the GPU."""


class MetricMeans:
    """Running means of scalars that stay on the device until they are read, so that logging does not stall a GPU."""

    def __init__(self) -> None:
        self._keys: tuple[str, ...] = ()
        self._total: th.Tensor | None = None
        self._count = 0

    def add(self, metrics: dict[str, th.Tensor]) -> None:
        """Add one step's values, 0-dim; the same keys in every call until :meth:`flush`."""
        values = th.stack([v.detach().float() for v in metrics.values()])
        if self._total is None or self._keys != tuple(metrics):
            self._keys, self._total, self._count = tuple(metrics), th.zeros_like(values), 0
        self._total += values
        self._count += 1

    def flush(self) -> dict[str, float]:
        """Read the mean of each key and start again; empty if nothing was added."""
        if self._total is None:
            return {}
        means = dict(zip(self._keys, (self._total / self._count).tolist(), strict=True))
        self._total = None
        return means


def minimise(
    optimizer: th.optim.Optimizer,
    output: LossOutput,
    weights: th.Tensor | None,
    max_grad_norm: float | None,
    update: int,
) -> th.Tensor:
    """
    One gradient step on the mean over the batch of ``weights * loss``; the only place that reduces over the batch.

    :param weights: importance weights, ``[B, 1]``; None: 1
    :param max_grad_norm: largest norm of the optimizer's gradients; None: no clipping
    :param update: number of the step, for the message
    :return: the mean, 0-dim
    :raises FloatingPointError: if it is NaN or infinite, before the step is taken (on a GPU it is looked at every 100
        steps only)
    """
    weights = None if weights is None else weights.reshape(-1)
    loss = (output.loss if weights is None else output.loss * weights).mean()
    if (loss.device.type == "cpu" or update % _GPU_CHECK_EVERY == 0) and not th.isfinite(loss):
        raise FloatingPointError(
            f"The loss is {loss.item()} at gradient step {update}. Check the rewards' scale, lower the learning rate "
            "or set max_grad_norm; checkpoints written before this step are intact."
        )
    if output.backward is None:
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
    else:  # a graph has its own backward pass
        output.backward(weights)
    if max_grad_norm is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        th.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    return loss


class OffPolicy(OffPolicyAlgorithm):
    """
    An off-policy algorithm that minimises ``mean(weights * loss)``, saves safely and works with prioritized replay.

    A class derives from this one and from SB3's algorithm, in that order, and says what its loss is.
    """

    max_grad_norm: Any = None
    """Largest norm of the gradient; None: no clipping."""

    def compute_loss(self, batch: Any) -> LossOutput:
        """Per-sample loss and TD error, ``[B]``, of samples of the replay buffer, and metrics."""
        raise NotImplementedError

    def _optimizers(self) -> list[th.optim.Optimizer]:
        """Optimizers that follow ``learning_rate``."""
        return [self.policy.optimizer]

    def _update(self, batch: Any, weights: th.Tensor | None) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """One gradient step on a batch; TD errors, ``[B]``, and metrics."""
        output = self.compute_loss(batch)
        loss = minimise(self.policy.optimizer, output, weights, self.max_grad_norm, self._n_updates)
        return output.td_error, {"loss": loss, **output.metrics}

    def _after_update(self, number: int) -> None:
        """Called after each gradient step with its number within this call of :meth:`train`."""

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """
        Run gradient steps on ``batch_size`` samples each.

        :raises FloatingPointError: see :func:`minimise`
        """
        assert self.replay_buffer is not None
        buffer, hooks = self.replay_buffer, hooks_of(self.replay_buffer)
        self.policy.set_training_mode(True)
        self._update_learning_rate(self._optimizers())
        hooks.set_progress(self._current_progress_remaining)
        for number in range(gradient_steps):
            # sample
            batch = buffer.sample(batch_size, env=self._vec_normalize_env)
            # one step on the weighted mean of the samples' losses
            weights = hooks.weights(batch)
            td_error, metrics = self._update(batch, weights)
            # new priorities
            if weights is not None:
                hooks.update_priorities(batch.indices, td_error.detach().abs().cpu().numpy())  # type: ignore[attr-defined]
            self._n_updates += 1
            self._train_metrics.add(metrics)
            # target networks
            self._after_update(number)
        self._log_metrics()

    def _log_metrics(self) -> None:
        """Give the logger the means since the last call."""
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        for key, value in self._train_metrics.flush().items():
            self.logger.record(f"train/{key}", value)

    def _make_replay_buffer(self) -> ReplayBuffer | None:
        """Make the replay buffer; None leaves that to SB3, which gives ``n_steps`` to its own buffers only."""
        kind = self.replay_buffer_class
        if kind is None or not issubclass(kind, PrioritizedReplayBuffer):
            return None
        names = ("device", "n_envs", "optimize_memory_usage", "n_steps", "gamma")
        kwargs = {name: getattr(self, name) for name in names} | self.replay_buffer_kwargs
        return kind(self.buffer_size, self.observation_space, self.action_space, **kwargs)

    def _setup_model(self) -> None:
        self._train_metrics = MetricMeans()
        if self.replay_buffer is None:
            self.set_random_seed(self.seed)  # samplers take their seed from numpy's generator
            self.replay_buffer = self._make_replay_buffer()
        with warnings.catch_warnings():
            if self.replay_buffer is not None or "n_steps" in self.replay_buffer_kwargs:  # SB3 looks at neither
                warnings.filterwarnings("ignore", message="`n_steps=.*is ignored because a custom `replay_buffer")
            super()._setup_model()

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
        if isinstance(self.replay_buffer, ReplayHooks):
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
        """
        goes_on = False
        try:
            rollout = super().collect_rollouts(*args, **kwargs)
            goes_on = rollout.continue_training
        finally:
            if not goes_on and isinstance(self.replay_buffer, ReplayHooks):
                self._last_obs = None
        return rollout

    def save(self, path: FileLike, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:
        """Save as SB3 does, but an older good file stays under ``path`` until the new one is complete."""
        save_whole(super().save, path, ".zip", exclude=exclude, include=include)

    def load_replay_buffer(self, path: FileLike, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer as SB3 does, if it fits this model's settings; otherwise the model keeps the one it has.

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

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_train_metrics"]

    def save_replay_buffer(self, path: FileLike) -> None:
        """Save the replay buffer as SB3 does; as with :meth:`save`, never half of it."""
        save_whole(super().save_replay_buffer, path, ".pkl")
