"""How good a model is on a text: perplexity, and KL divergence from a reference model. Keeps nothing on disk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from tq.engine.cache.packed import KVBits
from tq.engine.events import Progress
from tq.engine.run.generate import bos_tokens, context_length, prompt_cache
from tq.errors import TQError, UsageError

if TYPE_CHECKING:
    from tq.engine.model.load import LoadedModel

# Logits that are worked on at once, 64 MiB of float32: 64 positions of a vocabulary of 256 K.
_CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True)
class EvalResult:
    """Quality of a model on a text. Fields about a reference are None where there was none.

    Perplexity is exp(mean over the scored tokens of -log p(token | the window so far)). KL is
    KL(reference || model) in nats over the full vocabulary, one value per scored position.

    Every `_error` is one standard error of a mean *over windows*: tokens of one window share a subject and are
    not independent, so an error over tokens would be too small. The error of a perplexity follows by the delta
    method, perplexity * error(mean negative log-likelihood). None with a single window.
    """

    model: str
    data: str
    seq_len: int
    windows: int
    tokens: int
    perplexity: float
    perplexity_error: float | None
    reference: str | None = None
    reference_perplexity: float | None = None
    reference_perplexity_error: float | None = None
    kl_mean: float | None = None
    kl_mean_error: float | None = None
    kl_median: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    top1_agreement: float | None = None
    top1_agreement_error: float | None = None

    def to_dict(self) -> dict:
        """The fields, ready for JSON."""
        return asdict(self)


def default_text() -> tuple[str, str]:
    """Name and content of the text that ships with tq (its licence: tq/data/README.md)."""
    return "eval.txt of tq", (files("tq") / "data" / "eval.txt").read_text(encoding="utf-8")


def read_text(path: Path) -> str:
    """The content of a UTF-8 text file.

    Raises:
        TQError: It cannot be read, is empty, or is not UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise TQError(f"cannot read {path}: {error.strerror}", hint="give the path of a text file") from error
    except UnicodeDecodeError as error:
        raise TQError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}",
            hint=f"convert it first, for example: iconv -f LATIN1 -t UTF-8 {path}",
        ) from error
    if not text.strip():
        raise TQError(f"{path} is empty", hint="give a file with a few thousand words of text")
    return text


def evaluate(
    loaded: LoadedModel,
    text: str,
    *,
    seq_len: int = 512,
    samples: int | None = None,
    reference: LoadedModel | None = None,
    batch_size: int = 1,
    kv_bits: KVBits | None = None,
    data: str = "text",
) -> Iterator[Progress | EvalResult]:
    """Measure a model on a text, window by window; the last event is the EvalResult.

    The text is cut into windows of `seq_len` tokens that do not overlap, each beginning with the
    beginning-of-sequence token where the tokenizer has one; the rest at the end is left out. All tokens of a
    window but its first are scored, so results with different `seq_len` cannot be compared.

    Args:
        samples: Number of windows, from the beginning of the text; None takes all.
        reference: A model with the same tokenizer, resident at the same time.
        batch_size: Windows in one forward pass; each model then holds batch_size * seq_len * vocabulary logits.
        kv_bits: Keep the model's keys and values packed, in so many bits; then batch_size is 1.
        data: The text's name in the result.

    Raises:
        UsageError: seq_len, samples or batch_size is out of range.
        TQError: The text is shorter than a window, the tokenizers differ, or a model's logits are not finite.
    """
    if seq_len < 2:
        raise UsageError(f"seq_len must be 2 or more, not {seq_len}")
    for model in (loaded, reference):
        context = context_length(model.config) if model else None
        if context is not None and seq_len > context:
            raise UsageError(f"seq_len must be from 2 to {context}, the model's context, not {seq_len}")
    if batch_size < 1:
        raise UsageError(f"batch_size must be 1 or more, not {batch_size}")
    windows = _windows(loaded.tokenizer, text, seq_len)
    if samples is not None:
        if not 1 <= samples <= len(windows):
            raise UsageError(
                f"samples must be from 1 to {len(windows)}, the number of windows of {seq_len} tokens "
                f"in this text, not {samples}"
            )
        windows = windows[:samples]
    if reference is not None:
        _check_same_tokenizer(loaded.tokenizer, reference.tokenizer, text)
    if kv_bits is not None and batch_size != 1:
        raise UsageError(f"batch_size must be 1 with packed keys and values, not {batch_size}")
    return _events(loaded, windows, reference, batch_size, kv_bits, data)


