"""Where datasets are published: the Hugging Face Hub, Google Cloud Storage, or a folder that people share."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from sb3_ext.data.checks import DatasetError
from sb3_ext.data.folders import FULL, check_space, full_disk, lock_folder
from sb3_ext.data.hub.manifest import MANIFEST
from sb3_ext.files import recover_folder, replace_folder, work_folder

_NAMESPACE = "namespace_metadata.json"
_KEPT = "What is done is kept; run it again to go on."


class NotPublished(DatasetError):
    """There is no such file at the address."""


class Remote(ABC):
    """
    A dataset's folder somewhere else.

    :param address: of the dataset's folder
    """

    workers = 1
    """Files to fetch at the same time."""

    def __init__(self, address: str) -> None:
        self.address = address

    @abstractmethod
    def names(self) -> set[str]:
        """Return the names of the files that are there, relative to the dataset's folder; none if it does not exist."""

    @abstractmethod
    def fetch(self, name: str, folder: Path) -> Path:
        """
        Fetch a file.

        :param name: of the file
        :param folder: where to put it and what is needed to go on after a cut; used again for the same dataset
        :return: the file, somewhere in the folder; its contents are not checked
        :raises NotPublished: if it is not there
        :raises DatasetError: if it cannot be had
        """

    @abstractmethod
    def send(self, files: Mapping[str, Path], dataset_id: str) -> None:
        """
        Publish files as the dataset, in the place of all that is there.

        :param files: by name
        :param dataset_id: of the dataset
        :raises DatasetError: if that fails
        """

    def _missing(self, name: str) -> NotPublished:
        return NotPublished(f"{self.address}: there is no {name}.")


class FolderRemote(Remote):
    """A folder of this machine or of a network drive."""

    @property
    def _root(self) -> Path:
        return Path(self.address)

    def names(self) -> set[str]:
        """List the folder; links are not followed."""
        found = (Path(folder, name) for folder, _, names in os.walk(self._root) for name in names)
        return {path.relative_to(self._root).as_posix() for path in found}

    def fetch(self, name: str, folder: Path) -> Path:
        """Copy a file; refuse symbolic links, which may lead anywhere."""
        source, target = self._root / name, folder / name
        try:
            for path in (source, *source.parents):
                if path == self._root:
                    break
                if path.is_symlink():
                    raise DatasetError(f"{self.address}: {path.relative_to(self._root)} is a symbolic link. Refused.")
            if not stat.S_ISREG(source.lstat().st_mode):  # reading a pipe would never end
                raise DatasetError(f"{self.address}: {name} is no regular file. Refused.")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._missing(name) from error
        except PermissionError as error:
            raise DatasetError(f"{source} may not be read (permission denied). Ask its owner.") from error
        return target

    def send(self, files: Mapping[str, Path], dataset_id: str) -> None:
        """Fill a hidden folder beside the dataset's, and move it to its place."""
        final = self._root
        partial = work_folder(final, "publish")
        needed = sum(path.stat().st_size for path in files.values())
        try:
            with lock_folder(final, f"Another process is publishing {final}."), full_disk(final.parent, needed):
                recover_folder(partial, final)
                shutil.rmtree(partial, ignore_errors=True)
                check_space(final.parent, needed)
                try:
                    for name, path in files.items():
                        (partial / name).parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(path, partial / name)
                    replace_folder(partial, final)
                finally:  # with the lock still held: without it the folder may be another's
                    shutil.rmtree(partial, ignore_errors=True)
        except PermissionError as error:
            raise DatasetError(f"{final.parent} may not be written ({error}). Choose another place.") from error


