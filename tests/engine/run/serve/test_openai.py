"""OpenAI's protocol through its own client, over a real socket, with a scheduler that says what it is told."""

import inspect
import json

import openai
import pytest
from fake_scheduler import CALL, CALLED, DONE, HELLO, LENGTH, SERVED, THOUGHT, WITH_LOGPROBS, serving
from transformers import PreTrainedTokenizerBase

from tq.engine.run.sampling import GenerateOptions
from tq.engine.run.serve import openai as protocol
from tq.engine.run.serve.body import NO_LIMIT, RequestError
from tq.engine.run.serve.requests import Busy, Piece, Reading, ToolCall
from tq.errors import TQError, UsageError

ASK = {"model": "Tiny-4bit", "messages": [{"role": "user", "content": "Hi"}]}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Of a city", "parameters": {"type": "object", "properties": {}}},
}


def client(server):
    http = openai.DefaultHttpxClient(verify=False)  # a context for TLS takes longer than a test
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, http_client=http)


def asked(document):
    """The one request that a chat body becomes."""
    (request,) = protocol.chat({**ASK, **document}, SERVED).requests
    return request


# --- chat ---


def test_a_whole_answer():
    with serving(HELLO) as server:
        done = client(server).chat.completions.create(**ASK)
        (choice,) = done.choices
        assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Hello", "stop")
        assert (done.object, done.model, done.id[:9]) == ("chat.completion", "Tiny-4bit", "chatcmpl-")
        usage = done.usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (7, 3, 10)
        assert usage.prompt_tokens_details.cached_tokens == 4
        assert done.timings["predicted_per_second"] == 8.0 and done.timings["prompt_n"] == 3
        (request,) = server.scheduler.requests
        assert request.messages == ({"role": "user", "content": "Hi"},)
        assert (request.options, request.think, request.top_logprobs) == (GenerateOptions(NO_LIMIT), None, None)


def test_a_streamed_answer_has_the_same_text_and_ends_with_usage_if_asked():
    with serving(HELLO) as server:
        stream = client(server).chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True})
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, None, "stop"]
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], 10)


