"""The HTTP server byte by byte: framing, limits, who may come in, clients that go away, and the end."""

import errno
import http.client
import json
import os
import re
import socket
import threading
import time

import pytest
from fake_scheduler import DONE, HELLO, SERVED, FakeScheduler, endless, eventually, serving, silent

from tq.engine.run.serve import http as module
from tq.engine.run.serve import routes
from tq.engine.run.serve.http import Server
from tq.engine.run.serve.requests import Piece
from tq.engine.run.serve.routes import Service
from tq.errors import TQError

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
STREAM = {**CHAT, "stream": True}


def ask(server, method, path, body=None, headers=None):
    """(status, headers, body) of one request on a connection of its own; the body is parsed if it is JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    data = json.dumps(body) if isinstance(body, dict) else body
    try:
        connection.request(method, path, data, headers or {})
        response = connection.getresponse()
        content = response.read()
    finally:
        connection.close()
    if response.headers.get_content_type() == "application/json" and content:
        content = json.loads(content)
    return response.status, response.headers, content


def raw(server, data, until=None):
    """What comes back for these bytes: until the server closes the connection, or until the text `until` has come."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(data)
        got = b""
        while until is None or until not in got:
            piece = connection.recv(65536)
            if not piece:
                break
            got += piece
        return got


def post(body, path="/v1/chat/completions", *headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(data)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + data


# --- routes and bodies ---


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "message"),
    [
        ("GET", "/nothing", None, 404, "not_found", "there is no /nothing here; there are /, /api/chat,"),
        ("POST", "/v1/embeddings", CHAT, 404, "not_found", "there is no /v1/embeddings here"),
        ("GET", "/v1/chat/completions", None, 405, "method_not_allowed", "takes POST, not GET"),
        ("DELETE", "/v1/models", None, 405, "method_not_allowed", "takes GET, not DELETE"),
        ("POST", "/v1/chat/completions", b"{bad", 400, "invalid_json", "the body is not JSON"),
        ("POST", "/v1/chat/completions", b"[" * 100_000, 400, "invalid_json", "the body is not JSON"),
        ("POST", "/v1/chat/completions", b"\xff\xfe{}", 400, "invalid_json", "the body is not JSON"),
        ("POST", "/v1/chat/completions", b"[]", 400, "invalid_json", "must be a JSON object, not a list"),
        ("POST", "/v1/chat/completions", None, 400, "invalid_json", "the body is not JSON"),
        ("POST", "/v1/chat/completions", {}, 400, None, "messages is missing"),
        ("POST", "/v1/completions", {"prompt": ["a\ud800b"]}, 400, "invalid_json", "half of a character"),
    ],
)
def test_what_is_wrong_with_a_request(method, path, body, status, code, message):
    with serving() as server:
        got, headers, document = ask(server, method, path, body)
        assert (got, document["error"]["code"]) == (status, code)
        assert message in document["error"]["message"]
        assert server.record().status == status
        assert headers["x-request-id"] == server.record().id
    if status == 405:
        assert headers["Allow"] in ("GET", "POST")


@pytest.mark.parametrize(
    ("path", "body", "shape"),
    [
        (
            "/v1/messages",
            {},
            {"type": "error", "error": {"type": "invalid_request_error", "message": "messages is missing"}},
        ),
        ("/api/chat", {"messages": 3}, {"error": "messages: input should be a valid list"}),
    ],
)
def test_errors_have_the_shape_of_their_protocol(path, body, shape):
    with serving() as server:
        assert ask(server, "POST", path, body)[::2] == (400, shape)


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ("application/x-www-form-urlencoded", 200),  # what curl -d says
        ("text/plain", 200),
        ("multipart/form-data; boundary=x", 415),
        ("image/png", 415),
    ],
)
def test_types_of_bodies(kind, status):
    with serving() as server:
        assert ask(server, "POST", "/v1/chat/completions", CHAT, {"Content-Type": kind})[0] == status


def test_compressed_bodies_are_refused():
    with serving() as server:
        assert ask(server, "POST", "/v1/chat/completions", CHAT, {"Content-Encoding": "gzip"})[0] == 415


def test_a_body_that_is_too_large_is_refused_and_the_refusal_can_be_read():
    with serving(max_body_bytes=1000) as server:
        status, _, document = ask(server, "POST", "/v1/chat/completions", b"x" * 3_000_000)
        assert (status, document["error"]["code"]) == (413, "too_large")
        assert "larger than 1000 bytes" in document["error"]["message"]
        chunks = (b"x" * 600 for _ in range(2))  # http.client sends an iterable in chunks
        assert ask(server, "POST", "/v1/chat/completions", chunks)[0] == 413
        assert server.scheduler.requests == []


