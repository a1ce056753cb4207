"""Fitted Q evaluation: what a policy is worth, learnt from data that other policies recorded."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, NoReturn

import numpy as np
import torch as th
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import polyak_update

from sb3_ext.arguments import check_least, check_share
from sb3_ext.cql.offline import OfflineAlgorithm, with_adam
from sb3_ext.data.load import DatasetLike
from sb3_ext.losses import LossOutput
from sb3_ext.off_policy import minimise
from sb3_ext.ope.episodes import check_spaces, first_steps, in_batches, own_view, reading_of
from sb3_ext.ope.evaluator import FQECnnPolicy, FQEMultiInputPolicy, FQEPolicy
from sb3_ext.ope.opinions import action_vectors, on_device, opinion_of, undisturbed
from sb3_ext.replay.dataset import OfflineReplayBuffer


class ValueEstimate(NamedTuple):
    """What a policy is worth where episodes begin."""

    mean: float  # over episodes, of the expected discounted return
    standard_error: float  # of that mean, from the spread over first states alone; NaN for one episode
    n_episodes: int


class PolicySamples(NamedTuple):
    """Transitions, with what the policy does next; actions are vectors."""

    observations: Any
    actions: th.Tensor  # [B, K]
    next_observations: Any
    next_actions: th.Tensor  # [B, K]
    dones: th.Tensor  # [B]
    rewards: th.Tensor  # [B]


class FQE(OfflineAlgorithm):
    """
    Fitted Q evaluation (Le, Voloshin and Yue, 2019, https://arxiv.org/abs/1903.08738, algorithm 3): the expected
    discounted return of a trained model's policy, from recorded data alone.

    Learns ``Q(s, a) = r + gamma (1 - done) E_{a' ~ pi(s')} Q_target(s', a')`` by squared errors. One timestep of
    ``learn`` is one gradient step. :meth:`initial_value` is the estimate.

    What the policy does in the data's states is asked once, when ``learn`` begins, because it does not change.
    Unlike the paper, the network's output is in units of the data's discounted returns, targets are clipped to the
    returns that the data's rewards can add up to, and the target network moves in small steps.

    :param policy: the network of the estimate: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"`` or a class
    :param dataset: a ``minari.MinariDataset``, its id (downloaded if it is not here) or path, or what
        :func:`~sb3_ext.load_minari` gave
    :param model: the trained model whose policy is evaluated: DQN, QRDQN, CQL, BC, PPO, A2C, SAC, TD3 or a class
        derived from one of them. It is not changed
    :param env: not used; SB3's ``load`` passes it
    :param learning_rate: Adam's step size, or a schedule of the remaining progress (1 to 0)
    :param batch_size: transitions per gradient step
    :param tau: share of the network that the target network takes over in each step; 1 for a copy. Higher learns
        faster and less stably
    :param gamma: discount factor; default: the model's
    :param target_update_interval: gradient steps between updates of the target network
    :param deterministic: evaluate the policy that ``predict(deterministic=True)`` follows; False: the one that samples,
        whose expectation over discrete actions is exact, and over continuous ones takes one sample per draw
    :param max_grad_norm: gradient clipping; None for none
    :param dataset_kwargs: further arguments of :func:`~sb3_ext.load_minari`; default: those that the model learnt with
    :param stats_window_size: as in SB3
    :param tensorboard_log: as in SB3
    :param policy_kwargs: of the network, for instance ``dict(net_arch=[64, 64])``; default: two layers of 256
    :param verbose: as in SB3
    :param seed: seed of the network and of the sampler
    :param device: as in SB3
    :param _init_setup_model: build the network now
    :raises TypeError: if there is no dataset or no model, or one of a kind that cannot be evaluated
    :raises ValueError: if dataset, model and policy do not fit together, or a number is out of range
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": FQEPolicy,
        "CnnPolicy": FQECnnPolicy,
        "MultiInputPolicy": FQEMultiInputPolicy,
    }
    action_kinds = (spaces.Discrete, spaces.Box)
    other_actions = " Evaluate that model in its environment, with SB3's evaluate_policy."
    policy: FQEPolicy
    model: Any = None
    _next_actions: th.Tensor | None = None

    def __init__(
        self,
        policy: str | type[FQEPolicy],
        dataset: DatasetLike | ReplayBuffer | None = None,
        model: BaseAlgorithm | None = None,
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule = 3e-4,
        batch_size: int = 128,
        tau: float = 0.05,
        gamma: float | None = None,
        target_update_interval: int = 1,
        deterministic: bool = True,
        max_grad_norm: float | None = None,
        dataset_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        check_least(1, batch_size=batch_size, target_update_interval=target_update_interval)
        check_least(0, max_grad_norm=max_grad_norm)
        self.gamma = float(getattr(model, "gamma", 0.99)) if gamma is None else gamma
        check_share(tau=tau, gamma=self.gamma)
        self.batch_size, self.tau, self.target_update_interval = batch_size, tau, target_update_interval
        self.deterministic, self.max_grad_norm = deterministic, max_grad_norm
        self.dataset_kwargs, self.dataset_info = {**reading_of(model), **(dataset_kwargs or {})}, {}
        if self.dataset_kwargs.get("prioritized"):
            raise ValueError("FQE draws uniformly: leave 'prioritized' out of dataset_kwargs.")
        super().__init__(
            policy,
            None,
            learning_rate,
            with_adam(policy_kwargs, eps=1e-8),
            stats_window_size,
            tensorboard_log,
            verbose,
            device,
            support_multi_env=True,
            seed=seed,
            supported_action_spaces=self.action_kinds,
        )
        if _init_setup_model:
            if model is None:
                raise TypeError("FQE needs the model whose policy it evaluates: FQE(policy, dataset, model).")
            opinion_of(model)
            self._attach(dataset)
            self.set_model(model)
            self._setup_model()

    def _attach(self, dataset: DatasetLike | ReplayBuffer | None) -> None:
        super()._attach(own_view(dataset) if isinstance(dataset, ReplayBuffer) else dataset)
        buffer = self._episodes
        if self._n_updates:  # what the network has learnt in
            return
        returns = buffer.discounted_returns(self.gamma)
        self.return_mean, self.return_std = float(returns.mean()), float(returns.std()) or 1.0
        rewards = buffer.rewards[buffer._rows]
        beyond = 1 / (1 - self.gamma) if self.gamma < 1 else np.inf
        least, most = float(rewards.min()), float(rewards.max())
        # at least one reward, at most one in every step for ever
        self.lowest_return = min(least, least * beyond) if least else 0.0
        self.highest_return = max(most, most * beyond) if most else 0.0

    @property
    def _episodes(self) -> OfflineReplayBuffer:
        assert isinstance(self._dataset, OfflineReplayBuffer)
        return self._dataset

    def set_model(self, model: BaseAlgorithm) -> None:
        """
        Say whose policy is evaluated, after ``load`` for instance.

        :param model: as in the constructor
        :raises TypeError: if it is of a kind that cannot be evaluated
        :raises ValueError: if its spaces are not the data's
        """
        opinion_of(model)
        if self._dataset is not None:
            check_spaces(model, self._dataset)
        self.model, self._next_actions = model, None

    def _setup_model(self) -> None:
        super()._setup_model()
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space, self.action_space, self.lr_schedule, **self.policy_kwargs
        ).to(self.device)

    def _policy_actions(self, observations: Any) -> th.Tensor:
        """What the evaluated policy does, ``[B, K]``, on this estimator's device."""
        self.model.policy.set_training_mode(False)  # as predict() does
        seen = on_device(observations, self.model.device)
        return opinion_of(self.model)(self.model, seen).actions(self.deterministic).to(self.device)

    def _actions_after(self, numbers: NDArray[np.int64]) -> th.Tensor:
        """What the policy does after transitions, ``[len(numbers), K]``."""
        normalize = getattr(self.model, "_vec_normalize_env", None)
        with th.no_grad():
            parts = [self._policy_actions(b.next_observations) for b in in_batches(self._episodes, numbers, normalize)]
        return th.cat(parts)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        if self.model is None:
            raise ValueError("There is no model to evaluate: call set_model(model) after load().")
        self._next_actions = None
        if self.deterministic or isinstance(self.action_space, spaces.Discrete):
            with undisturbed(self.model):
                self._next_actions = self._actions_after(np.arange(self._episodes.buffer_size))
        return super()._setup_learn(*args, **kwargs)

    def _sample(self, batch_size: int) -> PolicySamples:
        buffer = self._episodes
        numbers = buffer.rng.integers(0, buffer.buffer_size, size=batch_size)
        batch = buffer._get_samples(numbers)
        known = self._next_actions
        following = self._actions_after(numbers) if known is None else known[th.from_numpy(numbers).to(known.device)]
        return PolicySamples(
            batch.observations,
            action_vectors(self.action_space, batch.actions),
            batch.next_observations,
            following,
            batch.dones.squeeze(1),
            batch.rewards.squeeze(1),
        )

    def _values(self, observations: Any, actions: th.Tensor, target: bool = False) -> th.Tensor:
        """Q(s, a) in the units of the rewards, ``[B]``."""
        return self.return_mean + self.return_std * self.policy.values(observations, actions, target)

    def compute_loss(self, batch: PolicySamples) -> LossOutput:
        """
        Squared error of Q(s, a), in units of the spread of the data's discounted returns.

        :param batch: transitions with the policy's next actions
        :return: loss and TD error, ``[B]``; metrics ``td_loss``, in the rewards' units, and ``q_data``, the mean Q of
            the data's actions
        """
        values = self._values(batch.observations, batch.actions)
        with th.no_grad():
            following = self._values(batch.next_observations, batch.next_actions, target=True)
            target = batch.rewards + self.gamma * (1 - batch.dones) * following
            target = target.clamp(self.lowest_return, self.highest_return)
        error = target - values
        metrics = {"td_loss": (error**2).mean(), "q_data": values.mean()}
        return LossOutput((error / self.return_std) ** 2, error, metrics)

    def train(self, gradient_steps: int, batch_size: int = 128) -> None:
        """
        Run ``gradient_steps`` gradient steps on batches of ``batch_size`` samples.

        :raises FloatingPointError: if the loss is not finite
        """
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        for _ in range(gradient_steps):
            output = self.compute_loss(self._sample(batch_size))
            loss = minimise(self.policy.optimizer, output, None, self.max_grad_norm, self._n_updates)
            self._n_updates += 1
            if self._n_updates % self.target_update_interval == 0:
                polyak_update(self.policy.critic.parameters(), self.policy.critic_target.parameters(), self.tau)
            self._train_metrics.add({"loss": loss, **output.metrics})

    def _judge(self, means: dict[str, float]) -> None:
        """Log lines have the estimate so far."""
        self.logger.record("train/initial_value", self.initial_value().mean)

    def initial_value(self) -> ValueEstimate:
        """
        Expected discounted return of the policy where the data's episodes begin.

        :return: the mean over episodes and its standard error. That comes from the spread of the first states alone: it
            says nothing of the error of the estimate in each of them
        :raises ValueError: if a loaded estimator has no dataset or no model
        """
        if self.model is None or self._dataset is None:
            raise ValueError("After load() the model and its data are missing: call set_dataset() and set_model().")
        buffer, found = self._episodes, []
        normalize = getattr(self.model, "_vec_normalize_env", None)
        with undisturbed(self.model), undisturbed(self), th.no_grad():
            for plain, seen in zip(
                in_batches(buffer, first_steps(buffer)), in_batches(buffer, first_steps(buffer), normalize), strict=True
            ):
                found.append(self._values(plain.observations, self._policy_actions(seen.observations)))
        values = th.cat(found).double().cpu().numpy()
        error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
        return ValueEstimate(float(values.mean()), float(error), len(values))

    def predict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """
        Refuse: the policy is the model's.

        :raises NotImplementedError: always
        """
        raise NotImplementedError("FQE estimates what a policy is worth and has none: call predict() of that model.")

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "model", "_next_actions"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []
