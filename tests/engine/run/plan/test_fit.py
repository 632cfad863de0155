"""Verdicts, limits and bounds, as arithmetic."""

import pytest

from tq.engine.machine.hardware import GIB, Target
from tq.engine.model.plan import BASE_MEMORY
from tq.engine.run.plan.caches import Usage
from tq.engine.run.plan.fit import MIB, Memory, Need, Requirements, streaming, tokens_per_second

MAC = Target("m4-16gb", "Apple M4", 16 * GIB, 12_713_115_648, 120.0)
LINUX = Target("this", "CPU", 16 * GIB, None, None)


def requirements(token_bytes=1000, weights=10_000_000, step=256, prompt=0):
    """Caches that grow in steps."""

    def cache(context):
        size = -(-context // step) * step * token_bytes
        return Usage(size, size + 7, context * token_bytes)

    return Requirements(weights, 5_000_000, cache, lambda context: prompt * context)


def test_a_need_is_weights_cache_and_prompt():
    need = requirements(prompt=3).at(300)
    assert (need.weights, need.cache, need.prompt) == (10_000_000, 512_000, 7 + 900)
    assert need.total == 10_000_000 + 512_000 + 907
    assert need.read == 5_000_000 + 300_000


@pytest.mark.parametrize("limit", [10_000_000, 10_256_007, 10_256_006, 11_000_000, 15_432_100, 42_768_007, 42_768_006])
@pytest.mark.parametrize("prompt", [0, 11])
def test_the_largest_context_is_the_last_that_fits(limit, prompt):
    needs, most = requirements(prompt=prompt), 32768
    found = needs.largest_context(limit, most)
    every = [context for context in range(256, most + 1, 256) if needs.at(context).total <= limit]
    assert found == (max(every) if every else 0)


def test_few_contexts_are_looked_at():
    asked = []
    needs = requirements()
    at = needs.at
    needs.at = lambda context: asked.append(context) or at(context)
    assert needs.largest_context(200_000_000, 1_000_000) == 189_952
    assert len(asked) < 12
    asked.clear()
    assert needs.largest_context(9_000_000, 1_000_000) == 0
    assert asked == []  # the weights alone are too large


def test_the_limit_is_what_the_gpu_may_take_or_what_memory_leaves():
    assert Memory(MAC).limit == 12_713_115_648
    assert Memory(MAC, reserve=8 * GIB).limit == 8 * GIB - BASE_MEMORY
    assert Memory(LINUX, reserve=GIB).limit == 15 * GIB - BASE_MEMORY
    assert Memory(MAC, budget=5).limit == 5
    assert Memory(MAC, reserve=17 * GIB).limit == 0


def test_a_raised_limit_is_rounded_up_and_leaves_the_reserve():
    memory = Memory(MAC, reserve=2 * GIB)
    assert memory.wired_limit_mib(13_000_000_000) == 12_800  # 12398 MiB, in steps of 512
    assert memory.wired_limit_mib(memory.most) == memory.most // MIB
    assert memory.wired_limit_mib(memory.most + 1) is None
    assert Memory(LINUX).wired_limit_mib(1) is None
    assert Memory(MAC, budget=5).wired_limit_mib(1) is None


def test_streaming_keeps_all_but_the_experts():
    need = Need(4096, weights=20_000, cache=1000, prompt=500, read=None)
    plan = streaming(need, experts_bytes=18_000, expert_bytes=100, active=2, limit=8000)
    assert plan is not None
    assert (plan.resident_bytes, plan.least_bytes, plan.budget_bytes) == (3500, 400, 4500)
    assert plan.share == 0.25
    assert streaming(need, 18_000, 100, 2, limit=3900) is not None
    assert streaming(need, 18_000, 100, 2, limit=3899) is None


def test_a_bound_is_bandwidth_over_bytes():
    assert tokens_per_second(2_000_000_000, 120.0) == 60
    assert tokens_per_second(100_000_000, 120.0) is None  # a cache may hold it
    assert tokens_per_second(None, 120.0) is None
    assert tokens_per_second(2_000_000_000, None) is None
