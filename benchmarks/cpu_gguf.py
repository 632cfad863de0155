"""GGUF files for the baselines, by llama.cpp's own quantizer: run by the baselines' Python, which has it.

All matrices of the layers get one type and the embedding, which may be the head too, another: what llama-quantize calls
"pure", and the fastest that llama.cpp is at a size. Where rows are no multiple of a type's block, the type is that
which llama-quantize takes.

python cpu_gguf.py '{"source": "FILE.gguf", "out": "OUT.gguf", "type": "Q3_K", "head": "Q8_0"}'
python cpu_gguf.py '{"random": CONFIG_JSON, "tokenizer": "tokenizer.json", "out": ..., "type": ..., "head": ...}'
"""

import ctypes
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xllamacpp
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
RANDOM_ROWS = 64  # random rows that are repeated to fill a matrix
Tensor = tuple[str, tuple[int, ...]]  # name and shape


class Quantizer:
    """ggml_quantize_chunk."""

    def __init__(self):
        self.lib = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
        self.lib.ggml_quantize_chunk.restype = ctypes.c_size_t
        self.lib.ggml_quantize_chunk.argtypes = [
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *(ctypes.c_int64,) * 3, ctypes.c_void_p,
        ]  # fmt: skip
        self.lib.ggml_row_size.restype = ctypes.c_size_t
        self.lib.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
        self.lib.ggml_blck_size.restype = ctypes.c_int64

    def type_for(self, name: str, columns: int) -> Type:
        return Type[FALLBACK[name] if columns % self.lib.ggml_blck_size(Type[name].value) else name]

    def row_bytes(self, kind: Type, columns: int) -> int:
        return self.lib.ggml_row_size(kind.value, columns)

    def quantize(self, rows: np.ndarray, kind: Type) -> np.ndarray:
        """float32 (rows, columns) to bytes (rows, bytes)."""
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        out = np.empty((len(rows), self.row_bytes(kind, rows.shape[1])), np.uint8)
        written = self.lib.ggml_quantize_chunk(kind.value, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, None)
        if written != out.nbytes:
            raise RuntimeError(f"{kind.name}: {written} bytes for {out.nbytes}")
        return out


def write(
    writer: GGUFWriter, tensors: list[tuple[Tensor, Type]], data: Iterator[np.ndarray], quantizer: Quantizer
) -> None:
    """Header, then tensor after tensor, as ``data`` makes them."""
    for (name, shape), kind in tensors:
        size = quantizer.row_bytes(kind, shape[-1]) * int(np.prod(shape[:-1]))
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for array in data:
        writer.write_tensor_data(array)
    writer.close()


def requantize(source: Path, out: Path, layers: str, head: str) -> None:
    quantizer = Quantizer()
    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(out, architecture)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            sub_type = field.types[1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    tensors = []
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        wanted = head if tensor.name in ("token_embd.weight", "output.weight") else layers
        kind = quantizer.type_for(wanted, shape[-1]) if len(shape) > 1 else Type.F32
        tensors.append(((tensor.name, shape), kind))

    def data() -> Iterator[np.ndarray]:
        for tensor, ((_, shape), kind) in zip(reader.tensors, tensors, strict=True):
            values = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
            yield values.astype(np.float32) if kind == Type.F32 else quantizer.quantize(values, kind)

    write(writer, tensors, data(), quantizer)


def shapes(config: dict) -> list[Tensor]:
    """Of a llama or a qwen3_moe with tied embeddings, by GGUF's names."""
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    q, kv = (config[f"num_{kind}_heads"] * head_dim for kind in ("attention", "key_value"))
    found: list[Tensor] = [("token_embd.weight", (config["vocab_size"], hidden)), ("output_norm.weight", (hidden,))]
    for i in range(config["num_hidden_layers"]):
        found += [(f"blk.{i}.{name}.weight", shape) for name, shape in (
            ("attn_norm", (hidden,)), ("attn_q", (q, hidden)), ("attn_k", (kv, hidden)), ("attn_v", (kv, hidden)),
            ("attn_output", (hidden, q)), ("ffn_norm", (hidden,)),
        )]  # fmt: skip
        if config["model_type"] == "llama":
            inner, lead, end = config["intermediate_size"], (), ""
        else:
            inner, lead, end = config["moe_intermediate_size"], (config["num_experts"],), "_exps"
            found += [(f"blk.{i}.{name}.weight", (head_dim,)) for name in ("attn_q_norm", "attn_k_norm")]
            found.append((f"blk.{i}.ffn_gate_inp.weight", (config["num_experts"], hidden)))
        found += [(f"blk.{i}.ffn_{name}{end}.weight", (*lead, inner, hidden)) for name in ("gate", "up")]
        found.append((f"blk.{i}.ffn_down{end}.weight", (*lead, hidden, inner)))
    return found


def random(config: dict, tokenizer: Path, out: Path, layers: str, head: str) -> None:
    quantizer = Quantizer()
    dense = config["model_type"] == "llama"
    writer = GGUFWriter(out, "llama" if dense else "qwen3moe")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    if dense:
        writer.add_rope_dimension_count(config["head_dim"])
    else:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    made = json.loads(tokenizer.read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(made["vocab"], key=made["vocab"].get))
    writer.add_token_types([1] * len(made["vocab"]))
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in made["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    tensors = []
    for name, shape in shapes(config):
        if len(shape) == 1 or "_inp." in name:  # llama.cpp keeps norms and routers
            kind = Type.F32
        else:
            kind = quantizer.type_for(head if name == "token_embd.weight" else layers, shape[-1])
        tensors.append(((name, shape), kind))

    def data() -> Iterator[np.ndarray]:
        generator = np.random.default_rng(0)
        for (_, shape), kind in tensors:
            if len(shape) == 1:
                yield np.ones(shape, np.float32)
            elif kind == Type.F32:
                yield generator.normal(0, 0.02, shape).astype(np.float32)
            else:
                few = quantizer.quantize(generator.normal(0, 0.02, (RANDOM_ROWS, shape[-1])), kind)
                count = int(np.prod(shape[:-1]))
                yield np.resize(few, (count, few.shape[1])).reshape(*shape[:-1], few.shape[1])

    write(writer, tensors, data(), quantizer)


def main() -> None:
    order = json.loads(sys.argv[1])
    out, layers, head = Path(order["out"]), order["type"], order["head"]
    if "random" in order:
        random(order["random"], Path(order["tokenizer"]), out, layers, head)
    else:
        requantize(Path(order["source"]), out, layers, head)


if __name__ == "__main__":
    main()
