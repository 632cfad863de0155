"""Random models of 1 and 2 billion weights on the CPU: tq beside llama.cpp's wheel, speed and memory.

    python benchmarks/cpu_models.py --folder /where/6/GB/are/free

A llama of the shape of Llama-3.2-1B and a qwen3_moe with 64 experts, 8 of them active, with smaller vocabularies. Both
engines get the same shapes and as many bits; the weights are random, and so is the text. What `tq convert` reads is
deleted when it has been read.
"""

import argparse
import json
import shutil
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np
from common import write
from cpu_engines import (
    HERE,
    Engine,
    Series,
    bare_rate,
    baselines_python,
    converted,
    in_turn,
    once,
    other_load,
    prefill_rate,
    ratios,
    running,
    stream_rate,
    work_folder,
)

from tq.engine.model.safetensors import ShardWriter, plan_shards

COMMON = {
    "vocab_size": 32768,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    "bos_token_id": 256,
    "eos_token_id": 257,
}
CONFIGS = {
    "llama-1b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        **COMMON,
    },
    "qwen3-moe-2b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 1024,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 2048,
        "moe_intermediate_size": 512,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        **COMMON,
    },
}
# Type of the layers and of the embedding, which is the head too and has 6 bits in tq.
LLAMA_TYPES = {
    "llama-1b": {4: (("Q4_0", "Q6_K"), ("Q4_K", "Q6_K")), 3: (("Q3_K", "Q6_K"),), 2: (("Q2_K", "Q6_K"),)},
    "qwen3-moe-2b": {4: (("Q4_0", "Q6_K"), ("Q4_K", "Q6_K"))},
}
SAMPLING = {"temp": 1.0, "top_p": 1.0, "top_k": 0}  # random logits: always another token
PROMPT, PREFILL, CONTEXT = 64, 512, 2048
RANDOM_ROWS = 64  # random rows that are repeated to fill a matrix
TARGETS = {"ratio": 1.2, "beside_bytes": 200_000_000}  # beside: what is neither packed weights nor KV


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Of all tensors, by their names in a checkpoint."""
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    q, kv = (config[f"num_{kind}_heads"] * head_dim for kind in ("attention", "key_value"))
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        layer |= {"self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden)}
        layer |= {"self_attn.o_proj": (hidden, q)}
        inner, prefixes = config["intermediate_size"], ["mlp"]
        if config["model_type"] == "qwen3_moe":
            layer |= {"self_attn.q_norm": (head_dim,), "self_attn.k_norm": (head_dim,)}
            layer |= {"mlp.gate": (config["num_experts"], hidden)}
            inner = config["moe_intermediate_size"]
            prefixes = [f"mlp.experts.{j}" for j in range(config["num_experts"])]
        for prefix in prefixes:
            layer |= {f"{prefix}.{name}_proj": (inner, hidden) for name in ("gate", "up")}
            layer |= {f"{prefix}.down_proj": (hidden, inner)}
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return found | {"model.norm.weight": (hidden,)}


def random_tensor(name: str, shape: tuple[int, ...]) -> mx.array:
    if len(shape) == 1:
        return mx.ones(shape, mx.bfloat16)
    rows = shape[0] if "embed" in name else RANDOM_ROWS  # every token is another one
    return mx.tile((mx.random.normal((rows, shape[1])) * 0.02).astype(mx.bfloat16), (shape[0] // rows, 1))


def write_checkpoint(folder: Path, config: dict) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, config)
    shards, index = plan_shards([(name, "BF16", shape) for name, shape in shapes(config).items()], 1_000_000_000)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for shard in shards:
        with ShardWriter(folder / shard.name, shard.tensors) as writer:
            for name, _, shape in shard.tensors:
                writer.append(name, random_tensor(name, shape))


def write_tokenizer(folder: Path, config: dict) -> None:
    """Bytes, two special tokens, one merge, and words without a meaning to fill the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>", "th"]
    tokens += [f"w{n:05d}" for n in range(len(tokens), config["vocab_size"])]
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


