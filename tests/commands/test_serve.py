"""`tq serve`: from a command line to answers of a real model through the clients that people use, and to its end."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import anthropic
import ollama
import openai
import pytest

from tq import settings
from tq.commands import serve as command
from tq.commands.serve import Terminated, describe
from tq.engine.run.serve.metrics import Record
from tq.errors import UsageError

ROOT = Path(__file__).parents[2]
QUESTION = "Hello" * 16  # longer than what is read again rather than kept
ASK = [{"role": "user", "content": QUESTION}]


@pytest.fixture
def served(tq, checkpoint, monkeypatch):
    """served(probe, *arguments): the result of the command, and of probe(url), which is called while it serves."""

    def call(probe, *arguments):
        found = []

        def wait(server, scheduler, log):
            found.append(probe(server.url))
            raise Terminated

        monkeypatch.setattr(command, "_wait", wait)
        result = tq("serve", "-m", checkpoint, "--port", "0", "--prompt-cache", "0", *arguments)
        assert found, result.err
        return result, *found

    return call


def get(url, path, **headers):
    """(status, document); of errors too."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, headers=headers)) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def of_openai(url, **more):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="x", http_client=openai.DefaultHttpxClient(verify=False), **more)


# --- one real model, three clients ---


def test_clients_get_the_answer_that_tq_run_gives(served, tq, checkpoint):
    def probe(url):
        api = of_openai(url)
        ask = {"model": "tiny", "messages": ASK, "max_tokens": 12}
        whole = api.chat.completions.create(**ask)
        chunks = list(api.chat.completions.create(**ask, stream=True))
        claude = anthropic.Anthropic(base_url=url, api_key="x", http_client=anthropic.DefaultHttpxClient(verify=False))
        message = claude.messages.create(**ask)
        counted = claude.messages.count_tokens(model="tiny", messages=ASK)
        llama = ollama.Client(url, verify=False).chat("tiny", ASK, options={"num_predict": 12})
        seeded = [
            api.chat.completions.create(**ask, temperature=1.5, seed=3).choices[0].message.content,
            ollama.Client(url, verify=False)
            .chat("tiny", ASK, options={"num_predict": 12, "temperature": 1.5, "seed": 3})
            .message.content,
        ]
        assert seeded[0] == seeded[1] != whole.choices[0].message.content
        raw = api.completions.create(model="tiny", prompt="Hello", max_tokens=12)
        tokens = api.completions.create(model="tiny", prompt=[256, *b"Hello"], max_tokens=12)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        texts = [whole.choices[0].message.content, streamed, message.content[0].text, llama.message.content]
        assert counted.input_tokens == whole.usage.prompt_tokens == llama.prompt_eval_count
        assert message.usage.input_tokens + message.usage.cache_read_input_tokens == counted.input_tokens
        assert message.usage.cache_read_input_tokens > 0  # the same prompt has been read before
        return texts, raw.choices[0].text, tokens.choices[0].text

    result, (texts, raw, tokens) = served(probe)
    assert result.code == 0, result.err
    answered = json.loads(tq("run", "-m", checkpoint, QUESTION, "-n", "12", "--json").out)["text"]
    assert texts == [answered] * 4 and answered
    continued = json.loads(tq("run", "-m", checkpoint, "Hello", "--raw", "-n", "12", "--json").out)["text"]
    assert (raw, tokens) == (continued, continued)
    assert "tiny is served at http://127.0.0.1:" in result.err
    assert "POST /v1/messages 200 in " in result.err and "answer 12" in result.err


