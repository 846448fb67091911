"""A model hub in one thread: the few requests of huggingface_hub that loading and uploading a model make."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """By repository and path, the files' contents; every request in `log`, and what repositories were `created`.

    Another revision of a repository is one of its own, under ``name@revision``.
    """

    repositories: ClassVar[dict[str, dict[str, bytes]]] = {}
    log: ClassVar[list[str]] = []
    created: ClassVar[list[dict[str, object]]] = []
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.log.append(f"{self.command} {path}")
        if path.startswith("api/models/"):
            self._describe(path.removeprefix("api/models/"))
            return
        repository, _, inside = path.partition("/resolve/")
        revision, _, inside = inside.partition("/")
        key = self._key(repository, revision)
        content = self.repositories.get(key, {}).get(inside)
        if content is None:
            code = "EntryNotFound" if repository in self.repositories else "RepoNotFound"
            self._answer(404, b"", {"X-Error-Code": code})
            return
        etag = hashlib.sha256(content).hexdigest()
        self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": _commit(key), "Accept-Ranges": "bytes"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.log.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if path == "api/repos/create":
            self.created.append(json.loads(body))
            repository = "/".join(part for key in ("organization", "name") if (part := self.created[-1].get(key)))
            self.repositories.setdefault(repository, {})
            self._json({"url": f"http://{self.headers['Host']}/{repository}"})
        elif path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            self._json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif path.endswith("/commit/main"):
            repository = path.removeprefix("api/models/").removesuffix("/commit/main")
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.repositories[repository][line["value"]["path"]] = content
            url = f"http://{self.headers['Host']}/{repository}/commit/{COMMIT}"
            self._json({"commitUrl": url, "commitOid": COMMIT})
        elif path == "api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        else:
            self._answer(404, b"")

    def _describe(self, rest: str) -> None:
        repository, _, revision = rest.partition("/tree/" if "/tree/" in rest else "/revision/")
        key = self._key(repository, revision.partition("/")[0])  # of a tree, a folder may follow
        files = self.repositories.get(key)
        if repository not in self.repositories:
            self._answer(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        elif files is None:
            self._answer(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
        elif "/tree/" in rest:
            self._json([{"type": "file", "path": name, "size": len(c), "oid": "0"} for name, c in files.items()])
        else:
            siblings = [{"rfilename": name} for name in files]
            self._json({"id": repository, "modelId": repository, "sha": _commit(key), "siblings": siblings, "tags": []})

    def _key(self, repository: str, revision: str) -> str:
        """Under which name a revision's files are, whether it is asked for by its name or its commit."""
        keys = [key for key in self.repositories if key.partition("@")[0] == repository]
        by_commit = [key for key in keys if _commit(key) == revision]
        return by_commit[0] if by_commit else repository if revision in ("", "main") else f"{repository}@{revision}"

    def _json(self, content: object) -> None:
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keeps quiet."""


def _commit(key: str) -> str:
    return hashlib.sha1(key.encode()).hexdigest() if "@" in key else COMMIT


def serve() -> ThreadingHTTPServer:
    """Starts an empty hub on a free port."""
    handler = type("OwnHub", (Hub,), {"repositories": {}, "log": [], "created": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
