"""A request to the tokens of its prompt: checked, completed with defaults, through the chat template."""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tq.engine.cache.prompts import common_prefix
from tq.engine.run.generate import context_length, encode_messages, encode_prompt
from tq.engine.run.sampling import GenerateOptions, resolve_options
from tq.engine.run.serve.parts import has_tools
from tq.engine.run.serve.requests import Message, ModelFacts, Request
from tq.errors import TQError, UsageError

if TYPE_CHECKING:
    from tq.engine.model.load import LoadedModel

MOST_TOP_LOGPROBS = 20  # as in OpenAI's API
_DEFAULTED = ("temp", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Prompt:
    """A request, ready to be worked on.

    Attributes:
        tokens: Of the prompt.
        options: Without None, except `seed`.
        limit: Most tokens to generate: max_tokens, or what the context has room for.
        beginning: So many tokens are those of its system message and tools, which other prompts begin with too.
        later: Places, in tokens, where the next prompts of the conversation will part from this one.
    """

    tokens: list[int]
    options: GenerateOptions
    limit: int
    beginning: int
    later: tuple[int, ...]


class Prompter:
    """Makes prompts for one model. Threads may share it.

    Args:
        defaults: Options for requests that leave them open.
        needs_places: Whether `Prompt.later` is wanted: it takes another run of the template.
    """

    def __init__(self, loaded: LoadedModel, defaults: GenerateOptions, needs_places: bool):
        self._loaded, self._defaults, self._needs_places = loaded, defaults, needs_places
        self._lock = threading.Lock()  # the tokenizer's
        self._beginnings: dict[str, list[int]] = {}  # of system messages and tools, the last few
        tokenizer = loaded.tokenizer
        # Of long prompts transformers says once, on stderr, that they are; here `_room` says it to whom it concerns.
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        self.facts = ModelFacts(
            name=loaded.path.name,
            context_length=context_length(loaded.config),
            vocabulary=max(len(tokenizer), loaded.config.get("vocab_size") or 0),
            has_chat_template=bool(tokenizer.has_chat_template),
            has_tools=has_tools(tokenizer),
            has_thinking=bool(tokenizer.has_thinking) or "<|channel|>" in tokenizer.get_vocab(),
        )

    def make(self, request: Request) -> Prompt:
        """The prompt of a request.

        Raises:
            UsageError: It asks for what this model or any cannot do.
            TQError: The chat template refuses it, or generation_config.json is wrong.
        """
        if (request.messages is None) == (request.prompt is None):
            raise UsageError("a request has either messages or a prompt")
        if request.top_logprobs is not None and not 0 <= request.top_logprobs <= MOST_TOP_LOGPROBS:
            raise UsageError(f"top_logprobs must be from 0 to {MOST_TOP_LOGPROBS}, not {request.top_logprobs}")
        mine, defaults = request.options, self._defaults
        missing = {name: getattr(defaults, name) for name in _DEFAULTED if getattr(mine, name) is None}
        options, _ = resolve_options(self._loaded, dataclasses.replace(mine, **missing))
        beginning, later = 0, tuple[int, ...]()
        with self._lock:
            if request.messages is None:
                tokens = self._text(request.prompt)
            else:
                tokens = self._conversation(request)
                beginning, later = self._places(request, tokens)
        return Prompt(tokens, options, self._room(tokens, options.max_tokens), beginning, later)

    def _room(self, tokens: list[int], max_tokens: int) -> int:
        most = self.facts.context_length
        if most is None:
            return max_tokens
        if len(tokens) >= most:
            raise UsageError(
                f"the prompt has {len(tokens)} tokens and this model takes 1 to {most - 1}, "
                f"so that its context of {most} has room for an answer",
                hint="shorten the prompt, or choose a model with a longer context",
            )
        return min(max_tokens, most - len(tokens))

    def _text(self, prompt: str | tuple[int, ...] | None) -> list[int]:
        if isinstance(prompt, str):
            return list(encode_prompt(self._loaded.tokenizer, prompt, raw=True))
        tokens = list(prompt or ())
        if not tokens:
            raise UsageError("the prompt is empty: the model needs at least 1 token to continue")
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.facts.vocabulary:
                raise UsageError(f"token ids must be from 0 to {self.facts.vocabulary - 1}, not {token!r}")
        return tokens

    def _conversation(self, request: Request) -> list[int]:
        if not self.facts.has_chat_template:
            raise UsageError("this model has no chat template: it can only continue a text")
        if request.tools and not self.facts.has_tools:
            raise UsageError("this model's chat template knows no tools")
        messages = [_checked(message) for message in request.messages or ()]
        if not messages:
            raise UsageError("there are no messages")
        if request.continue_last and (messages[-1]["role"] != "assistant" or not messages[-1]["content"]):
            raise UsageError("only a last message of the assistant, with a text, can be continued")
        return self._encode(request, messages, request.continue_last)

    def _encode(self, request: Request, messages: list[Message], continue_last: bool = False) -> list[int]:
        return encode_messages(
            self._loaded.tokenizer,
            messages,
            request.think,
            tools=request.tools,
            continue_last=continue_last,
            variables=request.template_options,
        )

    def _places(self, request: Request, tokens: list[int]) -> tuple[int, tuple[int, ...]]:
        """The end of what precedes the first question, and where the prompt after this one parts from it."""
        messages = [_checked(message) for message in request.messages or ()]
        system = list(itertools.takewhile(lambda message: message["role"] in ("system", "developer"), messages))
        later: list[int] = []
        try:
            begin = common_prefix(self._beginning(request, system), tokens)
            if self._needs_places and not request.continue_last:
                following = [{"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}]
                later.append(common_prefix(self._encode(request, [*messages, *following]), tokens))
        except TQError:  # a template that takes these messages may refuse others: then there is no such place
            return 0, ()
        return begin, tuple(later)

    def _beginning(self, request: Request, system: list[Message]) -> list[int]:
        """The tokens that every conversation with these system messages and tools begins with."""
        key = json.dumps([system, request.tools, request.think, request.template_options], default=str)
        found = self._beginnings.get(key)
        if found is None:
            one, other = (self._encode(request, [*system, {"role": "user", "content": text}]) for text in ("a", "1"))
            found = one[: common_prefix(one, other)]
            while len(self._beginnings) >= 16:
                self._beginnings.pop(next(iter(self._beginnings)))
        else:
            del self._beginnings[key]  # to the end: it was used last
        self._beginnings[key] = found
        return found


def _checked(message: Message) -> Message:
    """A message as templates want it: content is text, arguments of calls are objects.

    Raises:
        UsageError: It has no role, or a content that is no text.
    """
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise UsageError(f"each message needs a role, such as user, not {role!r}")
    if content is not None and not isinstance(content, str):
        raise UsageError(f"the content of a message must be text, not {type(content).__name__}")
    message = {**message, "content": content or ""}
    if message.get("tool_calls"):
        message["tool_calls"] = [_with_object(call) for call in message["tool_calls"]]
    return message


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        return call  # what a model once wrote wrongly stays as it was
    return {**call, "function": {**function, "arguments": arguments}}