def _hub_errors() -> tuple[type[BaseException], ...]:
    """What the Hub's library raises, and its HTTP client, which differs with the version."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, RuntimeError, *HfHubHTTPError.__bases__)


class HubRemote(Remote):
    """
    A folder in a dataset repository of the Hugging Face Hub.

    :param address: ``hf://user/repository/folder``
    :param token: default: that of ``HF_TOKEN`` or ``hf auth login``
    """

    workers = 8

    def __init__(self, address: str, token: str | None) -> None:
        super().__init__(address)
        try:
            from huggingface_hub import HfApi
        except ImportError as error:
            raise ImportError("hf:// needs the Hub's client: pip install 'sb3-ext[hub]'") from error
        user, repository, *folder = address.removeprefix("hf://").split("/")
        self._repository, self._folder = f"{user}/{repository}", "/".join(folder)
        self._api: Any = HfApi(token=token)
        self._place = {"repo_id": self._repository, "repo_type": "dataset"}

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}" if self._folder else name

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Say what is wrong in one sentence, and how to mend it."""
        try:
            yield
        except _hub_errors() as error:
            chain: list[BaseException] = [error]  # the library wraps what the server answered
            while chain[-1].__cause__ is not None:
                chain.append(chain[-1].__cause__)
            for cause in chain:
                if isinstance(cause, OSError) and cause.errno in FULL:
                    raise OSError(cause.errno, cause.strerror) from error
            if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
                raise  # of this machine's files
            codes = (getattr(getattr(cause, "response", None), "status_code", None) for cause in chain)
            code = next((code for code in codes if code is not None), None)
            name = f"{self.address}: {what}"
            if code in (401, 403):
                raise DatasetError(
                    f"{name}: access is denied ({code}). Check the address; log in with `hf auth login` or set "
                    f"HF_TOKEN, with a token that may access {self._repository}; accept its conditions if it has any."
                ) from error
            if code == 404:
                raise NotPublished(f"{name}: there is no such dataset or file (404). Check the address.") from error
            if code is not None:
                raise DatasetError(f"{name}: the server answers {code}. Try again later. {_KEPT}") from error
            raise DatasetError(
                f"{name}: {self._api.endpoint} cannot be reached or the connection broke ({type(error).__name__}: "
                f"{error}). Check the network. {_KEPT}"
            ) from error

    @cached_property
    def _revision(self) -> str:
        """The newest commit when this was first asked for, so that all files are of one."""
        with self._errors("look-up"):
            return str(self._api.repo_info(**self._place).sha)

    def names(self) -> set[str]:
        """List the folder."""
        try:
            return set(self._sizes(self._revision))
        except NotPublished:
            return set()

    def _sizes(self, revision: str) -> dict[str, int]:
        from huggingface_hub.hf_api import RepoFile

        with self._errors("listing"):
            tree = self._api.list_repo_tree(
                path_in_repo=self._folder or None, recursive=True, revision=revision, **self._place
            )
            return {
                entry.path.removeprefix(self._folder).lstrip("/"): entry.size
                for entry in tree
                if isinstance(entry, RepoFile)
            }

    def fetch(self, name: str, folder: Path) -> Path:
        """Fetch with the library's own client, which goes on in the middle of a large file."""
        revision = self._revision
        # the client stumbles over notes that a kill or a full disk cut short; it goes on without them
        notes = folder / ".cache" / "huggingface" / "download" / f"{self._path(name)}.metadata"
        notes.unlink(missing_ok=True)
        with self._errors(name):
            path = self._api.hf_hub_download(
                filename=self._path(name), revision=revision, local_dir=folder, **self._place
            )
        return Path(path)

    def send(self, files: Mapping[str, Path], dataset_id: str) -> None:
        """Publish in one commit, so that nobody sees half a dataset, and look whether all of it is there."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        with self._errors("publishing"):
            self._api.create_repo(exist_ok=True, **self._place)
        self.__dict__.pop("_revision", None)  # the repository may be new
        old = {n for n in self.names() if n.startswith("data/")}
        with TemporaryDirectory() as folder, self._errors("publishing"):
            operations: list[Any] = [CommitOperationDelete(self._path(n)) for n in sorted(old - set(files))]
            operations += [CommitOperationAdd(self._path(n), path) for n, path in files.items()]
            operations += [CommitOperationAdd(n, data) for n, data in self._index(dataset_id, Path(folder)).items()]
            commit = self._api.create_commit(
                operations=operations,
                commit_message=f"Publish {dataset_id}",
                parent_commit=self._revision,
                **self._place,
            )
        found = self._sizes(commit.oid)
        lost = [n for n, path in files.items() if found.get(n) != path.stat().st_size]
        if lost:
            raise DatasetError(
                f"{self.address}: {lost[0]} and {len(lost) - 1} more files did not arrive, or not whole. Does the "
                "repository's .gitignore name them?"
            )

    def _index(self, dataset_id: str, folder: Path) -> dict[str, bytes]:
        """The files in which Minari looks up which datasets a user's repositories hold."""
        *namespaces, _ = dataset_id.split("/")
        user = self._repository.split("/")[0]
        if not namespaces or self.address != f"hf://{user}/{dataset_id}":
            return {}
        index: dict[str, Any] = {}
        at = {"filename": _NAMESPACE, "revision": self._revision, **self._place}
        if self._api.file_exists(**at):
            index = json.loads(Path(self._api.hf_hub_download(local_dir=folder, **at)).read_bytes())
        nested = ["/".join(namespaces[:k]) for k in range(2, len(namespaces) + 1)]
        index["datasets"] = sorted({*index.get("datasets", []), dataset_id})
        fresh = [n for n in nested if n not in index.get("namespaces", [])]
        if nested:
            index["namespaces"] = sorted({*index.get("namespaces", []), *nested})
        files = {f"{n.partition('/')[2]}/{_NAMESPACE}": b"{}" for n in fresh}
        return files | {_NAMESPACE: json.dumps(index).encode()}


