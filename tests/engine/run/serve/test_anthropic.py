"""Anthropic's protocol through its own client, over a real socket, with a scheduler that says what it is told."""

import json
from dataclasses import replace

import anthropic
import pytest
from fake_scheduler import CALL, CALLED, DONE, HELLO, LENGTH, SERVED, THOUGHT, serving

from tq.engine.run.sampling import GenerateOptions
from tq.engine.run.serve import anthropic as protocol
from tq.engine.run.serve.body import RequestError
from tq.engine.run.serve.requests import Busy, Piece, Reading, ToolCall
from tq.errors import TQError, UsageError

ASK = {"model": "Tiny-4bit", "max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}]}
TOOL = {"name": "weather", "description": "Of a city", "input_schema": {"type": "object", "properties": {}}}


def client(server):
    http = anthropic.DefaultHttpxClient(verify=False)  # a context for TLS takes longer than a test
    return anthropic.Anthropic(base_url=server.url, api_key="x", max_retries=0, http_client=http)


def asked(document):
    """The request that a body becomes."""
    (request,) = protocol.message({**ASK, **document}, SERVED).requests
    return request


def test_a_whole_message():
    with serving(HELLO) as server:
        message = client(server).messages.create(**ASK)
        assert [(block.type, block.text) for block in message.content] == [("text", "Hello")]
        assert (message.role, message.type, message.model, message.id[:4]) == (
            "assistant", "message", "Tiny-4bit", "msg_"
        )  # fmt: skip
        assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
        usage = message.usage
        assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (3, 4, 3)
        (request,) = server.scheduler.requests
        assert request.messages == ({"role": "user", "content": "Hi"},)
        assert request.options == GenerateOptions(max_tokens=50)


@pytest.mark.parametrize(
    ("end", "reason", "sequence"),
    [
        (DONE, "end_turn", None),
        (LENGTH, "max_tokens", None),
        (CALLED, "tool_use", None),
        (replace(DONE, stop_text="END"), "stop_sequence", "END"),
    ],
)
def test_why_it_ended(end, reason, sequence):
    with serving((Piece("x", "text"), end)) as server:
        message = client(server).messages.create(**ASK, stop_sequences=["END"])
        assert server.scheduler.requests[0].options.stop == ("END",)
    assert (message.stop_reason, message.stop_sequence) == (reason, sequence)


def test_a_stream_is_the_same_message_in_blocks():
    events = (Reading(4, 7), *THOUGHT[:-1], CALL, ToolCall("call_2", "time", "{}"), CALLED)
    with serving(events) as server:
        whole = client(server).messages.create(**ASK, tools=[TOOL])
        with client(server).messages.stream(**ASK, tools=[TOOL]) as stream:
            streamed = stream.get_final_message()
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert whole.content[2].input == {"city": "Köln"} and whole.content[3].input == {}
    assert [block.model_dump(exclude={"parsed_output"}) for block in streamed.content] == [
        block.model_dump() for block in whole.content
    ]
    assert (streamed.stop_reason, streamed.usage) == (whole.stop_reason, whole.usage)


def test_the_events_of_a_stream_come_in_the_order_that_clients_rely_on():
    with serving((Reading(4, 7), *THOUGHT[:-1], CALL, CALLED)) as server:
        raw = list(client(server).messages.create(**ASK, tools=[TOOL], stream=True))
    assert raw[0].message.usage.input_tokens == 7 and raw[0].message.content == []
    found = [(event.type, getattr(event, "index", None)) for event in raw]
    assert found == [
        ("message_start", None),
        ("content_block_start", 0),
        ("content_block_delta", 0),
        ("content_block_delta", 0),
        ("content_block_delta", 0),  # the signature
        ("content_block_stop", 0),
        ("content_block_start", 1),
        ("content_block_delta", 1),
        ("content_block_stop", 1),
        ("content_block_start", 2),
        ("content_block_delta", 2),
        ("content_block_stop", 2),
        ("message_delta", None),
        ("message_stop", None),
    ]
    assert raw[4].delta.type == "signature_delta"
    assert json.loads(raw[10].delta.partial_json) == {"city": "Köln"}


def test_an_answer_without_a_word_has_an_empty_block():
    with serving((DONE,)) as server:
        assert client(server).messages.create(**ASK).content[0].text == ""
        with client(server).messages.stream(**ASK) as stream:
            assert stream.get_final_message().content[0].text == ""


def test_blocks_become_the_messages_of_a_template():
    request = asked(
        {
            "system": [
                {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=56445;"},
                {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
                {"type": "text", "text": "Be kind."},
            ],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Weather"}, {"type": "text", "text": "here?"}]},
                {"role": "assistant", "content": [
                    {"type": "thinking", "thinking": "Hm", "signature": "s"},
                    {"type": "redacted_thinking", "data": "zzz"},
                    {"type": "text", "text": "Let me see."},
                    {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Köln"}},
                    {"type": "tool_use", "id": "t2", "name": "time", "input": {}}]},
                {"role": "user", "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}]},
                    {"type": "tool_result", "tool_use_id": "t2", "content": "noon"},
                    {"type": "text", "text": "So?"}]},
                {"role": "assistant", "content": "It"},
            ],
        }
    )  # fmt: skip
    assert request.messages == (
        {"role": "system", "content": "Be brief.\nBe kind."},
        {"role": "user", "content": "Weather\nhere?"},
        {"role": "assistant", "content": "Let me see.", "reasoning_content": "Hm", "tool_calls": [
            {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}},
            {"id": "t2", "type": "function", "function": {"name": "time", "arguments": {}}}]},
        {"role": "tool", "tool_call_id": "t1", "content": "rain"},
        {"role": "tool", "tool_call_id": "t2", "content": "noon"},
        {"role": "user", "content": "So?"},
        {"role": "assistant", "content": "It"},
    )  # fmt: skip
    assert request.continue_last


def test_results_alone_are_no_message_of_the_user():
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "rain"}
    request = asked({"messages": [{"role": "user", "content": [result]}]})
    assert request.messages == ({"role": "tool", "tool_call_id": "t1", "content": "rain"},)