def test_a_client_that_asks_first_is_told_before_it_sends():
    with serving(max_body_bytes=1000) as server:
        head = b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
        assert raw(server, head % 100_000, until=b"request_too_large").startswith(b"HTTP/1.1 413 ")
        assert raw(server, head % 10, until=b"\r\n\r\n").startswith(b"HTTP/1.1 100 Continue")


def test_a_chunked_body():
    data = json.dumps(CHAT).encode()
    chunked = b"%x;ext=1\r\n%b\r\n%x\r\n%b\r\n0\r\nTrailer: x\r\n\r\n" % (5, data[:5], len(data) - 5, data[5:])
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with serving() as server:
        twice = head + chunked + head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + chunked
        assert raw(server, twice).count(b'"content": "Hello"') == 2


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: -5\r\n",
        b"Content-Length: 5x\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: gzip\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n0x2\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n2;" + b"x" * 2000 + b"\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}more\r\n0\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: gzip\r\n",
        b"Transfer-Encoding: \r\nContent-Length: 2\r\n",
    ],
)
def test_a_length_that_is_not_clear_is_refused_and_ends_the_connection(headers):
    with serving() as server:
        got = raw(server, b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" + headers + b"\r\n{}")
        assert got.startswith(b"HTTP/1.1 400 ") and b"Connection: close" in got
        assert b"invalid_length" in got


@pytest.mark.parametrize(
    "lines",
    [
        b"Content-Length: 2\r\nno header\r\n",  # Python's parser takes the head to end before such a line
        b"no header\r\nContent-Length: 2\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b" Host: localhost\r\n",
        b"Origin: http://localhost/\r\n Set-Cookie: x=y\r\n",  # a line that goes on
    ],
)
def test_a_head_that_others_may_read_otherwise_is_refused_and_ends_the_connection(lines):
    with serving() as server:
        head = b"POST /v1/completions HTTP/1.1\r\n" + lines + b"Host: localhost\r\n\r\n"
        got = raw(server, head + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert got.startswith(b"HTTP/1.1 400 ") and got.count(b"HTTP/1.1 ") == 1
        assert b"invalid_header" in got and b"Set-Cookie" not in got


@pytest.mark.parametrize("expect", [b"", b"Expect: 100-continue\r\n"])
def test_a_length_of_more_digits_than_numbers_have_here_is_too_large(expect):
    with serving() as server:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" + expect + b"Content-Length: "
        assert raw(server, head + b"9" * 6000 + b"\r\n\r\n").startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("path", ["//[", "http://[/v1/models", "/%00%1b[2J", "*", "?"])
def test_nonsense_for_a_path_is_answered(path):
    with serving() as server:
        got = raw(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert re.match(rb"HTTP/1.1 (200|404) ", got)


def test_a_path_may_be_a_whole_url():
    with serving() as server:
        got = raw(server, b"GET http://localhost/health?x=1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert got.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("data", [b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"BREW / HTTP/1.1\r\n\r\n"])
def test_what_is_no_http_gets_an_error_in_json(data):
    with serving() as server:
        got = raw(server, data)
        status = int(re.match(rb"HTTP/1.1 (\d+) ", got)[1])
        assert b'{"error": {"message": ' in got
        assert status == server.record().status >= 400


# --- connections ---


def test_a_connection_stays_after_errors_and_answers_in_order():
    requests = (
        post(CHAT) + post(b"{bad") + post({}, "/nothing") + post(CHAT, "/v1/chat/completions", "Connection: close")
    )
    with serving() as server:
        got = raw(server, requests)
    assert re.findall(rb"HTTP/1.1 (\d+)", got) == [b"200", b"400", b"404", b"200"]


def test_a_connection_stays_after_a_stream():
    with serving() as server:
        got = raw(server, post(STREAM) + post(CHAT, "/v1/chat/completions", "Connection: close"))
    assert got.count(b"HTTP/1.1 200") == 2
    first, _, second = got.partition(b"0\r\n\r\nHTTP/1.1")
    assert b"Transfer-Encoding: chunked" in first and b"data: [DONE]" in first
    assert b'"content": "Hello"' in second


def test_a_client_of_http_1_0_gets_a_stream_that_ends_with_the_connection():
    with serving() as server:
        got = raw(server, post(STREAM).replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert b"Transfer-Encoding" not in got and b"Connection: close" in got
    assert got.endswith(b"data: [DONE]\n\n")


def test_head_has_no_body():
    with serving() as server:
        got = raw(server, b"HEAD /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert got.startswith(b"HTTP/1.1 200") and got.endswith(b"\r\n\r\n")


def test_several_clients_are_answered_at_once():
    barrier = threading.Barrier(4)

    class Together(FakeScheduler):
        def submit(self, request):
            barrier.wait(timeout=20)  # breaks unless all four are here together
            return super().submit(request)

    with serving() as server:
        server.service.ready(Together(HELLO), server.tokens, SERVED)
        found = []
        clients = [
            threading.Thread(target=lambda: found.append(ask(server, "POST", "/v1/chat/completions", CHAT)[0]))
            for _ in range(4)
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
    assert found == [200] * 4


def test_there_is_a_limit_to_connections(monkeypatch):
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 2)
    with serving() as server:
        held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        eventually(lambda: server._connections == 2)
        assert raw(server, b"").startswith(b"HTTP/1.1 503 ")
        for connection in held:
            connection.close()
        eventually(lambda: server._connections == 0)
        assert ask(server, "GET", "/health")[0] == 200


def test_a_silent_connection_is_closed(monkeypatch):
    monkeypatch.setattr(module.Handler, "timeout", 0.1)
    with serving() as server:
        assert raw(server, b"") == b""
        assert raw(server, b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{") == b""
        assert server.record().status == 499


# --- clients that go away ---


@pytest.mark.parametrize("answer", [endless, silent])
@pytest.mark.parametrize("body", [CHAT, STREAM])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/api/chat"])
def test_a_client_that_goes_away_cancels_its_answer(monkeypatch, answer, body, path):
    monkeypatch.setattr(routes, "BEAT_SECONDS", 0.02)
    with serving(answer) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(post({**body, "max_tokens": 5, "stream": body.get("stream", False)}, path))
            eventually(lambda: server.scheduler.streams)
            if "stream" in body:
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
            assert not server.scheduler.streams[0].cancelled
        eventually(lambda: server.scheduler.streams[0].cancelled)
        assert (server.record().status, server.record().completion_tokens) == (499, 3)


@pytest.mark.parametrize("body", [CHAT, STREAM])
def test_several_answers_that_nobody_waits_for_are_counted_at_once(monkeypatch, body):
    monkeypatch.setattr(routes, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(routes, "SETTLE_SECONDS", 60)
    with serving(endless) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(post({**body, "n": 3}))
            eventually(lambda: len(server.scheduler.streams) == 3)
        assert (server.record().status, server.record().completion_tokens) == (499, 9)


def test_a_client_that_reads_too_slowly_is_given_up(monkeypatch):
    monkeypatch.setattr(module.Handler, "timeout", 0.2)
    flood = (*(Piece("x" * 100_000, "text") for _ in range(200)), DONE)  # more than all buffers on the way hold
    with serving(flood) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(post(STREAM))
            assert server.record().status == 499
            assert server.scheduler.streams[0].cancelled


@pytest.mark.parametrize(
    ("path", "sign"),
    [
        ("/v1/chat/completions", b": keepalive 1/9\n\n"),
        ("/v1/messages", b"event: ping\n"),
        ("/api/chat", b'"message": {"role": "assistant", "content": ""}}\n'),
    ],
)
def test_a_long_prompt_does_not_look_like_a_dead_server(monkeypatch, path, sign):
    monkeypatch.setattr(routes, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(routes, "KEEPALIVE_SECONDS", 0.03)
    with serving(silent) as server:
        assert sign in raw(server, post({**STREAM, "max_tokens": 5}, path), until=sign)


# --- who may come in ---


def test_a_key_is_asked_for_where_there_is_one():
    with serving(api_key="secret") as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"x-api-key": "sécret"}):
            status, _, document = ask(server, "GET", "/v1/models", headers=headers)
            assert (status, document["error"]["code"]) == (401, "invalid_api_key")
        for headers in (
            {"Authorization": "Bearer secret"},
            {"authorization": "bearer secret"},
            {"x-api-key": "secret"},
        ):
            assert ask(server, "GET", "/v1/models", headers=headers)[0] == 200
        assert [ask(server, "GET", path)[0] for path in ("/health", "/", "/metrics", "/api/tags")] == [
            200,
            200,
            401,
            401,
        ]
        assert ask(server, "POST", "/v1/messages", CHAT)[2]["error"]["type"] == "authentication_error"
        assert server.scheduler.requests == []


@pytest.mark.parametrize(
    ("origin", "origins", "status"),
    [
        ("https://evil.example", (), 403),
        ("null", (), 403),
        ("https://evil.example", ("https://good.example",), 403),
        ("https://good.example", ("https://good.example",), 200),
        ("https://good.example", ("https://good.example/",), 200),
        ("https://evil.example", ("*",), 200),
        ("http://localhost:3000", (), 200),
        ("http://127.0.0.1:3000", (), 200),
        ("http://localhost.evil.example", (), 403),
        ("http://[", (), 403),
    ],
)
def test_web_pages_of_others_need_to_be_allowed(origin, origins, status):
    with serving(origins=origins) as server:
        got, headers, _ = ask(server, "POST", "/v1/chat/completions", CHAT, {"Origin": origin})
        assert got == status
        allowed = headers["Access-Control-Allow-Origin"]
        assert allowed == (None if status == 403 else "*" if origins == ("*",) else origin)
        assert len(server.scheduler.requests) == (status == 200)


def test_a_browser_may_ask_what_it_may_do():
    with serving(origins=["https://good.example"], api_key="secret") as server:
        ask_for = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-foo"}
        status, headers, body = ask(
            server, "OPTIONS", "/v1/chat/completions", headers={"Origin": "https://good.example", **ask_for}
        )
        assert (status, body, headers["Access-Control-Allow-Origin"]) == (204, b"", "https://good.example")
        assert headers["Access-Control-Allow-Headers"] == "authorization,x-foo"
        assert "POST" in headers["Access-Control-Allow-Methods"]
        refused = ask(server, "OPTIONS", "/v1/chat/completions", headers={"Origin": "https://evil.example", **ask_for})
        assert refused[0] == 403 and "Access-Control-Allow-Origin" not in refused[1]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8080", 200),
        ("127.0.0.1", 200),
        ("[::1]:8080", 200),
        ("host.docker.internal:8080", 200),
        ("evil.example:8080", 403),
        ("[", 403),
        ("localhost:port", 403),
        ("localhost.evil.example", 403),
    ],
)
def test_a_foreign_name_that_leads_to_this_machine_is_refused(host, status):
    with serving() as server:
        assert ask(server, "GET", "/v1/models", headers={"Host": host})[0] == status
    with serving(api_key="k") as server:  # whoever has the key may call it what he likes
        assert ask(server, "GET", "/v1/models", headers={"Host": host, "x-api-key": "k"})[0] == 200


# --- beginning and end ---


def test_until_the_model_is_loaded_clients_are_asked_to_come_again():
    with serving(ready=False) as server:
        for method, path in (("GET", "/health"), ("GET", "/v1/models"), ("POST", "/v1/chat/completions")):
            status, headers, document = ask(server, method, path, CHAT if method == "POST" else None)
            assert (status, document["error"]["code"], headers["Retry-After"]) == (503, "loading", "5")
        assert ask(server, "GET", "/")[0] == 200
        server.service.ready(server.scheduler, server.tokens, SERVED)
        assert ask(server, "GET", "/health")[::2] == (200, {"status": "ok"})


def test_at_the_end_answers_are_finished_and_no_others_begun(monkeypatch):
    monkeypatch.setattr(routes, "BEAT_SECONDS", 0.02)
    with serving(endless) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(post(STREAM))
            assert connection.recv(100)
            assert not server.drain(0.1)
            status, headers, document = ask(server, "GET", "/health")
            assert (status, document["error"]["code"], headers["Connection"]) == (503, "stopping", "close")
            server.scheduler.streams[0].cancel()  # as the scheduler does when it closes
            assert server.drain(20)
            got = b""
            while piece := connection.recv(65536):
                got += piece
        assert got.endswith(b"0\r\n\r\n") and b"the server is stopping" in got
        assert server.record(-1).error == "the server is stopping"


def test_a_whole_answer_that_the_end_cuts_off_is_an_error():
    with serving((Piece("Hel", "text"), DONE.__class__(**{**DONE.__dict__, "reason": "cancelled"}))) as server:
        status, _, document = ask(server, "POST", "/v1/chat/completions", CHAT)
        assert (status, document["error"]["code"]) == (503, "stopping")


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("127.0.0.1", 70000, "the port must be from 0 to 65535, not 70000"),
        ("no such host", 0, "there is no address"),
        ("a" * 80, 0, "there is no address"),  # longer than a name can be
    ],
)
def test_what_is_no_address(host, port, message):
    with pytest.raises(TQError, match=message):
        Server(host, port, Service())


def test_a_port_that_is_taken():
    with serving() as server, pytest.raises(TQError, match=f"port {server.port} of 127.0.0.1 is taken") as caught:
        Server("127.0.0.1", server.port, Service())
    assert caught.value.hint == "--port takes another number; 0 takes a free one"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.EADDRNOTAVAIL, "10.9.8.7 is no address of this machine"),
        (errno.EACCES, "port 80 needs rights of an administrator"),
        (errno.ENOMEM, "10.9.8.7:80 cannot be listened on: Cannot allocate memory"),
    ],
)
def test_why_there_can_be_no_server(monkeypatch, code, message):
    def refuse(self):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Server, "server_bind", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: [(socket.AF_INET, 1, 6, "", ("10.9.8.7", 80))])
    with pytest.raises(TQError, match=message):
        Server("10.9.8.7", 80, Service())


