"""Algorithms from entry points; their hyper-parameters from plain YAML: stored constructor arguments, checked first."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import yaml

if TYPE_CHECKING:  # not before they are needed: they bring PyTorch, which `sb3x data` does without
    from stable_baselines3.common.base_class import BaseAlgorithm

GROUP = "sb3_ext.algos"
FLAGS = {
    "dataset": "--dataset",
    "demonstrations": "--dataset",
    "device": "--device",
    "env": "--env",
    "seed": "--seed",
    "tensorboard_log": "--tensorboard-log",
    "verbose": "--verbose",
}
"""Constructor arguments that the command line sets, so YAML must not."""

BUFFERS = {
    "PrioritizedReplayBuffer": "sb3_ext:PrioritizedReplayBuffer",
    "ReplayBuffer": "stable_baselines3.common.buffers:ReplayBuffer",
}
"""What ``replay_buffer_class`` may name, and where it is."""

BY_ACTIONS = {"cql": {"Box": "continuous_cql"}}
"""Algorithms that another one stands in for, by the kind of the dataset's actions."""

_USUAL = AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


class ZooError(Exception):
    """The user asked for something that cannot be done; the message is one line and says what to do."""


def hint(word: str, known: Iterable[str]) -> str:
    """Sentence for the end of an error message: close matches of a word, or what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=3)
    if close:
        return f"did you mean {' or '.join(close)}?"
    shown = [*names[:20], *(["..."] if len(names) > 20 else [])]
    return f"known: {', '.join(shown) or 'none'}."


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Report what goes wrong while a run is set up as a :class:`ZooError`, the user's mistake, without a traceback."""
    try:
        yield
    except (*_USUAL, gym.error.Error) as error:
        raise ZooError(str(error) or type(error).__name__) from error


@dataclass(frozen=True)
class Algo:
    """An algorithm of the entry-point group ``sb3_ext.algos``, by its name on the command line."""

    name: str
    cls: type[BaseAlgorithm]

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """Constructor parameters by name."""
        return dict(inspect.signature(self.cls).parameters)

    @property
    def offline(self) -> bool:
        """Whether it learns from a dataset."""
        return "dataset" in self.parameters

    @property
    def imitates(self) -> bool:
        """Whether it learns in an environment from demonstrations."""
        return "demonstrations" in self.parameters

    @property
    def replays(self) -> bool:
        """Whether it keeps a replay buffer of its own."""
        return "replay_buffer_kwargs" in self.parameters

    @property
    def keys(self) -> set[str]:
        """Keys that its YAML entries may have: constructor arguments and a few that the command line itself uses."""
        zoo = {"n_timesteps", "frame_stack"} | (set() if self.offline else {"n_envs"})
        return {k for k in self.parameters if not k.startswith("_")} - set(FLAGS) | zoo


@dataclass(frozen=True)
class Config:
    """The hyper-parameters of one run."""

    hyperparams: dict[str, Any]  # as in the YAML entry, overrides applied
    source: str  # file and entry that they come from
    n_timesteps: int
    n_envs: int  # copies of the training environment
    frame_stack: int | None  # frames per observation; None lets the data decide
    arguments: dict[str, Any]  # of the constructor, schedules built


def known_algos() -> dict[str, EntryPoint]:
    """Entry points of the algorithms that are installed, by name."""
    return {point.name: point for point in entry_points(group=GROUP)}


def load_algo(name: str) -> Algo:
    """Import an algorithm by its name on the command line."""
    known = known_algos()
    if name not in known:
        raise ZooError(f"Unknown algorithm {name!r}; known: {', '.join(sorted(known))}.")
    try:
        return Algo(name, known[name].load())
    except ImportError as error:
        raise ZooError(f"The algorithm {name!r} cannot be imported: {error}") from error


def for_actions(algo: Algo, actions: str | None) -> Algo:
    """The algorithm that an algorithm's name means for these actions, such as ``"Box"``; itself if that is unknown."""
    name = BY_ACTIONS.get(algo.name, {}).get(actions or "", algo.name)
    return algo if name == algo.name else load_algo(name)


def plain(value: Any) -> Any:
    """Read numbers like ``5e-5``, which YAML 1.1 takes for text because there is no dot, as floats at any depth."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def _safe_load(text: str, where: str) -> Any:
    try:
        return plain(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ZooError(f"{where} is not plain YAML: {' '.join(str(error).split())}") from error


def parse_overrides(algo: Algo, words: Sequence[str] | None) -> dict[str, Any]:
    """Read and check ``key:value`` words of the command line; the value is plain YAML."""
    overrides: dict[str, Any] = {}
    for word in words or ():
        key, colon, value = word.partition(":")
        if not colon:
            raise ZooError(f"--hyperparams takes key:value, got {word!r}.")
        overrides[key.strip()] = _safe_load(value, f"--hyperparams {key}")
    check_keys(algo, overrides, "--hyperparams")
    return overrides


def read_entries(algo: Algo, conf_file: str | None) -> tuple[str, dict[str, dict[str, Any]]]:
    """Read and check the user's file of hyper-parameters, or the one of the package: its name and its entries."""
    path = Path(conf_file) if conf_file else Path(str(files(__package__) / "hyperparams" / f"{algo.name}.yml"))
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        if conf_file:
            raise ZooError(f"The file {conf_file} cannot be read ({error.strerror}).") from error
        message = f"There are no stored hyper-parameters for {algo.name}; pass a file with --conf-file."
        raise ZooError(message) from error
    name = conf_file or path.name
    entries = _safe_load(text, name)
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ZooError(f"{name} must map names of datasets or environments, 'atari' or 'default', to settings.")
    for entry, hyperparams in entries.items():
        check_keys(algo, hyperparams, f"{name}, entry {entry!r}")
    return name, {str(entry): hyperparams for entry, hyperparams in entries.items()}


