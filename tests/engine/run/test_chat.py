"""A conversation answers as if each prompt were read from the start, reads only what is new, and knows its limits."""

import dataclasses

import mlx.core as mx
import pytest
import tiny_models
from small_models import CHAT_TEMPLATE, EOS, VOCAB, Loaded, Script, byte_tokenizer

from tq.engine.cache.prompts import PromptCache
from tq.engine.cache.settings import KVSettings
from tq.engine.cache.state import leaves
from tq.engine.events import Note, Progress
from tq.engine.run import chat, decode
from tq.engine.run.chat import Answer, Conversation, Piece
from tq.engine.run.context import Context
from tq.engine.run.generate import Token, encode_messages, generate
from tq.engine.run.sampling import GenerateOptions
from tq.engine.run.thinking import ThoughtFilter, begins_thinking
from tq.errors import TQError, UsageError

SHORT = GenerateOptions(max_tokens=12)
# Leaves reasoning of earlier turns out, and opens it for an answer that may think.
THINKING_TEMPLATE = (
    "{{ '<bos>' }}{% for m in messages %}"
    "{{ m['role'] + ':' + m['content'].split('</think>')[-1].strip() + '<turn>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}"
    "{% if enable_thinking %}{{ '<think>' }}{% endif %}{% endif %}"
)
KINDS = ["qwen3", "llama", "gemma3_text", "deepseek_v3", "qwen3_next", "mamba2", "recurrent_gemma", "falcon_h1"]


@pytest.fixture
def model_of(monkeypatch, tokenizer, tmp_path):
    """model_of("qwen3"): a tiny random model of that type with room for the byte tokenizer's tokens."""

    def build(kind, **fields):
        monkeypatch.setitem(tiny_models._TABLE[kind], "vocab_size", VOCAB)
        model = tiny_models.build(kind)
        config = {**tiny_models._TABLE[kind], "max_position_embeddings": 4000}
        return Loaded(model, **{"tokenizer": tokenizer, "config": config, "path": tmp_path, **fields})

    return build


@pytest.fixture
def read(monkeypatch):
    """How many tokens each call of a model's prefill has read."""
    counts = []
    prefill = decode.prefill

    def spy(model, context, tokens, *rest):
        yield from prefill(model, context, tokens, *rest)
        if tokens:
            counts.append(len(tokens))

    monkeypatch.setattr(decode, "prefill", spy)
    return counts


def store_in(folder, key="a" * 64):
    return PromptCache(folder / "prompts", 10**9, key)


def answer(events) -> Answer:
    *_, last = events
    assert isinstance(last, Answer)
    return last


def from_scratch(loaded, messages, options=SHORT, kv=None, think=True):
    tokens = encode_messages(loaded.tokenizer, messages, think)
    return "".join(event.text for event in generate(loaded, tokens, options, kv) if isinstance(event, Token))


def user(text):
    return {"role": "user", "content": text}


# --- the same answers ---


@pytest.mark.parametrize("kind", [*KINDS, "deepseek_v41", "glm_moe_dsa", "bailing_moe_linear"])
def test_each_turn_is_what_a_fresh_start_would_say(model_of, kind):
    loaded = model_of(kind)
    conversation = Conversation(loaded, "Be brief.", SHORT)
    for text in ("Hello there, how are you?", "And now?", "One more thing"):
        said = conversation.transcript()
        got = answer(conversation.ask(text))
        assert got.text == from_scratch(loaded, [*said, user(text)])
        assert len(conversation.context.tokens) in (got.prompt_tokens + got.tokens - 1, got.prompt_tokens + got.tokens)
    assert got.cached_tokens > 0 or kind == "deepseek_v41"  # its caches take no state: what differs is read anew


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_made_again_from_the_same_place(model_of, kind):
    loaded = model_of(kind)
    conversation = Conversation(loaded, None, SHORT)
    first = answer(conversation.ask("Hello there, how are you?"))
    again = answer(conversation.regenerate())
    assert (again.text, again.cached_tokens) == (first.text, first.prompt_tokens - 1)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_system_message_is_not_read_again(model_of, kind, tmp_path, read):
    loaded = model_of(kind)
    system = "You are a very patient teacher of mathematics. " * 3
    first = Conversation(loaded, system, SHORT, prompts=store_in(tmp_path))
    expected = answer(first.ask("Hello"))
    first.store()
    read.clear()
    second = Conversation(loaded, system, SHORT, prompts=store_in(tmp_path))
    got = answer(second.ask("Hello"))
    assert got.text == expected.text
    assert got.cached_tokens > len(system) and sum(read) < 20
    other = answer(Conversation(loaded, system, SHORT, prompts=store_in(tmp_path)).ask("What else?"))
    assert other.text == from_scratch(loaded, [{"role": "system", "content": system}, user("What else?")])
    assert other.cached_tokens > len(system)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "qwen3_next"])
