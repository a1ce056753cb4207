"""``sb3x data publish`` and ``sb3x data download``."""

from __future__ import annotations

import argparse

from sb3_ext.data import download, publish
from sb3_ext.zoo.config import one_line_errors


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