def check_keys(algo: Algo, hyperparams: dict[str, Any], where: str) -> None:
    """Refuse what is no constructor argument, naming the key, the place and the closest match."""
    for key in hyperparams:
        if key in FLAGS:
            raise ZooError(f"{where}: {key!r} is not set there; use the flag {FLAGS[key]}.")
        if key not in algo.keys:
            raise ZooError(f"{where}: {algo.name} has no setting {key!r}; {hint(str(key), algo.keys)}")
    from sb3_ext.data import load_minari

    known = set(inspect.signature(load_minari).parameters) - {"dataset", "n_steps", "gamma", "device"}
    for key in hyperparams.get("dataset_kwargs") or {}:
        if key not in known:
            raise ZooError(f"{where}: dataset_kwargs has no setting {key!r}; {hint(str(key), known)}")


def resolve(
    algo: Algo,
    file: str,
    entries: dict[str, dict[str, Any]],
    names: Sequence[str],
    overrides: dict[str, Any],
    n_timesteps: int = -1,
    auto_policy: Callable[[dict[str, Any]], str | None] | None = None,
) -> Config:
    """
    Choose the entry and apply the overrides.

    :param file: name of the file of the entries, see :func:`read_entries`
    :param names: entries to look for, the most specific first; ``default`` is always the last
    :param overrides: hyper-parameters that win over the entry's
    :param n_timesteps: likewise for the length, if it is positive
    :param auto_policy: what ``policy: auto`` means, given ``dataset_kwargs``; None if that is not known yet
    """
    names = [*names, "default"]
    entry = next((name for name in names if name in entries), None)
    if entry is None:
        raise ZooError(f"{file} has none of the entries {', '.join(map(repr, names))}; add one.")
    source = f"{file}: {entry}"
    hyperparams = {"policy": "auto", **entries[entry], **overrides}
    if "dataset_kwargs" in overrides:  # what is not overridden stays: the transforms of a preset, say
        hyperparams["dataset_kwargs"] = {**(entries[entry].get("dataset_kwargs") or {}), **overrides["dataset_kwargs"]}
    if n_timesteps > 0:
        hyperparams["n_timesteps"] = n_timesteps
    if hyperparams["policy"] == "auto" and auto_policy is not None:
        hyperparams["policy"] = auto_policy(hyperparams.get("dataset_kwargs") or {}) or "auto"
    for key in ("n_timesteps", "n_envs", "frame_stack"):
        if hyperparams.get(key) is not None:
            hyperparams[key] = _positive(hyperparams[key], key, source)
    if "n_timesteps" not in hyperparams:
        raise ZooError(f"{source} does not say how long to train; add n_timesteps or pass -n.")
    parameters = algo.parameters
    # a copy, because algorithms write into policy_kwargs
    arguments = {k: _argument(k, v, parameters[k], source) for k, v in deepcopy(hyperparams).items() if k in parameters}
    stack, of_data = hyperparams.get("frame_stack"), arguments.get("dataset_kwargs") or {}
    if algo.offline and stack:
        arguments["dataset_kwargs"] = of_data = {**of_data, "frame_stack": stack}
    stack = of_data.get("frame_stack") or stack
    return Config(hyperparams, source, hyperparams["n_timesteps"], hyperparams.get("n_envs", 1), stack, arguments)


def _positive(value: Any, key: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < 1:
        raise ZooError(f"{where}: {key} must be a positive whole number, got {value!r}.")
    return int(value)


def _argument(key: str, value: Any, parameter: inspect.Parameter, where: str) -> Any:
    """Turn ``lin_x`` into a schedule, a buffer's name into the class, ``1e5`` into an integer where one is wanted."""
    if key == "replay_buffer_class" and value is not None:
        if not isinstance(value, str) or value not in BUFFERS:
            raise ZooError(f"{where}: there is no {key} {value!r}; {hint(str(value), BUFFERS)}")
        return EntryPoint(value, BUFFERS[value], "").load()
    if key.endswith("_kwargs") and not isinstance(value, dict | None):
        raise ZooError(f"{where}: {key} must be a mapping like {{name: value}}, got {value!r}.")
    if key == "train_freq" and isinstance(value, list):
        return tuple(value)
    default = parameter.default
    if isinstance(value, str) and value.startswith("lin_"):
        from stable_baselines3.common.utils import LinearSchedule

        try:
            return LinearSchedule(float(value[4:]), 0.0, 1.0)
        except ValueError as error:
            raise ZooError(f"{where}: {key} must look like lin_0.001, got {value!r}.") from error
    # a default that follows from other arguments is None
    whole = isinstance(default, int) or (default is None and parameter.annotation == "int | None")
    real = isinstance(default, float) or (default is None and str(parameter.annotation).startswith("float | "))
    if isinstance(default, bool) or not (whole or real):
        return value
    if isinstance(value, (str, list, dict)):
        raise ZooError(f"{where}: {key} must be a number, got {value!r}.")
    if whole and isinstance(value, float) and value.is_integer():
        return int(value)
    if parameter.annotation in (int, "int", "int | None") and isinstance(value, float):
        raise ZooError(f"{where}: {key} must be a whole number, got {value!r}.")
    return value
