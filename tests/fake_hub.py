"""A Hugging Face Hub on loopback: as much of its protocol as an upload needs, every request answered at once.

It asks for every file within the commit, as the real one does for small files; large ones go to another server there
(Xet), which is not imitated here.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_test"  # not a secret: what the fake hub takes for its one user's
OWNER = "someone"


class FakeHub(ThreadingHTTPServer):
    """`repos`: id -> {"private": bool, "files": path -> bytes}; `refuse`: a status for every request, None for none."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict] = {}
        self.refuse: int | None = None
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10  # seconds a connection may be silent

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, value: object = None, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do(self) -> None:
        hub, body = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        hub.requests.append(f"{self.command} {path}")
        words = path.strip("/").split("/")
        if hub.refuse or self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Forbidden" if hub.refuse else "Invalid token"}, hub.refuse or 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            owner = asked.get("organization") or OWNER
            repo = f"{owner}/{asked['name'].rpartition('/')[2]}"
            status = 409 if repo in hub.repos else 200
            private = asked.get("private") or asked.get("visibility") == "private"
            hub.repos.setdefault(repo, {"private": private, "files": {}})
            return self.answer({"url": f"{hub.url}/{repo}", "error": "exists"}, status)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            files = [
                {"path": x["path"], "uploadMode": "regular", "shouldIgnore": False} for x in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if "/commit/" in path:
            files = hub.repos["/".join(words[2:4])]["files"]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
            return self.answer(
                {
                    "commitUrl": f"{hub.url}/{'/'.join(words[2:4])}/commit/{'1' * 40}",
                    "commitOid": "1" * 40,
                    "pullRequestUrl": None,
                }
            )
        if self.command == "GET" and path.startswith("/api/models/"):
            repo = "/".join(words[2:4])
            known = {"id": repo, "private": hub.repos[repo]["private"], "siblings": [], "sha": "0" * 40}
            return self.answer(known)
        return self.answer({"error": f"the fake hub does not know {path}"}, 404)

    do_GET = do_POST = do_PUT = do


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join(10)
