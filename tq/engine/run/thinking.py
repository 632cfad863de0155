"""Which part of an answer is reasoning: told by markers in its text, which are not part of either."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

TEXT, THOUGHT = "text", "thought"  # kinds of parts

# GPT-OSS writes to channels (https://cookbook.openai.com/articles/openai-harmony); mlx-lm knows the other markers.
HARMONY_NEXT = "<|end|><|start|>assistant"  # between two messages of one answer
HARMONY = {
    f"{before}<|channel|>{channel}<|message|>": thought
    for before in ("", HARMONY_NEXT)
    for channel, thought in (("analysis", True), ("commentary", False), ("final", False))
}


@dataclass(frozen=True)
class Part:
    """A piece of a text. `kind`: of the part that it belongs to. `marker`: what ends that part here, if it ends."""

    text: str
    kind: str
    marker: str = ""


class PartFilter:
    """Sorts a text that arrives in pieces into parts, told by markers between them, which are not part of any.

    Args:
        markers: For each kind of part the texts that end it, and the kind of what follows.
        kind: What the text begins with.
        exact: Kinds of parts that keep the spaces they begin with; templates drop them at others.
    """

    def __init__(self, markers: dict[str, dict[str, str]], kind: str, exact: Collection[str] = ()):
        self.markers, self.kind, self.exact = markers, kind, exact
        self._held = ""
        self._begins = False  # a part has begun after a marker

    def push(self, text: str) -> Iterator[Part]:
        """Yield what is certain now."""
        self._held += text
        while True:
            markers = self.markers.get(self.kind, {})
            found = [(at, -len(m), m) for m in markers if (at := self._held.find(m)) >= 0]
            if not found:
                break
            at, _, marker = min(found)
            yield self._part(self._held[:at], marker)
            self._held = self._held[at + len(marker) :]
            self.kind, self._begins = markers[marker], True
        split = len(self._held) - max((overlap(self._held, marker) for marker in markers), default=0)
        text, self._held = self._held[:split], self._held[split:]
        part = self._part(text)
        if part.text:
            yield part

    def end(self) -> Iterator[Part]:
        """Yield what was held back because a marker might have begun."""
        part = self._part(self._held)
        self._held = ""
        if part.text:
            yield part

    def _part(self, text: str, marker: str = "") -> Part:
        if self._begins and self.kind not in self.exact:
            text = text.lstrip()
        if text:
            self._begins = False
        return Part(text, self.kind, marker)


class ThoughtFilter:
    """Sorts a text that arrives in pieces.

    Args:
        markers: Texts that begin a part of the answer, and whether it is reasoning.
        thinking: Whether the answer begins in the middle of reasoning: templates may open it.
    """

    def __init__(self, markers: dict[str, bool], thinking: bool = False):
        follow = {marker: THOUGHT if thought else TEXT for marker, thought in markers.items()}
        self._parts = PartFilter({TEXT: follow, THOUGHT: follow}, THOUGHT if thinking else TEXT)

    def push(self, text: str) -> Iterator[tuple[str, bool]]:
        """Yield (text, whether it is reasoning) of what is certain now."""
        return ((part.text, part.kind == THOUGHT) for part in self._parts.push(text) if part.text)

    def end(self) -> Iterator[tuple[str, bool]]:
        """Yield what was held back because a marker might have begun."""
        return ((part.text, part.kind == THOUGHT) for part in self._parts.end())


def thought_markers(tokenizer) -> dict[str, bool]:
    """The markers of a model, by its tokenizer (mlx-lm's TokenizerWrapper)."""
    markers = {tokenizer.think_start: True, tokenizer.think_end: False} if tokenizer.has_thinking else {}
    if "<|channel|>" in tokenizer.get_vocab():
        markers |= HARMONY
    return markers


def begins_thinking(tokenizer, prompt: Sequence[int]) -> bool:
    """Whether the prompt has opened reasoning that the answer goes on with."""
    if not tokenizer.has_thinking:
        return False
    return tokenizer.rfind_think_start(prompt) > tokenizer.rfind_think_end(prompt)


def overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that is a beginning of `marker`."""
    return next(n for n in range(min(len(text), len(marker)), -1, -1) if text.endswith(marker[:n]))
