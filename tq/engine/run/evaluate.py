"""How good a model is on a text: perplexity, and KL divergence from a reference model. Keeps nothing on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tq.engine.cache.settings import BLOCK, KVSettings
from tq.engine.events import Progress
from tq.engine.run import scores
from tq.engine.run.generate import bos_tokens, context_length, prompt_cache
from tq.errors import TQError, UsageError

if TYPE_CHECKING:
    from tq.engine.model.load import LoadedModel


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
    kv: KVSettings | None = None,
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
        kv: Keep the model's keys and values packed like this. A window then goes through the model in steps of 64
            tokens, so that later tokens read packed ones as they do when text is generated.
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
    windows = cut_windows(loaded.tokenizer, text, seq_len)
    if samples is not None:
        if not 1 <= samples <= len(windows):
            raise UsageError(
                f"samples must be from 1 to {len(windows)}, the number of windows of {seq_len} tokens "
                f"in this text, not {samples}"
            )
        windows = windows[:samples]
    if reference is not None:
        _check_same_tokenizer(loaded.tokenizer, reference.tokenizer, text)
    return _events(loaded, windows, reference, batch_size, kv, data)


def _events(
    loaded: LoadedModel,
    windows: np.ndarray,
    reference: LoadedModel | None,
    batch_size: int,
    kv: KVSettings | None,
    data: str,
) -> Iterator[Progress | EvalResult]:
    found: list[dict[str, np.ndarray]] = []
    yield Progress(0, len(windows), "windows", "evaluate")
    for start in range(0, len(windows), batch_size):
        batch = mx.array(windows[start : start + batch_size])
        inputs, targets = batch[:, :-1], batch[:, 1:]
        logits = loaded.model(inputs) if kv is None else _packed_logits(loaded.model, inputs, kv)
        reference_logits = None
        if reference is not None:
            reference_logits = reference.model(inputs)
            if logits.shape != reference_logits.shape:
                raise TQError(
                    f"the model has logits for {logits.shape[-1]} tokens and the reference for "
                    f"{reference_logits.shape[-1]}: KL needs the same number",
                    hint="take the checkpoint that the model was made from as reference",
                )
        found.append(scores.score(logits, targets, reference_logits))
        for name, values in found[-1].items():
            if not np.isfinite(values).all():
                culprit = reference if reference and name == "reference_nll" else loaded
                raise TQError(
                    f"{culprit.path} gives logits that are not finite, in windows {start + 1} to {start + len(batch)}",
                    hint="the weights may be damaged, or overflow in float16",
                )
        yield Progress(start + len(batch), len(windows), "windows", "evaluate")
    per_token = {name: np.concatenate([f[name] for f in found]).astype(np.float64) for name in found[0]}
    yield _result(loaded, reference, data, windows.shape, per_token)


def _packed_logits(model: nn.Module, inputs: mx.array, kv: KVSettings) -> mx.array:
    """What the model predicts with packed keys and values, (B, L, vocab)."""
    caches, logits = prompt_cache(model, kv), []
    for start in range(0, inputs.shape[1], BLOCK):
        logits.append(model(inputs[:, start : start + BLOCK], cache=caches))
        mx.eval(logits[-1], [cache.state for cache in caches])
    return mx.concatenate(logits, axis=1)


def _result(
    loaded: LoadedModel,
    reference: LoadedModel | None,
    data: str,
    shape: tuple[int, ...],
    per_token: dict[str, np.ndarray],
) -> EvalResult:
    return EvalResult(
        model=str(loaded.path),
        data=data,
        seq_len=shape[1],
        windows=shape[0],
        tokens=per_token["nll"].size,
        reference=None if reference is None else str(reference.path),
        **scores.summary(per_token),
    )


def _token_ids(tokenizer, text: str) -> list[int]:
    # verbose=False: no warning that a text is longer than the context; it is cut into windows.
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def cut_windows(tokenizer, text: str, seq_len: int) -> np.ndarray:
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
