"""A byte-level tokenizer, a tiny random llama, and a model that says what a test tells it to say."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

BOS, EOS, TURN = 256, 257, 258
VOCAB = 259
CHAT_TEMPLATE = (
    "{{ '<bos>' }}{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<turn>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@dataclass
class Loaded:
    """The fields of tq's LoadedModel."""

    model: Any
    tokenizer: Any
    config: dict
    path: Path
    notes: list[str] = field(default_factory=list)
    size_bytes: int = 0


class Script(nn.Module):
    """Answers with a given list of tokens, then end-of-sequence for ever."""

    def __init__(self, tokens: list[int], prompt_length: int):
        super().__init__()
        self.tokens = tokens
        self.seen = 1 - prompt_length

    def make_cache(self):
        return []

    def __call__(self, inputs, cache=None):
        self.seen += inputs.shape[1]
        answer = self.tokens[self.seen - 1] if 0 < self.seen <= len(self.tokens) else EOS
        logits = mx.zeros((1, inputs.shape[1], VOCAB))
        logits[:, :, answer] = 50.0
        return logits


def byte_tokenizer(*, adds_bos: bool = True, chat_template: str | None = CHAT_TEMPLATE, detokenizer=None):
    """mlx-lm's wrapper of a tokenizer whose tokens 0-255 are the bytes, and <bos>, <eos> and <turn> follow."""
    from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper, _byte_decoder
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab=dict(_byte_decoder().items()), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<bos>", "<eos>", "<turn>")])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
    fast.chat_template = chat_template
    return TokenizerWrapper(fast, detokenizer or BPEStreamingDetokenizer)


def tiny_llama(seed: int, scale: float = 0.3, vocab_size: int = VOCAB):
    """A random float32 llama of two layers whose answers vary."""
    from mlx.utils import tree_map
    from mlx_lm.models import llama

    config = {
        "model_type": "llama",
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "intermediate_size": 40,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocab_size,
        "max_position_embeddings": 96,
        "tie_word_embeddings": True,
    }
    model = llama.Model(llama.ModelArgs.from_dict(config))
    mx.random.seed(seed)
    model.update(tree_map(lambda p: mx.random.normal(p.shape) * scale if p.ndim > 1 else p, model.parameters()))
    mx.eval(model.parameters())
    return model, config
