"""A Hub on this machine: the part of the Hugging Face API that tickets use, over real HTTP.

It keeps commits, so that revisions mean something, and can be told to send less or other bytes than it announces.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

Files = dict[str, bytes]


class FakeHub:
    """Repositories by name, each a list of commits and branches that point to them."""

    def __init__(self) -> None:
        self.commits: dict[str, Files] = {}
        self.branches: dict[tuple[str, str], str] = {}
        self.truncate: str | None = None  # this file is cut off while it is sent
        self.replace: dict[str, bytes] = {}  # these are sent instead of what was committed
        self.extra: list[str] = []  # these names are listed, too
        self.refuse: int | None = None  # this status answers everything
        self.log: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                hub.answer(self)

            do_GET = do_POST = do_HEAD

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def resolve(self, repo: str, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get((repo, revision))

    def files(self, repo: str, revision: str = "main") -> Files:
        return self.commits[self.resolve(repo, revision) or ""]

    def commit(self, repo: str, branch: str, changes: Files) -> str:
        files = {**self.commits.get(self.branches.get((repo, branch), ""), {}), **changes}
        identity = hashlib.sha1(repr((repo, len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[identity] = files
        self.branches[repo, branch] = identity
        return identity

    # --- HTTP

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        path = unquote(request.path.partition("?")[0])
        self.log.append(f"{request.command} {path}")
        if self.refuse is not None:
            return self._send(request, self.refuse, {"error": "no"})
        for pattern, handler in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found:
                return handler(self, request, body, **found.groupdict())
        return self._send(request, 404, {"error": f"no route {path}"})

    def _send(self, request: Any, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        sent = data
        headers = {"Content-Length": str(len(data)), "Content-Type": "application/json", **(headers or {})}
        if headers.pop("cut", ""):
            sent = data[: len(data) // 2]
        request.send_response(status)
        for key, value in headers.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(sent)
        if sent is not data:
            request.close_connection = True

    def create(self, request: Any, body: bytes) -> None:
        told = json.loads(body)
        repo = "/".join(filter(None, (told.get("organization"), told["name"])))
        if (repo, "main") in self.branches:
            return self._send(request, 409, {"error": "exists", "url": f"{self.url}/{repo}"})
        self.commit(repo, "main", {".gitattributes": b""})
        self.private = told.get("private") or told.get("visibility") == "private"
        self._send(request, 200, {"url": f"{self.url}/{repo}"})

    def branch(self, request: Any, body: bytes, repo: str, branch: str) -> None:
        if (repo, branch) in self.branches:
            return self._send(request, 409, {"error": "exists"})
        self.branches[repo, branch] = self.branches[repo, "main"]
        self._send(request, 200, {})

    def validate(self, request: Any, body: bytes) -> None:
        self._send(request, 200, {"errors": [], "warnings": []})

    def preupload(self, request: Any, body: bytes, repo: str, revision: str) -> None:
        files = [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
        ]
        self._send(request, 200, {"files": files, "commitOid": self.resolve(repo, revision)})

    def upload(self, request: Any, body: bytes, repo: str, revision: str) -> None:
        changes = {}
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                changes[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        identity = self.commit(repo, revision, changes)
        answer = {"success": True, "commitOid": identity, "commitUrl": f"{self.url}/{repo}/commit/{identity}"}
        self._send(request, 200, answer)

    def info(self, request: Any, body: bytes, repo: str, revision: str | None = None) -> None:
        if not any(name == repo for name, _ in self.branches):
            return self._send(request, 404, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
        identity = self.resolve(repo, revision or "main")
        if identity is None:
            return self._send(request, 404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"})
        names = [*self.commits[identity], *self.extra]
        self._send(request, 200, {"id": repo, "sha": identity, "siblings": [{"rfilename": name} for name in names]})

    def fetch(self, request: Any, body: bytes, repo: str, revision: str, name: str) -> None:
        identity = self.resolve(repo, revision)
        content = self.commits.get(identity or "", {}).get(name)
        if content is None:
            return self._send(request, 404, {"error": "no"}, {"X-Error-Code": "EntryNotFound"})
        content = self.replace.get(name, content)
        headers = {"X-Repo-Commit": identity or "", "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        if self.truncate == name:
            headers["cut"] = "yes"
        self._send(request, 200, content, headers)


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_ROUTES = (
    (r"/api/repos/create", FakeHub.create),
    (r"/api/validate-yaml", FakeHub.validate),
    (rf"/api/models/{_REPO}/branch/(?P<branch>.+)", FakeHub.branch),
    (rf"/api/models/{_REPO}/preupload/(?P<revision>.+)", FakeHub.preupload),
    (rf"/api/models/{_REPO}/commit/(?P<revision>.+)", FakeHub.upload),
    (rf"/api/models/{_REPO}/revision/(?P<revision>.+)", FakeHub.info),
    (rf"/api/models/{_REPO}", FakeHub.info),
    (rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", FakeHub.fetch),
)
