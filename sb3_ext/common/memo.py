"""What searches found from stored observations, as long as the network that searched stays the same."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch as th
from numpy.typing import NDArray


class SearchMemo:
    """
    Values and search results by position in a replay buffer.

    Every array has a last row more, of zeros, which is never written: position -1 stands for "stored nowhere".

    :param size: positions, P
    """

    def __init__(self, size: int) -> None:
        self.valued = np.zeros(size + 1, bool)
        """Whether the network's value of a position is known, ``[P + 1]``."""
        self.searched = np.zeros(size + 1, bool)
        """Whether the results of a search are known, ``[P + 1]``."""
        self.depth = 0.0
        """Of the last searches, mean."""
        self.settings = ""
        """What results depend on besides the network; see :meth:`follow`."""
        self._size = size
        self._arrays: dict[str, NDArray[Any]] = {}
        self._fingerprint: tuple[int, str] | None = None
        self._versions: tuple[str, tuple[tuple[int, int], ...]] = "", ()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_versions": ("", ())}  # addresses mean nothing in another process

    def follow(self, network: th.nn.Module) -> None:
        """
        Forget everything if the network or :attr:`settings` are not what they were at the last call, also before saving
        and loading.

        :param network: that searches
        """
        tensors = network.state_dict().values()
        versions = self.settings, tuple((x.data_ptr(), x._version) for x in tensors)
        if versions == self._versions:
            return
        fingerprint = 0
        for tensor in tensors:
            fingerprint = zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(th.uint8).numpy(), fingerprint)
        if (fingerprint, self.settings) != self._fingerprint:
            self.forget(slice(None))
            self._arrays.clear()
        self._fingerprint, self._versions = (fingerprint, self.settings), versions

    def forget(self, positions: NDArray[np.int64] | slice) -> None:
        """
        Forget what was found from observations that are overwritten.

        :param positions: of them
        """
        self.valued[positions] = self.searched[positions] = False

    def put(self, positions: NDArray[np.int64], name: str, results: NDArray[Any]) -> None:
        """
        Keep results.

        :param positions: ``[N]``; -1 is left out
        :param name: ``"values"`` for the network's, any other for a search's; a search's all belong together
        :param results: ``[N, ...]``
        """
        if name not in self._arrays:
            self._arrays[name] = np.zeros((self._size + 1, *results.shape[1:]), results.dtype)
        stored = positions >= 0
        at = positions[stored]
        self._arrays[name][at] = results[stored]
        (self.valued if name == "values" else self.searched)[at] = True

    def get(self, name: str, positions: NDArray[np.int64]) -> NDArray[Any]:
        """
        Look results up.

        :param name: under which :meth:`put` got them
        :param positions: of any shape
        :return: ``[*positions.shape, ...]``; zeros at -1
        """
        found: NDArray[Any] = self._arrays[name][positions]
        return found
