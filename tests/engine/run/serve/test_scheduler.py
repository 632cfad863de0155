"""Several requests at once give what each gives alone, nobody waits for ever, and failures stay where they are."""

import itertools
import math
import threading
from concurrent.futures import Future

import mlx.core as mx
import numpy as np
import pytest
from served_models import Gate, chat, ended, text, user
from small_models import BOS, EOS, VOCAB

from tq.engine.cache.settings import KVSettings
from tq.engine.run.generate import Token, generate, open_context
from tq.engine.run.sampling import GenerateOptions
from tq.engine.run.serve import scheduler as scheduler_module
from tq.engine.run.serve import worker
from tq.engine.run.serve.requests import Busy, Done, Piece, Reading, Request
from tq.engine.run.serve.stream import Stream
from tq.errors import TQError, UsageError

PROMPTS = [[BOS, *range(40, 40 + n)] for n in (70, 3, 150, 20, 1)]
LIMITS = [9, 14, 4, 11, 16]
PACKED = KVSettings(8, 8, sink=4, window=16)


def alone(loaded, prompt, n, kv=None):
    """Token ids of a prompt that is read in the chunks of the server, with nobody else there."""
    from tq.engine.run import decode

    context = open_context(loaded.model, kv)
    for _ in decode.prefill(loaded.model, context, prompt[:-1], 32):
        pass
    events = generate(loaded, prompt, GenerateOptions(max_tokens=n), context=context)
    return [event.token_id for event in events if isinstance(event, Token)]


@pytest.fixture
def even(monkeypatch):
    """Reading and answering take turns whatever time they take: a chunk, then a token."""
    monkeypatch.setattr(worker, "perf_counter", lambda: 0.0)


# --- the same answers ---


@pytest.mark.parametrize("mode", ["batch", "turns"])
@pytest.mark.parametrize(
    ("kind", "kv"),
    [("qwen3", None), ("qwen3", PACKED), ("gemma3_text", None), ("qwen3_next", None), ("mamba2", None)],
    ids=["plain", "packed", "windows", "hybrid", "recurrent"],
)
def test_requests_at_once_are_answered_as_alone(model_of, serve, even, kind, kv, mode):
    loaded = model_of(kind)
    expected = [alone(loaded, prompt, n, kv) for prompt, n in zip(PROMPTS, LIMITS, strict=True)]
    scheduler = serve(loaded, kv, mode=mode, max_batch=3, prefill_step=32)
    assert scheduler.stats().mode == mode
    streams = [scheduler.submit(text(prompt, n)) for prompt, n in zip(PROMPTS, LIMITS, strict=True)]
    found = [ended(stream) for stream in streams]
    assert [tokens for _, tokens, _ in found] == expected
    assert [done.completion_tokens for _, _, done in found] == [len(tokens) for tokens in expected]
    assert max(batch for batch, _ in loaded.model.watch.calls) == (3 if mode == "batch" else 1)


def test_contexts_that_are_packed_from_some_length_on_have_a_batch_of_their_own(model_of, serve):
    loaded = model_of("qwen3")
    kv = KVSettings(8, 8, sink=4, window=16, start=80)
    prompts = (PROMPTS[1], PROMPTS[2], PROMPTS[0])  # the last one gets there with its answer
    expected = [alone(loaded, prompt, 16, kv) for prompt in prompts]
    scheduler = serve(loaded, kv, mode="batch", prefill_step=32)
    streams = [scheduler.submit(text(prompt, 16)) for prompt in prompts]
    assert [ended(stream)[1] for stream in streams] == expected


@pytest.mark.parametrize("mode", ["batch", "turns"])
def test_a_seed_gives_the_same_answer_whatever_else_runs(model_of, serve, mode):
    scheduler = serve(model_of("qwen3"), mode=mode, prefix_bytes=0)
    how = {"n": 20, "temp": 1.0, "top_p": 0.95, "top_k": 100, "min_p": 0.001}
    first = ended(scheduler.submit(text("abc", seed=3, **how)))[1]
    others = [scheduler.submit(text("xyz" * n, **how)) for n in (1, 5)]
    again, other = scheduler.submit(text("abc", seed=3, **how)), scheduler.submit(text("abc", seed=4, **how))
    assert ended(again)[1] == first
    assert ended(other)[1] != first
    for stream in others:
        ended(stream)
    assert ended(scheduler.submit(text("abc", **how)))[1] != ended(scheduler.submit(text("abc", **how)))[1]


