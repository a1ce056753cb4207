"""See what a search did: numbers for one observation, and a picture of its tree."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sb3_ext.efficientzero.masking import legal_actions
from sb3_ext.efficientzero.policies import EfficientZeroPolicy
from sb3_ext.search.gumbel import Tree, principal_line


@dataclass(frozen=True)
class Explanation:
    """
    One search. A slot is an action's number, or for continuous control the number of a sample.

    :param action: chosen, as ``predict`` gives it
    :param network_value: what the network alone says the observation is worth
    :param root_value: what the search says, in units of return
    :param prior: probability of each slot before the search, ``[A]``
    :param improved_policy: and after it, ``[A]``
    :param visits: simulations through each slot, ``[A]``
    :param qvalues: return of each slot; of unvisited ones what the others make likely, ``[A]``
    :param samples: continuous control: the action of each slot, in the environment's units, ``[A, D]``
    :param principal_line: slots that the search follows most, from the root on
    :param tree: the whole tree
    """

    action: NDArray[Any]
    network_value: float
    root_value: float
    prior: NDArray[np.float32]
    improved_policy: NDArray[np.float32]
    visits: NDArray[np.int32]
    qvalues: NDArray[np.float32]
    samples: NDArray[np.float32] | None
    principal_line: list[int]
    tree: Tree

    def __str__(self) -> str:
        lines = [
            f"value {self.root_value:.2f} (network alone {self.network_value:.2f}), chosen {self.action}",
            f"line {' '.join(map(str, self.principal_line))}",
            "slot  prior  policy  visits       Q",
        ]
        for slot in np.argsort(-self.improved_policy, kind="stable"):
            lines.append(
                f"{slot:4d}  {self.prior[slot]:5.2f}  {self.improved_policy[slot]:6.2f}  {self.visits[slot]:6d}  "
                f"{self.qvalues[slot]:6.2f}"
            )
        return "\n".join(lines)

    def draw(self, path: str | os.PathLike[str]) -> None:
        """
        Draw the tree: a circle per node, as large as its visits, coloured by its value; numbers are slots.

        :param path: picture to write; the suffix says which kind
        :raises ImportError: if matplotlib is missing; says how to install it
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError('Drawing needs matplotlib: pip install "sb3-ext[report]"') from error
        parents, slots = self.tree.parents[0], self.tree.parent_slots[0]
        depths, values = self.tree.depths[0], self.tree.values[0]
        places = _places(self.tree.children[0])
        sizes = 60 + 240 * self.tree.visits[0].sum(axis=1) / max(len(parents) - 1, 1)
        figure = Figure(figsize=(max(6, 0.5 * (places.max() + 1)), 1 + 1.1 * (depths.max() + 1)), layout="tight")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for node in range(1, len(parents)):
            above = parents[node]
            axes.plot(places[[above, node]], -depths[[above, node]], color="0.7", zorder=1)
            middle = places[[above, node]].mean(), -depths[[above, node]].mean()
            axes.annotate(str(slots[node]), middle, ha="center", va="center", fontsize=8)
        dots = axes.scatter(places, -depths, s=sizes, c=values, cmap="viridis", zorder=2, edgecolors="black")
        figure.colorbar(dots, ax=axes, label="value of the node (network)")
        axes.set_axis_off()
        axes.set_title(f"{len(parents) - 1} simulations, chosen {self.action}, value {self.root_value:.2f}")
        figure.savefig(path)


def _places(children: NDArray[np.int64]) -> NDArray[np.float64]:
    """Horizontal place of each node: leaves side by side, parents above the middle of their children."""
    places, leaves, stack = np.zeros(len(children)), 0, [0]
    while stack:  # depth first
        node = stack.pop()
        below = children[node][children[node] >= 0]
        if not len(below):
            places[node], leaves = leaves, leaves + 1
        stack.extend(below[::-1])
    for node in reversed(range(len(children))):  # bottom up, as a child is always younger than its parent
        below = children[node][children[node] >= 0]
        if len(below):
            places[node] = places[below].mean()
    return places


def explain(
    policy: EfficientZeroPolicy, observation: NDArray[Any], deterministic: bool = True, action_masks: Any = None
) -> Explanation:
    """See :meth:`~sb3_ext.efficientzero.efficientzero.EfficientZeroV2.explain`."""
    tensor, _ = policy.obs_to_tensor(observation)
    if len(tensor) != 1:
        raise ValueError(f"explain() takes one observation, this is a batch of {len(tensor)}.")
    invalid = None if action_masks is None else ~legal_actions(action_masks, 1, policy.action_space)
    roots = policy.roots(tensor)  # type: ignore[arg-type]
    out, sampled = policy.plan(roots, noise=not deterministic, invalid=invalid)
    action, samples = out.actions[0], None
    if sampled is not None:
        samples = policy.unscale_action(sampled[0].reshape(-1, *policy.action_space.shape))  # type: ignore[misc]
        action = samples[action]
    return Explanation(
        action=action,
        network_value=float(roots.values[0]),
        root_value=float(out.root_values[0]),
        prior=out.tree.prior[0, 0].astype(np.float32),
        improved_policy=out.improved_policy[0],
        visits=out.visits[0],
        qvalues=out.completed_qvalues[0],
        samples=samples,
        principal_line=principal_line(out.tree, 0),
        tree=out.tree,
    )
