"""A stand-in for Hugging Face's hub: a checkpoint in shards, a cache that holds it, and a server of its files."""

import contextlib
import hashlib
import json
import struct
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from common.checkpoint import INDEX, read_header

ID = "org/tiny-model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
VISION, BOTH, LANGUAGE = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
"""Shards with tensors of the vision part alone, of both halves, and of the language model alone."""


def split_checkpoint(source: Path, target: Path) -> Path:
    """Write a checkpoint of one file as three shards with an index, and code that must never be fetched."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    (target / "modeling_tiny.py").write_text("raise SystemExit('code of a repository has run')")
    content = (source / "model.safetensors").read_bytes()
    tensors = read_header(source / "model.safetensors")
    weight_map = {name: _shard(name) for name in tensors}
    for shard in (VISION, BOTH, LANGUAGE):
        header, data = dict[str, object](), b""
        for name, tensor in tensors.items():
            if weight_map[name] == shard:
                offsets = [len(data), len(data) + tensor.length]
                header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
                data += content[tensor.offset : tensor.offset + tensor.length]
        encoded = json.dumps(header).encode()
        (target / shard).write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    (target / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return target


def _shard(name: str) -> str:
    if name.startswith("vision_model."):
        return VISION
    return LANGUAGE if name.startswith("language_model.model.layers.") else BOTH


def fill_cache(cache: Path, repository: Path, *left_out: str) -> Path:
    """Write a repository's files, except some, into a cache in the hub's layout. Return the snapshot's folder."""
    folder = cache / f"models--{ID.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for part in (folder / "refs", folder / "blobs", snapshot):
        part.mkdir(parents=True)
    (folder / "refs/main").write_text(COMMIT)
    for file in repository.iterdir():
        if file.name not in left_out:
            blob = folder / "blobs" / hashlib.sha256(file.name.encode()).hexdigest()
            blob.write_bytes(file.read_bytes())
            (snapshot / file.name).symlink_to(blob)
    return snapshot


class _Handler(BaseHTTPRequestHandler):
    """The four requests that a download makes: about a repository, its list of files, and a file's head and content."""

    protocol_version = "HTTP/1.1"
    repository: ClassVar[Path]
    fault: ClassVar[str]
    requested: ClassVar[list[str]]
    closing: ClassVar[threading.Event]

    def log_message(self, *_args: Any) -> None:
        """Write nothing to stderr."""

    def do_HEAD(self) -> None:
        self._serve_file(with_body=False)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if self.fault == "silent":
            self.closing.wait()
            self.close_connection = True
        elif self.fault == "unavailable":
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE)
        elif self.fault == "missing" or not path.removeprefix("/api/models").startswith(f"/{ID}"):
            self._answer(HTTPStatus.UNAUTHORIZED, {"X-Error-Code": "RepoNotFound"})
        elif "/revision/absent" in path:
            self._answer(HTTPStatus.NOT_FOUND, {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith(f"/api/models/{ID}/tree/"):
            self._answer_json([self._entry(file) for file in self.repository.iterdir()])
        elif path.startswith("/api/models/"):
            self._answer_json({"id": ID, "sha": COMMIT})
        else:
            self._serve_file(with_body=True)

    def _entry(self, file: Path) -> dict[str, object]:
        return {
            "type": "file",
            "path": file.name,
            "size": file.stat().st_size,
            "oid": hashlib.sha1(file.name.encode()).hexdigest(),
        }

    def _serve_file(self, with_body: bool) -> None:
        name = urlsplit(self.path).path.rpartition("/")[2]
        if self.fault == "gated":
            return self._answer(HTTPStatus.FORBIDDEN, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        content = (self.repository / name).read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(name.encode()).hexdigest()}"'}
        if with_body:
            self.requested.append(name)
        stalls = with_body and self.fault == "stall" and name.endswith(".safetensors")
        self._answer(HTTPStatus.OK, headers, content, content[: len(content) // 2] if stalls else content if with_body else b"")
        if stalls:
            self.wfile.flush()
            self.closing.wait()
            self.close_connection = True
        return None

    def _answer_json(self, value: object) -> None:
        content = json.dumps(value).encode()
        self._answer(HTTPStatus.OK, {"Content-Type": "application/json"}, content, content)

    def _answer(
        self, status: HTTPStatus, headers: dict[str, str] | None = None, content: bytes = b"", body: bytes = b""
    ) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def hub_server(repository: Path, fault: str = "") -> Iterator[tuple[str, list[str]]]:
    """Serve a repository as the hub does, with one fault, and yield the URL and the growing list of files sent.

    Args:
        repository: folder of the files.
        fault: `missing`, `gated`, `unavailable`, `silent` (no answer), `stall` (half of each weight file); none if empty.
    """
    requested, closing = list[str](), threading.Event()
    values = {"repository": repository, "fault": fault, "requested": requested, "closing": closing}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), values))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requested
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
