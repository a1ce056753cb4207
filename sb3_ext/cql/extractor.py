"""Features of observations with several entries."""

from __future__ import annotations

from typing import Any

from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, is_image_space
from stable_baselines3.common.torch_layers import CombinedExtractor
from torch import nn

from sb3_ext.data.envs import SMALLEST_PICTURE


def is_small_picture(space: spaces.Space[Any], normalized_image: bool = False) -> bool:
    """Whether a space is a picture for SB3, ``[C, H, W]``, that is too small for its Nature CNN."""
    return is_image_space(space, normalized_image=normalized_image) and min(space.shape[1:]) < SMALLEST_PICTURE  # type: ignore[index]


class SmallPicturesExtractor(CombinedExtractor):
    """
    SB3's ``CombinedExtractor``, which flattens pictures that are too small for the Nature CNN.

    :param observation_space: a ``Dict``
    :param cnn_output_dim: as in SB3
    :param normalized_image: as in SB3
    """

    def __init__(
        self, observation_space: spaces.Dict, cnn_output_dim: int = 256, normalized_image: bool = False
    ) -> None:
        entries = observation_space.spaces
        small = [key for key, entry in entries.items() if is_small_picture(entry, normalized_image)]
        large = {key: entry for key, entry in entries.items() if key not in small}
        super().__init__(spaces.Dict(large), cnn_output_dim, normalized_image)
        self._observation_space = observation_space
        self.extractors.update({key: nn.Flatten() for key in small})
        self._features_dim += sum(get_flattened_obs_dim(entries[key]) for key in small)
