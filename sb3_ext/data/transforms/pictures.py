"""Transforms of pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from sb3_ext.data.checks import DatasetError
from sb3_ext.data.envs import is_frame_space, to_channel_first
from sb3_ext.data.transforms.base import EntryTransform

_ATARI_SIZE = (84, 84)


def _picture(shape: tuple[int, ...]) -> spaces.Box:
    return spaces.Box(0, 255, shape, np.uint8)


class Grey(EntryTransform):
    """Colour pictures, ``[H, W, 3]`` or ``[3, H, W]``, to grey ones, ``[H, W]`` (ITU-R BT.601, rounded as OpenCV)."""

    wants = "colour pictures (uint8, 3 channels)"

    def change(self, space: Any) -> tuple[spaces.Space[Any], Callable[[Any], Any]] | None:
        """See :meth:`EntryTransform.change`."""
        if not is_frame_space(space) or len(space.shape) != 3 or 3 not in (space.shape[0], space.shape[-1]):
            return None
        axis = -1 if space.shape[-1] == 3 else -3

        def grey(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
            red, green, blue = np.moveaxis(pictures, axis, 0).astype(np.uint32)
            found: NDArray[np.uint8] = ((4899 * red + 9617 * green + 1868 * blue + 8192) >> 14).astype(np.uint8)
            return found

        return _picture(space.shape[:2] if axis == -1 else space.shape[1:]), grey

    def __str__(self) -> str:
        return self._written("grey")


class Resize(EntryTransform):
    """Pictures to ``height`` times ``width`` pixels by their areas, as gymnasium's ``AtariPreprocessing`` does."""

    wants = "pictures (uint8, 2 or 3 dimensions)"

    def __init__(self, height: str | int, width: str | int | None = None, key: str | None = None) -> None:
        super().__init__(key)
        try:
            self.height, self.width = int(height), int(height if width is None else width)
        except ValueError:
            self.height = self.width = 0
        if min(self.height, self.width) < 1:
            raise DatasetError(f"transform resize: needs a size in pixels, as in 'resize:84', not {height!r}.")

    def change(self, space: Any) -> tuple[spaces.Space[Any], Callable[[Any], Any]] | None:
        """See :meth:`EntryTransform.change`."""
        if not is_frame_space(space):
            return None
        try:
            import cv2
        except ImportError as error:
            raise ImportError(f"transform {self} needs: pip install opencv-python-headless") from error
        size, flat = (self.width, self.height), len(space.shape) == 2
        first = not flat and to_channel_first(space.low, space).shape == space.shape
        shape = (self.height, self.width) if flat else (space.shape[0] if first else space.shape[-1],)

        def resize(pictures: NDArray[Any]) -> NDArray[Any]:
            last = np.moveaxis(pictures, 1, -1) if first else pictures
            found = [cv2.resize(np.ascontiguousarray(p), size, interpolation=cv2.INTER_AREA) for p in last]
            stack: NDArray[Any] = np.stack(found).reshape(len(last), self.height, self.width, *last.shape[3:])
            return np.moveaxis(stack, -1, 1) if first else stack

        if not flat:
            shape = (*shape, self.height, self.width) if first else (self.height, self.width, *shape)
        return _picture(shape), resize

    def __str__(self) -> str:
        return self._written("resize", *([self.height] if self.height == self.width else [self.height, self.width]))


class Atari(EntryTransform):
    """Pictures as DQN sees them (Mnih et al., 2015): grey, 84x84; what is so already is left alone."""

    wants = "pictures (uint8, 2 or 3 dimensions)"

    def change(self, space: Any) -> tuple[spaces.Space[Any], Callable[[Any], Any]] | None:
        """See :meth:`EntryTransform.change`."""
        if not is_frame_space(space):
            return None
        functions: list[Callable[[Any], Any]] = []
        if (grey := Grey().change(space)) is not None:
            space, function = grey
            functions.append(function)
        if to_channel_first(space.low, space).shape[1:] != _ATARI_SIZE:
            changed = Resize(*_ATARI_SIZE).change(space)
            assert changed is not None
            space, function = changed
            functions.append(function)

        def atari(pictures: Any) -> Any:
            for function in functions:
                pictures = function(pictures)
            return pictures

        return space, atari

    def __str__(self) -> str:
        return self._written("atari")


class MaxPool(EntryTransform):
    """Of each pixel the larger value of this picture and the one before: for games that flicker."""

    wants = "pictures (uint8, 2 or 3 dimensions)"
    reach = 1

    def change(self, space: Any) -> tuple[spaces.Space[Any], Callable[[Any], Any]] | None:
        """See :meth:`EntryTransform.change`."""
        if not is_frame_space(space):
            return None
        return space, lambda pictures: np.maximum(pictures, np.concatenate([pictures[:1], pictures[:-1]]))

    def __str__(self) -> str:
        return self._written("max_pool")


class OneHot(EntryTransform):
    """
    Pictures whose channels are numbers of things, as MiniGrid's, to one plane per thing, ``[sum, H, W]`` of 0 and 1.

    :param counts: how many things each channel knows; MiniGrid: 11 objects, 6 colours, 3 states
    """

    wants = "small pictures with as many channels as there are numbers"

    def __init__(self, *counts: str | int, key: str | None = None) -> None:
        super().__init__(key)
        self.counts = [int(count) for count in counts if str(count).isdigit()]
        if not self.counts or len(self.counts) != len(counts) or min(self.counts) < 1:
            raise DatasetError("transform one_hot: needs a number of things per channel, as in 'one_hot:11,6,3'.")

    def change(self, space: Any) -> tuple[spaces.Space[Any], Callable[[Any], Any]] | None:
        """See :meth:`EntryTransform.change`."""
        if not isinstance(space, spaces.Box) or len(space.shape) != 3 or not np.issubdtype(space.dtype, np.integer):
            return None
        axis = next((a for a in (2, 0) if space.shape[a] == len(self.counts)), None)
        if axis is None:
            return None
        size = space.shape[:2] if axis == 2 else space.shape[1:]

        def planes(pictures: NDArray[Any]) -> NDArray[np.uint8]:
            channels = np.moveaxis(pictures, axis + 1, 0)
            for channel, count in zip(channels, self.counts, strict=True):
                if channel.max(initial=0) >= count:
                    raise DatasetError(f"transform {self}: there is a {channel.max()} where 0 to {count - 1} may be.")
            found = [c[:, None] == np.arange(n)[:, None, None] for c, n in zip(channels, self.counts, strict=True)]
            return np.concatenate(found, axis=1).astype(np.uint8)

        return spaces.Box(0, 1, (sum(self.counts), *size), np.uint8), planes

    def __str__(self) -> str:
        return self._written("one_hot", *self.counts)
