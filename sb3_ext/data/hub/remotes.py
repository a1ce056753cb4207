"""Where datasets are published: the Hugging Face Hub, Google Cloud Storage, or a folder that people share."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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
    """A dataset's folder somewhere else, at an address."""

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
        Fetch a file, unchecked, to somewhere in the folder, or raise :class:`NotPublished` or another DatasetError.

        The folder is for what is needed to go on after a cut, too; it is used again for the same dataset.
        """

    @abstractmethod
    def send(self, files: Mapping[str, Path], dataset_id: str) -> None:
        """Publish files, by name, as the dataset, in the place of all that is there."""


class FolderRemote(Remote):
    """A folder of this machine or of a network drive."""

    def names(self) -> set[str]:
        """List the folder; links are not followed."""
        found = (Path(folder, name) for folder, _, names in os.walk(self.address) for name in names)
        return {path.relative_to(self.address).as_posix() for path in found}

    def fetch(self, name: str, folder: Path) -> Path:
        """Copy a file; refuse symbolic links, which may lead anywhere."""
        root, source, target = Path(self.address), Path(self.address, name), folder / name
        try:
            for path in (source, *source.parents):
                if path == root:
                    break
                if path.is_symlink():
                    raise DatasetError(f"{self.address}: {path.relative_to(root)} is a symbolic link. Refused.")
            if not stat.S_ISREG(source.lstat().st_mode):  # reading a pipe would never end
                raise DatasetError(f"{self.address}: {name} is no regular file. Refused.")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotPublished(f"{self.address}: there is no {name}.") from error
        except PermissionError as error:
            raise DatasetError(f"{source} may not be read (permission denied). Ask its owner.") from error
        return target

    def send(self, files: Mapping[str, Path], dataset_id: str) -> None:
        """Fill a hidden folder beside the dataset's, and move it to its place."""
        final = Path(self.address)
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


class HubRemote(Remote):
    """A folder in a dataset repository of the Hub. Default token: ``HF_TOKEN``, else that of ``hf auth login``."""

    workers = 8

    def __init__(self, address: str, token: str | None) -> None:
        super().__init__(address)
        try:
            from huggingface_hub import HfApi
        except ImportError as error:
            raise ImportError("hf:// needs the Hub's client: pip install 'sb3-ext[hub]'") from error
        user, repository, *folder = address.removeprefix("hf://").split("/")
        self._repository, self._prefix = f"{user}/{repository}", "".join(f"{part}/" for part in folder)
        self._api: Any = HfApi(token=token)
        self._place = {"repo_id": self._repository, "repo_type": "dataset"}

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """Say what is wrong in one sentence, and how to mend it."""
        from huggingface_hub.errors import HfHubHTTPError

        # of the library, and of its HTTP client, which differs with the version
        errors: tuple[type[BaseException], ...] = (OSError, RuntimeError, *HfHubHTTPError.__bases__)
        try:
            yield
        except errors as error:
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
        with suppress(NotPublished):
            return set(self._sizes(self._revision))
        return set()

    def _sizes(self, revision: str) -> dict[str, int]:
        from huggingface_hub.hf_api import RepoFile

        with self._errors("listing"):
            folder = self._prefix.rstrip("/") or None
            tree = self._api.list_repo_tree(path_in_repo=folder, recursive=True, revision=revision, **self._place)
            return {file.path.removeprefix(self._prefix): file.size for file in tree if isinstance(file, RepoFile)}

    def fetch(self, name: str, folder: Path) -> Path:
        """Fetch with the library's own client, which goes on in the middle of a large file."""
        at = {"filename": self._prefix + name, "revision": self._revision, **self._place}
        # the client stumbles over notes that a kill or a full disk cut short; it goes on without them
        Path(folder, ".cache/huggingface/download", f"{self._prefix}{name}.metadata").unlink(missing_ok=True)
        with self._errors(name):
            return Path(self._api.hf_hub_download(local_dir=folder, **at))

    def send(self, files: Mapping[str, Path], dataset_id: str) -> None:
        """Publish in one commit, so that nobody sees half a dataset, and look whether all of it is there."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        with self._errors("publishing"):
            self._api.create_repo(exist_ok=True, **self._place)
        self.__dict__.pop("_revision", None)  # the repository may be new
        old = {n for n in self.names() if n.startswith("data/")}
        with TemporaryDirectory() as folder, self._errors("publishing"):
            operations: list[Any] = [CommitOperationDelete(self._prefix + n) for n in sorted(old - set(files))]
            operations += [CommitOperationAdd(self._prefix + n, path) for n, path in files.items()]
            operations += [CommitOperationAdd(n, data) for n, data in self._index(dataset_id, Path(folder)).items()]
            about = {"commit_message": f"Publish {dataset_id}", "parent_commit": self._revision, **self._place}
            commit = self._api.create_commit(operations=operations, **about)
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
    """A folder in a bucket of Google Cloud Storage; the token is the path of an account's key file, None: anonymous."""

    workers = 8

    def __init__(self, address: str, token: str | None) -> None:
        super().__init__(address)
        from minari.storage.remotes import get_cloud_storage

        bucket, _, folder = address.removeprefix("gs://").partition("/")
        try:
            storage: Any = get_cloud_storage(f"gcp://{bucket}", token)
        except ImportError as error:
            raise ImportError("gs:// needs Google's client: pip install 'minari[gcs]'") from error
        self._bucket, self._prefix = storage.bucket, f"{folder}/"

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
        with suppress(NotPublished), self._errors("listing"):
            return {blob.name.removeprefix(self._prefix) for blob in self._bucket.list_blobs(prefix=self._prefix)}
        return set()

    def fetch(self, name: str, folder: Path) -> Path:
        """Download a file."""
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._errors(name):
            self._bucket.blob(self._prefix + name).download_to_filename(target)
        return target

    def send(self, files: Mapping[str, Path], dataset_id: str) -> None:
        """Upload the files; the manifest is taken away first and comes last, so that half a dataset has none."""
        old = self.names()
        with self._errors("publishing"):
            for name in sorted(old & {MANIFEST}) + sorted(old - set(files)):
                self._bucket.blob(self._prefix + name).delete()
            for name in sorted(files, key=lambda name: name == MANIFEST):
                self._bucket.blob(self._prefix + name).upload_from_filename(files[name])


def open_remote(address: str | os.PathLike[str], token: str | None = None) -> Remote:
    """Choose the client for an ``hf://``, ``gs://`` or ``file://`` address or a path; nothing is connected yet."""
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
