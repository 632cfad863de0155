"""Packed caches go to files and come back through mlx-lm's own functions."""

import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from kv_cases import run, token_ids
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import build

import tq
from tq.engine.cache.packed import PackedKVCache
from tq.engine.cache.settings import KVSettings
from tq.errors import TQError


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "falcon_h1", "longcat_flash"])
@pytest.mark.parametrize("tokens", [0, 330])
@pytest.mark.parametrize("functions", [tq, mlx_lm_cache])
def test_there_and_back(model_type, tokens, functions, reference, tmp_path):
    model, ids = build(model_type), token_ids(340)
    caches = make_prompt_cache(model)
    tq.upgrade_cache(caches, KVSettings(8, 3.5, sink=4, window=0), model_family=model_type)
    if tokens:
        run(model, caches, ids[:, :tokens], [tokens])
    path = str(tmp_path / "prompt.safetensors")
    functions.save_prompt_cache(path, caches, {"model": model_type})
    again, metadata = functions.load_prompt_cache(path, return_metadata=True)
    assert metadata == {"model": model_type}
    assert [type(c) for c in again] == [type(c) for c in caches]
    assert [c.nbytes for c in again if not c.empty()] == [c.nbytes for c in caches if not c.empty()]
    following = ids[:, tokens:]
    steps = [following.shape[1] - 1, 1]
    got, expected = run(model, again, following, steps), run(model, caches, following, steps)
    assert np.array_equal(np.array(got), np.array(expected))


def test_a_batch(reference, tmp_path):
    model = build("qwen3")
    single = []
    for n in (200, 7):
        single.append(tq.convert_cache(make_prompt_cache(model)))
        run(model, single[-1], token_ids(n), [n])
    caches = [layer[0].merge(list(layer)) for layer in zip(*single, strict=True)]
    tq.save_prompt_cache(tmp_path / "batch.safetensors", caches)
    again = tq.load_prompt_cache(tmp_path / "batch.safetensors")
    following = token_ids(3, batch=2, seed=1)
    assert np.array_equal(
        np.array(run(model, again, following, [1, 2])), np.array(run(model, caches, following, [1, 2]))
    )


def test_another_process_reads_it(reference, tmp_path):
    cache = PackedKVCache(KVSettings(4, 4))
    cache.update_and_fetch(mx.random.normal((1, 2, 300, 64)), mx.random.normal((1, 2, 300, 64)))
    path = tmp_path / "cache.safetensors"
    tq.save_prompt_cache(path, [cache])
    code = (
        f"import tq; (c,) = tq.load_prompt_cache({str(path)!r}); print(type(c).__name__, c.offset, c.packed, c.nbytes)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["PackedKVCache", "300", "128", str(cache.nbytes)]


def test_what_is_no_cache_is_said(tmp_path):
    path = tmp_path / "x.safetensors"
    for content in (None, b"", b"not a cache"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(TQError, match="cannot read a prompt cache from"):
            tq.load_prompt_cache(path)


def test_names_of_mlx_lm_are_left_alone(monkeypatch):
    monkeypatch.setattr(mlx_lm_cache, "PackedKVCache", int, raising=False)
    with pytest.raises(TQError, match="has a PackedKVCache of its own"):
        tq.convert_cache([])
