"""Fixtures of the tests that run models."""

import pytest
from small_models import Loaded, Script, byte_tokenizer, tiny_llama


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def llama(tokenizer, tmp_path):
    """A loaded tiny llama; its folder is empty."""
    model, config = tiny_llama(seed=7)
    return Loaded(model, tokenizer, config, tmp_path)


@pytest.fixture
def say(tokenizer, tmp_path):
    """say(tokens or text, prompt_length): a loaded model that answers with exactly that."""

    def build(answer: list[int] | str | bytes, prompt_length: int = 3, **fields) -> Loaded:
        if isinstance(answer, str):
            answer = answer.encode()
        fields = {"tokenizer": tokenizer, "config": {}, "path": tmp_path, **fields}
        return Loaded(Script(list(answer), prompt_length), **fields)

    return build
