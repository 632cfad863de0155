"""Which part of an answer is reasoning: told by markers in its text, which are not part of either."""

from collections.abc import Iterator, Sequence

# GPT-OSS writes to channels (https://cookbook.openai.com/articles/openai-harmony); mlx-lm knows the other markers.
HARMONY = {
    "<|channel|>analysis<|message|>": True,
    "<|end|><|start|>assistant<|channel|>final<|message|>": False,
    "<|channel|>final<|message|>": False,
}


class ThoughtFilter:
    """Sorts a text that arrives in pieces.

    Args:
        markers: Texts that begin a part of the answer, and whether it is reasoning.
        thinking: Whether the answer begins in the middle of reasoning: templates may open it.
    """

    def __init__(self, markers: dict[str, bool], thinking: bool = False):
        self.markers = markers
        self.thinking = thinking
        self._held = ""
        self._begins = False  # a part has begun after a marker: templates drop spaces there

    def push(self, text: str) -> Iterator[tuple[str, bool]]:
        """Yield (text, whether it is reasoning) of what is certain now."""
        self._held += text
        while True:
            found = [(at, -len(m), m) for m in self.markers if (at := self._held.find(m)) >= 0]
            if not found:
                break
            at, _, marker = min(found)
            yield from self._part(self._held[:at])
            self._held = self._held[at + len(marker) :]
            self.thinking, self._begins = self.markers[marker], True
        split = len(self._held) - max((overlap(self._held, marker) for marker in self.markers), default=0)
        text, self._held = self._held[:split], self._held[split:]
        yield from self._part(text)

    def end(self) -> Iterator[tuple[str, bool]]:
        """Yield what was held back because a marker might have begun."""
        yield from self._part(self._held)
        self._held = ""

    def _part(self, text: str) -> Iterator[tuple[str, bool]]:
        if self._begins:
            text = text.lstrip()
        if text:
            self._begins = False
            yield text, self.thinking


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