def test_tools_become_functions():
    assert asked({"tools": [TOOL]}).tools == (
        {"type": "function", "function": {"name": "weather", "description": "Of a city",
                                          "parameters": {"type": "object", "properties": {}}}},
    )  # fmt: skip
    assert asked({"tools": [TOOL], "tool_choice": {"type": "none"}}).tools == ()


def test_without_parallel_calls_the_first_one_ends_the_answer():
    with serving((CALL, ToolCall("call_2", "time", "{}"), DONE)) as server:
        how = {"type": "auto", "disable_parallel_tool_use": True}
        message = client(server).messages.create(**ASK, tools=[TOOL], tool_choice=how)
    assert ([block.id for block in message.content], message.stop_reason) == (["call_1"], "tool_use")


@pytest.mark.parametrize(
    ("given", "think"),
    [
        ({}, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, True),
        ({"thinking": {"type": "adaptive"}}, True),
        ({"thinking": {"type": "disabled"}}, False),
    ],
)
def test_thinking(given, think):
    assert asked(given).think is think


def test_fields_that_mean_nothing_here_are_named():
    given = {"thinking": {"type": "enabled", "budget_tokens": 2000}, "metadata": {"user_id": "me"}, "mcp_servers": []}
    assert protocol.message({**ASK, **given}, SERVED).ignored == ("metadata", "thinking.budget_tokens")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_tokens": None}, "max_tokens: input should be a valid integer"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "must be user, assistant or system, not 'robot'"),
        ({"messages": [{"role": "user", "content": 3}]}, "content must be a text or a list of blocks"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "images are not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "a part of type 'document'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "'web_search_20250305' is one of"),
        ({"tools": [{}]}, "a tool has no name"),
        ({"tools": [TOOL], "tool_choice": {"type": "any"}}, "tool_choice 'any' cannot be guaranteed"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers is not supported here"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format is not supported"),
    ],
)
def test_what_cannot_be_done_is_refused(given, message):
    with pytest.raises(RequestError) as caught:
        asked(given)
    assert message in caught.value.message


def test_tokens_are_counted_without_an_answer():
    with serving() as server:
        counted = client(server).messages.count_tokens(
            model="Tiny-4bit", system="Be brief.", messages=ASK["messages"], tools=[TOOL]
        )
        assert counted.input_tokens == 42
        (request,) = server.tokens.counted
    assert request.messages == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"})
    assert request.tools[0]["function"]["name"] == "weather"


@pytest.mark.parametrize(
    ("failure", "kind", "word"),
    [
        (UsageError("the prompt is too long"), anthropic.BadRequestError, "invalid_request_error"),
        (Busy("64 requests wait"), anthropic.RateLimitError, "rate_limit_error"),
        ((TQError("out of memory"),), anthropic.InternalServerError, "api_error"),
    ],
)
def test_failures(failure, kind, word):
    with serving(failure) as server, pytest.raises(kind) as caught:
        client(server).messages.create(**ASK)
    assert caught.value.body["error"]["type"] == word
    assert caught.value.body["type"] == "error"


def test_another_model_is_not_found():
    with serving() as server, pytest.raises(anthropic.NotFoundError, match="--alias claude-x would answer"):
        client(server).messages.create(**{**ASK, "model": "claude-x"})


def test_a_failure_in_the_middle_of_a_stream_is_an_event():
    with serving((Piece("Hel", "text"), TQError("out of memory"))) as server:
        with client(server).messages.stream(**ASK) as stream, pytest.raises(anthropic.APIError, match="out of memory"):
            stream.get_final_message()


def test_models_are_listed_in_its_words_too():
    with serving() as server:
        (model,) = client(server).models.list()
    assert (model.id, model.type, model.display_name) == ("Tiny-4bit", "model", "Tiny-4bit")
