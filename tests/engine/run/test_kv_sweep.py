"""The sweep over ways to keep keys and values: its numbers against plain evaluation and against NumPy."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from small_models import VOCAB, Loaded

from tq.engine.cache.settings import BLOCK, KVSettings
from tq.engine.events import Note, Progress
from tq.engine.run import kv_sweep
from tq.engine.run.evaluate import EvalResult, cut_windows, default_text, evaluate
from tq.engine.run.generate import prompt_cache
from tq.engine.run.kv_sweep import QualityRow, measure_quality, parse_settings
from tq.errors import TQError, UsageError

TEXT = default_text()[1]
COARSE = KVSettings(2, 2, sink=0, window=0)
FINE = KVSettings(8, 8, sink=0, window=0)


@pytest.fixture
def loaded(llama):
    return replace(llama, config={**llama.config, "max_position_embeddings": 100_000})


def sweep(loaded, kv, contexts, text=TEXT, samples=2):
    events = list(measure_quality(loaded, kv, contexts, text, samples))
    rows = {(e.kv, e.context): e for e in events if isinstance(e, QualityRow)}
    return rows, [e.message for e in events if isinstance(e, Note)], [e for e in events if isinstance(e, Progress)]


def test_the_unpacked_cache_is_what_evaluation_says_and_no_distance_from_itself(loaded):
    rows, _, _ = sweep(loaded, [("none", None)], [150], samples=3)
    (expected,) = [e for e in evaluate(loaded, TEXT, seq_len=150, samples=3) if isinstance(e, EvalResult)]
    row = rows["none", 150]
    assert row.perplexity == pytest.approx(expected.perplexity, rel=1e-4)
    assert row.perplexity_error == pytest.approx(expected.perplexity_error, rel=1e-3)
    assert (row.windows, row.kl_mean, row.kl_p99, row.top1_agreement) == (3, 0, 0, 1)


def test_fewer_bits_are_further_away(loaded):
    rows, _, _ = sweep(loaded, [("none", None), ("fine", FINE), ("coarse", COARSE)], [200])
    fine, coarse = rows["fine", 200], rows["coarse", 200]
    assert 0 < fine.kl_mean < coarse.kl_mean / 10
    assert fine.kl_p99 < coarse.kl_p99
    assert coarse.top1_agreement < fine.top1_agreement <= 1
    assert fine.perplexity == pytest.approx(rows["none", 200].perplexity, rel=0.01)


def test_divergence_is_that_of_numpy_with_the_text_read_in_blocks(loaded):
    rows, _, _ = sweep(loaded, [("coarse", COARSE)], [170], samples=1)
    window = cut_windows(loaded.tokenizer, TEXT, 170)[0]
    logits = []
    for settings in (None, COARSE):
        caches, pieces = prompt_cache(loaded.model, settings), []
        for at in range(0, 169, BLOCK):
            pieces.append(np.array(loaded.model(mx.array(window[at : min(at + BLOCK, 169)])[None], cache=caches)[0]))
        logits.append(np.concatenate(pieces).astype(np.float64))
    q, p = (
        x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
        for x in logits
    )
    kl = (np.exp(q) * (q - p)).sum(-1)
    row = rows["coarse", 170]
    assert row.kl_mean == pytest.approx(kl.mean(), rel=1e-3)
    assert row.kl_p99 == pytest.approx(np.percentile(kl, 99), rel=1e-3)
    assert row.top1_agreement == pytest.approx((q.argmax(-1) == p.argmax(-1)).mean())
    assert row.perplexity == pytest.approx(np.exp(-p[np.arange(169), window[1:]].mean()), rel=1e-4)


def test_a_text_too_short_and_a_context_too_short_are_said_so(loaded):
    rows, notes, _ = sweep(loaded, [("none", None)], [40], text="a short text")
    assert notes == [
        "the text is too short for a window of 40 tokens: no perplexity there (--text FILE)",
        "a context of 40 has no room for the needle test",
    ]
    assert rows == {}


def test_a_random_model_finds_no_needles_and_is_said_so(loaded):
    rows, notes, _ = sweep(loaded, [("none", None), ("coarse", COARSE)], [900], text="long " * 100)
    assert [rows[kv, 900].needles_found for kv in ("none", "coarse")] == [0, 0]
    assert rows["none", 900].needles == 8 and rows["none", 900].perplexity is None
    assert notes[-1] == (
        "needles in 900 tokens: this model finds 0 of 8 with its own cache, so they say nothing about packing"
    )


class History:
    """A cache that holds the tokens themselves."""

    nbytes = 0

    def __init__(self):
        self.tokens, self.state = [], []


class Reader(nn.Module):
    """Predicts what followed the last time when the last eight tokens were the same."""

    def make_cache(self):
        return [History()]

    def __call__(self, inputs, cache=None):
        tokens = cache[0].tokens
        likeliest = []
        for token in inputs[0].tolist():
            tokens.append(token)
            last = bytes(t % 256 for t in tokens[-8:])
            at = bytes(t % 256 for t in tokens[:-1]).rfind(last)
            likeliest.append(tokens[at + 8] if at >= 0 else 0)
        return mx.eye(VOCAB)[mx.array(likeliest)][None] * 9


def test_a_model_that_reads_finds_all_needles(tokenizer, tmp_path):
    rows, notes, _ = sweep(Loaded(Reader(), tokenizer, {}, tmp_path), [("none", None)], [900], text="long " * 100)
    assert (rows["none", 900].needles_found, rows["none", 900].needles) == (8, 8)
    assert not any("says" in note or "say" in note for note in notes[1:])


def test_the_questions_must_fit_the_model_too(loaded):
    tight = replace(loaded, config={**loaded.config, "max_position_embeddings": 950})
    _, notes, _ = sweep(tight, [("none", None)], [900], text="long " * 100)
    assert "a context of 900 has no room for the needle test" in notes


def test_progress_grows_to_less_than_its_total_and_rows_come_between(loaded):
    _, _, steps = sweep(loaded, [("none", None)], [130, 900], samples=2)
    done = [step.done for step in steps]
    assert done == sorted(done)
    assert {step.total for step in steps} == {130 * 2 + 900 * 3}
    assert done[-1] == 130 * 2 + 900 * 3


def test_rows_come_after_every_window(loaded):
    events = measure_quality(loaded, [("none", None)], [130], TEXT, 3)
    assert [e.windows for e in events if isinstance(e, QualityRow)] == [1, 2, 3]


def test_logits_that_are_not_finite_are_an_error(loaded):
    class Broken(nn.Module):
        layers = loaded.model.layers

        def __call__(self, inputs, cache=None):
            return mx.full((1, inputs.shape[1], VOCAB), mx.nan)

    with pytest.raises(TQError, match="with KV none gives logits that are not finite"):
        sweep(replace(loaded, model=Broken()), [("none", None)], [130])


def test_no_samples_are_refused_at_once(loaded):
    with pytest.raises(UsageError, match="samples must be 1 or more, not 0"):
        measure_quality(loaded, [("none", None)], [130], TEXT, 0)


def test_settings_are_read_with_their_codecs():
    assert parse_settings("none, K8V4,4,k4v4/affine,k3v3/qjl+lloyd-max,polar") == [
        ("none", None),
        ("k8v4", KVSettings(8, 4)),
        ("4", KVSettings(4, 4)),
        ("k4v4/affine", KVSettings(4, 4, "affine", "affine")),
        ("k3v3/qjl+lloyd-max", KVSettings(3, 3, "qjl", "lloyd-max")),
        ("polar", KVSettings(4, 4, "polar", "polar")),
    ]


@pytest.mark.parametrize("text", ["k9v9", "", "none,none", "k4v4/nothing", "none/affine", "k4v4,"])
def test_wrong_settings_are_refused(text):
    with pytest.raises(UsageError):
        parse_settings(text)


def test_steps_are_one_packed_block():
    assert kv_sweep.STEP == BLOCK
