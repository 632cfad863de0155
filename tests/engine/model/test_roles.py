"""What each matrix is for: named cases, and rules that hold for every model type of mlx-lm, with 40 experts each."""

import importlib

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_unflatten
from tiny_models import CONFIGS, join

from tq.engine.model.roles import NOT_CALLED, TOO_SMALL, VETOED, Matrix, Role, matrices

# More experts than the least size that is worth quantizing, and a number that no other axis of a tiny model has.
N_EXPERTS = 40
EXPERT_COUNTS = {"num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"}
ZERO_EXPERTS = 2  # of longcat: experts that do nothing, to which its router may send a token too


def many_experts(fields):
    return {
        key: many_experts(value) if isinstance(value, dict) else N_EXPERTS if key in EXPERT_COUNTS and value else value
        for key, value in fields.items()
    }


def build(model_type, **changes):
    module = importlib.import_module(f"mlx_lm.models.{model_type}")
    return module.Model(module.ModelArgs.from_dict(many_experts(join(CONFIGS[model_type], changes))))


@pytest.fixture(scope="module")
def every_type():
    """The matrices of each model type. Nothing is computed: the parameters of a new model are lazy."""
    return {model_type: matrices(build(model_type)) for model_type in CONFIGS}


def network(**modules):
    """A model of modules by path, with _ for the dots of a path."""
    root = nn.Module()
    for name, value in tree_unflatten([(path.replace("__", "."), module) for path, module in modules.items()]).items():
        root[name] = value
    return root


CASES = [
    # model type, path, role
    ("llama", "model.layers.0.self_attn.q_proj", Role.ATTENTION),
    ("llama", "model.layers.1.self_attn.o_proj", Role.ATTENTION),
    ("llama", "model.layers.0.mlp.gate_proj", Role.MLP),
    ("llama", "model.layers.0.mlp.down_proj", Role.MLP),
    ("llama", "model.embed_tokens", Role.EMBEDDING),
    ("llama", "lm_head", Role.HEAD),
    ("qwen3_moe", "model.layers.1.mlp.gate", Role.ROUTER),
    ("qwen3_moe", "model.layers.1.mlp.switch_mlp.gate_proj", Role.EXPERT),
    ("qwen3_moe", "model.layers.1.mlp.switch_mlp.up_proj", Role.EXPERT),
    ("qwen3_moe", "model.layers.1.mlp.switch_mlp.down_proj", Role.EXPERT_DOWN),
    ("qwen2_moe", "model.layers.0.mlp.shared_expert_gate", Role.ROUTER),
    ("qwen2_moe", "model.layers.0.mlp.shared_expert.down_proj", Role.SHARED_EXPERT),
    ("qwen3_next", "model.layers.0.linear_attn.in_proj_qkvz", Role.ATTENTION),
    ("deepseek_v3", "model.layers.0.self_attn.embed_q", Role.ATTENTION),
    ("deepseek_v3", "model.layers.0.self_attn.unembed_out", Role.ATTENTION),
    ("deepseek_v3", "model.layers.0.self_attn.kv_a_proj_with_mqa", Role.ATTENTION),
    ("deepseek_v2", "model.layers.0.self_attn.kv_b_proj", Role.ATTENTION),
    ("deepseek_v3", "model.layers.0.mlp.down_proj", Role.MLP),
    ("deepseek_v3", "model.layers.1.mlp.shared_experts.gate_proj", Role.SHARED_EXPERT),
    ("deepseek_v32", "model.layers.0.self_attn.indexer.wq_b", Role.ATTENTION),
    ("deepseek_v41", "model.layers.0.self_attn.o_a_proj", Role.ATTENTION),  # a SwitchLinear over groups of heads
    ("deepseek_v41", "model.layers.1.self_attn.compressor.gate_proj", Role.ATTENTION),
    ("gpt_oss", "model.layers.0.mlp.router", Role.ROUTER),
    ("gpt_oss", "model.layers.0.mlp.experts.gate_proj", Role.EXPERT),
    ("gpt_oss", "model.layers.0.mlp.experts.down_proj", Role.EXPERT_DOWN),
    ("jamba", "model.layers.0.feed_forward.down_proj", Role.MLP),
    ("jamba", "model.layers.1.feed_forward.router", Role.ROUTER),
    ("jamba", "model.layers.0.mamba.x_proj", Role.ATTENTION),
    ("mamba", "backbone.layers.0.mixer.in_proj", Role.ATTENTION),
    ("lfm2", "model.layers.0.feed_forward.w2", Role.MLP),
    ("rwkv7", "model.layers.0.ffn.key", Role.MLP),
    ("rwkv7", "model.layers.0.attn.w_lora.lora.0", Role.ATTENTION),
    ("gemma3n", "model.language_model.embed_tokens_per_layer", Role.EMBEDDING),
    ("gemma3n", "model.language_model.layers.0.laurel.linear_left", Role.MLP),
    ("gemma3n", "model.language_model.layers.0.altup.modality_router", Role.ROUTER),
    ("gemma3n", "model.language_model.per_layer_model_projection", Role.OTHER),
    ("gemma4", "language_model.model.layers.0.router.proj", Role.ROUTER),
    ("gpt2", "model.wte", Role.EMBEDDING),
    ("gpt2", "model.wpe", Role.OTHER),
    ("gpt2", "model.h.0.attn.c_proj", Role.ATTENTION),
    ("gpt2", "model.h.0.mlp.c_proj", Role.MLP),
    ("gpt_neox", "model.embed_out", Role.HEAD),
    ("gpt_neox", "model.h.0.mlp.dense_4h_to_h", Role.MLP),
    ("internlm2", "output", Role.HEAD),
    ("phixtral", "lm_head.linear", Role.HEAD),
    ("talkie", "model.blocks.0.attn.attn_resid", Role.ATTENTION),
    ("talkie", "model.blocks.0.mlp.mlp_gate", Role.MLP),
    ("dbrx", "transformer.blocks.0.ffn.router.layer", Role.ROUTER),
    ("dbrx", "transformer.blocks.0.ffn.experts.3.v1", Role.EXPERT),  # one Linear for each expert
    ("dbrx", "transformer.blocks.0.ffn.experts.3.w2", Role.EXPERT_DOWN),
    ("bailing_moe", "model.layers.1.mlp.gate.gate_proj", Role.ROUTER),
    ("hunyuan", "model.layers.0.mlp.gate.wg", Role.ROUTER),
    ("hunyuan", "model.layers.0.mlp.shared_mlp.up_proj", Role.SHARED_EXPERT),
    ("laguna", "model.layers.1.mlp.gate.proj", Role.ROUTER),
    ("longcat_flash", "model.layers.0.mlp.router.classifier", Role.ROUTER),
    ("longcat_flash", "model.layers.0.mlps.1.gate_proj", Role.MLP),
    ("longcat_flash_ngram", "model.ngram_embeddings.word_embeddings", Role.EMBEDDING),
    ("longcat_flash_ngram", "lm_head", Role.HEAD),
    ("granitemoe", "model.layers.0.block_sparse_moe.router.layer", Role.ROUTER),
    ("step3p5", "model.layers.1.mlp.share_expert.up_proj", Role.SHARED_EXPERT),
    ("muse_glimmer", "model.layers.0.self_attn.gate_proj", Role.ATTENTION),
    ("kimi_k3", "language_model.model.layers.1.mlp.routed_expert_down_proj", Role.MLP),
]


