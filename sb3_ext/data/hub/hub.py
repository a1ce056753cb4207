"""Publish datasets with checksums and a card; download them whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

from minari.dataset.minari_dataset import DATASET_ID_RE
from minari.storage.datasets_root_dir import get_dataset_path

from sb3_ext.data.checks import DatasetError
from sb3_ext.data.folders import check_space, ensure_namespace, full_disk, lock_folder
from sb3_ext.data.hub.card import write_card
from sb3_ext.data.hub.manifest import MANIFEST, METADATA, Manifest, check_names, describe, matches, parse_manifest
from sb3_ext.data.hub.remotes import FolderRemote, NotPublished, Remote, open_remote
from sb3_ext.data.source import DatasetLike, Source, open_source
from sb3_ext.data.write import check_new_id
from sb3_ext.files import move_into, recover_folder, replace_folder, work_folder, write_file

Report = Callable[[str], None]
_LARGE = 1 << 26
"""Bytes from which a file is fetched alone, in the main thread, so that Ctrl-C stops it at once."""


def _data_files(source: Source) -> dict[str, Path]:
    """The files of a dataset on this machine, by the names they get."""
    files: dict[str, Path] = {}
    for path in source.path.rglob("*"):
        if path.is_symlink():
            raise DatasetError(f"{path} is a symbolic link; put the file itself in its place to publish it.")
        if not path.is_dir():
            files[f"data/{path.relative_to(source.path).as_posix()}"] = path
    check_names(files, str(source.path))
    return dict(sorted(files.items()))


def _local_source(dataset: DatasetLike) -> Source:
    """Open a dataset that shall be published; unlike elsewhere, an id that is not on this machine is not downloaded."""
    if isinstance(dataset, str) and not Path(dataset).exists() and not get_dataset_path(dataset).exists():
        raise DatasetError(f"The dataset {dataset!r} is not on this machine; `minari list local` shows those that are.")
    source = open_source(dataset)
    match = DATASET_ID_RE.fullmatch(source.name)
    if match is None or match["version"] is None:
        raise DatasetError(f"{source.path}: its dataset_id {source.name!r} does not look like 'namespace/name-v0'.")
    if len(source.episodes) != source.metadata["total_episodes"]:
        raise ValueError(
            f"Only {len(source.episodes)} of {source.metadata['total_episodes']} episodes of {source.name} are "
            "selected, but datasets are published whole. Write the selection as a dataset of its own."
        )
    return source


def publish(
    dataset: DatasetLike,
    remote: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    token: str | None = None,
    report: Report | None = None,
) -> str:
    """
    Publish a dataset of this machine with a card and a manifest of checksums.

    Every episode is read and checked first. On the Hub the dataset appears in one commit, in a folder at once, and in a
    bucket with the manifest last. The dataset on this machine is not changed.

    :param dataset: a ``MinariDataset``, an id or a path
    :param remote: where: ``hf://user`` (repositories named after the first part of the id, as Minari does),
        ``hf://user/repository``, ``gs://bucket/folder``, ``file:///folder`` or a folder's path. The dataset's id is
        appended if it is not there
    :param overwrite: replace a dataset that is there
    :param token: for the Hub, default ``HF_TOKEN`` or ``hf auth login``; for a bucket the path of a key file
    :param report: receives a line per step of the work
    :return: the address to download from
    :raises DatasetError: if the data is damaged, or the remote cannot be reached, refuses, or is full
    :raises ImportError: if matplotlib or the remote's client is missing; names the extra to install
    :raises ValueError: if the dataset is there already, or only some of its episodes are selected
    """
    say = report or (lambda line: None)
    source = _local_source(dataset)
    where, name = os.fspath(remote).rstrip("/"), source.name
    place = open_remote(where if f"/{where}".endswith(f"/{name}") else f"{where}/{name}", token)
    if not overwrite and place.names():
        raise ValueError(f"{place.address} exists; publish another version, or pass overwrite=True.")
    files = _data_files(source)
    say(f"checking {len(source.episodes)} episodes")
    storage = source.open()
    lengths = source.episode_lengths(storage)
    episodes = source.read(storage, source.episodes, lengths, strict=False)
    returns = [float(episode.rewards.sum(dtype="float64")) for episode in episodes]
    with TemporaryDirectory() as folder:
        size = sum(path.stat().st_size for path in files.values())
        files |= write_card(Path(folder), source, returns, int(lengths.sum()), size, place.address)
        manifest = Manifest(name, {n: describe(path) for n, path in files.items()})
        files[MANIFEST] = Path(folder, MANIFEST)
        files[MANIFEST].write_bytes(manifest.dump())
        say(f"sending {len(files)} files, {size:,} bytes, to {place.address}")
        place.send(files, name)
    return place.address


def _read_manifest(place: Remote) -> tuple[Manifest, bytes]:
    """Fetch and check the manifest, and that the dataset lies where its id says."""
    with TemporaryDirectory() as folder:
        try:
            data = place.fetch(MANIFEST, Path(folder)).read_bytes()
        except NotPublished as error:
            if METADATA in place.names():
                raise DatasetError(
                    f"{place.address} has no {MANIFEST}: it was published without checksums. Publish it with "
                    "`sb3x data publish`, or get it unchecked with `minari download`."
                ) from error
            raise DatasetError(f"{place.address}: there is no dataset. Check the address. ({error})") from error
    manifest = parse_manifest(data, place.address)
    if not place.address.endswith(f"/{manifest.dataset_id}"):
        raise DatasetError(
            f"{place.address} holds the dataset {manifest.dataset_id!r}, which must lie at an address that ends in "
            f"/{manifest.dataset_id}. Check the address, or that nobody changed the place."
        )
    return manifest, data


def _fetch_all(place: Remote, manifest: Manifest, staging: Path, say: Report) -> None:
    """Bring every file into the staging folder; those that are there and right are not fetched again."""
    missing = [name for name, file in manifest.files.items() if not matches(staging / name, file)]
    if len(missing) < len(manifest.files):
        say(f"{len(manifest.files) - len(missing)} of {len(manifest.files)} files are here already")
    needed = sum(manifest.files[name].size for name in missing)
    check_space(staging, needed)
    fetched = staging / ".fetched"

    def fetch(name: str) -> str:
        path = place.fetch(name, fetched)
        found, wanted = describe(path), manifest.files[name]
        if found != wanted:
            path.unlink()
            kind = f"has {found.size:,} bytes instead of {wanted.size:,}" if found.size != wanted.size else "is damaged"
            raise DatasetError(
                f"{place.address}: {name} {kind}: its SHA-256 is not that of the manifest. Try again; if that does "
                "not help, ask its publisher to publish it again."
            )
        move_into(path, staging / name)
        return name

    small = [name for name in missing if manifest.files[name].size < _LARGE]
    pool = ThreadPoolExecutor(place.workers)
    try:
        with full_disk(staging.parent, needed):
            for name in chain(pool.map(fetch, small), map(fetch, sorted(set(missing) - set(small)))):
                say(f"{name}: {manifest.files[name].size:,} bytes, verified")
    finally:
        pool.shutdown(cancel_futures=True)


def _keep_only(staging: Path, manifest: Manifest) -> None:
    """Remove what is not in the manifest, such as files of another version and what the clients left."""
    for path in sorted(staging.rglob("*"), reverse=True):  # what is in a folder comes before it
        if not path.is_dir():
            if path.relative_to(staging).as_posix() not in manifest.files:
                path.unlink()
        elif not any(path.iterdir()):
            path.rmdir()


def download(
    remote: str | os.PathLike[str], *, overwrite: bool = False, token: str | None = None, report: Report | None = None
) -> str:
    """
    Download a dataset that :func:`publish` published, and check every file of it.

    The dataset appears among Minari's only when each file has the size and SHA-256 of the manifest; until then it lies
    in a hidden folder beside its place. An interrupted call goes on with the files that are not there. Checksums
    show damage, not who published: take datasets from people you trust. Nothing in the dataset is executed, and its
    environment is not built.

    :param remote: ``hf://user/namespace/name-v0`` or whatever else :func:`publish` returned; a folder's path or
        ``file://`` address likewise
    :param overwrite: replace a dataset of the same id
    :param token: as in :func:`publish`
    :param report: receives a line per file
    :return: the dataset's id
    :raises DatasetError: if the remote cannot be reached, refuses, or has no such dataset; if a file is damaged,
        missing or not one that a dataset may have (named); if the disk is full (bytes needed are named)
    :raises ImportError: if the remote's client is missing; names what to install
    :raises ValueError: if a dataset of the same id exists, before its data is transferred
    """
    place = open_remote(remote, token)
    manifest, data = _read_manifest(place)
    name = manifest.dataset_id
    final = get_dataset_path(name)
    if isinstance(place, FolderRemote) and final.resolve() == Path(place.address).resolve():
        raise ValueError(f"{place.address} is the folder of Minari's datasets on this machine; there is nothing to do.")
    check_new_id(name, overwrite)
    staging = work_folder(final, "download")
    with lock_folder(final, f"Another process is downloading or converting to {name}."):
        recover_folder(staging, final)
        namespace, _ = check_new_id(name, overwrite)
        staging.mkdir(exist_ok=True)
        _fetch_all(place, manifest, staging, report or (lambda line: None))
        _check_metadata(staging / METADATA, name, place.address)
        _keep_only(staging, manifest)
        write_file(staging / MANIFEST, data)
        ensure_namespace(namespace)
        with full_disk(final.parent, sum(file.size for file in manifest.files.values())):
            replace_folder(staging, final)
    return name


def _check_metadata(path: Path, name: str, address: str) -> None:
    """Make sure that Minari will list the dataset under its id."""
    try:
        found = json.loads(path.read_bytes())["dataset_id"]
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"{address}: {METADATA} is no metadata of a dataset ({error!r}).") from error
    if found != name:
        raise DatasetError(f"{address}: {METADATA} says it is {found!r}, {MANIFEST} says {name!r}. Refused.")
