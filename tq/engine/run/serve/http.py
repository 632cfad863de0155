"""The HTTP server: connections, limits, and responses on their way out.

One thread a connection, HTTP/1.1 with connections that stay. Who may come in is access.py's, what paths do routes.py's.
"""

from __future__ import annotations

import contextlib
import email.errors
import errno
import ipaddress
import json
import logging
import re
import select
import socket
import socketserver
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from tq import __version__
from tq.engine.run.serve.access import Access
from tq.engine.run.serve.body import RequestError
from tq.engine.run.serve.metrics import Record
from tq.engine.run.serve.routes import Call, ClientGone, Reply, Service, Streaming
from tq.errors import TQError

MAX_BODY_BYTES = 32 << 20  # some 8 million tokens
MAX_CONNECTIONS = 512  # a thread each
IDLE_SECONDS = 75.0  # without a byte read or written, a connection is closed
LINGER_SECONDS = 2.0  # for what a refused client still sends, so that it reads the refusal
CLIENT_GONE = 499  # nginx's number in logs; nobody receives it
JSON_TYPES = ("", "application/json", "text/plain", "application/x-www-form-urlencoded", "application/octet-stream")

HEAD_DEFECTS = (  # the others are of bodies, which are not read as mail
    email.errors.FirstHeaderLineIsContinuationDefect,
    email.errors.InvalidHeaderDefect,
    email.errors.MisplacedEnvelopeHeaderDefect,
    email.errors.MissingHeaderBodySeparatorDefect,
)
CHUNK_HEAD = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\n]*)?\r?\n")

logger = logging.getLogger(__name__)


