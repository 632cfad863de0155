"""Native layers compute what the modules that they stand for compute, and every other module keeps its forward."""

import copy
import threading

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_models import write_checkpoint

from tq.cpu import library
from tq.engine.model import native_layers, native_probe, native_proof
from tq.engine.model.convert import convert
from tq.engine.model.load import load_packed
from tq.engine.model.plan import make_plan
from tq.engine.model.recipe import Recipe
from tq.engine.model.sources import open_source

if not library.state().active:
    pytest.skip(f"no kernels: {library.state().reason}", allow_module_level=True)

LAYER, ATTENTION, FEED_FORWARD = "layer", "attention", "feed-forward network"
# What becomes native of the two layers of each: whole layers, or parts of them.
WHOLE = (
    "bailing_moe", "dots1", "ernie4_5", "exaone", "exaone4", "gemma", "gemma2", "gemma3_text", "glm4", "glm4_moe",
    "gpt_oss", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "internlm3", "llama", "mimo", "minicpm",
    "minimax", "ministral3", "mistral3", "mixtral", "olmo2", "olmo3", "olmoe", "openelm", "phi3", "qwen2", "qwen2_moe",
    "qwen3", "qwen3_moe", "seed_oss", "smollm3",
)  # fmt: skip
NATIVE = {
    **{model_type: [LAYER, LAYER] for model_type in (*WHOLE, "apertus")},
    "cohere2": [ATTENTION, ATTENTION, FEED_FORWARD, FEED_FORWARD],
    "deepseek_v3": [FEED_FORWARD, FEED_FORWARD],
    "qwen3_5": [FEED_FORWARD, LAYER],
    "qwen3_next": [FEED_FORWARD, LAYER],
    "starcoder2": [ATTENTION, ATTENTION],
}


