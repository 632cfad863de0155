"""The loop under every generation: a prompt in chunks, then one token at a time, each computed while the last is shown.

mlx-lm's `generate_step` does the same, and normalises the logits of the whole vocabulary for every token, which on a
CPU takes longer than a small model does.
"""

from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn

from tq.engine.run.context import Context

PREFILL_STEP = 2048  # tokens of a prompt that go through the model at once, as in mlx-lm

Processor = Callable[[mx.array, mx.array], mx.array]  # tokens so far (n,), logits (1, vocab) -> logits
Picker = Callable[[mx.array], tuple[mx.array, mx.array]]  # logits (1, vocab) -> token (1,), its log-probability (1,)


def prefill(model: nn.Module, context: Context, tokens: list[int], step: int = PREFILL_STEP) -> Iterator[int]:
    """Let a model read tokens into its caches, and yield after each chunk how many it has read."""
    for start in range(0, len(tokens), step):
        chunk = tokens[start : start + step]
        model(mx.array(chunk)[None], cache=context.caches)
        mx.eval([cache.state for cache in context.caches])
        mx.clear_cache()
        context.tokens += chunk
        yield start + len(chunk)


def steps(
    model: nn.Module, prompt: list[int], limit: int, context: Context, processors: list[Processor], pick: Picker
) -> Iterator[tuple[int, float]]:
    """Yield at most `limit` tokens that follow the prompt, each with its log-probability.

    Args:
        prompt: Begins with the context's tokens, and has at least one more.
        context: It ends up with the prompt and the yielded tokens, but for the last of `limit` ones.
    """
    tokens = mx.array(prompt)

    def step(inputs: mx.array) -> tuple[mx.array, mx.array]:
        nonlocal tokens
        logits = model(inputs[None], cache=context.caches)[:, -1, :]
        for process in processors:
            logits = process(tokens, logits)
        token, logprob = pick(logits)
        if processors:
            tokens = mx.concatenate([tokens, token])
        return token, logprob

    for _ in prefill(model, context, prompt[len(context.tokens) : -1]):  # the last goes alone: its logits are wanted
        pass
    token, logprob = step(tokens[-1:])
    context.tokens.append(prompt[-1])
    mx.async_eval(token, logprob)
    for n in range(1, limit + 1):
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
