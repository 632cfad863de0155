"""Rebuilds a Hugging Face tokenizer (tokenizer.json and its companions) from the vocabulary in a GGUF file.

Two kinds exist: "gpt2", byte-level BPE, where the file names the pre-tokenizer; and "llama", SentencePiece BPE with
byte fallback, where the merges follow from the scores. The patterns are those of the models' own tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tq.errors import TQError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

# Chat models end a turn with one of these; the file's eos is often only the end of a document.
_TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>")
_ID_KEYS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unk": 0}  # llama.cpp's defaults for files without the keys


@dataclass(frozen=True)
class _PreTokenizer:
    """How text is cut before BPE: each pattern splits what the one before left.

    Args:
        patterns: Regular expressions; matches and what lies between them become pieces.
        ignore_merges: A piece that is in the vocabulary is one token whatever the merges say.
        add_bos: Where the file does not say.
        nfc: Text is normalized first.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _ENGLISH + _WORDS + r"\p{N}{1,3}" + _REST
_QWEN2 = _ENGLISH + _WORDS + r"\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")

# By tokenizer.ggml.pre.
_PRE_TOKENIZERS = {
    # What llama.cpp does with files from before the key existed.
    "default": _PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _PreTokenizer((_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "minerva-7b"), _PreTokenizer((r"\p{N}", _GPT2))),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _PreTokenizer((_LLAMA3,), True, add_bos=True)),
    "smaug-bpe": _PreTokenizer((_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _PreTokenizer((_QWEN2,), nfc=True)),
    "tekken": _PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "deepseek-coder": _PreTokenizer(_DEEPSEEK_CODER),
}


@dataclass(frozen=True)
class _Vocabulary:
    """The tokenizer's metadata, checked.

    Args:
        kind: "gpt2" or "llama".
        tokens: By id.
        types: tokenizer.ggml.token_type, by id.
        ids: Of "bos", "eos", "pad" and "unk", those that there are.
    """

    kind: str
    tokens: list[str]
    types: list[int]
    ids: dict[str, int]
    metadata: Mapping[str, Any]
    filename: str

    def value(self, key: str, default: Any) -> Any:
        """The metadata under tokenizer.ggml.KEY, which must be of the default's type."""
        return _typed(self.metadata, f"tokenizer.ggml.{key}", default, self.filename)

    def damaged(self, problem: str) -> TQError:
        return TQError(f"{self.filename} is damaged: {problem}")


def special_ids(metadata: Mapping[str, Any], filename: str) -> dict[str, Any]:
    """Token ids for config.json: "bos" and "pad", where known, and "eos", one id or all that end a turn.

    Raises:
        TQError: The file has a vocabulary that is inconsistent or of a kind that tq does not know.
    """
    if "tokenizer.ggml.tokens" not in metadata:
        return {}
    vocabulary = _vocabulary(metadata, filename)
    found = vocabulary.ids
    ends = [found["eos"]] if "eos" in found else []
    ends += [i for key in ("eot", "eom") if (i := _valid_id(metadata, key, vocabulary.tokens)) is not None]
    for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind in (_CONTROL, _USER_DEFINED) and token in _TURN_ENDS:
            ends.append(i)
    ends = list(dict.fromkeys(ends))
    eos = {"eos": ends[0] if len(ends) == 1 else ends} if ends else {}
    return {key: found[key] for key in ("bos", "pad") if key in found} | eos


