"""The text of a calibration, as windows of tokens."""

import hashlib
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from tq.engine.model.load import source_tokenizer
from tq.engine.model.sources import Source
from tq.engine.run.evaluate import cut_windows, read_text
from tq.engine.run.generate import context_length
from tq.errors import UsageError

TOKENS = 16384
SEQ_LEN = 512
SHIPPED = "calibration.txt of tq"


@dataclass(frozen=True)
class Sample:
    """What a calibration reads, for its records.

    Attributes:
        text: Its name.
        sha256: Of the text.
        tokens: How many are read.
        seq_len: In windows of how many.
    """

    text: str
    sha256: str
    tokens: int
    seq_len: int

    def to_json(self) -> dict:
        return asdict(self)


def sample_windows(
    source: Source,
    path: Path | None = None,
    *,
    tokens: int | None = None,
    seq_len: int | None = None,
    trust_remote_code: bool = False,
) -> tuple[np.ndarray, Sample]:
    """Windows of a text, int32 (windows, seq_len), spread evenly over it.

    Args:
        source: The model, whose tokenizer is used.
        path: The text; the one that ships with tq if None.
        tokens: How many at most, 16384 if None: what fills whole windows.
        seq_len: Tokens of a window; by default 512, or the model's context where that is less.
        trust_remote_code: Allow the tokenizer's own code.

    Raises:
        UsageError: ``tokens`` or ``seq_len`` is out of range.
        TQError: The text cannot be read, or is shorter than one window.
    """
    context = context_length(source.config)
    if seq_len is None:
        seq_len = min(SEQ_LEN, context or SEQ_LEN)
    if seq_len < 2 or (context is not None and seq_len > context):
        raise UsageError(f"seq_len must be from 2 to {context or 'the context of the model'}, not {seq_len}")
    tokens = max(TOKENS, seq_len) if tokens is None else tokens
    if tokens < seq_len:
        raise UsageError(f"{tokens} tokens are less than one window of {seq_len}")
    name, text = (str(path), read_text(path)) if path else (SHIPPED, shipped_text())
    windows = cut_windows(source_tokenizer(source, trust_remote_code), text, seq_len)
    count = min(tokens // seq_len, len(windows))
    chosen = windows[np.linspace(0, len(windows) - 1, count).round().astype(int)]
    return chosen, Sample(name, hashlib.sha256(text.encode()).hexdigest(), chosen.size, seq_len)


def shipped_text() -> str:
    """The text that ships with tq (its licence: tq/data/README.md)."""
    return (files("tq") / "data" / "calibration.txt").read_text(encoding="utf-8")
