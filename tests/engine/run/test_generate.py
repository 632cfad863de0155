"""Text comes out whole and in order, ends where it should, and repeats with a seed."""

import json
import math

import mlx.core as mx
import numpy as np
import pytest
from small_models import BOS, CHAT_TEMPLATE, EOS, TURN, VOCAB, Loaded, byte_tokenizer

from tq.engine.run.generate import (
    Finished,
    GenerateOptions,
    Token,
    bos_tokens,
    context_length,
    encode_prompt,
    generate,
    prompt_notes,
)
from tq.engine.run.sampling import resolve_options
from tq.errors import TQError, UsageError

PROMPT = [BOS, 65, 66]


def run(loaded, prompt=PROMPT, **options):
    *tokens, finished = generate(loaded, prompt, GenerateOptions(**options))
    assert all(isinstance(t, Token) for t in tokens)
    assert isinstance(finished, Finished)
    assert finished.tokens == len(tokens)
    return tokens, finished


def text_of(tokens):
    return "".join(t.text for t in tokens)


def ids_of(tokens):
    return [t.token_id for t in tokens]


def test_end_of_sequence_stops_and_is_counted_but_not_shown(say):
    tokens, finished = run(say("Hello"))
    assert text_of(tokens) == "Hello"
    assert ids_of(tokens) == [*b"Hello", EOS]
    assert (finished.reason, finished.prompt_tokens, finished.tokens) == ("stop", 3, 6)


def test_max_tokens_ends_with_length(say):
    tokens, finished = run(say("Hello"), max_tokens=4)
    assert (text_of(tokens), finished.reason) == ("Hell", "length")
    tokens, finished = run(say("Hello"), max_tokens=6)
    assert (text_of(tokens), finished.reason) == ("Hello", "stop")


@pytest.mark.parametrize("prompt", [[65], [65, 66], list(range(32, 90))])
def test_prompts_of_any_length_reach_the_model_whole(say, prompt):
    tokens, finished = run(say("ok", prompt_length=len(prompt)), prompt)
    assert text_of(tokens) == "ok"
    assert finished.prompt_tokens == len(prompt)


def test_statistics_add_up(llama):
    _, finished = run(llama, max_tokens=5)
    assert finished.prefill_tokens_per_second == pytest.approx(3 / finished.prefill_seconds)
    assert finished.decode_tokens_per_second == pytest.approx(4 / finished.decode_seconds)
    assert finished.peak_memory_bytes > 0
    _, finished = run(llama, max_tokens=1)
    assert finished.decode_tokens_per_second == 0


@pytest.mark.parametrize("key", ["tokenizer", "config.json", "generation_config.json"])
def test_every_list_of_end_tokens_counts(say, tmp_path, key):
    end = TURN
    loaded = say([*b"ab", end, *b"cd"])
    if key == "tokenizer":
        loaded.tokenizer = byte_tokenizer()
        loaded.tokenizer.add_eos_token("<turn>")
    elif key == "config.json":
        loaded.config = {"eos_token_id": [end, EOS]}
    else:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    tokens, finished = run(loaded)
    assert (text_of(tokens), finished.reason) == ("ab", "stop")


# --- whole characters ---


@pytest.mark.parametrize("naive", [False, True])
def test_characters_split_over_tokens_come_out_whole(say, naive):
    from mlx_lm.tokenizer_utils import NaiveStreamingDetokenizer

    text = "aé→🙂👨‍👩‍👧z"
    tokenizer = byte_tokenizer(detokenizer=NaiveStreamingDetokenizer if naive else None)
    tokens, _ = run(say(text, tokenizer=tokenizer))
    assert text_of(tokens) == text
    assert all("\ufffd" not in t.text for t in tokens)
    assert [t.text for t in tokens[:4]] == ["a", "", "é", ""]


@pytest.mark.parametrize("cut", [2, 3, 4])
def test_a_character_cut_off_by_the_end_is_not_shown(say, cut):
    tokens, finished = run(say("a🙂"), max_tokens=cut)
    assert (text_of(tokens), finished.reason) == ("a", "length")


# --- stop strings ---


