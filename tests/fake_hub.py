"""A hub on this machine: the part of the Hugging Face hub's HTTP interface that downloads use, over real sockets."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Refusal = tuple[int, dict[str, str]]  # status, headers


class Hub:
    """`repositories`: owner/name -> folder, datasets as datasets/owner/name. `refuse`: (path, token) -> answer.

    `seen`: (method, path, token) of every request.
    """

    def __init__(self, repositories: dict[str, Path], refuse: Callable[[str, str | None], Refusal | None]):
        self.repositories, self.refuse = repositories, refuse
        self.seen: list[tuple[str, str, str | None]] = []
        self.address = ""

    def files(self, repository: str) -> dict[str, Path]:
        folder = self.repositories[repository]
        return {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: object) -> None:
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        self.hub.seen.append((self.command, path, token))
        refusal = self.hub.refuse(path, token)
        if refusal:
            self.answer(*refusal)
            return
        api = path.startswith("api/")
        plain = path.removeprefix("api/").removeprefix("models/")
        found = [name for name in self.hub.repositories if plain == name or plain.startswith(f"{name}/")]
        if not found:
            self.answer(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return
        name, rest = found[0], plain[len(found[0]) :].strip("/").split("/")
        files = self.hub.files(name)
        revision = rest[1] if rest[0] in ("revision", "resolve", "tree", "paths-info") else COMMIT
        if revision not in ("main", COMMIT):
            self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        elif api and rest[0] in ("", "revision"):
            self.json({"id": name, "modelId": name, "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]})
        elif api and rest[0] == "tree":
            self.json([_entry(f, p) for f, p in files.items()])
        elif api and rest[0] == "paths-info":
            wanted = parse_qs(self.body.decode())["paths"]
            folders = [w for w in wanted if any(f.startswith(f"{w}/") for f in files)]
            entries = [{"type": "directory", "path": w, "oid": COMMIT} for w in folders]
            self.json(entries + [_entry(w, files[w]) for w in wanted if w in files])
        elif rest[0] == "resolve" and "/".join(rest[2:]) in files:
            self.content(files["/".join(rest[2:])])
        else:
            self.answer(404, {"X-Error-Code": "EntryNotFound"})

    def content(self, path: Path) -> None:
        data, status = path.read_bytes(), 200
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        if asked := self.headers.get("Range"):
            first, last = asked.removeprefix("bytes=").split("-")
            stop = min(int(last or len(data) - 1), len(data) - 1) + 1
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(data)}"
            data, status = data[int(first) : stop], 206
        self.answer(status, headers, data)


def _entry(name: str, path: Path) -> dict[str, object]:
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": COMMIT}


@contextmanager
def serve(
    repositories: dict[str, Path], refuse: Callable[[str, str | None], Refusal | None] = lambda path, token: None
) -> Iterator[Hub]:
    """A hub at `hub.address` while the block runs."""
    hub = Hub(repositories, refuse)
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()
