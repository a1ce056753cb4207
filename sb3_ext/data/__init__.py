"""Minari datasets in and out."""

from sb3_ext.data.checks import DatasetError
from sb3_ext.data.envs import StackFrames, make_atari_env
from sb3_ext.data.minari import load_minari, make_eval_env
from sb3_ext.data.record import EpisodeRecorder, collect_episodes, record
from sb3_ext.data.write import Episode, write_dataset

__all__ = [
    "DatasetError",
    "Episode",
    "EpisodeRecorder",
    "StackFrames",
    "collect_episodes",
    "load_minari",
    "make_atari_env",
    "make_eval_env",
    "record",
    "write_dataset",
]
