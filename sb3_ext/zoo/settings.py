"""What a command line asks for: one frozen dataclass per command, one field per flag, and the flags' defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class AgentSettings:
    """Flags that ``sb3x train`` and ``sb3x enjoy`` share; ``--help`` says what each of them means."""

    algo: str
    env: str | None = None
    dataset: str | None = None
    transforms: Sequence[str] | None = None
    build_env: bool = False
    device: str = "auto"
    num_threads: int = -1
    progress: bool = False
    verbose: int = 1


@dataclass(frozen=True, kw_only=True)
class TrainSettings(AgentSettings):
    """Flags of ``sb3x train``, as they are kept in a run's ``args.yml``."""

    log_folder: str = "logs"
    n_timesteps: int = -1
    tensorboard_log: str = ""
    seed: int = -1
    eval_freq: int | None = None
    eval_episodes: int = 5
    n_eval_envs: int = 1
    validation: float | None = None
    validation_freq: int | None = None
    validation_criterion: str | None = None
    save_freq: int = -1
    save_replay_buffer: bool = False
    log_interval: int = -1
    trained_agent: str | None = None
    resume: bool = False
    hyperparams: Sequence[str] | None = None
    conf_file: str | None = None
    uuid: bool = False
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class EnjoySettings(AgentSettings):
    """Flags of ``sb3x enjoy``."""

    folder: str = "logs"
    n_timesteps: int = 1000
    exp_id: int = 0
    load_best: bool = False
    load_checkpoint: int | None = None
    load_last_checkpoint: bool = False
    stochastic: bool = False
    deterministic: bool = False
    render: bool = False
    no_render: bool = False
    video: str | None = None
    seed: int = 0
    n_envs: int = 1


@dataclass(frozen=True, kw_only=True)
class PlaySettings:
    """Flags of ``sb3x data play``."""

    env_id: str
    id: str
    episodes: int = 10
    fps: float | None = None
    keys: Sequence[str] | None = None
    size: int = 600
    seed: int = 0
    author: str = "The sb3_ext authors"
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """Flags of ``sb3x data convert-dqn-replay``."""

    folder: str
    game: str
    run: int = 1
    id: str
    fraction: float = 1.0
    subset: str | None = None
    seed: int = 0
    no_verify: bool = False
    workers: int = 1
    engine: str = "processes"
    env: str | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class PublishSettings:
    """Flags of ``sb3x data publish``."""

    dataset: str
    to: str
    token: str | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class DownloadSettings:
    """Flags of ``sb3x data download``."""

    address: str
    token: str | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class ListSettings:
    """``sb3x data list`` has no flags."""


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """Flags of ``sb3x data verify``."""

    dataset: str
    transforms: Sequence[str] | None = None
    build_env: bool = False


@dataclass(frozen=True, kw_only=True)
class ShowSettings:
    """Flags of ``sb3x data show``."""

    dataset: str
    out: Path | None = None
    episode: int | None = None
    frames: int = 12
    transforms: Sequence[str] | None = None
    build_env: bool = False


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Flags of ``sb3x data sample``."""

    dataset: str
    n: int = 10
    seed: int = 0
    out: Path | None = None
    transforms: Sequence[str] | None = None
    build_env: bool = False


Settings = (
    TrainSettings
    | EnjoySettings
    | PlaySettings
    | ConvertSettings
    | PublishSettings
    | DownloadSettings
    | ListSettings
    | VerifySettings
    | ShowSettings
    | SampleSettings
)
"""What the words after ``sb3x`` become."""
