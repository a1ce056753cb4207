"""Action masks in the way of sb3-contrib: ``env.action_masks()`` and ``predict(..., action_masks=...)``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from numpy.typing import NDArray
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy

from sb3_ext.efficientzero.replay import SequenceReplayBuffer


def legal_actions(masks: Any, rows: int, action_space: spaces.Space[Any]) -> NDArray[np.bool_]:
    """
    Action masks ``[A]`` or ``[B, A]``, nonzero where an action is legal, as ``[B, A]``.

    :raises ValueError: if actions are continuous, the shape is another one, or an environment has no legal action
    """
    if not isinstance(action_space, spaces.Discrete):
        raise ValueError(f"Action masks are for Discrete actions, not for {action_space}.")
    found = np.asarray(masks).astype(bool)
    wanted = (rows, int(action_space.n))
    found = found[None] if found.ndim == 1 else found
    if found.shape != wanted:
        raise ValueError(f"Action masks have shape {np.shape(masks)}, wanted {wanted}: one row per environment.")
    dead = np.flatnonzero(~found.any(axis=1))
    if len(dead):
        raise ValueError(
            f"Environment {dead[0]} has no legal action: its action mask is all False. End the episode instead."
        )
    return found


class MaskedPolicy(BasePolicy):
    """A policy whose ``predict`` takes action masks; ``_predict`` takes the forbidden ones as its third argument."""

    def predict(
        self,
        observation: Any,
        state: tuple[NDArray[Any], ...] | None = None,
        episode_start: NDArray[Any] | None = None,
        deterministic: bool = False,
        action_masks: Any = None,
    ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...] | None]:
        """
        Choose actions.

        :param observation: one or a batch
        :param state: passed through
        :param episode_start: ignored
        :param deterministic: search without Gumbel noise
        :param action_masks: discrete actions: ``[B, A]``, nonzero where an action is legal
        :return: actions, and ``state``
        :raises ValueError: if the masks do not fit; says what is wrong
        """
        if action_masks is None:
            return super().predict(observation, state, episode_start, deterministic)
        self.set_training_mode(False)
        tensor, batched = self.obs_to_tensor(observation)
        invalid = ~legal_actions(action_masks, len(tensor), self.action_space)
        with th.no_grad():
            actions = self._predict(tensor, deterministic, invalid).cpu().numpy()  # type: ignore[call-arg]
        return (actions if batched else actions[0]), state


class MaskedCollection(OffPolicyAlgorithm):
    """Off-policy collection that asks environments with ``action_masks()`` before each step, and stores the answer."""

    _masks_wanted = False
    _legal: NDArray[np.bool_] | None = None

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        found = super()._setup_learn(*args, **kwargs)
        assert self.env is not None
        self._masks_wanted = is_masking_supported(self.env)
        return found

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        self._legal = None
        if not self._masks_wanted:
            return super()._sample_action(learning_starts, action_noise, n_envs)
        assert self.env is not None
        self._legal = legal = legal_actions(get_action_masks(self.env), n_envs, self.action_space)
        if self.num_timesteps < learning_starts:
            assert isinstance(self.action_space, spaces.Discrete)
            actions = np.array([self.action_space.sample(row.astype(np.int8)) for row in legal])
        else:
            assert self._last_obs is not None
            actions, _ = self.predict(self._last_obs, deterministic=False, action_masks=legal)
        return actions, actions

    def _store_transition(self, *args: Any, **kwargs: Any) -> None:
        super()._store_transition(*args, **kwargs)
        if self._legal is not None:
            assert isinstance(self.replay_buffer, SequenceReplayBuffer)
            self.replay_buffer.add_legal(self._legal)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_legal", "_masks_wanted"]

    def predict(
        self,
        observation: Any,
        state: tuple[NDArray[Any], ...] | None = None,
        episode_start: NDArray[Any] | None = None,
        deterministic: bool = False,
        action_masks: Any = None,
    ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...] | None]:
        """See :meth:`MaskedPolicy.predict`."""
        policy = self.policy
        assert isinstance(policy, MaskedPolicy)
        return policy.predict(observation, state, episode_start, deterministic, action_masks)
