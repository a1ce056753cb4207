"""Policies of EfficientZero V2: a network, and the search that acts with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
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

from sb3_ext.efficientzero.cpu import FastNetwork
from sb3_ext.efficientzero.gaussian import INNER_ACTIONS, fixed_noise, inner_samples, root_samples, squashed_normal
from sb3_ext.efficientzero.masking import MaskedPolicy
from sb3_ext.efficientzero.networks import CnnNetwork, LatentNetwork, MlpNetwork, Roots, start_parts, step_parts
from sb3_ext.losses import inverse_value_transform, two_hot, value_transform
from sb3_ext.search.gpu import DeviceSearch
from sb3_ext.search.gumbel import RecurrentOutput, SearchOutput, gumbel_search
from sb3_ext.search.mlp import CHUNK
from sb3_ext.threads import blas_threads, with_loop_threads

_CHUNK = 1 << 21
"""Numbers of observations encoded at once on a CPU: few enough for the caches, and for memory to be used again."""

_GPU_ROWS = 768
"""Observations encoded at once on a GPU, at most."""


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


class Searched(NamedTuple):
    """
    What network and search say of windows of observations, as numpy arrays. S: actions or samples of a root, P: places
    of each window that were searched from.
    """

    values: NDArray[np.float32]
    """The network's, of all observations, ``[B, T]``."""
    search_values: NDArray[np.float32]
    """``[B, P]``."""
    policy: NDArray[np.float32]
    """Improved policy, ``[B, P, S]``."""
    actions: NDArray[np.float32] | None
    """Continuous control: the samples, ``[B, P, S, D]``; else None."""
    best: NDArray[np.int64]
    """Slot that the search chose, ``[B, P]``."""
    depth: float
    """Of the deepest node of each search, mean."""


