"""Tokenizers rebuilt from GGUF metadata cut text exactly as the tokenizers that the metadata came from."""

import json
import random
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tq.engine.model.gguf import GGUFFile
from tq.errors import TQError

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_TEXT = Path(__file__).read_text(encoding="utf-8") + "It's 1234.5 at 12:30; we'll see the THE thé. 你好 мир\n" * 20
_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
_LINES = [
    "",
    " ",
    "Hello world",
    "  two  spaces   three ",
    "tab\tnewline\n\n  indented\r\n",
    "don't WE'LL they'Re",
    "1 12 123 1234 12345 3.14 ٣٤ ½",
    "def f(x): return x[1:]**2  # 日本語 é e\u0301 Å",
    "😀👍🏽 \u00a0\u3000 \x00 \ufeff",
    "a▁b Ġ </s> <0x41>",
]


def random_lines():
    rng = random.Random(5)
    alphabet = [*"abehtHT 019'.,:\n\t_-", "  ", "é", "你", "😀", "the", " we", "'ll", "\u0301"]
    return ["".join(rng.choices(alphabet, k=rng.randint(1, 40))) for _ in range(150)]


def write_file(path, model, tokens, types, **keys):
    """A model too small to be of use, with a tokenizer; `keys` are below tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"block_count": 1, "context_length": 64, "feed_forward_length": 32}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((max(1, len(tokens)), 8), np.float32))
    writer.add_tensor("blk.0.attn_norm.weight", np.zeros(8, np.float32))
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for key, value in keys.items():
        key = f"tokenizer.{key.replace('__', '.')}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rebuilt(path, folder):
    GGUFFile(path).write_tokenizer(folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def byte_level(pre_tokenizer, normalizer=None):
    """A byte-level BPE tokenizer trained on this file, with its vocabulary in GGUF's form."""
    original = Tokenizer(models.BPE())
    original.pre_tokenizer = pre_tokenizer
    if normalizer:
        original.normalizer = normalizer
    original.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    original.train_from_iterator([_TEXT], trainer)
    original.add_tokens([AddedToken("<think>", normalized=False)])
    tokens = [original.id_to_token(i) for i in range(original.get_vocab_size())]
    types = [_CONTROL] * 3 + [_NORMAL] * (len(tokens) - 4) + [_USER_DEFINED]
    merges = [" ".join(pair) for pair in json.loads(original.to_str())["model"]["merges"]]
    return original, tokens, types, merges


def split(pattern):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


_WHOLE_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The pre-tokenizers as the models' own tokenizer.json has them.
_ORIGINALS = {
    "gpt-2": lambda: (pre_tokenizers.ByteLevel(add_prefix_space=False), None),
    "smollm": lambda: (
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        None,
    ),
    "llama-bpe": lambda: (split(_WHOLE_WORDS.replace("DIGITS", "{1,3}")), None),
    "qwen2": lambda: (split(_WHOLE_WORDS.replace("DIGITS", "")), normalizers.NFC()),
}


@pytest.mark.parametrize("name", _ORIGINALS)
def test_byte_level_tokenizers_cut_like_the_original(tmp_path, name):
    original, tokens, types, merges = byte_level(*_ORIGINALS[name]())
    path = write_file(
        tmp_path / "m.gguf", "gpt2", tokens, types, ggml__pre=name, ggml__merges=merges, ggml__add_bos_token=False
    )
    tokenizer = rebuilt(path, tmp_path)
    for line in [*_LINES, *random_lines(), "<|im_start|>user\n<think>x</think><|im_end|>", "<|endoftext|> a"]:
        expected = original.encode(line).ids
        assert tokenizer.encode(line).ids == expected, line
        assert tokenizer.decode(expected, skip_special_tokens=False) == original.decode(
            expected, skip_special_tokens=False
        )


@pytest.mark.parametrize("name", ["default", "tekken", "deepseek-coder"])
def test_other_pre_tokenizers_keep_every_byte(tmp_path, name):
    _, tokens, types, merges = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    path = write_file(
        tmp_path / "m.gguf", "gpt2", tokens, types, ggml__pre=name, ggml__merges=merges, ggml__add_bos_token=False
    )
    tokenizer = rebuilt(path, tmp_path)
    for line in [*_LINES, *random_lines()]:
        assert tokenizer.decode(tokenizer.encode(line).ids, skip_special_tokens=False) == line


