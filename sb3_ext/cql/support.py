"""Small parts of offline learning: the missing environment, new transitions, the progress bar, warnings, checks."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import ProgressBarCallback
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import VecEnv

from sb3_ext.replay.dataset import ClippedRewards, OfflineReplayBuffer
from sb3_ext.replay.priorities import Priorities
from sb3_ext.replay.prioritized import PrioritizedReplayBuffer


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


class OnlineReplayBuffer(ClippedRewards, PrioritizedReplayBuffer):
    """New transitions."""


class OfflineProgressBar(ProgressBarCallback):
    """SB3's progress bar, with the losses and values of the last log line in front of it."""

    _SHOWN = (
        ("nll", "nll"),
        ("td_loss", "td"),
        ("conservative_gap", "gap"),
        ("q_data", "Q data"),
        ("q_best", "Q best"),
        ("loss", "loss"),
    )

    def _on_step(self) -> bool:
        values: dict[str, float] = self.model._last_means  # type: ignore[attr-defined]
        shown = [f"{label} {values[key]:.3g}" for key, label in self._SHOWN if key in values]
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
            f"Q of the best actions is {q_best:.3g} on average, but no episode of the data returned more than "
            f"{largest_return:.3g} (discounted): the values are overestimated, and the policy will likely fail. Raise "
            "cql_alpha.",
            stacklevel=2,
        )
    return bool(too_high)


def sampler_mismatch(buffer: OfflineReplayBuffer, state: Any) -> str | None:
    """
    Compare a saved sampler with the buffer it should go on in.

    :param buffer: the data
    :param state: ``sampler_state`` of the buffer that was saved
    :return: why the sampler cannot go on there; None if it can
    """
    how = {True: "by priority", False: "uniformly"}
    before, now = isinstance(state, Priorities), hasattr(buffer, "priorities")
    if before != now:
        return f"The model was saved with data drawn {how[before]}, and this data is drawn {how[now]}"
    size = state.tree.capacity if before else state.get("items", buffer.buffer_size)
    if size != buffer.buffer_size:
        return f"The model was saved with data of {size} transitions, and this data has {buffer.buffer_size}"
    return None


def with_adam(policy_kwargs: dict[str, Any] | None, eps: float) -> dict[str, Any]:
    """
    Add the default optimizer, unless the user chose one: fused Adam, the same update in a fifth of the time.

    :param policy_kwargs: of the user
    :param eps: Adam's epsilon; lower takes larger steps where gradients are small
    :return: arguments of the policy
    """
    given = policy_kwargs or {}
    if "optimizer_class" in given:
        return dict(given)
    return {"optimizer_class": th.optim.Adam, "optimizer_kwargs": {"eps": eps, "fused": True}, **given}


def check_arguments(
    policy: Any,
    env: Any,
    cql_alpha: float,
    batch_size: int,
    target_update_interval: int,
    n_steps: int,
    policy_kwargs: dict[str, Any] | None,
) -> None:
    """
    Check what can be checked before any data is read.

    :param policy: name or class
    :param env: environment, its id, or None
    :param cql_alpha: not negative
    :param batch_size: at least 1
    :param target_update_interval: at least 1
    :param n_steps: at least 1
    :param policy_kwargs: without ``double_q``, which is an argument of CQL here
    :raises TypeError: if ``env`` is no environment
    :raises ValueError: if a value is out of range or the policy does not exist here
    """
    if isinstance(policy, str) and policy == "MultiInputPolicy":
        raise ValueError(
            "MultiInputPolicy is for Dict observations, which offline datasets here do not have; use MlpPolicy or "
            "CnnPolicy."
        )
    if env is not None and not isinstance(env, (gym.Env, VecEnv, str)):
        raise TypeError(
            f"env must be an environment or its id, not {type(env).__name__}; the dataset is the argument before it."
        )
    if isinstance(env, str) and env not in gym.registry and ":" not in env and not env.startswith("ALE/"):
        raise ValueError(f"{env!r} is no registered environment; if it is a dataset, pass it as dataset=.")
    if not cql_alpha >= 0:
        raise ValueError(f"cql_alpha must not be negative, got {cql_alpha}.")
    for name, value in (
        ("batch_size", batch_size),
        ("target_update_interval", target_update_interval),
        ("n_steps", n_steps),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if "double_q" in (policy_kwargs or {}):
        raise ValueError("policy_kwargs has no double_q here, it is an argument: CQL(..., double_q=True).")


def check_policy(policy: str, space: spaces.Space[Any], policy_kwargs: dict[str, Any]) -> None:
    """
    Compare the policy's name with the observations; a features extractor of the user's own is not questioned.

    :param policy: ``"MlpPolicy"`` or ``"CnnPolicy"``
    :param space: observation space
    :param policy_kwargs: of the model
    :raises ValueError: if they do not fit
    """
    image = is_image_space(space)
    own_extractor = policy_kwargs.get("features_extractor_class", FlattenExtractor) is not FlattenExtractor
    if own_extractor:
        return
    if policy == "CnnPolicy" and not image:
        raise ValueError(f"CnnPolicy needs uint8 images, the dataset has {short_space(space)}. Use 'MlpPolicy'.")
    if policy == "MlpPolicy" and image:
        raise ValueError(f"MlpPolicy needs vectors, the dataset has images ({short_space(space)}). Use 'CnnPolicy'.")


def short_space(space: spaces.Space[Any] | None) -> str:
    """
    Name a space without printing its bounds element by element.

    :param space: any space
    :return: short text
    """
    if isinstance(space, spaces.Box):
        return f"Box({space.low.min()}, {space.high.max()}, {space.shape}, {space.dtype})"
    return str(space)


def check_replay_buffer(buffer: ReplayBuffer, n_steps: int, gamma: float, clip_rewards: bool) -> None:
    """
    Refuse a replay buffer that cannot be the dataset.

    :param buffer: the replay buffer
    :param n_steps: of the model
    :param gamma: of the model
    :param clip_rewards: of the model
    :raises ValueError: if it is empty, has ``Dict`` observations, or gives other returns than the model wants
    """
    if buffer.size() == 0:
        raise ValueError("The replay buffer is empty; fill it before passing it as the dataset.")
    if isinstance(buffer.observation_space, spaces.Dict):
        raise ValueError(
            "The replay buffer has Dict observations, which cannot be learnt from here; fill one with flat vectors "
            "(gymnasium.wrappers.FlattenObservation) or images."
        )
    if isinstance(buffer, OfflineReplayBuffer):  # gives what the model wants
        return
    steps, discount = getattr(buffer, "n_steps", 1), getattr(buffer, "gamma", gamma)
    if clip_rewards and steps > 1:
        raise ValueError(
            f"clip_rewards clips each reward, but {type(buffer).__name__} gives sums of n_steps={steps} of them. Pass "
            "a Minari dataset, or clip the rewards when you fill the buffer."
        )
    if (steps, discount) != (n_steps, gamma):
        raise ValueError(
            f"The replay buffer has n_steps={steps} and gamma={discount}, the model {n_steps} and {gamma}. Set them "
            "alike, or pass a Minari dataset, which takes the model's."
        )
