"""The loss of EfficientZero V2: windows unrolled through the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch as th

from sb3_ext.common.losses import cross_entropy, negative_cosine
from sb3_ext.common.sequences import SequenceSamples
from sb3_ext.common.training import LossOutput
from sb3_ext.efficientzero.gaussian import log_prob, sampled_entropy
from sb3_ext.efficientzero.reanalysis import Targets
from sb3_ext.efficientzero.targets import masks, value_prefixes

if TYPE_CHECKING:
    from sb3_ext.efficientzero.efficientzero import EfficientZeroV2


def unrolled_loss(model: EfficientZeroV2, batch: SequenceSamples, targets: Targets) -> LossOutput:
    """
    Losses of reward, value, policy and latent state over K steps of the model (Wang et al., 2024,
    https://arxiv.org/abs/2403.00564, eq. 2), divided by K.

    :param model: gives networks and coefficients
    :param batch: windows
    :param targets: of values and policies
    :return: loss and error of the value at the first place, ``[B]``, and metrics
    :raises FloatingPointError: if a term is not finite, on a CPU; names it
    """
    calls, head, steps, device = model.policy.calls, model.policy.network, model.unroll_steps, model.device
    policy_mask, value_mask, reward_mask = (
        th.from_numpy(mask).to(device) for mask in masks(batch.lengths, batch.terminated, steps)
    )
    inside = th.from_numpy((np.arange(steps) < batch.lengths[:, None]).astype(np.float32)).to(device)
    observations = th.from_numpy(batch.observations[:, : steps + 1]).to(device)
    actions = th.from_numpy(batch.actions[:, :steps]).to(device)
    gained = batch.rewards[:, :steps]
    gained = value_prefixes(gained, head.horizon) if head.horizon else gained
    rewards = model.policy.encode(th.from_numpy(gained).to(device))
    values = model.policy.encode(targets.values)

    latent = calls.represent(model.augment(observations[:, 0]))
    if model.consistency_coef:
        with th.no_grad():
            goals = [calls.projector(calls.represent(model.augment(observations[:, k + 1]))) for k in range(steps)]
    value_logits, policy = calls.predict(latent)
    first_value = model.policy.decode(value_logits.detach())
    zero = th.zeros(len(latent), device=device)
    terms = {
        "value_loss": cross_entropy(value_logits, values[:, 0]) * value_mask[:, 0],
        "policy_loss": _policy_loss(policy, targets, 0) * policy_mask[:, 0],
        "reward_loss": zero, "consistency_loss": zero, "entropy": _entropy(policy, model.policy.discrete),
    }  # fmt: skip
    memory = head.start(len(latent))
    for k in range(steps):
        latent = calls.dynamics(latent, model.policy.action_input(actions[:, k]))
        if head.horizon and k and k % head.horizon == 0:
            memory = head.start(len(latent))
        reward_logits, memory = calls.reward(latent, memory)
        terms["reward_loss"] = terms["reward_loss"] + cross_entropy(reward_logits, rewards[:, k]) * reward_mask[:, k]
        if model.consistency_coef:
            similar = negative_cosine(calls.predictor(calls.projector(latent)), goals[k])
            terms["consistency_loss"] = terms["consistency_loss"] + similar * inside[:, k]
        value_logits, policy = calls.predict(latent)
        terms["value_loss"] = terms["value_loss"] + cross_entropy(value_logits, values[:, k + 1]) * value_mask[:, k + 1]
        terms["policy_loss"] = terms["policy_loss"] + _policy_loss(policy, targets, k + 1) * policy_mask[:, k + 1]
        terms["entropy"] = terms["entropy"] + _entropy(policy, model.policy.discrete) * policy_mask[:, k + 1]
        latent.register_hook(lambda grad: grad * 0.5)
    loss = (
        model.value_coef * terms["value_loss"]
        + model.policy_coef * terms["policy_loss"]
        + model.reward_coef * terms["reward_loss"]
        + model.consistency_coef * terms["consistency_loss"]
    ) / steps
    if model.ent_coef:
        loss = loss - model.ent_coef * terms["entropy"] / steps
    td_error = targets.values[:, 0] - first_value
    if loss.device.type == "cpu" and not th.isfinite(loss + td_error).all():
        known = {"value_target": targets.values, **terms}
        bad = [name for name, term in known.items() if not th.isfinite(term).all()]
        raise FloatingPointError(
            f"{' and '.join(bad)} of update {model._n_updates} is not finite. Check the rewards' scale, or lower "
            "the learning rate; checkpoints written before this update are intact."
        )
    metrics = {name: term.mean() / steps for name, term in terms.items()}
    metrics["value_error"] = td_error.abs().mean()
    metrics["value_mean"] = first_value.mean()
    metrics["search_depth"] = zero[0] + targets.depth
    return LossOutput(loss, td_error, metrics)


def _policy_loss(policy: th.Tensor, targets: Targets, place: int) -> th.Tensor:
    """Cross entropy to the improved policy; with several action dimensions, only of the chosen sample."""
    if targets.actions is None:
        return cross_entropy(policy, targets.policy[:, place])
    samples = targets.actions[:, place]
    if samples.shape[-1] == 1:
        return -(targets.policy[:, place] * log_prob(policy, samples)).sum(1)
    best = samples[th.arange(len(samples)), targets.best[:, place]]
    return -log_prob(policy, best[:, None]).squeeze(1)


def _entropy(policy: th.Tensor, discrete: bool) -> th.Tensor:
    if discrete:
        logs = policy.log_softmax(1)
        return -(logs.exp() * logs).sum(1)
    return sampled_entropy(policy)