def test_log_probabilities_are_those_of_the_model(model_of, serve):
    loaded = model_of("qwen3")
    prompt = [BOS, 70, 71, 72]
    stream = serve(loaded, mode="batch").submit(text(prompt, 3, top_logprobs=4))
    tokens = [token for event in stream if isinstance(event, Piece) for token in event.tokens]
    assert len(tokens) == 3
    for token in tokens:
        logits = np.array(loaded.model(mx.array([prompt]))[0, -1], dtype=np.float64)
        logprobs = logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())
        best = np.argsort(-logprobs)[:4]
        assert [i for i, _, _ in token.top] == best.tolist()
        assert [p for _, _, p in token.top] == pytest.approx(logprobs[best].tolist(), abs=1e-4)
        assert (token.token_id, token.logprob) == (best[0], pytest.approx(logprobs[best[0]], abs=1e-4))
        assert token.text == loaded.tokenizer.decode([token.token_id])
        prompt.append(token.token_id)


def test_defaults_fill_what_a_request_leaves_open(model_of, serve):
    loaded = model_of("qwen3")
    scheduler = serve(loaded, default_options=GenerateOptions(temp=1.5))
    greedy = ended(scheduler.submit(text("abc", 20, temp=0.0)))[1]
    assert ended(scheduler.submit(text("abc", 20, temp=0.0)))[1] == greedy
    assert ended(scheduler.submit(text("abc", 20)))[1] != greedy


# --- ends ---


def test_stop_strings_and_what_stopped(say, serve):
    scheduler = serve(say("one END two", prompt_length=4))
    said, _, done = ended(scheduler.submit(text("abc", 30, stop=("zz", "END"))))
    assert (said, done.reason, done.stop_text) == ("one ", "stop", "END")


@pytest.mark.parametrize("detokenizer", ["BPEStreamingDetokenizer", "NaiveStreamingDetokenizer"])
def test_what_continues_a_text_is_what_the_model_wrote(say, serve, detokenizer):
    from mlx_lm import tokenizer_utils
    from small_models import byte_tokenizer

    made = byte_tokenizer(detokenizer=getattr(tokenizer_utils, detokenizer))
    made._think_start, made._think_end = "<think>", "</think>"
    made._think_start_tokens, made._think_end_tokens = (300,), (301,)
    answer = "  Paris <think> hm</think>\n\n yes <tool_call>{"
    done = ended(serve(say(answer, prompt_length=4, tokenizer=made)).submit(text("abc", 100)))
    assert done[0] == answer
    last = {"role": "assistant", "content": "The capital is"}
    length = len(made.apply_chat_template([user("a"), last], continue_final_message=True))
    loaded = say(" Paris", prompt_length=length, tokenizer=made)
    assert ended(serve(loaded).submit(chat("a", last, continue_last=True)))[0] == " Paris"


def test_a_prompt_that_is_too_long_is_refused_without_a_word_on_stderr(llama, serve, caplog):
    import logging

    llama.tokenizer.model_max_length = 96
    llama.tokenizer.deprecation_warnings.clear()
    logger = logging.getLogger("transformers.tokenization_utils_base")
    logger.addHandler(caplog.handler)
    try:
        with pytest.raises(UsageError, match="this model takes 1 to 95"):
            serve(llama).submit(text("x" * 200))
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.text == ""


def test_the_end_of_sequence_is_counted_and_not_shown(say, serve):
    said, tokens, done = ended(serve(say("Hi", prompt_length=4)).submit(text("abc")))
    assert (said, tokens) == ("Hi", [*b"Hi", EOS])
    assert (done.reason, done.stop_text, done.prompt_tokens, done.completion_tokens) == ("stop", None, 4, 3)


def test_an_answer_ends_where_the_context_does(llama, serve):
    _, tokens, done = ended(serve(llama).submit(text([65] * 90, 50, min_tokens=50)))
    assert (len(tokens), done.reason) == (6, "length")


def test_a_call_of_a_tool_is_the_reason(say, serve, tool_tokenizer):
    answer = 'Wait.\n<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
    tools = ({"type": "function", "function": {"name": "f"}},)
    prompt = len(tool_tokenizer.apply_chat_template([user("a")], tools=list(tools), add_generation_prompt=True))
    loaded = say(answer, prompt_length=prompt, tokenizer=tool_tokenizer)
    events = list(serve(loaded).submit(chat("a", n=100, tools=tools)))
    assert "".join(e.text for e in events if isinstance(e, Piece)).strip() == "Wait."
    (call,) = [e for e in events if type(e).__name__ == "ToolCall"]
    assert (call.name, call.arguments) == ("f", '{"x": 1}')
    assert events[-1].reason == "tool_calls"


