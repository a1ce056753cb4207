"""Transforms of whole observations and of their entries: missions, choosing, flattening, functions of your own."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from sb3_ext.data.checks import DatasetError
from sb3_ext.data.envs import channels_first
from sb3_ext.data.transforms.base import EntryTransform, Transform, entry_names
from sb3_ext.data.trees import are_texts, leaves, short_space, stacked

_WORD = re.compile(r"[a-z0-9]+")


class Tokens(EntryTransform):
    """
    Missions to numbers of their words, ``MultiDiscrete``: 0 is no word, 1 an unknown one.

    Without arguments the vocabulary is that of the data; written out it is part of the transform's name, so that a
    model keeps it.

    :param length: words per mission
    :param words: the vocabulary
    """

    wants = "text"

    def __init__(self, length: str | int | None = None, *words: str, key: str | None = None) -> None:
        super().__init__(key)
        if length is not None and not str(length).isdigit():
            raise DatasetError(f"transform tokens: needs no arguments, or a length and words, not {length!r}.")
        self.length, self.words = int(length or 0), list(words)

    @property
    def fitted(self) -> bool:
        """Whether there is a vocabulary."""
        return self.length > 0

    def fit(self, observations: Iterable[Any]) -> None:
        """Take the words of all recorded observations, which come as episodes' flat dictionaries or arrays."""
        words: set[str] = set()
        for episode in observations:
            texts = [episode[self.key]] if self.key else episode.values() if isinstance(episode, dict) else [episode]
            for text in {str(t) for column in texts if np.asarray(column).dtype.kind in "OU" for t in column}:
                found = _WORD.findall(text.lower())
                words.update(found)
                self.length = max(self.length, len(found))
        self.length, self.words = max(self.length, 1), sorted(words)

    def change(self, space: Any) -> tuple[spaces.Space[Any], Callable[[Any], Any]] | None:
        """See :meth:`EntryTransform.change`."""
        if not are_texts(space):
            return None
        numbers = {word: k + 2 for k, word in enumerate(self.words)}
        known: dict[str, NDArray[np.int64]] = {}

        def tokens(texts: Sequence[str]) -> NDArray[np.int64]:
            for text in set(texts) - known.keys():
                found = [numbers.get(word, 1) for word in _WORD.findall(text.lower())][: self.length]
                known[text] = np.array([*found, *[0] * (self.length - len(found))], np.int64)
            return np.stack([known[text] for text in texts])

        return spaces.MultiDiscrete([len(self.words) + 2] * self.length), tokens

    def __str__(self) -> str:
        return self._written("tokens", *([self.length, *self.words] if self.fitted else []))


class Flatten(Transform):
    """Everything to one vector, as gymnasium's ``FlattenObservation`` does; text is left out."""

    def bind(self, space: spaces.Space[Any], action_space: spaces.Space[Any]) -> Any:
        """See :meth:`Transform.bind`."""
        self._entries = [(key, entry) for key, entry in leaves(space) if not are_texts(entry)]
        if not self._entries:
            raise DatasetError(f"transform flatten: nothing can be flattened in {short_space(space)}.")
        kept = OrderedDict(self._entries)
        self._space = spaces.flatten_space(spaces.Dict(kept) if isinstance(space, spaces.Dict) else kept[""])
        return self._space, action_space

    def observations(self, observations: Any) -> NDArray[Any]:
        """See :meth:`Transform.observations`."""
        columns = [
            _numbers(observations[key] if isinstance(observations, dict) else observations, space)
            for key, space in self._entries
        ]
        found: NDArray[Any] = np.concatenate(columns, axis=1, dtype=self._space.dtype, casting="unsafe")
        return found

    def __str__(self) -> str:
        return "flatten"