def test_four_at_once_answer_as_each_alone(served):
    def probe(url):
        def answer(text, into):
            ask = {"messages": [{"role": "user", "content": text}], "max_tokens": 16}
            into[text] = of_openai(url).chat.completions.create(model="tiny", **ask).choices[0].message.content

        texts = ["Hello", "And you?", "Why", "Tell me more of it"]
        together, alone = {}, {}
        threads = [threading.Thread(target=answer, args=(text, together)) for text in texts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for text in texts:
            answer(text, alone)
        return together, alone

    _, (together, alone) = served(probe, "--prefix-cache", "0")
    assert together == alone and len(together) == 4


# --- options ---


def test_options_reach_the_engine(served, monkeypatch):
    from tq.engine.cache.settings import KVSettings
    from tq.engine.run.sampling import GenerateOptions
    from tq.engine.run.serve import scheduler

    given = []

    class Spy(scheduler.Scheduler):
        def __init__(self, *arguments, **named):
            given.append((arguments[1], named))
            super().__init__(*arguments, **named)

    monkeypatch.setattr(scheduler, "Scheduler", Spy)
    arguments = "--temp 0.5 --top-p 0.9 --top-k 7 --min-p 0.1 --repetition-penalty 1.1 --repetition-context 9".split()
    arguments += "--min-tokens 2 -n 5 --stop zz --kv-bits 8,4 --kv-sink 4 --parallel 3 --queue 5".split()
    arguments += "--prefix-cache 3MB --prefill-step 32 --alias first --alias second --no-think".split()
    result, (status, models) = served(lambda url: get(url, "/v1/models"), *arguments)
    assert (result.code, status, models["data"][0]["id"]) == (0, 200, "first"), result.err
    ((kv, named),) = given
    assert kv == KVSettings(8, 4, sink=4)
    assert named == {
        "max_batch": 3, "max_queue": 5, "prefill_step": 32, "prefix_bytes": 3_000_000, "prompts": None,
        "default_options": GenerateOptions(5, 0.5, 0.9, 7, 0.1, 1.1, 9, 2, None, ("zz",)),
    }  # fmt: skip
    assert "this model's chat template has no switch for thinking" in " ".join(result.err.split())


def test_without_options_the_context_is_the_limit(served):
    def probe(url):
        done = of_openai(url).completions.create(model="", prompt=[1, 2, 3])
        return done.choices[0].finish_reason, done.usage.total_tokens

    _, found = served(probe)
    assert found in [("length", 256), ("stop", found[1])]


def test_a_key_from_the_environment_is_asked_for_and_never_shown(served, tq, monkeypatch):
    monkeypatch.setenv("TQ_API_KEY", "s3cret")
    result, found = served(
        lambda url: [get(url, "/v1/models")[0], get(url, "/v1/models", **{"x-api-key": "s3cret"})[0]]
    )
    assert found == [401, 200]
    shown = tq("doctor", "--json").out
    assert "s3cret" not in shown + result.out + result.err and "TQ_API_KEY" in shown


def test_a_key_option_comes_before_the_environment(monkeypatch):
    monkeypatch.setenv("TQ_API_KEY", "environment")
    assert (settings.api_key("option"), settings.api_key(None)) == ("option", "environment")
    monkeypatch.setenv("TQ_API_KEY", "")
    assert settings.api_key(None) is None
    with pytest.raises(UsageError, match="--api-key is empty"):
        settings.api_key(" ")


def test_an_open_server_without_a_key_is_warned_of(served):
    result, status = served(lambda url: get(url, "/health")[0], "--host", "0.0.0.0")
    assert status == 200
    assert "warning: whoever reaches this machine can use the model" in result.err
    result, _ = served(lambda url: None, "--host", "0.0.0.0", "--api-key", "k")
    assert "warning" not in result.err
    result, _ = served(lambda url: None)
    assert "warning" not in result.err


def test_pages_that_are_allowed(served):
    def probe(url):
        return [get(url, "/v1/models", Origin=f"https://{name}.example")[0] for name in ("good", "evil")]

    assert served(probe, "--allow-origin", "https://good.example")[1] == [200, 403]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--parallel", "0"], 2, "--parallel must be 1 or more, not 0"),
        (["--queue", "-1"], 2, "--queue must be 0 or more, not -1"),
        (["--prefix-cache", "much"], 2, "'much' is no size such as 500MB, 8GB or 0"),
        (["--api-key", ""], 2, "--api-key is empty"),
        (["--temp", "-1"], 2, "temp must be 0 (greedy) or more"),
        (["--port", "70000"], 1, "the port must be from 0 to 65535, not 70000"),
        (["-m", "./nothing"], 1, "no such model: ./nothing"),
    ],
)
def test_mistakes_are_sentences(tq, checkpoint, arguments, code, message):
    result = tq("serve", "-m", checkpoint, "--port", "0", *arguments)
    assert (result.code, result.out) == (code, "")
    assert message in result.err


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(tq):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = tq("serve", "-m", "./nothing", "--port", port)
    assert result.code == 1
    assert result.err.startswith(f"error: port {port} of 127.0.0.1 is taken by another program\nhint: --port takes")


