"""The loss of EfficientZero V2: windows unrolled through the model."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch as th

from sb3_ext.cuda_graphs import GraphedLoss
from sb3_ext.efficientzero.gaussian import log_prob, sampled_entropy
from sb3_ext.efficientzero.policies import EfficientZeroPolicy
from sb3_ext.efficientzero.reanalysis import Targets
from sb3_ext.efficientzero.replay import SequenceSamples
from sb3_ext.efficientzero.targets import loss_masks, value_prefixes
from sb3_ext.losses import LossOutput, cross_entropy, negative_cosine
from sb3_ext.replay.batch import to_device


class LossModel(Protocol):
    """What the loss needs of the algorithm."""

    policy: EfficientZeroPolicy
    graphed_loss: GraphedLoss
    unroll_steps: int
    reward_coef: float
    value_coef: float
    policy_coef: float
    consistency_coef: float
    ent_coef: float | None
    cuda_graphs: bool
    _n_updates: int

    def augment(self, observations: th.Tensor) -> th.Tensor:
        """Shift images and change their intensity at random."""


TERMS = ("value_target", "value_loss", "policy_loss", "reward_loss", "consistency_loss", "entropy")
"""What is looked at when a loss is not finite."""


class _Inputs(NamedTuple):
    """
    What the loss of a batch depends on besides the parameters, on the model's device: the first K + 1 observations of
    each window, targets as in :class:`Targets`, and masks as in :func:`~sb3_ext.efficientzero.targets.loss_masks`.
    """

    observations: th.Tensor
    actions: th.Tensor
    gained: th.Tensor
    """Rewards, or value prefixes, ``[B, K]``."""
    values: th.Tensor
    policy: th.Tensor
    best: th.Tensor
    sampled: th.Tensor
    """Actions of the targets, ``[B, K + 1, S, D]``; empty if actions are discrete."""
    policy_mask: th.Tensor
    value_mask: th.Tensor
    reward_mask: th.Tensor
    inside: th.Tensor
    """Transitions of the episode, ``[B, K]``."""


def unrolled_loss(model: LossModel, batch: SequenceSamples, targets: Targets) -> LossOutput:
    """
    Losses ``[B]`` of reward, value, policy and latent state over K steps of the model (Wang et al., 2024,
    https://arxiv.org/abs/2403.00564, eq. 2), divided by K; with the error of the value at the first place, ``[B]``.

    :raises FloatingPointError: if a term is not finite, on a CPU; names it
    """
    steps, device, horizon = model.unroll_steps, model.policy.device, model.policy.network.horizon
    gained = batch.rewards[:, :steps]
    parts = (
        batch.observations[:, : steps + 1],
        batch.actions[:, :steps],
        value_prefixes(gained, horizon) if horizon else gained,
        *(targets.values, targets.policy, targets.best),
        th.empty(0, device=device) if targets.actions is None else targets.actions,
        *loss_masks(batch.lengths, batch.terminated, steps),
        (np.arange(steps) < batch.lengths[:, None]).astype(np.float32),
    )
    inputs = to_device(parts, device)
    output = model.graphed_loss(*inputs) if model.cuda_graphs else unroll(model, *inputs)
    if output.loss.device.type == "cpu" and not th.isfinite(output.loss + output.td_error).all():
        terms = {"value_target": targets.values, **output.metrics}
        bad = [name for name in TERMS if not th.isfinite(terms[name]).all()]
        raise FloatingPointError(
            f"{' and '.join(bad)} of update {model._n_updates} is not finite. Check the rewards' scale, or lower "
            "the learning rate; checkpoints written before this update are intact."
        )
    output.metrics["search_depth"] = output.td_error.new_full((), targets.depth)
    output.metrics["value_clipped"] = (targets.values.abs() > model.policy.value_range).float().mean()
    return output


def unroll(model: LossModel, *tensors: th.Tensor) -> LossOutput:
    """The loss itself: tensors in, tensors out, and nothing that a CUDA graph could not hold."""
    x = _Inputs(*tensors)
    calls, head, steps, discrete = model.policy.calls, model.policy.network, model.unroll_steps, model.policy.discrete
    rewards, values = model.policy.encode(x.gained), model.policy.encode(x.values)
    latent = calls.represent(model.augment(x.observations[:, 0]))
    if model.consistency_coef:
        with th.no_grad():
            goals = [calls.projector(calls.represent(model.augment(x.observations[:, k + 1]))) for k in range(steps)]
    value_logits, policy = calls.predict(latent)
    first_value = model.policy.decode(value_logits.detach())
    value_loss = cross_entropy(value_logits, values[:, 0]) * x.value_mask[:, 0]
    policy_loss = _policy_loss(policy, x, 0) * x.policy_mask[:, 0]
    entropy = _entropy(policy, discrete)
    reward_loss = consistency_loss = th.zeros_like(value_loss)
    memory = head.start(len(latent))
    for k in range(steps):
        latent = calls.dynamics(latent, model.policy.action_input(x.actions[:, k]))
        if head.horizon and k and k % head.horizon == 0:
            memory = head.start(len(latent))
        reward_logits, memory = calls.reward(latent, memory)
        reward_loss = reward_loss + cross_entropy(reward_logits, rewards[:, k]) * x.reward_mask[:, k]
        if model.consistency_coef:
            similar = negative_cosine(calls.predictor(calls.projector(latent)), goals[k])
            consistency_loss = consistency_loss + similar * x.inside[:, k]
        value_logits, policy = calls.predict(latent)
        value_loss = value_loss + cross_entropy(value_logits, values[:, k + 1]) * x.value_mask[:, k + 1]
        policy_loss = policy_loss + _policy_loss(policy, x, k + 1) * x.policy_mask[:, k + 1]
        entropy = entropy + _entropy(policy, discrete) * x.policy_mask[:, k + 1]
        latent.register_hook(lambda grad: grad * 0.5)
    loss = (
        model.value_coef * value_loss
        + model.policy_coef * policy_loss
        + model.reward_coef * reward_loss
        + model.consistency_coef * consistency_loss
    ) / steps
    if model.ent_coef:
        loss = loss - model.ent_coef * entropy / steps
    td_error = x.values[:, 0] - first_value
    terms = (value_loss, policy_loss, reward_loss, consistency_loss, entropy)
    metrics = {name: term.detach().mean() / steps for name, term in zip(TERMS[1:], terms, strict=True)}
    metrics["entropy"] = entropy.detach().sum() / x.policy_mask.sum()
    metrics |= {"value_error": td_error.abs().mean(), "value_mean": first_value.mean()}
    return LossOutput(loss, td_error, metrics)


def _policy_loss(policy: th.Tensor, x: _Inputs, place: int) -> th.Tensor:
    """Cross entropy to the improved policy; with several action dimensions, only of the chosen sample."""
    if not x.sampled.numel():
        return cross_entropy(policy, x.policy[:, place])
    samples = x.sampled[:, place]
    if samples.shape[-1] == 1:
        return -(x.policy[:, place] * log_prob(policy, samples)).sum(1)
    best = samples[th.arange(len(samples), device=samples.device), x.best[:, place]]
    return -log_prob(policy, best[:, None]).squeeze(1)


def _entropy(policy: th.Tensor, discrete: bool) -> th.Tensor:
    if discrete:
        logs = policy.log_softmax(1)
        return -(logs.exp() * logs).sum(1)
    return sampled_entropy(policy)


def random_shift(images: th.Tensor, pixels: int) -> th.Tensor:
    """
    Shift images ``[B, C, H, W]``, bytes are the cheapest, by up to so many pixels P along each axis; edges are
    repeated. All planes of an image move together.
    """
    (batch, planes, height, width), p = images.shape, pixels
    padded = images.new_empty(batch, planes, height + 2 * p, width + 2 * p)
    padded[:, :, p : p + height, p : p + width] = images
    padded[:, :, :p] = padded[:, :, p : p + 1]
    padded[:, :, p + height :] = padded[:, :, p + height - 1 : p + height]
    padded[..., :p] = padded[..., p : p + 1]
    padded[..., p + width :] = padded[..., p + width - 1 : p + width]
    down, right = th.randint(2 * p + 1, (2, batch, 1), device=images.device).squeeze(2)
    # [B, C, 2 P + 1, 2 P + 1, H, W]: a view of every shift
    shifts = padded.unfold(2, height, 1).unfold(3, width, 1)
    return shifts[th.arange(batch, device=images.device), :, down, right]


def random_intensity(images: th.Tensor, scale: float) -> th.Tensor:
    """Multiply every image ``[B, C, H, W]`` by ``1 + scale * clip(N(0, 1), -2, 2)``."""
    noise = th.randn(len(images), 1, 1, 1, device=images.device).clamp(-2, 2)
    return images.float() * (1 + scale * noise)  # bytes times floats takes four times as long on a CPU
