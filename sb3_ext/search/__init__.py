"""
Batched Gumbel tree search over arrays, for any network that is a callable; usable by itself.

Three roots, each a bandit with four arms whose returns the search does not know; its prior is uniform:

>>> import numpy as np
>>> from sb3_ext.search import RecurrentOutput, gumbel_search
>>> returns = np.array([[0, 1, 2, 3], [3, 2, 1, 0], [0, 9, 0, 0]], np.float32)
>>> def pull(which, arms):  # the embedding is the number of the bandit; an episode is one pull
...     rewards = returns[which, arms]
...     return RecurrentOutput(rewards, np.zeros(3), np.zeros((3, 4)), which)
>>> found = gumbel_search(
...     np.zeros((3, 4)), np.zeros(3), np.arange(3), pull, num_simulations=16, max_num_considered_actions=4, gamma=1.0
... )
>>> found.actions
array([3, 0, 1])
>>> found.visits[0]  # sequential halving: two pulls of each arm, then the better two get the rest
array([2, 2, 6, 6], dtype=int32)
"""

from sb3_ext.search.gumbel import Embedding, Lane, RecurrentOutput, SearchOutput, gumbel_search, principal_line
from sb3_ext.search.mlp import CHUNK, FastMlp, compile_mlp, decode
from sb3_ext.search.tree import Tree

__all__ = [
    "CHUNK",
    "Embedding",
    "FastMlp",
    "Lane",
    "RecurrentOutput",
    "SearchOutput",
    "Tree",
    "compile_mlp",
    "decode",
    "gumbel_search",
    "principal_line",
]