def test_addresses():
    for host, local, url in (("127.0.0.1", True, "http://127.0.0.1:"), ("0.0.0.0", False, "http://127.0.0.1:")):
        server = Server(host, 0, Service())
        assert (server.is_local, server.url) == (local, f"{url}{server.port}")
        server.server_close()


# --- figures ---


def test_metrics_and_records():
    with serving() as server:
        requests = [("POST", "/v1/chat/completions", CHAT), ("POST", "/v1/chat/completions", STREAM),
                    ("GET", "/v1/models/Tiny-4bit", None), ("GET", "/nothing/at/all", None)]  # fmt: skip
        for n, request in enumerate(requests):
            ask(server, *request)
            server.record(n)
        record = server.record(0)
        assert (record.method, record.path, record.status) == ("POST", "/v1/chat/completions", 200)
        assert (record.prompt_tokens, record.cached_tokens, record.completion_tokens) == (7, 4, 3)
        assert record.tokens_per_second == 8.0 and record.seconds > 0
        assert server.record(1).completion_tokens == 3 and server.record(2).completion_tokens is None
        status, headers, text = ask(server, "GET", "/metrics")
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    lines = text.decode().splitlines()
    for line in (
        'tq_model_info{model="Tiny-4bit",mode="batch"} 1',
        'tq_http_requests_total{route="/v1/chat/completions",status="200"} 2',
        'tq_http_requests_total{route="/v1/models/{id}",status="200"} 1',
        'tq_http_requests_total{route="other",status="404"} 1',
        'tq_answers_total{end="cancelled"} 4',
        "tq_answers_running 1",
        "tq_answers_queued 2",
        "tq_cached_tokens_total 50",
        "tq_prefill_seconds_total 1.0",
        "tq_decode_seconds_total 0.5",
        "tq_prefix_bytes 2000",
    ):
        assert line in lines
    assert all(line.startswith(("# HELP tq_", "# TYPE tq_", "tq_")) for line in lines)


