"""What learning without an environment needs beside the loss."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import ProgressBarCallback


class OfflineEnv(gym.Env[Any, Any]):
    """
    Stand-in for the training environment, which offline learning does not have: spaces, but no dynamics.

    :param observation_space: the agent's
    :param action_space: the agent's
    """

    def __init__(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """
        Refuse.

        :raises RuntimeError: always
        """
        raise RuntimeError("Offline learning has no environment. Pass env= to the constructor or to learn_online().")

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """
        Refuse.

        :raises RuntimeError: always
        """
        raise RuntimeError("Offline learning has no environment. Pass env= to the constructor or to learn_online().")


class OfflineProgressBar(ProgressBarCallback):
    """SB3's progress bar, with the latest losses and values in front of it."""

    _SHOWN = (
        ("td_loss", "td"),
        ("conservative_gap", "gap"),
        ("q_data", "Q data"),
        ("q_best", "Q best"),
        ("loss", "loss"),
    )

    def _on_step(self) -> bool:
        values = self.logger.name_to_value
        shown = [f"{label} {values['train/' + key]:.3g}" for key, label in self._SHOWN if "train/" + key in values]
        if shown:
            self.pbar.set_description(", ".join(shown), refresh=False)
        self.pbar.update(1)
        return True


def warn_on_overestimation(model: BaseAlgorithm, q_best: float, largest_return: float) -> bool:
    """
    Warn once per model when the values promise far more than any episode of the data ever gave.

    :param model: the model, to log and to remember that it was warned
    :param q_best: mean over states of the best action's Q
    :param largest_return: largest discounted return in the data
    :return: whether the values are implausible: more than twice the largest return and more than 1 above it
    """
    too_high = q_best > largest_return + max(1.0, abs(largest_return))
    model.logger.record("train/overestimation", float(too_high))
    if too_high and not getattr(model, "_warned_of_overestimation", False):
        model._warned_of_overestimation = True  # type: ignore[attr-defined]
        warnings.warn(
            f"Q of the best actions is {q_best:.3g} on average, but no episode of the data returned more than {largest_return:.3g} "
            "(discounted): the values are overestimated, and the policy will likely fail. Raise cql_alpha.",
            stacklevel=2,
        )
    return bool(too_high)