def test_without_being_asked_a_stream_has_no_usage():
    with serving(HELLO) as server:
        chunks = list(client(server).chat.completions.create(**ASK, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_reasoning_is_apart_under_both_names():
    with serving(THOUGHT) as server:
        message = client(server).chat.completions.create(**ASK).choices[0].message
        assert (message.content, message.reasoning_content, message.reasoning) == ("Yes", "Hm, yes.", "Hm, yes.")
        deltas = [c.choices[0].delta for c in client(server).chat.completions.create(**ASK, stream=True)]
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "Hm, yes."
    assert "".join(delta.content or "" for delta in deltas) == "Yes"


def test_tool_calls_whole_and_streamed():
    events = (Piece("Let me see.", "text"), CALL, ToolCall("call_2", "time", "{}"), CALLED)
    with serving(events) as server:
        choice = client(server).chat.completions.create(**ASK, tools=[TOOL]).choices[0]
        chunks = list(client(server).chat.completions.create(**ASK, tools=[TOOL], stream=True))
        assert server.scheduler.requests[0].tools == (TOOL,)
    assert choice.finish_reason == "tool_calls"
    calls = choice.message.tool_calls
    assert [(call.id, call.type, call.function.name) for call in calls] == [
        ("call_1", "function", "weather"),
        ("call_2", "function", "time"),
    ]
    assert json.loads(calls[0].function.arguments) == {"city": "Köln"}
    streamed = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [(call.index, call.id, call.function.arguments) for call in streamed] == [
        (0, "call_1", CALL.arguments),
        (1, "call_2", "{}"),
    ]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_an_answer_of_calls_alone_has_no_content():
    with serving((CALL, CALLED)) as server:
        assert client(server).chat.completions.create(**ASK, tools=[TOOL]).choices[0].message.content is None


def test_without_parallel_calls_the_first_one_ends_the_answer():
    events = (CALL, ToolCall("call_2", "time", "{}"), Piece("more", "text"), DONE)
    with serving(events) as server:
        choice = client(server).chat.completions.create(**ASK, tools=[TOOL], parallel_tool_calls=False).choices[0]
        assert server.scheduler.streams[0].cancelled
    assert ([call.id for call in choice.message.tool_calls], choice.finish_reason) == (["call_1"], "tool_calls")
    assert choice.message.content is None


def test_a_conversation_with_tools_reaches_the_template():
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Weather"}, {"type": "text", "text": "in Köln?"}]},
        {"role": "assistant", "content": None, "reasoning": "Hm", "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]  # fmt: skip
    request = asked({"messages": messages})
    assert request.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather\nin Köln?"},
        {"role": "assistant", "content": "", "reasoning_content": "Hm", "tool_calls": messages[2]["tool_calls"]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    )
    assert not request.continue_last


def test_a_last_message_of_the_assistant_is_gone_on_with():
    begun = [*ASK["messages"], {"role": "assistant", "content": "Once"}]
    assert asked({"messages": begun}).continue_last
    assert not asked({"messages": [*begun, {"role": "user", "content": "And?"}]}).continue_last


def test_logprobs_whole_and_streamed():
    with serving(WITH_LOGPROBS) as server:
        how = {**ASK, "logprobs": True, "top_logprobs": 2}
        content = client(server).chat.completions.create(**how).choices[0].logprobs.content
        chunks = list(client(server).chat.completions.create(**how, stream=True))
        assert [request.top_logprobs for request in server.scheduler.requests] == [2, 2]
    assert [(token.token, token.logprob, token.bytes) for token in content] == [
        ("Hel", -0.25, list(b"Hel")),
        ("lo", -0.5, list(b"lo")),
    ]
    assert [(top.token, top.logprob, top.bytes) for top in content[0].top_logprobs] == [
        ("Hel", -0.25, list(b"Hel")),
        ("\ufffd", -9999.0, None),  # JSON has no infinity, and half a character no text
    ]
    streamed = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [token.token for token in streamed] == ["Hel", "lo"]


def test_several_answers_have_seeds_of_their_own_and_the_prompt_counts_once():
    with serving(HELLO, (Piece("Bye", "text"), LENGTH)) as server:
        done = client(server).chat.completions.create(**ASK, n=3, seed=2**64 - 1)
        assert [request.options.seed for request in server.scheduler.requests] == [2**64 - 1, 0, 1]
    assert [choice.message.content for choice in done.choices] == ["Hello", "Bye", "Bye"]
    assert [choice.finish_reason for choice in done.choices] == ["stop", "length", "length"]
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (7, 9)


def test_several_streamed_answers_are_told_apart_by_their_index():
    with serving(HELLO, (Piece("Bye", "text"), LENGTH)) as server:
        chunks = list(client(server).chat.completions.create(**ASK, n=2, stream=True))
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["Hello", "Bye"]


def test_options_under_all_their_names():
    given = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1,
        "repetition_context_size": 9, "min_tokens": 2, "seed": 4, "max_tokens": 50, "stop": ["a", "b"],
    }  # fmt: skip
    expected = GenerateOptions(50, 0.5, 0.9, 7, 0.1, 1.1, 9, 2, 4, ("a", "b"))
    assert asked(given).options == expected
    renamed = {"repetition_penalty": "repeat_penalty", "repetition_context_size": "repeat_last_n",
               "max_tokens": "max_completion_tokens"}  # fmt: skip
    assert asked({renamed.get(name, name): value for name, value in given.items()}).options == expected
    assert asked({"n_predict": 5}).options.max_tokens == 5
    assert asked({"max_completion_tokens": 5, "max_tokens": 9}).options.max_tokens == 5
    assert asked({"stop": "x"}).options.stop == ("x",)


def test_other_spellings_of_off_random_and_no_limit():
    options = asked({"top_k": -1, "seed": -1, "max_tokens": -1, "repetition_penalty": 0.0, "repeat_last_n": -1}).options
    assert options == GenerateOptions(NO_LIMIT, top_k=0, repetition_penalty=1.0, repetition_context=NO_LIMIT)


def test_the_servers_defaults_count_where_a_request_says_nothing():
    from dataclasses import replace

    served = replace(SERVED, defaults=GenerateOptions(max_tokens=9, temp=0.7, stop=("z",)), think=False)
    (request,) = protocol.chat(ASK, served).requests
    assert (request.options, request.think) == (served.defaults, False)
    (request,) = protocol.chat({**ASK, "temperature": 0, "stop": "y"}, served).requests
    assert request.options == GenerateOptions(max_tokens=9, temp=0, stop=("y",))


@pytest.mark.parametrize(
    ("given", "think", "variables"),
    [
        ({}, False, {}),
        ({"reasoning_effort": "none"}, False, {}),
        ({"reasoning_effort": "high"}, True, {"reasoning_effort": "high"}),
        ({"chat_template_kwargs": {"enable_thinking": True}}, None, {"enable_thinking": True}),
        ({"chat_template_kwargs": {"custom": 1}}, False, {"custom": 1}),
    ],
)
def test_who_decides_about_thinking(given, think, variables):
    from dataclasses import replace

    (request,) = protocol.chat({**ASK, **given}, replace(SERVED, think=False)).requests
    assert (request.think, request.template_options) == (think, variables)


def test_how_transformers_is_called_is_no_variable_of_a_template():
    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    for name in {*parameters, "messages"} - {"self", "kwargs", "documents"}:  # documents: templates have them
        with pytest.raises(RequestError, match=f"{name} is no variable") as caught:
            asked({"chat_template_kwargs": {name: None}})
        assert caught.value.param == "chat_template_kwargs"


@pytest.mark.parametrize("name", ["repeat_last_n", "repetition_context_size"])
def test_a_context_larger_than_any_number_of_mlx_is_all_of_it(name):
    assert asked({name: 10**40}).options.repetition_context == asked({name: -1}).options.repetition_context == NO_LIMIT


def test_stop_strings_are_limited():
    assert len(asked({"stop": ["x"] * 64}).options.stop) == 64
    with pytest.raises(RequestError, match="64 stop strings at most, not 65"):
        asked({"stop": ["x"] * 65})


def test_a_part_whose_type_is_no_text_is_refused():
    with pytest.raises(RequestError, match="a part of type"):
        asked({"messages": [{"role": "user", "content": [{"type": ["image"]}]}]})


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        ({"messages": []}, "messages", "messages: list should have at least 1 item"),
        ({"messages": [{"content": "x"}]}, "messages", "a message has no role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.content", "must be a text or a list of parts"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.content",
            "images are not supported here: the model reads text alone",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]},
            "messages",
            "tool_calls of a message must be a list of objects",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
            "messages",
            "a function call in messages has no name",
        ),
        ({"temperature": "hot"}, "temperature", "temperature: input should be a valid number"),
        ({"temperature": -1}, "temperature", "temperature must be 0 (greedy) or more, not -1"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens must be 1 or more"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens must be 1 or more"),
        ({"max_tokens": True}, "max_tokens", "max_tokens: input should be a valid integer"),
        ({"max_tokens": 3, "min_tokens": 5}, None, "min_tokens must be at most max_tokens"),
        ({"stop": [""]}, None, "a stop string must have at least one character"),
        ({"n": 17}, "n", "n: input should be less than or equal to 16"),
        ({"top_logprobs": 3}, "top_logprobs", "top_logprobs needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"tools": [{"type": "web_search"}]}, "tools", "a tool of type 'web_search' is not supported"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice", "'required' cannot be guaranteed"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "weather"}}},
            "tool_choice",
            "a call of a certain function cannot be guaranteed",
        ),
        ({"response_format": {"type": "json_object"}}, "response_format", "response_format is not supported here"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "logit_bias is not supported here"),
        ({"presence_penalty": 0.5}, "presence_penalty", "use repetition_penalty"),
        ({"model": "gpt-4o"}, "model", "the model 'gpt-4o' is not served here, but 'Tiny-4bit' is"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_field_that_says_so(given, param, message):
    with pytest.raises(RequestError) as caught:
        asked(given)
    assert message in caught.value.message
    assert caught.value.param == param


def test_what_changes_nothing_is_accepted():
    asked(
        {
            "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "response_format": {"type": "text"},
            "modalities": ["text"], "tools": [], "tool_choice": "auto", "logprobs": False, "stop": None,
        }
    )  # fmt: skip
    assert asked({"tools": [TOOL], "tool_choice": "none"}).tools == ()


def test_fields_that_mean_nothing_here_are_named_in_the_log():
    with serving(HELLO) as server:
        client(server).chat.completions.create(**ASK, user="me", extra_body={"colour": "red", "presence_penalty": 0})
        assert server.record().ignored == ("user", "colour")


# --- completions ---


def test_a_text_is_continued():
    with serving(HELLO) as server:
        done = client(server).completions.create(model="default_model", prompt="Once", max_tokens=5)
        chunks = list(client(server).completions.create(model="", prompt="Once", stream=True))
        assert [request.prompt for request in server.scheduler.requests] == ["Once", "Once"]
    assert (done.object, done.choices[0].text, done.choices[0].finish_reason) == ("text_completion", "Hello", "stop")
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello"
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        (["a", "b"], ["a", "b"]),
        ([1, 2, 3], [(1, 2, 3)]),
        ([[1, 2], "b"], [(1, 2), "b"]),
    ],
)
def test_prompts_are_texts_tokens_or_several_of_them(prompt, prompts):
    exchange = protocol.completion({"prompt": prompt, "n": 2}, SERVED)
    assert [request.prompt for request in exchange.requests] == [one for one in prompts for _ in range(2)]


