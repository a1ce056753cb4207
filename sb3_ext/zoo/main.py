"""The command line ``sb3x``: rl_zoo3's flags and log folders for the algorithms of sb3_ext."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias, assert_never

from sb3_ext import __version__
from sb3_ext.data import ENGINES, SUBSETS, TRANSFORMS
from sb3_ext.zoo import data
from sb3_ext.zoo.config import ZooError
from sb3_ext.zoo.settings import (
    AgentSettings,
    ConvertSettings,
    DownloadSettings,
    EnjoySettings,
    ListSettings,
    PlaySettings,
    PublishSettings,
    SampleSettings,
    Settings,
    ShowSettings,
    TrainSettings,
    VerifySettings,
)

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _verb(verbs: Verbs, name: str, help_text: str, settings: type[Settings]) -> argparse.ArgumentParser:
    """Add a command; flags that are not given are left to the defaults of its settings."""
    parser = verbs.add_parser(name, help=help_text, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.set_defaults(settings=settings)
    return parser


def _steps(text: str) -> int:
    """Read ``1000000`` or ``1e6``."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not value.is_integer():
            raise
        return int(value)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    help_text = f"what to make of the data, in order: {', '.join(TRANSFORMS)}; see docs"
    parser.add_argument("--transforms", nargs="+", metavar="NAME", help=help_text)
    parser.add_argument("--build-env", action="store_true", help="build the environment if only it knows the spaces")


def _add_common(parser: argparse.ArgumentParser, folder: tuple[str, ...]) -> None:
    known = "bc, cql, dqn, efficientzero, gail, qrdqn"
    parser.add_argument("--algo", required=True, help=f"algorithm: {known}, or another one that is installed")
    parser.add_argument("--env", help="environment id, for instance CartPole-v1")
    parser.add_argument("--dataset", help="id or path of a Minari dataset")
    _add_reading(parser)
    parser.add_argument(*folder, help="log folder (default: logs)")
    parser.add_argument("--device", help="PyTorch device: cpu, cuda, auto (default)")
    parser.add_argument("--num-threads", type=int, help="threads for PyTorch (default -1: PyTorch's choice)")
    parser.add_argument("-P", "--progress", action="store_true", help="show a progress bar")
    parser.add_argument("--verbose", type=int, help="0: quiet, 1: messages (default), 2: tracebacks too")


def _add_train(verbs: Verbs) -> None:
    parser = _verb(verbs, "train", "train an agent", TrainSettings)
    add = parser.add_argument
    _add_common(parser, ("-f", "--log-folder"))
    add("-n", "--n-timesteps", type=_steps, help="steps; gradient steps if learning from a dataset")
    add("-tb", "--tensorboard-log", metavar="DIR", help="TensorBoard folder")
    add("--seed", type=int, help="seed (default: random)")
    add("--eval-freq", type=_steps, help="steps between evaluations; negative for none (default 25000, see docs)")
    add("--eval-episodes", type=int, help="episodes per evaluation (default 5)")
    add("--n-eval-envs", type=int, help="copies of the evaluation environment (default 1)")
    add("--validation", type=float, metavar="SHARE", help="evaluate on this share of the episodes, learn from the rest")
    add("--validation-freq", type=_steps, help="steps between evaluations on them (default: n/20)")
    add("--validation-criterion", metavar="NAME", help="what the best model is chosen by (default: see docs)")
    add("--save-freq", type=_steps, help="steps between checkpoints (default: none; with --resume n/20)")
    add("--save-replay-buffer", action="store_true", help="save the replay buffer too (always with --resume)")
    add("--log-interval", type=int, help="as in learn(); -1: the algorithm's default, -2: no logging")
    more = parser.add_mutually_exclusive_group()
    more.add_argument("-i", "--trained-agent", metavar="ZIP", help="train this model for n more steps, in a new run")
    more.add_argument("--resume", action="store_true", help="continue the latest run until it has n steps in all")
    add("-params", "--hyperparams", nargs="+", metavar="KEY:VALUE", help="override hyper-parameters, values in YAML")
    add("-conf", "--conf-file", metavar="YML", help="hyper-parameters to use instead of the stored ones")
    add("-uuid", "--uuid", action="store_true", help="add a unique id to the run's folder")
    add("--dry-run", action="store_true", help="print the configuration as YAML and stop")


