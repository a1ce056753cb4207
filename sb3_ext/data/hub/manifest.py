"""The manifest of a published dataset: names, sizes and SHA-256 of its files, and what names it may hold."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from minari.dataset.minari_dataset import DATASET_ID_RE

from sb3_ext.data.checks import DatasetError

MANIFEST, CARD, PICTURE = "manifest.json", "README.md", "returns.png"
METADATA = "data/metadata.json"
SUFFIXES = (".arrow", ".hdf5", ".json", ".parquet")
"""What Minari's storages consist of. None of it is code, and none of it is unpickled."""

_VERSION = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


@dataclass(frozen=True)
class File:
    """
    What a file must be.

    :param size: in bytes
    :param sha256: of its contents, hexadecimal
    """

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """
    All files of a published dataset but the manifest.

    :param dataset_id: ``namespace/name-v0``
    :param files: by name, relative to the dataset's folder, with slashes
    """

    dataset_id: str
    files: Mapping[str, File]

    def dump(self) -> bytes:
        """Return the contents of ``manifest.json``, which carry a checksum of their own."""
        return json.dumps(_with_digest(self), indent=1).encode() + b"\n"


def describe(path: Path) -> File:
    """
    Read a file's size and checksum.

    :param path: the file
    :return: both
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return File(path.stat().st_size, digest)


def matches(path: Path, wanted: File) -> bool:
    """
    Compare a file with what it must be.

    :param path: the file, which need not exist
    :param wanted: from the manifest
    :return: whether it is there and the same
    """
    return path.is_file() and path.stat().st_size == wanted.size and describe(path) == wanted


def check_names(names: Mapping[str, Any], where: str) -> None:
    """
    Refuse file names that a dataset does not have, above all those that lead out of its folder.

    :param names: relative to the dataset's folder, with slashes
    :param where: for the message
    :raises DatasetError: naming the first of them
    """
    seen: dict[str, str] = {}
    for name in names:
        path = PurePosixPath(name)
        plain = all(_PART.fullmatch(part) for part in name.split("/")) and len(name) <= 500
        data = path.parts[:1] == ("data",) and len(path.parts) > 1 and path.suffix in SUFFIXES
        if not plain or not (data or name in (CARD, PICTURE)):
            raise DatasetError(
                f"{where} holds {name!r}, which is refused: a dataset has {CARD}, {PICTURE} and files below data/ that "
                f"end in {', '.join(SUFFIXES)}."
            )
        if name.casefold() in seen:
            raise DatasetError(f"{where}: {name!r} and {seen[name.casefold()]!r} are one file on some systems.")
        seen[name.casefold()] = name
    for name in seen:
        if any(parent.as_posix() in seen for parent in PurePosixPath(name).parents):
            raise DatasetError(f"{where}: {seen[name]!r} lies in another file.")


def _with_digest(manifest: Manifest) -> dict[str, Any]:
    content = {
        "manifest_version": _VERSION,
        "dataset_id": manifest.dataset_id,
        "files": {name: {"size": f.size, "sha256": f.sha256} for name, f in sorted(manifest.files.items())},
    }
    return content | {"sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def parse_manifest(data: bytes, where: str) -> Manifest:
    """
    Read a manifest, trusting nothing in it.

    :param data: contents of ``manifest.json``
    :param where: address of the dataset, for the message
    :return: the manifest
    :raises DatasetError: if it is damaged, of a later version, or names files that no dataset has
    """
    try:
        content = json.loads(data, object_pairs_hook=_unique)
        if content["manifest_version"] != _VERSION:
            raise ValueError(f"its version is {content['manifest_version']!r}; update sb3_ext if it is later than 1")
        files = {name: File(**file) for name, file in content["files"].items()}
        if not all(type(f.size) is int and f.size >= 0 and _SHA256.fullmatch(f.sha256) for f in files.values()):
            raise ValueError("a size or checksum is none")
        match = DATASET_ID_RE.fullmatch(content["dataset_id"])
        if match is None or match["version"] is None:
            raise ValueError(f"{content['dataset_id']!r} is no dataset id")
        manifest = Manifest(content["dataset_id"], files)
        if _with_digest(manifest) != content:
            raise ValueError("its own checksum is wrong")
        if METADATA not in files:
            raise ValueError(f"{METADATA} is missing")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DatasetError(f"{where}: {MANIFEST} is damaged ({reason}). Ask its publisher to publish again.") from error
    check_names(files, f"{where}: {MANIFEST}")
    return manifest


def differences(folder: Path) -> list[str] | None:
    """
    Compare a downloaded dataset with the manifest beside it.

    :param folder: of the dataset
    :return: a sentence for each file that is not as it was published; None if there is no manifest
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = parse_manifest(path.read_bytes(), str(folder))
    except DatasetError as error:
        return [str(error)]
    found = []
    for name, file in manifest.files.items():
        if not matches(folder / name, file):
            how = "its SHA-256 is another" if (folder / name).is_file() else "it is missing"
            found.append(f"{folder / name} is not the file that was published: {how}. Download the dataset again.")
    return found
