"""The whole way: clients of the protocols, the HTTP server, the real scheduler, and tiny models told what to say."""

import contextlib
import json
import threading

import anthropic
import ollama
import openai
import pytest
from fake_scheduler import eventually
from served_models import Gate

from tq.engine.run.generate import encode_messages
from tq.engine.run.sampling import GenerateOptions
from tq.engine.run.serve.body import NO_LIMIT
from tq.engine.run.serve.http import Server
from tq.engine.run.serve.routes import Service
from tq.engine.run.serve.served import Names, Served
from tq.engine.run.serve.tokens import Tokens

FUNCTION = {"name": "weather", "description": "Of a city", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "Weather?"}]}
CALLS = 'Let me see.<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>'


@contextlib.contextmanager
def over_http(scheduler, loaded):
    service = Service()
    server = Server("127.0.0.1", 0, service)
    defaults = GenerateOptions(max_tokens=NO_LIMIT)
    served = Served.of(loaded, scheduler.facts, Names("tiny"), defaults, None)
    service.ready(scheduler, Tokens(loaded.tokenizer, scheduler.facts.vocabulary), served)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def of_openai(url):
    http = openai.DefaultHttpxClient(verify=False)
    return openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, http_client=http)


def of_anthropic(url):
    http = anthropic.DefaultHttpxClient(verify=False)
    return anthropic.Anthropic(base_url=url, api_key="x", max_retries=0, http_client=http)


@pytest.fixture
def calling(say, serve, tool_tokenizer):
    """A model that calls a tool; its answer is for one request alone, because it counts the tokens it has seen."""
    length = len(encode_messages(tool_tokenizer, ASK["messages"], tools=[TOOL]))
    loaded = say(CALLS, prompt_length=length, tokenizer=tool_tokenizer)
    with over_http(serve(loaded, prefix_bytes=0), loaded) as url:
        yield url


def test_a_tool_is_called_in_openais_words(calling):
    choice = of_openai(calling).chat.completions.create(**ASK, tools=[TOOL]).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Let me see.", "tool_calls")
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Köln"})


def test_a_tool_is_called_in_anthropics_words(calling):
    tool = {"name": "weather", "description": "Of a city", "input_schema": FUNCTION["parameters"]}
    with of_anthropic(calling).messages.stream(**ASK, max_tokens=200, tools=[tool]) as stream:
        message = stream.get_final_message()
    text, call = message.content
    assert (text.text, call.name, call.input) == ("Let me see.", "weather", {"city": "Köln"})
    assert message.stop_reason == "tool_use"


def test_a_tool_is_called_in_ollamas_words(calling):
    parts = list(ollama.Client(calling, verify=False).chat(**ASK, tools=[TOOL], stream=True))
    (call,) = [call for part in parts for call in part.message.tool_calls or []]
    assert (call.function.name, call.function.arguments) == ("weather", {"city": "Köln"})
    assert "".join(part.message.content for part in parts) == "Let me see."


def test_the_stop_string_that_was_met_is_told(say, serve):
    loaded = say("one END two", prompt_length=4)
    with over_http(serve(loaded), loaded) as url:
        done = of_openai(url).completions.create(model="tiny", prompt="abc", stop=["END"])
        assert (done.choices[0].text, done.choices[0].finish_reason) == ("one ", "stop")


def test_log_probabilities_are_of_the_tokens_of_the_answer(llama, serve):
    with over_http(serve(llama), llama) as url:
        ask = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6, "logprobs": True, "top_logprobs": 3}
        choice = of_openai(url).chat.completions.create(model="tiny", **ask).choices[0]
        chunks = list(of_openai(url).chat.completions.create(model="tiny", **ask, stream=True))
    tokens = choice.logprobs.content
    assert len(tokens) == 6 and all(len(token.top_logprobs) == 3 for token in tokens)
    assert all(abs(token.logprob - token.top_logprobs[0].logprob) < 1e-3 for token in tokens)  # greedy: the likeliest
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert [t.token for t in streamed] == [t.token for t in tokens]


def test_a_prompt_that_does_not_fit_is_refused_in_words_that_clients_know(llama, serve):
    with over_http(serve(llama), llama) as url:
        long = [{"role": "user", "content": "x" * 200}]
        with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: 2\d\d tokens > 95 maximum"):
            of_anthropic(url).messages.create(model="tiny", max_tokens=5, messages=long)
        counted = of_anthropic(url).messages.count_tokens(model="tiny", messages=long).input_tokens
        assert counted > 200
        with pytest.raises(openai.BadRequestError, match=f"prompt is too long: {counted} tokens") as caught:
            of_openai(url).chat.completions.create(model="tiny", messages=long)
        assert caught.value.code == "context_length_exceeded"


def test_more_than_may_wait_are_sent_away_and_come_again(model_of, serve):
    loaded = model_of("qwen3")
    scheduler = serve(loaded, max_batch=1, max_queue=0)
    gate = Gate(loaded.model)
    with over_http(scheduler, loaded) as url:
        ask = {"model": "tiny", "prompt": "abc", "max_tokens": 3}
        first = threading.Thread(target=of_openai(url).completions.create, kwargs=ask)
        first.start()
        assert gate.reached.wait(60)
        with pytest.raises(openai.RateLimitError) as caught:
            of_openai(url).completions.create(**ask)
        assert caught.value.response.headers["retry-after"] == "1"
        gate.open()
        first.join()
        eventually(lambda: scheduler.stats().running == 0)
        assert of_openai(url).completions.create(**ask).usage.completion_tokens <= 3


def test_a_client_that_stops_reading_frees_the_model(model_of, serve):
    loaded = model_of("qwen3")
    scheduler = serve(loaded)
    with over_http(scheduler, loaded) as url:
        stream = of_openai(url).completions.create(model="tiny", prompt="abc", stream=True)
        next(iter(stream))
        stream.close()
        eventually(lambda: scheduler.stats().running == 0, 60)
        assert scheduler.stats().cancelled + scheduler.stats().finished == 1
