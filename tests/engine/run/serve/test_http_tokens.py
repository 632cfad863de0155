"""Counting tokens as the server does, against what the scheduler makes of the same request."""

import pytest
from served_models import chat, text, user
from small_models import byte_tokenizer

from tq.engine.run.serve.tokens import Tokens
from tq.errors import UsageError

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


@pytest.fixture
def tokens(tokenizer):
    return Tokens(tokenizer, 259)


def test_a_count_is_the_length_of_the_prompt(serve, model_of, tool_tokenizer):
    scheduler = serve(model_of("qwen3", tokenizer=tool_tokenizer))
    counter = Tokens(tool_tokenizer, 259)
    for request in (
        chat("Hello"),
        chat(user("Hello"), {"role": "assistant", "content": "And"}, continue_last=True),
        chat("Weather?", tools=(TOOL,)),
        text("Once upon"),
        text([1, 2, 3]),
    ):
        (done,) = [event for event in scheduler.submit(request) if hasattr(event, "prompt_tokens")]
        assert counter.count(request) == done.prompt_tokens


def test_texts_there_and_back(tokens):
    assert tokens.encode("Köln", special=False) == list("Köln".encode())
    assert tokens.encode("a", special=True) == [256, 97]
    assert tokens.decode([256, *"Köln".encode(), 258]) == "<bos>Köln<turn>"


@pytest.mark.parametrize("wrong", [-1, 259, 2**40])
def test_tokens_that_are_not_there(tokens, wrong):
    with pytest.raises(UsageError, match=f"token ids must be from 0 to 258, not {wrong}"):
        tokens.decode([5, wrong])


def test_without_a_template_a_conversation_has_no_length():
    with pytest.raises(UsageError, match="this model has no chat template"):
        Tokens(byte_tokenizer(chat_template=None), 259).count(chat("Hello"))
