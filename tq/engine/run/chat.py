"""Conversation: messages, the model that answers them, and what it has read of them, so that it reads only what is new.

What the caches hold is compared with the conversation as the chat template renders it now: templates leave reasoning
of earlier turns out, and dropped turns are gone. The common beginning stays, the rest is read (again).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import mlx.core as mx

from tq.engine.cache.prompts import LEAST_TOKENS, PromptCache, common_prefix
from tq.engine.cache.settings import KVSettings
from tq.engine.events import Note, Progress
from tq.engine.run import decode
from tq.engine.run.generate import Finished, Token, context_length, encode_messages, generate, open_context
from tq.engine.run.sampling import GenerateOptions
from tq.engine.run.thinking import ThoughtFilter, begins_thinking, thought_markers
from tq.errors import TQError, UsageError

if TYPE_CHECKING:
    from tq.engine.model.load import LoadedModel

READ_STEP = 512  # tokens that are read between two looks at an interruption
Message = dict[str, str]


@dataclass(frozen=True)
class Piece:
    """A piece of an answer. `thought`: it is reasoning."""

    text: str
    thought: bool


@dataclass(frozen=True)
class Answer:
    """The last event of an answer. "length": max_tokens, or the context is full.

    `cached_tokens` of the prompt did not have to be read. Prefill lasts until the first token is known.
    """

    reason: Literal["stop", "length", "interrupted"]
    text: str
    thoughts: str
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def prefill_tokens_per_second(self) -> float:
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_seconds if self.tokens else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return (self.tokens - 1) / self.decode_seconds if self.tokens > 1 else 0.0


Event = Note | Progress | Piece | Answer


class Conversation:
    """A conversation with a model.

    Attributes:
        messages: What was said: user and assistant in turn, without the system message.
        first: Index of the first message that the model still sees.
        options: How it answers (`set_options`).
        think: Whether a reasoning model may, where its template knows how to ask.
        context: What the model has read.
        keep: Whether the caches of this conversation are worth storing: somebody will come back to it.

    Args:
        prompts: Where caches of system messages and kept conversations are stored; None: nowhere.

    Raises:
        TQError: The model has no chat template, or its caches cannot be packed.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        system: str | None = None,
        options: GenerateOptions | None = None,
        kv: KVSettings | None = None,
        prompts: PromptCache | None = None,
        think: bool = True,
    ):
        if not loaded.tokenizer.has_chat_template:
            raise TQError("this model has no chat template: it cannot hold a conversation", "tq run continues a text")
        self.loaded, self.prompts, self.think = loaded, prompts, think
        self.system = system
        self.messages: list[Message] = []
        self.first = 0
        self.keep = False
        self.context = open_context(loaded.model, kv)
        self.limit = context_length(loaded.config)
        self._markers = thought_markers(loaded.tokenizer)
        self._interrupted = False
        self.set_options(options or GenerateOptions())

    def set_options(self, options: GenerateOptions) -> None:
        """Answer like this from now on. A seed counts once: with it, each answer would use the same random numbers."""
        if options.seed is not None:
            mx.random.seed(options.seed)
        self.options = dataclasses.replace(options, seed=None)

    def interrupt(self) -> None:
        """End the answer at the next token. A signal handler may call this."""
        self._interrupted = True

    def _is_interrupted(self) -> bool:
        return self._interrupted

    def clear(self) -> None:
        """Forget what was said; the system message stays."""
        self.store()
        self.messages, self.first, self.keep = [], 0, False

    def replace(self, messages: list[Message]) -> None:
        """Go on with another conversation; the first message may be a system message."""
        self.clear()
        if messages and messages[0]["role"] == "system":
            self.system, messages = messages[0]["content"], messages[1:]
        self.messages, self.keep = list(messages), True

    def transcript(self) -> list[Message]:
        """All messages, dropped ones and the system message included."""
        return [*self._system(), *self.messages]

    def ask(self, text: str) -> Iterator[Event]:
        """Say something, and yield the answer piece by piece, then one Answer.

        If the answer is interrupted before it has a text, or fails, nothing was said.

        Raises:
            UsageError: The message is empty.
            TQError: It does not fit the model's context, or the chat template refuses it.
        """
        if not text.strip():
            raise UsageError("the message is empty")
        return self._answer([*self.messages, {"role": "user", "content": text}])

    def regenerate(self) -> Iterator[Event]:
        """Answer the last message again, in place of the last answer.

        Raises:
            UsageError: There is no answer.
        """
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise UsageError("there is no answer yet that could be made again")
        return self._answer(self.messages[:-1])

    def store(self) -> None:
        """Store what the model has read of the system message, and of the conversation if it is kept.

        The context is cut back by this.
        """
        if self.prompts is None or len(self.context.tokens) < LEAST_TOKENS:
            return
        try:
            system = self._beginning(self._system())
            said = self._beginning(self._seen(self.messages)) if self.keep else []
        except TQError:
            return  # a system message that the template refuses has never been read
        if said:
            self.context.keep(said)
            self.prompts.save(self.context.tokens, self.context.caches)
        if self.context.keep(system) == len(system):
            self.prompts.save(self.context.tokens, self.context.caches)

    def notes(self) -> list[Note]:
        """What the store of prompts had to say since the last call."""
        return [] if self.prompts is None else [Note(message) for message in self.prompts.take_notes()]

    # --- answering ---

    def _answer(self, messages: list[Message]) -> Iterator[Event]:
        """The answer to messages that end with the user's, after which they are the conversation."""
        from mlx_lm.utils import maybe_set_recommended_wired_limit

        self._interrupted = False
        tokens, first = self._fit(messages)
        if first > self.first:
            turns = sum(message["role"] == "user" for message in messages[self.first : first])
            yield Note(
                f"the context of {self.limit} tokens is full: the model no longer sees the "
                f"{'oldest turn' if turns == 1 else f'{turns} oldest turns'}"
            )
        start = first_token = time.perf_counter()
        wired_limit = maybe_set_recommended_wired_limit()
        thoughts = ThoughtFilter(self._markers, begins_thinking(self.loaded.tokenizer, tokens))
        said = {False: "", True: ""}
        reason: Literal["stop", "length", "interrupted"] = "interrupted"
        count = 0
        try:
            cached = self._reuse(tokens)
            yield from self.notes()
            yield from self._read(tokens, messages, cached)
            if not self._is_interrupted():
                events = generate(self.loaded, tokens, self.options, context=self.context)
                for event in events:
                    if isinstance(event, Finished):
                        reason = event.reason
                        break
                    if isinstance(event, Token):
                        count += 1
                        if count == 1:
                            first_token = time.perf_counter()
                        for text, thought in thoughts.push(event.text):
                            said[thought] += text
                            yield Piece(text, thought)
                    if self._is_interrupted():
                        break
                events.close()  # type: ignore[attr-defined]
            for text, thought in thoughts.end():
                said[thought] += text
                yield Piece(text, thought)
        except GeneratorExit:
            raise
        except BaseException:
            self.context.clear()  # some layers may have read a token more than others
            raise
        finally:
            if wired_limit is not None:
                mx.set_wired_limit(wired_limit)
        if said[False] or reason != "interrupted":
            extra = {"reasoning_content": said[True]} if said[True] else {}
            self.messages = [*messages, {"role": "assistant", "content": said[False], **extra}]
            self.first = first
        if not count:
            first_token = time.perf_counter()
        yield Answer(
            reason, said[False], said[True], len(tokens), cached, count,
            prefill_seconds=first_token - start, decode_seconds=time.perf_counter() - first_token,
        )  # fmt: skip

    def _reuse(self, tokens: list[int]) -> int:
        """Keep what the context has of the prompt, or load what is stored; how many tokens that spares."""
        self.context.keep(tokens[:-1])
        if self.prompts is not None:
            self.context.load(self.prompts, tokens, worth=LEAST_TOKENS)
        return len(self.context.tokens)

    def _read(self, tokens: list[int], messages: list[Message], cached: int) -> Iterator[Progress]:
        """Read the prompt but for its last token, with a mark at each place that later prompts will go on from."""
        places = [len(tokens) - 1]
        if self.context.needs_marks:
            begin = common_prefix(self._beginning(self._system()), tokens)
            later = [*self._seen(messages), {"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]
            places += [begin, common_prefix(self._encode(later), tokens)]
        total = len(tokens) - cached
        context = self.context
        context.grow_to(len(tokens))
        for place in sorted(place for place in places if len(context.tokens) < place < len(tokens)):
            step = min(READ_STEP, self.options.prefill_step)
            for _ in decode.prefill(self.loaded.model, context, tokens[len(context.tokens) : place], step):
                yield Progress(len(context.tokens) - cached, total, "tokens")
                if self._is_interrupted():
                    return
            context.mark()

    # --- prompts ---

    def _system(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _seen(self, messages: list[Message]) -> list[Message]:
        return [*self._system(), *messages[self.first :]]

    def _encode(self, messages: list[Message]) -> list[int]:
        return encode_messages(self.loaded.tokenizer, messages, self.think)

    def _beginning(self, messages: list[Message]) -> list[int]:
        """The tokens that every prompt begins with that goes on from these messages."""
        one, other = (self._encode([*messages, {"role": "user", "content": text}]) for text in ("a", "1"))
        return one[: common_prefix(one, other)]

    def _fit(self, messages: list[Message]) -> tuple[list[int], int]:
        """A prompt that leaves room for an answer, and the index of the first message in it.

        When it no longer fits, turns are left out until half of the context is free: reading the rest again costs time.
        """
        starts = [n for n, message in enumerate(messages) if n > self.first and message["role"] == "user"]
        first = self.first
        tokens = self._encode([*self._system(), *messages[first:]])
        if self.limit is None:
            return tokens, first
        if len(tokens) > self.limit - min(self.options.max_tokens, self.limit // 4):
            for first in starts:
                tokens = self._encode([*self._system(), *messages[first:]])
                if len(tokens) <= self.limit // 2:
                    break
        if len(tokens) >= self.limit:
            raise TQError(
                f"the system message and this one have {len(tokens)} tokens, and this model takes {self.limit - 1}",
                "shorten them, or choose a model with a longer context",
            )
        return tokens, first
