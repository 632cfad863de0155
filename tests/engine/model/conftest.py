"""Small checkpoints to plan, convert and load."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

# Sizes that groups of 64 divide, but for the down projection, which takes 32; no powers of two but the width.
LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 224,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 160,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="session")
def make_checkpoint():
    """make_checkpoint(folder, dtype, **config): a random llama in a folder; returns the folder."""
    from mlx_lm.models import llama

    def make(folder: Path, dtype: str = "float32", seed: int = 3, **changes) -> Path:
        config = LLAMA | {"torch_dtype": dtype} | changes
        folder.mkdir(parents=True)
        mx.random.seed(seed)
        model = llama.Model(llama.ModelArgs.from_dict(config))
        weights = {name: a.astype(getattr(mx, dtype)) for name, a in tree_flatten(model.parameters())}
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.fixture(scope="session")
def source(tmp_path_factory, make_checkpoint):
    """A float32 llama of two layers, with a head of its own. Tests only read it."""
    return make_checkpoint(tmp_path_factory.mktemp("source") / "tiny")