def _events(
    loaded: LoadedModel,
    windows: np.ndarray,
    reference: LoadedModel | None,
    batch_size: int,
    kv_bits: KVBits | None,
    data: str,
) -> Iterator[Progress | EvalResult]:
    scores: list[dict[str, np.ndarray]] = []
    yield Progress(0, len(windows), "windows", "evaluate")
    for start in range(0, len(windows), batch_size):
        batch = mx.array(windows[start : start + batch_size])
        inputs, targets = batch[:, :-1], batch[:, 1:]
        if kv_bits is None:
            logits = loaded.model(inputs)
        else:
            logits = loaded.model(inputs, cache=prompt_cache(loaded.model, kv_bits))
        reference_logits = None
        if reference is not None:
            reference_logits = reference.model(inputs)
            if logits.shape != reference_logits.shape:
                raise TQError(
                    f"the model has logits for {logits.shape[-1]} tokens and the reference for "
                    f"{reference_logits.shape[-1]}: KL needs the same number",
                    hint="take the checkpoint that the model was made from as reference",
                )
        scores.append(_score(logits, targets, reference_logits))
        for name, values in scores[-1].items():
            if not np.isfinite(values).all():
                culprit = reference if reference and name == "reference_nll" else loaded
                raise TQError(
                    f"{culprit.path} gives logits that are not finite, in windows {start + 1} to {start + len(batch)}",
                    hint="the weights may be damaged, or overflow in float16",
                )
        yield Progress(start + len(batch), len(windows), "windows", "evaluate")
    per_token = {name: np.concatenate([s[name] for s in scores]).astype(np.float64) for name in scores[0]}
    yield _result(loaded, reference, data, windows.shape, per_token)


def _score(logits: mx.array, targets: mx.array, reference_logits: mx.array | None) -> dict[str, np.ndarray]:
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


def _result(
    loaded: LoadedModel,
    reference: LoadedModel | None,
    data: str,
    shape: tuple[int, ...],
    per_token: dict[str, np.ndarray],
) -> EvalResult:
    nll = per_token["nll"]
    fields: dict = {}
    if reference is not None:
        kl, same = per_token["kl"], per_token["same_top1"]
        reference_perplexity, reference_error = _perplexity(per_token["reference_nll"])
        fields = {
            "reference": str(reference.path),
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
    perplexity, perplexity_error = _perplexity(nll)
    return EvalResult(
        model=str(loaded.path),
        data=data,
        seq_len=shape[1],
        windows=shape[0],
        tokens=nll.size,
        perplexity=perplexity,
        perplexity_error=perplexity_error,
        **fields,
    )


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


def _token_ids(tokenizer, text: str) -> list[int]:
    # verbose=False: no warning that a text is longer than the context; it is cut into windows.
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def _windows(tokenizer, text: str, seq_len: int) -> np.ndarray:
    """The text as windows of token ids, (windows, seq_len)."""
    bos = bos_tokens(tokenizer)
    ids = _token_ids(tokenizer, text)
    body = seq_len - len(bos)
    count = len(ids) // body
    if count == 0:
        raise TQError(
            f"the text has {len(ids)} tokens and one window of {seq_len} needs {body}",
            hint="give a longer text or a smaller window",
        )
    rows = np.array(ids[: count * body], dtype=np.int32).reshape(count, body)
    return np.concatenate([np.tile(np.array(bos, dtype=np.int32), (count, 1)), rows], axis=1)


def _check_same_tokenizer(tokenizer, reference_tokenizer, text: str) -> None:
    sizes = len(tokenizer), len(reference_tokenizer)
    if sizes[0] != sizes[1]:
        problem = f"{sizes[0]} and {sizes[1]} tokens"
    elif bos_tokens(tokenizer) != bos_tokens(reference_tokenizer):
        problem = "different beginning-of-sequence tokens"
    elif _token_ids(tokenizer, text) != _token_ids(reference_tokenizer, text):
        problem = "different tokens for this text"
    else:
        return
    raise TQError(
        f"the tokenizers of model and reference differ ({problem}), so predictions cannot be compared",
        hint="take the checkpoint that the model was made from as reference",
    )