def test_llama3_takes_whole_words_before_merging(tmp_path):
    tokens = ["a", "b", "c", "ab", "abc", "<|begin_of_text|>", "<|eot_id|>"]
    types = [_NORMAL] * 5 + [_CONTROL] * 2
    keys = {"ggml__merges": ["a b"], "ggml__bos_token_id": 5, "ggml__eos_token_id": 6}
    path = write_file(tmp_path / "m.gguf", "gpt2", tokens, types, ggml__pre="llama-bpe", **keys)
    tokenizer = rebuilt(path, tmp_path)
    assert tokenizer.encode("abc").tokens == ["<|begin_of_text|>", "abc"]  # bos is this kind's default
    assert tokenizer.encode("abca", "b").tokens == ["<|begin_of_text|>", "ab", "c", "a", "<|begin_of_text|>", "b"]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A SentencePiece model with byte fallback, trained on this file."""
    prefix = tmp_path_factory.mktemp("spm") / "m"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT.splitlines()),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")


def sentencepiece_file(path, model, extra=(), **keys):
    ids = range(model.vocab_size())
    types = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in ids]
    tokens = [model.id_to_piece(i) for i in ids]
    scores = [float(model.get_score(i)) for i in ids] + [-1000.0] * len(extra)
    types += [_USER_DEFINED] * len(extra)
    return write_file(path, "llama", [*tokens, *extra], types, ggml__scores=scores, **keys)


def test_sentencepiece_tokenizers_cut_like_the_original(tmp_path, pieces):
    tokenizer = rebuilt(sentencepiece_file(tmp_path / "m.gguf", pieces), tmp_path)
    for line in [*_LINES, *random_lines()]:
        if "</s>" in line:
            continue  # SentencePiece reads special tokens as text
        expected = pieces.encode(line)
        assert tokenizer.encode(line, add_special_tokens=False).ids == expected, line
        assert tokenizer.encode(line).ids == [1, *expected]  # bos is this kind's default
        assert tokenizer.decode(expected, skip_special_tokens=False) == pieces.decode(expected), line


def test_gemmas_have_no_space_in_front_and_tokens_of_spaces(tmp_path, pieces):
    extra = ["  ", "   ", "\n\n", "<end_of_turn>"]
    path = sentencepiece_file(tmp_path / "m.gguf", pieces, extra, ggml__add_space_prefix=False)
    tokenizer = rebuilt(path, tmp_path)
    spaces = pieces.vocab_size()
    assert tokenizer.encode("  ", add_special_tokens=False).ids == [spaces]
    the = tokenizer.encode("the", add_special_tokens=False).ids
    # Five spaces are the longest token and then the next; the words have no space of their own.
    assert tokenizer.encode("the     the\n\nthe", add_special_tokens=False).ids == [
        *the, spaces + 1, spaces, *the, spaces + 2, *the,
    ]  # fmt: skip
    for line in [*_LINES[:-1], *random_lines()]:
        assert tokenizer.decode(tokenizer.encode(line, add_special_tokens=False).ids) == line
    assert GGUFFile(path).config["eos_token_id"] == [2, spaces + 3]


@pytest.mark.parametrize(
    ("scores", "types", "found"),
    [
        ((-1.0, -2.0), (_NORMAL, _NORMAL), ["a", "bb"]),
        ((-2.0, -1.0), (_NORMAL, _NORMAL), ["ab", "b"]),
        ((0.0, 0.0), (_NORMAL, _NORMAL), ["a", "bb"]),  # a converter knew no scores: ids are in the order of merges
        ((-1.0, -2.0), (_UNUSED, _NORMAL), ["ab", "b"]),
    ],
)
def test_the_best_score_merges_first(tmp_path, scores, types, found):
    path = write_file(
        tmp_path / "m.gguf",
        "llama",
        ["<unk>", "<s>", "</s>", "a", "b", "bb", "ab"],
        [2, 3, 3, 1, 1, *types],
        ggml__scores=[0.0] * 5 + list(scores),
        ggml__add_space_prefix=False,
        ggml__add_bos_token=False,
    )
    tokenizer = rebuilt(path, tmp_path)
    assert tokenizer.encode("abb").tokens == found
    assert tokenizer.encode("aéüa").tokens == ["a", "<unk>", "a"]  # without byte tokens, one for a run


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_transformers_and_mlx_lm_load_the_folder(tmp_path, pieces, kind):
    from mlx_lm import tokenizer_utils
    from transformers import AutoTokenizer

    path = tmp_path / "m.gguf"
    if kind == "gpt2":
        _, tokens, types, merges = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
        keys = {"ggml__bos_token_id": 1, "ggml__eos_token_id": 2, "ggml__padding_token_id": 0}
        write_file(path, kind, tokens, types, ggml__pre="gpt-2", ggml__merges=merges, chat_template=_TEMPLATE, **keys)
        bos, eos, pad, detokenizer = "<|im_start|>", "<|im_end|>", "<|endoftext|>", "BPEStreamingDetokenizer"
        ends = [2, 0]
    else:
        sentencepiece_file(path, pieces, ["<|im_start|>", "<|im_end|>"], chat_template=_TEMPLATE)
        bos, eos, pad, detokenizer = "<s>", "</s>", None, "SPMStreamingDetokenizer"
        ends = [2, pieces.vocab_size() + 1]
    file = GGUFFile(path)
    file.write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(file.config))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (bos, eos, pad)
    assert tokenizer.model_max_length == 64
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == ends
    messages = [{"role": "user", "content": "the file's 12 lines"}]
    prompt = "<|im_start|>user\nthe file's 12 lines<|im_end|>\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == prompt
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert tokenizer.apply_chat_template(messages, return_dict=False) == ids
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "<|im_start|>"
    wrapper = tokenizer_utils.load(tmp_path, eos_token_ids=file.config["eos_token_id"])
    assert wrapper.eos_token_ids == set(ends)
    stream = wrapper.detokenizer
    assert type(stream).__name__ == detokenizer
    words = tokenizer.encode("thé 你好 lines", add_special_tokens=False)
    for token in words:
        stream.add_token(token)
    stream.finalize()
    assert stream.text == tokenizer.decode(words) == "thé 你好 lines"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "t5"}, "kind 't5'; tq rebuilds these: gpt2, llama"),
        ({"ggml__pre": "bloom"}, "pre-tokenizer 'bloom'; tq knows these: .*llama-bpe"),
        ({"tokens": ["a", "b", "a"]}, "not all different"),
        ({"types": [1]}, "3 tokens but 1 token types"),
        ({"ggml__merges": ["a c"]}, "the merge 'a c' does not name tokens"),
        ({"ggml__merges": ["ab"]}, "the merge 'ab' does not name tokens"),
        ({"ggml__merges": [1]}, "the merge 1 does not name tokens"),
        ({"model": "llama"}, "3 tokens but 0 scores"),
        ({"model": "llama", "ggml__scores": ["a", "b", "c"]}, "3 scores"),
        ({"ggml__add_bos_token": "yes"}, "add_bos_token is not a bool"),
        ({"chat_template": 5}, "chat_template is not a str"),
    ],
)
def test_vocabularies_that_cannot_be_rebuilt_are_refused(tmp_path, changes, message):
    keys = {"model": "gpt2", "tokens": ["a", "b", "ab"], "types": [1, 1, 1], "ggml__pre": "gpt-2"} | changes
    path = write_file(tmp_path / "m.gguf", **keys)
    with pytest.raises(TQError, match=message):
        GGUFFile(path).write_tokenizer(tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_file_without_tokenizer_is_a_model_all_the_same(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, value in {"block_count": 1, "context_length": 64, "feed_forward_length": 32}.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((3, 8), np.float32))
    writer.add_tensor("blk.0.attn_norm.weight", np.zeros(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "m.gguf")
    assert "eos_token_id" not in file.config
    with pytest.raises(TQError, match="has no tokenizer"):
        file.write_tokenizer(tmp_path)
