"""What reading a prompt takes: graphs by hand, and the measured peaks of running models."""

import gc

import mlx.core as mx
import pytest
import tiny_models

from tq.engine.cache.state import leaves
from tq.engine.run.plan.graph import CPU, GPU, Device, Graph, Node, in_order, peak_bytes, trace
from tq.engine.run.plan.skeleton import Blueprint, Skeleton, plain_attention
from tq.engine.run.plan.workspace import WorkspaceModel

ONE_BY_ONE = Device(10**9, None, copies=False)  # nothing in flight gives memory back: the sum of all


@pytest.fixture(autouse=True, scope="module")
def uncompiled():
    mx.disable_compile()
    yield
    mx.enable_compile()


def workspace(model_type, dtype=mx.float32, gpu=True, **changes):
    return WorkspaceModel(Skeleton(Blueprint(tiny_models.config(model_type) | changes, dtype, {})), gpu=gpu)


def chain(*names, size=100):
    """x -> y1 -> y2 -> ..., all of one size."""
    made = [f"y{i}" for i in range(1, len(names) + 1)]
    nodes = [Node(n, ((s, size),), ((t, size),)) for n, s, t in zip(names, ["x", *made[:-1]], made, strict=True)]
    return Graph(nodes, {"x": size}, {made[-1]: size})


def test_results_live_until_their_last_reader():
    prompt = Device(1, None, copies=False)
    # Products cannot write over what they read: two at a time, and ten more operations are in flight.
    assert peak_bytes(chain(*["Matmul"] * 30), ["x"], prompt) == (2 + 10) * 100
    # A weight takes nothing here.
    assert peak_bytes(chain("Matmul", "Matmul"), [], prompt) == 200


def test_equal_numbers_are_written_over():
    assert peak_bytes(chain("Exp", "Sigmoid", "Exp"), ["x"], ONE_BY_ONE) == 100
    # Not if somebody still reads them.
    graph = chain("Exp", "Sigmoid")
    graph.nodes.append(Node("Add", (("y1", 100), ("y2", 100)), (("y3", 100),)))
    assert peak_bytes(Graph(graph.nodes, graph.inputs, {"y3": 100}), ["x"], ONE_BY_ONE) == 200


def test_views_take_nothing_and_keep_their_memory():
    assert peak_bytes(chain("Transpose", "Squeeze", "Slice"), ["x"], ONE_BY_ONE) == 100
    assert peak_bytes(chain("Reshape", "Exp"), ["x"], ONE_BY_ONE) == 100
    assert peak_bytes(chain("Transpose", "Reshape", "Exp"), ["x"], ONE_BY_ONE) == 200  # a copy


def test_a_cpu_copies_what_products_cannot_read():
    graph = chain("Slice", "Matmul")
    assert peak_bytes(graph, ["x"], CPU) == peak_bytes(graph, ["x"], GPU) + 100


def test_order_is_breadth_first_from_what_is_wanted():
    nodes = [Node("Exp", (("x", 1),), (("a", 1),)), Node("Exp", (("x", 1),), (("b", 1),)), Node("Exp", (), (("c", 1),))]
    nodes.append(Node("Add", (("a", 1), ("b", 1)), (("d", 1),)))
    assert [node.outputs[0][0] for node in in_order(nodes, ["d"])] == ["b", "a", "d"]  # c is not wanted


def test_nothing_is_computed_to_list_a_graph():
    big = mx.broadcast_to(mx.zeros(()), (100_000, 100_000))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    graph = trace(lambda x: [(x @ x).sum(axis=0)], [big])
    assert mx.get_peak_memory() - before < 1e6
    assert [node.name for node in graph.nodes] == ["Matmul", "Reduce", "Squeeze"]
    assert list(graph.outputs.values()) == [400_000]


def measured(model_type, step, before):
    """Peak memory of a chunk, without what its caches hold afterwards."""
    from mlx_lm.models.cache import make_prompt_cache

    model = tiny_models.build(model_type)
    caches = make_prompt_cache(model)
    tokens = mx.arange(before + step)[None] % 100

    def read(part):
        with plain_attention(model):
            model(part, cache=caches)
        mx.eval([cache.state for cache in caches])

    for start in range(0, before, step):
        read(tokens[:, start : start + step])

    def held():
        return sum(cache.nbytes for cache in leaves(caches) if not (hasattr(cache, "empty") and cache.empty()))

    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    active, first = mx.get_active_memory(), held()
    read(tokens[:, before:])
    return mx.get_peak_memory() - active + first - held()


# Grouped queries, windows, sinks, latent attention, experts, state spaces, hybrid.
@pytest.mark.parametrize(
    "model_type", ["llama", "cohere", "gpt2", "gemma3_text", "gpt_oss", "deepseek_v3", "qwen3_moe", "granitemoehybrid"]
)
def test_planned_peaks_are_those_measured(model_type):
    """Between 1.0 and 1.4 times on an idle machine, more with state spaces: operations end earlier than they may."""
    planned = workspace(model_type, gpu=False).chunk_bytes(256, 768)
    assert 0.85 < planned / measured(model_type, 256, 768) < 2.2


def test_attention_that_a_loaded_model_has_put_in_is_left_out(monkeypatch):
    from mlx_lm.models import llama

    before = workspace("llama", gpu=False).chunk_bytes(64, 0)

    def hooked(*_, **__):
        raise AssertionError("not of a model without weights")

    monkeypatch.setattr(llama, "scaled_dot_product_attention", hooked)
    assert workspace("llama", gpu=False).chunk_bytes(64, 0) == before
    assert llama.scaled_dot_product_attention is hooked


def test_a_gpu_keeps_no_scores_where_it_has_a_kernel():
    kernel, none = (workspace("qwen3", head_dim=dim, num_hidden_layers=2) for dim in (64, 96))
    heads, tokens = 4, 512
    more = heads * tokens * 4096 * 4  # scores of 4096 more tokens before
    growth = [model.chunk_bytes(tokens, 8192) - model.chunk_bytes(tokens, 4096) for model in (kernel, none)]
    assert growth[0] <= more / 4  # the cache itself, while it grows
    assert growth[1] >= more


def test_longer_prompts_add_in_proportion_to_what_they_add():
    model = workspace("cohere", gpu=False)
    exact = [model.chunk_bytes(128, before) for before in (384, 3968)]
    assert model.size_bytes(513, 128) == exact[0]
    assert model.size_bytes(4097, 128) == pytest.approx(exact[1], rel=0.05)
    assert model.size_bytes(65, 128) == model.chunk_bytes(128, 0) // 2


def test_token_by_token_models_are_listed_for_few_tokens():
    model = workspace("rwkv7", gpu=False)
    assert model._loops
    short, long = model.chunk_bytes(64, 0), model.chunk_bytes(2048, 0)
    assert 8 * short < long < 64 * short
