"""One new token attending to a long context on the CPU: packed keys and values beside floating-point ones.

    python benchmarks/cpu_attention.py

All layers of a model take turns, each with a cache of its own, as when a token is generated; queries are random. The
packed caches are encoded from random keys and values by the kernels themselves, and their results are compared with
attention to the same cache decoded to float32.
"""

import argparse
import ctypes
import json
import statistics
import time
from ctypes import byref, c_int32, c_int64
from dataclasses import dataclass

import numpy as np
from common import write

from tq.cpu import library
from tq.cpu.library import Array, AttendParams, Segment
from tq.engine.cache import native
from tq.engine.cache.settings import KVSettings

MODELS = {  # layers, query heads, key-value heads, head dimension
    "SmolLM2-135M": (30, 9, 3, 64),
    "Llama-3.2-1B": (16, 32, 8, 64),
    "Qwen3-4B": (36, 32, 8, 128),
}
CONTEXTS = (2048, 8192)
CACHES: dict[str, tuple[int, int] | type] = {
    "float32": np.float32,
    "float16": np.float16,
    "K8/V4": (8, 4),
    "K8/V3": (8, 3),
    "K4/V4": (4, 4),
}
TARGET = 1.5  # packed against float16
LARGEST_ERROR = 0.02  # of 8-bit queries and weights
BLOCK_TOKENS = 64
F32, F16, U8 = 0, 1, 4  # tq_dtype
DTYPES = {np.dtype(np.float32): F32, np.dtype(np.float16): F16, np.dtype(np.uint8): U8}
FLOAT32, PACKED = 0, 2  # tq_kv_format


def arrays(*values: np.ndarray) -> ctypes.Array:
    made = (Array * len(values))()
    for entry, a in zip(made, values, strict=True):
        entry.data, entry.ndim, entry.dtype = a.ctypes.data, a.ndim, DTYPES[a.dtype]
        entry.shape = (c_int32 * a.ndim)(*a.shape)
        entry.strides = (c_int64 * a.ndim)(*(stride // a.itemsize for stride in a.strides))
    return made


@dataclass
class Layer:
    """A cache, a query and the parameters of its attention."""

    params: AttendParams
    inputs: list[np.ndarray]
    out: np.ndarray
    kept: native.Code | None

    def __post_init__(self):
        self.arguments = byref(self.params), arrays(*self.inputs), arrays(self.out)

    def run(self, kernels: ctypes.CDLL) -> None:
        kernels.tq_attend(*self.arguments)


def float_layer(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> Layer:
    """keys and values: (1, kv heads, tokens, dim)."""
    _, heads, _, dim = query.shape
    params = AttendParams(
        n_heads=heads,
        n_kv_heads=keys.shape[1],
        head_dim=dim,
        value_dim=dim,
        scale=dim**-0.5,
        position=keys.shape[2] - 1,
    )
    return Layer(params, [query, keys, values], np.empty_like(query), None)


def packed_layer(
    kernels: ctypes.CDLL, query: np.ndarray, keys: np.ndarray, values: np.ndarray, code: native.Code
) -> Layer:
    """The same with keys and values, which are float32, encoded."""
    _, kv_heads, tokens, dim = keys.shape
    layer = float_layer(query, keys, values)
    params = layer.params
    params.code, params.n_segments, params.position = code.structure, 2, 0
    params.segments[0] = Segment(format=PACKED, capacity=tokens, count=tokens)
    # An append wants somewhere for tokens that do not fill a block.
    params.segments[1] = Segment(format=FLOAT32, capacity=BLOCK_TOKENS, position=tokens)
    cache = []
    for side in code.sides:
        cache.append(np.zeros((1, kv_heads, tokens // BLOCK_TOKENS, side.block_bytes), np.uint8))
        cache.append(np.zeros((1, kv_heads, tokens * side.planes), np.float16))
    recent = [np.zeros((1, kv_heads, BLOCK_TOKENS, dim), np.float32) for _ in range(2)]
    kernels.tq_kv_append(byref(params), arrays(keys, values), arrays(*cache, *recent))
    params.position, params.n_segments = tokens - 1, 1
    return Layer(params, [query, *cache], layer.out, code)


def error_of(kernels: ctypes.CDLL, layer: Layer) -> float:
    """RMS error relative to float32 attention to the decoded cache."""
    params = layer.params
    decoded = [np.empty((1, params.n_kv_heads, params.segments[0].count, params.head_dim), np.float32) for _ in "kv"]
    kernels.tq_kv_unpack(byref(params), arrays(*layer.inputs[1:]), arrays(*decoded))
    reference = float_layer(layer.inputs[0], *decoded)
    reference.params.exact = 1
    layer.out[:] = np.nan
    for one in (reference, layer):
        one.run(kernels)
    return float(np.linalg.norm(layer.out - reference.out) / np.linalg.norm(reference.out))


def caches(kernels: ctypes.CDLL, model: str, tokens: int, layers: int) -> dict[str, list[Layer]]:
    _, heads, kv_heads, dim = MODELS[model]
    generator = np.random.default_rng(0)
    found: dict[str, list[Layer]] = {name: [] for name in CACHES}
    codes = {name: native.code(KVSettings(*kind), dim, dim) for name, kind in CACHES.items() if isinstance(kind, tuple)}
    for _ in range(layers):
        query = generator.standard_normal((1, heads, 1, dim), np.float32)
        keys, values = (generator.standard_normal((1, kv_heads, tokens, dim), np.float32) for _ in range(2))
        for name, kind in CACHES.items():
            if isinstance(kind, tuple):
                found[name].append(packed_layer(kernels, query, keys, values, codes[name]))
            else:
                found[name].append(float_layer(query, keys.astype(kind), values.astype(kind)))
    return found


def measure(kernels: ctypes.CDLL, model: str, tokens: int, passes: int, layers: int) -> list[dict]:
    made = caches(kernels, model, tokens, layers)
    errors = {name: error_of(kernels, of[0]) for name, of in made.items() if isinstance(CACHES[name], tuple)}
    wrong = {name: error for name, error in errors.items() if not error <= LARGEST_ERROR}
    if wrong:
        raise SystemExit(f"{model}, {tokens} tokens: relative errors {wrong}")
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(passes):
        for name, of in made.items():
            started = time.perf_counter()
            for layer in of:
                layer.run(kernels)
            seconds[name].append(time.perf_counter() - started)
    best, median = ({name: f(times) for name, times in seconds.items()} for f in (min, statistics.median))
    return [
        {
            "model": model,
            "layers": layers,
            "context": tokens,
            "cache": name,
            "bytes": sum(a.nbytes for a in of[0].inputs[1:]) * layers,
            "error": round(errors[name], 5) if name in errors else None,
            "ms_per_token": {"best": round(1e3 * best[name], 3), "median": round(1e3 * median[name], 3)},
            "speed_against_float16": {
                "best": round(best["float16"] / best[name], 2),
                "median": round(median["float16"] / median[name], 2),
            },
        }
        for name, of in made.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two passes over two layers; nothing is written")
    options = parser.parse_args()
    kernels = library.library()
    found = []
    for model, (layers, *_) in MODELS.items():
        for tokens in CONTEXTS:
            rows = measure(kernels, model, tokens, *((2, 2) if options.quick else (40, min(layers, 16))))
            found += rows
            for row in rows:
                print(json.dumps(row))
    if not options.quick:
        write("cpu_attention", {"kernels": library.state().reason, "target_packed": TARGET, "rows": found})


if __name__ == "__main__":
    main()
