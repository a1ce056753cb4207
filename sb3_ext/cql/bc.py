"""Behaviour cloning: the baseline that ignores rewards."""

from __future__ import annotations

from typing import Any, Self

import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import NatureCNN
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_ext.arguments import check_least
from sb3_ext.cql.defaults import BC_DEFAULTS, chosen
from sb3_ext.cql.offline import OfflineAlgorithm, with_adam
from sb3_ext.data.load import DatasetLike
from sb3_ext.losses import LossOutput
from sb3_ext.off_policy import minimise
from sb3_ext.replay.batch import unscaled
from sb3_ext.replay.dataset import OfflineReplayBuffer


class BC(OfflineAlgorithm):
    """
    Behaviour cloning (Pomerleau, 1991): maximise the mean log-likelihood of the dataset's actions,
    ``mean_(s, a) log pi(a | s)``. Rewards are ignored.

    The policy is PPO's, so it has every action and observation space of PPO, and its weights are a warm start:
    ``ppo.policy.load_state_dict(bc.policy.state_dict())``, where both have the same ``policy_kwargs``. For discrete
    actions the loss is CQL's conservative term alone, so cloning is the limit of CQL for infinite ``cql_alpha``.
    ``predict`` takes the likeliest action where it is deterministic, else draws one.

    :param policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"``, or a class of SB3's actor-critic kind
    :param dataset: a ``minari.MinariDataset``, its id (downloaded if it is not here) or path, or a filled replay buffer
    :param env: environment whose spaces must be the dataset's; not needed to learn
    :param learning_rate: Adam's step size, or a schedule of the remaining progress (1 to 0). Default: 1e-4 with
        CnnPolicy, 1e-3 otherwise
    :param batch_size: transitions per gradient step. Default: 32 with CnnPolicy, 64 otherwise
    :param ent_coef: weight of the policy's entropy, which is added to the objective; higher keeps it from growing
        certain of few examples
    :param max_grad_norm: gradient clipping; None for none
    :param dataset_kwargs: further arguments of :func:`~sb3_ext.data.load_minari`, as in :class:`CQL`
    :param bf16: run the network in bfloat16 (fast where the processor has it, slow where it does not)
    :param stats_window_size: as in SB3
    :param tensorboard_log: as in SB3
    :param policy_kwargs: as in PPO; the default optimizer is Adam with its usual epsilon of 1e-8
    :param verbose: as in SB3
    :param seed: seed of the network and of the sampler
    :param device: as in SB3
    :param _init_setup_model: build the network now
    :raises TypeError: if an environment is given as the dataset or the reverse
    :raises ValueError: if dataset, environment and policy do not fit together, or a number is out of range
    """

    policy_aliases = PPO.policy_aliases
    action_kinds = (spaces.Discrete, spaces.Box, spaces.MultiDiscrete, spaces.MultiBinary)
    policy: ActorCriticPolicy

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        dataset: DatasetLike | ReplayBuffer | None = None,
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule | None = None,
        batch_size: int | None = None,
        ent_coef: float = 0.0,
        max_grad_norm: float | None = None,
        dataset_kwargs: dict[str, Any] | None = None,
        bf16: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        self._check_env(env)
        defaults = BC_DEFAULTS.of(policy, ActorCriticCnnPolicy)
        learning_rate = chosen(learning_rate, defaults.learning_rate)
        batch_size = chosen(batch_size, defaults.batch_size)
        check_least(1, batch_size=batch_size)
        check_least(0, ent_coef=ent_coef, max_grad_norm=max_grad_norm)
        self.batch_size, self.ent_coef, self.max_grad_norm, self.bf16 = batch_size, ent_coef, max_grad_norm, bf16
        self.dataset_kwargs, self.dataset_info = dict(dataset_kwargs or {}), {}
        if self.dataset_kwargs.get("prioritized"):
            raise ValueError("Cloning has no TD errors to draw by: leave 'prioritized' out of dataset_kwargs.")
        super().__init__(
            policy,
            env,
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
            self._attach(dataset)
            self._setup_model()

    def _setup_model(self) -> None:
        super()._setup_model()
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space, self.action_space, self.lr_schedule, **self.policy_kwargs
        ).to(self.device)
        self._channels_last = type(self.policy.features_extractor) is NatureCNN  # others may not bear another layout
        if self._channels_last:
            self.policy.to(memory_format=th.channels_last)

    def compute_loss(self, batch: Any) -> LossOutput:
        """
        Negative log-likelihood of the data's actions, less ``ent_coef`` times the policy's entropy.

        :param batch: samples of the replay buffer
        :return: loss, ``[B]``; the TD error is zero; metrics ``nll`` (in nats), ``entropy`` where it has a closed form,
            and ``action_match``: for discrete actions the share that the policy would take, too
        """
        observations, actions = batch.observations, batch.actions
        if self._channels_last and is_image_space(self.observation_space):
            observations = observations.contiguous(memory_format=th.channels_last)
        if isinstance(self.action_space, spaces.Discrete):
            actions = actions.long().flatten()
        elif isinstance(self.action_space, spaces.Box):
            actions = self._environment_actions(actions)
        elif isinstance(self.action_space, spaces.MultiBinary):
            actions = actions.float()
        with th.autocast(self.device.type, th.bfloat16, enabled=self.bf16):
            distribution = self.policy.get_distribution(observations)
            loss = nll = -distribution.log_prob(actions).float()
            entropy = distribution.entropy()
        metrics = {"nll": nll.mean()}
        if entropy is not None:
            loss = loss - self.ent_coef * entropy.float() if self.ent_coef else loss
            metrics["entropy"] = entropy.float().mean()
        if not isinstance(self.action_space, spaces.Box):
            with th.no_grad():
                same = (distribution.mode() == actions).reshape(len(actions), -1).all(dim=1)
            metrics["action_match"] = same.float().mean()
        return LossOutput(loss, th.zeros_like(loss), metrics)

    def _environment_actions(self, actions: th.Tensor) -> th.Tensor:
        """Actions as the environment got them, ``[B, D]``: buffers of SB3's algorithms hold them scaled to [-1, 1]."""
        space = self.action_space
        assert isinstance(space, spaces.Box)
        actions = actions.flatten(1)
        if isinstance(self._dataset, OfflineReplayBuffer) or not space.is_bounded():
            return actions
        low, high = (th.as_tensor(bound.reshape(-1), device=actions.device) for bound in (space.low, space.high))
        found: th.Tensor = unscaled(actions, low, high)
        return found

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """
        Run ``gradient_steps`` gradient steps on batches of ``batch_size`` samples.

        :raises FloatingPointError: if the loss is not finite
        """
        assert self.replay_buffer is not None
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        for _ in range(gradient_steps):
            batch = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
            output = self.compute_loss(batch)
            loss = minimise(self.policy.optimizer, output, None, self.max_grad_norm, self._n_updates)
            self._n_updates += 1
            self._train_metrics.add({"loss": loss, **output.metrics})

    def learn_online(self, *args: Any, **kwargs: Any) -> Self:
        """
        Refuse: cloning has no use for an environment.

        :raises NotImplementedError: always
        """
        raise NotImplementedError(
            "Behaviour cloning learns from the dataset only. Use CQL to learn online too, or give PPO the weights: "
            "ppo.policy.load_state_dict(bc.policy.state_dict())."
        )

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []
