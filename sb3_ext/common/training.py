"""The one gradient loop: sample, per-sample loss, importance weights, step, new priorities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

_GPU_CHECK_EVERY = 100


class LossOutput(NamedTuple):
    """
    What a loss function returns.

    :param loss: per-sample loss, ``[B]``
    :param td_error: per-sample temporal-difference error, ``[B]``; its absolute value becomes the priority
    :param metrics: further scalars to log, detached, 0-dim
    :param backward: sets the parameters' gradients of the mean over the batch of ``weights * loss``, given the weights
        ``[B]`` or None; None: autograd does it
    """

    loss: th.Tensor
    td_error: th.Tensor
    metrics: dict[str, th.Tensor]
    backward: Callable[[th.Tensor | None], None] | None = None


class MetricMeans:
    """Running means of scalars that stay on the device until they are read, so that logging does not stall a GPU."""

    def __init__(self) -> None:
        self._keys: tuple[str, ...] = ()
        self._total: th.Tensor | None = None
        self._count = 0

    def add(self, metrics: dict[str, th.Tensor]) -> None:
        """
        Add one step's values.

        :param metrics: 0-dim tensors; the same keys in every call until :meth:`flush`
        """
        values = th.stack([v.detach().float() for v in metrics.values()])
        if self._total is None or self._keys != tuple(metrics):
            self._keys, self._total, self._count = tuple(metrics), th.zeros_like(values), 0
        self._total += values
        self._count += 1

    def flush(self) -> dict[str, float]:
        """
        Read the means and start anew.

        :return: mean of each key; empty if nothing was added
        """
        if self._total is None:
            return {}
        means = dict(zip(self._keys, (self._total / self._count).tolist(), strict=True))
        self._total = None
        return means


def train_weighted(
    model: OffPolicyAlgorithm,
    compute_loss: Callable[[Any], LossOutput],
    gradient_steps: int,
    batch_size: int,
    metrics: MetricMeans,
    after_update: Callable[[], None] | None = None,
) -> None:
    """
    Run gradient steps of any value-based algorithm: the mean over the batch of ``weights * loss`` is minimised.

    The weights are those of a prioritized buffer's samples, or 1. This is the only place that reduces over the batch.

    :param model: gives the buffer, the policy with its optimizer, and ``max_grad_norm`` (None: no clipping)
    :param compute_loss: batch -> :class:`LossOutput`
    :param gradient_steps: number of steps
    :param batch_size: B
    :param metrics: receives ``loss`` and the loss function's metrics
    :param after_update: called after each step, to update target networks for instance
    :raises FloatingPointError: if the loss is NaN or infinite, before the step is taken (on a GPU it is looked at every
        100 steps only)
    """
    buffer = model.replay_buffer
    assert buffer is not None
    optimizer = model.policy.optimizer
    max_grad_norm: float | None = getattr(model, "max_grad_norm", None)
    model.policy.set_training_mode(True)
    model._update_learning_rate(optimizer)
    if hasattr(buffer, "set_progress"):  # a prioritized one
        buffer.set_progress(model._current_progress_remaining)
    for _ in range(gradient_steps):
        batch = buffer.sample(batch_size, env=model._vec_normalize_env)
        output = compute_loss(batch)
        weights: th.Tensor | None = getattr(batch, "weights", None)
        weights = None if weights is None else weights.reshape(-1)
        per_sample = output.loss if weights is None else output.loss * weights
        loss = per_sample.mean()
        if (loss.device.type == "cpu" or model._n_updates % _GPU_CHECK_EVERY == 0) and not th.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} at gradient step {model._n_updates}. Check the rewards' scale, lower the "
                "learning rate or set max_grad_norm; checkpoints written before this step are intact."
            )
        if output.backward is None:
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            output.backward(weights)
        if max_grad_norm is not None:
            th.nn.utils.clip_grad_norm_(model.policy.parameters(), max_grad_norm)
        optimizer.step()
        if weights is not None:
            buffer.update_priorities(batch.indices, output.td_error.detach().abs().cpu().numpy())  # type: ignore[attr-defined]
        model._n_updates += 1
        metrics.add({"loss": loss, **output.metrics})
        if after_update is not None:
            after_update()