def test_a_kept_conversation_is_not_read_again(model_of, kind, tmp_path, read):
    loaded = model_of(kind)
    first = Conversation(loaded, None, SHORT, prompts=store_in(tmp_path))
    for text in ("Tell me something long about the sea and the ships on it.", "Go on, please, I am listening."):
        answer(first.ask(text))
    messages = first.transcript()
    first.keep = True
    first.store()
    read.clear()
    second = Conversation(loaded, None, SHORT, prompts=store_in(tmp_path))
    second.replace(messages)
    got = answer(second.ask("And?"))
    assert got.cached_tokens > 100 and sum(read) < 60
    assert got.text == from_scratch(loaded, [*messages, user("And?")])


def test_a_conversation_that_nobody_keeps_is_not_stored(model_of, tmp_path):
    conversation = Conversation(model_of("qwen3"), None, SHORT, prompts=store_in(tmp_path))
    answer(conversation.ask("Tell me something long about the sea and the ships on it, and about the wind, please."))
    conversation.clear()
    assert not list((tmp_path / "prompts").glob("*"))


def test_packed_caches_go_on_and_are_stored(model_of, tmp_path):
    """Blocks that are cut are decoded, so that only tokens in the sink are what a fresh start has."""
    loaded = model_of("qwen3")
    kv = KVSettings(8, 8, sink=16, window=8)
    system = "You are a very patient teacher of mathematics. " * 6
    first = Conversation(loaded, system, SHORT, kv, store_in(tmp_path))
    answers = [answer(first.ask(text)) for text in ("Hello", "And now?")]
    assert answers[1].cached_tokens > answers[0].prompt_tokens
    assert any(getattr(cache, "packed", 0) for cache in leaves(first.context.caches))
    first.store()
    second = Conversation(loaded, system, SHORT, kv, store_in(tmp_path))
    assert answer(second.ask("Hello")).cached_tokens > len(system)


def test_a_random_conversation_does_not_depend_on_what_was_kept(model_of, read):
    loaded = model_of("qwen3")
    options = dataclasses.replace(SHORT, temp=1.0, seed=3)
    conversation = Conversation(loaded, None, options)
    got = answer(conversation.ask("Hello"))
    assert got.text == from_scratch(loaded, [user("Hello")], options)
    assert answer(conversation.regenerate()).text != got.text  # the seed counted once


def test_repetition_penalty_sees_the_whole_conversation(model_of):
    loaded = model_of("qwen3")
    options = dataclasses.replace(SHORT, repetition_penalty=3.0, repetition_context=300)
    conversation = Conversation(loaded, None, options)
    for text in ("abcdefgh", "ijkl", "mnop"):
        said = conversation.transcript()
        assert answer(conversation.ask(text)).text == from_scratch(loaded, [*said, user(text)], options)


# --- what is read ---


def test_only_new_tokens_are_read(tmp_path, tokenizer):
    """A model that always answers "ok": the prompt goes on exactly where the context ends."""
    loaded = Loaded(Script(list(b"ok"), 10**6), tokenizer, {}, tmp_path)
    conversation = Conversation(loaded)
    first = len(encode_messages(tokenizer, [user("Hi")]))
    loaded.model.seen = 1 - first
    assert answer(conversation.ask("Hi")).text == "ok"
    assert conversation.context.tokens[-3:] == [*b"ok", EOS]


