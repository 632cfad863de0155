"""The text of a calibration: spread over the whole of it, and never that which quality is measured on."""

import numpy as np
import pytest
from small_models import BOS, byte_tokenizer

from tq.engine.run.calibrate import text as text_module
from tq.engine.run.calibrate.text import sample_windows, shipped_text
from tq.engine.run.evaluate import default_text
from tq.errors import UsageError


class Source:
    def __init__(self):
        self.config = {"max_position_embeddings": 64}


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch):
    monkeypatch.setattr(text_module, "source_tokenizer", lambda source, trust: byte_tokenizer())


def test_windows_are_spread_over_the_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + i) * 63 for i in range(20)))
    windows, sample = sample_windows(Source(), path, tokens=64 * 5 + 3)
    assert (windows.shape, sample.tokens, sample.seq_len) == ((5, 64), 320, 64)  # no longer than the context
    assert (windows[:, 0] == BOS).all()
    assert windows[0, 1] == ord("a")
    assert windows[-1, 1] == ord("t")
    assert np.ptp(np.diff(windows[:, 1])) <= 1
    _, all_of_it = sample_windows(Source(), path, tokens=10**6)
    assert all_of_it.tokens == 20 * 64


def test_a_sample_names_its_text_by_content(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).write_text(f"text {name} " * 40)
    one, two = (sample_windows(Source(), tmp_path / name, tokens=64)[1] for name in ("one", "two"))
    assert one.sha256 != two.sha256


@pytest.mark.parametrize(("options", "message"), [({"tokens": 63}, "63 tokens"), ({"seq_len": 65}, "from 2 to 64")])
def test_what_is_out_of_range_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        sample_windows(Source(), **options)


def test_quality_is_not_measured_on_what_was_calibrated_with():
    sentences = {sentence.strip() for sentence in shipped_text().split(". ") if len(sentence) > 40}
    measured = {sentence.strip() for sentence in default_text()[1].split(". ") if len(sentence) > 40}
    assert len(sentences) > 1000
    assert not sentences & measured