@pytest.mark.parametrize(("model_type", "path", "role"), CASES, ids=lambda value: str(value))
def test_representative_matrices(every_type, model_type, path, role):
    assert every_type[model_type][path].role == role


def test_nemotron_names_every_block_mixer(every_type):
    roles = {path.partition("mixer.")[2]: m.role for path, m in every_type["nemotron_h"].items() if "mixer." in path}
    assert roles["q_proj"] == roles["o_proj"] == roles["in_proj"] == roles["out_proj"] == Role.ATTENTION
    assert roles["up_proj"] == roles["down_proj"] == Role.MLP
    assert roles["switch_mlp.fc1"] == Role.EXPERT
    assert roles["switch_mlp.fc2"] == Role.EXPERT_DOWN
    assert roles["shared_experts.down_proj"] == Role.SHARED_EXPERT
    assert roles["fc1_latent_proj"] == roles["fc2_latent_proj"] == Role.MLP  # around the experts


def test_olmo_names_its_matrices_otherwise():
    """mlx-lm cannot build it here; the names are those of its file."""
    prefix = "model__transformer__"
    found = matrices(
        network(
            **{
                f"{prefix}wte": nn.Embedding(160, 64),
                f"{prefix}blocks__0__att_proj": nn.Linear(64, 192),
                f"{prefix}blocks__0__attn_out": nn.Linear(64, 64),
                f"{prefix}blocks__0__ff_proj": nn.Linear(64, 256),
                f"{prefix}blocks__0__ff_out": nn.Linear(128, 64),
                f"{prefix}ff_out": nn.Linear(64, 160),
            }
        )
    )
    assert [m.role.value for m in sorted(found.values(), key=lambda m: m.path)] == [
        "attention", "attention", "mlp", "mlp", "head", "embedding",
    ]  # fmt: skip


# --- every model type ---


def test_no_router_is_ever_quantized(every_type):
    """A matrix with one output for each expert decides which of them run."""
    for model_type, found in every_type.items():
        for m in found.values():
            if m.kind == "linear" and m.shape[-2] in (N_EXPERTS, N_EXPERTS + ZERO_EXPERTS):
                assert m.role == Role.ROUTER, (model_type, m.path)
            if m.role == Role.ROUTER:
                assert not m.quantizable, (model_type, m.path)


def test_every_block_of_experts_has_one_down_matrix(every_type):
    n_types = 0
    for model_type, found in every_type.items():
        experts = [m for m in found.values() if m.role in (Role.EXPERT, Role.EXPERT_DOWN)]
        n_types += bool(experts)
        blocks = {}
        for m in experts:
            blocks.setdefault(m.path.rpartition(".")[0], []).append(m.role)
        for path, roles in blocks.items():
            assert roles.count(Role.EXPERT_DOWN) == 1 < len(roles), (model_type, path)
    assert n_types > 40


