"""Calls of tools and reasoning are told from text however the answer arrives, and nothing of it is lost."""

import importlib
import json
from types import SimpleNamespace

import pytest

from tq.engine.run.serve.parts import AnswerParts
from tq.engine.run.serve.requests import Piece, ToolCall

TOOLS = ({"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}},)
START = "<tool_call>"
THINK = 7  # the token that opens reasoning


def tokenizer(parser="json_tools", thinking=True, vocabulary=(), **fields):
    found = importlib.import_module(f"mlx_lm.tool_parsers.{parser}") if parser else None
    return SimpleNamespace(
        has_thinking=thinking,
        think_start="<think>",
        think_end="</think>",
        rfind_think_start=lambda prompt: max((n for n, t in enumerate(prompt) if t == THINK), default=-1),
        rfind_think_end=lambda prompt: -1,
        get_vocab=lambda: dict.fromkeys(vocabulary),
        has_tool_calling=found is not None,
        tool_parser=found and found.parse_tool_call,
        tool_call_start=found and found.tool_call_start,
        tool_call_end=found and found.tool_call_end,
        **{"structural_markers": (), "response_transitions": {}, "response_initial_state": None, **fields},
    )


def sorted_out(answer, step, tools=TOOLS, prompt=(), **fields):
    """([kind, text] of neighbouring pieces joined, and [name, arguments] of calls) of an answer in pieces."""
    parts = AnswerParts(tokenizer(**fields), prompt, tools)
    found = []
    events = [e for at in range(0, len(answer), step) for e in parts.push(answer[at : at + step])]
    for event in [*events, *parts.end()]:
        if isinstance(event, ToolCall):
            found.append(["call", event.name, json.loads(event.arguments)])
        elif found and found[-1][0] == event.kind:
            found[-1][1] += event.text
        else:
            assert isinstance(event, Piece)
            found.append([event.kind, event.text])
    assert parts.n_calls == sum(event[0] == "call" for event in found)
    return found


def call(arguments='{"x": 1}', name="f"):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("just text", [["text", "just text"]]),
        (f"First. {call()}", [["text", "First. "], ["call", "f", {"x": 1}]]),
        (f"{call()}\n{call('{}', 'g')} done", [["call", "f", {"x": 1}], ["call", "g", {}], ["text", "done"]]),
        (f"<think>\nHm.</think>\n\nSo: {call()}", [["thought", "Hm."], ["text", "So: "], ["call", "f", {"x": 1}]]),
        (f"<think>Hm. {call()}", [["thought", "Hm. "], ["call", "f", {"x": 1}]]),
        (call('{"text": "<think>no</think>"}'), [["call", "f", {"text": "<think>no</think>"}]]),
        (call('"{\\"x\\": 2}"'), [["call", "f", {"x": 2}]]),
        (call('{"é": "→"}'), [["call", "f", {"é": "→"}]]),
        ("a <tool_callx> b", [["text", "a <tool_callx> b"]]),
        ("ends in <tool_", [["text", "ends in <tool_"]]),
    ],
)  # fmt: skip
def test_parts_are_told_apart_however_they_arrive(answer, expected, step):
    assert sorted_out(answer, step) == expected


@pytest.mark.parametrize("step", [1, 1000])
@pytest.mark.parametrize(
    "bad",
    [
        "<tool_call>{not json}</tool_call>",
        "<tool_call>  \n</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "x"}</tool_call>',
        '<tool_call>["f"]</tool_call>',
        '<tool_call>{"name": "f", "argum',
    ],
)
def test_a_call_that_cannot_be_understood_is_text(bad, step):
    assert sorted_out(f"So: {bad}", step) == [["text", f"So: {bad}"]]


@pytest.mark.parametrize("step", [1, 1000])
def test_a_call_that_the_end_cut_its_marker_off_counts(step):
    assert sorted_out(call().removesuffix("</tool_call>"), step) == [["call", "f", {"x": 1}]]


def test_without_tools_a_call_is_text():
    assert sorted_out(call(), 1, tools=()) == [["text", call()]]
    assert sorted_out(call(), 1, parser=None) == [["text", call()]]


@pytest.mark.parametrize("step", [1, 1000])
def test_reasoning_that_the_prompt_opened(step):
    assert sorted_out("Hm.</think>Yes.", step, prompt=(1, THINK, 2)) == [["thought", "Hm."], ["text", "Yes."]]


@pytest.mark.parametrize("step", [1, 1000])
@pytest.mark.parametrize(
    ("parser", "answer", "expected"),
    [
        ("mistral", 'Yes.[TOOL_CALLS]f[ARGS]{"x": 1}g[ARGS]{}', [["f", {"x": 1}], ["g", {}]]),
        ("pythonic", "Yes.<|tool_call_start|>[f(x=1), g()]<|tool_call_end|>", [["f", {"x": 1}], ["g", {}]]),
    ],
)
def test_several_calls_in_one(parser, answer, expected, step):
    found = sorted_out(answer, step, parser=parser)
    assert found == [["text", "Yes."], *(["call", *one] for one in expected)]


@pytest.mark.parametrize("step", [1, 1000])
def test_channels_of_gpt_oss(step):
    answer = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    found = sorted_out(answer, step, parser=None, thinking=False, vocabulary=["<|channel|>"])
    assert found == [["thought", "Hm."], ["text", "Yes."]]


@pytest.mark.parametrize("step", [1, 1000])
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.f "
            '<|constrain|>json<|message|>{"x": 1}',
            [["thought", "Hm."], ["call", "f", {"x": 1}]],
        ),
        (
            "<|channel|>commentary<|message|>Let me look.<|end|><|start|>assistant to=functions.get-it"
            '<|channel|>commentary json<|message|>{"x": "<|message|>"}<|call|>',
            [["text", "Let me look."], ["call", "get-it", {"x": "<|message|>"}]],
        ),
        ("<|start|>assistant to=functions.f {}<|call|>", [["text", "<|start|>assistant to=functions.f {}<|call|>"]]),
    ],
)
def test_calls_of_gpt_oss(answer, expected, step):
    assert sorted_out(answer, step, parser=None, thinking=False, vocabulary=["<|channel|>"]) == expected


@pytest.mark.parametrize("step", [1, 1000])
@pytest.mark.parametrize("tools", [(), TOOLS])
def test_a_format_of_its_own(step, tools):
    """What mlx-lm says of Muse: a header decides what follows."""
    edges = {
        "header": [("to=self|", "reasoning"), ("to=user|", "normal"), (START, "tool")],
        "reasoning": [("<eom>", "header")],
        "normal": [("<eom>", "header")],
    }
    answer = f"to=self|Hm.<eom>to=user|Yes.<eom>{call()}"
    found = sorted_out(answer, step, tools, response_transitions=edges, response_initial_state="header")
    assert found == [["thought", "Hm."], ["text", "Yes."], *([["call", "f", {"x": 1}]] if tools else [])]


def test_calls_have_ids_of_their_own():
    parts = AnswerParts(tokenizer(), (), TOOLS)
    first, second = [*parts.push(call()), *parts.push(call())]
    assert first.id.startswith("call_")
    assert first.id != second.id