def _numbers(values: NDArray[Any], space: spaces.Space[Any]) -> NDArray[Any]:
    """Values ``[n, ...]`` as rows of numbers, ``[n, d]``; counts become one-hot."""
    if isinstance(space, spaces.Discrete):
        one: NDArray[Any] = np.asarray(values).reshape(-1, 1) == np.arange(space.start, space.start + space.n)
        return one
    if isinstance(space, spaces.MultiDiscrete):
        columns = np.asarray(values).reshape(len(values), -1)
        counts, starts = space.nvec.reshape(-1), space.start.reshape(-1)
        hot = [columns[:, k, None] == np.arange(s, s + n) for k, (n, s) in enumerate(zip(counts, starts, strict=True))]
        return np.concatenate(hot, axis=1)
    return np.asarray(values).reshape(len(values), -1)


class Choose(Transform):
    """
    Some entries of a dictionary; of an entry with entries, such as ``goal/achieved``, the first name means all.

    If one entry is left, it becomes the observation itself.

    :param keys: of the entries
    :param keep: whether these are kept, or dropped
    """

    def __init__(self, *keys: str, keep: bool) -> None:
        self.keys, self.keep = keys, keep
        if not keys:
            raise DatasetError(f"transform {self._name}: needs the entries' names, as in '{self._name}:position'.")

    @property
    def _name(self) -> str:
        return "keep" if self.keep else "drop"

    def bind(self, space: spaces.Space[Any], action_space: spaces.Space[Any]) -> Any:
        """See :meth:`Transform.bind`."""
        if not isinstance(space, spaces.Dict):
            raise DatasetError(f"transform {self} needs Dict observations, they are {short_space(space)}.")
        meant = {key: [k for k in space.spaces if k == key or k.startswith(f"{key}/")] for key in self.keys}
        for key, found in meant.items():
            if not found:
                raise DatasetError(
                    f"transform {self}: there is no entry {key!r}; there are {entry_names(space.spaces)}."
                )
        named = {k for found in meant.values() for k in found}
        self._kept = [key for key in space.spaces if (key in named) == self.keep]
        if not self._kept:
            raise DatasetError(f"transform {self}: no entry would be left.")
        kept = OrderedDict((key, space.spaces[key]) for key in self._kept)
        return (kept[self._kept[0]] if len(kept) == 1 else spaces.Dict(kept)), action_space

    def observations(self, observations: Any) -> Any:
        """See :meth:`Transform.observations`."""
        if len(self._kept) == 1:
            return observations[self._kept[0]]
        return {key: observations[key] for key in self._kept}

    def __str__(self) -> str:
        return f"{self._name}:{','.join(self.keys)}"


