"""What PPO's rollout buffer does not keep of a rollout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback


class RolloutNotes(BaseCallback):
    """
    Hide the environment's reward from PPO, note how episodes end, and hand the finished rollout over.

    :param finish: gets this object, whose ``locals`` have the values of the last observations and whether they start
        episodes
    """

    def __init__(self, finish: Callable[[RolloutNotes], None]) -> None:
        super().__init__()
        self._finish = finish

    terminated: NDArray[np.bool_]
    """Whether each step of the finished rollout ended the task, ``[n_steps, n_envs]``."""

    def transitions(self, next_observations: bool) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        """
        The rollout as the discriminator sees it, with N = n_steps * n_envs; pictures stay on the CPU as bytes.

        :param next_observations: False returns the observations in their place
        :return: observations, actions as the environment got them, next observations ``[N, ...]`` each, whether the
            task ended and log pi(a|s), ``[N]`` each
        """
        assert isinstance(self.model, PPO)
        buffer, policy, last_obs = self.model.rollout_buffer, self.model.policy, self.model._last_obs
        dtype, action_space = policy.observation_space.dtype, policy.action_space
        device = th.device("cpu") if dtype == np.uint8 else self.model.device

        def flat(values: NDArray[Any], dtype: Any) -> th.Tensor:
            return th.as_tensor(values.reshape(-1, *values.shape[2:]).astype(dtype)).to(device)

        now = after = flat(buffer.observations, dtype)
        if next_observations:
            assert isinstance(last_obs, np.ndarray)
            successors = np.concatenate([buffer.observations[1:], last_obs[None]])
            for step, env, observation in self._last_observations:
                successors[step, env] = observation
            after = flat(successors, dtype)
        actions = buffer.actions.reshape(*buffer.actions.shape[:2], *(action_space.shape or ()))
        if isinstance(action_space, spaces.Box):
            if policy.squash_output:
                actions = policy.unscale_action(actions)
            # the expert's went through the environment, which never sees more than this
            actions = np.clip(actions, action_space.low, action_space.high)
        ended, log_prob = flat(self.terminated, np.float32), flat(buffer.log_probs, np.float32)
        return now, flat(actions, action_space.dtype), after, ended, log_prob

    def _on_rollout_start(self) -> None:
        self._terminated: list[NDArray[np.bool_]] = []
        self.true_rewards: list[float] = []
        self._last_observations: list[tuple[int, int, Any]] = []

    def _on_step(self) -> bool:
        dones, infos, rewards = self.locals["dones"], self.locals["infos"], self.locals["rewards"]
        self.true_rewards.append(float(rewards.mean()))
        rewards[:] = 0  # in place: PPO adds the bootstrap of time limits to it and stores the sum
        terminated = dones.copy()
        for index in np.flatnonzero(dones):
            terminated[index] = not infos[index].get("TimeLimit.truncated", False)
            if "terminal_observation" in infos[index]:
                last = infos[index]["terminal_observation"]
                self._last_observations.append((len(self._terminated), int(index), last))
        self._terminated.append(terminated)
        return True

    def _on_rollout_end(self) -> None:
        self.terminated = np.stack(self._terminated)
        self._finish(self)
