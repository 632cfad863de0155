"""The tiny models cover every model type of the installed mlx-lm, run, decode and load as mlx-lm itself does."""

import mlx.core as mx
import pytest
import tiny_models
from mlx.utils import tree_flatten

# More tokens than the windows, chunks and indexers of the tiny models keep.
TOKENS = mx.array([[3, 17, 42, 99, 7, 64, 120, 5, 88, 31, 140, 2]])

every_type = pytest.mark.parametrize("model_type", sorted(tiny_models.CONFIGS))


@pytest.fixture(autouse=True, scope="module")
def uncompiled():
    """On the CPU, mlx compiles each fused function with the C++ compiler: tens of seconds for all model types."""
    mx.disable_compile()
    yield
    mx.enable_compile()


def logits(model, tokens, cache=None):
    return model(tokens, cache=cache).astype(mx.float32)


def relative_error(got, want):
    return (mx.abs(got - want).max() / mx.abs(want).max()).item()


def test_every_model_type_has_a_config_or_a_reason():
    known = [*tiny_models.CONFIGS, *tiny_models.UNSUPPORTED]
    assert sorted(known) == tiny_models.model_types()


def test_reasons_name_model_types():
    reasons = {**tiny_models.UNSUPPORTED, **tiny_models.DECODE_DIFFERS, **tiny_models.RELOAD_DIFFERS}
    assert set(reasons) <= set(tiny_models.model_types())
    assert all(reasons.values())


@every_type
def test_a_tiny_model_is_small_and_not_degenerate(model_type):
    model = tiny_models.build(model_type)
    parameters = [value for _, value in tree_flatten(model.parameters())]
    assert sum(value.size for value in parameters) < 2e6

    out = logits(model, TOKENS)
    assert out.shape[:2] == TOKENS.shape
    assert 100 <= out.shape[2] <= 300
    assert mx.isfinite(out).all()
    assert 0.05 < mx.std(out).item() < 20
    assert mx.std(out[:, 1:] - out[:, :-1]).item() > 0.05

    # An error in a parameter cannot be seen if the parameter is constant.
    assert all(value.size == 1 or (value != value.flatten()[0]).any() for value in parameters)


@every_type
def test_the_first_token_counts_at_the_end(model_type):
    model = tiny_models.build(model_type)
    other = mx.concatenate([mx.array([[9]]), TOKENS[:, 1:]], axis=1)
    assert relative_error(logits(model, other)[:, -1], logits(model, TOKENS)[:, -1]) > 1e-5


@every_type
def test_decoding_agrees_with_the_prompt(model_type):
    from mlx_lm.models.cache import make_prompt_cache

    model = tiny_models.build(model_type)
    whole = logits(model, TOKENS)
    cache = make_prompt_cache(model)
    prompt = logits(model, TOKENS[:, :-1], cache)
    last = logits(model, TOKENS[:, -1:], cache)
    error = relative_error(mx.concatenate([prompt, last], axis=1), whole)
    assert (error <= 1e-3) == (model_type not in tiny_models.DECODE_DIFFERS)


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3", "qwen3_next"])
def test_the_seed_decides_the_weights(model_type):
    first, same, other = (dict(tree_flatten(tiny_models.build(model_type, seed).parameters())) for seed in (0, 0, 1))
    assert all(mx.array_equal(first[path], same[path]) for path in first)
    assert not any(mx.array_equal(first[path], other[path]) for path in first if path.endswith("proj.weight"))


@every_type
def test_mlx_lm_loads_the_checkpoint_to_the_same_logits(model_type, tmp_path):
    from mlx_lm.utils import load_model

    written = tiny_models.write_checkpoint(tmp_path, model_type)
    loaded, config = load_model(tmp_path)
    assert config["model_type"] == model_type
    error = relative_error(logits(loaded, TOKENS), logits(written, TOKENS))
    assert (error <= 1e-5) == (model_type not in tiny_models.RELOAD_DIFFERS)


@pytest.mark.parametrize("model_type", sorted(set(tiny_models.UNSUPPORTED) - {"olmo"}))
def test_a_model_that_cannot_run_here_can_be_written_and_loaded(model_type, tmp_path):
    from mlx_lm.utils import load_model

    written = tree_flatten(tiny_models.write_checkpoint(tmp_path, model_type).parameters())
    loaded = dict(tree_flatten(load_model(tmp_path)[0].parameters()))
    assert loaded.keys() == {path for path, _ in written}
    assert all(mx.array_equal(loaded[path], value) for path, value in written)
