"""``sb3x data``: make datasets."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from sb3_ext.data import (
    check_new_dataset,
    convert_dqn_replay,
    default_keys,
    describe_keys,
    download,
    list_datasets,
    parse_keys,
    play_episodes,
    publish,
    sample_transitions,
    show_dataset,
    verify_dataset,
    write_dataset,
)
from sb3_ext.zoo.config import one_line_errors
from sb3_ext.zoo.tasks import check_env_id, make_env


def play(args: argparse.Namespace, words: list[str]) -> None:
    """
    Let a person play an environment and write the episodes as a dataset.

    :param args: the command line's flags
    :param words: the command line
    :raises ZooError: if something is wrong that the user can put right; always before the first game, except that a
        dataset cannot be written
    """
    check_env_id(args.env_id)
    with one_line_errors():
        env = make_env(args.env_id, render_mode="rgb_array")
        check_new_dataset(args.id, env, overwrite=args.overwrite)
        keys = parse_keys(args.keys) if args.keys else default_keys(env)
        episodes = play_episodes(env, args.episodes, keys=keys, fps=args.fps, size=args.size, seed=args.seed)
    if not episodes:
        print("No episode was finished; nothing is written.")
        return
    steps = sum(len(e.rewards) for e in episodes)
    with one_line_errors():
        dataset = write_dataset(
            args.id,
            episodes,
            env,
            algorithm_name="human",
            author=args.author,
            description=f"{len(episodes)} episodes ({steps} steps) of {args.env_id} by a person at the keyboard.",
            metadata={"keys": describe_keys(keys)},
            overwrite=args.overwrite,
        )
    env.close()
    returns = dataset.storage.metadata["behaviour_return"]
    print(f"{args.id}: {len(episodes)} episodes, {steps} steps, mean return {returns['mean']:.1f}")


def convert(args: argparse.Namespace, words: list[str]) -> None:
    """
    Convert a log of the DQN Replay Dataset's format to a Minari dataset.

    :param args: the command line's flags
    :param words: the command line
    :raises ZooError: if something is wrong that the user can put right
    """
    if args.env:
        check_env_id(args.env)
    subset = args.subset or ("author" if args.fraction < 1 else None)
    with one_line_errors():
        dataset = convert_dqn_replay(
            args.folder,
            args.id,
            game=args.game,
            run=args.run,
            subset=subset,
            fraction=args.fraction,
            seed=args.seed,
            verify=not args.no_verify,
            workers=args.workers,
            engine=args.engine,
            env=make_env(args.env) if args.env else None,
            overwrite=args.overwrite,
            report=print,
        )
    metadata = dataset.storage.metadata
    for note in metadata["notes"]:
        print(f"note: {note}")
    returns = metadata["behaviour_return"]
    print(
        f"{args.id}: {dataset.total_episodes} episodes, {dataset.total_steps} steps, mean return {returns['mean']:.1f}"
    )


def publish_command(args: argparse.Namespace, words: list[str]) -> None:
    """
    Publish a dataset of this machine.

    :param args: the command line's flags
    :param words: the command line
    :raises ZooError: if something is wrong that the user can put right
    """
    with one_line_errors():
        address = publish(args.dataset, args.to, overwrite=args.overwrite, token=args.token, report=print)
    print(f"published; get it with: sb3x data download {address}")


def download_command(args: argparse.Namespace, words: list[str]) -> None:
    """
    Download a dataset.

    :param args: the command line's flags
    :param words: the command line
    :raises ZooError: if something is wrong that the user can put right
    """
    with one_line_errors():
        dataset_id = download(args.address, overwrite=args.overwrite, token=args.token, report=print)
    print(f"{dataset_id} is here; every file is verified")


def list_(args: argparse.Namespace, words: list[str]) -> None:
    """
    Print a table of the datasets on this machine.

    :param args: the command line's flags
    :param words: the command line
    """
    rows = list_datasets()
    if not rows:
        print("There are no datasets on this machine.")
        return
    table = [("id", "episodes", "steps", "mean return", "MB")]
    for row in rows:
        if "damage" in row:
            table.append((row["id"], f"metadata cannot be read ({row['damage']})", "", "", ""))
            continue
        mean, size = row["mean_return"], row["megabytes"]
        table.append(
            (
                row["id"],
                f"{row['episodes']:,}",
                f"{row['steps']:,}",
                "-" if mean is None else f"{mean:.2f}",
                "-" if size is None else f"{size:.1f}",
            )
        )
    widths = [max(len(line[k]) for line in table) for k in range(5)]
    for line in table:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        print("  ".join(cells).rstrip())


def show(args: argparse.Namespace, words: list[str]) -> None:
    """
    Draw an episode and the histogram of returns.

    :param args: the command line's flags
    :param words: the command line
    :raises ZooError: if something is wrong that the user can put right
    """
    path = args.out or Path(f"{args.dataset.strip('/').replace('/', '-')}.png")
    with one_line_errors():
        print(f"Written: {show_dataset(args.dataset, path, episode=args.episode, frames=args.frames)}")


def verify(args: argparse.Namespace, words: list[str]) -> int:
    """
    Check a dataset and say whether CQL can be expected to learn from it.

    :param args: the command line's flags
    :param words: the command line
    :return: exit code: 1 if the dataset has errors
    :raises ZooError: if there is no such dataset
    """
    with one_line_errors():
        report = verify_dataset(args.dataset)
    print(report)
    return 0 if report.ok else 1


def sample(args: argparse.Namespace, words: list[str]) -> None:
    """
    Print a few transitions, or write them to a file.

    :param args: the command line's flags
    :param words: the command line
    :raises ZooError: if something is wrong that the user can put right
    """
    with one_line_errors():
        transitions = sample_transitions(args.dataset, args.n, args.seed)
        if args.out is None:
            print("\n".join(transitions.lines()))
            return
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("wb") as file:
            np.savez_compressed(file, **vars(transitions))
    print(f"{len(transitions.rewards)} transitions written: {args.out}")
