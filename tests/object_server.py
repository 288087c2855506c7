"""An S3 server on loopback, in a thread of the test process, that can be told to throttle, to fail and to hang up.

with S3Server() as server:
    server.fault = lambda request: "throttle" if request.is_part else ""
    ...                               # AWS's variables are set: s3://bucket/... leads here, in ranks, too
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from moto.backends import get_backend
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "bucket"


@dataclass(frozen=True)
class Request:
    """`number` counts all requests from 0."""

    number: int
    method: str
    path: str
    query: str

    @property
    def is_part(self) -> bool:
        """Of an upload in parts."""
        return self.method == "PUT" and "partNumber=" in self.query


Fault = Callable[[Request], str]
"""Returns "" to serve the request, "throttle", "error", "refuse", "drop" (before it is served) or "mute" (after)."""

_ANSWERS = {
    "throttle": ("503 Slow Down", "SlowDown"),
    "error": ("500 Internal Server Error", "InternalError"),
    "refuse": ("403 Forbidden", "AccessDenied"),
}


class _Quiet(WSGIRequestHandler):
    def log(self, *_: Any) -> None:
        pass


class S3Server:
    """Starts with one empty bucket. `requests` holds what was asked for."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.fault: Fault = lambda _: ""
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._sent: dict[int, int] = {}
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._serve, True, request_handler=_Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._variables = {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "2",  # the tests of what never heals take no minutes
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.port}",
            "NO_PROXY": "127.0.0.1",
        }

    def __enter__(self) -> S3Server:
        get_backend("s3").reset()
        self._backend().create_bucket(BUCKET, "us-east-1")
        self._before = {name: os.environ.get(name) for name in self._variables}
        os.environ.update(self._variables)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        for name, value in self._before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})

    def keys(self) -> list[str]:
        """Every object, sorted."""
        return sorted(self._backend().buckets[BUCKET].keys)

    def unfinished(self) -> list[str]:
        """The objects that somebody has begun to upload in parts."""
        return sorted(u.key_name for u in self._backend().buckets[BUCKET].multiparts.values())

    def add(self, key: str) -> None:
        """An empty object."""
        self._backend().put_object(BUCKET, key, b"")

    def sent(self) -> int:
        """Bytes of all answers to GET requests that are in `requests`."""
        return sum(self._sent.get(request.number, 0) for request in self.requests)

    def _backend(self) -> Any:
        return get_backend("s3")["123456789012"]["aws"]

    def _serve(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        with self._lock:
            fields = (environ[name] for name in ("REQUEST_METHOD", "PATH_INFO", "QUERY_STRING"))
            request = Request(next(self._numbers), *fields)
            self.requests.append(request)
        fault = self.fault(request)
        if fault in _ANSWERS:
            status, code = _ANSWERS[fault]
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start(status, [("Content-Type", "application/xml")])
            return [f"<Error><Code>{code}</Code><Message>told to</Message></Error>".encode()]
        if fault == "drop":
            self._hang_up(environ)
        answer = list(self._moto(environ, start))
        if request.method == "GET":
            self._sent[request.number] = sum(map(len, answer))
        if fault == "mute":
            self._hang_up(environ)
        return answer

    @staticmethod
    def _hang_up(environ: dict[str, Any]) -> None:
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        raise ConnectionError("told to hang up")