@pytest.mark.parametrize(
    ("answer", "stop", "shown"),
    [
        ("one END two", ("END",), "one "),
        ("one EN two EEND", ("END",), "one EN two E"),
        ("aabaabaaac", ("aabaaa",), "aab"),
        ("first\n\nsecond", ("zzz", "\n\n"), "first"),
        ("xyz", ("yz", "x"), ""),
        ("a b", ("b", " "), "a"),  # the detokenizer hands over " b" at once
        ("say 🙂 now", ("🙂",), "say "),
        ("nothing EN", ("END",), "nothing EN"),
        ("EN", ("END", "N!"), "EN"),
    ],
)
def test_stop_strings_end_the_text_and_never_show(say, answer, stop, shown):
    tokens, finished = run(say(answer), stop=stop)
    assert text_of(tokens) == shown
    assert finished.reason == "stop"
    so_far = ""
    for token in tokens:
        so_far += token.text
        assert shown.startswith(so_far)


def test_a_stop_string_inside_the_last_allowed_token_is_a_stop(say):
    tokens, finished = run(say("ab!cd"), stop=("!",), max_tokens=3)
    assert (text_of(tokens), finished.reason) == ("ab", "stop")


def test_text_held_back_for_a_stop_string_appears_at_the_length_limit(say):
    tokens, finished = run(say("abEND"), stop=("END",), max_tokens=4)
    assert (text_of(tokens), finished.reason) == ("abEN", "length")


# --- sampling ---


@pytest.mark.parametrize("min_tokens", [0, 1, 5])
def test_min_tokens_forbids_the_end_for_exactly_so_long(say, min_tokens):
    tokens, finished = run(say([]), min_tokens=min_tokens)
    assert ids_of(tokens).index(EOS) == min_tokens
    if min_tokens:  # the other tokens share the whole probability
        assert tokens[0].logprob == pytest.approx(-math.log(VOCAB - 1), abs=1e-5)
    assert finished.reason == "stop"


def test_stop_strings_within_min_tokens_are_plain_text(say):
    tokens, finished = run(say("a.b.c.d"), stop=(".",), min_tokens=4)
    assert (text_of(tokens), finished.reason) == ("a.b.c", "stop")


def test_min_tokens_ignores_end_tokens_beyond_the_vocabulary(llama):
    llama.config["eos_token_id"] = [EOS, 10**6]
    assert run(llama, max_tokens=3, min_tokens=3)[1].tokens == 3


def test_a_seed_repeats_and_another_differs(llama):
    def sample(seed):
        return ids_of(run(llama, temp=1.0, top_p=0.95, top_k=50, min_p=0.01, seed=seed, max_tokens=24)[0])

    assert sample(3) == sample(3)
    assert sample(3) != sample(4)


def test_greedy_equals_the_argmax_of_full_forward_passes(llama):
    tokens, _ = run(llama, max_tokens=8, temp=0.0)
    context = list(PROMPT)
    for token in tokens:
        logits = np.array(llama.model(mx.array([context]))[0, -1], dtype=np.float64)
        assert token.token_id == logits.argmax()
        log_p = logits.max() - (logits.max() + np.log(np.exp(logits - logits.max()).sum()))
        assert token.logprob == pytest.approx(log_p, abs=1e-4)
        context.append(token.token_id)


