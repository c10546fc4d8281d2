"""A fake Hugging Face Hub on localhost: repositories in memory, which answer the requests of `huggingface_hub`."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_of_the_tests"


@dataclass
class Hub:
    """The content of its repositories, by name and by file, and the requests that it has received."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)  # method and path
    agents: set[str] = field(default_factory=set)
    refuses: int | None = None  # the status that every request is answered with

    def __enter__(self) -> Hub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *values: object) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    def do_HEAD(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def _handle(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append((self.command, path))
        self.hub.agents.add(self.headers.get("User-Agent", ""))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        writes = self.command == "POST"
        if self.hub.refuses is not None:
            self._send(self.hub.refuses, {"error": "refused"})
        elif writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid username or password."})
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*found.groups())
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/.*)?", path):
            getattr(self, f"_{found[2] or 'info'}")(found[1], body)
        else:
            getattr(self, f"_{path.rpartition('/')[2].replace('-', '_')}")(body)

    def _info(self, name: str, body: bytes) -> None:
        if name in self.hub.files:
            self._send(200, {"id": name, "sha": COMMIT, "siblings": []})
        else:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization', 'me')}/{asked['name']}"
        if name in self.hub.files:
            self._send(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
            return
        self.hub.files[name], self.hub.private[name] = {}, asked.get("private") or asked.get("visibility") == "private"
        self._send(200, {"url": f"{self.hub.url}/{name}"})

    def _validate_yaml(self, body: bytes) -> None:
        self._send(200, {"errors": [], "warnings": []})

    def _preupload(self, name: str, body: bytes) -> None:
        paths = [file["path"] for file in json.loads(body)["files"]]
        self._send(200, {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]})

    def _tree(self, name: str, body: bytes) -> None:
        tree = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in self.hub.files[name].items()
        ]
        self._send(200, tree)

    def _commit(self, name: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "file":
                self.hub.files[name][value["path"]] = base64.b64decode(value["content"])
            else:
                del self.hub.files[name][value["path"]]
        self._send(200, {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.hub.url}/{name}/commit/{COMMIT}"})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        if name not in self.hub.files:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", COMMIT):
            self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        elif path not in self.hub.files[name]:
            self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        else:
            content = self.hub.files[name][path]
            self._send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": f"{len(data)}", "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
