"""What the parts of an answer are: text, reasoning and calls of tools, by the markers of each model."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from tq.engine.run.serve.requests import Piece, ToolCall
from tq.engine.run.thinking import HARMONY_NEXT, TEXT, THOUGHT, Part, PartFilter, begins_thinking, thought_markers

TOOL, HEADER = "tool", "header"
# GPT-OSS's calls, which mlx-lm has no parser for: the function is whom a message is for.
_HARMONY_STARTS = (
    "<|channel|>commentary to=functions.",
    f"{HARMONY_NEXT}<|channel|>commentary to=functions.",
    "<|start|>assistant to=functions.",
    f"{HARMONY_NEXT} to=functions.",
)
_HARMONY_ENDS = ("<|call|>", "<|end|>")
_HARMONY_CALL = re.compile(r"([\w.-]+)(?:(?!<\|message\|>).)*<\|message\|>(.*)", re.DOTALL)
_OURS = {"normal": TEXT, "reasoning": THOUGHT, "tool": TOOL}  # mlx-lm's names of parts


def has_tools(tokenizer: Any) -> bool:
    """Whether a model's answers can have calls that are understood here."""
    return bool(tokenizer.has_tool_calling) or _is_harmony(tokenizer)


class AnswerParts:
    """Sorts the text of one answer into Pieces and ToolCalls. Nothing that the model wrote is lost but markers.

    A call that cannot be understood is text, with its markers.

    Attributes:
        n_calls: ToolCalls so far.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        prompt: It may have opened reasoning.
        tools: Functions that may be called; without any, what looks like a call is text.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], tools: Sequence[dict[str, Any]]):
        self._tools = list(tools)
        initial = tokenizer.response_initial_state
        kind = _OURS.get(initial, initial) if initial else THOUGHT if begins_thinking(tokenizer, prompt) else TEXT
        self._parse: Any = tokenizer.tool_parser if tokenizer.has_tool_calling else _harmony_call
        self._filter = PartFilter(_markers(tokenizer, bool(tools)), kind, exact={TOOL})
        self._call = self._start = ""  # the text of a call, and the marker before it
        self.n_calls = 0

    def push(self, text: str) -> Iterator[Piece | ToolCall]:
        """Yield what is certain now."""
        for part in self._filter.push(text):
            yield from self._of(part)

    def end(self) -> Iterator[Piece | ToolCall]:
        """Yield the rest: the answer is over."""
        for part in self._filter.end():
            yield from self._of(part)
        if self._filter.kind == TOOL:  # some models have no marker where a call ends
            yield from self._called("")

    def _of(self, part: Part) -> Iterator[Piece | ToolCall]:
        if part.kind == TOOL:
            self._call += part.text
            if part.marker:
                yield from self._called(part.marker)
        elif part.text and part.kind != HEADER:
            yield Piece(part.text, "thought" if part.kind == THOUGHT else "text")
        self._start = part.marker or self._start

    def _called(self, end: str) -> Iterator[Piece | ToolCall]:
        text, self._call = self._call, ""
        try:
            found = self._parse(text, self._tools)
            calls = [_call(one) for one in ([found] if isinstance(found, dict) else found)]
        except Exception:  # mlx-lm's parsers raise anything on what a model may write
            yield Piece(self._start + text + end, "text")
            return
        self.n_calls += len(calls)
        yield from calls


class RawText:
    """The same of a text that continues a prompt: all that the model wrote is text, markers too."""

    n_calls = 0

    def push(self, text: str) -> Iterator[Piece | ToolCall]:
        """Yield it."""
        if text:
            yield Piece(text, "text")

    def end(self) -> Iterator[Piece | ToolCall]:
        """Nothing has been held back."""
        return iter(())


def _is_harmony(tokenizer: Any) -> bool:
    return not tokenizer.has_tool_calling and "<|channel|>" in tokenizer.get_vocab()


def _harmony_call(text: str, tools: Any) -> dict[str, Any]:
    """As the parsers of mlx-lm: `get_weather <|constrain|>json<|message|>{"city": "Rome"}`."""
    found = _HARMONY_CALL.match(text)
    if found is None:
        raise ValueError("no message")
    return {"name": found[1], "arguments": found[2]}


def _call(parsed: dict[str, Any]) -> ToolCall:
    """One call, as a parser of mlx-lm returns it.

    Raises:
        ValueError, KeyError, TypeError: It is no call.
    """
    name, arguments = parsed["name"], parsed.get("arguments", {})
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError("a call has a name and an object of arguments")
    return ToolCall(
        parsed.get("id") or f"call_{uuid.uuid4().hex[:24]}", name, json.dumps(arguments, ensure_ascii=False)
    )


def _markers(tokenizer: Any, tools: bool) -> dict[str, dict[str, str]]:
    """For each kind of part the markers that end it, as mlx-lm knows them for this model, and GPT-OSS's."""
    follow = {marker: THOUGHT if thought else TEXT for marker, thought in thought_markers(tokenizer).items()}
    markers = {TEXT: dict(follow), THOUGHT: dict(follow), TOOL: {}}
    markers[TEXT] |= dict.fromkeys(tokenizer.structural_markers, TEXT)
    starts_by_format = False
    for kind, edges in tokenizer.response_transitions.items():
        for marker, following in edges:
            if following == TOOL and not tools:
                continue
            starts_by_format |= following == TOOL
            markers.setdefault(_OURS.get(kind, kind), {})[marker] = _OURS.get(following, following)
    if tools and _is_harmony(tokenizer):
        for kind in (TEXT, THOUGHT):
            markers[kind] |= dict.fromkeys(_HARMONY_STARTS, TOOL)
        markers[TOOL] = dict.fromkeys(_HARMONY_ENDS, TEXT)
    elif tools and tokenizer.has_tool_calling:
        if not starts_by_format:
            markers[TEXT][tokenizer.tool_call_start] = TOOL
        if tokenizer.has_thinking:
            markers[THOUGHT][tokenizer.tool_call_start] = TOOL
        if tokenizer.tool_call_end:
            markers[TOOL][tokenizer.tool_call_end] = TEXT
    return markers
