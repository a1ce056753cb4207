"""Networks of EfficientZero V2: a residual one for images, an MLP for vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn


class Residual(nn.Module):
    """``x + residual(x)``."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.residual = nn.Sequential(*layers)

    def forward(self, x: th.Tensor) -> th.Tensor:
        """Add the layers' output."""
        out: th.Tensor = x + self.residual(x)
        return out


class RunningNorm(nn.Module):
    """Standardise vectors by the mean and variance of everything seen in training mode (Chan et al., 1979)."""

    mean: th.Tensor
    var: th.Tensor
    count: th.Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", th.zeros(size))
        self.register_buffer("var", th.ones(size))
        self.register_buffer("count", th.zeros(()))

    def forward(self, x: th.Tensor) -> th.Tensor:
        """Normalise ``[B, D]`` and clip to [-10, 10]; in training mode learn first."""
        if self.training:
            with th.no_grad():
                delta, total = x.mean(0) - self.mean, self.count + len(x)
                seen = self.var * self.count + x.var(0, unbiased=False) * len(x)
                self.var.copy_((seen + delta**2 * self.count * len(x) / total) / total)
                self.mean.add_(delta * len(x) / total)
                self.count.copy_(total)
        return ((x - self.mean) / (self.var + 1e-6).sqrt()).clamp(-10, 10)


def _block(n_in: int, n_out: int) -> list[nn.Module]:
    return [nn.Linear(n_in, n_out), nn.LayerNorm(n_out), nn.ReLU()]


def _pre_norm(width: int) -> Residual:
    return Residual(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))


def _zero_last(layers: nn.Sequential) -> nn.Sequential:
    """Start a head at zero: uniform policies, values and rewards of 0."""
    last = layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return layers


class LatentNetwork(nn.Module):
    """What both networks share: the reward head is that of one step, or predicts value prefixes."""

    reward_head: nn.Sequential | ValuePrefix

    @property
    def horizon(self) -> int:
        """Steps per value prefix; 0: rewards are predicted step by step."""
        return self.reward_head.horizon if isinstance(self.reward_head, ValuePrefix) else 0

    def start(self, rows: int) -> Memory | None:
        """Memory of the reward head at the root; None: it has none."""
        return self.reward_head.start(rows) if isinstance(self.reward_head, ValuePrefix) else None

    def reward(self, latent: th.Tensor, memory: Memory | None) -> tuple[th.Tensor, Memory | None]:
        """Logits of the reward (or value prefix) of the step that leads to latent states, and the memory after it."""
        if isinstance(self.reward_head, ValuePrefix):
            assert memory is not None
            logits, memory = self.reward_head(latent, memory)
            return logits, memory
        return self.reward_head(latent), None