@pytest.mark.parametrize("mode", ["batch", "turns"])
def test_a_cancelled_request_ends_and_the_others_go_on(model_of, serve, mode):
    loaded = model_of("qwen3")
    expected = alone(loaded, PROMPTS[1], 30)
    scheduler = serve(loaded, mode=mode)
    gate = Gate(loaded.model)
    streams = [scheduler.submit(text(prompt, 30)) for prompt in (PROMPTS[0], PROMPTS[1], PROMPTS[3])]
    streams[0].cancel()
    gate.open()
    for event in streams[2]:
        if isinstance(event, Piece):
            streams[2].cancel()
    assert event.reason == "cancelled"
    done = ended(streams[0])[2]
    assert (done.reason, done.completion_tokens) == ("cancelled", 0)
    assert ended(streams[1])[1] == expected
    stats = scheduler.stats()
    assert (stats.running, stats.kv_bytes, stats.cancelled, stats.finished) == (0, 0, 2, 1)


def test_a_cancelled_request_that_waits_never_reaches_the_model(model_of, serve):
    loaded = model_of("qwen3")
    scheduler = serve(loaded, max_batch=1)
    gate = Gate(loaded.model)
    first, second = scheduler.submit(text(PROMPTS[3], 4)), scheduler.submit(text(PROMPTS[2], 4))
    second.cancel()
    gate.open()
    assert ended(first)[2].reason == "length"
    assert ended(second)[2] == Done("cancelled", None, 151, 0, 0, 0.0, 0.0)
    assert loaded.model.tokens_read == 20


def test_closing_ends_what_runs_and_refuses_more(model_of, serve):
    loaded = model_of("qwen3")
    scheduler = serve(loaded, max_batch=1)
    gate = Gate(loaded.model)
    streams = [scheduler.submit(text(prompt, 1000)) for prompt in PROMPTS[:2]]
    assert gate.reached.wait(60)
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    gate.open()
    assert [ended(stream)[2].reason for stream in streams] == ["cancelled"] * 2
    closing.join(60)
    assert not closing.is_alive()
    with pytest.raises(TQError, match="stopping"):
        scheduler.submit(text("a"))
    scheduler.close()  # twice is no mistake


def test_ctrl_c_while_it_begins_ends_its_thread(llama, serve, monkeypatch):
    class Interrupted(Future):
        def result(self, timeout=None):
            super().result(timeout)
            raise KeyboardInterrupt

    monkeypatch.setattr(scheduler_module, "Future", Interrupted)
    before = set(threading.enumerate())
    tried = threading.Thread(target=pytest.raises, args=(KeyboardInterrupt, serve, llama), daemon=True)
    tried.start()
    tried.join(60)
    assert not set(threading.enumerate()) - before


# --- limits and failures ---


def test_as_many_requests_wait_as_may(model_of, serve):
    loaded = model_of("qwen3")
    scheduler = serve(loaded, max_batch=1, max_queue=1)
    gate = Gate(loaded.model)
    streams = [scheduler.submit(text("abc", 2)) for _ in range(2)]
    with pytest.raises(Busy, match="wait already"):
        scheduler.submit(text("abc", 2))
    gate.open()
    assert [ended(stream)[2].reason for stream in streams] == ["length"] * 2
    assert ended(scheduler.submit(text("abc", 2)))[2].completion_tokens == 2


@pytest.mark.parametrize(("mode", "failing"), [("turns", 1), ("batch", 2)])
def test_a_failure_reaches_those_it_concerns_and_the_next_request_is_answered(model_of, serve, mode, failing):
    loaded = model_of("qwen3")
    scheduler = serve(loaded, mode=mode)
    steps = []

    def fail(inputs):
        steps.append(tuple(inputs.shape))
        if steps.count((2, 1) if mode == "batch" else (1, 1)) == 3:
            loaded.model.watch.before = None
            raise RuntimeError("out of luck\nand more")

    gate = Gate(loaded.model)
    streams = [scheduler.submit(text(prompt, 60, min_tokens=60)) for prompt in (PROMPTS[0], PROMPTS[3])]
    assert gate.reached.wait(60)
    loaded.model.watch.before = fail
    gate.open()
    failed = 0
    for stream in streams:
        try:
            assert len(ended(stream)[1]) == 60
        except TQError as error:
            assert error.message == "generation failed: out of luck"
            failed += 1
    assert failed == failing
    assert scheduler.stats().failed == failing
    assert len(ended(scheduler.submit(text(PROMPTS[0], 12)))[1]) == 12
    assert scheduler.stats().running == 0


