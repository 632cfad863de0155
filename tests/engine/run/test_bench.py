"""The speed benchmark: what it runs in which order, and what it makes of the times."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from small_models import Loaded

from tq.engine.cache.settings import KVSettings
from tq.engine.events import Note, Progress
from tq.engine.run import bench, memory, other_load
from tq.engine.run.bench import BenchOptions, SpeedRow, measure, text_tokens
from tq.engine.run.contenders import Contender, labels
from tq.engine.run.weights import Weights
from tq.errors import UsageError


class Recorder(nn.Module):
    """A model that keeps what it is called with: (name, first token's position, tokens)."""

    def __init__(self, model, calls, name="a"):
        super().__init__()
        self.inner, self.calls, self.name = [model], calls, name

    @property
    def layers(self):
        return self.inner[0].layers

    def __call__(self, inputs, cache=None):
        self.calls.append((self.name, cache[0].offset, inputs[0].tolist()))
        return self.inner[0](inputs, cache=cache)


@pytest.fixture
def contender(llama):
    weights = Weights(1000, 9000, 4000)
    return Contender("a", "none", llama, None, weights, load_seconds=1.0)


def unknown():
    """Where nothing can measure the memory's speed."""
    return None


def rows(contenders, options, bandwidth=unknown):
    found = {}
    for event in measure(contenders, options, bandwidth):
        if isinstance(event, SpeedRow):
            found[event.label, event.context] = event
    return found


def recorded(contender, calls, name="a"):
    loaded = replace(contender.loaded, model=Recorder(contender.loaded.model, calls, name))
    return replace(contender, label=name, loaded=loaded)


def test_a_row_for_each_context_with_the_number_of_rounds(contender):
    found = rows([contender], BenchOptions(prompt=5, generate=3, contexts=(0, 7), rounds=2))
    assert list(found) == [("a", 0), ("a", 7)]
    for row in found.values():
        assert row.rounds == 2
        assert 0 < row.prefill_tokens_per_second <= row.prefill_best
        assert 0 < row.decode_tokens_per_second <= row.decode_best
        assert row.prefill_ratio == row.decode_ratio == 1
        assert row.bandwidth_share is None
        assert row.peak_memory_bytes > 0
    assert found["a", 0].kv_bytes == 0


def test_bytes_of_keys_and_values_are_those_of_the_arrays(contender):
    from mlx_lm.models.cache import make_prompt_cache

    row = rows([contender], BenchOptions(prompt=0, generate=1, contexts=(7,), rounds=1))["a", 7]
    cache = make_prompt_cache(contender.loaded.model)
    contender.loaded.model(mx.zeros((1, 7), mx.int32), cache=cache)
    assert row.kv_bytes == sum(c.nbytes for c in cache) > 0


def test_what_is_left_out_is_none_and_not_run(contender):
    calls = []
    options = BenchOptions(prompt=5, generate=0, contexts=(0,), rounds=1)
    row = rows([recorded(contender, calls)], options)["a", 0]
    assert row.decode_tokens_per_second is row.decode_best is row.decode_ratio is row.bandwidth_share is None
    assert {len(tokens) for _, _, tokens in calls} == {4, 1}
    calls.clear()
    row = rows([recorded(contender, calls)], replace(options, prompt=0, generate=4))["a", 0]
    assert row.prefill_tokens_per_second is row.prefill_best is row.prefill_ratio is None
    assert {len(tokens) for _, _, tokens in calls} == {1}


@pytest.mark.parametrize("behind", [0, 9])
def test_every_round_reads_and_generates_the_same_tokens_behind_the_context(contender, behind):
    calls = []
    options = BenchOptions(prompt=6, generate=4, contexts=(behind,), rounds=3)
    rows([recorded(contender, calls)], options)
    text = text_tokens(contender.loaded.tokenizer, behind + 20)
    expected = [("a", behind, text[behind : behind + 5]), ("a", behind + 5, text[behind + 5 : behind + 6])]
    expected += [("a", behind + n, [text[behind + n]]) for n in range(5)]
    fill = [("a", 0, text[:behind])] if behind else []
    assert calls == fill + expected * 4  # once without a clock


def test_contenders_take_turns_and_the_order_changes(contender):
    calls = []
    both = [recorded(contender, calls, name) for name in "ab"]
    rows(both, BenchOptions(prompt=2, generate=0, contexts=(0,), rounds=3))
    names = [name for name, _, tokens in calls][2 * 2 :: 2]  # two calls each, after those without a clock
    assert names == list("abbaab")


def test_ratios_are_medians_of_each_rounds_ratio():
    # A machine that gets ten times slower after the first round.
    assert bench._ratio([20.0, 2.0, 2.2], [10.0, 1.0, 1.0]) == 2.0
    assert bench._ratio([20.0], [10.0, 1.0]) == 2.0
    assert bench._ratio([], [1.0]) is None


def test_the_share_of_bandwidth_counts_weights_and_cache(contender):
    speeds = iter([0.5e-3, 1e-3, 0.7e-3])
    options = BenchOptions(prompt=0, generate=2, contexts=(7,), rounds=3)
    row = rows([contender], options, bandwidth=lambda: next(speeds))["a", 7]
    assert row.read_gb_s == 1e-3  # the best of the rounds
    assert row.bandwidth_share == pytest.approx((4000 + row.kv_bytes) * row.decode_best / 1e6)
    unknown = replace(contender, weights=Weights(1000, 9000, None))
    assert rows([unknown], BenchOptions(0, 2, (7,), 1), bandwidth=lambda: 1.0)["a", 7].bandwidth_share is None


def test_rows_come_as_soon_as_something_is_measured(contender):
    seen = [e for e in measure([contender], BenchOptions(2, 2, (0,), 3), unknown) if isinstance(e, SpeedRow)]
    assert [row.rounds for row in seen] == [1, 2, 3]


def test_progress_reaches_its_total(contender):
    steps = [e for e in measure([contender], BenchOptions(2, 2, (0, 3), 2), unknown) if isinstance(e, Progress)]
    assert [step.done for step in steps] == list(range(6)) + [6]
    assert {step.total for step in steps} == {6}


@pytest.mark.parametrize("family", ["mamba", "recurrent_gemma"])
def test_caches_that_cannot_be_trimmed_go_back_to_the_context_too(family, contender, tokenizer, tmp_path, monkeypatch):
    from mlx_lm.utils import _get_classes
    from tiny_models import CONFIGS

    config = dict(CONFIGS[family])
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    mx.eval(model.parameters())
    own = replace(contender, loaded=Loaded(model, tokenizer, config, tmp_path))
    vocabulary = config["vocab_size"]
    monkeypatch.setattr(bench, "text_tokens", lambda tokenizer, n: [i * 7 % vocabulary for i in range(n)])
    lengths = []
    steps = bench.steps
    monkeypatch.setattr(
        bench, "steps", lambda model, prompt, limit, context, *rest: (
            lengths.append(len(context.tokens)) or steps(model, prompt, limit, context, *rest)
        )
    )  # fmt: skip
    rows([own], BenchOptions(prompt=4, generate=3, contexts=(9,), rounds=2))
    assert lengths == [9] * 6


def test_packed_caches_are_smaller(contender):
    loaded = replace(contender.loaded, config={**contender.loaded.config, "max_position_embeddings": 4096})
    plain = replace(contender, label="none", loaded=loaded)
    packed = replace(plain, label="k8v4", kv="k8v4", settings=KVSettings(8, 4, sink=0, window=0))
    found = rows([plain, packed], BenchOptions(prompt=3, generate=2, contexts=(512,), rounds=1))
    assert 0 < found["k8v4", 512].kv_bytes < found["none", 512].kv_bytes


def test_a_context_that_is_too_long_is_refused_before_anything_runs(contender):
    with pytest.raises(UsageError, match="a context of 90 tokens and 10 more do not fit a, which takes 96") as error:
        measure([contender], BenchOptions(prompt=10, generate=2, contexts=(0, 90)), unknown)
    assert error.value.hint == "--context 86 is the longest that does"
    measure([contender], BenchOptions(prompt=10, generate=2, contexts=(86,)), unknown)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": -1}, "prompt must be 0 or more, not -1"),
        ({"generate": -3}, "generate must be 0 or more, not -3"),
        ({"rounds": 0}, "rounds must be 1 or more, not 0"),
        ({"prompt": 0, "generate": 0}, "there is nothing to measure"),
        ({"contexts": (0, -2)}, "contexts must be 0 or more, not 0, -2"),
        ({"contexts": ()}, "contexts must be 0 or more, not none"),
        ({"contexts": (4, 4)}, "contexts 4, 4 have one twice"),
    ],
)
def test_nonsense_is_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        BenchOptions(**fields)


