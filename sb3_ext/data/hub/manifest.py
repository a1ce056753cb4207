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
    """What a file must be: its size in bytes, and the SHA-256 of its contents, hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All files of a published dataset but the manifest, by name, relative to the dataset's folder, with slashes."""

    dataset_id: str
    files: Mapping[str, File]

    def dump(self) -> bytes:
        """Return the contents of ``manifest.json``, which carry a checksum of their own."""
        content = {
            "manifest_version": _VERSION,
            "dataset_id": self.dataset_id,
            "files": {name: {"size": f.size, "sha256": f.sha256} for name, f in sorted(self.files.items())},
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return json.dumps(content | {"sha256": digest}, indent=1).encode() + b"\n"


def describe(path: Path) -> File:
    """Read a file's size and checksum."""
    with path.open("rb") as file:
        return File(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def matches(path: Path, wanted: File) -> bool:
    """Whether a file is there and is what it must be."""
    return path.is_file() and path.stat().st_size == wanted.size and describe(path) == wanted


def check_names(names: Mapping[str, Any], where: str) -> None:
    """Refuse file names that a dataset does not have, above all those that lead out of its folder."""
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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Read a manifest, trusting nothing in it: neither its version and checksum nor the names of its files."""
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
        if json.loads(manifest.dump()) != content:
            raise ValueError("its own checksum is wrong")
        if METADATA not in files:
            raise ValueError(f"{METADATA} is missing")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DatasetError(f"{where}: {MANIFEST} is damaged ({reason}). Ask its publisher to publish again.") from error
    check_names(files, f"{where}: {MANIFEST}")
    return manifest


def differences(folder: Path) -> list[str] | None:
    """Say of each file of a downloaded dataset how it differs from the manifest; None if there is no manifest."""
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
