"""Observations with entries: nested where they are recorded, flat dictionaries everywhere else."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

Observations: TypeAlias = "NDArray[Any] | dict[str, NDArray[Any]]"
"""Of one episode: an array ``[T + 1, ...]``, or one per entry of a ``Dict`` space."""


def are_texts(space: spaces.Space[Any]) -> bool:
    """Tell spaces of texts: ``Text``, and others whose type is ``str``, such as MiniGrid's missions."""
    return space.dtype is not None and space.dtype.kind == "U"


def leaves(space: spaces.Space[Any], path: str = "") -> Iterator[tuple[str, spaces.Space[Any]]]:
    """
    Entries of a space that have no entries themselves, in order: ``("goal/achieved", Box)`` and so on.

    A space without entries is one itself, called ``""``. A point is not allowed in the names of PyTorch's modules, so
    it becomes an underscore.
    """
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        entries = space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
        for key, entry in entries:
            name = str(key).replace(".", "_")
            yield from leaves(entry, f"{path}/{name}" if path else name)
    else:
        yield path, space


def flat_space(space: spaces.Space[Any]) -> spaces.Space[Any]:
    """The same space without nesting: ``Dict`` and ``Tuple`` become one ``Dict`` of :func:`leaves`."""
    nested = isinstance(space, (spaces.Dict, spaces.Tuple))
    return spaces.Dict(OrderedDict(leaves(space))) if nested else space


def flat_observations(values: Any, space: spaces.Space[Any], path: str = "") -> Any:
    """
    Observations of a space, nested as it is, as those of its :func:`flat_space`.

    :raises KeyError: with the path of an entry that is missing
    """
    if not isinstance(space, (spaces.Dict, spaces.Tuple)):
        return values
    flat: dict[str, Any] = {}
    for key, entry in space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces):
        name = str(key).replace(".", "_")
        name = f"{path}/{name}" if path else name
        try:
            value = values[key]
        except (KeyError, IndexError) as error:
            raise KeyError(name) from error
        below = flat_observations(value, entry, name)
        flat.update(below if isinstance(entry, (spaces.Dict, spaces.Tuple)) else {name: below})
    return flat


def alike(first: spaces.Space[Any], second: spaces.Space[Any]) -> bool:
    """Whether two spaces have the same entries, of the same kinds and shapes; bounds may differ."""
    ours, theirs = dict(leaves(first)), dict(leaves(second))
    return ours.keys() == theirs.keys() and all(
        isinstance(theirs[key], spaces.Box) == isinstance(space, spaces.Box) and theirs[key].shape == space.shape
        for key, space in ours.items()
    )


def stacked(observations: list[Any]) -> Any:
    """Observations, nested alike, as one with a first dimension; tuples become dictionaries of numbers."""
    first = observations[0]
    if isinstance(first, (dict, tuple)):
        return {
            key: stacked([o[key] for o in observations])
            for key in (first if isinstance(first, dict) else range(len(first)))
        }
    return np.array(observations, object) if isinstance(first, str) else np.stack([np.asarray(o) for o in observations])


def each(observations: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to observations, or to every entry of flat ones."""
    if isinstance(observations, dict):
        return {key: function(x) for key, x in observations.items()}
    return function(observations)


def joined(observations: list[Any]) -> Any:
    """Flat observations one after the other along the first dimension."""
    if isinstance(observations[0], dict):
        return {key: np.concatenate([o[key] for o in observations]) for key in observations[0]}
    return np.concatenate(observations)


def short_space(space: spaces.Space[Any] | None) -> str:
    """Name a space without printing its bounds element by element."""
    if isinstance(space, spaces.Box):
        return f"Box({space.low.min()}, {space.high.max()}, {space.shape}, {space.dtype})"
    if isinstance(space, spaces.Dict):
        return f"Dict({', '.join(f'{key}: {short_space(entry)}' for key, entry in space.spaces.items())})"
    return "Text" if space is not None and are_texts(space) else str(space)
