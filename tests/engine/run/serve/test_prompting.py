"""Requests become the prompts that the chat template makes of them."""

import dataclasses

import pytest
from served_models import chat, text, user
from small_models import BOS, byte_tokenizer

from tq.engine.run.generate import encode_messages
from tq.engine.run.sampling import GenerateOptions
from tq.engine.run.serve.prompting import Prompter
from tq.errors import TQError

SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.fixture
def prompter(llama):
    return lambda tokenizer=llama.tokenizer, places=False: Prompter(
        dataclasses.replace(llama, tokenizer=tokenizer), GenerateOptions(top_p=0.5), places
    )


def said(prompter, request):
    return prompter._loaded.tokenizer.decode(prompter.make(request).tokens)


def test_texts_and_tokens_are_taken_as_they_are(prompter):
    assert prompter().make(text("ab")).tokens == [BOS, 97, 98]
    assert prompter().make(text([97, 98])).tokens == [97, 98]


def test_options_are_completed(prompter):
    options = prompter().make(text("ab", 7, temp=0.3)).options
    assert (options.temp, options.top_p, options.top_k, options.max_tokens) == (0.3, 0.5, 0, 7)


def test_the_context_bounds_the_answer(prompter):
    assert prompter().make(text([65] * 90, 100)).limit == 6
    assert prompter().make(text([65] * 9, 10)).limit == 10


def test_an_answer_that_has_begun_is_continued(prompter):
    messages = ("Hi", {"role": "assistant", "content": "Well,"})
    assert said(prompter(), chat(*messages, continue_last=True)).endswith("assistant:Well,")
    assert said(prompter(), chat(*messages)).endswith("assistant:Well,<turn>assistant:")


def test_tools_and_calls_reach_the_template(prompter, tool_tokenizer):
    tools = ({"type": "function", "function": {"name": "f"}},)
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "function": {"arguments": "{}"}}]}
    assert said(prompter(tool_tokenizer), chat("a", called, tools=tools)) == (
        '<bos>[{"type": "function", "function": {"name": "f"}}]user:a<turn>assistant:f<tool_call><turn>assistant:'
    )


@pytest.mark.parametrize(
    ("given", "seen"), [('{"x": 1}', "dict"), ("", "dict"), ("{broken", "str")]
)  # a call that was written wrongly stays as it was
def test_arguments_of_calls_are_objects_for_the_template(prompter, given, seen):
    template = "{{ '<bos>' }}{% if m0.arguments is mapping %}{{ 'dict' }}{% else %}{{ 'str' }}{% endif %}"
    template = template.replace("m0", "messages[0].tool_calls[0].function")
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": given}}]}
    assert said(prompter(byte_tokenizer(chat_template=template)), chat(call)) == f"<bos>{seen}"


@pytest.mark.parametrize(("think", "end"), [(True, "[on]"), (False, "[off]"), (None, "[off]")])
def test_thinking_and_variables_of_the_template(prompter, think, end):
    template = "{{ '<bos>' }}{{ mood }}{% if enable_thinking %}{{ '[on]' }}{% else %}{{ '[off]' }}{% endif %}"
    request = chat("a", think=think, template_options={"mood": "calm"})
    assert said(prompter(byte_tokenizer(chat_template=template)), request) == f"<bos>calm{end}"


def test_the_beginning_is_what_all_conversations_with_a_system_message_share(prompter):
    prompter = prompter()
    prompt = prompter.make(chat(SYSTEM, "How?"))
    shared = "system:Be kind.<turn>user:"
    assert prompter._loaded.tokenizer.decode(prompt.tokens[: prompt.beginning]) == f"<bos>{shared}"
    assert prompt.later == ()
    assert prompter.make(chat(SYSTEM, "Why?")).beginning == prompt.beginning


def test_the_place_where_the_next_prompt_parts(prompter):
    prompt = prompter(places=True).make(chat("How?"))
    following = [user("How?"), {"role": "assistant", "content": "y"}, user("And?")]
    longer = encode_messages(byte_tokenizer(), following)
    (place,) = prompt.later
    assert prompt.tokens[:place] == longer[:place]


def test_a_template_that_refuses_says_why(prompter):
    refusing = byte_tokenizer(chat_template="{{ raise_exception('no systems') }}")
    with pytest.raises(TQError, match="no systems"):
        prompter(refusing).make(chat(SYSTEM, "a"))
