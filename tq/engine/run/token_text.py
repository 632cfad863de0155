"""TokenText: generated tokens to the text that can be shown, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from tq.engine.run.sampling import GenerateOptions
from tq.engine.run.thinking import overlap


class TokenText:
    """The text of one answer. All that `push` returns, joined, has whole characters and nothing of a stop string.

    Attributes:
        count: Tokens so far, the end of sequence included.
        reason: How the answer ended; None: it goes on.
        stop_text: The stop string that ended it.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        end_ids: Tokens that end a sequence.
        limit: Most tokens.
        continues: The text goes on with another one: a space at its beginning stays, which detokenizers may drop.
    """

    def __init__(
        self, tokenizer: Any, options: GenerateOptions, end_ids: set[int], limit: int, continues: bool = False
    ):
        self._detokenizer = tokenizer.detokenizer
        if continues:  # only the first space of all that they get: a letter goes before
            self._detokenizer.add_token(tokenizer.encode("a", add_special_tokens=False)[-1])
            _ = self._detokenizer.last_segment
        self._end_ids, self._limit, self._min_tokens = end_ids, limit, options.min_tokens
        self._stops = _StopFilter(options.stop)
        self.count = 0
        self.reason: Literal["stop", "length"] | None = None
        self.stop_text: str | None = None

    def push(self, token_id: int) -> str:
        """The text that can be shown after this token: none of it while a character or a stop string may go on."""
        self.count += 1
        if token_id in self._end_ids:
            self.reason = "stop"
        else:
            self._detokenizer.add_token(token_id)
            if self.count == self._limit:
                self.reason = "length"
        if self.reason is not None:
            self._detokenizer.finalize()
        text = self._detokenizer.last_segment
        if self.reason is not None:
            text = text.rstrip("\ufffd")  # the first bytes of a character that the end cut off
        if self.count > self._min_tokens:
            text, self.stop_text = self._stops.push(text)
            if self.stop_text is not None:
                self.reason = "stop"
            elif self.reason is not None:
                text += self._stops.held
        return text


class _StopFilter:
    """Passes text on until a stop string appears, and holds back what may become one."""

    def __init__(self, stops: Sequence[str]):
        self.stops = stops
        self.held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that can be shown, and the stop string that followed it."""
        self.held += text
        found = [(at, stop) for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            at, stop = min(found, key=lambda item: item[0])
            return self.held[:at], stop
        keep = max((overlap(self.held, stop) for stop in self.stops), default=0)
        split = len(self.held) - keep
        text, self.held = self.held[:split], self.held[split:]
        return text, None
