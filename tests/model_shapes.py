"""Models that profiles speak of, by the numbers of their config.json: what their weights and their context take."""

from dataclasses import dataclass

from tq.engine.model.recipe import Recipe
from tq.engine.model.roles import Matrix, Role

HALF = 2  # bytes of a number that is not quantized


@dataclass(frozen=True)
class Shape:
    hidden: int
    width: int  # of the feed-forward layers, or of an expert
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    experts: int = 0
    tied: bool = False
    windowed: int = 0  # layers that see only
    window: int = 0  # so many tokens

    def weights_bytes(self, recipe: Recipe) -> int:
        q, kv, h, n = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden, self.layers
        total = HALF * h * (2 * n + 1) + HALF * self.experts * h * n  # norms and routers
        for role, out, inputs, count in (
            (Role.ATTENTION, q, h, n),
            (Role.ATTENTION, kv, h, n),
            (Role.VALUE, kv, h, n),
            (Role.ATTENTION, h, q, n),
            (Role.EXPERT if self.experts else Role.MLP, self.width, h, 2 * n * (self.experts or 1)),
            (Role.EXPERT_DOWN if self.experts else Role.MLP, h, self.width, n * (self.experts or 1)),
            (Role.EMBEDDING, self.vocab, h, 1),
            (Role.HEAD, self.vocab, h, 0 if self.tied else 1),
        ):
            spec = recipe.spec_for(Matrix("m", "linear", role, (out, inputs)), tied_head=self.tied)
            total += count * spec.size_bytes((out, inputs))
        return total

    def layer_token_bytes(self, key_bits: float = 16, value_bits: float = 16) -> float:
        """Of a token in a layer; packed vectors have a float16 scale each."""
        packed = 2 * 16 / self.head_dim if key_bits < 16 else 0
        return self.kv_heads * self.head_dim * (key_bits + value_bits + packed) / 8

    def tokens_in(self, size_bytes: float, key_bits: float = 16, value_bits: float = 16) -> int:
        """Tokens of context that so much memory holds; windows are full and not packed."""
        rest = size_bytes - self.windowed * self.window * self.layer_token_bytes()
        return int(rest / ((self.layers - self.windowed) * self.layer_token_bytes(key_bits, value_bits)))


SHAPES = {
    "Llama-3.1-8B": Shape(4096, 14336, 32, 32, 8, 128, 128256, 131072),
    "Qwen3-8B": Shape(4096, 12288, 36, 32, 8, 128, 151936, 131072),
    "Gemma-3-27B": Shape(5376, 21504, 62, 32, 16, 128, 262208, 131072, tied=True, windowed=52, window=1024),
    "Qwen3-32B": Shape(5120, 25600, 64, 64, 8, 128, 151936, 131072),
    "Llama-3.3-70B": Shape(8192, 28672, 80, 64, 8, 128, 128256, 131072),
    "Qwen3-30B-A3B": Shape(2048, 768, 48, 32, 4, 128, 151936, 131072, experts=128),
    "GPT-OSS-120B": Shape(2880, 2880, 36, 64, 8, 64, 201088, 131072, experts=128, windowed=18, window=128),
    "Qwen3-235B-A22B": Shape(4096, 1536, 94, 64, 4, 128, 151936, 131072, experts=128),
}