class Models:
    """Folders for tq and files for llama.cpp of one shape."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder, self.config = name, folder, CONFIGS[name]
        self.python = baselines_python(folder)
        self.packed = self.convert()

    def convert(self) -> dict[int, Path]:
        source = self.folder / self.name
        wanted = {bits: self.folder / f"{self.name}-tq{bits}" for bits in LLAMA_TYPES[self.name]}
        if not all(path.exists() for path in wanted.values()):
            write_checkpoint(source, self.config)
            wanted = {bits: converted(source, self.folder, str(bits)) for bits in wanted}
            shutil.rmtree(source)
        return wanted

    def tq(self, bits: int) -> Engine:
        return Engine.tq(f"tq {bits} bits", self.packed[bits])

    def llama(self, layers: str, head: str) -> Engine:
        def make(out: Path) -> None:
            tokenizer = next(iter(self.packed.values())) / "tokenizer.json"
            order = {"random": self.config, "tokenizer": str(tokenizer), "out": str(out), "type": layers, "head": head}
            subprocess.run([self.python, HERE / "cpu_gguf.py", json.dumps(order)], check=True)

        path = once(self.folder / f"{self.name}-{layers}-{head}.gguf", make)
        return Engine.llama(f"llama.cpp {layers}, head {head}", self.python, path, CONTEXT)

    def ids(self, count: int, seed: int) -> list[int]:
        return np.random.default_rng(seed).integers(258, self.config["vocab_size"], count).tolist()


def speed(models: Models, bits: int, rounds: int, tokens: int) -> dict:
    prompt, long, feed = models.ids(PROMPT, 0), models.ids(PREFILL, 1), models.ids(tokens, 2)
    made = [models.tq(bits), *(models.llama(*types) for types in LLAMA_TYPES[models.name][bits])]
    with running(*made) as engines:
        loops = {
            "stream, sampled": lambda engine: stream_rate(engine, prompt, tokens, SAMPLING),
            "bare": lambda engine: bare_rate(engine, prompt, feed),
            f"prefill of {PREFILL}": lambda engine: prefill_rate(engine, long),
        }
        found: dict = {"size_bytes": {engine.label: engine.ask("describe")["size_bytes"] for engine in engines}}
        for name, rate in loops.items():
            rates = in_turn({engine.label: Series(rate(engine)) for engine in engines}, rounds)
            found[name] = {"tokens_per_second": rates, **ratios(rates, made[0].label, [e.label for e in made[1:]])}
        return found


def memory(models: Models, bits: int, tokens: int) -> dict:
    """Of a process that loads the model, reads a prompt of 512 tokens and writes an answer."""
    prompt = models.ids(PREFILL, 1)
    with running(models.tq(bits)) as (engine,):
        engine.ask("stream", prompt=prompt, tokens=tokens, **SAMPLING)
        found = engine.ask("describe")
    with running(models.tq(bits)) as (engine,):
        kv_bytes = engine.ask("bare", prompt=prompt, feed=models.ids(tokens, 2))["kv_bytes"]
    beside = found["peak_rss_bytes"] - found["size_bytes"] - kv_bytes
    keys = ("peak_rss_bytes", "size_bytes")
    return {**{key: found[key] for key in keys}, "kv_bytes": kv_bytes, "beside_bytes": beside}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where models are kept; by default in tq's cache")
    parser.add_argument("--quick", action="store_true", help="one round each, to see that it works; nothing is written")
    parser.add_argument("--rounds", type=int, default=7, help="how often each number is measured")
    options = parser.parse_args()
    rounds, tokens = (1, 8) if options.quick else (options.rounds, 64)
    folder = work_folder(options.folder)
    load, found = [other_load()], {}
    for name, by_bits in LLAMA_TYPES.items():
        models = Models(name, folder)
        weights = sum(int(np.prod(shape)) for shape in shapes(models.config).values())
        found[name] = {"weights": weights, "config": models.config}
        for bits in by_bits:
            measured = {"memory": memory(models, bits, tokens), **speed(models, bits, rounds, tokens)}
            found[name][f"{bits} bits"] = measured
            load.append(other_load())
    if options.quick:
        print(json.dumps(found, indent=1))
        return
    write("cpu_models", {"targets": TARGETS, "other_load_percent": load, **found})


if __name__ == "__main__":
    main()
