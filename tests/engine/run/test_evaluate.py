"""Perplexity and KL agree with float64 NumPy, and what cannot be measured is refused."""

import json
import math

import mlx.core as mx
import numpy as np
import pytest
from small_models import BOS, VOCAB, Loaded, byte_tokenizer, tiny_llama

from tq.engine.events import Progress
from tq.engine.run import scores
from tq.engine.run.evaluate import EvalResult, default_text, evaluate, read_text
from tq.errors import TQError, UsageError

TEXT = (
    "The quick brown fox jumps over the lazy dog; πάντα ῥεῖ, as somebody said. A river is never the same twice, "
    "and neither is the fox. Sphinx of black quartz, judge my vow! 12.5 % of 96 is 12."
)


@pytest.fixture
def other(llama, tmp_path):
    """A model near `llama`: the same weights and a little noise."""
    from mlx.utils import tree_map

    model, config = tiny_llama(seed=7)
    mx.random.seed(1)
    model.update(tree_map(lambda p: p + 0.05 * mx.random.normal(p.shape), model.parameters()))
    return Loaded(model, llama.tokenizer, config, tmp_path / "other")


def result_of(*args, **options) -> EvalResult:
    *progress, result = evaluate(*args, **options)
    assert all(isinstance(event, Progress) for event in progress)
    assert [event.total for event in progress] == [result.windows] * len(progress)
    assert (progress[0].done, progress[-1].done) == (0, result.windows)
    return result


def log_softmax(logits):
    logits = np.asarray(logits, dtype=np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def windows_of(seq_len, *, bos=True, text=TEXT):
    ids = list(text.encode())
    body = seq_len - bos
    return [[BOS] * bos + ids[i : i + body] for i in range(0, len(ids) - body + 1, body)]


def numpy_scores(loaded, reference, windows):
    """Per window: negative log-likelihoods, KL(reference || model) and equal top tokens, in float64."""
    nll, kl, same = [], [], []
    for window in windows:
        log_p = log_softmax(np.array(loaded.model(mx.array([window[:-1]])))[0])
        log_q = log_softmax(np.array(reference.model(mx.array([window[:-1]])))[0])
        nll.append(-log_p[np.arange(len(window) - 1), window[1:]])
        kl.append((np.exp(log_q) * (log_q - log_p)).sum(-1))
        same.append(log_p.argmax(-1) == log_q.argmax(-1))
    return np.array(nll), np.array(kl), np.array(same)


@pytest.mark.parametrize("chunk", [1, 3 * VOCAB, 2**24])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_number_agrees_with_float64(llama, other, monkeypatch, chunk, batch_size):
    monkeypatch.setattr(scores, "_CHUNK_ELEMENTS", chunk)
    result = result_of(other, TEXT, seq_len=23, reference=llama, batch_size=batch_size, data="foxes")
    windows = windows_of(23)
    nll, kl, same = numpy_scores(other, llama, windows)
    reference_nll, _, _ = numpy_scores(llama, llama, windows)

    def error(values):
        return values.mean(1).std(ddof=1) / math.sqrt(len(values))

    assert (result.windows, result.seq_len, result.tokens) == (len(windows), 23, nll.size)
    assert result.perplexity == pytest.approx(np.exp(nll.mean()), rel=1e-5)
    assert result.perplexity_error == pytest.approx(np.exp(nll.mean()) * error(nll), rel=1e-4)
    assert result.reference_perplexity == pytest.approx(np.exp(reference_nll.mean()), rel=1e-5)
    assert result.reference_perplexity_error == pytest.approx(
        np.exp(reference_nll.mean()) * error(reference_nll), rel=1e-4
    )
    assert kl.mean() > 1e-3
    assert result.kl_mean == pytest.approx(kl.mean(), rel=1e-4)
    assert result.kl_mean_error == pytest.approx(error(kl), rel=1e-3)
    assert result.kl_median == pytest.approx(np.median(kl), rel=1e-3)
    assert result.kl_p99 == pytest.approx(np.percentile(kl, 99), rel=1e-3)
    assert result.kl_max == pytest.approx(kl.max(), rel=1e-3)
    assert 0 < same.mean() < 1
    assert result.top1_agreement == pytest.approx(same.mean())
    assert result.top1_agreement_error == pytest.approx(error(same))
    assert (result.model, result.reference, result.data) == (str(other.path), str(llama.path), "foxes")


def test_a_model_against_itself_has_no_divergence(llama):
    result = result_of(llama, TEXT, seq_len=31, reference=llama)
    assert (result.kl_mean, result.kl_max, result.top1_agreement) == (0, 0, 1)
    assert result.perplexity == result.reference_perplexity


def test_kl_is_of_the_reference_from_the_model_and_not_the_reverse(llama, tmp_path):
    sharp = Loaded(lambda x: 2 * llama.model(x), llama.tokenizer, {}, tmp_path)
    _, forward, _ = numpy_scores(llama, sharp, windows_of(40))
    _, backward, _ = numpy_scores(sharp, llama, windows_of(40))
    assert backward.mean() > 1.05 * forward.mean()
    assert result_of(llama, TEXT, seq_len=40, reference=sharp).kl_mean == pytest.approx(forward.mean(), rel=1e-4)
    assert result_of(sharp, TEXT, seq_len=40, reference=llama).kl_mean == pytest.approx(backward.mean(), rel=1e-4)


def test_a_uniform_model_has_the_vocabulary_as_perplexity(tokenizer, tmp_path):
    uniform = Loaded(lambda x: mx.full((*x.shape, VOCAB), 1e4, dtype=mx.float16), tokenizer, {}, tmp_path)
    result = result_of(uniform, TEXT, seq_len=17, reference=uniform)
    assert result.perplexity == pytest.approx(VOCAB, rel=1e-5)
    assert result.perplexity_error == pytest.approx(0, abs=1e-4)


def test_tokens_that_both_models_exclude_do_not_matter(llama, tokenizer, tmp_path):
    def padded(inputs):
        logits = llama.model(inputs)
        return mx.concatenate([logits, mx.full((*logits.shape[:2], 5), -mx.inf)], axis=-1)

    model = Loaded(padded, tokenizer, {}, tmp_path)
    result = result_of(model, TEXT, seq_len=31, reference=model)
    assert result.kl_max == 0
    assert result.perplexity == pytest.approx(result_of(llama, TEXT, seq_len=31).perplexity, rel=1e-6)


def test_without_a_bos_token_windows_are_text_only(llama):
    llama.tokenizer = byte_tokenizer(adds_bos=False)
    result = result_of(llama, TEXT, seq_len=19)
    nll, _, _ = numpy_scores(llama, llama, windows_of(19, bos=False))
    assert result.tokens == nll.size
    assert result.perplexity == pytest.approx(np.exp(nll.mean()), rel=1e-5)
    assert result.reference is None
    assert result.kl_mean is None


def test_samples_takes_the_first_windows_and_one_window_has_no_error(llama):
    nll, _, _ = numpy_scores(llama, llama, windows_of(20))
    two = result_of(llama, TEXT, seq_len=20, samples=2)
    assert two.perplexity == pytest.approx(np.exp(nll[:2].mean()), rel=1e-5)
    one = result_of(llama, TEXT, seq_len=20, samples=1)
    assert (one.windows, one.tokens, one.perplexity_error) == (1, 19, None)


def test_the_result_is_json(llama, other):
    result = result_of(other, TEXT, seq_len=30, reference=llama, data="x")
    assert EvalResult(**json.loads(json.dumps(result.to_dict(), allow_nan=False))) == result


# --- errors ---


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seq_len": 1}, "seq_len must be 2 or more, not 1"),
        ({"seq_len": 97}, "seq_len must be from 2 to 96"),
        ({"seq_len": 23, "samples": 0}, "samples must be from 1 to 9"),
        ({"seq_len": 23, "samples": 10}, "samples must be from 1 to 9"),
        ({"seq_len": 23, "batch_size": 0}, "batch_size must be 1 or more"),
    ],
)
def test_options_out_of_range_name_the_range(llama, options, says):
    assert len(windows_of(23)) == 9
    with pytest.raises(UsageError, match=says):
        evaluate(llama, TEXT, **options)