def test_each_of_several_prompts_counts_in_the_usage():
    with serving(HELLO) as server:
        done = client(server).completions.create(model="default", prompt=["a", "b"], n=2)
    assert (len(done.choices), done.usage.prompt_tokens, done.usage.completion_tokens) == (4, 14, 12)


def test_logprobs_of_a_completion():
    with serving(WITH_LOGPROBS) as server:
        logprobs = client(server).completions.create(model="", prompt="x", logprobs=2).choices[0].logprobs
        chunks = list(client(server).completions.create(model="", prompt="x", logprobs=2, stream=True))
    assert (logprobs.tokens, logprobs.token_logprobs, logprobs.text_offset) == (["Hel", "lo"], [-0.25, -0.5], [0, 3])
    assert logprobs.top_logprobs[1] == {"lo": -0.5, "la": -2.0}
    assert [chunk.choices[0].logprobs.text_offset for chunk in chunks if chunk.choices[0].logprobs] == [[0], [3]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": []}, "prompt must be a text"),
        ({"prompt": [True, 3]}, "each prompt must be a text"),
        ({"prompt": ["a"] * 17}, "or 1 to 16 of them"),
        ({}, "prompt is missing"),
        ({"prompt": "a", "echo": True}, "echo is not supported here"),
        ({"prompt": "a", "suffix": "b"}, "suffix is not supported here"),
        ({"prompt": "a", "logprobs": 50}, "logprobs must be from 0 to 20"),
    ],
)
def test_completions_that_cannot_be_made(given, message):
    with pytest.raises(RequestError, match=message):
        protocol.completion(given, SERVED)


