"""What the tests of packed caches share: vectors, distances, and attention in float64."""

import mlx.core as mx
import numpy as np


def vectors(tokens, dim, heads=2, batch=1, seed=0):
    rng = np.random.default_rng(seed)
    return mx.array(rng.standard_normal((batch, heads, tokens, dim)).astype(np.float32))


def relative(got, expected):
    got, expected = np.array(got, np.float64), np.array(expected, np.float64)
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def run(model, caches, tokens, steps):
    """Logits of all tokens, which the model gets so many at a time."""
    parts, at = [], 0
    for n in steps:
        parts.append(model(tokens[:, at : at + n], cache=caches))
        mx.eval(parts[-1], [cache.state for cache in caches])
        at += n
    return mx.concatenate(parts, axis=1)


def token_ids(n, batch=1, seed=0):
    return mx.array(np.random.default_rng(seed).integers(3, 90, (batch, n)))