class Function(Transform):
    """
    A function of your own on observations that follow one another, ``[n, ...]`` or a dictionary of those.

    Each result depends on one observation. What comes out is tried on two observations of the space: bytes may be
    0 to 255, other numbers anything.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def bind(self, space: spaces.Space[Any], action_space: spaces.Space[Any]) -> Any:
        """See :meth:`Transform.bind`."""
        batch = stacked([space.sample(), space.sample()])
        try:
            found = self.function(batch)
        except Exception as error:
            raise DatasetError(
                f"transform {self} fails on observations of {short_space(space)}: {type(error).__name__}: {error}. It "
                "gets observations that follow one another, [n, ...]."
            ) from error
        return _space_of(found, str(self)), action_space

    def observations(self, observations: Any) -> Any:
        """See :meth:`Transform.observations`."""
        return self.function(observations)

    def __str__(self) -> str:
        return str(getattr(self.function, "__name__", type(self.function).__name__))


def _space_of(found: Any, name: str) -> spaces.Space[Any]:
    if isinstance(found, dict):
        return spaces.Dict(OrderedDict((key, _space_of(x, name)) for key, x in found.items()))
    if not isinstance(found, np.ndarray) or len(found) != 2 or found.dtype.kind not in "biuf":
        raise DatasetError(
            f"transform {name}: of two observations it made {type(found).__name__} {getattr(found, 'shape', '')}; it "
            "must make an array, or a dictionary of arrays, with two rows."
        )
    if found.dtype in (np.uint8, np.bool_):
        return spaces.Box(0, 255 if found.dtype == np.uint8 else 1, found.shape[1:], found.dtype.type)
    low, high = (-np.inf, np.inf) if found.dtype.kind == "f" else (np.iinfo(found.dtype).min, np.iinfo(found.dtype).max)
    return spaces.Box(low, high, found.shape[1:], found.dtype.type)


class AsStableBaselines(Transform):
    """What is done to everything in the end: spaces as SB3's policies take them."""

    def __init__(self) -> None:
        self.dropped: list[str] = []

    def bind(self, space: spaces.Space[Any], action_space: spaces.Space[Any]) -> Any:
        """See :meth:`Transform.bind`."""
        entries = OrderedDict(leaves(space))
        self.dropped = [key for key, entry in entries.items() if are_texts(entry)]
        kept = OrderedDict((key, _plain_entry(key, entry)) for key, entry in entries.items() if key not in self.dropped)
        if not kept:
            raise DatasetError(
                f"the observations are {short_space(space)}: text alone. Turn it into numbers with "
                "transforms=['tokens']."
            )
        starts = {key: getattr(entries[key], "start", 0) for key in kept}
        self._starts = {key: start for key, start in starts.items() if np.any(start)}
        turned = {key: channels_first(kept[key]) for key in kept if isinstance(space, spaces.Dict)}
        self._pictures = [key for key, entry in turned.items() if entry != kept[key]]
        kept.update(turned)
        self._scalars = [key for key in kept if isinstance(entries[key], spaces.Box) and not entries[key].shape]
        self._action_start = getattr(action_space, "start", 0)
        return (spaces.Dict(kept) if isinstance(space, spaces.Dict) else kept[""]), _plain_action(action_space)

    def _entry(self, key: str, values: NDArray[Any]) -> NDArray[Any]:
        if key in self._starts:
            counted: NDArray[Any] = values - self._starts[key]
            return counted
        if key in self._pictures:
            return np.moveaxis(values, -1, 1)
        return values[:, None] if key in self._scalars else values

    def observations(self, observations: Any) -> Any:
        """See :meth:`Transform.observations`."""
        if isinstance(observations, dict):
            return {key: self._entry(key, x) for key, x in observations.items() if key not in self.dropped}
        return self._entry("", observations)

    def actions(self, actions: NDArray[Any]) -> NDArray[Any]:
        """See :meth:`Transform.actions`."""
        return actions - self._action_start if np.any(self._action_start) else actions

    def environment_actions(self, action: Any) -> Any:
        """See :meth:`Transform.environment_actions`."""
        return action + self._action_start if np.any(self._action_start) else action


def _plain_entry(key: str, space: spaces.Space[Any]) -> spaces.Space[Any]:
    if isinstance(space, spaces.Discrete):
        return spaces.Discrete(int(space.n)) if space.start else space
    if isinstance(space, spaces.MultiDiscrete):
        return spaces.MultiDiscrete(space.nvec) if np.any(space.start) else space
    if isinstance(space, spaces.MultiBinary):
        return space
    if isinstance(space, spaces.Box):
        return space if space.shape else spaces.Box(space.low[None], space.high[None], dtype=space.dtype.type)
    remedy = f"Leave it out: transforms=['drop:{key}']." if key else "Nothing here can learn from those."
    raise DatasetError(f"observations{f' {key!r}' if key else ''} are {type(space).__name__}. {remedy}")


def _plain_action(space: spaces.Space[Any]) -> spaces.Space[Any]:
    if isinstance(space, spaces.Discrete) and space.start:
        return spaces.Discrete(int(space.n))
    if isinstance(space, spaces.MultiDiscrete) and np.any(space.start):
        return spaces.MultiDiscrete(space.nvec)
    return space
