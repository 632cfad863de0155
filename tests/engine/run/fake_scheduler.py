"""A scheduler that says what a test tells it to say, and a server over it on a free port."""

import contextlib
import threading
import time
from dataclasses import replace

from tq.engine.run.serve.http import Server
from tq.engine.run.serve.requests import Done, Piece, Reading, Stats, TokenLogprob, ToolCall
from tq.engine.run.serve.routes import Service
from tq.engine.run.serve.served import Names, Served
from tq.engine.run.serve.stream import Stream

DONE = Done(
    reason="stop",
    stop_text=None,
    prompt_tokens=7,
    cached_tokens=4,
    completion_tokens=3,
    prefill_seconds=0.5,
    decode_seconds=0.25,
)
LENGTH, CALLED = replace(DONE, reason="length"), replace(DONE, reason="tool_calls")
CANCELLED = replace(DONE, reason="cancelled")
CALL = ToolCall("call_1", "weather", '{"city": "Köln"}')
HELLO = (Reading(4, 7), Piece("Hel", "text"), Piece("lo", "text"), DONE)
THOUGHT = (Piece("Hm", "thought"), Piece(", yes.", "thought"), Piece("Yes", "text"), DONE)
TOKENS = (
    TokenLogprob(5, "Hel", -0.25, ((5, "Hel", -0.25), (9, "\ufffd", float("-inf")))),
    TokenLogprob(6, "lo", -0.5, ((6, "lo", -0.5), (7, "la", -2.0))),
)
WITH_LOGPROBS = (Piece("Hel", "text", TOKENS[:1]), Piece("lo", "text", TOKENS[1:]), Piece("", "text"), DONE)
SERVED = Served(
    names=Names("org/Tiny-4bit"),
    size_bytes=1234,
    family="llama",
    quantization="4-bit lloyd-max",
    fingerprint="ab" * 32,
    context_length=256,
    has_tools=True,
    template="{{ messages }}",
    created=1_700_000_000.0,
)


class FakeScheduler:
    """Answers each request with the next of `answers`, the last of them for ever.

    An answer is a sequence of events, in which an exception ends the stream; an exception alone is raised by `submit`;
    `endless` goes on until it is cancelled.
    """

    def __init__(self, *answers):
        self.answers = list(answers) or [HELLO]
        self.requests = []
        self.streams = []

    def submit(self, request):
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        stream = Stream()
        self.streams.append(stream)
        if answer is endless or answer is silent:
            threading.Thread(target=answer, args=(stream,), daemon=True).start()
        else:
            for event in answer:
                stream.put(event)
        return stream

    def stats(self):
        return Stats(
            running=1,
            queued=2,
            finished=3,
            cancelled=4,
            failed=5,
            prompt_tokens=60,
            cached_tokens=50,
            completion_tokens=40,
            kv_bytes=1000,
            prefix_entries=6,
            prefix_bytes=2000,
            prefix_budget_bytes=3000,
            mode="batch",
        )


class FakeTokens:
    """A token is a byte; every prompt has `length`."""

    def __init__(self):
        self.counted, self.length = [], 42

    def count(self, request):
        self.counted.append(request)
        return self.length

    def encode(self, text, special):
        return ([1] if special else []) + list(text.encode())

    def decode(self, tokens):
        return bytes(tokens).decode()


def endless(stream):
    """A token every few milliseconds until nobody wants more."""
    while not stream.cancelled:
        stream.put(Piece("ha", "text"))
        time.sleep(0.005)
    stream.put(CANCELLED)


def silent(stream):
    """A long prompt: nothing to say until nobody wants more."""
    stream.put(Reading(1, 9))
    while not stream.cancelled:
        time.sleep(0.005)
    stream.put(CANCELLED)


@contextlib.contextmanager
def serving(*answers, served=SERVED, ready=True, host="127.0.0.1", **how):
    """A server, with `.scheduler`, and `.record()` that waits for the record of the nth request, beside its own."""
    service, records = Service(), []
    server = Server(host, 0, service, log=records.append, **how)
    server.scheduler, server.tokens = FakeScheduler(*answers), FakeTokens()

    def record(n=0):
        eventually(lambda: len(records) > n)  # a client has its answer before it is logged
        return records[n]

    server.record = record
    if ready:
        service.ready(server.scheduler, server.tokens, served)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def eventually(condition, seconds=10.0):
    """Waits until something is so that happens in another thread."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)
