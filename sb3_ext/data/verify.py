"""Look through a dataset: is it whole, is it valid, and can CQL be expected to learn from it."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from sb3_ext.data.checks import CheckedEpisode, DatasetError
from sb3_ext.data.envs import SMALLEST_PICTURE, is_frame_space, to_channel_first
from sb3_ext.data.hub.manifest import differences
from sb3_ext.data.source import DatasetLike, Source, find_path, open_source
from sb3_ext.data.transforms.pipeline import TransformLike
from sb3_ext.data.trees import each
from sb3_ext.data.write import return_statistics

_SHOWN = 20
_SAMPLE = 2000
"""States whose nearest neighbours are looked at."""


@dataclass(frozen=True)
class DatasetReport:
    """
    What :func:`verify_dataset` found.

    :param name: id of the dataset
    :param errors: what makes it unusable as it is; empty if it is whole and valid
    :param warnings: what one should know before using it
    :param facts: numbers: ``steps``, ``episodes``, ``terminated``, ``cut``, ``behaviour_return`` and others
    :param outlook: whether CQL can be expected to learn from it, and why; None if nothing could be read
    """

    name: str
    errors: list[str]
    warnings: list[str]
    facts: dict[str, Any]
    outlook: Outlook | None

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not self.errors

    def __str__(self) -> str:
        lines = [f"{self.name}: {'whole and valid' if self.ok else f'{len(self.errors)} errors'}"]
        for kind, found in (("error", self.errors), ("warning", self.warnings)):
            lines += [f"  {kind}: {text}" for text in found[:_SHOWN]]
            if len(found) > _SHOWN:
                lines.append(f"  ... and {len(found) - _SHOWN} more of the kind '{kind}'")
        lines += [f"  {name}: {_plain(value)}" for name, value in self.facts.items()]
        if self.outlook is not None:
            lines.append(f"CQL: {self.outlook.verdict} ({self.outlook.summary})")
            lines += [f"  {'+' if good else '-'} {text}" for good, text in self.outlook.reasons]
        return "\n".join(lines)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(_plain(v) for v in value)
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


@dataclass
class _Tally:
    """Collected while the episodes stream by."""

    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    terminated: int = 0
    cut: int = 0
    actions: Counter[int] = field(default_factory=Counter)
    digests: dict[bytes, int] = field(default_factory=dict)
    repeated: list[tuple[int, int]] = field(default_factory=list)
    rewarded: bool = False
    states: list[tuple[NDArray[Any], ...]] = field(default_factory=list)
    """Some states as vectors, with the actions taken there and the episodes they are from."""


def _small(observations: Any, space: Any) -> NDArray[np.float32]:
    """Observations as short vectors; pictures coarse, the newest frame alone."""
    if isinstance(space, spaces.Dict):
        parts: NDArray[np.float32] = np.hstack([_small(observations[key], x) for key, x in space.spaces.items()])
        return parts
    if not is_frame_space(space) or max(space.shape) < SMALLEST_PICTURE:
        vectors: NDArray[np.float32] = observations.reshape(len(observations), -1).astype(np.float32)
        return vectors
    frames = to_channel_first(observations, space)[:, -1]
    step = max(1, frames.shape[1] // 21)
    return frames[:, ::step, ::step].reshape(len(frames), -1).astype(np.float32)


def _described(space: Any) -> str:
    if isinstance(space, spaces.Dict):
        return ", ".join(f"{key}: {_described(entry)}" for key, entry in space.spaces.items())
    return f"{space.dtype} {space.shape}" if isinstance(space, spaces.Box) else str(space)


def _add(tally: _Tally, source: Source, number: int, episode: CheckedEpisode, chosen: NDArray[np.bool_]) -> None:
    digest = hashlib.blake2b(digest_size=16)
    entries = episode.observations
    for array in entries.values() if isinstance(entries, dict) else [entries]:
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(np.ascontiguousarray(episode.actions).tobytes())
    digest.update(np.asarray(episode.rewards, np.float64).tobytes())
    first = tally.digests.setdefault(digest.digest(), number)
    if first != number:
        tally.repeated.append((number, first))
    tally.returns.append(episode.recorded_return)
    tally.lengths.append(len(episode.rewards))
    tally.terminated += episode.terminated
    tally.rewarded |= bool(episode.rewards.any())
    if not isinstance(source.action_space, spaces.Discrete):
        return
    tally.actions.update(episode.actions.tolist())
    steps = np.flatnonzero(chosen)
    if len(steps):
        # with the state before, because one picture shows no motion
        at = [each(entries, itemgetter(t)) for t in (steps, np.maximum(steps - 1, 0))]
        both = [_small(observations, source.observation_space) for observations in at]
        tally.states.append((np.hstack(both), episode.actions[steps], np.full(len(steps), number)))


def _read(source: Source, errors: list[str]) -> _Tally:
    """Check every episode, good or bad; what is wrong goes to ``errors``."""
    tally, draw = _Tally(), np.random.default_rng(0)
    try:
        storage = source.open()
        lengths = source.episode_lengths(storage)
    except DatasetError as error:
        errors.append(str(error))
        return tally
    share = min(1.0, _SAMPLE / max(int(lengths.sum()), 1))
    for number, steps in zip(source.episodes.tolist(), lengths.tolist(), strict=True):
        try:
            raw = next(source.raw(storage, np.array([number])))
            episode = source.check(raw, number, steps, strict=False)
        except DatasetError as error:
            errors.append(str(error))
            continue
        tally.cut += not (episode.terminated or bool(np.asarray(raw["truncations"]).reshape(-1)[-1]))
        _add(tally, source, number, episode, draw.random(len(episode.rewards)) < share)
    total = source.metadata.get("total_steps")
    if len(source.episodes) == source.metadata["total_episodes"] and total != int(lengths.sum()):
        errors.append(
            f"{source.name}: the metadata says {total} steps, the episodes have {int(lengths.sum())}. Episodes are "
            "missing or were added by hand; get the dataset again."
        )
    return tally


def _warn(source: Source, tally: _Tally) -> list[str]:
    found = source.found()
    if tally.cut:
        found.append(
            f"{tally.cut} episodes just stop: their last step is neither terminated nor truncated. It bootstraps, as a "
            "truncated one does; that is wrong if the task ended there."
        )
    if tally.repeated:
        shown = ", ".join(f"{number} = {first}" for number, first in tally.repeated[:5])
        found.append(
            f"{len(tally.repeated)} of {len(tally.returns)} episodes repeat an earlier one bit by bit ({shown}"
            f"{', ...' if len(tally.repeated) > 5 else ''}). Short games do that by chance; otherwise every reset had "
            "the same seed."
        )
    stored = (source.metadata.get("behaviour_return") or {}).get("mean")
    mean = float(np.mean(tally.returns)) if tally.returns else np.nan
    whole = len(tally.returns) == source.metadata["total_episodes"]
    if stored is not None and whole and not np.isclose(stored, mean, rtol=1e-4, atol=1e-6):
        found.append(f"The metadata says that the mean return is {stored:g}; it is {mean:g}.")
    return found


def verify_dataset(
    dataset: DatasetLike,
    transforms: Sequence[TransformLike] | TransformLike | None = None,
    build_env: bool = False,
) -> DatasetReport:
    """
    Read a whole dataset, list everything that is wrong with it, and judge whether CQL can learn from it.

    Checked are metadata and spaces; every episode's lengths, types, ends, NaN and infinite values and actions outside
    their space, as :func:`~sb3_ext.data.load_minari` does, but beyond the first error; totals; and duplicates; and of a
    dataset that came with a manifest (:func:`~sb3_ext.data.download`), the checksum of every file. One episode at a
    time is in RAM. The environment that the dataset names is not built.

    :param dataset: a ``MinariDataset`` (its episode filter is respected), an id (local, else downloaded) or a path
    :param transforms: as in :func:`~sb3_ext.load_minari`; what is judged is what comes out of them
    :param build_env: as in :func:`~sb3_ext.load_minari`
    :return: the report; ``report.ok`` and ``report.errors``, ``str(report)`` for people
    :raises DatasetError: if there is no such dataset
    :raises TypeError: if it is not a dataset
    """
    place = find_path(dataset) if isinstance(dataset, (str, os.PathLike)) else None
    try:
        source = open_source(dataset if place is None else place, build_env, transforms)
    except DatasetError as error:
        name = str(place.parent.name if place else dataset)
        return DatasetReport(name, [str(error), *((differences(place.parent) if place else None) or [])], [], {}, None)
    changed = differences(source.path.parent)
    errors = list(changed or [])
    tally = _read(source, errors)
    facts: dict[str, Any] = {
        "checksums": "none" if changed is None else f"{len(changed)} files differ" if changed else "all right",
        "episodes": len(tally.returns),
        "steps": sum(tally.lengths),
    }
    if not tally.returns:
        return DatasetReport(source.name, errors, [], facts, None)
    facts |= {
        "episode_length": {"min": min(tally.lengths), "mean": float(np.mean(tally.lengths)), "max": max(tally.lengths)},
        "terminated": tally.terminated,
        "truncated": len(tally.returns) - tally.terminated - tally.cut,
        "cut": tally.cut,
        "repeated": len(tally.repeated),
        "behaviour_return": return_statistics(tally.returns),
        "observations": _described(source.observation_space),
        "megabytes": sum(f.stat().st_size for f in source.path.rglob("*") if f.is_file()) / 1e6,
    }
    shares, agreement = None, None
    if isinstance(source.action_space, spaces.Discrete):
        counts = np.array([tally.actions[a] for a in range(source.n_actions)])
        shares = counts / counts.sum()
        facts["action_shares"] = [round(s, 4) for s in shares.tolist()]
        if tally.states:
            agreement = neighbours_agree(*map(np.concatenate, zip(*tally.states, strict=True)))
            facts["neighbours_agree"] = agreement
    outlook = judge(
        np.array(tally.returns),
        sum(tally.lengths),
        shares,
        agreement,
        tally.rewarded,
        not errors,
        continuous=isinstance(source.action_space, spaces.Box),
    )
    return DatasetReport(source.name, errors, _warn(source, tally), facts, outlook)


FEWEST_STEPS = 24_576
LEAST_COVERAGE = 0.6
RAREST_ACTION = 0.06
LEAST_ROOM = 0.2
ONE_POLICY = 0.9
"""Share of agreeing neighbours from which actions are taken for a function of the state."""


@dataclass(frozen=True)
class Outlook:
    """
    What CQL can be expected to do with a dataset.

    :param verdict: ``"expected"``: to do better than the data's mean; ``"cloning"``: to do what behaviour cloning does;
        ``"doubtful"``: the data differs from everything that was measured; ``"impossible"``
    :param summary: the verdict in words
    :param reasons: each with whether it speaks for learning
    """

    verdict: str
    summary: str
    reasons: list[tuple[bool, str]]


def action_coverage(shares: NDArray[np.float64]) -> float:
    """Perplexity of the actions of these shares ``[n]`` over their number: 1 is uniform, 1 / n a single action."""
    entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
    return float(np.exp(entropy) / len(shares))


def room_above(returns: NDArray[np.float64]) -> float:
    """How far the best fifth of the episodes is above the mean, as a share of the mean's size; at least 0."""
    mean = float(returns.mean())
    gain = float(np.sort(returns)[-max(1, len(returns) // 5) :].mean()) - mean
    return gain / max(abs(mean), 1e-9)


def neighbours_agree(
    states: NDArray[np.float32], actions: NDArray[np.int64], episodes: NDArray[np.int64]
) -> float | None:
    """
    Share of states in which the action is that of the most similar state of another episode.

    Near 1 the actions are a function of the state, as one greedy policy's are. A low share says less: pictures that
    look alike may differ in what matters. States are vectors, ``[n, d]``; None if all are of one episode, or equal.
    """
    scale = states.std(axis=0)
    if not scale.any() or len(np.unique(episodes)) < 2:
        return None
    states = (states - states.mean(axis=0))[:, scale > 0] / scale[scale > 0]
    square = (states**2).sum(axis=1)
    distance = square[:, None] + square[None, :] - 2 * states @ states.T
    distance[episodes[:, None] == episodes[None, :]] = np.inf
    return float((actions[distance.argmin(axis=1)] == actions).mean())


def judge(
    returns: NDArray[np.float64],
    steps: int,
    shares: NDArray[np.float64] | None,
    agreement: float | None,
    rewarded: bool,
    valid: bool,
    continuous: bool = False,
) -> Outlook:
    """
    Say what CQL can be expected to do, and why.

    The shares are those of the actions, ``[n_actions]``, None if they are not ``Discrete``; ``agreement`` is that of
    :func:`neighbours_agree`; ``valid`` is whether the dataset can be loaded; ``continuous`` is whether actions are a
    ``Box``.
    """
    hindrances = {
        "the errors above must be mended first": not valid,
        "actions are neither Discrete nor Box, which CQL needs; BC learns from others": shares is None
        and not continuous,
        "every reward is 0: there is nothing to tell good from bad; behaviour cloning needs none": not rewarded,
        "only one action was ever tried": shares is not None and np.count_nonzero(shares) < 2,
    }
    if any(hindrances.values()):
        reasons = [(False, text) for text, is_so in hindrances.items() if is_so]
        return Outlook("impossible", "CQL cannot learn from this dataset", reasons)
    room = room_above(returns)
    one_policy = agreement is not None and agreement >= ONE_POLICY
    above = f"the best fifth of the episodes is {room:.0%} above the mean; where it worked, 23 % or more"
    reasons = [
        (steps >= FEWEST_STEPS, f"{steps:,} steps; the smallest dataset that sufficed had {FEWEST_STEPS:,}"),
        (room >= LEAST_ROOM, above),
    ]
    if shares is not None:
        coverage, rarest = action_coverage(shares), int(shares.argmin())
        covered = (
            f"action coverage {coverage:.2f} (1 is uniform), commonest action {int(shares.argmax())} in "
            f"{shares.max():.1%} and rarest {rarest} in {shares[rarest]:.1%} of the steps; where it worked, coverage "
            "was 0.62 or more, and the rarest action had 6.7 % or more"
        )
        reasons.insert(1, (coverage >= LEAST_COVERAGE and bool(shares[rarest] >= RAREST_ACTION), covered))
    if agreement is not None:
        agreeing = (
            f"{agreement:.0%} of the states have the action of their most similar one in another episode; greedy "
            "policies' have 91 % or more, data from which CQL learned 83 % or less"
        )
        reasons.append((not one_policy, agreeing))
    if one_policy and room < LEAST_ROOM:
        summary = "one policy's steady play: behaviour cloning (--algo bc) is simpler and as good"
        return Outlook("cloning", summary, reasons)
    if all(good for good, _ in reasons):
        cloning = "; try --algo bc, too: on logs of learning agents it came within 5 %" if shares is not None else ""
        summary = f"better than the data's mean{cloning}"
        return Outlook("expected", summary, reasons)
    return Outlook("doubtful", "unlike the data on which CQL was measured here, see -", reasons)