class CloudRemote(Remote):
    """
    A folder in a bucket of Google Cloud Storage, through Minari's client.

    :param address: ``gs://bucket/folder``
    :param token: path of a service account's key file; None: anonymous
    """

    workers = 8

    def __init__(self, address: str, token: str | None) -> None:
        super().__init__(address)
        from minari.storage.remotes import get_cloud_storage

        bucket, _, self._folder = address.removeprefix("gs://").partition("/")
        try:
            storage: Any = get_cloud_storage(f"gcp://{bucket}", token)
        except ImportError as error:
            raise ImportError("gs:// needs Google's client: pip install 'minari[gcs]'") from error
        self._bucket = storage.bucket

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        import requests
        from google.api_core.exceptions import GoogleAPICallError, NotFound, RetryError
        from google.auth.exceptions import GoogleAuthError

        name = f"{self.address}: {what}"
        try:
            yield
        except NotFound as error:
            raise NotPublished(f"{name}: there is no such bucket or file (404). Check the address.") from error
        except (GoogleAPICallError, GoogleAuthError, RetryError, requests.RequestException) as error:
            code = getattr(error, "code", None)
            mend = "Pass the path of a key file as token." if code in (401, 403) else f"Check the network. {_KEPT}"
            raise DatasetError(f"{name}: {type(error).__name__}: {' '.join(str(error).split())}. {mend}") from error

    def names(self) -> set[str]:
        """List the folder."""
        start = f"{self._folder}/"
        try:
            with self._errors("listing"):
                return {blob.name.removeprefix(start) for blob in self._bucket.list_blobs(prefix=start)}
        except NotPublished:
            return set()

    def fetch(self, name: str, folder: Path) -> Path:
        """Download a file."""
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._errors(name):
            self._bucket.blob(f"{self._folder}/{name}").download_to_filename(target)
        return target

    def send(self, files: Mapping[str, Path], dataset_id: str) -> None:
        """Upload the files; the manifest is taken away first and comes last, so that half a dataset has none."""
        old = self.names()
        with self._errors("publishing"):
            for name in sorted(old & {MANIFEST}) + sorted(old - set(files)):
                self._bucket.blob(f"{self._folder}/{name}").delete()
            for name in sorted(files, key=lambda name: name == MANIFEST):
                self._bucket.blob(f"{self._folder}/{name}").upload_from_filename(files[name])


def open_remote(address: str | os.PathLike[str], token: str | None = None) -> Remote:
    """
    Choose the client for an address.

    :param address: ``hf://user/repository/folder``, ``gs://bucket/folder``, ``file:///folder`` or a folder's path
    :param token: see the clients
    :return: the client; nothing is connected yet
    :raises DatasetError: if the address is none of these
    :raises ImportError: if the client's library is missing
    """
    text = os.fspath(address).rstrip("/")
    scheme, sign, rest = text.partition("://")
    parts = rest.split("/")
    if not sign and not re.match("[A-Za-z][A-Za-z0-9+.-]+:", text):
        return FolderRemote(str(Path(text).expanduser().absolute()))
    if scheme == "file" and urlsplit(text).netloc in ("", "localhost"):
        return FolderRemote(url2pathname(urlsplit(text).path))
    if scheme in ("hf", "gs") and len(parts) > 1 and all(part not in ("", ".", "..") for part in parts):
        return HubRemote(text, token) if scheme == "hf" else CloudRemote(text, token)
    raise DatasetError(
        f"{text!r} is no address of a dataset: it is hf://user/repository/folder, gs://bucket/folder, "
        "file:///folder, or the path of a folder."
    )