def _add_enjoy(verbs: Verbs) -> None:
    parser = _verb(verbs, "enjoy", "play with a trained agent", EnjoySettings)
    add = parser.add_argument
    _add_common(parser, ("-f", "--folder"))
    add("-n", "--n-timesteps", type=_steps, help="steps to play (default 1000)")
    add("--exp-id", type=int, help="number of the run (default 0: the latest)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--load-best", action="store_true", help="play the best model instead of the last")
    which.add_argument("--load-checkpoint", type=int, metavar="STEPS", help="play this checkpoint")
    which.add_argument("--load-last-checkpoint", action="store_true", help="play the last checkpoint")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--stochastic", action="store_true", help="exploring actions (default for Atari games)")
    how.add_argument("--deterministic", action="store_true", help="greedy actions (default for everything else)")
    show = parser.add_mutually_exclusive_group()
    show.add_argument("--render", action="store_true", help="open a window if there is a display")
    show.add_argument("--no-render", action="store_true", help="open no window (default)")
    show.add_argument("--video", metavar="FILE", help="write FILE.gif or FILE.mp4")
    add("--seed", type=int, help="seed (default 0)")
    add("--n-envs", type=int, help="copies of the environment (default 1)")


def _add_play(verbs: Verbs) -> None:
    add = _verb(verbs, "play", "play with the keyboard and keep the episodes", PlaySettings).add_argument
    add("env_id", metavar="ENV", help="environment id, for instance CartPole-v1")
    add("--id", required=True, help="id of the new dataset, for instance cartpole/human-v0")
    add("--episodes", type=int, help="episodes to play (default 10)")
    add("--fps", type=float, help="steps per second (default 15 for Atari games, else the environment's, 30 at most)")
    add("--keys", nargs="+", metavar="NAME:ACTION", help="left:0 right:1 up+space:2 none:3; default: see docs")
    add("--size", type=int, help="height of the window in pixels (default 600)")
    add("--seed", type=int, help="seed of the first episode (default 0)")
    add("--author", help="who plays, for the metadata")
    add("--overwrite", action="store_true", help="replace a dataset of the same id")


def _add_convert(verbs: Verbs) -> None:
    help_text = "convert a log of the DQN Replay Dataset's format"
    add = _verb(verbs, "convert-dqn-replay", help_text, ConvertSettings).add_argument
    add("folder", metavar="DIR", help="holds <Game>/<run>/replay_logs")
    add("--game", required=True, help="for instance Breakout")
    add("--run", type=int, help="number of the run (default 1)")
    add("--id", required=True, help="id of the new dataset, for instance atari/breakout/dqn-replay-1pct-v0")
    add("--fraction", type=float, help="share of the rows (default: everything)")
    add("--subset", choices=SUBSETS, help="which rows (default author: the first ones of each file)")
    add("--seed", type=int, help="seed of the draw of episodes (default 0)")
    add("--no-verify", action="store_true", help="stop after the last row needed instead of checking checksums")
    add("--workers", type=int, help="files to convert at the same time (default 1)")
    add("--engine", choices=ENGINES, help="what runs the workers (default processes; ray: see docs)")
    add("--env", help="environment the log was made in (default: the Atari game)")
    add("--overwrite", action="store_true", help="replace a dataset of the same id")


