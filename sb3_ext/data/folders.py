"""Folders of datasets: filled out of sight, locked, moved to their place in one step."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from minari.namespace import create_namespace, list_local_namespaces
from minari.storage.datasets_root_dir import get_dataset_path

from sb3_ext.data.checks import DatasetError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk, a used-up quota, and a file that is larger than may be."""


def write_file(path: Path, data: bytes | memoryview) -> None:
    """
    Write a file that appears under its name only when it is complete.

    :param path: the file
    :param data: its contents
    """
    partial = path.with_name(f".{path.name}.part")
    partial.write_bytes(data)
    os.replace(partial, path)


def _old(new: Path) -> Path:
    return new.with_name(new.name + ".old")


def replace_folder(new: Path, final: Path) -> None:
    """
    Move a finished folder to its place; an older one is removed only after that.

    :param new: the finished folder, on the same file system
    :param final: its place
    """
    old = _old(new)
    if final.exists():
        os.replace(final, old)
    try:
        os.replace(new, final)
    except BaseException:
        if old.exists():
            os.replace(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(new: Path, final: Path) -> None:
    """
    Put right what a :func:`replace_folder` that was killed in the middle left behind.

    :param new: as then
    :param final: as then
    """
    old = _old(new)
    if old.exists() and not final.exists():
        os.replace(old, final)
    shutil.rmtree(old, ignore_errors=True)


def remove_empty(folder: Path) -> None:
    """
    Remove a folder, and those above it in Minari's root, as far as they are empty.

    :param folder: the lowest of them
    """
    root = Path(get_dataset_path())
    while folder != root and root in folder.parents:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent


def ensure_namespace(namespace: str | None) -> None:
    """
    Make a namespace known to Minari.

    :param namespace: its name; None for datasets that have none
    """
    if namespace is not None and namespace not in list_local_namespaces():
        create_namespace(namespace)


@contextmanager
def lock_folder(final: Path, busy: str) -> Iterator[None]:
    """
    Keep other processes from filling the same folder.

    :param final: the folder, which need not exist
    :param busy: what to say if another process is at it
    :raises DatasetError: in that case
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(final.with_name(f".{final.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DatasetError(busy) from error
    try:
        yield
    finally:
        lock.release()


def _no_space(folder: Path, needed: int, about: str) -> DatasetError:
    return DatasetError(
        f"The disk of {folder} is full: {about}{needed:,} bytes are needed in all, "
        f"{shutil.disk_usage(folder).free:,} are free. Nothing is lost; make room and run it again."
    )


def check_space(folder: Path, needed: int) -> None:
    """
    Look whether something fits on the disk before it is written.

    :param folder: a folder on the disk
    :param needed: bytes needed in all
    :raises DatasetError: if it does not fit
    """
    if needed > shutil.disk_usage(folder).free:
        raise _no_space(folder, needed, "")


@contextmanager
def full_disk(folder: Path, needed: int) -> Iterator[None]:
    """
    Say how many bytes are needed when the disk is full.

    :param folder: a folder on the disk
    :param needed: bytes needed in all, about
    :raises DatasetError: instead of the system's error
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise _no_space(folder, needed, "about ") from error
