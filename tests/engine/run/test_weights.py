"""How many weights a model has and how many bytes a token reads: tied or not, packed or not, with experts."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from small_models import tiny_llama

from tq.engine.model.layers import QuantLinear
from tq.engine.quantize import QuantSpec, encode
from tq.engine.run.weights import weights_of

VOCAB, WIDTH = 40, 32


class Untied(nn.Module):
    def __init__(self, head: bool, experts: int = 0):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.positions = nn.Embedding(11, WIDTH)
        self.layer = nn.Linear(WIDTH, 48, bias=True)
        if head:
            self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        if experts:
            from mlx_lm.models.switch_layers import SwitchLinear

            self.experts = SwitchLinear(WIDTH, 16, experts, bias=False)


EMBEDDING, LAYER = 4 * VOCAB * WIDTH, 4 * (WIDTH * 48 + 48)


def test_an_embedding_is_read_only_where_it_is_the_head():
    tied, untied = weights_of(Untied(False), {}), weights_of(Untied(True), {})
    assert tied.token_bytes == EMBEDDING + LAYER
    assert untied.token_bytes == EMBEDDING + LAYER  # of the head
    assert untied.parameters - tied.parameters == VOCAB * WIDTH
    assert tied.parameters == (VOCAB + 11) * WIDTH + WIDTH * 48 + 48


@pytest.mark.parametrize("config", [{"num_experts_per_tok": 2}, {"text_config": {"moe_topk": 2}}])
def test_experts_are_read_as_far_as_they_run(config):
    found = weights_of(Untied(True, experts=8), config)
    assert found.token_bytes == EMBEDDING + LAYER + 4 * WIDTH * 16 * 2
    assert found.parameters == weights_of(Untied(True), {}).parameters + 8 * 16 * WIDTH


def test_experts_without_a_number_in_the_config_leave_it_unknown():
    assert weights_of(Untied(True, experts=8), {}).token_bytes is None


def test_packed_matrices_count_as_they_are_stored():
    model = Untied(True)
    spec = QuantSpec(bits=4)
    model.lm_head = QuantLinear(encode(mx.random.normal((VOCAB, 64)), spec), None)
    found = weights_of(model, {})
    assert found.token_bytes == LAYER + spec.size_bytes((VOCAB, 64))


def test_codes_of_mlx_count_as_weights():
    model = Untied(True)
    before = weights_of(model, {})
    model.lm_head = nn.QuantizedLinear.from_linear(model.lm_head, group_size=32, bits=4)
    found = weights_of(model, {})
    assert found.parameters == before.parameters
    assert found.token_bytes == LAYER + VOCAB * (WIDTH // 2 + 2 * 4)


def test_a_whole_model():
    model, config = tiny_llama(seed=1)
    from mlx.utils import tree_flatten

    arrays = [array for _, array in tree_flatten(model.parameters())]
    found = weights_of(model, config)
    assert found.parameters == sum(array.size for array in arrays)
    assert found.token_bytes == found.size_bytes == sum(array.nbytes for array in arrays)