def test_thoughts_that_the_template_drops_are_taken_back(model_of, read):
    loaded = model_of("qwen3")
    loaded.tokenizer = thinking_tokenizer()
    conversation = Conversation(loaded, None, SHORT)
    first = answer(conversation.ask("Hello there, how are you today?"))
    second = answer(conversation.ask("And now?"))
    assert first.thoughts  # the template opened them, the random model never closed them
    assert 0 < second.cached_tokens < first.prompt_tokens
    messages = [user("Hello there, how are you today?"), {"role": "assistant", "content": ""}, user("And now?")]
    assert second.thoughts == from_scratch(loaded, messages)


def test_a_changed_system_message_is_read_anew(model_of):
    loaded = model_of("qwen3")
    conversation = Conversation(loaded, "Be brief.", SHORT)
    answer(conversation.ask("Hello"))
    conversation.system = "Sing!"
    said = conversation.transcript()
    assert answer(conversation.ask("Again")).text == from_scratch(loaded, [*said, user("Again")])


def test_long_prompts_tell_how_far_they_are(model_of, monkeypatch):
    monkeypatch.setattr(chat, "READ_STEP", 16)
    events = list(Conversation(model_of("qwen3"), None, SHORT).ask("x" * 60))
    done = [event.done for event in events if isinstance(event, Progress)]
    total = events[-1].prompt_tokens
    assert done == [*range(16, total - 1, 16), total - 1]


# --- interruptions ---


def test_an_interrupted_answer_is_what_was_said(model_of):
    loaded = model_of("qwen3")
    conversation = Conversation(loaded, None, dataclasses.replace(SHORT, max_tokens=50))
    pieces = []
    for event in conversation.ask("Hello"):
        if isinstance(event, Piece):
            pieces.append(event.text)
            if len(pieces) == 3:
                conversation.interrupt()
    assert event.reason == "interrupted" and event.text == "".join(pieces)
    assert conversation.messages[-1] == {"role": "assistant", "content": event.text}
    said = conversation.transcript()
    conversation.set_options(SHORT)
    assert answer(conversation.ask("Go on")).text == from_scratch(loaded, [*said, user("Go on")])


def test_a_message_interrupted_before_its_answer_was_not_said(model_of, monkeypatch):
    monkeypatch.setattr(chat, "READ_STEP", 8)
    conversation = Conversation(model_of("qwen3"), None, SHORT)
    answer(conversation.ask("Hello"))
    before = list(conversation.messages)
    for event in conversation.ask("a long message that is being read"):
        if isinstance(event, Progress):
            conversation.interrupt()
    assert (event.reason, event.text, event.tokens) == ("interrupted", "", 0)
    assert conversation.messages == before
    said = conversation.transcript()
    assert answer(conversation.ask("Next")).text == from_scratch(conversation.loaded, [*said, user("Next")])


def test_an_interrupted_second_try_leaves_the_first(model_of):
    conversation = Conversation(model_of("qwen3"), None, SHORT)
    answer(conversation.ask("Hello"))
    before = list(conversation.messages)
    events = conversation.regenerate()
    conversation.options = dataclasses.replace(SHORT, temp=1.0)
    monkey = conversation._read
    conversation._read = lambda *args: (conversation.interrupt(), monkey(*args))[1]
    assert answer(events).reason == "interrupted"
    assert conversation.messages == before


def test_a_failure_in_the_model_costs_only_the_context(model_of, monkeypatch):
    loaded = model_of("qwen3")
    conversation = Conversation(loaded, None, SHORT)
    answer(conversation.ask("Hello"))
    attention = type(loaded.model.layers[1])
    call = attention.__call__

    def fail(layer, *args, **kwargs):
        if layer is loaded.model.layers[1]:
            raise MemoryError
        return call(layer, *args, **kwargs)

    monkeypatch.setattr(attention, "__call__", fail)
    with pytest.raises(MemoryError):
        answer(conversation.ask("Boom"))
    monkeypatch.undo()
    assert conversation.context.tokens == [] and len(conversation.messages) == 2
    said = conversation.transcript()
    assert answer(conversation.ask("Next")).text == from_scratch(loaded, [*said, user("Next")])


