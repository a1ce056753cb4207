"""Saving files so that an older good one survives whatever happens."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Callable
from typing import Any, TypeAlias

from sb3_ext.files import atomic_path

FileLike: TypeAlias = str | pathlib.Path | io.BufferedIOBase


def save_whole(save: Callable[..., None], path: FileLike, suffix: str, **kwargs: Any) -> None:
    """
    Save a file which appears under its name only when it is complete; an older one stays until then.

    :param save: writes to an open file, ``save(file, **kwargs)``
    :param path: file name, or an open file, which is written to as it is
    :param suffix: is added to a name that has none
    """
    if not isinstance(path, (str, pathlib.Path)):
        save(path, **kwargs)
        return
    final = pathlib.Path(path)
    with atomic_path(final if final.suffix else final.with_suffix(suffix)) as partial, partial.open("wb") as file:
        save(file, **kwargs)
