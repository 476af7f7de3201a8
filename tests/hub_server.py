"""A small Hugging Face hub on this machine, so that the real client can be watched without a network.

It serves directories as repositories: the model's description, lists of files, and files with byte ranges; and
it takes commits of small files. That is as much as fetching and pushing a checkpoint needs.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_API = re.compile(r"/api/models/([^/]+/[^/]+)/(revision|tree|paths-info)/([^/?]+)/?([^?]*)")
_PUSH = re.compile(
    r"/api/(?:repos/create|validate-yaml|models/([^/]+/[^/]+)/(preupload|commit|branch)/([^/?]+))"
)
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)")


@dataclass
class LocalHub:
    """What is served, and what was asked for.

    Attributes:
        repositories: directory by id.
        gated: ids whose files are refused.
        sent: bytes of file contents that went out, by file name.
        commits: what came in, for each commit its revision and files.
    """

    repositories: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    sent: dict[str, int] = field(default_factory=dict)
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    endpoint: str = ""

    @contextmanager
    def running(self) -> Iterator[LocalHub]:
        """Serve until the end of the block; ``endpoint`` is then what HF_ENDPOINT must be."""
        hub = self

        class Handler(_Handler):
            served = hub

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_POST(self) -> None:
        self._body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        if match := _PUSH.match(self.path):
            self._push(*match.groups())
        elif match := _API.match(self.path):
            repository, kind, revision, path = match.groups()
            if directory := self._repository(repository, revision):
                self._describe(repository, directory, kind, path)
        elif match := _FILE.match(self.path):
            repository, revision, name = match.groups()
            if directory := self._repository(repository, revision):
                if repository in self.served.gated:
                    self._refuse(403, "GatedRepo")
                else:
                    self._file(directory / name, with_body)
        else:
            self._refuse(404, "RepoNotFound")

    def _repository(self, repository: str, revision: str) -> Path | None:
        directory = self.served.repositories.get(repository)
        if directory is None:
            self._refuse(401, "RepoNotFound")
        elif revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound")
            return None
        return directory

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, {"X-Error-Code": code, "X-Error-Message": code}, b"{}")

    def _describe(self, repository: str, directory: Path, kind: str, path: str) -> None:
        files = sorted(file for file in directory.iterdir() if file.is_file())
        if kind == "revision":
            siblings = [{"rfilename": file.name} for file in files]
            answer: Any = {"id": repository, "sha": COMMIT, "siblings": siblings, "private": False}
        else:
            wanted = None if kind == "tree" else self._body
            answer = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _etag(file)}
                for file in files
                if wanted is None or file.name in wanted
            ]
        self._send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _push(self, repository: str | None, step: str | None, revision: str | None) -> None:
        """Answer the steps of a commit; every file is to come in the commit itself, none apart from it."""
        checked: dict[str, Any] = {"warnings": [], "errors": []}  # of the model card
        answer = checked | {"url": f"{self.served.endpoint}/org/pushed", "id": "org/pushed"}
        if step == "preupload":
            files = json.loads(self._body)["files"]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": file["path"], **modes} for file in files]}
        elif step == "commit":
            lines = [json.loads(line) for line in self._body.splitlines()]
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            self.served.commits.append((str(revision), files))
            answer = {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.served.endpoint}/{repository}"}
        self._send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _file(self, file: Path, with_body: bool) -> None:
        if not file.is_file():
            self._refuse(404, "EntryNotFound")
            return
        content, status = file.read_bytes(), 200
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_etag(file)}"', "Accept-Ranges": "bytes"}
        if match := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), int(match[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
            content, status = content[first : last + 1], 206
        if with_body:
            self.served.sent[file.name] = self.served.sent.get(file.name, 0) + len(content)
        self._send(status, headers, content, with_body)

    def _send(self, status: int, headers: dict[str, str], content: bytes, with_body: bool = True) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body and self.command != "HEAD":
            self.wfile.write(content)


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()
