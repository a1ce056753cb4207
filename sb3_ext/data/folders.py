"""Folders of datasets: their namespaces and locks, and room for them on the disk."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from minari.namespace import create_namespace, list_local_namespaces
from minari.storage.datasets_root_dir import get_dataset_path

from sb3_ext.data.checks import DatasetError
from sb3_ext.files import atomic_folder

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk, a used-up quota, and a file that is larger than may be."""


def _remove_empty(folder: Path) -> None:
    """Remove a folder, and those above it in Minari's root, as far as they are empty."""
    root = Path(get_dataset_path())
    with suppress(OSError):  # one is not empty
        while root in folder.parents:
            folder.rmdir()
            folder = folder.parent


@contextmanager
def dataset_folder(final: Path) -> Iterator[Path]:
    """Fill a dataset's folder out of sight, all or nothing: on failure no empty namespace is left either."""
    try:
        with atomic_folder(final) as partial:
            yield partial
    except BaseException:
        _remove_empty(final.parent)
        raise


def ensure_namespace(namespace: str | None) -> None:
    """Make a namespace known to Minari; None is that of datasets that have none."""
    if namespace is not None and namespace not in list_local_namespaces():
        create_namespace(namespace)


@contextmanager
def lock_folder(final: Path, busy: str) -> Iterator[None]:
    """
    Keep other processes from filling the same folder, which need not exist.

    :raises DatasetError: saying ``busy``, if another process is at it
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(final.with_name(f".{final.name}.lock")).acquire(timeout=0)
    except Timeout as error:
        raise DatasetError(busy) from error
    with held:
        yield


def _no_space(folder: Path, needed: int, about: str) -> DatasetError:
    return DatasetError(
        f"The disk of {folder} is full: {about}{needed:,} bytes are needed in all, "
        f"{shutil.disk_usage(folder).free:,} are free. Nothing is lost; make room and run it again."
    )


def check_space(folder: Path, needed: int) -> None:
    """Refuse to write so many bytes in all if they do not fit on the folder's disk."""
    if needed > shutil.disk_usage(folder).free:
        raise _no_space(folder, needed, "")


@contextmanager
def full_disk(folder: Path, needed: int) -> Iterator[None]:
    """Say about how many bytes are needed in all, instead of the system's error, when the folder's disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise _no_space(folder, needed, "about ") from error