def test_too_little_text_says_how_much_is_needed(llama):
    with pytest.raises(TQError, match="has 5 tokens and one window of 32 needs 31"):
        evaluate(llama, "hello", seq_len=32)


def test_tokenizers_that_differ_are_refused(llama, other):
    from tokenizers import AddedToken

    other.tokenizer = byte_tokenizer(adds_bos=False)
    with pytest.raises(TQError, match="beginning-of-sequence"):
        evaluate(llama, TEXT, seq_len=20, reference=other)
    other.tokenizer = byte_tokenizer()
    other.tokenizer.add_tokens([AddedToken("fox")])
    with pytest.raises(TQError, match=f"{VOCAB} and {VOCAB + 1} tokens"):
        evaluate(llama, TEXT, seq_len=20, reference=other)
    llama.tokenizer = byte_tokenizer()
    llama.tokenizer.add_tokens([AddedToken("dog")])
    with pytest.raises(TQError, match="different tokens"):
        evaluate(llama, TEXT, seq_len=20, reference=other)


def test_logits_of_another_width_are_refused(llama, tmp_path):
    model, config = tiny_llama(seed=3, vocab_size=VOCAB + 5)
    wide = Loaded(model, llama.tokenizer, config, tmp_path)
    with pytest.raises(TQError, match=f"{VOCAB} tokens and the reference for {VOCAB + 5}"):
        list(evaluate(llama, TEXT, seq_len=20, reference=wide))


@pytest.mark.parametrize("broken", ["model", "reference"])
def test_logits_that_are_not_finite_name_the_model(llama, tokenizer, tmp_path, broken):
    path = tmp_path / "ruined"
    ruined = Loaded(lambda x: llama.model(x) * mx.nan, tokenizer, {}, path)
    loaded, reference = (ruined, llama) if broken == "model" else (llama, ruined)
    with pytest.raises(TQError, match="not finite, in windows 1 to 1") as error:
        list(evaluate(loaded, TEXT, seq_len=20, reference=reference))
    assert str(path) in error.value.message


# --- texts ---


def test_the_shipped_text_is_prose_of_the_promised_size():
    name, text = default_text()
    assert name
    assert 12_000 <= len(text.encode()) <= 20_000
    assert text.count("\n\n") >= 20
    assert "\ufffd" not in text


def test_read_text_takes_utf8_with_or_without_a_mark(tmp_path):
    file = tmp_path / "t.txt"
    file.write_bytes("\ufeffπάντα ῥεῖ\n".encode())
    assert read_text(file) == "πάντα ῥεῖ\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "is empty"), (b" \n\t", "is empty"), (b"caf\xe9", "not UTF-8 text: byte 3 is 0xe9"), (None, "cannot read")],
)
def test_a_text_that_cannot_be_read_says_why(tmp_path, content, says):
    file = tmp_path / "t.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(TQError, match=says) as error:
        read_text(file)
    assert str(file) in error.value.message


def test_a_folder_is_not_a_text(tmp_path):
    with pytest.raises(TQError, match="cannot read"):
        read_text(tmp_path)
