"""A hub on 127.0.0.1 with the part of the protocol that huggingface_hub uses, which finds it by HF_ENDPOINT."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "a" * 34
_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?")
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
LARGE = (".safetensors", ".bin", ".gguf")  # files that a hub keeps in its large file storage


@dataclass
class Repo:
    """A repository: its files by commit, and its commits by branch or tag."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: Mapping[str, bytes], *names: str) -> str:
        """Add a commit of these files and have the names, or main, point to it; return the commit."""
        sha = hashlib.sha1(repr([len(self.commits), sorted(files.items())]).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs.update(dict.fromkeys(names or ("main",), sha))
        return sha

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


class Hub:
    """A hub's repositories, its log, and the faults that it is to have.

    Attributes:
        repos: The repositories, by their ids.
        log: The method, the path and the Range header of each request.
        sent: The bytes sent in bodies, by the path of the file in its repository.
        whole_only: True for a hub that ignores Range headers.
        cut: Closes the connection once after this many bytes of the body, by the path of the file.
        stall: Sends nothing more after this many bytes of the body, by the path of the file.
        status: Answers a GET with this status, by the path of the file.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.log: list[tuple[str, str, str | None]] = []
        self.sent: Counter[str] = Counter()
        self.whole_only = False
        self.cut: dict[str, int] = {}
        self.stall: dict[str, int] = {}
        self.status: dict[str, int] = {}
        self.stalled, self.release = threading.Event(), threading.Event()
        self.endpoint = ""

    def add(self, repo: str, files: Mapping[str, bytes], **options: Any) -> str:
        """Add a repository with one commit on main; return the commit."""
        self.repos[repo] = Repo(**options)
        return self.repos[repo].commit(files)

    def asked(self, method: str = "GET") -> list[str]:
        """Return the files that were requested since the log was last cleared."""
        found = [_RESOLVE.fullmatch(path) for verb, path, _ in self.log if verb == method]
        return [unquote(match[3]) for match in found if match]


def files_of(folder: Path) -> dict[str, bytes]:
    """Return a folder's files as the files of a repository."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """Yield a hub that answers until the end of the block."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.release.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        self.hub.log.append((self.command, path, self.headers.get("Range")))
        api, resolve = _API.fullmatch(path), _RESOLVE.fullmatch(path)
        match = api or resolve
        if match is None:
            return self._fail(404, "", "no such page")
        revision = unquote((api[3] if api else match[2]) or "main")
        if api:
            self._api(match[1], revision, listing=api[2] == "tree", sizes="blobs" in query)
        else:
            self._file(match[1], revision, unquote(match[3]))

    def _open(self, name: str, revision: str, content: bool) -> tuple[str, dict[str, bytes]] | None:
        """Return the commit and its files; send the failure and return None if the client may not see them."""
        repo, token = self.hub.repos.get(name), self.headers.get("Authorization")
        if token not in (None, f"Bearer {TOKEN}"):
            return self._fail(401, "", "Invalid credentials in Authorization header")
        if repo is None or (repo.private and token is None):
            return self._fail(404 if token else 401, "RepoNotFound", "Repository not found")
        sha = repo.resolve(revision)
        if sha is None:
            return self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if repo.gated and content:
            return self._fail(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted")
        return sha, repo.commits[sha]

    def _api(self, name: str, revision: str, listing: bool, sizes: bool) -> None:
        found = self._open(name, revision, content=False)
        if found is None:
            return
        sha, files = found
        if listing:
            return self._send(200, json.dumps([_entry(path, data) for path, data in files.items()]).encode())
        siblings = [{"rfilename": path, **({"size": len(data)} if sizes else {})} for path, data in files.items()]
        info = {"_id": name, "id": name, "sha": sha, "siblings": siblings, "private": False, "tags": []}
        self._send(200, json.dumps(info).encode())

    def _file(self, name: str, revision: str, path: str) -> None:
        found = self._open(name, revision, content=True)
        if found is None:
            return
        sha, files = found
        if path not in files:
            return self._fail(404, "EntryNotFound", "Entry not found")
        if self.command == "GET" and path in self.hub.status:
            return self._fail(self.hub.status[path], "", "out of order")
        data, size = files[path], len(files[path])
        headers = {"ETag": f'"{_etag(path, data)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if path.endswith(LARGE):
            headers |= {"X-Linked-Size": str(size), "X-Linked-Etag": headers["ETag"]}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted and not self.hub.whole_only:
            first, stop = int(wanted[1]), min(int(wanted[2] or size) + 1, size)
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{size}"
            data = data[first:stop]
        self._send(206 if "Content-Range" in headers else 200, data, headers, path)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None, path: str = "") -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.hub.sent[path] += len(body)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if path in self.hub.cut:
                self.wfile.write(body[: self.hub.cut.pop(path)])
                self.close_connection = True
            elif path in self.hub.stall:
                self.wfile.write(body[: self.hub.stall[path]])
                self.hub.stalled.set()
                self.hub.release.wait(60)
                self.close_connection = True
            else:
                self.wfile.write(body)

    def _fail(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self._send(status, body, {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})})


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": _etag(path, data), "size": len(data), "pointerSize": 130}
    return entry


def _etag(path: str, data: bytes) -> str:
    kind = hashlib.sha256 if path.endswith(LARGE) else hashlib.sha1
    return kind(data).hexdigest()