@pytest.mark.parametrize("only_best", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_each_filter_reaches_the_sampler(llama, only_best):
    greedy = ids_of(run(llama, temp=0.0, max_tokens=10)[0])
    assert ids_of(run(llama, temp=2.0, seed=1, max_tokens=10)[0]) != greedy
    assert ids_of(run(llama, temp=2.0, seed=1, max_tokens=10, **only_best)[0]) == greedy


def test_top_k_of_the_whole_vocabulary_is_off(llama):
    everything = ids_of(run(llama, temp=1.0, top_k=10**6, seed=5, max_tokens=8)[0])
    assert everything == ids_of(run(llama, temp=1.0, top_k=0, seed=5, max_tokens=8)[0])


def test_repetition_penalty_applies_to_recent_tokens_only(say):
    # 50 / 1000 is still the largest logit, so the same token goes on, but with a far smaller probability.
    plain, _ = run(say("aaaa"), max_tokens=4)
    tokens, _ = run(say("aaaa"), max_tokens=4, repetition_penalty=1000.0, repetition_context=2)
    assert ids_of(tokens) == [97] * 4
    assert plain[1].logprob == pytest.approx(0, abs=1e-6)
    assert tokens[0].logprob == pytest.approx(0, abs=1e-6)
    expected = 0.05 - math.log(math.exp(0.05) + 258)
    assert tokens[1].logprob == pytest.approx(expected, abs=1e-5)


def test_repetition_penalty_changes_the_answer(llama):
    plain = ids_of(run(llama, temp=0.0, max_tokens=20)[0])
    penalised = ids_of(run(llama, temp=0.0, max_tokens=20, repetition_penalty=1.8)[0])
    assert plain != penalised
    assert len(set(penalised)) > len(set(plain))


# --- where values come from ---


def test_options_come_from_the_flag_then_the_checkpoint_then_the_default(llama, tmp_path):
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": -1, "min_p": None})
    )
    options, sources = resolve_options(llama, GenerateOptions(temp=0.2))
    assert (options.temp, options.top_p, options.top_k, options.min_p) == (0.2, 0.9, 0, 0.0)
    assert options.repetition_penalty == 1.0
    assert sources == {
        "temp": "option",
        "top_p": "generation_config.json",
        "top_k": "generation_config.json",
        "min_p": "default",
        "repetition_penalty": "default",
    }


@pytest.mark.parametrize(
    ("config", "temp"),
    [
        ({}, 0.0),
        ({"temperature": 0.7}, 0.7),
        ({"do_sample": False, "temperature": 0.7}, 0.0),
        ({"do_sample": True, "top_k": 64}, 1.0),
    ],
)
def test_do_sample_decides_the_temperature(llama, tmp_path, config, temp):
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert resolve_options(llama, GenerateOptions())[0].temp == temp


@pytest.mark.parametrize(
    ("content", "says"),
    [("{", "not valid JSON"), ("[]", "JSON object"), ('{"temperature": "hot"}', "temp"), ('{"top_p": 3}', "top_p")],
)
def test_a_bad_generation_config_is_named(llama, tmp_path, content, says):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(TQError, match=says) as error:
        generate(llama, PROMPT)
    assert "generation_config.json" in error.value.message


# --- prompts ---


def test_the_chat_template_is_used_and_bos_is_not_doubled(tokenizer):
    ids = encode_prompt(tokenizer, "hi", system="be kind")
    assert tokenizer.decode(ids) == "<bos>system:be kind<turn>user:hi<turn>assistant:"
    assert ids.count(BOS) == 1


def test_raw_prompts_get_one_bos_where_the_tokenizer_adds_one(tokenizer):
    assert encode_prompt(tokenizer, "hi", raw=True) == [BOS, *b"hi"]
    assert encode_prompt(tokenizer, "<bos>hi", raw=True) == [BOS, *b"hi"]
    assert encode_prompt(byte_tokenizer(adds_bos=False), "hi", raw=True) == [*b"hi"]
    assert bos_tokens(byte_tokenizer(adds_bos=False)) == []


def test_without_a_template_the_prompt_is_plain_text_and_says_so():
    plain = byte_tokenizer(chat_template=None)
    assert encode_prompt(plain, "hi") == [BOS, *b"hi"]
    assert "no chat template" in prompt_notes(plain)[0].message
    assert prompt_notes(plain, raw=True) == []
    assert prompt_notes(byte_tokenizer()) == []


@pytest.mark.parametrize("name", ["enable_thinking", "thinking"])
def test_thinking_is_switched_by_the_name_the_template_knows(name):
    template = CHAT_TEMPLATE + "{% if " + name + " is defined and not " + name + " %}{{ '</think>' }}{% endif %}"
    tokenizer = byte_tokenizer(chat_template=template)
    assert tokenizer.decode(encode_prompt(tokenizer, "hi", think=False)).endswith("assistant:</think>")
    assert tokenizer.decode(encode_prompt(tokenizer, "hi")).endswith("assistant:")
    assert prompt_notes(tokenizer, think=False) == []


