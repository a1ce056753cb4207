"""Policies of EfficientZero V2: a network, and the search that acts with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn
from torch.nn import functional as F

from sb3_ext.common.losses import inverse_value_transform, two_hot, value_transform
from sb3_ext.efficientzero.fast import FastMlp, compile_mlp, decode
from sb3_ext.efficientzero.gaussian import BOUND, squashed_normal
from sb3_ext.efficientzero.networks import CnnNetwork, MlpNetwork
from sb3_ext.efficientzero.search import RecurrentOutput, SearchOutput, gumbel_search

INNER_ACTIONS = 2
"""Sampled actions per node below the root, continuous control."""
_EPS = 1e-3
_CHUNK = 1 << 21
"""Numbers of observations encoded at once on a CPU: few enough for the caches, and for memory to be used again."""


class Roots(NamedTuple):
    """
    What the network says of observations.

    :param latent: latent states, ``[B, ...]``, tensor or numpy array
    :param values: ``[B]``, in units of return
    :param policy: output of the policy head, ``[B, policy_size]``
    """

    latent: Any
    values: Any
    policy: Any


@contextmanager
def _evaluating(module: BasePolicy) -> Iterator[None]:
    """Evaluation mode (batch norm, running means) for a while."""
    training = module.training
    if training:
        module.set_training_mode(False)
    try:
        yield
    finally:
        if training:
            module.set_training_mode(True)


class EfficientZeroPolicy(BasePolicy):
    """
    Acts by Gumbel search over latent states; the base of ``MlpPolicy`` and ``CnnPolicy``.

    :param observation_space: ``Box``
    :param action_space: ``Discrete``, or ``Box`` for sampled actions
    :param lr_schedule: learning rate
    :param num_simulations: network steps per search; more finds better actions and takes longer
    :param max_num_considered_actions: root actions that share the simulations; None: 2, 4 or 8 for up to 3, up to 15
        and more discrete actions, all ``num_sampled_actions`` for continuous ones
    :param num_sampled_actions: continuous control: root actions; a quarter is drawn from the policy, the rest from the
        policy with three times its standard deviation. For deterministic actions all come from the policy, its mode
        first, with noise that is the same in every call
    :param gamma: discount factor
    :param support_size: bins of the categorical value and reward
    :param value_range: largest absolute value and reward that the bins reach, in units of return
    :param search: False acts by the network's policy alone
    :param network_kwargs: sizes; see the network class
    :param features_extractor_class: ``MlpPolicy``: what turns an observation into a vector, as in SB3, such as a
        convolutional network before latent vectors; the default flattens and standardises
    :param features_extractor_kwargs: likewise
    :param normalize_images: give the features extractor images divided by 255
    :param optimizer_class: of torch, or its name in ``torch.optim``
    :param optimizer_kwargs: likewise
    """

    network_class: type[nn.Module] = MlpNetwork

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        num_simulations: int = 16,
        max_num_considered_actions: int | None = None,
        num_sampled_actions: int = 16,
        gamma: float = 0.997,
        support_size: int = 51,
        value_range: float = 300.0,
        search: bool = True,
        network_kwargs: dict[str, Any] | None = None,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] | str = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class,
            features_extractor_kwargs,
            normalize_images=normalize_images,
            optimizer_class=getattr(th.optim, optimizer_class) if isinstance(optimizer_class, str) else optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=isinstance(action_space, spaces.Box),
        )
        self.num_simulations, self.max_num_considered_actions = num_simulations, max_num_considered_actions
        self.num_sampled_actions, self.gamma, self.search = num_sampled_actions, gamma, search
        self.support_size, self.value_range = support_size, value_range
        self.network_kwargs = network_kwargs or {}
        self.discrete = isinstance(action_space, spaces.Discrete)
        if isinstance(action_space, spaces.Discrete):
            self.action_size = policy_size = slots = int(action_space.n)
            considered = 2 if slots < 4 else 4 if slots < 16 else 8
        else:
            assert isinstance(action_space, spaces.Box)
            self.action_size = int(np.prod(action_space.shape))
            policy_size, considered = 2 * self.action_size, num_sampled_actions
            slots = num_sampled_actions
        if max_num_considered_actions is not None and max_num_considered_actions > slots:
            raise ValueError(
                f"max_num_considered_actions={max_num_considered_actions}, but a root has {slots} actions."
            )
        self.considered = max_num_considered_actions or considered
        sizes = self.network_kwargs
        if features_extractor_class is not FlattenExtractor:
            if not issubclass(self.network_class, MlpNetwork):
                raise ValueError("CnnPolicy has its own network and takes no features_extractor_class: MlpPolicy does.")
            sizes = {
                **sizes,
                "features_extractor": self.make_features_extractor(),
                "normalize_images": normalize_images,
            }
        self.network: Any = self.network_class(observation_space, self.action_size, policy_size, support_size, **sizes)
        end = float(value_transform(th.tensor(value_range), _EPS))
        self.support: th.Tensor
        self.register_buffer("support", th.linspace(-end, end, support_size), persistent=False)
        self.optimizer = self.optimizer_class(
            self.parameters(),
            lr=lr_schedule(1),  # type: ignore[call-arg]
            **self.optimizer_kwargs,
        )
        self._fast: _FastNetwork | None = None

    def _get_constructor_parameters(self) -> dict[str, Any]:
        names = (
            *("num_simulations", "max_num_considered_actions", "num_sampled_actions", "gamma", "support_size"),
            *("value_range", "search", "network_kwargs", "optimizer_class", "optimizer_kwargs"),
            *("features_extractor_class", "features_extractor_kwargs", "normalize_images"),
        )
        parameters = super()._get_constructor_parameters()
        return {
            "observation_space": parameters["observation_space"],
            "action_space": parameters["action_space"],
            "lr_schedule": self._dummy_schedule,
            **{name: getattr(self, name) for name in names},
        }

    def encode(self, x: th.Tensor) -> th.Tensor:
        """
        Distribution over the bins for values or rewards.

        :param x: ``[...]``, in units of return
        :return: probabilities ``[..., support_size]``
        """
        return two_hot(value_transform(x, _EPS), self.support)

    def decode(self, logits: th.Tensor) -> th.Tensor:
        """
        Values or rewards from logits over the bins.

        :param logits: ``[..., support_size]``
        :return: ``[...]``, in units of return
        """
        return inverse_value_transform(logits.float().softmax(-1) @ self.support, _EPS)

    def action_input(self, actions: th.Tensor) -> th.Tensor:
        """
        Actions as the dynamics get them.

        :param actions: ``[B]`` or ``[B, 1]`` numbers of discrete ones, or ``[B, D]``
        :return: ``[B, action_size]``, one-hot or as they are
        """
        if self.discrete:
            return F.one_hot(actions.long().reshape(-1), self.action_size).float()
        return actions.float()

    @th.no_grad()
    def roots(self, observations: th.Tensor) -> Roots:
        """
        Encode observations, with the network in evaluation mode.

        :param observations: ``[B, *obs_shape]``
        :return: latent states, values and policies
        """
        with _evaluating(self):
            return self._roots(observations)

    def _roots(self, observations: th.Tensor) -> Roots:
        # in parts, because the first layers of images take much memory
        rows = 512 if observations.is_cuda else max(_CHUNK // observations[0].numel(), 1)
        latent = th.cat([self.network.represent(part) for part in th.split(observations, rows)])
        fast = self._fast_network()
        if fast is not None:
            return fast.roots(latent.numpy())
        value, policy = self.network.predict(latent)
        return Roots(latent, self.decode(value), policy.float())

    def plan(self, roots: Roots, noise: bool) -> tuple[SearchOutput, NDArray[np.float32] | None]:
        """
        Search from encoded observations.

        :param roots: see :meth:`roots`
        :param noise: Gumbel noise, and broad sampling of continuous actions
        :return: result, and for continuous control the sampled actions ``[B, num_sampled_actions, D]``
        """
        fast = self._fast_network()
        sampled = gumbel = None
        if self.discrete:
            logits, embedding = roots.policy, roots.latent
            if noise:
                gumbel = -th.log(-th.log(th.rand(len(logits), self.action_size).clamp(1e-20, 1 - 1e-7)))
        else:
            policy = th.as_tensor(roots.policy)
            actions = self._sample_roots(policy, noise)
            sampled = actions.cpu().numpy()
            logits = np.zeros(sampled.shape[:2], np.float32)
            embedding = (roots.latent, actions if fast is None else sampled)
        with _evaluating(self):
            out = gumbel_search(
                logits, roots.values, embedding, self._recurrent if fast is None else fast.recurrent,
                num_simulations=self.num_simulations, max_num_considered_actions=self.considered, gamma=self.gamma,
                gumbel=gumbel,
            )  # fmt: skip
        return out, sampled

    def _recurrent(self, embedding: Any, slots: th.Tensor) -> RecurrentOutput:
        """One step of the network, in torch."""
        if self.discrete:
            latent = self.network.dynamics(embedding, self.action_input(slots))
        else:
            latent, actions = embedding
            latent = self.network.dynamics(latent, actions[th.arange(len(slots)), slots])
        value, policy = self.network.predict(latent)
        reward, value = self.decode(self.network.reward_head(latent)), self.decode(value)
        if self.discrete:
            return RecurrentOutput(reward, value, policy, latent)
        return RecurrentOutput(reward, value, *self.inner_actions(policy.float(), latent))

    def inner_actions(self, policy: th.Tensor, latent: Any) -> tuple[NDArray[np.float32], tuple[Any, Any]]:
        """
        Sampled actions of a node below the root, continuous control.

        :param policy: output of the policy head, ``[B, 2 D]``
        :param latent: of the node
        :return: logits of the samples, and the embedding
        """
        mean, std = squashed_normal(policy)
        draw = th.randn(len(mean), INNER_ACTIONS, self.action_size, device=mean.device)
        actions = th.zeros(len(mean), self.num_sampled_actions, self.action_size, device=mean.device)
        actions[:, :INNER_ACTIONS] = th.tanh(mean[:, None] + std[:, None] * draw).clamp(-BOUND, BOUND)
        numpy = isinstance(latent, np.ndarray)
        logits = np.zeros((len(mean), INNER_ACTIONS), np.float32)
        return logits, (latent, actions.numpy() if numpy else actions)

    def _sample_roots(self, policy: th.Tensor, noise: bool) -> th.Tensor:
        mean, std = squashed_normal(policy)
        shape = (len(mean), self.num_sampled_actions, self.action_size)
        if noise:
            draw = th.randn(shape, device=mean.device)
            draw[:, max(self.num_sampled_actions // 4, 1) :] *= 3
        else:
            fixed = th.randn(shape[1:], generator=th.Generator().manual_seed(0))
            fixed[0] = 0
            draw = fixed.to(mean.device).expand(shape)
        return th.tanh(mean[:, None] + std[:, None] * draw).clamp(-BOUND, BOUND)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        Choose actions.

        :param observation: ``[B, *obs_shape]``
        :param deterministic: search without Gumbel noise
        :return: actions
        """
        assert isinstance(observation, th.Tensor)
        roots = self.roots(observation)
        if not self.search:
            return self._prior_action(th.as_tensor(roots.policy), deterministic)
        with self.repeatable(deterministic):
            out, sampled = self.plan(roots, noise=not deterministic)
        if sampled is None:
            return th.from_numpy(out.actions)
        chosen = th.from_numpy(sampled[np.arange(len(sampled)), out.actions])
        return chosen.reshape(-1, *self.action_space.shape)  # type: ignore[misc]

    @contextmanager
    def repeatable(self, fixed: bool) -> Iterator[None]:
        """
        Let nodes below the root of continuous control draw the same samples each time, and leave torch's generator
        alone.

        :param fixed: False does nothing
        """
        with th.random.fork_rng(enabled=fixed, devices=[]):
            if fixed:
                th.manual_seed(0)
            yield

    def _prior_action(self, policy: th.Tensor, deterministic: bool) -> th.Tensor:
        if self.discrete:
            return policy.argmax(1) if deterministic else th.multinomial(policy.softmax(1), 1).squeeze(1)
        mean, std = squashed_normal(policy)
        actions = th.tanh(mean if deterministic else mean + std * th.randn_like(mean))
        return actions.reshape(-1, *self.action_space.shape)  # type: ignore[misc]

    def _fast_network(self) -> _FastNetwork | None:
        """The network without torch's overhead, for MLPs on a CPU; always with the current parameters."""
        if not isinstance(self.network, MlpNetwork) or self.device.type != "cpu":
            return None
        if self._fast is None:
            self._fast = _FastNetwork(self)
        self._fast.refresh()
        return self._fast

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fast": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> EfficientZeroPolicy:
        raise TypeError("Build another policy and load this one's state_dict.")


