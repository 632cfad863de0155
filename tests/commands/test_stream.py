"""`tq stream`: the answer of `tq run`, what it says about the disk, and what it refuses."""

import json

import pytest

LIVELY = ["-n", "24", "--min-tokens", "24", "--temp", "1", "--seed", "3"]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A folder with a tiny random mixture of experts, packed to 4 bits, and its byte-level tokenizer."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import qwen3_moe
    from small_models import VOCAB, byte_tokenizer

    from tq.engine.model.convert import convert
    from tq.engine.model.plan import make_plan
    from tq.engine.model.recipe import Recipe
    from tq.engine.model.sources import open_source

    config = {
        "model_type": "qwen3_moe",
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    folder = tmp_path_factory.mktemp("mixture")
    source = folder / "source"
    source.mkdir()
    mx.random.seed(5)
    model = qwen3_moe.Model(qwen3_moe.ModelArgs.from_dict(config))
    mx.save_safetensors(str(source / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (source / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(source)
    plan = make_plan(open_source(str(source)), Recipe.from_options(bits=4, group_size=None), dtype="float32")
    list(convert(plan, folder / "tq4"))
    return folder / "tq4"


@pytest.mark.parametrize("how", [[], ["--kv-bits", "4", "--kv-sink", "2"], ["--prefill-step", "3"]])
def test_it_gives_the_answer_of_run(tq, mixture, how):
    asked = ["-m", mixture, "hello", *LIVELY, *how]
    answer = tq("stream", *asked, "--budget", "40KB").out
    assert len(answer) > 10
    assert answer == tq("run", *asked).out


def test_stats_tell_of_the_disk(tq, mixture):
    result = tq("stream", "-m", mixture, "hello", "-n", "6", "--budget", "30KB", "--stats", "--prefetch", "off")
    assert "experts in 2" in result.err and "read for a token" in result.err
    assert "guessed" not in result.err
    guessing = tq("stream", "-m", mixture, "hello", *LIVELY, "--budget", "120KB", "--stats", "--prefetch", "on")
    assert "experts were guessed" in guessing.err
    assert "experts" not in tq("run", "-m", mixture, "hello", "-n", "2", "--stats").err


def test_json_has_the_same_numbers(tq, mixture):
    def found(*arguments):
        return json.loads(tq("stream", "-m", mixture, "hello", *LIVELY, "--json", *arguments).out)

    small, large = found("--budget", "20KB"), found("--budget", "1GB")
    assert small["text"] == large["text"]
    assert large["stream"]["budget_bytes"] >= large["stream"]["experts_bytes"] > 4 * small["stream"]["budget_bytes"]
    assert small["stream"]["read_bytes_per_token"] > large["stream"]["read_bytes_per_token"]
    assert small["stream"]["hit_rate"] < large["stream"]["hit_rate"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--budget", "much"], 2, "'much' is no size"),
        (["--budget", "0"], 2, "must be more than 0"),
        (["--budget", "1KB"], 1, "holds no expert: this model needs at least"),
        (["--policy", "fifo"], 2, "'fifo' is not one of lru, lfu, lrfu"),
        (["--prefetch", "maybe"], 2, "'maybe' is not one of auto, on, off"),
        (["--workers", "0"], 2, "from 1 to 64"),
        (["--max-active-experts", "0"], 2, "at least 1 expert"),
    ],
)
def test_a_wrong_value_is_refused_in_a_sentence(tq, mixture, arguments, code, message):
    result = tq("stream", "-m", mixture, "hello", *arguments)
    assert (result.code, message in result.err, "Traceback" in result.err) == (code, True, False), result.err


def test_fewer_experts_are_another_answer_and_said(tq, mixture):
    whole = tq("stream", "-m", mixture, "hello", *LIVELY, "--budget", "1MB")
    fewer = tq("stream", "-m", mixture, "hello", *LIVELY, "--budget", "1MB", "--max-active-experts", "1")
    assert fewer.out != whole.out
    assert "1 expert" in fewer.err and "1 expert" not in whole.err


def test_a_model_without_experts_is_refused(tq, checkpoint):
    result = tq("stream", "-m", checkpoint, "hello")
    assert result.code == 1 and "tq convert" in result.err


def sweep(tq, mixture, text, *arguments):
    return tq("bench", "-m", mixture, "--sweep", "cache", "--context", "40", "--text", text, *arguments)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("A mixture of experts runs a few of them for each token. " * 9)
    return path


def test_a_sweep_compares_policies_and_budgets_without_running_each(tq, mixture, text):
    result = sweep(tq, mixture, text, "--json", "--disk-gb-s", "2", "--memory-gb-s", "50")
    found = json.loads(result.out)
    assert (found["tokens"], found["layers"], found["disk_gb_s"], found["memory_gb_s"]) == (40, 3, 2.0, 50.0)
    rates = {(row["share"], row["policy"]): row["hit_rate"] for row in found["rows"]}
    assert {policy for _, policy in rates} == {"lru", "lfu", "lrfu", "optimal"}
    assert rates[0.75, "optimal"] > rates[0.25, "optimal"] >= rates[0.25, "lru"]
    for row in found["rows"]:
        compute = (found["active_bytes"] + size_of(mixture) - found["experts_bytes"]) / 50e9
        assert row["tokens_per_second"] == pytest.approx(1 / (compute + row["read_bytes_per_token"] / 2e9))
    table = sweep(tq, mixture, text).out
    assert "predicted tokens/s" in table and "the disk reads" in table


def test_a_run_can_be_recorded_and_replayed(tq, mixture, tmp_path):
    file = tmp_path / "trace.npz"
    ran = json.loads(tq("stream", "-m", mixture, "hello", *LIVELY, "--budget", "1MB", "--trace", file, "--json").out)
    replayed = tq("bench", "-m", mixture, "--sweep", "cache", "--trace", file, "--json")
    found = json.loads(replayed.out)
    # The last token of the answer is read by nobody.
    assert (found["tokens"], found["text"]) == (ran["prompt_tokens"] + ran["tokens"] - 1, str(file))
    both = tq("bench", "-m", mixture, "--sweep", "cache", "--trace", file, "--context", "40")
    assert both.code == 2 and "takes the place of a text" in both.err
    file.write_text("nothing")
    assert "is no trace of experts" in tq("bench", "-m", mixture, "--sweep", "cache", "--trace", file).err


def size_of(folder) -> int:
    from tq.engine.model.safetensors import read_folder_headers

    return sum(header.size_bytes for header in read_folder_headers(folder).values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "4"], "--prompt is not for --sweep cache"),
        (["--kv-bits", "4"], "--kv-bits is not for --sweep cache"),
        (["--context", "8,9"], "one number of tokens"),
        (["--disk-gb-s", "0"], "--disk-gb-s must be more than 0"),
        (["-m", "other"], "for one model"),
    ],
)
def test_a_sweep_refuses_what_it_would_not_use(tq, mixture, text, arguments, message):
    result = sweep(tq, mixture, text, *arguments)
    assert (result.code, message in result.err) == (2, True), result.err


