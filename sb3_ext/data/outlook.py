"""
Whether CQL can be expected to learn from a dataset, judged by what was measured in this repository.

The measurements are those of docs/cql.md, "Learning". CQL beat its data on five datasets, which have:

================== ======= ======== ============== ====== ==================
dataset            steps   coverage rarest action  room   neighbours agree
================== ======= ======== ============== ====== ==================
CartPole, mixed    24,576  1.00     0.50           2.4    0.58
MinAtar, mixed     248,958 0.97     0.27           0.95   0.61
Catch, random      27,000  1.00     0.33           1.0    0.32
Catch, narrow      27,000  0.91     0.22           0.2    0.83
Breakout, mixed    251,806 0.92     0.11           2.3    0.32
================== ======= ======== ============== ====== ==================

It stayed below its data on 20,000 steps of Breakout (docs/log.md). Episodes of greedy PPOs (``datasets/ppo_expert.py``)
have a room of 0 to 0.19 and 0.91 to 0.93 agreeing neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FEWEST_STEPS = 24_576
LEAST_COVERAGE = 0.9
RAREST_ACTION = 0.1
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
    """
    Perplexity of the actions over their number: 1 is uniform, 1 / n a single action.

    :param shares: share of each action, ``[n]``, adding up to 1
    :return: the coverage
    """
    entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
    return float(np.exp(entropy) / len(shares))


def room_above(returns: NDArray[np.float64]) -> float:
    """
    How far the best fifth of the episodes is above the mean, as a share of the mean's size.

    :param returns: of the episodes, ``[n]``
    :return: at least 0
    """
    mean = float(returns.mean())
    gain = float(np.sort(returns)[-max(1, len(returns) // 5) :].mean()) - mean
    return gain / max(abs(mean), 1e-9)


def neighbours_agree(
    states: NDArray[np.float32], actions: NDArray[np.int64], episodes: NDArray[np.int64]
) -> float | None:
    """
    Share of states in which the action is that of the most similar state of another episode.

    Near 1 the actions are a function of the state, as one greedy policy's are. A low share says less: pictures that
    look alike may differ in what matters.

    :param states: as vectors, ``[n, d]``
    :param actions: taken there, ``[n]``
    :param episodes: they are from, ``[n]``
    :return: the share, or None if all states are of one episode, or equal
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
) -> Outlook:
    """
    Say what CQL can be expected to do, and why.

    :param returns: of the episodes, ``[n]``
    :param steps: of all episodes together
    :param shares: share of each action, ``[n_actions]``; None if actions are continuous
    :param agreement: see :func:`neighbours_agree`
    :param rewarded: whether any reward is not 0
    :param valid: whether the dataset can be loaded
    :return: the outlook
    """
    hindrances = [
        text
        for is_so, text in (
            (not valid, "the errors above must be mended first"),
            (shares is None, "actions are continuous and CQL takes discrete ones; GAIL learns from continuous ones"),
            (not rewarded, "every reward is 0: there is nothing to tell good from bad; behaviour cloning needs none"),
            (shares is not None and np.count_nonzero(shares) < 2, "only one action was ever tried"),
        )
        if is_so
    ]
    if hindrances or shares is None:
        return Outlook("impossible", "CQL cannot learn from this dataset", [(False, text) for text in hindrances])
    room, coverage, rarest = room_above(returns), action_coverage(shares), int(shares.argmin())
    one_policy = agreement is not None and agreement >= ONE_POLICY
    reasons = [
        (steps >= FEWEST_STEPS, f"{steps:,} steps; the smallest dataset that sufficed had {FEWEST_STEPS:,}"),
        (
            coverage >= LEAST_COVERAGE and bool(shares[rarest] >= RAREST_ACTION),
            f"action coverage {coverage:.2f} (1 is uniform), commonest action {int(shares.argmax())} in "
            f"{shares.max():.1%} and rarest {rarest} in {shares[rarest]:.1%} of the steps; where it worked, coverage "
            "was 0.91 or more, and the rarest action had 10.6 % or more",
        ),
        (
            room >= LEAST_ROOM,
            f"the best fifth of the episodes is {room:.0%} above the mean; where it worked, 23 % or more",
        ),
    ]
    if agreement is not None:
        reasons.append(
            (
                not one_policy,
                f"{agreement:.0%} of the states have the action of their most similar one in another episode; greedy "
                "policies' have 91 % or more, data from which CQL learned 83 % or less",
            )
        )
    if one_policy and room < LEAST_ROOM:
        summary = "one policy's steady play: behaviour cloning (--algo bc) is simpler and as good"
        return Outlook("cloning", summary, reasons)
    if all(good for good, _ in reasons):
        summary = "better than the data's mean; try --algo bc, too: on logs of learning agents it came within 2 %"
        return Outlook("expected", summary, reasons)
    return Outlook("doubtful", "unlike the data on which CQL was measured here, see -", reasons)
