"""The loop under every generation: a prompt in chunks, then one token at a time, each computed while the last is shown.

mlx-lm's `generate_step` does the same, and normalises the logits of the whole vocabulary for every token, which on a
CPU takes longer than a small model does.
"""

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

PREFILL_STEP = 2048  # tokens of a prompt that go through the model at once, as in mlx-lm

Processor = Callable[[mx.array, mx.array], mx.array]  # tokens so far (n,), logits (1, vocab) -> logits
Picker = Callable[[mx.array], tuple[mx.array, mx.array]]  # logits (1, vocab) -> token (1,), its log-probability (1,)


def steps(
    model: nn.Module, prompt: list[int], limit: int, cache: list[Any], processors: list[Processor], pick: Picker
) -> Iterator[tuple[int, float]]:
    """Yield at most `limit` tokens that follow the prompt, each with its log-probability.

    Args:
        prompt: At least one token, which `cache` does not hold yet.
        cache: mlx-lm's prompt cache; it ends up with the prompt and the yielded tokens, and one more if there is one.
    """
    tokens = mx.array(prompt)

    def step(inputs: mx.array) -> tuple[mx.array, mx.array]:
        nonlocal tokens
        logits = model(inputs[None], cache=cache)[:, -1, :]
        for process in processors:
            logits = process(tokens, logits)
        token, logprob = pick(logits)
        if processors:
            tokens = mx.concatenate([tokens, token])
        return token, logprob

    rest = tokens
    while len(rest) > 1:  # the last token goes alone: only its logits are wanted
        chunk, rest = rest[:-1][:PREFILL_STEP], rest[min(PREFILL_STEP, len(rest) - 1) :]
        model(chunk[None], cache=cache)
        mx.eval([c.state for c in cache])
        mx.clear_cache()
    token, logprob = step(rest)
    mx.async_eval(token, logprob)
    for n in range(1, limit + 1):
        following = step(token) if n < limit else None
        if following:
            mx.async_eval(*following)
        yield int(token.item()), float(logprob.item())  # type: ignore[arg-type]
        if following is None:
            return
        token, logprob = following
        if n % 256 == 0:
            mx.clear_cache()