# --- the context's end ---


def small(model_of, tokens):
    loaded = model_of("qwen3")
    loaded.config = {"max_position_embeddings": tokens}
    return loaded


def test_the_oldest_turns_are_dropped_and_the_system_message_stays(model_of):
    loaded = small(model_of, 160)
    conversation = Conversation(loaded, "Be brief.", SHORT)
    dropped = []
    for n in range(8):
        events = list(conversation.ask(f"This is question number {n}"))
        dropped += [event.message for event in events if isinstance(event, Note)]
        seen = [*conversation._system(), *conversation.messages[conversation.first : -1]]
        assert events[-1].text == from_scratch(loaded, seen)
        assert seen[0]["content"] == "Be brief." and seen[1]["role"] == "user"
        assert events[-1].prompt_tokens + SHORT.max_tokens <= 160
    assert dropped and all("context of 160 tokens is full" in message for message in dropped)
    assert len(dropped) < 5  # half of the context is made free each time
    assert len(conversation.transcript()) == 17


def test_a_message_that_never_fits_is_refused_and_not_said(model_of):
    conversation = Conversation(small(model_of, 100), "Be brief.", SHORT)
    answer(conversation.ask("Hello"))
    with pytest.raises(TQError, match=r"have \d+ tokens, and this model takes 99"):
        answer(conversation.ask("x" * 200))
    assert len(conversation.messages) == 2 and conversation.first == 0
    assert answer(conversation.ask("Hi")).tokens > 0


def test_an_answer_ends_with_the_context(model_of):
    conversation = Conversation(small(model_of, 60), None, GenerateOptions(max_tokens=1000))
    got = answer(conversation.ask("A question of some length"))
    assert got.reason in ("length", "stop") and got.prompt_tokens + got.tokens <= 60


# --- mistakes ---


def test_what_cannot_be_said(model_of):
    conversation = Conversation(model_of("qwen3"), None, SHORT)
    with pytest.raises(UsageError, match="empty"):
        conversation.ask(" \n")
    with pytest.raises(UsageError, match="no answer"):
        conversation.regenerate()


def test_a_model_without_a_template_is_refused(model_of):
    loaded = model_of("qwen3", tokenizer=byte_tokenizer(chat_template=None))
    with pytest.raises(TQError, match="no chat template"):
        Conversation(loaded)


def test_a_template_that_refuses_leaves_the_conversation_as_it_was(model_of, tmp_path):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
    loaded = model_of("qwen3", tokenizer=byte_tokenizer(chat_template=template))
    conversation = Conversation(loaded, None, SHORT, prompts=store_in(tmp_path))
    answer(conversation.ask("Hello, this is a message with some more than the sixty tokens that are worth storing."))
    conversation.system = "Be brief."
    with pytest.raises(TQError, match="no system"):
        answer(conversation.ask("Again"))
    conversation.store()
    conversation.system = None
    assert len(conversation.messages) == 2
    answer(conversation.ask("Again"))


# --- a context ---


def context_of(loaded):
    from mlx_lm.models.cache import make_prompt_cache

    return Context(lambda: make_prompt_cache(loaded.model))


def fill(loaded, context, tokens):
    for _ in decode.prefill(loaded.model, context, tokens):
        pass


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("back", [5, 20, 31])
def test_a_context_goes_back_to_where_it_was(model_of, kind, back):
    loaded = model_of(kind)
    context, fresh = context_of(loaded), context_of(loaded)
    tokens = [(7 * n) % 250 for n in range(40)]
    for end in (20, 31):
        fill(loaded, context, tokens[len(context.tokens) : end])
        context.mark()
    fill(loaded, context, tokens[31:])
    held = context.keep([*tokens[:back], 255])
    assert held == len(context.tokens) and context.tokens == tokens[:held]
    assert held == (back if not context.needs_marks else {5: 0, 20: 20, 31: 31}[back]) or kind == "gemma3_text"
    fill(loaded, context, tokens[held:back])
    fill(loaded, fresh, tokens[:back])
    one, other = (loaded.model(mx.array([[9]]), cache=c.caches) for c in (context, fresh))
    assert mx.allclose(one, other, atol=1e-4).item()


