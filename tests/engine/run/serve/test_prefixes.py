"""What was read once is not read again: after a request, beside one, at the same time, and after a restart."""

import pytest
from served_models import Gate, chat, ended, text
from small_models import BOS

from tq.engine.cache.prompts import PromptCache
from tq.engine.cache.settings import KVSettings
from tq.engine.run.generate import open_context
from tq.engine.run.serve import prefixes as module
from tq.engine.run.serve.prefixes import Prefixes
from tq.engine.run.serve.requests import Piece

LONG = [BOS, *[60, 61, 62, 63, 64] * 30]  # 151 tokens
SYSTEM = {"role": "system", "content": "You answer in verse, and never in prose, whatever a person may ask you for."}
PACKED = KVSettings(8, 8, sink=4, window=16)
KINDS = ["qwen3", "gemma3_text", "qwen3_next", "mamba2"]


def fresh(serve, loaded, request, **how):
    """The tokens of an answer without anything that was read before."""
    return ended(serve(loaded, prefix_bytes=0, **how).submit(request))[1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_prompt_again_is_not_read_again(model_of, serve, kind):
    loaded = model_of(kind)
    scheduler = serve(loaded)
    _, first, done = ended(scheduler.submit(text(LONG, 6)))
    assert done.cached_tokens == 0
    loaded.model.clear()
    _, again, done = ended(scheduler.submit(text(LONG, 6)))
    assert (again, done.cached_tokens, loaded.model.tokens_read) == (first, 150, 0)
    assert scheduler.stats().cached_tokens == 150


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_turn_of_a_conversation_reads_what_is_new(model_of, serve, kind):
    loaded = model_of(kind)
    scheduler = serve(loaded, prefill_step=40)
    turns = [SYSTEM, "What is a sonnet?", {"role": "assistant", "content": "A little song."}, "And a haiku?"]
    before = loaded.tokenizer.encode("system:" + SYSTEM["content"] + "<turn>user:What is a sonnet?<turn>assistant:")
    ended(scheduler.submit(chat(*turns[:2], n=5)))
    _, tokens, done = ended(scheduler.submit(chat(*turns, n=5, top_logprobs=0)))
    assert len(before) <= done.cached_tokens + 1 <= len(before) + 5
    assert tokens == fresh(serve, loaded, chat(*turns, n=5, top_logprobs=0), prefill_step=40)
    *_, done = ended(scheduler.submit(chat(SYSTEM, "Something else?", n=1)))
    if kind != "gemma3_text":  # its first mark has been dropped
        assert done.cached_tokens >= len(SYSTEM["content"])


@pytest.mark.parametrize("mode", ["batch", "turns"])
@pytest.mark.parametrize("kv", [None, PACKED], ids=["plain", "packed"])
def test_what_an_answer_in_progress_has_read_is_copied(model_of, serve, mode, kv):
    loaded = model_of("qwen3")
    request = text([*LONG, 70, 71], 6)
    expected = fresh(serve, loaded, request, kv=kv, mode=mode)
    scheduler = serve(loaded, kv, mode=mode, prefix_bytes=0)
    first = scheduler.submit(text([*LONG, 80], 300, min_tokens=300))
    next(event for event in first if isinstance(event, Piece))
    _, tokens, done = ended(scheduler.submit(request))
    assert done.cached_tokens == len(LONG)
    if kv is None:  # packed tokens are read where the others were not yet
        assert tokens == expected
    first.cancel()
    assert ended(first)[2].reason == "cancelled"


@pytest.mark.parametrize("kind", ["qwen3", "mamba2"])
def test_a_prompt_that_two_ask_for_at_once_is_read_once(model_of, serve, kind):
    loaded = model_of(kind)
    requests = [text([*LONG, *tail], 6) for tail in ([70] * 9, [80] * 12, [])]
    expected = [fresh(serve, loaded, request, prefill_step=40) for request in requests]
    scheduler = serve(loaded, prefill_step=40)
    gate = Gate(loaded.model)
    streams = [scheduler.submit(request) for request in requests]
    gate.open()
    found = [ended(stream) for stream in streams]
    assert [tokens for _, tokens, _ in found] == expected
    assert sum(done.prompt_tokens - 1 - done.cached_tokens for *_, done in found) < len(LONG) + 9 + 12
    assert loaded.model.tokens_read < 1.2 * len(LONG)


def test_whoever_waits_for_a_reader_that_goes_away_reads_on(model_of, serve):
    loaded = model_of("qwen3")
    expected = fresh(serve, loaded, text([*LONG, 70], 6), prefill_step=40)
    scheduler = serve(loaded, prefill_step=40)
    gate = Gate(loaded.model)
    first, second = scheduler.submit(text([*LONG, 80], 6)), scheduler.submit(text([*LONG, 70], 6))
    assert gate.reached.wait(60)
    first.cancel()
    gate.open()
    assert ended(second)[1] == expected
    assert ended(first)[2].reason == "cancelled"


def test_the_budget_holds_and_what_was_used_longest_ago_goes(model_of, serve):
    loaded = model_of("qwen3")
    prompts = [[BOS, *[50 + n] * 100] for n in range(4)]
    scheduler = serve(loaded, mode="turns")
    ended(scheduler.submit(text(prompts[0], 2)))
    size = scheduler.stats().prefix_bytes
    assert size > 0
    scheduler = serve(loaded, mode="turns", prefix_bytes=int(3.5 * size))
    for prompt in prompts:  # the last one takes the room of the first while it runs
        ended(scheduler.submit(text(prompt, 2)))
        assert scheduler.stats().prefix_bytes <= scheduler.stats().prefix_budget_bytes
    assert scheduler.stats().prefix_entries == 3
    cached = [ended(scheduler.submit(text(prompts[n], 2)))[2].cached_tokens for n in (3, 2, 1, 0)]
    assert cached == [100, 100, 100, 0]


def test_no_budget_keeps_nothing(model_of, serve):
    scheduler = serve(model_of("qwen3"), prefix_bytes=0)
    for _ in range(2):
        *_, done = ended(scheduler.submit(text(LONG, 2)))
        assert done.cached_tokens == 0
    assert (scheduler.stats().prefix_entries, scheduler.stats().prefix_bytes) == (0, 0)


def test_kept_contexts_go_when_memory_is_short(model_of, serve, monkeypatch):
    scheduler = serve(model_of("qwen3"))
    ended(scheduler.submit(text(LONG, 2)))
    assert scheduler.stats().prefix_entries == 1
    monkeypatch.setattr(module, "memory_is_short", lambda: True)
    ended(scheduler.submit(text("abc", 2)))
    assert scheduler.stats().prefix_entries == 0


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_next"])
def test_a_system_message_is_found_on_disk_after_a_restart(model_of, serve, tmp_path, kind):
    loaded = model_of(kind)

    def store():
        return PromptCache(tmp_path / "prompts", 10**9, "a" * 64)

    scheduler = serve(loaded, prompts=store())
    ended(scheduler.submit(chat(SYSTEM, "What is a sonnet?", n=3)))
    scheduler.close()
    scheduler = serve(loaded, prompts=store())
    request = chat(SYSTEM, "And a haiku?", n=3, top_logprobs=0)
    _, tokens, done = ended(scheduler.submit(request))
    assert done.cached_tokens == len(loaded.tokenizer.encode("system:" + SYSTEM["content"] + "<turn>user:"))
    assert tokens == fresh(serve, loaded, request)


# --- by itself ---


def context_of(loaded, tokens):
    context = open_context(loaded.model, None)
    loaded.model.inner(_array(tokens), cache=context.caches)
    context.tokens = list(tokens)
    return context


def _array(tokens):
    import mlx.core as mx

    return mx.array([tokens])


def test_the_longest_beginning_is_taken_and_what_holds_more_stays(model_of):
    loaded = model_of("qwen3")
    kept = Prefixes(10**9)
    for tokens in (LONG[:100], [*LONG[:90], *[9] * 20], LONG[:10]):
        kept.add(context_of(loaded, tokens))
    assert len(kept) == 2  # the last is too short to be kept
    assert kept.reach(LONG) == 100
    assert kept.take(LONG).tokens == LONG[:100]
    assert len(kept) == 1
    copied = kept.take(LONG)
    assert (copied.tokens, len(kept)) == (LONG[:90], 1)
    assert kept.contexts[0].tokens == [*LONG[:90], *[9] * 20]
    assert kept.take([1, 2, 3]) is None


def test_a_context_that_another_stands_in_for_is_not_kept(model_of):
    loaded = model_of("qwen3")
    kept = Prefixes(10**9)
    kept.add(context_of(loaded, LONG[:80]))
    kept.add(context_of(loaded, LONG[:120]))
    assert [len(context.tokens) for context in kept.contexts] == [120]
    kept.add(context_of(loaded, LONG[:100]))
    assert [len(context.tokens) for context in kept.contexts] == [120]
    recurrent = model_of("mamba2")
    kept = Prefixes(10**9)
    kept.add(context_of(recurrent, LONG[:80]))
    kept.add(context_of(recurrent, LONG[:120]))  # it cannot go back to 80
    assert [len(context.tokens) for context in kept.contexts] == [80, 120]
