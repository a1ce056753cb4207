"""A server on this machine that speaks the Hugging Face Hub's protocol for datasets, and Minari's view of it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_test"


def blob_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub:
    """
    Repositories in RAM, and the faults that tests ask for.

    ``refuse`` maps (method, path) to a status code that is answered instead, or None; ``cut`` is how many bytes of each
    file arrive before the connection breaks; ``delay`` is slept after each kilobyte; ``ignored`` are files that the
    repository's .gitignore names.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, int] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[int] = []
        self.unknown: list[tuple[str, str]] = []
        self.refuse: Callable[[str, str], int | None] = lambda method, path: None
        self.cut: int | None = None
        self.delay = 0.0
        self.private = False
        self.ignored: set[str] = set()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def sha(self, repository: str) -> str:
        return hashlib.sha1(f"{repository} {self.commits.get(repository, 0)}".encode()).hexdigest()

    def fetched(self) -> list[str]:
        """Files that were asked for."""
        return [
            path.split("/resolve/")[1].split("/", 1)[1]
            for m, path in self.requests
            if m == "GET" and "/resolve/" in path
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def end_headers(self) -> None:
        self.send_header("Connection", "close")  # or threads of closed servers live on
        super().end_headers()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, code: int, value: Any = None, **headers: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), str(text))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, code: int, name: str = "") -> None:
        headers = {"X_Error_Code": name, "X_Error_Message": name} if name else {}
        self._send(code, {"error": name or "refused"}, **headers)

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path, body = unquote(url.path), self._body()
        self.hub.requests.append((self.command, path))
        code = self.hub.refuse(self.command, path)
        if code is not None:
            return self._error(code)
        known = path.startswith("/upload/") or self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if not known and (self.hub.private or (self.command != "GET" and self.command != "HEAD")):
            return self._error(401, "RepoNotFound" if self.hub.private else "")
        for method, pattern, function in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                return function(self, body, parse_qs(url.query), **match.groupdict())
        self.hub.unknown.append((self.command, path))
        return self._error(404)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _create(self, body: bytes, query: Any) -> None:
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        url = f"{self.hub.url}/datasets/{name}"
        if name in self.hub.repositories:
            return self._send(409, {"error": "You already created this dataset repo", "url": url})
        self.hub.repositories[name] = {".gitattributes": b"*.hdf5 filter=lfs\n"}
        return self._send(200, {"url": url, "name": name})

    def _list(self, body: bytes, query: dict[str, list[str]]) -> None:
        author, search = query.get("author", [""])[0], query.get("search", [""])[0].lower()
        found = [n for n in self.hub.repositories if n.startswith(f"{author}/") and search in n.lower()]
        self._send(200, [self._facts(n) for n in found])

    def _facts(self, repo: str) -> dict[str, Any]:
        return {
            "id": repo,
            "_id": "0",
            "author": repo.split("/")[0],
            "sha": self.hub.sha(repo),
            "private": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [],
        }

    def _info(self, body: bytes, query: Any, repo: str) -> None:
        if repo not in self.hub.repositories:
            return self._error(404, "RepoNotFound")
        return self._send(200, self._facts(repo))

    def _tree(self, body: bytes, query: Any, repo: str, folder: str = "") -> None:
        files = self.hub.repositories.get(repo)
        if files is None:
            return self._error(404, "RepoNotFound")
        start = f"{folder}/" if folder else ""
        found = [n for n in files if n.startswith(start)]
        if folder and not found:
            return self._error(404, "EntryNotFound")
        folders = {n.rsplit("/", 1)[0] for n in found if "/" in n}
        entries: list[dict[str, Any]] = [{"type": "directory", "path": n, "oid": "0"} for n in sorted(folders)]
        entries += [{"type": "file", "path": n, "size": len(files[n]), "oid": blob_oid(files[n])} for n in found]
        return self._send(200, entries)

    def _preupload(self, body: bytes, query: Any, repo: str) -> None:
        files = self.hub.repositories[repo]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".hdf5", ".arrow", ".parquet", ".png")) else "regular",
                "shouldIgnore": file["path"] in self.hub.ignored,
                "oid": blob_oid(files[file["path"]]) if file["path"] in files else None,
            }
            for file in json.loads(body)["files"]
        ]
        self._send(200, {"files": modes})

    def _batch(self, body: bytes, query: Any, repo: str) -> None:
        upload = f"{self.hub.url}/upload/"
        objects = [
            {**o, "actions": {"upload": {"href": upload + o["oid"], "header": {}}}} for o in json.loads(body)["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def _upload(self, body: bytes, query: Any, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self._send(200, {})

    def _commit(self, body: bytes, query: Any, repo: str) -> None:
        files = dict(self.hub.repositories[repo])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                if value.get("parentCommit") not in (None, self.hub.sha(repo)):
                    return self._error(412)
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                assert item["key"] == "deletedFile"
                del files[value["path"]]
        self.hub.repositories[repo] = files
        self.hub.commits[repo] = self.hub.commits.get(repo, 0) + 1
        sha = self.hub.sha(repo)
        url = f"{self.hub.url}/datasets/{repo}/commit/{sha}"
        return self._send(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def _resolve(self, body: bytes, query: Any, repo: str, name: str) -> None:
        files = self.hub.repositories.get(repo)
        if files is None or name not in files:
            return self._error(404, "RepoNotFound" if files is None else "EntryNotFound")
        data, start = files[name], 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted:
            start = int(wanted[1])
            self.hub.ranges.append(start)
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{blob_oid(data)}"')
        self.send_header("X-Repo-Commit", self.hub.sha(repo))
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "HEAD":
            return None
        rest = data[start:]
        for at in range(0, len(rest), 1024):
            if self.hub.cut is not None and at >= self.hub.cut:
                self.close_connection = True
                return None
            self.wfile.write(rest[at : at + 1024])
            time.sleep(self.hub.delay)
        return None


_REPO = r"(?P<repo>[^/]+/[^/]+?)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", "/api/repos/create", _Handler._create),
    ("POST", "/api/validate-yaml", lambda self, body, query: self._send(200, {"errors": [], "warnings": []})),
    ("GET", "/api/agent-harnesses", lambda self, body, query: self._send(200, {})),
    ("GET", "/api/datasets", _Handler._list),
    ("GET", rf"/api/datasets/{_REPO}(?:/revision/[^/]+)?", _Handler._info),
    ("GET", rf"/api/datasets/{_REPO}/tree/[^/]+(?:/(?P<folder>.*))?", _Handler._tree),
    ("POST", rf"/api/datasets/{_REPO}/preupload/[^/]+", _Handler._preupload),
    ("POST", rf"/api/datasets/{_REPO}/commit/[^/]+", _Handler._commit),
    ("POST", rf"/datasets/{_REPO}\.git/info/lfs/objects/batch", _Handler._batch),
    ("PUT", r"/upload/(?P<oid>\w+)", _Handler._upload),
    ("GET HEAD", rf"/datasets/{_REPO}/resolve/[^/]+/(?P<name>.+)", _Handler._resolve),
]
