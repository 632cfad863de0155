"""A GGUF file (llama.cpp's format) as a Hugging Face checkpoint: config, tensors by name, tokenizer.

The header is read by `gguf_header`, names and settings are translated by `gguf_families`, the tokenizer is rebuilt by
`gguf_tokenizer`; here the data are dequantized and llama.cpp's conventions undone. The file is memory-mapped.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tq.engine.model.gguf_families import Settings, build_config, family_of, tensor_name
from tq.engine.model.gguf_header import TensorEntry, read_header
from tq.engine.model.gguf_tokenizer import special_ids, write_tokenizer
from tq.errors import TQError

_CHUNK_ELEMENTS = 1 << 18  # dequantized at a time: small enough to stay in the processor's cache


@dataclass(frozen=True, eq=False)
class GGUFTensor:
    """One tensor, still in the file.

    Args:
        name: Hugging Face's name.
        shape: Dense shape in Hugging Face's order, (out, in) or (experts, out, in) for matrices.
        quantization: "F32", "F16", "BF16", "Q4_K", ...
        size_bytes: As stored.
    """

    name: str
    shape: tuple[int, ...]
    quantization: str
    size_bytes: int
    _stored: np.ndarray = field(repr=False)
    _undo: Callable[[np.ndarray], np.ndarray] | None = field(repr=False)

    def read(self) -> np.ndarray:
        """The dense values, `shape`, in Hugging Face's convention: float16 for F16, otherwise float32."""
        values = _dense(self._stored, self.quantization).reshape(self.shape)
        return values if self._undo is None else self._undo(values)


class GGUFFile:
    """A GGUF file, opened and checked as a whole: every tensor lies inside the file and can be dequantized.

    Attributes:
        name: general.name, or the file's name.
        base_model: The Hub id ("org/model") that the file names as its origin, or None.
        metadata: Every key of the file, as plain Python values.
        config: What config.json would hold.
        tensors: By Hugging Face name, in the order of the file.

    Raises:
        TQError: It is no GGUF file, is damaged or truncated, or has a family, tokenizer or type that tq cannot read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            # An empty file cannot be mapped, and is no GGUF file either.
            self._data = np.memmap(self.path, np.uint8, "r") if self.path.stat().st_size else np.empty(0, np.uint8)
        except OSError as error:
            raise TQError(f"{path} cannot be read: {error.strerror}") from error
        filename = self.path.name
        self.metadata, entries = read_header(self._data.data, filename)
        if self.metadata.get("split.count", 1) not in (0, 1):  # 0 after a merge
            raise TQError(
                f"{filename} is one part of several; tq reads whole GGUF files",
                "merge the parts: llama-gguf-split --merge FIRST_PART OUT.gguf",
            )
        _check_types(entries, filename)
        settings = Settings(self.metadata, filename)
        self._family = family_of(settings)
        self.tensors: dict[str, GGUFTensor] = {}
        rope_factors = None
        for entry in entries:
            name = tensor_name(self._family, entry.name)
            if name is None:
                rope_factors = _dense(self._bytes(entry), entry.quantization).reshape(-1)
            else:
                self.tensors[name] = self._tensor(name, entry, settings)
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        self.config = build_config(self._family, settings, shapes, rope_factors, self._dtype())
        self.config |= {f"{key}_token_id": value for key, value in special_ids(self.metadata, filename).items()}
        self.name = str(self.metadata.get("general.name") or filename)
        self.base_model = _hub_id(self.metadata)

    def write_tokenizer(self, folder: Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json (with the chat template) and generation_config.json.

        Raises:
            TQError: The file has no tokenizer, or one that tq cannot rebuild.
        """
        write_tokenizer(self.metadata, Path(folder), self.path.name, self.config["max_position_embeddings"])

    def _bytes(self, entry: TensorEntry) -> np.ndarray:
        return self._data[entry.offset : entry.offset + entry.size_bytes]

    def _tensor(self, name: str, entry: TensorEntry, settings: Settings) -> GGUFTensor:
        shape = entry.shape
        undo: Callable[[np.ndarray], np.ndarray] | None = None
        if name.endswith("shared_expert_gate.weight") and len(shape) == 1:
            shape = (1, *shape)  # a matrix with one row loses that dimension in the conversion
        if self._family.permuted and (match := re.search(r"\.self_attn\.([qk])_proj\.", name)):
            key = "attention.head_count" if match[1] == "q" else "attention.head_count_kv"
            n_heads = settings.count(key, settings.count("attention.head_count"))
            if shape[0] % (2 * n_heads):
                raise TQError(f"{self.path.name}: {entry.name} has {shape[0]} rows, which {n_heads} heads do not fit")
            undo = _Unpermute(n_heads)
        elif self._family.norm_offset and name.endswith("norm.weight"):
            undo = _Subtract(self._family.norm_offset)
        return GGUFTensor(name, shape, entry.quantization, entry.size_bytes, self._bytes(entry), undo)

    def _dtype(self) -> str:
        """What the matrices are stored in; bfloat16 for quantized ones, as nearly all models were trained in it."""
        stored = {tensor.quantization for tensor in self.tensors.values() if len(tensor.shape) > 1} - {"F32"}
        if not stored:
            return "float32"
        return "float16" if stored == {"F16"} else "bfloat16"


