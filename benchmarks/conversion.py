"""Speed and memory of a conversion: a random model of several GB through the real command, and what its encoder takes.

python benchmarks/conversion.py --gb 4
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
from common import write

from tq.engine.model.safetensors import ShardWriter, plan_shards

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, KV_HEADS = 2048, 8192, 32768, 16, 4


def config(layers: int) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    kv = HIDDEN * KV_HEADS // HEADS
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        block = f"model.layers.{i}"
        found |= {
            f"{block}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{block}.self_attn.k_proj.weight": (kv, HIDDEN),
            f"{block}.self_attn.v_proj.weight": (kv, HIDDEN),
            f"{block}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{block}.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{block}.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{block}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
            f"{block}.input_layernorm.weight": (HIDDEN,),
            f"{block}.post_attention_layernorm.weight": (HIDDEN,),
        }
    return found | {"model.norm.weight": (HIDDEN,)}


def write_random_model(folder: Path, layers: int) -> int:
    """A random bfloat16 Llama in shards of at most 2 GB. Returns its bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config(layers)))
    shards, index = plan_shards([(name, "BF16", shape) for name, shape in shapes(layers).items()], 2_000_000_000)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for shard in shards:
        with ShardWriter(folder / shard.name, shard.tensors) as writer:
            for name, _, shape in shard.tensors:
                writer.append(name, (mx.random.normal(shape) * 0.02).astype(mx.bfloat16))
    return index["metadata"]["total_size"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=4)
    parser.add_argument("--bits", default="4")
    parser.add_argument("--folder", type=Path, help="where to work; by default the system's temporary folder")
    options = parser.parse_args()
    per_layer = 2 * sum(n * m for n, m in (s for name, s in shapes(1).items() if ".0." in name and len(s) == 2))
    layers = max(1, round((options.gb * 1e9 - 2 * VOCABULARY * HIDDEN) / per_layer))
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        source_bytes = write_random_model(folder / "source", layers)
        command = [sys.executable, "-m", "tq", "convert", "-m", str(folder / "source"), "-o", str(folder / "out")]
        started = time.perf_counter()
        done = subprocess.run([*command, "--bits", options.bits, "--json"], stdout=subprocess.PIPE, check=True)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    report = json.loads(done.stdout)
    weights = source_bytes // 2
    write(
        "conversion",
        {
            "model": f"random bfloat16 Llama, {layers} layers, {weights:,} weights",
            "source_bytes": source_bytes,
            "bits": options.bits,
            "seconds": round(seconds, 1),
            "weights_per_second": round(weights / seconds),
            "encoder_share": round(report["encode_seconds"] / seconds, 3),
            "peak_rss_bytes": peak,  # beside the plan's own estimate, peak_memory_bytes
            **{key: report[key] for key in ("size_bytes", "bits_per_weight", "peak_memory_bytes")},
        },
    )
    print(f"{weights / seconds / 1e6:.1f} million weights/s, encoder {report['encode_seconds'] / seconds:.0%}, "
          f"peak RSS {peak / 1e9:.2f} GB")  # fmt: skip


if __name__ == "__main__":
    main()
