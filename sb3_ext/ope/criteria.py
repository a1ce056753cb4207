"""What can be said of a model from held-out episodes, without an environment and without training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_ext.ope.episodes import first_steps, in_batches
from sb3_ext.ope.opinions import action_vectors, opinion_of, undisturbed
from sb3_ext.replay.dataset import OfflineReplayBuffer


@dataclass(frozen=True)
class Criterion:
    """
    A number that may tell better models from worse.

    :param higher_is_better: which direction a good model is expected in
    :param needs: what a model has that can be asked: ``"values"``, ``"likelihood"``, ``"discrete"`` (actions that are
        the same or not), ``"continuous"`` actions, or ``"fqe"``: training
    """

    higher_is_better: bool
    needs: str


CRITERIA = {
    "td_error": Criterion(False, "values"),
    "initial_value": Criterion(True, "values"),
    "soft_opc": Criterion(True, "values"),
    "action_match": Criterion(True, "discrete"),
    "action_mse": Criterion(False, "continuous"),
    "log_likelihood": Criterion(True, "likelihood"),
    "fqe": Criterion(True, "fqe"),
}
"""By name, see :func:`held_out_scores`."""


def available_criteria(model: BaseAlgorithm) -> list[str]:
    """
    Names of the criteria that a model can be judged by.

    :raises TypeError: if it is of a kind that cannot be asked
    """
    kind = opinion_of(model)
    continuous = isinstance(model.action_space, spaces.Box)
    has = {
        "values": kind.has_values,
        "likelihood": kind.has_likelihood,
        "discrete": not continuous,
        "continuous": continuous,
        "fqe": isinstance(model.action_space, (spaces.Box, spaces.Discrete)),
    }
    return [name for name, criterion in CRITERIA.items() if has[criterion.needs]]


def upper_quartile(buffer: OfflineReplayBuffer) -> float:
    """Undiscounted return that a quarter of the episodes reach."""
    return float(np.quantile(buffer.episode_returns(), 0.75, method="higher"))


def held_out_scores(
    model: Any, buffer: OfflineReplayBuffer, names: Collection[str], success_return: float | None = None
) -> dict[str, float]:
    """
    Judge a model by data; all but ``fqe``, which is :class:`~sb3_ext.FQE`'s.

    - ``td_error``: mean over transitions of ``(Q(s, a) - r - gamma (1 - done) Q(s', pi(s')))^2``, with the model's own
      critic on both sides, as d3rlpy's ``TDErrorEvaluator``
    - ``initial_value``: mean over episodes of ``Q(s_0, pi(s_0))`` (Paine et al., 2020,
      https://arxiv.org/abs/2007.09055)
    - ``soft_opc``: mean Q(s, a) of the transitions in successful episodes less that of all (Irpan et al., 2019,
      https://arxiv.org/abs/1906.01624)
    - ``action_match``: share of states where the policy's action is the one in the data
    - ``action_mse``: mean squared difference of the policy's and the data's actions, scaled to [-1, 1], over states and
      dimensions
    - ``log_likelihood``: mean ``log pi(a | s)`` of the data's actions, in nats

    Values are the mean over a model's critics and quantiles, in its own units (clipped or normalised rewards).

    :param model: the trained model; its random streams and modes are left as they were
    :param buffer: the episodes, as :func:`~sb3_ext.ope.episodes.load_episodes` gives them
    :param names: of :data:`CRITERIA`
    :param success_return: undiscounted return of a successful episode; default: the upper quartile
    :return: each of them
    """
    wanted, normalize = set(names), getattr(model, "_vec_normalize_env", None)
    opinion, space = opinion_of(model), model.action_space
    found: dict[str, list[th.Tensor]] = defaultdict(list)
    with undisturbed(model), th.no_grad():
        for batch in in_batches(buffer, np.arange(buffer.buffer_size), normalize):
            here, taken = opinion(model, batch.observations), action_vectors(space, batch.actions)
            if wanted & {"td_error", "soft_opc"}:
                found["value"].append(here.values(taken))
            if "td_error" in wanted:
                there = opinion(model, batch.next_observations)
                following = there.values(there.actions())
                target = batch.rewards.squeeze(1) + model.gamma * (1 - batch.dones.squeeze(1)) * following
                found["td_error"].append((found["value"][-1] - target) ** 2)
            if "action_match" in wanted:
                found["action_match"].append((here.actions() == taken).all(dim=1).float())
            if "action_mse" in wanted:
                found["action_mse"].append(((here.actions() - taken) ** 2).mean(dim=1))
            if "log_likelihood" in wanted:
                found["log_likelihood"].append(here.log_likelihood(batch.actions))
        if "initial_value" in wanted:
            for batch in in_batches(buffer, first_steps(buffer), normalize):
                here = opinion(model, batch.observations)
                found["initial_value"].append(here.values(here.actions()))
    arrays = {name: th.cat(parts).double().cpu().numpy() for name, parts in found.items()}
    if "soft_opc" in wanted:
        threshold = upper_quartile(buffer) if success_return is None else success_return
        success = np.repeat(buffer.episode_returns() >= threshold, buffer.lengths)
        arrays["soft_opc"] = arrays["value"][success].mean() - arrays["value"]
    return {name: float(arrays[name].mean()) for name in names if name in arrays}