def test_bandwidths_are_for_this_sweep_alone(tq, mixture):
    result = tq("bench", "-m", mixture, "--disk-gb-s", "2")
    assert result.code == 2 and "--disk-gb-s is for --sweep cache" in result.err


def test_defaults_are_those_of_the_engine():
    from tq.engine.machine.settings import BY_NAME
    from tq.engine.stream.settings import StreamSettings

    named = [BY_NAME[f"stream.{name}"].default for name in ("budget", "workers", "policy", "prefetch")]
    assert StreamSettings.from_options(*named, None) == StreamSettings()


def test_a_conversation_can_be_streamed(tq, mixture):
    asked = ["chat", "-m", mixture, *LIVELY, "--prompt-cache", "0"]
    answers = tq(*asked, "--stream", "40KB", stdin="hello\nagain\n")
    assert (answers.code, len(answers.out.split()) > 1) == (0, True), answers.err
    assert answers.out == tq(*asked, stdin="hello\nagain\n").out


def test_a_server_can_stream_for_several_at_once(mixture):
    from tq.engine.model.load import load
    from tq.engine.run.sampling import GenerateOptions
    from tq.engine.run.serve.requests import Done, Piece, Request
    from tq.engine.run.serve.scheduler import Scheduler
    from tq.engine.stream.settings import StreamSettings

    def answers(stream):
        scheduler = Scheduler(load(str(mixture), stream=stream), None, prefix_bytes=0)
        try:
            options = GenerateOptions(max_tokens=16, min_tokens=16)
            requests = [Request(messages=None, prompt=tuple(range(n, 20 + 2 * n)), options=options) for n in (1, 5, 9)]
            events = [list(asked) for asked in [scheduler.submit(request) for request in requests]]
        finally:
            scheduler.close()
        assert all(isinstance(of_one[-1], Done) for of_one in events)
        return ["".join(e.text for e in of_one if isinstance(e, Piece)) for of_one in events]

    assert answers(StreamSettings(budget_bytes=40_000)) == answers(None)
