"""`tq serve`: a model over HTTP for clients of OpenAI, Anthropic and Ollama, until somebody stops it."""

import contextlib
import dataclasses
import json as json_module
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tq import settings
from tq.commands import groups, options
from tq.errors import UsageError
from tq.output import Output, human_seconds

if TYPE_CHECKING:
    from tq.engine.run.serve.http import Server
    from tq.engine.run.serve.metrics import Record
    from tq.engine.run.serve.scheduler import Scheduler

EPILOG = options.examples(
    "tq serve -m SmolLM2-135M-Instruct-tq4",
    "tq serve -m MODEL --kv-bits 8,3 --parallel 4 --port 9000",
    "TQ_API_KEY=secret tq serve -m MODEL --host 0.0.0.0 --alias gpt-4o",
    "tq serve -m MODEL --json > requests.jsonl",
)
MOMENT_SECONDS = 0.2  # in which most answers end
DRAIN_SECONDS = 30.0  # for answers that are being written when the server is stopped
CLOSE_SECONDS = 5.0  # for telling those that are not finished by then
NOTES_SECONDS = 1.0  # between two looks for something to say
UNREMARKABLE = ("/health", "/metrics")  # asked for every few seconds by programs: said with --verbose


class Terminated(BaseException):
    """SIGTERM: somebody who manages this process wants it to end."""


