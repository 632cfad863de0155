"""Fixtures of the server's tests: tiny models that can be watched and held, and schedulers that end with the test."""

import pytest
import tiny_models
from served_models import Watched, with_tools
from small_models import VOCAB, Loaded, byte_tokenizer

from tq.engine.run.serve import prefixes
from tq.engine.run.serve import scheduler as scheduler_module
from tq.engine.run.serve.scheduler import Scheduler


@pytest.fixture
def model_of(monkeypatch, tokenizer, tmp_path):
    """model_of("qwen3"): a tiny random model of that type with room for the byte tokenizer's tokens."""

    def build(kind, **fields):
        monkeypatch.setitem(tiny_models._TABLE[kind], "vocab_size", VOCAB)
        model = Watched(tiny_models.build(kind))
        config = {**tiny_models._TABLE[kind], "max_position_embeddings": 4000}
        return Loaded(model, **{"tokenizer": tokenizer, "config": config, "path": tmp_path, **fields})

    return build


@pytest.fixture(scope="session")
def tool_tokenizer():
    """A byte tokenizer whose template has tools, which are called as Qwen's are."""
    template = (
        "{{ '<bos>' }}{% if tools %}{{ tools | tojson }}{% endif %}"
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}"
        "{% for tool_call in m.tool_calls or [] %}{{ tool_call.name }}<tool_call>{% endfor %}{{ '<turn>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    return with_tools(byte_tokenizer(chat_template=template))


@pytest.fixture
def serve(monkeypatch):
    """serve(loaded, kv, ...): a scheduler, closed at the end. The machine has memory, whatever else it runs."""
    for module in (prefixes, scheduler_module):
        monkeypatch.setattr(module, "memory_is_short", lambda: False)
    opened = []

    def build(loaded, kv=None, **how):
        opened.append(Scheduler(loaded, kv, **how))
        if isinstance(loaded.model, Watched):
            loaded.model.clear()
        return opened[-1]

    yield build
    for scheduler in opened:
        scheduler.close()
