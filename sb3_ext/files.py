"""
The one writer of files and folders: whatever happens, the old or the new one is there, whole and on the disk.

Everything is written under a hidden name beside its place, flushed to the disk, and moved there in one step.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DAY = 86_400
"""Seconds after which nobody is still writing a file."""

_LEFTOVER = re.compile(r"\.(.+)\.[0-9a-f]{32}(\.[^.]*)?")
_UNFLUSHED = (errno.EINVAL, errno.ENOTSUP)
"""What network drives answer that cannot flush a folder."""


def _hidden(name: str, suffix: str = "") -> str:
    return f".{name}.{uuid.uuid4().hex}{suffix}"


def sync(path: Path) -> None:
    """Flush a file, or the list of names in a folder, to the disk."""
    is_folder, windows = path.is_dir(), os.name == "nt"
    if is_folder and windows:  # it has no such thing
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in _UNFLUSHED:
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush a folder with everything in it to the disk."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(place, name))
        sync(Path(place))


def make_folder(folder: Path) -> None:
    """Make a folder, which may exist, and those above it that are missing, so that they outlast a crash."""
    missing = [place for place in (folder, *folder.parents) if not place.is_dir()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in missing:
        sync(place.parent)


@contextmanager
def atomic_path(path: str | os.PathLike[str], *, flush: bool = True) -> Iterator[Path]:
    """
    Give a temporary name beside ``path``; on success move the file there, on failure remove it.

    The content is flushed to disk before the move, so after a crash ``path`` is either the old or the new file. With
    ``flush=False`` the caller flushes it before anything relies on it, for many files at a time. The name has the same
    suffix; missing folders are made.
    """
    final = Path(path)
    make_folder(final.parent)
    partial = final.with_name(_hidden(final.stem, final.suffix))
    try:
        yield partial
        if flush:
            sync(partial)
        os.replace(partial, final)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if flush:
        sync(final.parent)


def write_file(path: Path, data: bytes | memoryview, *, flush: bool = True) -> None:
    """Write a file that appears under its name only when it is complete; ``flush`` as in :func:`atomic_path`."""
    with atomic_path(path, flush=flush) as partial:
        partial.write_bytes(data)


def move_into(path: Path, target: Path) -> None:
    """
    Move a finished file to its name in a folder that is not in its own place yet; missing folders are made.

    Nothing is flushed: :func:`replace_folder` does that for the whole folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, target)


def work_folder(final: Path, purpose: str) -> Path:
    """Name the hidden folder beside ``final`` in which work goes on after a kill; one process at a time may use it."""
    return final.with_name(f".{final.name}-{purpose}")


@contextmanager
def atomic_folder(path: Path, good: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """
    Give a new hidden folder beside ``path`` to fill; on success move it there, on failure remove it.

    Several processes may do this at the same time. ``good`` says whether a folder that is there already may stay
    instead of the new one; by default it never does. Missing folders above it are made.
    """
    make_folder(path.parent)
    partial = path.with_name(_hidden(path.name))
    partial.mkdir()
    try:
        yield partial
        if good is None:
            replace_folder(partial, path)
        else:
            sync_tree(partial)
            try:
                os.replace(partial, path)
            except OSError:
                if not good(path):  # else another process was faster
                    replace_folder(partial, path, synced=True)
            else:
                sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _old(new: Path) -> Path:
    return new.with_name(new.name + ".old")


def _discard_old(new: Path) -> None:
    """Remove the folder that was replaced, first its name: half of it must never be put back."""
    old, gone = _old(new), new.with_name(new.name + ".gone")
    shutil.rmtree(gone, ignore_errors=True)
    if old.exists():
        os.replace(old, gone)
        shutil.rmtree(gone, ignore_errors=True)


def replace_folder(new: Path, final: Path, *, synced: bool = False) -> None:
    """
    Flush a finished folder, beside its place, and move it there; an older one is removed only after that.

    ``synced`` says that everything in it is on the disk already.
    """
    if not synced:
        sync_tree(new)
    old = _old(new)
    if final.exists():
        _discard_old(new)
        os.replace(final, old)
    try:
        os.replace(new, final)
    except BaseException:
        if old.exists():
            os.replace(old, final)
        raise
    sync(final.parent)
    _discard_old(new)


def recover_folder(new: Path, final: Path) -> None:
    """Put right what a :func:`replace_folder` of the same folders that was killed in the middle left behind."""
    old = _old(new)
    if old.exists() and not final.exists():
        os.replace(old, final)
        sync(final.parent)
    _discard_old(new)


def _changed(path: Path) -> float:
    """When a file, or anything in a folder, was last changed; a move counts for a folder that was set aside."""
    if path.suffix == ".old":
        return path.stat().st_ctime
    return max(found.lstat().st_mtime for found in (path, *path.rglob("*")))


def _remove_leftover(path: Path, name: str) -> None:
    if not path.is_dir() or path.is_symlink():
        path.unlink()
    elif path.suffix == ".old":
        recover_folder(path.with_suffix(""), path.with_name(name))
    else:
        shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(folder: Path, age: float = DAY, *, deep: bool = False) -> None:
    """
    Remove what killed processes left behind, and put back a folder whose replacement never came.

    Only names that this module gives are touched, and only what nobody has changed for ``age`` seconds (0: no other
    process writes here). What may not be removed stays, for example another user's. The folder need not exist; those
    below it are looked through if ``deep``.
    """
    for place, folders, names in os.walk(folder):
        for match in filter(None, map(_LEFTOVER.fullmatch, (*folders, *names))):
            path = Path(place, match[0])
            with suppress(OSError):  # its process has just finished it, or it is another user's
                if not age or _changed(path) < time.time() - age:
                    _remove_leftover(path, match[1])
        if not deep:
            break
        folders[:] = [name for name in folders if not _LEFTOVER.fullmatch(name)]
