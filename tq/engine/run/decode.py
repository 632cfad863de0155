"""The loop under every generation: a prompt in chunks, then one token at a time, each computed while the last is shown.

mlx-lm's `generate_step` does the same, and normalises the logits of the whole vocabulary for every token, which on a
CPU takes longer than a small model does.
"""

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn

from tq.engine.run.context import Context

PREFILL_STEP = 2048  # tokens of a prompt that go through the model at once, as in mlx-lm

Processor = Callable[[mx.array, mx.array], mx.array]  # tokens so far (n,), logits (1, vocab) -> logits
Picker = Callable[[mx.array], tuple[mx.array, mx.array]]  # logits (1, vocab) -> token (1,), its log-probability (1,)


def prefill(model: nn.Module, context: Context, tokens: list[int], step: int = PREFILL_STEP) -> Iterator[int]:
    """Let a model read tokens into its caches, and yield after each chunk how many it has read."""
    context.grow_to(len(context.tokens) + len(tokens))
    for start in range(0, len(tokens), step):
        chunk = tokens[start : start + step]
        model(mx.array(chunk)[None], cache=context.caches)
        mx.eval([cache.state for cache in context.caches])
        mx.clear_cache()
        context.tokens += chunk
        yield start + len(chunk)


class Chooser:
    """Chooses the tokens of one sequence from logits.

    Args:
        prompt: Tokens before the first that is chosen.
    """

    def __init__(self, prompt: Sequence[int], processors: list[Processor], pick: Picker):
        self._processors, self._pick = processors, pick
        self._tokens = mx.array(list(prompt), mx.uint32) if processors else None

    def process(self, logits: mx.array) -> mx.array:
        """Logits (1, vocab) of the next token after penalties and bans."""
        for process in self._processors:
            assert self._tokens is not None
            logits = process(self._tokens, logits)
        return logits

    def choose(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        """The next token (1,) and its log-probability (1,), from processed logits."""
        token, logprob = self._pick(logits)
        if self._tokens is not None:
            self._tokens = mx.concatenate([self._tokens, token.astype(mx.uint32)])
        return token, logprob


def steps(
    model: nn.Module,
    prompt: list[int],
    limit: int,
    context: Context,
    processors: list[Processor],
    pick: Picker,
    prefill_step: int = PREFILL_STEP,
) -> Iterator[tuple[int, float]]:
    """Yield at most `limit` tokens that follow the prompt, each with its log-probability.

    Args:
        prompt: Begins with the context's tokens, and has at least one more.
        context: It ends up with the prompt and the yielded tokens, but for the last of `limit` ones.
    """
    chooser = Chooser(prompt, processors, pick)

    def step(inputs: mx.array) -> tuple[mx.array, mx.array]:
        logits = model(inputs[None], cache=context.caches)[:, -1, :]
        return chooser.choose(chooser.process(logits))

    context.grow_to(len(prompt))
    rest = prompt[len(context.tokens) : -1]  # the last goes alone: its logits are wanted
    for _ in prefill(model, context, rest, prefill_step):
        pass
    token, logprob = step(mx.array(prompt[-1:]))
    context.tokens.append(prompt[-1])
    mx.async_eval(token, logprob)
    for n in range(1, limit + 1):
        if n < limit:
            context.grow_to(len(context.tokens) + 1)
        following = step(token) if n < limit else None
        if following:
            mx.async_eval(*following)
        token_id = int(token.item())  # type: ignore[arg-type]
        if following:
            context.tokens.append(token_id)
        yield token_id, float(logprob.item())  # type: ignore[arg-type]
        if following is None:
            return
        token, logprob = following
        if n % 256 == 0:
            mx.clear_cache()