# --- models and errors ---


def test_models():
    with serving() as server:
        (model,) = client(server).models.list()
        assert (model.id, model.object, model.created, model.owned_by) == ("Tiny-4bit", "model", 1_700_000_000, "tq")
        assert client(server).models.retrieve("Tiny-4bit").id == "Tiny-4bit"
        assert client(server).models.retrieve("org/Tiny-4bit").id == "Tiny-4bit"
        with pytest.raises(openai.NotFoundError, match="'gpt-4o' is not served here"):
            client(server).models.retrieve("gpt-4o")


@pytest.mark.parametrize("model", ["Tiny-4bit", "org/Tiny-4bit", "default_model", "default", "", "Tiny-4bit:latest"])
def test_names_that_are_answered_to(model):
    asked({"model": model})


def test_aliases():
    from dataclasses import replace

    from tq.engine.run.serve.served import Names

    names = Names("org/Tiny-4bit", ("gpt-4o", "small"))
    served = replace(SERVED, names=names)
    for name in ("gpt-4o", "small", "Tiny-4bit"):
        assert protocol.chat({**ASK, "model": name}, served).whole is not None
    assert protocol.models(served)["data"][0]["id"] == "gpt-4o"
    Names("org/Tiny-4bit", ("*",)).check("anything")
    assert Names("org/Tiny-4bit", ("*",)).shown == "Tiny-4bit"
    assert Names("./x/model.Q4.gguf").shown == "model.Q4"


@pytest.mark.parametrize(
    ("failure", "kind", "status", "code"),
    [
        (UsageError("the prompt has 300 tokens"), openai.BadRequestError, 400, None),
        (TQError("the template refuses"), openai.BadRequestError, 400, None),
        (Busy("64 requests wait", hint="later"), openai.RateLimitError, 429, "busy"),
        (ZeroDivisionError("oh"), openai.InternalServerError, 500, "internal_error"),
        ((Reading(0, 7), TQError("out of memory")), openai.InternalServerError, 500, "generation_failed"),
    ],
)
def test_failures_have_a_status_and_a_sentence(failure, kind, status, code):
    with serving(failure) as server:
        with pytest.raises(kind) as caught:
            client(server).chat.completions.create(**ASK)
        assert (caught.value.status_code, caught.value.code) == (status, code)
        assert server.record().status == status
        assert server.record().error in str(caught.value)
        if status == 429:
            assert caught.value.response.headers["retry-after"] == "1"
            assert "(later)" in str(caught.value)


def test_a_prompt_that_is_too_long_has_the_code_that_clients_look_for():
    with serving(UsageError("the prompt has 300 tokens")) as server:
        server.tokens.length = 300
        with pytest.raises(openai.BadRequestError, match="prompt is too long: 300 tokens > 255 maximum") as caught:
            client(server).chat.completions.create(**ASK)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
        with pytest.raises(openai.BadRequestError, match="maximum context length is 256") as caught:
            client(server).completions.create(model="", prompt="x")
        assert caught.value.param == "prompt"


def test_a_failure_in_the_middle_of_a_stream_is_told_in_it():
    with serving((Piece("Hel", "text"), TQError("out of memory"))) as server:
        stream = client(server).chat.completions.create(**ASK, stream=True)
        text = ""
        with pytest.raises(openai.APIError, match="out of memory"):
            for chunk in stream:
                text += chunk.choices[0].delta.content or ""
        assert text == "Hel"
        assert (server.record().status, server.record().error) == (200, "out of memory")


def test_if_one_of_several_is_refused_the_others_are_cancelled():
    with serving(HELLO, Busy("64 requests wait")) as server:
        with pytest.raises(openai.RateLimitError):
            client(server).chat.completions.create(**ASK, n=2)
        assert server.scheduler.streams[0].cancelled
