"""What logits say about a text: negative log-likelihoods, KL divergence, agreement, and their means with errors."""

import math
from typing import Any

import mlx.core as mx
import numpy as np

# Logits that are worked on at once, 64 MiB of float32: 64 positions of a vocabulary of 256 K.
_CHUNK_ELEMENTS = 2**24


def score(logits: mx.array, targets: mx.array, reference_logits: mx.array | None) -> dict[str, np.ndarray]:
    """Per-token values, each (B, L): "nll", and with a reference "reference_nll", "kl" and "same_top1".

    Shapes:
        logits, reference_logits: (B, L, vocab) of any float type; the work is in float32, by positions.
        targets: (B, L)
    """
    batch, length, vocab = logits.shape
    step = max(1, _CHUNK_ELEMENTS // (batch * vocab))
    chunks = []
    for at in range(0, length, step):
        part = slice(at, at + step)
        target = targets[:, part, None]
        log_p = _log_softmax(logits[:, part])
        scores = {"nll": -mx.take_along_axis(log_p, target, axis=-1)[..., 0]}
        if reference_logits is not None:
            log_q = _log_softmax(reference_logits[:, part])
            q = mx.exp(log_q)
            # 0 * log(0 / p) is 0, also where both models exclude a token (-inf minus -inf).
            kl = mx.where(q > 0, q * (log_q - log_p), 0).sum(axis=-1)
            scores["reference_nll"] = -mx.take_along_axis(log_q, target, axis=-1)[..., 0]
            scores["kl"] = mx.maximum(kl, 0)  # rounding can leave -1e-7
            scores["same_top1"] = mx.argmax(log_p, axis=-1) == mx.argmax(log_q, axis=-1)
        mx.eval(scores)
        chunks.append(scores)
    return {name: np.concatenate([np.array(c[name]) for c in chunks], axis=1) for name in chunks[0]}


def _log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    logits = logits - logits.max(axis=-1, keepdims=True)  # an offset that all logits share would cost digits
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def summary(per_token: dict[str, np.ndarray]) -> dict[str, Any]:
    """The fields of an EvalResult that come from scores, each (windows, tokens)."""
    perplexity, perplexity_error = _perplexity(per_token["nll"])
    fields: dict[str, Any] = {"perplexity": perplexity, "perplexity_error": perplexity_error}
    if "kl" in per_token:
        kl, same = per_token["kl"], per_token["same_top1"]
        reference_perplexity, reference_error = _perplexity(per_token["reference_nll"])
        fields |= {
            "reference_perplexity": reference_perplexity,
            "reference_perplexity_error": reference_error,
            "kl_mean": kl.mean().item(),
            "kl_mean_error": _window_error(kl),
            "kl_median": np.median(kl).item(),
            "kl_p99": np.percentile(kl, 99).item(),
            "kl_max": kl.max().item(),
            "top1_agreement": same.mean().item(),
            "top1_agreement_error": _window_error(same),
        }
    return fields


def _window_error(values: np.ndarray) -> float | None:
    """Standard error of the mean of `values` (windows, tokens), taking windows as the independent samples."""
    means = values.mean(axis=1)
    return None if len(means) < 2 else means.std(ddof=1).item() / math.sqrt(len(means))


def _perplexity(nll: np.ndarray) -> tuple[float, float | None]:
    """Perplexity and its standard error from negative log-likelihoods (windows, tokens)."""
    with np.errstate(over="ignore"):  # a ruined model may reach infinity
        perplexity = np.exp(nll.mean()).item()
    error = _window_error(nll)
    return perplexity, None if error is None else perplexity * error
