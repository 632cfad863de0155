"""Streamed models compute what resident ones do, bit for bit, with whatever fits, on every backend there is here."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import write_checkpoint

from tq.engine.model.convert import convert
from tq.engine.model.load import load_packed, load_streamed
from tq.engine.model.plan import make_plan
from tq.engine.model.recipe import Recipe
from tq.engine.model.sources import open_source
from tq.engine.model.streamed import StreamedExperts
from tq.engine.stream.settings import StreamSettings
from tq.errors import TQError

# Biases; latent attention and shared experts; two matrices; a router outside of the block; one expert of a token.
MODELS = ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h", "gemma4", "llama4"]
FIXTURES = Path(__file__).parents[2] / "fixtures" / "turboquant"
PROMPT, ANSWER = 40, 5  # 40 tokens with 2 experts each: SwitchGLU sorts them


@pytest.fixture(autouse=True)
def no_compile():
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """converted(model_type, bits, format, codec): a folder, made once."""
    made = {}

    def get(model_type, bits=4, format_name="tq", codec=None):
        key = model_type, bits, format_name, codec
        if key not in made:
            folder = tmp_path_factory.mktemp(model_type)
            write_checkpoint(folder / "source", model_type)
            recipe = Recipe.from_options(bits=bits, codec=codec)
            source = open_source(str(folder / "source"))
            plan = make_plan(source, recipe, dtype="float32", format=format_name)
            list(convert(plan, folder / "out"))
            made[key] = folder / "out"
        return made[key]

    return get


def logits(model) -> np.ndarray:
    """Of the last token of a prompt and of some that follow, one at a time."""
    from mlx_lm.models.cache import make_prompt_cache

    tokens = mx.array(np.random.default_rng(0).integers(3, 90, PROMPT + ANSWER))
    cache = make_prompt_cache(model)
    found = [model(tokens[None, :PROMPT], cache=cache)]
    found += [model(tokens[None, n : n + 1], cache=cache) for n in range(PROMPT, PROMPT + ANSWER)]
    return np.stack([np.array(each.astype(mx.float32))[0, -1] for each in found])


def slots_of_each(folder) -> int:
    """Bytes of one slot of every arena."""
    _, _, pager = load_streamed(folder, StreamSettings(budget_bytes=10**9))
    return sum(arena.size_bytes // arena.residency.n_slots for arena in pager.arenas)


def agree(folder, slots=(1, 3, 100), **settings) -> None:
    """With so many slots in each arena."""
    expected = logits(load_packed(folder)[0])
    one = slots_of_each(folder)
    for n in slots:
        model, _, pager = load_streamed(folder, StreamSettings(budget_bytes=n * one, **settings))
        assert np.array_equal(logits(model), expected), f"{n} slots"
        assert pager.report().prompt_read_bytes > 0
        pager.close()


@pytest.mark.parametrize("model_type", MODELS)
def test_a_streamed_model_computes_the_same(converted, model_type):
    agree(converted(model_type))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_also_with_8_bit_activations(converted, model_type, monkeypatch):
    monkeypatch.delenv("TQ_CPU_EXACT")
    agree(converted(model_type), slots=(1, 3))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_also_by_the_reference(converted, model_type, monkeypatch):
    monkeypatch.setenv("TQ_BACKEND", "reference")
    agree(converted(model_type), slots=(1, 3))


@pytest.mark.parametrize("backend", ["mlx", "cpu"])
def test_also_with_affine_codes(converted, backend, monkeypatch):
    """Slots of MLX's own kernels have scales in the type of activations."""
    monkeypatch.setenv("TQ_BACKEND", backend)
    agree(converted("gpt_oss", codec="affine"), slots=(3, 100))


@pytest.mark.parametrize(("bits", "backend"), [(3, "auto"), (3, "reference"), (4, "auto")])
def test_also_in_the_layout_of_turboquant(converted, bits, backend, monkeypatch):
    monkeypatch.setenv("TQ_BACKEND", backend)
    agree(converted("qwen3_moe", bits, "turboquant"), slots=(2, 100))


