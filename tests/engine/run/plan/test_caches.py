"""What caches take, planned without weights, is what the caches of running models take."""

import mlx.core as mx
import pytest
import tiny_models

from tq.engine.cache.convert import upgrade_cache
from tq.engine.cache.settings import KVSettings
from tq.engine.cache.state import leaves
from tq.engine.run.plan.caches import CacheModel
from tq.engine.run.plan.skeleton import Blueprint, Skeleton
from tq.errors import UsageError

PACKED = KVSettings(8, 3, sink=3, window=2)


@pytest.fixture(autouse=True, scope="module")
def uncompiled():
    """On the CPU, mlx compiles each fused function with the C++ compiler: tens of seconds for all model types."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Packed tokens in the layout that they have on a GPU."""
    monkeypatch.setenv("TQ_BACKEND", "reference")


def skeleton(model_type, dtype=mx.float32, **changes):
    return Skeleton(Blueprint(tiny_models.config(model_type) | changes, dtype, {}))


def taken(caches):
    return sum(cache.nbytes for cache in leaves(caches) if not (hasattr(cache, "empty") and cache.empty()))


def read_prompt(model, caches, n_tokens, step):
    """Bytes at the end and at most, of a prompt in chunks and one token more."""
    tokens = mx.arange(n_tokens)[None] % 100
    sizes = []
    for start in [*range(0, n_tokens - 1, step), n_tokens - 1]:
        end = min(start + step, n_tokens - 1) if start < n_tokens - 1 else n_tokens
        model(tokens[:, start:end], cache=caches)
        mx.eval([cache.state for cache in caches])
        sizes.append(taken(caches))
    return sizes[-1], max(sizes)


@pytest.mark.parametrize("model_type", sorted(tiny_models.CONFIGS))
def test_bytes_are_those_of_real_caches(model_type, on_a_gpu):
    from mlx_lm.models.cache import make_prompt_cache

    model, planned = tiny_models.build(model_type), skeleton(model_type)
    usage = CacheModel(planned, step=10, gpu=True).usage(24)
    assert (usage.size_bytes, usage.peak_bytes) == read_prompt(model, make_prompt_cache(model), 24, 10)
    assert 0 < usage.read_bytes <= usage.size_bytes

    caches = make_prompt_cache(model)
    if not any(e.action == "packed" for e in upgrade_cache(caches, PACKED, model_family=model.model_type)):
        with pytest.raises(UsageError, match="no cache of this model can be packed"):
            CacheModel(planned, PACKED, step=64, gpu=True)
        return
    usage = CacheModel(planned, PACKED, step=64, gpu=True).usage(78)
    assert (usage.size_bytes, usage.peak_bytes) == read_prompt(model, caches, 78, 64)


def test_packed_tokens_on_this_cpu_have_the_layout_of_its_kernels():
    from mlx_lm.models.cache import make_prompt_cache

    model = tiny_models.build("llama")
    caches = make_prompt_cache(model)
    upgrade_cache(caches, PACKED, model_family="llama")
    usage = CacheModel(skeleton("llama"), PACKED, step=64, gpu=False).usage(200)
    assert (usage.size_bytes, usage.peak_bytes) == read_prompt(model, caches, 200, 64)


def test_planning_a_context_takes_no_memory():
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    wide = skeleton("llama", mx.bfloat16, hidden_size=8192, intermediate_size=28672, num_hidden_layers=2)
    usage = CacheModel(wide, step=2048, gpu=True).usage(100_000)
    assert usage.size_bytes > 6e6
    assert mx.get_peak_memory() - before < 1e6


def test_kinds_name_what_grows():
    kinds = {kind.name: kind for kind in CacheModel(skeleton("gpt_oss", mx.bfloat16), step=2048, gpu=True).kinds(4100)}
    assert kinds["window of 8"].token_bytes == 0
    everything = kinds["all tokens"]
    heads, dim = 2, 16
    assert everything.token_bytes == everything.caches * heads * dim * 2 * 2  # keys and values of two bytes
    assert everything.size_bytes == everything.token_bytes * (4096 + 256)  # it grows in steps

    latent = CacheModel(skeleton("deepseek_v3", mx.bfloat16), step=2048, gpu=True).kinds(1000)
    assert [(kind.name, kind.shape) for kind in latent] == [("latent", "1 x 64 + 16")]
    states = CacheModel(skeleton("mamba2"), step=2048, gpu=True)
    assert [(kind.name, kind.token_bytes) for kind in states.kinds(1000)] == [("recurrent state", 0)]
    assert states.usage(10) == states.usage(10_000)


@pytest.mark.parametrize(
    ("settings", "bits"), [(KVSettings(8, 3), 11 + 2 * 16 / 64), (KVSettings(4, 4), 8 + 2 * 16 / 64)]
)
def test_bytes_of_a_packed_token_have_its_scales(settings, bits):
    planned = skeleton("qwen3", mx.bfloat16, head_dim=64)
    (kind,) = CacheModel(planned, settings, step=2048, gpu=True).kinds(8192)
    heads = planned.filled()[0].keys.shape[1]
    assert kind.token_bytes == kind.caches * heads * 64 * bits / 8
    assert kind.name == f"all tokens, {settings.label()}"


def test_shorter_contexts_than_the_start_of_packing_are_unpacked():
    planned = skeleton("llama")
    later = CacheModel(planned, KVSettings(8, 3, start=1000), step=256, gpu=True)
    plain, packed = CacheModel(planned, step=256, gpu=True), CacheModel(planned, KVSettings(8, 3), step=256, gpu=True)
    assert later.usage(999) == plain.usage(999)
    assert later.usage(1000) == packed.usage(1000) != plain.usage(1000)


def test_what_stays_unpacked_is_said():
    model = CacheModel(skeleton("gpt_oss"), KVSettings(8, 3), step=64, gpu=True)
    assert model.notes == ["1 of 2 caches stay unpacked: a window of 8 tokens has too few that would be packed"]


def test_a_model_that_cannot_run_here_is_said_to_be_unknown():
    from tq.errors import TQError

    if mx.metal.is_available():
        pytest.skip("it can run here")
    with pytest.raises(TQError, match="what a bitnet model keeps cannot be found out on this machine"):
        skeleton("bitnet")