@pytest.fixture(autouse=True)
def no_compile():
    """Compiling on the CPU takes longer than all that is tested here."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """converted(model_type): the folder of a tiny model in 4 bits."""
    folders = {}

    def make(model_type):
        if model_type not in folders:
            folder = tmp_path_factory.mktemp(model_type)
            write_checkpoint(folder / "source", model_type)
            plan = make_plan(open_source(str(folder / "source")), Recipe.from_options(bits=4), dtype="float32")
            list(convert(plan, folder / "out"))
            folders[model_type] = folder / "out"
        return folders[model_type]

    return make


@pytest.fixture
def load(converted, monkeypatch):
    """load(model_type): the model without native modules, in exact arithmetic unless told otherwise."""

    def make(model_type, exact=True):
        monkeypatch.setenv("TQ_CPU_EXACT", "1" if exact else "0")
        model, _ = load_packed(converted(model_type))
        native_proof.uninstall(model)
        return model

    return make


def tokens(n, seed=0):
    return mx.array(np.random.default_rng(seed).integers(3, 90, (1, n)))


def relative_error(got, expected):
    got, expected = np.array(got), np.array(expected)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def conversation(model):
    """Logits of a prompt in two chunks, single tokens, a step back, and a continuation."""
    from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

    cache = make_prompt_cache(model)
    logits = [model(tokens(9), cache=cache), model(tokens(5, 1), cache=cache)]
    logits += [model(tokens(1, seed), cache=cache) for seed in (2, 3, 4)]
    if can_trim_prompt_cache(cache):
        assert trim_prompt_cache(cache, 2) == 2
    logits += [model(tokens(6, 5), cache=cache), model(tokens(1, 6), cache=cache)]
    mx.eval(logits)
    return logits


def calls(model):
    return [module.kernel.calls for module in native_proof.native_modules(model)]


def adopted(model):
    return sorted(adoption.kind for adoption in native_proof.install(model) if adoption.reason is None)


@pytest.mark.parametrize("model_type", NATIVE)
def test_native_modules_compute_what_they_stand_for(model_type, load):
    model = load(model_type)
    expected, all_at_once = conversation(model), model(tokens(40))
    assert adopted(model) == sorted(NATIVE[model_type])
    if model_type in WHOLE:
        assert all(layer.kernel.network is None for layer in native_proof.native_modules(model))
    before = calls(model)
    for got, wanted in zip(conversation(model), expected, strict=True):
        assert relative_error(got, wanted) < 1e-4
    assert all(now >= then + 7 for now, then in zip(calls(model), before, strict=True))
    assert relative_error(model(tokens(40)), all_at_once) < 1e-4


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3_moe"])
def test_with_8_bit_activations_they_are_close(model_type, load):
    expected = conversation(load(model_type))
    model = load(model_type, exact=False)
    native_proof.install(model)
    for got, wanted in zip(conversation(model), expected, strict=True):
        assert relative_error(got, wanted) < 0.1


def test_chunks_of_a_prompt_give_what_it_gives_at_once(load):
    from mlx_lm.models.cache import make_prompt_cache

    model = load("qwen3")
    native_proof.install(model)
    prompt = tokens(61)
    whole = model(prompt)
    cache = make_prompt_cache(model)
    parts = [model(prompt[:, at : at + 13], cache=cache) for at in range(0, 61, 13)]
    assert relative_error(mx.concatenate(parts, axis=1), whole) < 1e-5


def test_caches_grow_past_many_steps_and_hold_what_their_own_update_would(load):
    from mlx_lm.models.cache import make_prompt_cache

    model = load("llama")
    own, ours = make_prompt_cache(model), make_prompt_cache(model)
    for n in (250, 1, 1, 300, 1, 700):
        model(tokens(n, n), cache=own)
        mx.eval([c.state for c in own])
    native_proof.install(model)
    for n in (250, 1, 1, 300, 1, 700):
        model(tokens(n, n), cache=ours)
        mx.eval([c.state for c in ours])
    for a, b in zip(ours, own, strict=True):
        assert a.offset == b.offset
        for got, expected in zip(a.keys_and_values(), b.keys_and_values(), strict=True):
            assert got.shape == expected.shape
            assert relative_error(got, expected) < 1e-4


@pytest.mark.parametrize("model_type", ["gemma3_text", "llama", "gpt_oss"])
def test_windows_slide_past_their_size(model_type, load):
    """Rotating caches in all their phases: filling, a prompt longer than the window, single tokens all round."""
    from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

    def long_conversation(model):
        cache = make_prompt_cache(model)
        assert any(type(c) is RotatingKVCache for c in cache)
        lengths = (3, 1, 1, 30, 1, 7, *(1,) * 30, 2, 1)
        logits = [model(tokens(n, i), cache=cache) for i, n in enumerate(lengths)]
        mx.eval(logits, [c.state for c in cache])
        return logits, [(c.offset, getattr(c, "_idx", None), c.keys.shape[2]) for c in cache if hasattr(c, "_idx")]

    model = load(model_type)
    expected, places = long_conversation(model)
    assert adopted(model) == [LAYER, LAYER]
    before = calls(model)
    got, ours = long_conversation(model)
    assert min(now - then for now, then in zip(calls(model), before, strict=True)) >= 38
    assert ours == places
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < 1e-4


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_a_batch_goes_through_the_forward_of_the_model(model_type, load):
    from mlx_lm.models.cache import make_prompt_cache

    model = load(model_type)
    batch = mx.concatenate([tokens(8, seed) for seed in range(3)])

    def run():
        cache = make_prompt_cache(model)
        return mx.concatenate([model(batch, cache=cache), model(batch[:, :1], cache=cache)], axis=1)

    expected = run()
    native_proof.install(model)
    before = calls(model)
    assert relative_error(run(), expected) < 1e-5
    assert calls(model) == before


def test_a_quantized_cache_goes_through_the_forward_of_the_model(make_checkpoint, tmp_path, monkeypatch):
    from mlx_lm.models.cache import make_prompt_cache

    monkeypatch.setenv("TQ_CPU_EXACT", "1")
    plan = make_plan(open_source(str(make_checkpoint(tmp_path / "source"))), Recipe.from_options(bits=4))
    list(convert(plan, tmp_path / "out"))
    model, _ = load_packed(tmp_path / "out")
    native_proof.uninstall(model)

    def run():
        cache = make_prompt_cache(model)
        model(tokens(9), cache=cache)
        cache = [c.to_quantized(group_size=32, bits=8) for c in cache]
        before = calls(model)
        logits = model(tokens(1, 1), cache=cache)
        assert calls(model) == before
        return logits

    expected = run()
    assert adopted(model) == [LAYER, LAYER]
    assert relative_error(run(), expected) < 1e-3


def test_the_forward_of_the_model_continues_a_cache_and_gives_it_back(load):
    from mlx_lm.models.cache import make_prompt_cache

    model = load("qwen2")
    own = make_prompt_cache(model)
    expected = [model(tokens(n, n), cache=own) for n in (7, 1, 5, 2, 300, 1)]
    native_proof.install(model)
    ours = make_prompt_cache(model)
    for i, n in enumerate((7, 1, 5, 2, 300, 1)):
        (native_proof.uninstall if i % 2 else native_proof.install)(model)
        assert relative_error(model(tokens(n, n), cache=ours), expected[i]) < 1e-4


def test_copies_of_a_cache_go_their_own_ways(load):
    from mlx_lm.models.cache import make_prompt_cache

    model = load("llama")
    native_proof.install(model)
    cache = make_prompt_cache(model)
    model(tokens(9), cache=cache)
    copied = copy.deepcopy(cache)
    first = model(tokens(1, 1), cache=cache)
    other = model(tokens(1, 2), cache=copied)
    assert relative_error(first, model(mx.concatenate([tokens(9), tokens(1, 1)], 1))[:, -1:]) < 1e-5
    assert relative_error(other, model(mx.concatenate([tokens(9), tokens(1, 2)], 1))[:, -1:]) < 1e-5


def test_an_array_that_somebody_holds_is_not_written_to(load):
    from mlx_lm.models.cache import make_prompt_cache

    model = load("llama")
    native_proof.install(model)
    cache = make_prompt_cache(model)
    mx.eval(model(tokens(9), cache=cache))
    held = cache[0].keys
    before = np.array(held)
    mx.eval(model(tokens(1), cache=cache))
    assert np.array_equal(np.array(held), before)


def test_a_saved_prompt_goes_on(load, tmp_path):
    from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache

    for exact in (True, False):
        model = load("llama", exact=exact)
        native_proof.install(model)
        cache = make_prompt_cache(model)
        model(tokens(9), cache=cache)
        save_prompt_cache(str(tmp_path / "prompt.safetensors"), cache)
        expected = model(tokens(1, 1), cache=cache)
        again = load_prompt_cache(str(tmp_path / "prompt.safetensors"))
        assert again[0].keys.dtype == (mx.float32 if exact else mx.float16)
        assert relative_error(model(tokens(1, 1), cache=again), expected) < 1e-6


def test_a_step_may_be_planned_before_the_last_one_has_run(load):
    """As a generation loop does: token by token, one ahead, with the cache in the stream."""
    from mlx_lm.models.cache import make_prompt_cache

    model = load("llama")

    def run():
        cache = make_prompt_cache(model)
        token, found = mx.argmax(model(tokens(7), cache=cache)[:, -1:], axis=-1), []
        for _ in range(20):
            following = mx.argmax(model(token, cache=cache)[:, -1:], axis=-1)
            mx.async_eval(following)
            found.append(token.item())
            token = following
        return found

    expected = run()
    native_proof.install(model)
    assert run() == expected


def test_threads_share_a_model(load):
    from mlx_lm.models.cache import make_prompt_cache

    model = load("llama")
    native_proof.install(model)
    expected = [np.array(model(tokens(12, seed))) for seed in range(4)]
    got = [None] * 4

    def run(seed):
        with mx.stream(mx.new_stream(mx.cpu)):
            for _ in range(5):
                cache = make_prompt_cache(model)
                parts = [model(tokens(12, seed)[:, i : i + 1], cache=cache) for i in range(12)]
                got[seed] = np.array(mx.concatenate(parts, axis=1))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < 1e-5


def test_masks_and_types_that_a_kernel_cannot_read_go_the_long_way(load):
    from mlx_lm.models.cache import KVCache

    model = load("llama")
    layer = model.layers[0]
    x = mx.random.normal((1, 4, layer.hidden_size))
    half = x.astype(mx.float16)
    masks = {"bool": mx.ones((4, 4), mx.bool_), "half": mx.zeros((4, 4), mx.float16), "none": None, "named": "causal"}
    expected = {name: layer(x, mask, KVCache()) for name, mask in masks.items()}
    in_half = layer(half, None, KVCache())
    native_proof.install(model)
    for name, mask in masks.items():
        before = layer.kernel.calls
        assert relative_error(layer(x, mask, KVCache()), expected[name]) < 1e-4
        assert (layer.kernel.calls > before) == (name != "half")
    before = layer.kernel.calls
    assert relative_error(layer(half, None, KVCache()).astype(mx.float32), in_half.astype(mx.float32)) < 1e-2
    assert layer.kernel.calls == before


def test_a_native_model_has_the_parts_and_attributes_that_it_had(load):
    model = load("llama")
    layer, kind = model.layers[0], type(model.layers[0])
    before = [(path, array.shape) for path, array in tree_flatten(model.parameters())]
    native_proof.install(model)
    assert model.layers[0] is layer
    assert isinstance(layer, kind)
    assert layer.use_sliding is True and layer.self_attn.n_heads == 6
    assert [(path, array.shape) for path, array in tree_flatten(model.parameters())] == before
    native_proof.uninstall(model)
    assert type(layer) is kind
    assert "kernel" not in vars(layer)


def test_training_goes_through_the_forward_of_the_model(load):
    model = load("llama")
    native_proof.install(model)
    model.train()
    before = calls(model)
    model(tokens(3))
    assert calls(model) == before


def softcapped(module, x, mask=None, cache=None):
    """Attention as llama's, but for a soft cap that nothing tells of."""
    B, L, _ = x.shape
    projections = (module.q_proj, module.k_proj, module.v_proj)
    q, k, v = (projection(x).reshape(B, L, -1, module.head_dim).swapaxes(1, 2) for projection in projections)
    offset = cache.offset if cache is not None else 0
    q, k = module.rope(q, offset=offset), module.rope(k, offset=offset)
    if cache is not None:
        k, v = cache.update_and_fetch(k, v)
    k, v = (mx.repeat(a, module.n_heads // module.n_kv_heads, axis=1) for a in (k, v))
    scores = 30 * mx.tanh(q * module.scale @ k.swapaxes(2, 3) / 30)
    n = k.shape[2]
    visible = mx.arange(n) <= mx.arange(n - L, n)[:, None] if mask is None or isinstance(mask, str) else mask
    scores = mx.where(visible, scores, -1e9)
    return module.o_proj((mx.softmax(scores, axis=-1) @ v).swapaxes(1, 2).reshape(B, L, -1))


def later_scaled(module, x, mask=None, cache=None):
    """Attention as llama's, but for queries that grow from position 8192 on."""
    offset = cache.offset if cache is not None else 0
    before = module.scale
    module.scale = before * (1 + 0.1 * (offset >= 8192))
    y = module.__class__.__mro__[1].__call__(module, x, mask, cache)
    module.scale = before
    return y


ODD_ATTENTION = {
    "a little more": lambda module, x, mask=None, cache=None: (
        1.001 * type(module).__mro__[1].__call__(module, x, mask, cache)
    ),
    "a soft cap": softcapped,
    "another scale far away": later_scaled,
}


@pytest.mark.parametrize("oddity", ODD_ATTENTION)
def test_attention_that_computes_something_else_keeps_its_forward(oddity, load):
    model = load("llama")
    attention = model.layers[1].self_attn
    attention.__class__ = type("Odd", (type(attention),), {"__call__": ODD_ATTENTION[oddity]})
    expected = model(tokens(9))
    found = {adoption.path: adoption.reason for adoption in native_proof.install(model)}
    assert found["model.layers.0"] is None
    assert "computes something else" in found["model.layers.1"]
    assert "computes something else" in found["model.layers.1.self_attn"]
    assert found["model.layers.1.mlp"] is None
    assert relative_error(model(tokens(9)), expected) < 1e-4


@pytest.mark.parametrize("exact", [True, False])
def test_a_layer_that_computes_something_else_because_of_its_number_keeps_its_forward(exact, load):
    """The second layer has the code and the settings of the first, which is native."""

    def numbered(module, x, mask=None, cache=None):
        return x + (1 + 0.001 * module.layer_idx) * (type(module).__mro__[1].__call__(module, x, mask, cache) - x)

    model = load("qwen3", exact)
    kind = type("Numbered", (type(model.layers[0]),), {"__call__": numbered})
    for i, layer in enumerate(model.layers):
        layer.__class__, layer.layer_idx = kind, i
    found = {adoption.path: adoption.reason for adoption in native_proof.install(model)}
    assert found["model.layers.0"] is None
    assert "computes something else" in found["model.layers.1"]


@pytest.mark.parametrize("exact", [True, False])
def test_only_the_first_layer_of_a_sort_is_compared_thoroughly(exact, load, monkeypatch):
    model = load("qwen3", exact)
    thorough, brief = [], []
    for name, modules in (("disagreement", thorough), ("glimpse", brief)):
        whole = getattr(native_probe, name)
        monkeypatch.setattr(
            native_probe, name, lambda module, *more, whole=whole, to=modules: to.append(module) or whole(module, *more)
        )
    native_proof.install(model)
    assert len({id(module) for module in thorough}) == len(brief) == 1
    assert brief[0] is not thorough[0]


def test_a_layer_whose_8_bit_codes_fall_otherwise_is_compared_thoroughly(load, monkeypatch):
    monkeypatch.setattr(native_probe, "glimpse", lambda *_: 1e-3)
    model = load("qwen3", exact=False)
    assert adopted(model) == [LAYER, LAYER]


def test_a_layer_that_adds_up_differently_keeps_its_forward_and_its_halves_are_native(load):
    def parallel(module, x, mask=None, cache=None):
        return x + module.self_attn(module.input_layernorm(x), mask, cache) + module.mlp(module.input_layernorm(x))

    model = load("llama")
    for layer in model.layers:
        layer.__class__ = type("Parallel", (type(layer),), {"__call__": parallel})
    expected = conversation(model)
    found = {adoption.path: adoption.reason for adoption in native_proof.install(model)}
    for i in range(2):
        assert "computes something else" in found[f"model.layers.{i}"]
        assert found[f"model.layers.{i}.self_attn"] is None and found[f"model.layers.{i}.mlp"] is None
    for got, wanted in zip(conversation(model), expected, strict=True):
        assert relative_error(got, wanted) < 1e-4


def change_weight(layer):
    layer.self_attn.extra = mx.ones(3)


def change_norm(layer):
    layer.input_layernorm = nn.LayerNorm(layer.hidden_size)


def change_rope(layer):
    class Rope(nn.Module):
        """Another base beyond 50000 positions."""

        def __call__(self, x, offset=0):
            return mx.fast.rope(x, 16, traditional=False, base=1e4 if offset < 50000 else 1e6, scale=1.0, offset=offset)

    rope = Rope()
    rope.dims, rope._freqs = 16, 1e4 ** (mx.arange(0, 16, 2) / 16)
    layer.self_attn.rope = rope


def change_window(layer):
    layer.self_attn.sliding_window = 4096


def change_linear(layer):
    layer.self_attn.q_proj = nn.Linear(layer.hidden_size, layer.hidden_size, bias=False)


def fail(layer):
    def broken(module, x, mask=None, cache=None):
        raise ValueError("needs a tensor of another kind\nand more")

    layer.__class__ = type("Broken", (type(layer),), {"__call__": broken})


CHANGES = {
    change_weight: "has a self_attn that has a part extra",
    change_norm: "has a input_layernorm that is no RMSNorm",
    change_rope: "has a self_attn that has a rotary embedding of an unknown kind",
    change_window: "has a self_attn that has a sliding_window of its own",
    change_linear: "has a self_attn that has a q_proj that is not quantized",
    fail: "fails when it is probed: needs a tensor of another kind",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_unfamiliar_layers_say_why_they_keep_their_forward(change, load):
    model = load("llama")
    change(model.layers[0])
    found = {adoption.path: adoption.reason for adoption in native_proof.install(model)}
    assert found["model.layers.0"] == CHANGES[change]
    assert found["model.layers.1"] is None
    assert native_proof.notes(model) == [f"1 of 2 layers run by mlx-lm's forward: a layer {CHANGES[change]}"]


def test_a_probe_leaves_a_module_as_it_was(load):
    model = load("qwen3_moe")
    scales = [layer.self_attn.scale for layer in model.layers]
    networks = [layer.mlp for layer in model.layers]
    native_proof.install(model)
    assert [layer.self_attn.scale for layer in model.layers] == scales
    assert all(layer.mlp is network for layer, network in zip(model.layers, networks, strict=True))


def test_what_is_native_already_stays_so(load):
    model = load("llama")
    first = native_proof.install(model)
    assert native_proof.install(model) is first
    assert native_proof.notes(model) == []
    assert all(isinstance(layer, native_layers.NativeLayer) for layer in model.layers)
