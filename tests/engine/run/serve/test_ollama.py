"""Ollama's protocol through its own client, over a real socket, with a scheduler that says what it is told."""

import json
import urllib.request
from dataclasses import replace

import ollama
import pytest
from fake_scheduler import CALL, CALLED, HELLO, LENGTH, SERVED, THOUGHT, WITH_LOGPROBS, serving

from tq.engine.run.sampling import GenerateOptions
from tq.engine.run.serve import ollama as protocol
from tq.engine.run.serve.body import NO_LIMIT, RequestError
from tq.engine.run.serve.requests import Busy, Piece, ToolCall
from tq.errors import TQError, UsageError

ASK = {"model": "Tiny-4bit", "messages": [{"role": "user", "content": "Hi"}]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": {}}}


def client(server):
    return ollama.Client(host=server.url, verify=False)  # a context for TLS takes longer than a test


def asked(document):
    (request,) = protocol.chat({**ASK, **document}, SERVED).requests
    return request


def test_a_whole_answer_with_durations_in_nanoseconds():
    with serving(HELLO) as server:
        done = client(server).chat(**ASK)
    assert (done.message.role, done.message.content, done.model) == ("assistant", "Hello", "Tiny-4bit")
    assert (done.done, done.done_reason) == (True, "stop")
    assert (done.prompt_eval_count, done.eval_count) == (7, 3)
    assert (done.prompt_eval_duration, done.eval_duration, done.load_duration) == (500_000_000, 250_000_000, 0)
    assert done.total_duration > 0


def test_a_stream_is_the_default_of_the_protocol_and_a_line_each():
    with serving(HELLO) as server:
        request = urllib.request.Request(f"{server.url}/api/chat", json.dumps(ASK).encode())
        with urllib.request.urlopen(request) as response:
            assert response.headers["Content-Type"] == "application/x-ndjson; charset=utf-8"
            lines = [json.loads(line) for line in response.read().splitlines()]
    assert [line["message"]["content"] for line in lines] == ["Hel", "lo", ""]
    assert [line["done"] for line in lines] == [False, False, True]
    assert lines[-1]["eval_count"] == 3 and "eval_count" not in lines[0]


def test_streamed_by_the_client():
    with serving((*HELLO[:-1], LENGTH)) as server:
        parts = list(client(server).chat(**ASK, stream=True))
    assert "".join(part.message.content for part in parts) == "Hello"
    assert parts[-1].done_reason == "length"


def test_reasoning():
    with serving(THOUGHT) as server:
        whole = client(server).chat(**ASK, think=True)
        parts = list(client(server).chat(**ASK, think="high", stream=True))
        first, second = server.scheduler.requests
    assert (whole.message.thinking, whole.message.content) == ("Hm, yes.", "Yes")
    assert "".join(part.message.thinking or "" for part in parts) == "Hm, yes."
    assert (first.think, first.template_options) == (True, {})
    assert (second.think, second.template_options) == (True, {"reasoning_effort": "high"})


def test_tool_calls_have_objects_as_arguments():
    with serving((CALL, ToolCall("call_2", "time", "{}"), CALLED)) as server:
        whole = client(server).chat(**ASK, tools=[TOOL])
        parts = list(client(server).chat(**ASK, tools=[TOOL], stream=True))
        assert server.scheduler.requests[0].tools[0]["function"]["name"] == "weather"
    calls = whole.message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in calls] == [
        ("weather", {"city": "Köln"}),
        ("time", {}),
    ]
    assert [call for part in parts for call in part.message.tool_calls or []] == calls
    assert whole.done_reason == "stop"


def test_a_conversation_with_tools_reaches_the_template():
    request = asked(
        {
            "messages": [
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": "", "thinking": "Hm",
                 "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Köln"}}}]},
                {"role": "tool", "content": "rain", "tool_name": "weather"},
            ]
        }
    )  # fmt: skip
    assert request.messages[1:] == (
        {"role": "assistant", "content": "", "reasoning_content": "Hm", "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}]},
        {"role": "tool", "content": "rain", "name": "weather"},
    )  # fmt: skip


def test_options():
    given = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repeat_penalty": 1.1, "repeat_last_n": 9,
        "seed": 4, "num_predict": 50, "stop": ["a"], "num_ctx": 4096, "num_gpu": 99, "presence_penalty": 0.0,
    }  # fmt: skip
    assert asked({"options": given}).options == GenerateOptions(50, 0.5, 0.9, 7, 0.1, 1.1, 9, 0, 4, ("a",))
    off = asked({"options": {"num_predict": -1, "repeat_last_n": 0, "seed": -1}}).options
    assert off == GenerateOptions(NO_LIMIT, repetition_penalty=1.0)
    assert protocol.chat({**ASK, "options": given, "keep_alive": "5m"}, SERVED).ignored == (
        "keep_alive",
        "options.num_ctx",
        "options.num_gpu",
    )