def test_texts_to_tokens_and_back():
    with serving() as server:
        assert ask(server, "POST", "/tokenize", {"content": "Hi"})[2] == {"tokens": [72, 105]}
        assert ask(server, "POST", "/tokenize", {"content": "Hi", "add_special": True})[2] == {"tokens": [1, 72, 105]}
        assert ask(server, "POST", "/detokenize", {"tokens": [72, 105]})[2] == {"content": "Hi"}


def test_what_is_nested_deeper_than_python_goes_is_the_clients_mistake():
    with serving(RecursionError("maximum recursion depth exceeded")) as server:
        status, _, document = ask(server, "POST", "/v1/chat/completions", CHAT)
        assert (status, document["error"]["message"]) == (400, "the request is nested too deeply")


def test_paths_may_have_queries_and_slashes_at_the_end():
    with serving() as server:
        assert ask(server, "GET", "/v1/models/?limit=1000")[0] == 200
        assert ask(server, "GET", "/models")[0] == 200
        assert ask(server, "POST", "/v1/messages?beta=true", {**CHAT, "max_tokens": 3})[0] == 200


def test_text_with_half_a_character_is_sent_nevertheless():
    with serving((Piece("\ud800", "text"), DONE)) as server:
        assert ask(server, "POST", "/v1/chat/completions", CHAT)[0] == 200
        assert ask(server, "POST", "/v1/chat/completions", STREAM)[0] == 200


def test_nothing_is_left_of_a_client_that_comes_and_goes():
    with serving() as server:
        for _ in range(5):
            ask(server, "POST", "/v1/chat/completions", STREAM)
        eventually(lambda: server._connections == 0 and server._requests == 0)
        before = time.monotonic()
        assert server.drain(20) and time.monotonic() - before < 20