class _FastNetwork:
    """
    The parts of an MLP network that the search calls, compiled; their parameters are read again when torch changed
    them.

    :param policy: the policy
    """

    def __init__(self, policy: EfficientZeroPolicy) -> None:
        net = policy.network
        self._policy = policy
        self._parts: list[FastMlp] = [
            compile_mlp(part) for part in (net.step, net.settle, net.reward_head, net.prediction)
        ]
        self._parameters = list(net.parameters())
        self._version = -1
        self._support, self._bins = policy.support.numpy(), policy.support_size
        self._one_hot = np.eye(policy.action_size, dtype=np.float32)

    def refresh(self) -> None:
        """Read the parameters if they changed."""
        version = sum(p._version for p in self._parameters)
        if version != self._version:
            for part in self._parts:
                part.refresh()
            self._version = version

    def roots(self, latent: NDArray[np.float32]) -> Roots:
        """See :meth:`EfficientZeroPolicy.roots`."""
        out = self._parts[3](latent)
        return Roots(latent, decode(out[:, : self._bins], self._support, _EPS), out[:, self._bins :])

    def recurrent(self, embedding: Any, slots: NDArray[np.int64]) -> RecurrentOutput:
        """One step of the network."""
        step, settle, reward_head, prediction = self._parts
        if self._policy.discrete:
            latent, action = embedding, self._one_hot[slots]
        else:
            latent, actions = embedding
            action = actions[np.arange(len(slots)), slots]
        change = step(np.concatenate([latent, action], axis=1))
        change += latent
        latent = settle(change)
        out = prediction(latent)
        reward = decode(reward_head(latent), self._support, _EPS)
        value, policy = decode(out[:, : self._bins], self._support, _EPS), out[:, self._bins :]
        if self._policy.discrete:
            return RecurrentOutput(reward, value, policy, latent)
        inner = self._policy.inner_actions(th.from_numpy(policy), latent)
        return RecurrentOutput(reward, value, *inner)


class MlpPolicy(EfficientZeroPolicy):
    """For vectors; see :class:`~sb3_ext.efficientzero.networks.MlpNetwork`."""


class CnnPolicy(EfficientZeroPolicy):
    """For images; see :class:`~sb3_ext.efficientzero.networks.CnnNetwork`."""

    network_class = CnnNetwork