def test_a_prompt_is_a_message_or_with_raw_a_text():
    with serving(THOUGHT) as server:
        whole = client(server).generate(model="Tiny-4bit", prompt="Hi", system="Be brief.")
        parts = list(client(server).generate(model="Tiny-4bit", prompt="Hi", raw=True, stream=True))
        first, second = server.scheduler.requests
    assert (whole.response, whole.thinking, whole.done) == ("Yes", "Hm, yes.", True)
    assert "".join(part.response for part in parts) == "Yes"
    assert first.messages == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})
    assert (second.messages, second.prompt) == (None, "Hi")


def test_a_model_without_a_template_continues_the_prompt():
    with serving(HELLO, served=replace(SERVED, has_chat_template=False)) as server:
        client(server).generate(model="Tiny-4bit", prompt="Hi")
        assert server.scheduler.requests[0].prompt == "Hi"
        with pytest.raises(ollama.ResponseError, match="system needs a chat template"):
            client(server).generate(model="Tiny-4bit", prompt="Hi", system="Be brief.")


def test_logprobs():
    with serving(WITH_LOGPROBS) as server:
        done = client(server).chat(**ASK, logprobs=True, top_logprobs=2)
        assert server.scheduler.requests[0].top_logprobs == 2
    assert [(token.token, token.logprob) for token in done.logprobs] == [("Hel", -0.25), ("lo", -0.5)]
    assert [top.token for top in done.logprobs[1].top_logprobs] == ["lo", "la"]


@pytest.mark.parametrize("call", ["chat", "generate"])
def test_without_a_prompt_the_model_is_only_loaded(call):
    with serving() as server:
        done = getattr(client(server), call)(model="Tiny-4bit")
        assert (done.done, done.done_reason, server.scheduler.requests) == (True, "load", [])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"format": "json"}, "format is not supported here"),
        ({"format": {"type": "object"}}, "format is not supported here"),
        ({"options": {"mirostat": 2}}, "mirostat is not supported here"),
        ({"options": {"temperature": -1}}, "temperature must be 0"),
        ({"options": {"num_predict": 1.5}}, "num_predict: input should be a valid integer"),
        ({"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "images are not supported here"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "not 'robot'"),
        ({"tools": [{"type": "function"}]}, "a tool of type 'function' is not supported here"),
        ({"tools": [{"function": {}}]}, "function.name is missing"),
        ({"messages": [{"role": "assistant", "tool_calls": [3]}]}, "tool_calls of a message must be a list"),
        ({"model": "llama3"}, "the model 'llama3' is not served here"),
    ],
)
def test_what_cannot_be_done_is_refused(given, message):
    with pytest.raises(RequestError) as caught:
        asked(given)
    assert message in caught.value.message


@pytest.mark.parametrize("given", [{"suffix": "x"}, {"template": "x"}, {"context": [1]}, {"images": ["aGk="]}])
def test_what_generate_cannot_do_is_refused(given):
    with pytest.raises(RequestError, match="is not supported here"):
        protocol.generate({"model": "Tiny-4bit", "prompt": "Hi", **given}, SERVED)


def test_lists_and_facts_of_the_model():
    with serving() as server:
        api = client(server)
        (listed,) = api.list().models
        (running,) = api.ps().models
        shown = api.show("Tiny-4bit")
        with urllib.request.urlopen(f"{server.url}/api/version") as response:
            version = json.load(response)["version"]
    assert (listed.model, listed.size, listed.digest) == ("Tiny-4bit", 1234, "ab" * 32)
    assert (listed.details.family, listed.details.quantization_level) == ("llama", "4-bit lloyd-max")
    assert listed.modified_at.year == 2023
    assert (running.model, running.size_vram, running.context_length) == ("Tiny-4bit", 1234, 256)
    assert shown.capabilities == ["completion", "tools"]
    assert shown.modelinfo["llama.context_length"] == 256
    assert tuple(int(part) for part in version.split(".")) > (0, 6, 4)
    thinker = replace(SERVED, has_thinking=True, has_tools=False)
    assert protocol.show({"model": "Tiny-4bit:latest"}, thinker)["capabilities"] == ["completion", "thinking"]


@pytest.mark.parametrize(
    ("failure", "status"),
    [(UsageError("too long"), 400), (Busy("64 requests wait"), 429), ((TQError("out of memory"),), 500)],
)
def test_failures(failure, status):
    with serving(failure) as server, pytest.raises(ollama.ResponseError) as caught:
        client(server).chat(**ASK)
    assert caught.value.status_code == status
    assert caught.value.error in ("too long", "64 requests wait", "out of memory")


def test_a_failure_in_the_middle_of_a_stream_is_a_line():
    with serving((Piece("Hel", "text"), TQError("out of memory"))) as server:
        with pytest.raises(ollama.ResponseError, match="out of memory"):
            list(client(server).chat(**ASK, stream=True))