@dataclass(frozen=True)
class _Unpermute:
    """Undoes llama.cpp's order of the rows of q and k.

    A head's rows are two halves (n_heads, 2, head_dim / 2, in) that rotate together, row i of one with row i of the
    other. The converter swaps axes 1 and 2 so that such pairs become neighbours; k has its own number of heads.
    """

    n_heads: int

    def __call__(self, values: np.ndarray) -> np.ndarray:
        halves = values.reshape(self.n_heads, -1, 2, *values.shape[1:]).swapaxes(1, 2)
        return np.ascontiguousarray(halves).reshape(values.shape)


@dataclass(frozen=True)
class _Subtract:
    """Undoes the offset of Gemma's norms: llama.cpp multiplies with the stored weight w + 1, Gemma with 1 + w."""

    offset: float

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return values.astype(np.float32) - np.float32(self.offset)


def _dense(stored: np.ndarray, quantization: str) -> np.ndarray:
    """Values of the stored bytes, flat: float16 for F16, otherwise float32; a copy, made in small pieces."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    if quantization in ("F32", "F16"):
        return stored.view("<f4" if quantization == "F32" else "<f2").copy()
    kind = GGMLQuantizationType[quantization]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    n_blocks = len(stored) // block_bytes
    values = np.empty(n_blocks * block, np.float32)
    step = max(1, _CHUNK_ELEMENTS // block)
    # Random or damaged scales may be infinite; that is the caller's to see, not NumPy's to warn of.
    with np.errstate(all="ignore"):
        for i in range(0, n_blocks, step):
            # Flat, because the package works on 16 rows at a time.
            chunk = np.asarray(stored[i * block_bytes : (i + step) * block_bytes])
            values[i * block : (i + step) * block] = dequantize(chunk, kind)
    return values


def _check_types(entries: list[TensorEntry], filename: str) -> None:
    """Refuses types that the `gguf` package cannot dequantize before any work is done."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    for quantization in dict.fromkeys(entry.quantization for entry in entries):
        try:
            _dense(np.zeros(GGML_QUANT_SIZES[GGMLQuantizationType[quantization]][1], np.uint8), quantization)
        except NotImplementedError:
            raise TQError(
                f"{filename} has tensors of type {quantization}, which the `gguf` package cannot dequantize"
            ) from None


def _hub_id(metadata: dict[str, Any]) -> str | None:
    """The first of the file's notes on its origin that is a Hub id, with or without the Hub's address."""
    keys = ("general.base_model.0.repo_url", "general.source.huggingface.repository", "general.source.repo_url")
    for key in (*keys, "general.repo_url", "general.name"):
        text = str(metadata.get(key, ""))
        match = re.fullmatch(r"(?:https?://(?:www\.)?huggingface\.co/)?([\w.-]+/[\w.-]+?)/?", text)
        if match:
            return match[1]
    return None
