"""What a transform is: one step between what is recorded and what an agent sees."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from gymnasium import spaces
from numpy.typing import NDArray

from sb3_ext.data.checks import DatasetError
from sb3_ext.data.trees import leaves, short_space


class Transform:
    """
    One step between what is recorded and what an agent sees; by itself it changes nothing.

    The same object serves data, a whole episode at a time, and environments, an observation at a time. A class of your
    own overrides what it changes. :meth:`bind` is called once, before everything else.
    """

    reach = 0
    """How many earlier observations of the episode an output depends on."""
    clips_actions = False
    """Whether actions outside their space are brought back to it."""

    def bind(self, space: spaces.Space[Any], action_space: spaces.Space[Any]) -> Any:
        """
        Take the spaces that come in, and return those that come out.

        :raises DatasetError: if it does not fit them
        """
        return space, action_space

    def observations(self, observations: Any) -> Any:
        """Observations that follow one another, ``[n, ...]`` or a dictionary of those."""
        return observations

    def actions(self, actions: NDArray[Any]) -> NDArray[Any]:
        """Recorded actions, ``[n, ...]``, as the agent shall know them."""
        return actions

    def environment_actions(self, action: Any) -> Any:
        """One action of the agent's as the environment takes it: undoes :meth:`actions`."""
        return action

    def rewards(self, rewards: NDArray[Any]) -> NDArray[Any]:
        """Rewards ``[n]``."""
        return rewards


class EntryTransform(Transform):
    """
    A transform of single entries: those of a dictionary that fit, or the observation itself.

    :param key: the only entry to change
    """

    wants: ClassVar[str]
    """What it fits, for messages."""

    def __init__(self, key: str | None = None) -> None:
        self.key = key

    def change(self, space: Any) -> tuple[spaces.Space[Any], Callable[[Any], Any]] | None:
        """Space that comes out of a fitting entry's, and the function ``[n, ...]`` to ``[n, ...]``; None: no fit."""
        raise NotImplementedError

    def bind(self, space: spaces.Space[Any], action_space: spaces.Space[Any]) -> Any:
        """See :meth:`Transform.bind`."""
        found = OrderedDict(leaves(space))
        if self.key is not None and self.key not in found:
            raise DatasetError(f"transform {self}: there is no entry {self.key!r}; there are {entry_names(found)}.")
        asked = found if self.key is None else {self.key: found[self.key]}
        changes = {key: change for key, entry in asked.items() if (change := self.change(entry)) is not None}
        if not changes:
            raise DatasetError(f"transform {self} needs {self.wants}, the observations are {short_space(space)}.")
        self._functions = {key: function for key, (_, function) in changes.items()}
        found.update({key: changed for key, (changed, _) in changes.items()})
        return (spaces.Dict(found) if isinstance(space, spaces.Dict) else found[""]), action_space

    def observations(self, observations: Any) -> Any:
        """See :meth:`Transform.observations`."""
        if not isinstance(observations, dict):
            return self._functions[""](observations)
        return {key: self._functions[key](x) if key in self._functions else x for key, x in observations.items()}

    def _written(self, name: str, *arguments: Any) -> str:
        text = f"{name}:{','.join(map(str, arguments))}" if arguments else name
        return text if self.key is None else f"{text}@{self.key}"


def entry_names(found: Iterable[str]) -> str:
    """List names for a message."""
    return ", ".join(map(repr, found)) or "none"
