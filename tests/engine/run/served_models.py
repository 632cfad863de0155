"""What the server's tests share: a model that can be watched and held, requests, and what comes of them."""

import threading

import mlx.nn as nn

from tq.engine.run.sampling import GenerateOptions
from tq.engine.run.serve.requests import Done, Piece, Request


def with_tools(wrapped, parser="json_tools"):
    """A tokenizer with a parser of mlx-lm for calls of tools."""
    import importlib

    from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper

    found = importlib.import_module(f"mlx_lm.tool_parsers.{parser}")
    return TokenizerWrapper(
        wrapped._tokenizer,
        BPEStreamingDetokenizer,
        tool_parser=found.parse_tool_call,
        tool_call_start=found.tool_call_start,
        tool_call_end=found.tool_call_end,
    )


class Watched(nn.Module):
    """A model whose forwards a test can count, hold and let fail.

    Attributes:
        calls: (sequences, tokens) of each forward.
        before: Called before each forward with its inputs.
    """

    def __init__(self, model):
        super().__init__()
        self.inner = model
        self.watch = _Watch()

    @property
    def layers(self):
        return self.inner.layers

    @property
    def model_type(self):
        return self.inner.model_type

    def make_cache(self):
        from mlx_lm.models.cache import make_prompt_cache

        return make_prompt_cache(self.inner)

    def __call__(self, inputs, cache=None):
        self.watch.calls.append(tuple(inputs.shape))
        if self.watch.before is not None:
            self.watch.before(inputs)
        return self.inner(inputs, cache=cache)

    def clear(self):
        self.watch.calls.clear()

    @property
    def tokens_read(self):
        """Tokens of prompts: of all forwards of more than one token."""
        return sum(batch * length for batch, length in self.watch.calls if length > 1)


class _Watch:
    def __init__(self):
        self.calls, self.before = [], None


class Gate:
    """Holds the first forward of a model until it is opened."""

    def __init__(self, model):
        self.reached, self.opened = threading.Event(), threading.Event()
        model.watch.before = self._pass

    def _pass(self, inputs):
        self.reached.set()
        assert self.opened.wait(60)

    def open(self):
        self.opened.set()


def user(text):
    return {"role": "user", "content": text}


def chat(*messages, n=8, stop=(), tools=(), **fields):
    """A request of messages, each a text of the user or a whole message."""
    found = tuple(user(m) if isinstance(m, str) else m for m in messages)
    how = {name: fields.pop(name) for name in list(fields) if name in GenerateOptions.__dataclass_fields__}
    return Request(messages=found, options=GenerateOptions(max_tokens=n, stop=stop, **how), tools=tools, **fields)


def text(prompt, n=8, **fields):
    """A request to continue a text or tokens, with the log-probability of each token."""
    how = {name: fields.pop(name) for name in list(fields) if name in GenerateOptions.__dataclass_fields__}
    prompt = prompt if isinstance(prompt, str) else tuple(prompt)
    return Request(prompt=prompt, options=GenerateOptions(max_tokens=n, **how), **{"top_logprobs": 0, **fields})


def ended(stream):
    """(text, token ids, Done) of a stream, to its end."""
    said, tokens, done = "", [], None
    for event in stream:
        if isinstance(event, Piece):
            said += event.text
            tokens += [token.token_id for token in event.tokens]
        if isinstance(event, Done):
            done = event
    return said, tokens, done
