"""Several sequences in one packed cache give what each gives alone, however they are padded, joined and taken apart."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from kv_cases import relative, run, token_ids
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache
from tiny_models import build

from tq.cpu import library
from tq.engine.cache import hook
from tq.engine.cache.batch import BatchPackedKVCache
from tq.engine.cache.convert import convert_cache
from tq.engine.cache.packed import PackedKVCache
from tq.engine.cache.settings import KVSettings

needs_kernels = pytest.mark.skipif(not library.state().active, reason=f"no kernels: {library.state().reason}")
SETTINGS = KVSettings(8, 8, sink=4, window=16)
LENGTHS = (210, 3, 140)


def alone(model, prompt, following):
    """Logits of the following tokens, one by one, after a prompt that was read in one step."""
    caches = [PackedKVCache(SETTINGS) for _ in model.layers]
    if len(prompt):
        run(model, caches, prompt[None], [len(prompt)])
    return run(model, caches, following[None], [1] * len(following))[0]


def prompts():
    return [token_ids(n, seed=n)[0] for n in LENGTHS]


def caches_of(model, prompt):
    found = [PackedKVCache(SETTINGS) for _ in model.layers]
    run(model, found, prompt[None], [len(prompt)])
    return found


def merged(single):
    return [layer[0].merge(list(layer)) for layer in zip(*single, strict=True)]


@pytest.fixture(params=["hooked", "plain", pytest.param("cpu", marks=needs_kernels)])
def model(request, monkeypatch):
    """On the reference, read packed and decoded; and on the CPU kernels, which take all sequences in one call."""
    monkeypatch.setenv("TQ_BACKEND", "cpu" if request.param == "cpu" else "reference")
    monkeypatch.setenv("TQ_CPU_EXACT", "1")
    made = build("qwen3")
    if request.param != "plain":
        hook.install(made)
    return made


@pytest.fixture
def expected(model):
    following = token_ids(12, batch=3, seed=8)
    return following, [alone(model, prompt, following[b]) for b, prompt in enumerate(prompts())]


def check(model, caches, following, expected, rows=(0, 1, 2)):
    got = run(model, caches, following, [1] * following.shape[1])
    for b, row in enumerate(rows):
        assert relative(got[b], expected[row][-following.shape[1] :]) < 1e-4


def test_merged_sequences(model, expected):
    caches = merged([caches_of(model, prompt) for prompt in prompts()])
    assert type(caches[0]) is BatchPackedKVCache
    assert caches[0].offset.tolist() == list(LENGTHS)
    assert (caches[0].size(), caches[0].empty()) == (210, False)
    check(model, caches, *expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("step", [210, 64])
def test_padded_prompts(side, step, model, expected):
    padding = [max(LENGTHS) - n for n in LENGTHS]
    rows = [np.array(p) for p in prompts()]
    joined = [np.pad(r, (p, 0) if side == "left" else (0, p)) for r, p in zip(rows, padding, strict=True)]
    caches = [BatchPackedKVCache([PackedKVCache(SETTINGS) for _ in rows]) for _ in model.layers]
    for c in caches:
        if side == "left":
            c.prepare(left_padding=padding)
        else:
            c.prepare(lengths=list(LENGTHS), right_padding=padding)
    steps = [step] * (210 // step) + [210 % step] * bool(210 % step)
    run(model, caches, mx.array(np.stack(joined)), steps)
    for c in caches:
        c.finalize()
    assert caches[0].offset.tolist() == list(LENGTHS)
    following, logits = expected
    got = run(model, caches, following, [1] * following.shape[1])
    for b in range(3):  # later chunks of a prompt read packed tokens, so that steps matter a little
        assert relative(got[b], logits[b]) < (1e-4 if step == 210 else 0.01)


def test_masks_are_those_of_mlx_lm(model):
    own = BatchKVCache([0, 207, 70])
    ours = BatchPackedKVCache([PackedKVCache(SETTINGS) for _ in LENGTHS], [0, 207, 70])
    for n in (210, 1, 5):
        k = mx.zeros((3, 1, n, 32))
        assert ours.offset.tolist() == own.offset.tolist()
        mine, theirs = ours.make_mask(n), own.make_mask(n)
        seen = mx.arange(n)[:, None] >= own.left_padding[:, None, None, None] - own._idx  # rows that are tokens
        assert mx.array_equal(mine & seen, theirs & seen)
        ours.update_and_fetch(k, k), own.update_and_fetch(k, k)


def test_sequences_come_and_go(model, expected):
    following, logits = expected
    single = [caches_of(model, prompt) for prompt in prompts()]
    caches = merged(single[:1])
    run(model, caches, following[:1, :4], [1] * 4)
    others = merged(single[1:])
    run(model, others, following[1:, :4], [1, 3])
    for mine, other in zip(caches, others, strict=True):
        mine.extend(other)
    check(model, caches, following[:, 4:8], [row[:8] for row in logits])
    for c in caches:
        c.filter(mx.array([2, 0]))
    check(model, caches, following[mx.array([2, 0]), 8:10], [row[:10] for row in logits], rows=(2, 0))
    extracted = [c.extract(1) for c in caches]
    assert type(extracted[0]) is PackedKVCache
    check(model, extracted, following[:1, 10:], logits, rows=(0,))
    assert caches[0].offset.tolist() == [150, 220]  # what was taken out goes its own way


def test_copies_states_and_trimming(model, expected):
    following, logits = expected
    caches = merged([caches_of(model, prompt) for prompt in prompts()])
    run(model, caches, following[:, :6], [6])
    copies = [copy.deepcopy(caches), [BatchPackedKVCache.from_state(c.state) for c in caches]]
    for found in (caches, *copies):
        assert found[0].is_trimmable()
        assert found[0].nbytes > 0
        assert [c.trim(3) for c in found] == [3] * len(found)
        got = run(model, found, following[:, 3:], [1] * 9)
        for b in range(3):
            assert relative(got[b], logits[b][3:]) < 0.01


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_kernels)])
def test_windows_of_a_batch(backend, monkeypatch):
    """Gemma 3's sliding layers, which a short window packs too."""
    monkeypatch.setenv("TQ_BACKEND", backend)
    model = build("gemma3_text")
    hook.install(model)
    settings, following = KVSettings(8, 8, window=0), token_ids(6, batch=2, seed=8)
    model.args.sliding_window = 300

    def fresh(packed):
        caches = make_prompt_cache(model)
        return convert_cache(caches, settings) if packed else caches

    kinds = {type(c).__name__ for c in fresh(True)}
    assert kinds == {"PackedKVCache", "PackedRotatingKVCache"}
    results = []
    for packed in (False, True):
        single = []
        for n in (420, 130):
            single.append(fresh(packed))
            run(model, single[-1], token_ids(n, seed=n), [n // 2, n - n // 2])
        results.append(run(model, merged(single), following, [1, 1, 3, 1]))
    assert relative(results[1], results[0]) < 0.03


def test_mlx_lm_generates_in_batches(reference):
    from mlx_lm.generate import BatchGenerator

    model = build("qwen3")

    def generate(packed):
        generator = BatchGenerator(model, stop_tokens=[], prefill_step_size=64, completion_batch_size=2)
        given = [p.tolist() for p in prompts()]
        settings = KVSettings(8, 8) if packed else None
        caches = [
            convert_cache(make_prompt_cache(model), settings) if packed else make_prompt_cache(model) for _ in given
        ]
        uids = generator.insert(given, [9, 5, 7], caches=caches)
        answers, found = {uid: [] for uid in uids}, {}
        while responses := generator.next_generated():
            for r in responses:
                answers[r.uid].append(r.token)
                if r.finish_reason is not None:
                    found[r.uid] = r.prompt_cache
        return [answers[uid] for uid in uids], [found[uid] for uid in uids]

    own, _ = generate(False)
    ours, caches = generate(True)
    assert [len(answer) for answer in ours] == [9, 5, 7]
    # A random model is never sure: most tokens are the same all the same.
    same = [a == b for x, y in zip(own, ours, strict=True) for a, b in zip(x, y, strict=True)]
    assert np.mean(same) > 0.6
    for n, answer, cache in zip(LENGTHS, ours, caches, strict=True):
        assert type(cache[0]) is PackedKVCache
        assert cache[0].offset in (n + len(answer) - 1, n + len(answer))