def _add_looks(verbs: Verbs) -> None:
    """Commands that look at datasets and change nothing."""

    def add(name: str, help_text: str, settings: type[Settings]) -> argparse.ArgumentParser:
        parser = _verb(verbs, name, help_text, settings)
        parser.add_argument("dataset", metavar="DATASET", help="id or path of a Minari dataset")
        return parser

    _verb(verbs, "list", "list the datasets on this machine", ListSettings)
    help_text = "check a dataset, and whether CQL can be expected to learn from it; exit code 1 on errors"
    _add_reading(add("verify", help_text, VerifySettings))
    show = add("show", "draw an episode and the histogram of returns", ShowSettings)
    _add_reading(show)
    show.add_argument("--out", type=Path, metavar="PNG", help="picture to write (default: named after the dataset)")
    show.add_argument("--episode", type=int, help="number of the episode (default: the best)")
    show.add_argument("--frames", type=int, help="frames to draw (default 12)")
    sample = add("sample", "print transitions as JSON lines", SampleSettings)
    _add_reading(sample)
    sample.add_argument("-n", type=int, help="how many (default 10)")
    sample.add_argument("--seed", type=int, help="seed of the draw (default 0)")
    sample.add_argument("--out", type=Path, metavar="NPZ", help="write arrays there instead, pictures included")


def _add_hub(verbs: Verbs) -> None:
    token = "access token (default: HF_TOKEN or `hf auth login`); for gs:// the path of a key file"
    add = _verb(verbs, "publish", "publish a dataset with checksums and a card", PublishSettings).add_argument
    add("dataset", metavar="ID", help="id or path of a dataset on this machine")
    add("--to", required=True, metavar="PLACE", help="hf://user, hf://user/repository, gs://bucket/folder or a folder")
    add("--token", help=token)
    add("--overwrite", action="store_true", help="replace the dataset that is there")
    add = _verb(verbs, "download", "download a dataset and verify every file", DownloadSettings).add_argument
    add("address", metavar="ADDRESS", help="hf://user/namespace/name-v0, or a gs:// or file:// address, or a folder")
    add("--token", help=token)
    add("--overwrite", action="store_true", help="replace a dataset of the same id")


def parse(words: Sequence[str]) -> Settings:
    """Read the words after ``sb3x``; help, the version and mistakes end the process."""
    parser = argparse.ArgumentParser("sb3x", description="Train and watch agents.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"sb3-ext {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(verbs)
    _add_enjoy(verbs)
    group = verbs.add_parser("data", help="make, look at, publish and download datasets", allow_abbrev=False)
    datasets = group.add_subparsers(required=True, metavar="COMMAND")
    _add_play(datasets)
    _add_convert(datasets)
    _add_hub(datasets)
    _add_looks(datasets)
    flags = vars(parser.parse_args(words))
    kind: type[Settings] = flags.pop("settings")
    return kind(**flags)


def _run(settings: Settings, words: list[str]) -> int:
    """Run a command and give its exit code; only training and playing import PyTorch."""
    match settings:
        case TrainSettings():
            from sb3_ext.zoo.train import train

            train(settings, words)
        case EnjoySettings():
            from sb3_ext.zoo.enjoy import enjoy

            enjoy(settings)
        case PlaySettings():
            data.play_command(settings)
        case ConvertSettings():
            data.convert_command(settings)
        case PublishSettings():
            data.publish_command(settings)
        case DownloadSettings():
            data.download_command(settings)
        case ListSettings():
            data.list_command()
        case VerifySettings():
            return data.verify_command(settings)
        case ShowSettings():
            data.show_command(settings)
        case SampleSettings():
            data.sample_command(settings)
        case _:
            assert_never(settings)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command line.

    :param argv: the words after ``sb3x``; default those of the process
    :return: exit code: 0, 1 if a dataset has errors, 2 for a mistake of the user's, 130 if interrupted without saving
    """
    words = list(sys.argv[1:] if argv is None else argv)
    settings = parse(words)
    try:
        return _run(settings, words)
    except ZooError as error:
        if isinstance(settings, AgentSettings) and settings.verbose > 1:
            traceback.print_exc()
        else:
            print(f"sb3x: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sb3x: interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
