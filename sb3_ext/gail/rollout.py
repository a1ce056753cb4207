"""What PPO's rollout buffer does not keep of a rollout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy


class RolloutNotes(BaseCallback):
    """
    Hide the environment's reward from PPO, note how episodes end, and hand the finished rollout over.

    :param finish: gets this object, the values of the last observations ``[n_envs, 1]`` and whether they start
        episodes ``[n_envs]``
    """

    def __init__(self, finish: Callable[[RolloutNotes, th.Tensor, NDArray[np.bool_]], None]) -> None:
        super().__init__()
        self._finish = finish

    terminated: NDArray[np.bool_]
    """Whether each step of the finished rollout ended the task, ``[n_steps, n_envs]``."""

    def transitions(
        self,
        buffer: RolloutBuffer,
        policy: ActorCriticPolicy,
        last_obs: NDArray[Any],
        next_observations: bool,
        device: th.device,
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        """
        The rollout as the discriminator sees it, with N = n_steps * n_envs.

        :param buffer: the rollout
        :param policy: that acted
        :param last_obs: observations after the last step, ``[n_envs, ...]``
        :param next_observations: False returns the observations in their place
        :param device: where to put it; pictures stay on the CPU as bytes
        :return: observations, actions as the environment got them, next observations ``[N, ...]`` each, whether the
            task ended and log pi(a|s), ``[N]`` each
        """
        observation_space, action_space = policy.observation_space, policy.action_space
        if observation_space.dtype == np.uint8:
            device = th.device("cpu")

        def flat(observations: NDArray[Any]) -> th.Tensor:
            return th.as_tensor(observations.reshape(-1, *observations.shape[2:]).astype(observation_space.dtype)).to(
                device
            )

        now = after = flat(buffer.observations)
        if next_observations:
            successors = np.concatenate([buffer.observations[1:], last_obs[None]])
            for step, env, observation in self._last_observations:
                successors[step, env] = observation
            after = flat(successors)
        actions = buffer.actions.reshape(-1, *buffer.actions.shape[2:])
        if isinstance(action_space, spaces.Box):
            actions = actions.reshape(-1, *action_space.shape)
            if policy.squash_output:
                actions = policy.unscale_action(actions)
            # the expert's went through the environment, which never sees more than this
            actions = np.clip(actions, action_space.low, action_space.high)
        elif isinstance(action_space, spaces.Discrete):
            actions = actions.reshape(-1)
        return (
            now,
            th.as_tensor(actions.astype(action_space.dtype)).to(device),
            after,
            th.as_tensor(self.terminated.reshape(-1).astype(np.float32)).to(device),
            th.as_tensor(buffer.log_probs.reshape(-1).copy()).to(device),
        )

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
                self._last_observations.append(
                    (len(self._terminated), int(index), infos[index]["terminal_observation"])
                )
        self._terminated.append(terminated)
        return True

    def _on_rollout_end(self) -> None:
        self.terminated = np.stack(self._terminated)
        self._finish(self, self.locals["values"], self.locals["dones"])