@pytest.mark.parametrize("name", ["ternary_experts", "expert_down_bits", "protected_experts", "expert_biases"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_checkpoints_of_turboquant_itself_run_as_they_are(name, backend, monkeypatch):
    """Matrices of an expert with different codes, and layers with different ones, which do not share slots."""
    monkeypatch.setenv("TQ_BACKEND", backend)
    folder = FIXTURES / name
    tokens = mx.array([[1, 17, 5, 80, 33, 2, 61, 9, 44, 95, 12, 70]])
    expected = np.load(folder / "logits.npy")
    resident = np.array(load_packed(folder)[0](tokens).astype(mx.float32))[0]
    one = slots_of_each(folder)
    for n in (1, 100):
        model, _, pager = load_streamed(folder, StreamSettings(budget_bytes=n * one))
        got = np.array(model(tokens).astype(mx.float32))[0]
        assert np.array_equal(got, resident)
        assert len(pager.arenas) == (2 if name == "protected_experts" else 1)
    assert np.linalg.norm(resident - expected) < 1e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("policy", ["lfu", "lrfu"])
def test_also_with_guesses_and_other_policies(converted, policy):
    agree(converted("gpt_oss"), slots=(3, 5), policy=policy, prefetch="on")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_guess_is_what_the_next_layer_would_choose_if_nothing_came_between(converted, backend, monkeypatch):
    """By the kernel that chooses, and by listening to the next block: both tell more than chance, one in two."""
    monkeypatch.setenv("TQ_BACKEND", backend)
    folder = converted("qwen2_moe")
    model, _, pager = load_streamed(folder, StreamSettings(budget_bytes=10**9, prefetch="on"))
    monkeypatch.setattr(pager, "guesses", lambda layer: layer == 1)
    guessed, wanted = [], []
    monkeypatch.setattr(pager, "ahead", lambda layer, experts, *_: guessed.append(set(experts.tolist())))
    use = pager.use

    def record(layer, experts, n_tokens):
        if layer == 1:
            wanted.append(set(experts.tolist()))
        use(layer, experts, n_tokens)

    monkeypatch.setattr(pager, "use", record)
    for token in range(40):
        mx.eval(model(mx.array([[token]])))
    assert len(guessed) == len(wanted) == 40 and all(len(each) == 2 for each in guessed)
    right = np.mean([len(a & b) / 2 for a, b in zip(guessed, wanted, strict=True)])
    assert right > 0.65


def test_nothing_of_the_experts_is_loaded_with_the_model(converted):
    folder = converted("mixtral")
    model, _, pager = load_streamed(folder, StreamSettings(budget_bytes=slots_of_each(folder)))
    report = pager.report()
    assert report.prompt_read_bytes == report.read_bytes_per_token == 0
    experts = [module for module in model.modules() if isinstance(module, StreamedExperts)]
    assert [module.num_experts for module in experts] == [4, 4]
    assert pager.most(0) == 1


def test_fewer_active_experts_are_fewer_reads(converted):
    folder = converted("mixtral")

    def read(most):
        settings = StreamSettings(budget_bytes=3 * slots_of_each(folder), max_active_experts=most, prefetch="off")
        model, notes, pager = load_streamed(folder, settings)
        found = logits(model)
        return found, notes, pager.report()

    (whole, _, all_read), (fewer, notes, less) = read(None), read(1)
    assert not np.array_equal(whole, fewer)
    assert any("1 expert of a token" in note for note in notes)
    assert less.read_bytes_per_token < all_read.read_bytes_per_token


def test_a_disk_that_fails_is_an_error_in_a_sentence(converted, monkeypatch):
    folder = converted("mixtral")
    model, _, pager = load_streamed(folder, StreamSettings(budget_bytes=10**9))
    real = pager.store.read
    monkeypatch.setattr(pager.store, "read", lambda *_: (_ for _ in ()).throw(TQError("the disk is gone")))
    with pytest.raises(TQError, match="the disk is gone"):
        logits(model)
    monkeypatch.setattr(pager.store, "read", real)
    assert np.array_equal(logits(model), logits(load_packed(folder)[0]))


def test_a_model_whose_experts_are_separate_matrices_is_refused(converted):
    with pytest.raises(TQError, match="no quantized experts that can stay on disk"):
        load_streamed(converted("dbrx"), StreamSettings())


def test_an_automatic_budget_is_what_is_free_beside_the_rest_of_the_model(converted, monkeypatch):
    """The rest is in memory when it is asked for, and is not subtracted again."""
    folder = converted("mixtral")
    one = slots_of_each(folder)
    monkeypatch.setattr("tq.engine.model.streamed_load.SPARE_BYTES", 0)
    memory = SimpleNamespace(available=int(5.2 * one / 0.9))
    monkeypatch.setattr("tq.engine.model.streamed_load.psutil", SimpleNamespace(virtual_memory=lambda: memory))
    assert load_streamed(folder, StreamSettings())[2].most(0) == 5


def test_a_file_that_is_written_to_while_the_model_runs_is_an_error(converted, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(converted("mixtral"), folder)
    model, _, pager = load_streamed(folder, StreamSettings(budget_bytes=slots_of_each(folder)))
    logits(model)
    for path in folder.glob("*.safetensors"):
        os.utime(path, ns=(0, 1))
    with pytest.raises(TQError, match="has changed since the model was loaded"):
        logits(model)
    pager.close()


def test_shards_are_read_each_where_it_is(converted, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(converted("gpt_oss"), folder)
    whole = folder / "model.safetensors"
    tensors = sorted(mx.load(str(whole)).items())
    names = [f"model-{n}-of-3.safetensors" for n in range(1, 4)]
    for n, name in enumerate(names):
        mx.save_safetensors(str(folder / name), dict(tensors[n::3]))  # matrices, scales and biases apart
    whole.unlink()
    placed = {tensor: names[i % 3] for i, (tensor, _) in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    agree(folder, slots=(2,))
