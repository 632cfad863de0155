"""Caches are the model's own until the context is long enough, and packed ones from then on."""

import mlx.core as mx
import pytest
import tiny_models
from mlx_lm.models.cache import KVCache
from small_models import VOCAB, Loaded

from tq.engine.cache.convert import pack
from tq.engine.cache.packed import PackedKVCache
from tq.engine.cache.prompts import PromptCache
from tq.engine.cache.settings import KVSettings
from tq.engine.cache.state import leaves
from tq.engine.run import decode
from tq.engine.run.chat import Answer, Conversation
from tq.engine.run.context import Context
from tq.engine.run.generate import Token, generate, open_context
from tq.engine.run.sampling import GenerateOptions
from tq.errors import TQError

SHORT = GenerateOptions(max_tokens=12)
PROMPT = list(range(40, 80))
EXACT = {"key_bits": 8, "value_bits": 8, "sink": 4000}  # packed caches whose tokens are all in the sink


@pytest.fixture
def model_of(monkeypatch, tokenizer, tmp_path):
    def build(kind):
        monkeypatch.setitem(tiny_models._TABLE[kind], "vocab_size", VOCAB)
        config = {**tiny_models._TABLE[kind], "max_position_embeddings": 4000}
        return Loaded(tiny_models.build(kind), tokenizer, config, tmp_path)

    return build


def packed(context):
    return {type(cache).__name__ for cache in leaves(context.caches) if type(cache).__name__.startswith("Packed")}


def follow(loaded, kv, prompt=PROMPT, n=30):
    """Token ids, and whether caches were packed when the context had so many tokens."""
    context = open_context(loaded.model, kv)
    ids, when = [], {}
    for event in generate(loaded, prompt, GenerateOptions(max_tokens=n, min_tokens=n), kv, context):
        if isinstance(event, Token):
            ids.append(event.token_id)
        when[len(context.tokens)] = bool(packed(context))
    return ids, when


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_next"])
def test_caches_are_packed_when_the_context_reaches_the_start(model_of, kind):
    loaded = model_of(kind)
    plain, _ = follow(loaded, None)
    ids, when = follow(loaded, KVSettings(**EXACT, start=55))
    assert when == {n: n >= 55 for n in when} and {54, 55} <= set(when)
    assert ids == plain
    lossy, when = follow(loaded, KVSettings(2, 2, sink=0, window=0, start=65))
    assert lossy[:20] == plain[:20]
    assert list(when.values()).count(True) == len([n for n in when if n >= 65]) > 0


def test_a_longer_prompt_is_packed_from_its_beginning(model_of):
    loaded = model_of("qwen3")
    prompt = PROMPT * 4
    assert (
        follow(loaded, KVSettings(3, 3, sink=0, window=0, start=len(prompt)), prompt)[0]
        == (follow(loaded, KVSettings(3, 3, sink=0, window=0), prompt)[0])
    )


def test_tokens_are_packed_as_if_they_had_been_from_the_start(model_of):
    loaded = model_of("qwen3")
    kv = KVSettings(8, 4, sink=4, window=8)
    contexts = [open_context(loaded.model, KVSettings(8, 4, sink=4, window=8, start=start)) for start in (0, 300)]
    for context in contexts:
        for step in (100, 150, 49, 1):
            tokens = [n % 100 for n in range(len(context.tokens), len(context.tokens) + step)]
            assert bool(packed(context)) == (context is contexts[0])
            list(decode.prefill(loaded.model, context, tokens))
    assert [cache.packed for cache in contexts[1].caches] == [cache.packed for cache in contexts[0].caches]
    assert contexts[1].caches[0].packed == kv.packed_after(300, 4) > 0
    assert contexts[1].nbytes < 1.2 * contexts[0].nbytes


def test_memory_is_never_that_of_two_caches(monkeypatch):
    """At the moment of packing there are the unpacked layers, and of one layer both."""
    monkeypatch.setenv("TQ_BACKEND", "reference")
    layers, tokens, dim = 24, 1024, 64
    caches = [KVCache() for _ in range(layers)]
    for cache in caches:
        cache.update_and_fetch(mx.ones((1, 1, tokens, dim)), mx.ones((1, 1, tokens, dim)))
        mx.eval(cache.keys, cache.values)
    one = caches[0].nbytes
    context = Context(caches.copy, lambda caches: pack(caches, KVSettings(8, 8)), tokens)
    caches.clear()
    context.grow_to(tokens - 1)
    assert not packed(context)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    context.grow_to(tokens)
    assert packed(context) == {"PackedKVCache"}
    assert mx.get_peak_memory() - before < 5 * one  # all layers packed take 6, and the work on one 3
    assert mx.get_active_memory() - before < -0.5 * layers * one


def test_a_model_without_keys_and_values_is_refused_at_once(model_of):
    with pytest.raises(TQError, match="no cache of this model can be packed"):
        open_context(model_of("mamba2").model, KVSettings(start=1000))


# --- conversations ---


def ask(conversation, text) -> Answer:
    *_, last = conversation.ask(text)
    return last


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "qwen3_next", "deepseek_v3"])
def test_a_conversation_goes_on_over_the_start(model_of, kind):
    loaded = model_of(kind)
    texts = ["Hello there, how are you?", "And now?", "Go on"]
    plain, ours = (
        Conversation(loaded, "Be brief.", SHORT),
        Conversation(loaded, "Be brief.", SHORT, KVSettings(**EXACT, start=110)),
    )
    states = []
    for text in texts:
        expected, got = ask(plain, text), ask(ours, text)
        assert (got.text, got.prompt_tokens) == (expected.text, expected.prompt_tokens)
        states.append(bool(packed(ours.context)))
    assert (states[0], states[-1]) == (False, True)
    assert got.cached_tokens > 0


def test_going_back_keeps_packed_caches_and_clearing_does_not(model_of):
    loaded = model_of("qwen3")
    conversation = Conversation(loaded, None, SHORT, KVSettings(**EXACT, start=90))
    for text in ("Hello there, how are you?", "And tell me more about that, please!"):
        ask(conversation, text)
    assert packed(conversation.context)
    conversation.context.keep(conversation.context.tokens[:20])
    assert (len(conversation.context.tokens), bool(packed(conversation.context))) == (20, True)
    conversation.context.clear()
    assert not packed(conversation.context)


@pytest.mark.parametrize(("kind", "start"), [("qwen3", 200), ("qwen3", 3000), ("gemma3_text", 200)])
def test_stored_prompts_are_found_whether_they_were_packed_or_not(model_of, kind, start, tmp_path):
    loaded = model_of(kind)
    kv = KVSettings(**EXACT, start=start)
    system = "You are a very patient teacher of mathematics. " * 2

    def conversation():
        return Conversation(loaded, system, SHORT, kv, PromptCache(tmp_path / "prompts", 10**9, "a" * 64))

    first = conversation()
    expected = [ask(first, text).text for text in ("Hello", "And now?", "Tell me more about that, please.")]
    first.store()
    second = conversation()
    got = ask(second, "Hello")
    assert got.cached_tokens > len(system)
    assert second.notes() == []
    assert bool(packed(second.context)) == (start == 200)
    assert [
        got.text,
        *(ask(second, text).text for text in ("And now?", "Tell me more about that, please.")),
    ] == expected


def test_a_packed_cache_says_nothing_of_start():
    assert PackedKVCache(KVSettings(start=1000)).packed_after(1000) == KVSettings().packed_after(1000, 128) > 0
