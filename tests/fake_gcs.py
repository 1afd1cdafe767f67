"""A stand-in for Google Cloud Storage: its JSON API over HTTP, in memory, as far as gcsfs, TensorStore and google-cloud-storage use it.

Objects are put whole or not at all and have generations, which preconditions (`ifGenerationMatch`) are held against, as the real one does.
`environment()` points those three at it; they must see it before they make their first connection.
"""

import base64
import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest.mock import patch
from urllib.parse import parse_qs, quote, unquote, urlsplit

_DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Storage:
    """What the buckets hold: {bucket: {name: (bytes, generation)}}; `forbidden` buckets answer 403 to everything."""

    buckets: dict[str, dict[str, tuple[bytes, int]]] = field(default_factory=dict)
    forbidden: set[str] = field(default_factory=set)
    uploads: dict[str, tuple[str, str, dict[str, str], bytearray]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    url: str = ""
    _generation: int = 0
    lock: Any = field(default_factory=threading.RLock)

    def environment(self) -> dict[str, str]:
        """Variables with which the clients talk to this server, without credentials."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,  # gcsfs and google-cloud-storage
            "FSSPEC_GCS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for the layout of a bucket by gRPC
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GCE_METADATA_ROOT": "127.0.0.1:9",  # TensorStore looks for credentials there: refused at once, it goes on without
            "GCE_METADATA_HOST": "127.0.0.1:9",
            "NO_GCE_CHECK": "true",
        }

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        with self.lock:
            return sorted(name for name in self.buckets[bucket] if name.startswith(prefix))

    def read(self, bucket: str, name: str) -> bytes:
        return self.buckets[bucket][name][0]

    def write(self, bucket: str, name: str, data: bytes) -> int:
        with self.lock:
            self._generation += 1
            self.buckets[bucket][name] = (data, self._generation)
            return self._generation


class _Answer(Exception):
    """A status with a message in place of a result."""

    def __init__(self, status: int, message: str = "") -> None:
        super().__init__(message)
        self.status = status


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients go away, or are killed
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    storage: Storage

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self._chunks() if self.headers.get("Transfer-Encoding") else self.rfile.read(length)
        if len(body) < length:  # the client was killed: nothing of it counts
            raise ConnectionError
        self._respond(*self._result(self.command, self.path, self.headers, body))

    do_GET = do_POST = do_PUT = do_DELETE = _handle

    def _result(self, method: str, target: str, headers: Any, body: bytes) -> tuple[int, dict[str, str], bytes]:
        try:
            with self.storage.lock:
                self.storage.requests.append(f"{method} {target}")
                return self._route(method, target, headers, body)
        except _Answer as answer:
            error = {"error": {"code": answer.status, "message": str(answer)}}
            return answer.status, {"Content-Type": "application/json"}, b"" if answer.status == 304 else json.dumps(error).encode()

    def _chunks(self) -> bytes:
        found = b""
        while line := self.rfile.readline():
            found += self.rfile.read(int(line.split(b";")[0], 16))
            self.rfile.readline()
            if line.strip() == b"0":
                return found
        raise ConnectionError

    def _respond(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(body)

    def _route(self, method: str, target: str, headers: Any, body: bytes) -> tuple[int, dict[str, str], bytes]:
        parts = urlsplit(target)
        query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        if parts.path.startswith("/batch/"):
            return self._batch(headers, body)
        if (session := query.get("upload_id")) is not None:
            return self._resume(session, headers, body)
        found = re.fullmatch(
            r"(/upload|/download)?(?:/storage/v1)?/b/([^/]+)(?:/o(?:/([^/]+)(?:/(compose|rewriteTo/b/[^/]+/o/[^/]+))?)?)?", parts.path
        )
        if found is None:
            raise _Answer(501, f"{method} {target} is not known to the stand-in")
        kind, bucket, name, action = found.groups()
        bucket, name = unquote(bucket), None if name is None else unquote(name)
        if bucket in self.storage.forbidden:
            raise _Answer(403, "the caller does not have storage.objects access to the bucket.")
        if bucket not in self.storage.buckets:
            raise _Answer(404, "The specified bucket does not exist.")
        if kind == "/upload":
            return self._upload(bucket, query, headers, body)
        if action == "compose":
            sources = [self._object(bucket, source["name"])[0] for source in json.loads(body)["sourceObjects"]]
            return _json(self._put(bucket, name or "", b"".join(sources), query))
        if action:
            into, as_name = map(unquote, action.removeprefix("rewriteTo/b/").split("/o/"))
            data, _ = self._object(bucket, name or "")
            size = str(len(data))
            return _json({"done": True, "resource": self._put(into, as_name, data, query), "objectSize": size, "totalBytesRewritten": size})
        if name is None:
            whole = parts.path.endswith("/o")
            return _json(self._list(bucket, query)) if whole else _json({"kind": "storage#bucket", "name": bucket, "id": bucket})
        if method == "DELETE":
            self._check(bucket, name, query)
            self._object(bucket, name)
            del self.storage.buckets[bucket][name]
            return 204, {}, b""
        return self._read(bucket, name, query, headers)

    def _object(self, bucket: str, name: str) -> tuple[bytes, int]:
        if name not in self.storage.buckets[bucket]:
            raise _Answer(404, f"No such object: {bucket}/{name}")
        return self.storage.buckets[bucket][name]

    def _check(self, bucket: str, name: str, query: dict[str, str], otherwise: int = 412) -> None:
        generation = self.storage.buckets[bucket].get(name, (b"", 0))[1]
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
            raise _Answer(412, "At least one of the pre-conditions you specified did not hold.")
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation:
            raise _Answer(otherwise, "At least one of the pre-conditions you specified did not hold.")

    def _put(self, bucket: str, name: str, data: bytes, query: dict[str, str]) -> dict[str, Any]:
        self._check(bucket, name, query)
        self.storage.write(bucket, name, data)
        return self._about(bucket, name)

    def _about(self, bucket: str, name: str) -> dict[str, Any]:
        data, generation = self._object(bucket, name)
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{generation}",
            "name": name,
            "bucket": bucket,
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(data)),
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
            "contentType": "application/octet-stream",
            "timeCreated": _DATE,
            "updated": _DATE,
        }

    def _list(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter, limit = query.get("prefix", ""), query.get("delimiter", ""), int(query.get("maxResults", 1000))
        first, end = max(query.get("startOffset", ""), query.get("pageToken", "")), query.get("endOffset")
        items: list[dict[str, Any]] = []
        prefixes: list[str] = []
        for name in self.storage.names(bucket, prefix):
            if name < first or (end and name >= end):
                continue
            head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            if found and prefix + head + delimiter in prefixes:
                continue
            if len(items) + len(prefixes) == limit:
                return {"kind": "storage#objects", "items": items, "prefixes": prefixes, "nextPageToken": name}
            if found:
                prefixes.append(prefix + head + delimiter)
            else:
                items.append(self._about(bucket, name))
        return {"kind": "storage#objects", "items": items, "prefixes": prefixes}

    def _read(self, bucket: str, name: str, query: dict[str, str], headers: Any) -> tuple[int, dict[str, str], bytes]:
        data, generation = self._object(bucket, name)
        self._check(bucket, name, query, 304)
        if query.get("alt") != "media":
            return _json(self._about(bucket, name))
        answer = {
            "Content-Type": "application/octet-stream",
            "x-goog-generation": str(generation),
            "x-goog-stored-content-length": str(len(data)),
        }
        if not (given := headers.get("Range")):
            return 200, answer, data
        low, high = re.fullmatch(r"bytes=(\d*)-(\d*)", given).groups()  # type: ignore[union-attr]
        start = int(low) if low else max(len(data) - int(high), 0)
        stop = min(int(high) + 1, len(data)) if low and high else len(data)
        if start >= len(data):
            raise _Answer(416, "The requested range cannot be satisfied.")
        return 206, {**answer, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}, data[start:stop]

    def _upload(self, bucket: str, query: dict[str, str], headers: Any, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if query["uploadType"] == "media":
            return _json(self._put(bucket, query["name"], body, query))
        if query["uploadType"] == "multipart":
            about, data = _parts(headers["Content-Type"], body)
            name = query.get("name") or json.loads(about.get_payload(decode=True))["name"]  # type: ignore[arg-type]
            return _json(self._put(bucket, name, data, query))
        name = query.get("name") or json.loads(body)["name"]
        session = str(len(self.storage.uploads))
        self.storage.uploads[session] = (bucket, name, query, bytearray())
        return 200, {"Location": f"{self.storage.url}/upload/storage/v1/b/{quote(bucket)}/o?upload_id={session}"}, b""

    def _resume(self, session: str, headers: Any, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if self.command == "DELETE":
            self.storage.uploads.pop(session, None)
            return 499, {}, b""
        bucket, name, query, data = self.storage.uploads[session]
        data += body
        total = (headers.get("Content-Range") or f"/{len(data)}").rpartition("/")[2]
        if total == "*" or int(total) > len(data):
            return 308, {"Range": f"bytes=0-{len(data) - 1}"} if data else {}, b""
        del self.storage.uploads[session]
        return _json(self._put(bucket, name, bytes(data), query))

    def _batch(self, headers: Any, body: bytes) -> tuple[int, dict[str, str], bytes]:
        lines = []
        for part in _split(headers["Content-Type"], body):
            head, _, _ = part.partition(b"\r\n\r\n")
            inner = part[len(head) :].lstrip().decode()
            method, target, _ = inner.splitlines()[0].split(" ")
            status, _, answer = self._result(method, urlsplit(target)._replace(scheme="", netloc="").geturl(), {}, b"")
            about = BytesParser().parsebytes(head.lstrip())
            lines.append(
                f"--batch\r\nContent-Type: application/http\r\nContent-ID: <response-{about.get('Content-ID', '').strip('<>')}>\r\n\r\n"
                f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(answer)}\r\n\r\n{answer.decode()}\r\n"
            )
        return 200, {"Content-Type": "multipart/mixed; boundary=batch"}, ("".join(lines) + "--batch--").encode()


def _json(value: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _split(content_type: str, body: bytes) -> list[bytes]:
    """The parts between the boundaries of a multipart body, each with its headers."""
    boundary = re.search(r"boundary=[\"']?([^\"';]+)", content_type)[1]  # type: ignore[index]
    pieces = body.split(f"--{boundary}".encode())[1:-1]
    return [piece.removeprefix(b"\r\n").removeprefix(b"\n").removesuffix(b"\n").removesuffix(b"\r") for piece in pieces]


def _parts(content_type: str, body: bytes) -> tuple[Message, bytes]:
    """What a multipart upload says of its object, and the object's bytes."""
    about, content = _split(content_type, body)
    data = re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1]
    return BytesParser().parsebytes(about), data


@contextmanager
def serving(*buckets: str) -> Iterator[Storage]:
    """A server with those buckets, in a thread of this process."""
    storage = Storage({name: {} for name in buckets})
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"storage": storage}))
    storage.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield storage
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serving_here(*buckets: str) -> Iterator[Storage]:
    """`serving`, with this very process as its client."""
    import fsspec

    with serving(*buckets) as storage, patch.dict(os.environ, storage.environment()), patch.dict(fsspec.config.conf, gcs={"token": "anon"}):
        yield storage