class Server(ThreadingHTTPServer):
    """Listens as soon as it is made; `serve_forever` answers.

    Args:
        host: A name or an address of this machine; "" or "0.0.0.0" is all of them.
        port: 0 takes a free one, which `port` tells.
        service: What answers.
        api_key: What clients must send, as a bearer token or as x-api-key; None: nothing.
        origins: Of web pages that may use this server, beside those of this machine; "*" is any.
        log: Called with the record of each request, from many threads.

    Raises:
        TQError: The port is taken, or there is no such address here.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(
        self,
        host: str,
        port: int,
        service: Service,
        *,
        api_key: str | None = None,
        origins: Sequence[str] = (),
        log: Callable[[Record], None] = lambda record: None,
        max_body_bytes: int = MAX_BODY_BYTES,
    ):
        self.service, self.log, self.max_body_bytes = service, log, max_body_bytes
        self._count = threading.Condition()
        self._connections = self._requests = 0
        if not 0 <= port < 1 << 16:
            raise TQError(f"the port must be from 0 to {(1 << 16) - 1}, not {port}")
        try:
            family, _, _, _, address = socket.getaddrinfo(
                host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self.address_family = family
            super().__init__(address[:2], Handler)  # type: ignore[arg-type]
        except (OSError, UnicodeError) as error:  # the second: it cannot be a name
            raise _no_listening(host, port, error) from error
        # An origin has no path, also if somebody copies the address of a page.
        self.access = Access(api_key, tuple(origin.rstrip("/") for origin in origins), self.is_local)

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks the network for this machine's name.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    @property
    def port(self) -> int:
        return self.server_address[1]

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        return ipaddress.ip_address(str(self.server_address[0])).is_loopback

    @property
    def url(self) -> str:
        host = str(self.server_address[0])
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def drain(self, seconds: float) -> bool:
        """Take no more requests and wait for those that are being answered; whether all were."""
        self.service.closing = True
        with self._count:
            return self._count.wait_for(lambda: self._requests == 0, seconds)

    def enter(self, change: int) -> None:
        """A request begins (1) or is over (-1)."""
        with self._count:
            self._requests += change
            self._count.notify_all()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._count:
            full = self._connections >= MAX_CONNECTIONS
            self._connections += not full
        if full:
            request.settimeout(1)
            request.sendall(b"HTTP/1.1 503 Busy\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # there are no more threads
            with self._count:
                self._connections -= 1
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._count:
                self._connections -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that break are nobody's mistake."""
        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError):
            logger.error("a connection of %s failed: %s: %s", client_address[0], type(error).__name__, error)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = IDLE_SECONDS

    def handle_request(self) -> None:
        """One request, from its parsed head on."""
        started = time.perf_counter()
        path = _path(self.path)
        self._unread = True
        record = Record(uuid.uuid4().hex, str(self.client_address[0]), self.command, path)
        self.server.enter(1)
        try:
            self._respond(path, record)
        except (ClientGone, ConnectionError, TimeoutError):
            record.status, self.close_connection = CLIENT_GONE, True
        finally:
            record.seconds = time.perf_counter() - started
            self.server.service.metrics.add(record)
            try:
                self.server.log(record)
            finally:
                self.server.enter(-1)

    do_GET = do_POST = do_HEAD = do_OPTIONS = do_PUT = do_PATCH = do_DELETE = handle_request

    def _respond(self, path: str, record: Record) -> None:
        service = self.server.service
        try:
            self._check_head()
            self.server.access.admit(self.command, path, self.headers)
            if self.command == "OPTIONS":
                response: Reply | Streaming = Reply(204, "")
            else:
                response = service.respond(Call(self.command, path, self._body(), record, self._is_gone))
        except RequestError as problem:
            response = service.problem(path, problem, record)
        if service.closing:
            self.close_connection = True
        if isinstance(response, Reply):
            self._send(response, record)
            return
        try:
            self._stream(response, record)
        finally:
            response.chunks.close()
            response.cancel()  # if they were never begun, closing them did nothing

    def _check_head(self) -> None:
        """Raises RequestError: there are lines that others may read otherwise, and then see another request."""
        is_odd = any(isinstance(defect, HEAD_DEFECTS) for defect in self.headers.defects)
        if is_odd or any("\r" in value or "\n" in value for value in self.headers.values()):
            # Nobody knows where this request ends, and its headers are not for a response to repeat.
            self.close_connection, self.headers = True, self.MessageClass()
            raise RequestError("a header is a line with a name, a colon and a value", code="invalid_header")

    # --- the body ---

    def _body(self) -> bytes:
        """Raises RequestError: too long, of another type, or not framed as HTTP says."""
        kind = self.headers.get_content_type() if "Content-Type" in self.headers else ""
        lengths = set(self.headers.get_all("Content-Length", []))
        encodings = [encoding.strip().lower() for encoding in self.headers.get_all("Transfer-Encoding", [])]
        if encodings not in ([], ["chunked"]) or (encodings and lengths) or len(lengths) > 1:
            raise RequestError("the length of the body is not clear", code="invalid_length")
        if encodings:
            body = self._chunked_body()
        else:
            length = next(iter(lengths), "0").strip()
            if not length.isascii() or not length.isdecimal():
                raise RequestError("Content-Length must be a number", code="invalid_length")
            size = self._size(length)
            self._check_size(size)
            body = self.rfile.read(size)
            if len(body) < size:
                raise ClientGone
        self._unread = False
        if body and kind not in JSON_TYPES and not kind.endswith("+json"):
            raise RequestError(f"the body must be application/json, not {kind}", status=415, code="wrong_content_type")
        if self.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise RequestError("compressed bodies are not read here", status=415, code="wrong_content_encoding")
        return body

    def _chunked_body(self) -> bytes:
        body = bytearray()
        while True:
            head = CHUNK_HEAD.fullmatch(self.rfile.readline(1024))
            if head is None:
                raise RequestError("a chunk of the body has no length", code="invalid_length")
            size = int(head[1], 16)
            if size == 0:
                break
            self._check_size(len(body) + size)
            body += self.rfile.read(size)
            if self.rfile.readline(2).strip(b"\r\n"):
                raise RequestError("a chunk of the body is longer than it says", code="invalid_length")
        while self.rfile.readline(65537).strip():
            pass  # trailers
        return bytes(body)

    def _size(self, length: str) -> int:
        """A number of bytes; more digits than Python reads, or memory has, are more than may come."""
        return int(length) if len(length) < 20 else self.server.max_body_bytes + 1

    def _check_size(self, size: int) -> None:
        most = self.server.max_body_bytes
        if size > most:
            raise RequestError(f"the body is larger than {most} bytes", status=413, code="too_large")

    def handle_expect_100(self) -> bool:
        """A client that asks before it sends is told at once that its body is too long."""
        length = self.headers.get("Content-Length", "0").strip()
        if length.isdecimal() and self._size(length) > self.server.max_body_bytes:
            self.close_connection = True
            return True  # the body is refused before it is read
        return super().handle_expect_100()

    # --- the response ---

    def _head(self, status: int, content_type: str, record: Record) -> None:
        record.status = status
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("x-request-id", record.id)
        self.send_header("request-id", record.id)  # Anthropic's name
        for name, value in self.server.access.headers(self.command, self.headers).items():
            self.send_header(name, value)

    def _send(self, reply: Reply, record: Record) -> None:
        content = reply.content
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        body = text.encode("utf-8", "replace")
        if self._unread and self.headers.get("Content-Length", self.headers.get("Transfer-Encoding", "0")) != "0":
            self.close_connection = True
        self._head(reply.status, reply.content_type, record)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if reply.status != 204:
            self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        if self._unread and self.close_connection:
            self._linger()

    def _stream(self, response: Streaming, record: Record) -> None:
        chunked = self.request_version == "HTTP/1.1"
        self._head(200, f"{response.content_type}; charset=utf-8", record)
        self.send_header("Cache-Control", "no-cache")
        self.send_header("X-Accel-Buffering", "no")  # nginx would hold answers back
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.close_connection = True
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        for text in response.chunks:
            if text:
                data = text.encode("utf-8", "replace")
                self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)
            elif self._is_gone():
                raise ClientGone
        if chunked:
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection |= self.server.service.closing

    def _is_gone(self) -> bool:
        """Whether the client has closed the connection; what it may have sent beside is left there."""
        try:
            poller = select.poll()
            poller.register(self.connection, select.POLLIN)
            return bool(poller.poll(0)) and self.connection.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            return True

    def _linger(self) -> None:
        """Reads for a moment what was refused: closed at once, the client would see a reset and no response."""
        end = time.monotonic() + LINGER_SECONDS
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(LINGER_SECONDS)
            while time.monotonic() < end and self.connection.recv(1 << 16):
                pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class finds wrong with a request's head, as JSON."""
        self.close_connection, self._unread = True, False
        self.request_version = self.protocol_version
        if not hasattr(self, "headers"):
            self.headers = self.MessageClass()
        self.command = getattr(self, "command", None) or "GET"
        record = Record(uuid.uuid4().hex, str(self.client_address[0]), self.command, "")
        problem = RequestError(message or "this is no request of HTTP", status=int(code), code="bad_request")
        self._send(self.server.service.problem("", problem, record), record)
        self.server.service.metrics.add(record)
        self.server.log(record)

    def version_string(self) -> str:
        return f"tq/{__version__}"

    def log_message(self, format: str, *args: Any) -> None:
        """Records say it."""


def _path(target: str) -> str:
    """The path of what a request asks for: a path with a query, or a whole URL."""
    try:
        return unquote(urlsplit(target).path)
    except ValueError:
        return target


def _no_listening(host: str, port: int, error: OSError | UnicodeError) -> TQError:
    """Why there can be no server at an address."""
    if isinstance(error, socket.gaierror | UnicodeError):
        return TQError(f"there is no address {host}", hint="--host takes 127.0.0.1, 0.0.0.0 or a name of this machine")
    match error.errno:
        case errno.EADDRINUSE:
            return TQError(
                f"port {port} of {host} is taken by another program",
                hint="--port takes another number; 0 takes a free one",
            )
        case errno.EADDRNOTAVAIL:
            return TQError(f"{host} is no address of this machine", hint="--host 0.0.0.0 listens on all of them")
        case errno.EACCES:
            return TQError(f"port {port} needs rights of an administrator", hint="--port takes one above 1023")
    return TQError(f"{host}:{port} cannot be listened on: {error.strerror or error}")