def test_only_one_head_and_always_an_embedding(every_type):
    for model_type, found in every_type.items():
        if model_type == "prism_hadamard_qwen35":
            continue  # its embedding and head are packed already
        roles = [m.role for m in found.values()]
        assert roles.count(Role.HEAD) <= 1, model_type
        assert Role.EMBEDDING in roles, model_type


def test_blocks_have_the_role_of_their_name(every_type):
    attention = {"self_attn", "attn", "attention", "linear_attn", "mamba", "conv", "temporal_block", "local_mixer"}
    feed_forward = {"mlp", "feed_forward", "ffn", "mlps", "mlp_block", "block_sparse_moe", "moe"}
    in_feed_forward = {Role.MLP, Role.EXPERT, Role.EXPERT_DOWN, Role.SHARED_EXPERT, Role.ROUTER}
    seen = 0
    for model_type, found in every_type.items():
        for m in found.values():
            blocks = set(m.path.split(".")[:-1])
            if blocks & attention:
                assert m.role in (Role.ATTENTION, Role.VALUE), (model_type, m.path)
                assert (m.role == Role.VALUE) == (m.path.rpartition(".")[2] == "v_proj"), (model_type, m.path)
            elif blocks & feed_forward:
                assert m.role in in_feed_forward, (model_type, m.path)
            seen += bool(blocks & (attention | feed_forward))
    assert seen > 2000


def test_what_has_no_role_is_named_here(every_type):
    other = {m.path.rpartition(".")[2] for found in every_type.values() for m in found.values() if m.role == Role.OTHER}
    assert other == {"wpe", "per_layer_model_projection", "output_attn_res_proj"}


def test_convolutions_and_positions_are_never_quantized(every_type):
    for model_type, found in every_type.items():
        for m in found.values():
            name = m.path.rpartition(".")[2]
            assert "conv1d" not in name and name != "conv", (model_type, m.path)
            assert not (name == "wpe" and m.quantizable)
            assert m.kind != "embedding" or name == "wpe" or m.role == Role.EMBEDDING, (model_type, m.path)


# --- what stays, and why ---


@pytest.mark.parametrize(
    ("model_type", "path", "role", "reason"),
    [
        ("bailing_moe_v3", "lm_head", Role.HEAD, VETOED),
        ("bailing_moe_v3", "model.word_embeddings", Role.EMBEDDING, VETOED),
        ("spark2_5", "model.layers.0.self_attn.g_proj", Role.ATTENTION, TOO_SMALL),
        ("llama4_text", "model.embed_tokens", Role.EMBEDDING, NOT_CALLED),
        ("minicpm", "model.embed_tokens", Role.EMBEDDING, NOT_CALLED),
        ("gemma3n", "model.language_model.layers.0.altup.prediction_coefs", Role.MLP, TOO_SMALL),
        ("recurrent_gemma", "model.layers.1.temporal_block.k_proj", Role.ATTENTION, TOO_SMALL),
    ],
)
def test_a_matrix_that_stays_keeps_its_role_and_has_a_reason(every_type, model_type, path, role, reason):
    m = every_type[model_type][path]
    assert (m.role, m.kept, m.quantizable) == (role, reason, False)


@pytest.mark.parametrize(("shape", "quantizable"), [((32, 32), True), ((31, 64), False), ((64, 31), False)])
def test_matrices_of_less_than_32_inputs_or_outputs_stay(shape, quantizable):
    layers = network(model__layers__0__mlp__up_proj=nn.Linear(shape[1], shape[0], bias=False))
    (m,) = matrices(layers).values()
    assert (m.shape, m.role, m.quantizable) == (shape, Role.MLP, quantizable)


def test_a_subclass_of_a_layer_may_compute_something_else():
    class Scaled(nn.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    assert matrices(network(model__layers__0__mlp__up_proj=Scaled(64, 64))) == {}


@pytest.mark.parametrize(("tied", "roles"), [(True, {"embedding"}), (False, {"embedding", "head"})])
def test_a_tied_head_is_no_matrix_of_its_own(tied, roles):
    found = matrices(build("llama", tie_word_embeddings=tied))
    assert {m.role.value for m in found.values()} - {"attention", "value", "mlp"} == roles


@pytest.mark.parametrize(
    ("path", "layer"),
    [("model.layers.11.mlp.up_proj", 11), ("layers.0.attn.lora.2", 0), ("lm_head", None), ("model.h.3.attn", 3)],
)
def test_the_layer_is_the_first_number_of_a_path(path, layer):
    assert Matrix(path, "linear", Role.MLP, (64, 64)).layer == layer


def test_nothing_is_computed_to_find_the_roles():
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    matrices(build("llama", hidden_size=4096, intermediate_size=16384, vocab_size=100_000))
    assert mx.get_peak_memory() - before < 1 << 20
