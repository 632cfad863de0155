"""Sequence: one request at work, from its first token read to its last token said."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Literal

import mlx.core as mx

from tq.engine.run.context import Context
from tq.engine.run.decode import Chooser
from tq.engine.run.generate import end_ids
from tq.engine.run.sampling import logits_processors, token_picker
from tq.engine.run.serve.parts import AnswerParts, RawText
from tq.engine.run.serve.prompting import Prompt
from tq.engine.run.serve.requests import Done, Piece, Reading, Request, TokenLogprob
from tq.engine.run.serve.rows import Chosen, Row
from tq.engine.run.serve.stream import Stream
from tq.engine.run.token_text import TokenText
from tq.errors import TQError

if TYPE_CHECKING:
    from tq.engine.model.load import LoadedModel

DoneReason = Literal["stop", "length", "tool_calls", "cancelled"]


class Sequence:
    """What is known of a request while it is worked on.

    Attributes:
        prompt: What to read, and how to go on.
        context: What the model has read; None before it is known where to begin.
        places: Where reading makes marks, for prompts to come.
        waits_for, shared: Another one that reads so many of the same tokens now: this one goes on from there.
        row, pending: While tokens are generated: its row, and the token that is being computed.
    """

    def __init__(self, request: Request, prompt: Prompt, stream: Stream):
        self.request, self.prompt, self.stream = request, prompt, stream
        self.context: Context | None = None
        self.places: set[int] = {prompt.beginning, len(prompt.tokens) - 1, *prompt.later}
        self.waits_for: Sequence | None = None
        self.shared = 0
        self.row: Row | None = None
        self.pending: Chosen | None = None
        self.cached = 0
        self._text: TokenText | None = None
        self._tokens: list[TokenLogprob] = []
        self._began: float | None = None
        self._first: float | None = None

    @property
    def wanted(self) -> list[int]:
        """What must be read before the first token can be generated: the last token goes alone."""
        return self.prompt.tokens[:-1]

    @property
    def is_read(self) -> bool:
        return self.context is not None and len(self.context.tokens) == len(self.prompt.tokens) - 1

    @property
    def count(self) -> int:
        """Tokens generated."""
        return 0 if self._text is None else self._text.count

    @property
    def is_last(self) -> bool:
        """Whether the token that is being computed is the last that may be."""
        return self.pending is not None and self.count + 1 == self.prompt.limit

    @property
    def reason(self) -> DoneReason | None:
        """How the answer ended; None: it goes on."""
        if self._text is None or self._text.reason is None:
            return None
        return "tool_calls" if self._text.reason == "stop" and self._parts.n_calls else self._text.reason

    def begin(self) -> None:
        """Work on it begins."""
        self._began = time.perf_counter()

    def start(self, context: Context) -> None:
        """Read on from what this context holds."""
        self.waits_for = None
        self.context, self.cached = context, len(context.tokens)
        self.report()

    def report(self) -> None:
        """Say how much of the prompt has been read."""
        assert self.context is not None
        self.stream.put(Reading(len(self.context.tokens), len(self.prompt.tokens)))

    def next_chunk(self, step: int) -> list[int]:
        """The tokens to read next, up to a place for a mark."""
        assert self.context is not None
        at = len(self.context.tokens)
        places = [place for place in self.places if place > at] if self.context.needs_marks else []
        return self.wanted[at : min([at + step, *places])]

    def open_row(self, loaded: LoadedModel) -> Row:
        """The prompt has been read: the row that goes on with it."""
        assert self.context is not None
        options, tokens, ends = self.prompt.options, self.prompt.tokens, end_ids(loaded)
        # Random numbers of its own: those of a seed are the same whatever else runs.
        seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(8), "little")
        picker = token_picker(options, len(loaded.tokenizer), mx.random.key(seed))
        chooser = Chooser(tokens, logits_processors(options, len(tokens), ends), picker)
        self._tokenizer: Any = loaded.tokenizer
        is_raw = self.request.messages is None
        continues = is_raw or self.request.continue_last
        self._text = TokenText(loaded.tokenizer, options, ends, self.prompt.limit, continues)
        self._parts: AnswerParts | RawText = (
            RawText() if is_raw else AnswerParts(loaded.tokenizer, tokens, self.request.tools)
        )
        self.row = Row(self.context, chooser, tokens[-1], self.request.top_logprobs or 0)
        return self.row

    def say(self, token_id: int, chosen: Chosen) -> None:
        """Send what this token says."""
        assert self._text is not None
        if self._first is None:
            self._first = time.perf_counter()
        text = self._text.push(token_id)
        if self.request.top_logprobs is not None:
            self._tokens.append(self._with_logprob(token_id, chosen))
        for event in self._parts.push(text):
            self._send(event)
        if self._text.reason is not None:
            for event in self._parts.end():
                self._send(event)
            if self._tokens:
                self._send(Piece("", "text"))

    def done(self, cancelled: bool = False) -> None:
        """Send the last event."""
        now = time.perf_counter()
        began = now if self._began is None else self._began
        first = now if self._first is None else self._first
        self.stream.put(
            Done(
                reason="cancelled" if cancelled else self.reason or "length",
                stop_text=None if self._text is None else self._text.stop_text,
                prompt_tokens=len(self.prompt.tokens),
                cached_tokens=self.cached,
                completion_tokens=self.count,
                prefill_seconds=first - began,
                decode_seconds=now - first,
            )
        )

    def fail(self, error: Exception) -> None:
        """Send what went wrong."""
        if not isinstance(error, TQError):
            said = str(error).splitlines()[0] if str(error) else ""
            failure = TQError(f"generation failed: {said or type(error).__name__}")
            failure.__cause__ = error
            error = failure
        self.stream.put(error)

    def _send(self, event: Any) -> None:
        if isinstance(event, Piece) and self._tokens:
            event = Piece(event.text, event.kind, tuple(self._tokens))
            self._tokens = []
        self.stream.put(event)

    def _with_logprob(self, token_id: int, chosen: Chosen) -> TokenLogprob:
        top: tuple[tuple[int, str, float], ...] = ()
        if chosen.top_ids is not None and chosen.top_logprobs is not None:
            ids: Any = chosen.top_ids.tolist()
            logprobs: Any = chosen.top_logprobs.tolist()
            top = tuple((i, self._tokenizer.decode([i]), logprob) for i, logprob in zip(ids, logprobs, strict=True))
        return TokenLogprob(token_id, self._tokenizer.decode([token_id]), float(chosen.logprob.item()), top)  # type: ignore[arg-type]
