"""`tq eval`: the numbers for people and for programs, and the text they come from."""

import json

import pytest

from tq.commands.eval import with_error


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 8)
    return path


def test_perplexity_with_its_error_and_the_window(tq, checkpoint, text):
    result = tq("eval", "-m", checkpoint, "--data", text, "--seq-len", "32", "--samples", "4")
    assert result.code == 0
    lines = {line[:10].strip(): line for line in result.out.splitlines()}
    assert f"{text}, 4 windows of 32 tokens" in lines["text"]
    assert " ± " in lines["perplexity"]


def test_a_model_is_no_distance_from_itself(tq, checkpoint, text):
    arguments = ["eval", "-m", checkpoint, "--reference", checkpoint, "--data", text, "--seq-len", "32"]
    document = json.loads(tq(*arguments, "--json").out)
    assert (document["model"], document["reference"]) == (str(checkpoint), str(checkpoint))
    assert document["kl_max"] < 1e-5
    assert document["top1_agreement"] == 1
    assert document["perplexity"] == pytest.approx(document["reference_perplexity"])
    shown = tq(*arguments).out
    assert "KL mean" in shown and "same first choice" in shown


def test_packed_keys_and_values_cost_little(tq, checkpoint, text):
    arguments = ["eval", "-m", checkpoint, "--data", text, "--seq-len", "200", "--samples", "1", "--json"]
    plain = json.loads(tq(*arguments).out)["perplexity"]
    packed = json.loads(tq(*arguments, "--kv-bits", "8", "--kv-sink", "0").out)["perplexity"]
    assert packed != plain
    assert packed == pytest.approx(plain, rel=0.01)


def test_the_text_that_ships_is_the_default(tq, checkpoint):
    result = tq("eval", "-m", checkpoint, "--seq-len", "32", "--samples", "2", "--json")
    assert json.loads(result.out)["data"] == "eval.txt of tq"


def test_mistakes_are_sentences(tq, checkpoint, text):
    assert tq("eval", "-m", checkpoint, "--data", "./none.txt").code == 1
    assert tq("eval", "-m", checkpoint, "--data", text, "--seq-len", "1").code == 2
    assert tq("eval", "-m", checkpoint, "--data", text, "--samples", "999", "--seq-len", "32").code == 2


def test_errors_are_shown_when_there_are_any():
    assert with_error(16.7234, 0.3123) == "16.72 ± 0.31"
    assert with_error(16.7234, None) == "16.72"
    assert with_error(0.98765, 0.0123, " %", 100) == "98.77 ± 1.2 %"