def test_text_goes_on_as_long_as_it_must(tokenizer):
    short, long = text_tokens(tokenizer, 10), text_tokens(tokenizer, 50_000)
    assert len(short) == 10 and len(long) == 50_000
    assert long[:10] == short and short[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in long[1:]


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        (["/x/one", "/x/two/"], ["one", "two"]),
        (["/x/one", "/y/one"], ["/x/one", "/y/one"]),
        (["/x/one", "/x/one"], ["one", "one (2)"]),
        (["one"], ["one"]),
    ],
)
def test_labels_are_as_short_as_they_can_be(models, expected):
    assert labels(models) == expected


@pytest.mark.skipif(memory.on_gpu(), reason="about the memory of the process")
def test_a_peak_can_be_forgotten():
    if not memory.start_peak():
        pytest.skip("this system keeps peaks")
    before = memory.held_bytes()
    block = np.ones(2**23)  # 64 MB
    high = memory.peak_bytes()
    assert high >= before + 0.9 * block.nbytes
    del block
    memory.settle()
    memory.start_peak()
    assert memory.peak_bytes() < high - 0.5 * 2**26


def test_other_load_is_what_this_process_did_not_take(monkeypatch):
    now = iter([(10.0, 5.0, 100.0), (40.0, 15.0, 200.0)])
    monkeypatch.setattr(other_load.OtherLoad, "_now", staticmethod(lambda: next(now)))
    assert other_load.OtherLoad().percent() == 20.0


def test_other_load_is_a_percentage_here():
    assert 0 <= other_load.OtherLoad().percent() <= 100


def test_systems_that_keep_peaks_are_said_so(contender, monkeypatch):
    monkeypatch.setattr(memory, "start_peak", lambda: False)
    notes = [e.message for e in measure([contender], BenchOptions(2, 2, (0,), 1), unknown) if isinstance(e, Note)]
    assert notes == ["this system does not say how much memory a part of a run takes: peaks are of all so far"]