@groups.flat
def serve(
    *,
    model: options.Model,
    host: Annotated[
        str, typer.Option("--host", metavar="NAME", help="Address to listen on; 0.0.0.0: all of this machine.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option("--port", metavar="N", help="Port to listen on; 0: any that is free.  [default: 8080]")
    ] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(
            "--alias", metavar="NAME", help="Another name of the model for clients; several times; '*': any name."
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", metavar="KEY", help="What clients must send. TQ_API_KEY keeps it out of sight."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin", metavar="URL", help="Web pages that may use the server; several times; '*': all."
        ),
    ] = None,
    parallel: Annotated[
        int | None,
        typer.Option("--parallel", metavar="N", help="Requests that are answered at the same time.  [default: 8]"),
    ] = None,
    queue: Annotated[
        int | None, typer.Option("--queue", metavar="N", help="Requests that may wait beyond those.  [default: 64]")
    ] = None,
    prefix_cache: Annotated[
        str | None,
        typer.Option(
            "--prefix-cache", metavar="SIZE", help="Memory for prompts read before; 0: none.  [default: an eighth]"
        ),
    ] = None,
    prompt_cache: options.PromptCache = None,
    stream: options.Stream = None,
    no_think: options.NoThink = False,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", "-n", metavar="N", help="Most tokens to generate.  [default: what the context has room for]"
        ),
    ] = None,
    sampling: groups.Sampling,
    caching: groups.Caching,
    profile: options.Profile = None,
    loading: groups.Loading,
    json: Annotated[bool, typer.Option("--json", help="Log requests as JSON, a line each, on stdout.")] = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Serve a model over HTTP.

    Clients of OpenAI, Anthropic and Ollama find what they know. Options of sampling are for requests that do not say.
    """
    out = Output(json=json, quiet=quiet, verbose=verbose)
    configured = options.read_settings(
        out,
        profile=profile,
        **vars(caching),
        prompt_cache=prompt_cache,
        port=port,
        parallel=parallel,
        queue=queue,
        prefix_cache=prefix_cache,
        budget=stream,
    )
    streaming = options.stream_settings(configured) if stream else None
    port, parallel, queue = (configured[f"serve.{name}"] for name in ("port", "parallel", "queue"))
    key = settings.api_key(api_key)
    prefix_bytes = configured.prefix_cache_bytes
    step = None if configured.found["prefill.step"].source == "default" else configured.prefill_step
    for name, value, least in (("--parallel", parallel, 1), ("--queue", queue, 0)):
        if value < least:
            raise UsageError(f"{name} must be {least} or more, not {value}")

    from tq.cpu import blas

    out.detail(f"BLAS: {blas.enable().reason}")
    from tq.engine.model.load import load
    from tq.engine.run.generate import prompt_notes
    from tq.engine.run.sampling import GenerateOptions
    from tq.engine.run.serve.body import NO_LIMIT
    from tq.engine.run.serve.http import Server
    from tq.engine.run.serve.routes import Service
    from tq.engine.run.serve.scheduler import Scheduler
    from tq.engine.run.serve.served import Names, Served
    from tq.engine.run.serve.tokens import Tokens

    chosen = GenerateOptions(
        max_tokens=NO_LIMIT if max_tokens is None else max_tokens,
        **sampling.asked,
    )
    service = Service()
    log = Log(out)
    server = Server(host, port, service, api_key=key, origins=allow_origin or (), log=log.request)
    with _listening(server, log) as closing:
        if not server.is_local and key is None:
            out.warn("whoever reaches this machine can use the model: --api-key or TQ_API_KEY asks for a key")
        log.say(f"loading {model}")
        loaded = load(model, **vars(loading), stream=streaming)
        prompts = options.prompt_cache(out, configured, loaded)
        scheduler = closing.enter_context(
            contextlib.closing(
                Scheduler(
                    loaded,
                    configured.kv,
                    max_batch=parallel,
                    max_queue=queue,
                    prefill_step=step,
                    prefix_bytes=prefix_bytes,
                    prompts=prompts,
                    default_options=chosen,
                )
            )
        )
        facts = scheduler.facts
        names = Names(str(Path(model).resolve()) if Path(model).name in ("", "..") else model, tuple(alias or ()))
        served = Served.of(loaded, facts, names, chosen, False if no_think else None)
        notes = list(facts.notes)
        if no_think and facts.has_chat_template:
            notes += [note.message for note in prompt_notes(loaded.tokenizer, think=False)]
        for note in notes:
            log.say(note)
        service.ready(scheduler, Tokens(loaded.tokenizer, facts.vocabulary), served)
        log.ready(server.url, names.shown)
        _wait(server, scheduler, log)


@contextlib.contextmanager
def _listening(server: "Server", log: "Log") -> Iterator[contextlib.ExitStack]:
    """Answers while the block runs; what it puts on the stack is closed between the last answer and the server.

    Ctrl-C and SIGTERM end the block. Answers that are being written are finished; a second Ctrl-C cuts them off.
    """

    def terminate(number: int, frame: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    thread = threading.Thread(target=server.serve_forever, name="tq-http", daemon=True)
    thread.start()
    closing = contextlib.ExitStack()
    try:
        try:
            yield closing
        finally:
            signal.signal(signal.SIGTERM, before)
            with contextlib.suppress(KeyboardInterrupt):
                if not server.drain(MOMENT_SECONDS):
                    log.say(f"finishing answers, for {DRAIN_SECONDS:.0f} seconds at most; Ctrl-C stops at once")
                    server.drain(DRAIN_SECONDS)
            closing.close()
            server.drain(CLOSE_SECONDS)
    except Terminated:
        pass
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _wait(server: "Server", scheduler: "Scheduler", log: "Log") -> None:
    """Until a signal comes."""
    while True:
        time.sleep(NOTES_SECONDS)
        for note in scheduler.take_notes():
            log.say(note)


class Log:
    """Says what happens, a line each. Threads take turns."""

    def __init__(self, out: Output):
        self._out, self._lock = out, threading.Lock()

    def say(self, text: str) -> None:
        """Something for people."""
        with self._lock:
            self._out.say(text)

    def ready(self, url: str, model: str) -> None:
        """Requests are answered from now on."""
        self._write({"event": "ready", "url": url, "model": model}, f"{model} is served at {url}, until Ctrl-C")

    def request(self, record: "Record") -> None:
        """One request has been answered, or not."""
        if record.path in UNREMARKABLE and record.status in (200, 503) and not self._out.verbose:
            return
        figures = {"tokens_per_second": record.tokens_per_second}
        self._write({"event": "request", **dataclasses.asdict(record), **figures}, describe(record))

    def _write(self, document: dict[str, Any], text: str) -> None:
        if not self._out.json:
            return self.say(text)
        with self._lock:
            sys.stdout.write(json_module.dumps({"time": time.time(), **document}) + "\n")
            sys.stdout.flush()


def describe(record: "Record") -> str:
    """`12:30:05 POST /v1/chat/completions 200 in 1.2 s, prompt 345 tokens (300 cached), answer 56 at 23.4/s`."""
    parts = [f"{time.strftime('%H:%M:%S')} {record.method} {record.path} {record.status} in {_brief(record.seconds)}"]
    if record.completion_tokens is not None:
        cached = f" ({record.cached_tokens} cached)" if record.cached_tokens else ""
        parts.append(f"prompt {record.prompt_tokens} tokens{cached}")
        speed = f" at {record.tokens_per_second:.1f}/s" if record.tokens_per_second else ""
        parts.append(f"answer {record.completion_tokens}{speed}")
    if record.ignored:
        parts.append(f"ignored: {' '.join(record.ignored)}")
    if record.status == 499:
        parts.append("the client went away")
    if record.error is not None:
        parts.append(record.error)
    line = ", ".join(parts)
    return "".join(c if c.isprintable() else "?" for c in line)  # a client's words may not move the cursor


def _brief(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else human_seconds(seconds)