class MlpNetwork(LatentNetwork):
    """
    The network for vectors: pre-norm residual MLPs.

    Unlike the paper, heads have layer norm in place of batch norm, so that search and training see the same network;
    value and policy share a hidden layer; and continuous actions enter the dynamics as they are.

    The observation space is a ``Box``, and flattened, unless there is a features extractor. ``action_size`` numbers
    describe an action, one-hot or continuous.

    :param latent_size: size of the latent state, H
    :param blocks: residual blocks in representation and dynamics
    :param projection_size: hidden units of the heads of the self-supervised loss
    :param features_extractor: what turns an observation into a vector, of SB3's kind; None: the flat observation,
        standardised
    :param normalize_images: give the features extractor images divided by 255
    :param value_prefix: predict sums of rewards, see :class:`~sb3_ext.efficientzero.networks.ValuePrefix`
    :param prefix_horizon: steps per sum
    :param prefix_size: units of the LSTM
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        action_size: int,
        policy_size: int,
        support_size: int,
        latent_size: int = 128,
        blocks: int = 1,
        projection_size: int = 128,
        features_extractor: BaseFeaturesExtractor | None = None,
        normalize_images: bool = True,
        value_prefix: bool = False,
        prefix_horizon: int = 5,
        prefix_size: int = 128,
    ) -> None:
        super().__init__()
        self.support_size, h = support_size, latent_size
        self.observation_space, self.normalize_images = observation_space, normalize_images
        self.features_extractor = features_extractor
        if features_extractor is None:
            size = int(np.prod(observation_space.shape))
            self.norm = RunningNorm(size)
        else:
            size = features_extractor.features_dim
        self.representation = nn.Sequential(
            nn.Linear(size, h), nn.LayerNorm(h), nn.Tanh(), *(_pre_norm(h) for _ in range(blocks)), nn.LayerNorm(h)
        )
        self.step = nn.Sequential(*_block(h + action_size, h), nn.Linear(h, h))
        self.settle = nn.Sequential(*(_pre_norm(h) for _ in range(blocks)), nn.LayerNorm(h))
        if value_prefix:
            head = _zero_last(nn.Sequential(nn.LayerNorm(prefix_size), nn.ReLU(), nn.Linear(prefix_size, support_size)))
            self.reward_head = ValuePrefix(nn.Sequential(*_block(h, h)), h, prefix_size, head, prefix_horizon)
        else:
            self.reward_head = _zero_last(nn.Sequential(*_block(h, h), nn.Linear(h, support_size)))
        self.prediction = _zero_last(nn.Sequential(*_block(h, h), nn.Linear(h, support_size + policy_size)))
        self.projector = nn.Sequential(*_block(h, projection_size), nn.Linear(projection_size, h))
        self.predictor = nn.Sequential(*_block(h, projection_size), nn.Linear(projection_size, h))

    def represent(self, observations: th.Tensor) -> th.Tensor:
        """Map ``[B, *obs_shape]`` to latent states ``[B, H]``."""
        if self.features_extractor is None:
            features = self.norm(observations.flatten(1).float())
        else:
            observed = preprocess_obs(observations, self.observation_space, self.normalize_images)
            features = self.features_extractor(observed)
        out: th.Tensor = self.representation(features)
        return out

    def dynamics(self, latent: th.Tensor, action: th.Tensor) -> th.Tensor:
        """Map latent states ``[B, H]`` and actions ``[B, action_size]`` to the next ones."""
        out: th.Tensor = self.settle(latent + self.step(th.cat([latent, action], 1)))
        return out

    def predict(self, latent: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Logits of the value ``[B, support_size]``, and the policy ``[B, policy_size]``."""
        out = self.prediction(latent)
        return out[:, : self.support_size], out[:, self.support_size :]


class ResBlock(nn.Module):
    """
    Two 3x3 convolutions with batch norm and a skip connection, which is a 3x3 convolution too where channels change or
    ``stride`` is 2, which halves the picture.
    """

    def __init__(self, n_in: int, n_out: int | None = None, stride: int = 1) -> None:
        super().__init__()
        n_out = n_out or n_in
        self.layers = nn.Sequential(
            *(nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()),
            *(nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out)),
        )
        plain = stride == 1 and n_in == n_out
        self.skip = nn.Identity() if plain else nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)

    def forward(self, x: th.Tensor) -> th.Tensor:
        """Map ``[B, n_in, H, W]`` to ``[B, n_out, ...]``."""
        return th.relu(self.layers(x) + self.skip(x))


def _squeeze(channels: int, reduced: int) -> list[nn.Module]:
    """1x1 convolution to few channels."""
    return [nn.Conv2d(channels, reduced, 1, bias=False), nn.BatchNorm2d(reduced), nn.ReLU(), nn.Flatten()]


