"""``sb3x data list``, ``show``, ``verify`` and ``sample``: look at datasets."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from sb3_ext.data import list_datasets, sample_transitions, show_dataset, verify_dataset
from sb3_ext.zoo.config import one_line_errors


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
