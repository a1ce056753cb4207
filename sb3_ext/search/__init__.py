"""Batched Gumbel tree search over arrays, for any network that is a callable; usable by itself."""

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
