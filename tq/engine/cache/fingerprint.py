"""What a stored cache of keys and values depends on beside its tokens: the model's files, and how it runs here."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from tq.engine import ops
from tq.engine.cache.settings import KVSettings
from tq.engine.model.architecture import parameters

# Weights, tokenizer, chat template and code. What a README says changes nothing.
SUFFIXES = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt", ".py")
WHOLE_BYTES = 8 << 20  # files up to this size are read
SAMPLES, SAMPLE_BYTES = 64, 4096  # and of larger ones so much, the first and the last bytes included


def model_key(path: Path, model: nn.Module, kv: KVSettings | None, version: int) -> str:
    """64 hexadecimal digits that differ wherever a cache of one run could be wrong in the other.

    Args:
        path: The checkpoint: a folder or a GGUF file.
        model: As it runs: its types and its device.
        kv: How its caches are packed.
        version: Of what is stored.
    """
    facts = {
        "version": version,
        "checkpoint": checkpoint_fingerprint(path),
        "dtypes": sorted({str(array.dtype) for array in parameters(model).values()}),
        "device": str(mx.default_device().type),
        # Keys and values differ in their last bits with the kernels that computed and packed them.
        "kernels": [ops.forced_backend(), ops.cpu.unavailable()],
        "kv": None if kv is None else asdict(kv),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def checkpoint_fingerprint(path: Path) -> str:
    """A hash of a model's files: small ones whole, large ones by size, time of change and samples.

    Reads some megabytes, however large the model is. A changed file keeps its fingerprint only if it keeps its size
    and its time to the nanosecond, and changed between all samples.
    """
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
    found = hashlib.sha256()
    for file in files:
        about = file.stat()
        large = about.st_size > WHOLE_BYTES
        found.update(json.dumps([file.name, about.st_size, about.st_mtime_ns if large else 0]).encode())
        with file.open("rb") as stream:
            if not large:
                found.update(stream.read())
                continue
            for n in range(SAMPLES):
                stream.seek(n * (about.st_size - SAMPLE_BYTES) // (SAMPLES - 1))
                found.update(stream.read(SAMPLE_BYTES))
    return found.hexdigest()