def test_whoever_waits_is_told_even_if_a_context_cannot_be_kept(model_of, serve, monkeypatch):
    scheduler = serve(model_of("qwen3"))

    def fail(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(scheduler._worker.prefixes, "add", fail)
    stream = scheduler.submit(text("abc", 3))
    assert stream.end(60).completion_tokens == 3
    monkeypatch.undo()
    assert ended(scheduler.submit(text("abc", 3)))[2].completion_tokens == 3


def test_a_prompt_that_fails_leaves_the_others_alone(model_of, serve):
    loaded = model_of("qwen3")
    scheduler = serve(loaded, mode="batch", prefill_step=32)

    def fail(inputs):
        if inputs.shape[1] == 22:  # the end of the longest prompt
            raise MemoryError

    loaded.model.watch.before = fail
    streams = [scheduler.submit(text(prompt, 6)) for prompt in (PROMPTS[2], PROMPTS[0])]
    with pytest.raises(TQError, match="MemoryError"):
        ended(streams[0])
    assert len(ended(streams[1])[1]) == 6


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request(), "either messages or a prompt"),
        (Request(messages=(user("a"),), prompt="b"), "either messages or a prompt"),
        (Request(messages=()), "no messages"),
        (Request(messages=({"content": "a"},)), "needs a role"),
        (Request(messages=({"role": "user", "content": [1]},)), "must be text, not list"),
        (Request(prompt=()), "prompt is empty"),
        (Request(prompt=(1, VOCAB)), f"from 0 to {VOCAB - 1}, not {VOCAB}"),
        (text("a", top_logprobs=21), "top_logprobs must be from 0 to 20, not 21"),
        (chat("a", tools=({"type": "function"},)), "knows no tools"),
        (chat("a", continue_last=True), "only a last message of the assistant"),
        (text([65] * 96), "the prompt has 96 tokens and this model takes 1 to 95"),
    ],
)
def test_what_cannot_be_asked(llama, serve, request_, says):
    with pytest.raises(UsageError, match=says):
        serve(llama).submit(request_)


@pytest.mark.parametrize("bad", [{"max_batch": 0}, {"max_queue": -1}, {"prefill_step": 0}, {"prefix_bytes": -1}])
def test_limits_out_of_range(llama, serve, bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        serve(llama, **bad)


def test_a_model_without_a_chat_template_takes_texts(say, serve):
    from small_models import byte_tokenizer

    scheduler = serve(say("ok", prompt_length=4, tokenizer=byte_tokenizer(chat_template=None)))
    assert not scheduler.facts.has_chat_template
    assert any("no chat template" in note for note in scheduler.facts.notes)
    with pytest.raises(UsageError, match="no chat template"):
        scheduler.submit(chat("a"))
    assert ended(scheduler.submit(text("abc")))[0] == "ok"


# --- fairness ---


@pytest.mark.parametrize("mode", ["batch", "turns"])
def test_a_short_request_does_not_wait_for_a_long_prompt(model_of, serve, monkeypatch, mode):
    loaded = model_of("qwen3")
    scheduler = serve(loaded, mode=mode, prefill_step=16)
    order = []
    put = Stream.put
    monkeypatch.setattr(Stream, "put", lambda stream, event: (order.append((stream, event)), put(stream, event))[1])
    gate = Gate(loaded.model)
    long = scheduler.submit(text([BOS, *[70, 80] * 400], 2))
    assert gate.reached.wait(60)
    short = scheduler.submit(text("abc", 3))
    gate.open()
    assert ended(short)[2].completion_tokens == 3
    assert ended(long)[2].completion_tokens == 2
    read = [e.done for stream, e in order if stream is long and isinstance(e, Reading)]
    assert read == sorted(read)
    assert read[-1] == 800
    before = [e.done for stream, e in order[: order.index((short, order_done(order, short)))] if stream is long]
    assert before[-1] < 400


def order_done(order, stream):
    return next(event for found, event in order if found is stream and isinstance(event, Done))


def test_answers_go_on_while_a_prompt_is_read(model_of, serve, even):
    loaded = model_of("qwen3")
    scheduler = serve(loaded, mode="turns", prefill_step=16)
    first = scheduler.submit(text("abc", 200, min_tokens=200))
    next(event for event in first if isinstance(event, Piece))
    scheduler.submit(text([BOS, *[70, 80] * 200], 1)).wait(0)
    ended(first)
    calls = loaded.model.watch.calls
    chunks = [n for n, (_, length) in enumerate(calls) if length == 16]
    assert len(chunks) > 2
    assert all(b > a + 1 for a, b in itertools.pairwise(chunks[:6]))  # a token at least between two chunks