def _small_mlp(n_in: int, hidden: int, out: int) -> list[nn.Module]:
    return [nn.Linear(n_in, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ELU(), nn.Linear(hidden, out)]


def _head(channels: int, cells: int, reduced: int, hidden: int, out: int) -> nn.Sequential:
    return _zero_last(nn.Sequential(*_squeeze(channels, reduced), *_small_mlp(reduced * cells, hidden, out)))


class CnnNetwork(LatentNetwork):
    """
    The residual network for images (Wang et al., 2024, appendix).

    Pictures of 32 pixels or more are halved four times (96x96 becomes 6x6), smaller ones keep their size. The paper has
    ``value_prefix=True`` on Atari, and False for continuous control. Images are channel-first; the ``action_size``
    numbers that describe an action are spread over planes.

    :param channels: of the latent state, C
    :param head_channels: channels behind the heads' 1x1 convolution
    :param head_size: hidden units of the heads
    :param projection_size: hidden units of the heads of the self-supervised loss
    :param value_prefix: predict sums of rewards, see :class:`~sb3_ext.efficientzero.networks.ValuePrefix`
    :param prefix_horizon: steps per sum
    :param prefix_size: units of the LSTM
    :raises ValueError: if an image is smaller than the strides need
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        action_size: int,
        policy_size: int,
        support_size: int,
        channels: int = 64,
        head_channels: int = 16,
        head_size: int = 32,
        projection_size: int = 1024,
        value_prefix: bool = False,
        prefix_horizon: int = 5,
        prefix_size: int = 512,
    ) -> None:
        super().__init__()
        planes, height, width = observation_space.shape
        self.scale = float(np.max(observation_space.high))
        if min(height, width) < 4:
            raise ValueError(f"Images of {height}x{width} are too small for 3x3 convolutions: at least 4x4.")
        c, large = channels, min(height, width) >= 32
        first, stride = (max(c // 2, 1), 2) if large else (c, 1)
        layers = [nn.Conv2d(planes, first, 3, stride, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU(), ResBlock(first)]
        if large:
            layers += [ResBlock(first, c, 2), ResBlock(c), nn.AvgPool2d(3, 2, 1)]
            layers += [ResBlock(c), nn.AvgPool2d(3, 2, 1), ResBlock(c)]
        self.representation = nn.Sequential(*layers)
        with th.no_grad():
            self.representation.eval()
            rows, columns = self.representation(th.zeros(1, planes, height, width)).shape[2:]
            self.representation.train()
        cells = rows * columns
        self.encode_action = nn.Sequential(
            nn.Conv2d(action_size, head_channels, 1), nn.GroupNorm(1, head_channels), nn.ReLU()
        )
        self.step = nn.Sequential(nn.Conv2d(c + head_channels, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c))
        self.settle = ResBlock(c)
        sizes = c, cells, head_channels
        if value_prefix:
            small = _small_mlp(prefix_size, head_size, support_size)
            head = _zero_last(nn.Sequential(nn.BatchNorm1d(prefix_size), nn.ReLU(), *small))
            features = nn.Sequential(*_squeeze(c, head_channels))
            self.reward_head = ValuePrefix(features, head_channels * cells, prefix_size, head, prefix_horizon)
        else:
            self.reward_head = _head(*sizes, head_size, support_size)
        self.trunk = ResBlock(c)
        self.value_head = _head(*sizes, head_size, support_size)
        self.policy_head = _head(*sizes, head_size, policy_size)
        p, narrow = projection_size, max(projection_size // 4, 1)
        self.projector = nn.Sequential(
            *(nn.Flatten(), nn.Linear(c * cells, p), nn.BatchNorm1d(p), nn.ReLU()),
            *(nn.Linear(p, p), nn.BatchNorm1d(p), nn.ReLU(), nn.Linear(p, p), nn.BatchNorm1d(p)),
        )
        self.predictor = nn.Sequential(nn.Linear(p, narrow), nn.BatchNorm1d(narrow), nn.ReLU(), nn.Linear(narrow, p))

    def represent(self, observations: th.Tensor) -> th.Tensor:
        """Map images ``[B, *obs_shape]`` to latent states ``[B, C, h, w]``."""
        out: th.Tensor = self.representation(observations.float() / self.scale)
        return out

    def dynamics(self, latent: th.Tensor, action: th.Tensor) -> th.Tensor:
        """Map latent states ``[B, C, h, w]`` and actions ``[B, action_size]`` to the next ones."""
        planes = self.encode_action(action[:, :, None, None]).expand(-1, -1, *latent.shape[2:])
        out: th.Tensor = self.settle(th.relu(latent + self.step(th.cat([latent, planes], 1))))
        return out

    def predict(self, latent: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Logits of the value ``[B, support_size]``, and the policy ``[B, policy_size]``."""
        latent = self.trunk(latent)
        return self.value_head(latent), self.policy_head(latent)


Memory = tuple[th.Tensor, th.Tensor]
"""Hidden and cell state of the LSTM, ``[B, hidden]`` each."""


class ValuePrefix(nn.Module):
    """
    Predict the undiscounted sum of rewards of the last steps with an LSTM over latent states (Ye et al., 2021,
    https://arxiv.org/abs/2111.00210, section 4.2).

    Every ``horizon`` steps from the root on, sum and memory begin anew. ``features`` maps latent states ``[B, ...]`` to
    ``[B, size]``, which the LSTM reads; ``head`` maps its ``[B, hidden]`` to ``[B, support_size]``.
    """

    def __init__(self, features: nn.Module, size: int, hidden: int, head: nn.Module, horizon: int) -> None:
        super().__init__()
        if horizon < 1:
            raise ValueError(f"prefix_horizon must be at least 1, got {horizon}.")
        self.horizon = horizon
        self.features, self.lstm, self.head = features, nn.LSTMCell(size, hidden), head

    def start(self, rows: int) -> Memory:
        """Memory of roots: nothing."""
        zeros = self.lstm.weight_hh.new_zeros(rows, self.lstm.hidden_size)
        return zeros, zeros

    def forward(self, latent: th.Tensor, memory: Memory) -> tuple[th.Tensor, Memory]:
        """Logits of the sum of rewards up to and with the step that leads to latent states, and the memory after it."""
        hidden, cell = self.lstm(self.features(latent), memory)
        return self.head(hidden), (hidden, cell)


def start_parts(head: ValuePrefix, rows: int) -> tuple[th.Tensor, ...]:
    """
    What the search's embedding carries for value prefixes, at the root: hidden and cell state ``[B, hidden]``, the sum
    so far ``[B]``, and the steps in it ``[B]``.
    """
    hidden, cell = head.start(rows)
    return hidden, cell, hidden.new_zeros(rows), th.zeros(rows, dtype=th.int64, device=hidden.device)


def step_parts(
    reward: Callable[..., Any],
    decode: Callable[[th.Tensor], th.Tensor],
    latent: th.Tensor,
    parts: tuple[th.Tensor, ...],
    horizon: int,
) -> tuple[th.Tensor, tuple[th.Tensor, ...]]:
    """
    Reward ``[B]`` of one step of the search, as the difference of two sums, and the parts of the new node.

    A child of a node in ``horizon``, ``2 horizon``, ... steps from the root begins with an empty memory and a sum of 0,
    so a reward is never counted twice, however deep the tree is. ``latent`` is the state that the step leads to,
    ``parts`` are those of the node above, see :func:`start_parts`.
    """
    hidden, cell, before, steps = parts
    logits, (hidden, cell) = reward(latent, (hidden, cell))
    total = decode(logits)
    steps = (steps + 1) % horizon
    goes_on = steps > 0
    kept = goes_on[:, None].to(hidden.dtype)
    return total - before, (hidden * kept, cell * kept, th.where(goes_on, total, 0.0), steps)


class Roots(NamedTuple):
    """What the network says of observations, as tensors or numpy arrays."""

    latent: Any
    """Latent states, ``[B, ...]``."""
    values: Any
    """In units of return, ``[B]``."""
    policy: Any
    """Output of the policy head, ``[B, policy_size]``."""