def test_a_context_keeps_a_few_marks_and_always_the_first(model_of):
    loaded = model_of("mamba2")
    context = context_of(loaded)
    for n in range(8):
        fill(loaded, context, [n] * 3)
        context.mark()
    assert [mark.n_tokens for mark in context._marks] == [3, 21, 24]


# --- reasoning ---


class _Thinker:
    """A tokenizer that knows markers of reasoning as mlx-lm's wrapper does."""

    has_thinking, think_start, think_end = True, "<think>", "</think>"

    def __init__(self, tokenizer):
        self._inner = tokenizer

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def __len__(self):
        return len(self._inner)

    def apply_chat_template(self, *args, **kwargs):
        return self._inner.apply_chat_template(*args, **kwargs)

    def rfind_think_start(self, tokens):
        return bytes(t for t in tokens if t < 256).rfind(b"<think>")

    def rfind_think_end(self, tokens):
        return bytes(t for t in tokens if t < 256).rfind(b"</think>")


def thinking_tokenizer():
    return _Thinker(byte_tokenizer(chat_template=THINKING_TEMPLATE))


def sort(text, size, markers=None, thinking=False):
    parts = {False: "", True: ""}
    found = ThoughtFilter({"<think>": True, "</think>": False} if markers is None else markers, thinking)
    pieces = [text[n : n + size] for n in range(0, len(text), size)]
    for part, thought in [*(sorted_ for piece in pieces for sorted_ in found.push(piece)), *found.end()]:
        assert part
        parts[thought] += part
    return parts[True], parts[False]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_reasoning_is_told_from_the_answer(size):
    assert sort("<think>\nhm, a < b\n</think>\n\nYes <b>.", size) == ("hm, a < b\n", "Yes <b>.")
    assert sort("hm</think>Yes", size, thinking=True) == ("hm", "Yes")
    assert sort(" plain, a <thin line", size) == ("", " plain, a <thin line")
    assert sort("<think>never ends </thi", size) == ("never ends </thi", "")
    assert sort("as it is <think>", size, markers={}) == ("", "as it is <think>")


@pytest.mark.parametrize("size", [1, 5, 100])
def test_channels_are_told_apart(size):
    from tq.engine.run.thinking import HARMONY

    text = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Yes"
    assert sort(text, size, HARMONY) == ("hm", "Yes")
    assert sort("<|channel|>final<|message|>Yes", size, HARMONY) == ("", "Yes")


def test_a_prompt_may_have_opened_reasoning():
    tokenizer = thinking_tokenizer()
    assert begins_thinking(tokenizer, encode_messages(tokenizer, [user("Hi")], think=True))
    assert not begins_thinking(tokenizer, encode_messages(tokenizer, [user("Hi")], think=False))
    assert not begins_thinking(byte_tokenizer(), encode_messages(byte_tokenizer(), [user("<think>")]))


def test_reasoning_is_kept_apart_from_what_was_said(tmp_path):
    tokenizer = thinking_tokenizer()
    prompt = encode_messages(tokenizer, [user("Hi")])
    loaded = Loaded(Script(list(b"hm, well</think>\n\nYes"), len(prompt)), tokenizer, {}, tmp_path)
    conversation = Conversation(loaded)
    events = list(conversation.ask("Hi"))
    pieces = [event for event in events if isinstance(event, Piece)]
    assert "".join(p.text for p in pieces if p.thought) == "hm, well" == events[-1].thoughts
    assert "".join(p.text for p in pieces if not p.thought) == "Yes" == events[-1].text
    assert conversation.messages[-1] == {"role": "assistant", "content": "Yes", "reasoning_content": "hm, well"}