def write_tokenizer(metadata: Mapping[str, Any], folder: Path, filename: str, max_length: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json.

    Args:
        metadata: The GGUF file's.
        folder: Exists.
        filename: For messages.
        max_length: Tokens that the model was made for.

    Raises:
        TQError: The vocabulary is missing, inconsistent, or of a kind that tq does not know.
    """
    if "tokenizer.ggml.tokens" not in metadata:
        raise TQError(f"{filename} has no tokenizer (no metadata key tokenizer.ggml.tokens)")
    vocabulary = _vocabulary(metadata, filename)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    config |= {f"{key}_token": vocabulary.tokens[i] for key, i in vocabulary.ids.items()}
    if template := _typed(metadata, "tokenizer.chat_template", "", filename):
        config["chat_template"] = template
    generation = {f"{key}_token_id": value for key, value in special_ids(metadata, filename).items()}
    _build(vocabulary).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "generation_config.json", generation)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _typed(metadata: Mapping[str, Any], key: str, default: Any, filename: str) -> Any:
    value = metadata.get(key, default)
    if type(value) is not type(default):
        raise TQError(f"{filename} is damaged: {key} is not a {type(default).__name__}")
    return value


def _valid_id(metadata: Mapping[str, Any], key: str, tokens: list[str]) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{key}_token_id")
    return value if isinstance(value, int) and 0 <= value < len(tokens) else None


def _vocabulary(metadata: Mapping[str, Any], filename: str) -> _Vocabulary:
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise TQError(
            f"{filename} has a tokenizer of the kind {kind!r}; tq rebuilds these: gpt2, llama",
            "use the model's original Hugging Face checkpoint",
        )
    pre = _typed(metadata, "tokenizer.ggml.pre", "default", filename)
    if kind == "gpt2" and pre not in _PRE_TOKENIZERS:
        raise TQError(
            f"{filename} has the pre-tokenizer {pre!r}; tq knows these: {', '.join(sorted(_PRE_TOKENIZERS))}",
            "use the model's original Hugging Face checkpoint",
        )
    tokens = _typed(metadata, "tokenizer.ggml.tokens", [], filename)
    types = _typed(metadata, "tokenizer.ggml.token_type", [_NORMAL] * len(tokens), filename)
    if not all(isinstance(token, str) for token in tokens) or len(set(tokens)) != len(tokens):
        raise TQError(f"{filename} is damaged: its tokens are not all different texts")
    if len(types) != len(tokens):
        raise TQError(f"{filename} is damaged: it has {len(tokens)} tokens but {len(types)} token types")
    ids = {}
    for name, key in _ID_KEYS.items():
        i = _valid_id(metadata, key, tokens)
        if i is None and kind == "llama":
            i = _SENTENCEPIECE_IDS.get(name)
        if i is not None and i < len(tokens):
            ids[name] = i
    return _Vocabulary(kind, tokens, types, ids, metadata, filename)


def _build(vocabulary: _Vocabulary) -> Tokenizer:
    from tokenizers import AddedToken

    build = _byte_level if vocabulary.kind == "gpt2" else _sentencepiece
    tokenizer, add_bos = build(vocabulary)
    # Added tokens are found in the raw text, before it is normalized and cut.
    named = set(vocabulary.ids.values())
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind != _USER_DEFINED)
            for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
            if token and (kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) or i in named)
        ]
    )
    _add_ends(tokenizer, vocabulary, add_bos)
    return tokenizer


def _add_ends(tokenizer: Tokenizer, vocabulary: _Vocabulary, add_bos: bool) -> None:
    """Lets the tokenizer put bos before, and eos after, each text, if the model wants that."""
    from tokenizers.processors import TemplateProcessing

    wanted = {
        "bos": vocabulary.value("add_bos_token", add_bos),
        "eos": vocabulary.value("add_eos_token", False),
    }
    used = [name for name in vocabulary.ids if wanted.get(name)]
    if not used:
        return
    before, after = [name for name in used if name == "bos"], [name for name in used if name == "eos"]
    single = [*before, "$A", *after]
    ids = vocabulary.ids
    tokenizer.post_processor = TemplateProcessing(
        single=single,
        pair=[*single, *(f"{part}:1" for part in [*before, "$B", *after])],
        special_tokens=[{"id": name, "ids": [ids[name]], "tokens": [vocabulary.tokens[ids[name]]]} for name in used],
    )


def _byte_level(vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = _PRE_TOKENIZERS[vocabulary.value("pre", "default")]
    by_token = {token: i for i, token in enumerate(vocabulary.tokens)}
    merges = []
    for merge in vocabulary.value("merges", []):
        cut = str(merge).find(" ", 1)  # the first part may itself begin with a space
        left, right = str(merge)[:cut], str(merge)[cut + 1 :]
        if cut < 0 or not {left, right, left + right} <= by_token.keys():
            raise vocabulary.damaged(f"the merge {merge!r} does not name tokens of its vocabulary")
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(by_token, merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _sentencepiece(vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    from tokenizers import Tokenizer, decoders, models, normalizers

    by_token = {token: i for i, token in enumerate(vocabulary.tokens)}
    model = models.BPE(
        by_token,
        _merges_from_scores(vocabulary, by_token),
        unk_token=vocabulary.tokens[vocabulary.ids["unk"]],
        fuse_unk=True,
        byte_fallback="<0x00>" in by_token,
    )
    tokenizer = Tokenizer(model)
    spaces: Any = normalizers.Replace(" ", "▁")
    decode = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.value("add_space_prefix", True):
        # A space before every stretch of text between special tokens, and none for empty text.
        spaces = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        decode.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(decode)
    return tokenizer, True


def _merges_from_scores(vocabulary: _Vocabulary, by_token: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a normal token of two tokens, best score first.

    SentencePiece joins the neighbours whose result scores best; BPE joins those whose merge stands first. Between the
    ways to make one token, those of the lowest ids come first, as in Hugging Face's own conversion.
    """
    scores = vocabulary.value("scores", [])
    if len(scores) != len(by_token) or not all(isinstance(score, int | float) for score in scores):
        raise vocabulary.damaged(f"it has {len(by_token)} tokens but {len(scores)} scores")
    merges = []
    for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind != _NORMAL:
            continue
        for cut in range(1, len(token)):
            left, right = by_token.get(token[:cut]), by_token.get(token[cut:])
            if left is not None and right is not None:
                merges.append((-scores[i], i, left, right, token[:cut], token[cut:]))
    merges.sort()
    return [merge[4:] for merge in merges]