# --- what is said ---


def test_quiet_says_nothing(served):
    result, _ = served(lambda url: get(url, "/v1/models"), "-q")
    assert (result.out, result.err) == ("", "")


def test_json_says_a_line_for_each_event(served):
    def probe(url):
        of_openai(url).chat.completions.create(model="tiny", messages=ASK, max_tokens=5, user="me")
        get(url, "/nothing")
        get(url, "/health")

    result, _ = served(probe, "--json")
    ready, answered, refused = [json.loads(line) for line in result.out.splitlines()]
    assert (ready["event"], ready["model"], ready["url"][:17]) == ("ready", "tiny", "http://127.0.0.1:")
    assert (answered["event"], answered["path"], answered["status"]) == ("request", "/v1/chat/completions", 200)
    assert (answered["completion_tokens"], answered["ignored"]) == (5, ["user"])
    assert answered["prompt_tokens"] > 5 and answered["tokens_per_second"] > 0 and len(answered["id"]) == 32
    assert (refused["status"], refused["completion_tokens"]) == (404, None)


def test_a_line_of_the_log_says_what_matters_and_nothing_that_moves_the_cursor():
    record = Record("id", "127.0.0.1", "POST", "/x\x1b[2J\n", status=200, seconds=0.5)
    assert describe(record)[8:] == " POST /x?[2J? 200 in 500 ms"
    record = Record(
        "id", "127.0.0.1", "POST", "/v1/messages", status=499, seconds=12.0, prompt_tokens=345, cached_tokens=300,
        completion_tokens=57, decode_seconds=2.0, ignored=("user", "store"),
    )  # fmt: skip
    assert describe(record)[9:] == (
        "POST /v1/messages 499 in 12 s, prompt 345 tokens (300 cached), answer 57 at 28.0/s, ignored: user store, "
        "the client went away"
    )


# --- a process of its own, and its end ---


@contextlib.contextmanager
def process(checkpoint, folder, *arguments):
    command = [sys.executable, "-m", "tq", "serve", "-m", str(checkpoint), "--port", "0", "--json", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        try:
            assert select.select([running.stdout], [], [], 120)[0], "it is not ready"
            yield running, json.loads(running.stdout.readline())["url"]
        finally:
            running.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_ends_it_after_the_answers_that_are_being_written(checkpoint, tmp_path, number, code):
    with process(checkpoint, tmp_path) as (running, url):
        # Greedy, so that the whole answer is known; long, so that it is not over when the signal comes.
        ask = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 200, "stream": True}
        stream = of_openai(url).completions.create(**ask)
        first = next(stream)
        running.send_signal(number)
        rest = list(stream)
        out, err = running.communicate(timeout=60)
    assert running.returncode == code, err
    assert rest[-1].choices[0].finish_reason in ("length", "stop")
    assert "Traceback" not in err and first.choices[0].text is not None
    (record,) = [json.loads(line) for line in out.splitlines()]
    assert (record["status"], record["error"]) == (200, None)