class EfficientZeroPolicy(MaskedPolicy):
    """
    Acts by Gumbel search over latent states; the base of ``MlpPolicy`` and ``CnnPolicy``.

    What is not named here is as in :class:`~sb3_ext.efficientzero.EfficientZeroV2`, or in SB3's policies.

    :param max_num_considered_actions: root actions that share the simulations; None: 2, 4 or 8 for up to 3, up to 15
        and more discrete actions, all ``num_sampled_actions`` for continuous ones
    :param num_sampled_actions: continuous control: root actions; a quarter is drawn from the policy, the rest from the
        policy with three times its standard deviation. For deterministic actions all come from the policy, its mode
        first, with noise that is the same in every call
    :param support_size: bins of the categorical value and reward
    :param value_range: largest absolute value and reward that the bins reach, in units of return
    :param search: False acts by the network's policy alone
    :param network_kwargs: sizes, and ``value_prefix``; see the network class
    :param cuda_graphs: on a GPU: run the steps of the search as CUDA graphs; not with ``torch_compile``
    :param features_extractor_class: ``MlpPolicy``: what turns an observation into a vector, as in SB3, such as a
        convolutional network before latent vectors; the default flattens and standardises
    :param normalize_images: give the features extractor images divided by 255
    :param optimizer_class: of torch, or its name in ``torch.optim``
    """

    network_class: type[LatentNetwork] = MlpNetwork

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
        torch_compile: bool = False,
        bf16: bool = False,
        cuda_graphs: bool = True,
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
        if support_size < 2:
            raise ValueError(f"support_size must be at least 2, got {support_size}.")
        self.acts_by_search = search
        self.support_size, self.value_range = support_size, value_range
        self.network_kwargs = network_kwargs or {}
        self.discrete = isinstance(action_space, spaces.Discrete)
        assert isinstance(action_space, spaces.Discrete | spaces.Box)
        self.action_size = spaces.flatdim(action_space)
        policy_size = self.action_size if self.discrete else 2 * self.action_size
        self.configure_search(
            num_simulations, max_num_considered_actions, num_sampled_actions, gamma, torch_compile, bf16, cuda_graphs
        )
        sizes = self.network_kwargs
        if features_extractor_class is not FlattenExtractor:
            if not issubclass(self.network_class, MlpNetwork):
                raise ValueError("CnnPolicy has its own network and takes no features_extractor_class: MlpPolicy does.")
            sizes = sizes | {"features_extractor": self.make_features_extractor(), "normalize_images": normalize_images}
        self.network: Any = self.network_class(observation_space, self.action_size, policy_size, support_size, **sizes)
        end = float(value_transform(th.tensor(value_range)))
        self.support: th.Tensor
        self.register_buffer("support", th.linspace(-end, end, support_size), persistent=False)
        self._inner_noise: th.Tensor
        self.register_buffer("_inner_noise", fixed_noise(INNER_ACTIONS, self.action_size), persistent=False)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]
        self.optimizer_steps = 0
        self._count_optimizer_steps()
        self.search_rate = Rate()

    def configure_search(
        self,
        num_simulations: int,
        max_num_considered_actions: int | None,
        num_sampled_actions: int,
        gamma: float,
        torch_compile: bool,
        bf16: bool,
        cuda_graphs: bool,
    ) -> None:
        """
        Say how to search and how to run the network, as in the constructor; its parameters stay as they are.

        :raises ValueError: if a root has fewer actions than it should consider
        """
        slots = self.action_size if self.discrete else num_sampled_actions
        if max_num_considered_actions is not None and max_num_considered_actions > slots:
            raise ValueError(f"{max_num_considered_actions=}, but a root has {slots} actions.")
        self.num_simulations, self.max_num_considered_actions = num_simulations, max_num_considered_actions
        self.num_sampled_actions, self.gamma = num_sampled_actions, gamma
        self.torch_compile, self.bf16 = torch_compile, bf16
        self.cuda_graphs = cuda_graphs and not torch_compile  # what is graphed must not be compiled meanwhile
        usual = (2 if slots < 4 else 4 if slots < 16 else 8) if self.discrete else slots
        self.considered = max_num_considered_actions or usual
        # made for other settings
        self._calls: Calls | None = None
        self._fast: FastNetwork | None = None
        self._device_searches: dict[bool, DeviceSearch] = {}

    @property
    def calls(self) -> Calls:
        """The network's functions, compiled and in bfloat16 if that was asked for."""
        if self._calls is None:
            self._calls = Calls(self.network, self.torch_compile, self.bf16)
        return self._calls

    def _get_constructor_parameters(self) -> dict[str, Any]:
        names = (
            *("num_simulations", "max_num_considered_actions", "num_sampled_actions", "gamma", "support_size"),
            *("value_range", "network_kwargs", "torch_compile", "bf16", "cuda_graphs"),
            *("optimizer_class", "optimizer_kwargs", "features_extractor_class", "features_extractor_kwargs"),
        )
        parameters = super()._get_constructor_parameters() | {name: getattr(self, name) for name in names}
        return parameters | {"lr_schedule": self._dummy_schedule, "search": self.acts_by_search}

    def encode(self, x: th.Tensor) -> th.Tensor:
        """Distribution ``[..., support_size]`` over the bins for values or rewards ``[...]``, in units of return."""
        return two_hot(value_transform(x), self.support)

    def decode(self, logits: th.Tensor) -> th.Tensor:
        """Values or rewards ``[...]``, in units of return, from logits ``[..., support_size]`` over the bins."""
        return inverse_value_transform(logits.float().softmax(-1) @ self.support)

    def action_input(self, actions: th.Tensor) -> th.Tensor:
        """Actions as the dynamics get them: discrete ones ``[B]`` or ``[B, 1]`` one-hot, others as they are."""
        if self.discrete:
            return F.one_hot(actions.long().reshape(-1), self.action_size).float()
        return actions.float()

    @th.no_grad()
    def roots(self, observations: th.Tensor) -> Roots:
        """Encode observations ``[B, *obs_shape]``, with the network in evaluation mode."""
        # in parts, because the first layers of images take much memory
        rows = max(_CHUNK // observations[0].numel(), 1)
        if observations.is_cuda:  # equal parts, because each size is compiled by itself
            rows = -(-len(observations) // -(-len(observations) // _GPU_ROWS))
        with _evaluating(self):
            latent = th.cat([self.calls.represent(part) for part in th.split(observations, rows)])
            fast = self._fast_network()
            if fast is not None:
                return fast.roots(latent.numpy())
            value, policy = self.calls.predict(latent)
            return Roots(latent, self.decode(value), policy.float())

    def plan(
        self, roots: Roots, noise: bool, invalid: NDArray[np.bool_] | None = None
    ) -> tuple[SearchOutput, NDArray[np.float32] | None]:
        """
        Search from encoded observations, and say which actions ``[B, num_sampled_actions, D]`` continuous control
        sampled. Noise is Gumbel noise, and broad sampling; roots must not take discrete ``invalid [B, A]`` actions.
        """
        fast = self._fast_network()
        sampled = gumbel = None
        parts: tuple[Any, ...] = (roots.latent,)
        if self.discrete:
            logits = roots.policy
            if noise:
                gumbel = -th.log(-th.log(th.rand(len(logits), self.action_size).clamp(1e-20, 1 - 1e-7)))
        else:
            policy = th.as_tensor(roots.policy)
            actions = root_samples(policy, self.num_sampled_actions, noise)
            sampled = actions.cpu().numpy()
            logits = np.zeros(sampled.shape[:2], np.float32)
            parts = (roots.latent, actions if fast is None else sampled)
        if self.network.horizon:
            parts = (*parts, *start_parts(self.network.reward_head, len(logits)))
        threads = nullcontext() if fast is None else blas_threads()
        with _evaluating(self), threads, self.search_rate.measure(len(logits) * self.num_simulations):
            # without noise nodes below the root have the same samples in every row and every call
            fixed = None if noise or self.discrete else self._inner_noise
            recurrent: Any = partial(self._recurrent if fast is None else fast.recurrent, inner_noise=fixed)
            if self.cuda_graphs and self.device.type == "cuda":
                key = fixed is None
                if key not in self._device_searches:
                    self._device_searches[key] = DeviceSearch(partial(self._step, inner_noise=fixed))
                recurrent = self._device_searches[key].start(parts, self.num_simulations)
            # with sampled actions below the root a step has a part in torch, which is faster with all roots
            at_once = CHUNK if fast is not None and self.discrete else None
            out = gumbel_search(
                logits, roots.values, parts if len(parts) > 1 else parts[0], recurrent,
                num_simulations=self.num_simulations, max_num_considered_actions=self.considered, gamma=self.gamma,
                gumbel=gumbel, invalid_actions=invalid, roots_at_once=at_once,
            )  # fmt: skip
        return out, sampled

    @th.no_grad()
    def search(
        self,
        observations: NDArray[Any] | th.Tensor,
        places: int,
        legal: NDArray[np.bool_] | None = None,
        improved_values: bool = False,
    ) -> Searched:
        """
        Encode all observations of windows ``[B, T, *obs_shape]``, and search with noise from the first P ``places`` of
        each, all of them at once. Roots may take the actions of ``legal [B, P, A]``; a row without any: not known, all
        are allowed. With ``improved_values`` search-based values are those of the improved policy, not means over all
        visits.
        """
        size, length = observations.shape[:2]
        roots = self.roots(_flat(observations).to(self.device))

        def windows(x: Any, width: int = places) -> Any:
            return x.reshape(size, width, *x.shape[1:])

        invalid = None
        if legal is not None:
            allowed = legal.reshape(size * places, self.action_size)
            invalid = ~allowed & allowed.any(axis=1, keepdims=True)
        first = Roots(*(windows(x, length)[:, :places].reshape(-1, *x.shape[1:]) for x in roots))
        out, sampled = self.plan(first, noise=True, invalid=invalid)
        return Searched(
            _numpy(roots.values).reshape(size, length),
            windows(out.improved_values if improved_values else out.root_values),
            windows(out.improved_policy),
            None if sampled is None else windows(sampled),
            windows(out.actions),
            float(out.tree.depths.max(axis=1).mean()),
        )

    def values(self, observations: NDArray[Any] | th.Tensor) -> NDArray[np.float32]:
        """The network's values ``[B, T]`` of windows ``[B, T, *obs_shape]``, without a search."""
        return _numpy(self.roots(_flat(observations).to(self.device)).values).reshape(observations.shape[:2])

    def _recurrent(self, embedding: Any, slots: th.Tensor, inner_noise: th.Tensor | None = None) -> RecurrentOutput:
        """One step of the network, in torch."""
        parts = embedding if isinstance(embedding, tuple) else (embedding,)
        numbers, *new = self._step(slots, *parts, inner_noise=inner_noise)
        found = numbers.detach().cpu().numpy()  # all at once, because each copy waits for the GPU
        return RecurrentOutput(found[:, 0], found[:, 1], found[:, 2:], tuple(new) if len(new) > 1 else new[0])

    def _step(
        self, slots: th.Tensor, latent: th.Tensor, *rest: Any, inner_noise: th.Tensor | None = None
    ) -> tuple[th.Tensor, ...]:
        """Reward, value and logits ``[B, 2 + A]`` behind an action of each row, and the parts of the new embedding."""
        if self.discrete:
            action = self.action_input(slots)
        else:
            action, rest = rest[0][th.arange(len(slots), device=slots.device), slots], rest[1:]
        latent = self.calls.dynamics(latent, action)
        value, policy = self.calls.predict(latent)
        horizon = self.network.horizon
        if horizon:
            reward, rest = step_parts(self.calls.reward, self.decode, latent, rest, horizon)
        else:
            reward = self.decode(self.calls.reward(latent, None)[0])
        logits = policy.float()
        if not self.discrete:
            rest = inner_samples(logits, self.num_sampled_actions, inner_noise), *rest
            logits = logits.new_zeros(len(logits), INNER_ACTIONS)
        return th.cat([reward[:, None], self.decode(value)[:, None], logits], 1), latent, *rest

    def _predict(
        self, observation: PyTorchObs, deterministic: bool = False, invalid: NDArray[np.bool_] | None = None
    ) -> th.Tensor:
        """Choose actions for ``[B, *obs_shape]``, none of the forbidden ``invalid [B, A]``."""
        assert isinstance(observation, th.Tensor)
        roots = self.roots(observation)
        if not self.acts_by_search:
            policy = th.as_tensor(roots.policy)
            if invalid is not None:
                policy = policy.masked_fill(th.from_numpy(invalid).to(policy.device), -th.inf)
            return self._prior_action(policy, deterministic)
        out, sampled = self.plan(roots, noise=not deterministic, invalid=invalid)
        if sampled is None:
            return th.from_numpy(out.actions)
        chosen = th.from_numpy(sampled[np.arange(len(sampled)), out.actions])
        return chosen.reshape(-1, *self.action_space.shape)  # type: ignore[misc]

    def _prior_action(self, policy: th.Tensor, deterministic: bool) -> th.Tensor:
        if self.discrete:
            return policy.argmax(1) if deterministic else th.multinomial(policy.softmax(1), 1).squeeze(1)
        mean, std = squashed_normal(policy)
        actions = th.tanh(mean if deterministic else mean + std * th.randn_like(mean))
        return actions.reshape(-1, *self.action_space.shape)  # type: ignore[misc]

    def _fast_network(self) -> FastNetwork | None:
        """The network without torch's overhead, for MLPs on a CPU; always with the current parameters, in float32."""
        if not isinstance(self.network, MlpNetwork) or self.network.horizon or self.device.type != "cpu":
            return None
        if self._fast is None:
            slots = None if self.discrete else self.num_sampled_actions
            self._fast = FastNetwork(self.network, self.support.numpy(), self.action_size, slots)
        self._fast.refresh(self.optimizer_steps)
        return self._fast

    def _count_optimizer_steps(self) -> None:
        def count(*_: Any) -> None:
            self.optimizer_steps += 1

        self.optimizer.register_step_post_hook(count)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fast": None, "_calls": None, "_device_searches": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._count_optimizer_steps()

    def __deepcopy__(self, memo: dict[int, Any]) -> EfficientZeroPolicy:
        raise TypeError("Build another policy and load this one's state_dict.")


class MlpPolicy(EfficientZeroPolicy):
    """For vectors; see :class:`~sb3_ext.efficientzero.networks.MlpNetwork`."""

    _predict = with_loop_threads(EfficientZeroPolicy._predict)


class CnnPolicy(EfficientZeroPolicy):
    """For images; see :class:`~sb3_ext.efficientzero.networks.CnnNetwork`."""

    network_class = CnnNetwork


def _flat(windows: NDArray[Any] | th.Tensor) -> th.Tensor:
    """Observations of windows one after the other."""
    return th.as_tensor(windows).flatten(0, 1)


def _numpy(x: Any) -> NDArray[np.float32]:
    return np.asarray(th.as_tensor(x).float().cpu())


def _float(out: Any) -> Any:
    """Tensors of a nested tuple as float32."""
    if isinstance(out, tuple):
        return tuple(_float(part) for part in out)
    return out.float() if isinstance(out, th.Tensor) else out


class Calls:
    """
    The functions of a network, each compiled at its first call and run in bfloat16 autocast if that is asked for.
    Results are float32 in any case, so that nothing else need know of ``bf16``.
    """

    def __init__(self, network: Any, torch_compile: bool, bf16: bool) -> None:
        def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
            if torch_compile:  # a module's own compile() would change how it is saved
                function = th.compile(function.forward if isinstance(function, nn.Module) else function)
            return partial(_in_bf16, function) if bf16 else function

        self.represent, self.dynamics = wrap(network.represent), wrap(network.dynamics)
        self.predict, self.reward = wrap(network.predict), wrap(network.reward)
        self.projector, self.predictor = wrap(network.projector), wrap(network.predictor)


def _in_bf16(function: Callable[..., Any], first: th.Tensor, *rest: Any) -> Any:
    with th.autocast(first.device.type, th.bfloat16):
        out = function(first, *rest)
    return _float(out)


class Rate:
    """Things done, and the seconds that they took."""

    def __init__(self) -> None:
        self.done, self.seconds = 0, 0.0

    @contextmanager
    def measure(self, things: int) -> Iterator[None]:
        """Time a block that does so many things."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start
        self.done += things


def flush_rate(*rates: Rate) -> float | None:
    """Read the common rate of several counters, per second, and let them start anew; None if nothing was done."""
    done, seconds = sum(rate.done for rate in rates), sum(rate.seconds for rate in rates)
    for rate in rates:
        rate.done, rate.seconds = 0, 0.0
    return done / seconds if done else None