def test_a_template_without_a_thinking_switch_says_so(tokenizer):
    assert "thinking" in prompt_notes(tokenizer, think=False)[0].message


@pytest.mark.parametrize("raw", [False, True])
def test_a_system_prompt_without_a_template_is_refused(raw):
    plain = byte_tokenizer(chat_template=CHAT_TEMPLATE if raw else None)
    with pytest.raises(UsageError, match="chat template"):
        encode_prompt(plain, "hi", system="x", raw=raw)


def test_a_template_that_refuses_says_why():
    tokenizer = byte_tokenizer(chat_template="{{ raise_exception('System role not supported') }}")
    with pytest.raises(TQError, match="System role not supported"):
        encode_prompt(tokenizer, "hi", system="x")


# --- errors and limits ---


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_tokens": 0}, "max_tokens must be 1 or more, not 0"),
        ({"temp": -0.1}, "temp must be 0"),
        ({"temp": math.nan}, "temp must be 0"),
        ({"temp": math.inf}, "temp must be 0"),
        ({"top_p": 0.0}, "top_p must be more than 0 and at most 1"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"min_p": 2.0}, "min_p must be from 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be more than 0"),
        ({"repetition_context": 0}, "repetition_context must be 1"),
        ({"min_tokens": -1}, "min_tokens must be 0"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens must be at most max_tokens"),
        ({"seed": -1}, "seed must be from 0"),
        ({"stop": ("ok", "")}, "at least one character"),
    ],
)
def test_options_out_of_range_name_the_range(options, says):
    with pytest.raises(UsageError, match=says):
        GenerateOptions(**options)


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt_is_refused(tokenizer, llama, prompt):
    with pytest.raises(UsageError, match="prompt is empty"):
        encode_prompt(tokenizer, prompt)
    with pytest.raises(UsageError, match="prompt is empty"):
        generate(llama, [])


def test_the_context_bounds_prompt_and_answer(llama):
    with pytest.raises(TQError, match="96 tokens and this model takes 1 to 95"):
        generate(llama, [65] * 96)
    tokens, finished = run(llama, [65] * 95, temp=0.0)
    assert (len(tokens), finished.reason) == (1, "length")


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({}, None),
        ({"max_position_embeddings": 2048}, 2048),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 512}}, 512),
        (
            {"max_position_embeddings": 100, "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 100}},
            400,
        ),
        (
            {"max_position_embeddings": 400, "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 100}},
            400,
        ),
        ({"max_position_embeddings": 100, "rope_scaling": {"type": "linear", "factor": 2.0}}, 100),
    ],
)
def test_context_length_is_read_from_the_config(config, length):
    assert context_length(config) == length


def test_closing_early_cleans_up(llama):
    default = mx.default_stream(mx.default_device())
    whole = ids_of(run(llama, temp=0.0, max_tokens=10)[0])
    events = generate(llama, PROMPT, GenerateOptions(temp=0.0, max_tokens=10))
    assert [next(events).token_id for _ in range(3)] == whole[:3]
    events.close()
    assert mx.default_stream(mx.default_device()) == default
    assert ids_of(run(llama, temp=0.0, max_tokens=10)[0]) == whole


def test_an_interrupt_inside_the_model_cleans_up(say):
    default = mx.default_stream(mx.default_device())
    loaded = say("Hello")
    script = loaded.model

    def interrupted(inputs, cache=None):
        if script.seen >= 2:
            raise KeyboardInterrupt
        return script(inputs, cache)

    interrupted.make_cache = list
    events = generate(Loaded(interrupted, loaded.tokenizer, {}, loaded.path), PROMPT)
    with pytest.raises(KeyboardInterrupt):
        list(events)
    assert mx.default_stream(mx.default_device()) == default


def test_half_precision_logits_give_full_precision_log_probabilities(tokenizer, tmp_path):
    def uniform(inputs, cache=None):
        return mx.zeros((1, inputs.shape[1], VOCAB), dtype=mx.float16)

    uniform.make_cache = list
    tokens, _ = run(Loaded(uniform, tokenizer, {}, tmp_path), max_tokens=1)
    assert tokens[0].logprob == pytest.approx(-math.log(VOCAB), abs=1e-6)
