"""`tq plan`: verdicts, what they recommend, exit codes, and numbers that are those of other commands."""

import json

import big_models
import pytest


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """Six layers of a 70B model: 4.3 GB at 4 bits. Nothing but headers."""
    return big_models.write(tmp_path_factory.mktemp("models") / "dense", "llama-3.3-70b", num_hidden_layers=6)


@pytest.fixture(scope="session")
def experts(tmp_path_factory):
    """A mixture of experts in a few layers: 1.2 GB at 4 bits."""
    return big_models.write(tmp_path_factory.mktemp("models") / "experts", "qwen3-30b-a3b", num_hidden_layers=2)


def planned(tq, *arguments, code=0):
    done = tq("plan", "--json", "-q", *arguments)
    assert (done.code, done.err) == (code, "")
    return json.loads(done.out)


def remedies(document):
    return {remedy["kind"]: remedy for remedy in document["remedies"]}


def test_what_fits_is_said_with_its_table(tq, dense):
    done = tq("plan", "-m", dense, "--hardware", "m4-16gb")
    assert done.code == 0
    facts, table, answer = done.out.rstrip().split("\n\n")
    assert [line.split("  ")[0] for line in facts.splitlines()] == ["model", "machine", "limit", "weights", "cache"]
    assert "machine  Apple M4, 16 GB, 12.7 GB for its GPU, 120 GB/s" in facts
    assert f"tq convert -m {dense}" in facts
    header, *rows = table.splitlines()
    assert header.split() == ["context", "weights", "cache", "prompt", "in", "all", "fits", "tokens/s"]
    assert [row.split()[0] for row in rows] == ["4096", "16384", "32768", "131072"]
    assert all(" < " in row for row in rows)  # bounds
    assert answer.startswith("It fits: ") and answer.endswith("and all of its context fits.")


def test_json_keys_stay(tq, experts):
    document = planned(tq, "-m", experts, "--hardware", "m1-8gb", "--memory", "1.3GB", code=1)
    assert list(document) == [
        "model", "packed", "convert", "verdict", "context", "largest_context", "max_context", "hardware",
        "source_bytes", "weights", "kv", "contexts", "bits", "remedies", "notes",
    ]  # fmt: skip
    assert list(document["hardware"]) == [
        "name", "chip", "memory_bytes", "gpu_bytes", "bandwidth_gb_s", "bandwidth_measured", "reserve_bytes",
        "limit_bytes",
    ]  # fmt: skip
    assert list(document["weights"]) == [
        "size_bytes", "memory_bytes", "parameters", "active_parameters", "bits_per_weight", "experts",
        "active_experts", "experts_bytes", "token_bytes", "by_role",
    ]  # fmt: skip
    assert list(document["kv"]) == ["packed", "prefill_step", "token_bytes", "kinds"]
    assert list(document["kv"]["kinds"][0]) == ["name", "caches", "shape", "token_bytes", "size_bytes"]
    row = [
        "context", "weights_bytes", "cache_bytes", "prompt_bytes", "total_bytes", "fits", "tokens_per_second_at_best",
    ]  # fmt: skip
    assert list(document["contexts"][0]) == row
    assert list(document["bits"][0]) == ["bits", *row, "largest_context"]
    assert list(document["remedies"][0]) == ["kind", "value", "text", "command"]
    assert list(document["weights"]["by_role"][0]) == ["role", "codes", "tensors", "weights", "bytes"]


def test_numbers_are_those_of_convert(tq, checkpoint, tmp_path):
    options = ["-m", checkpoint, "--bits", "3", "--head-bits", "8", "--protect", "0"]
    convert = json.loads(tq("convert", *options, "--dry-run", "--json").out)
    plan = planned(tq, *options, "--hardware", "m4-16gb")
    assert plan["weights"]["size_bytes"] == convert["size_bytes"]
    assert plan["weights"]["parameters"] == convert["weights"]
    assert plan["weights"]["bits_per_weight"] == convert["bits_per_weight"]
    assert plan["source_bytes"] == convert["source_bytes"]
    assert plan["convert"] == f"tq convert -m {checkpoint} --bits 3 --head-bits 8 --protect 0"
    assert tq(*plan["convert"].split()[1:], "-o", "out").code == 0
    made = planned(tq, "-m", tmp_path / "out", "--hardware", "m4-16gb")
    assert (made["packed"], made["convert"]) == (True, None)
    assert made["weights"]["size_bytes"] == convert["size_bytes"]
    assert made["contexts"] == plan["contexts"]


def test_the_command_that_is_printed_names_every_choice(tq, checkpoint):
    options = ["--codec", "affine", "--group-size", "32", "--mlp-bits", "3", "--dtype", "float16", "--recipe", "16gb"]
    plan = planned(tq, "-m", checkpoint, "--hardware", "m4-16gb", *options)
    convert = json.loads(tq(*plan["convert"].split()[1:], "--dry-run", "--json").out)
    assert convert["size_bytes"] == plan["weights"]["size_bytes"]


def test_a_context_that_is_too_long_can_be_shorter_packed_or_get_more_memory(tq, dense):
    document = planned(tq, "-m", dense, "--hardware", "m1-8gb", "--context", "20000", "--bits", "4", code=1)
    assert (document["verdict"], document["context"]) == ("adjust", 20000)
    assert document["bits"][0]["fits"] and not document["bits"][-1]["fits"]
    found = remedies(document)
    assert found["bits"]["value"] == 3
    assert found["bits"]["command"] == f"tq convert -m {dense} --bits 3"
    assert "wired-limit" not in found  # 8 GB are too few, whatever the limit
    best = document["largest_context"]
    assert found["context"]["value"] == best > 0
    assert planned(tq, "-m", dense, "--hardware", "m1-8gb", "--context", best)["verdict"] == "fits"
    assert planned(tq, "-m", dense, "--hardware", "m1-8gb", "--context", best + 256, code=1)["verdict"] == "adjust"


def test_packing_keys_and_values_is_recommended_where_it_is_enough(tq, dense):
    asked = ["-m", dense, "--hardware", "m4-16gb", "--context", "24576"]
    (need,) = planned(tq, *asked)["contexts"]
    asked += ["--memory", need["total_bytes"] - need["cache_bytes"] // 2]
    found = remedies(planned(tq, *asked, code=1))
    assert found["kv-bits"]["value"] == "8,4"
    packed = planned(tq, *asked, "--kv-bits", found["kv-bits"]["value"])
    assert (packed["verdict"], packed["kv"]["packed"]) == ("fits", "k8v4")
    assert "wired-limit" not in found  # --memory is not the GPU's limit


def test_a_smaller_step_is_recommended_where_it_is_enough(tq, experts):
    need = planned(tq, "-m", experts, "--hardware", "m4-16gb")["contexts"][0]
    asked = ["-m", experts, "--hardware", "m4-16gb", "--memory", str(need["total_bytes"] - 100_000_000)]
    step = remedies(planned(tq, *asked, code=1))["prefill-step"]["value"]
    assert step == 512
    assert planned(tq, *asked, "--prefill-step", step)["verdict"] == "fits"


def test_the_wired_limit_is_recommended_where_memory_is_there(tq, dense):
    done = tq("plan", "-m", dense, "--hardware", "m1-8gb", "--context", "4096", "--bits", "5", "--reserve", "0")
    assert done.code == 1
    *_, answer = done.out.rstrip().split("\n\n")
    assert answer.startswith("It does not fit: ")
    command = next(line.strip() for line in answer.splitlines() if "sysctl" in line)
    assert "a restart takes it back" in answer
    megabytes = int(command.removeprefix("sudo sysctl iogpu.wired_limit_mb="))
    assert megabytes % 512 == 0
    assert 5.73e9 < megabytes * 2**20 < 8 * 2**30


def test_experts_can_stay_on_the_disk(tq, experts):
    document = planned(tq, "-m", experts, "--hardware", "m1-8gb", "--memory", "1.5GB", "--bits", "8", code=1)
    found = remedies(document)
    assert document["verdict"] == "stream"
    assert found["stream"]["command"].startswith("tq stream -m CONVERTED --budget ")
    budget = found["stream"]["value"]
    weights, row = document["weights"], document["contexts"][0]
    assert budget == 1_500_000_000 - (row["total_bytes"] - weights["experts_bytes"])
    assert "once it is converted" in found["stream"]["text"]
    assert (weights["experts"], weights["active_experts"]) == (128, 8)


def test_nothing_helps_where_even_the_least_is_too_much(tq, dense):
    document = planned(tq, "-m", dense, "--hardware", "m1-8gb", "--memory", "100MB", code=1)
    assert (document["verdict"], document["remedies"], document["largest_context"]) == ("no", [], 0)
    done = tq("plan", "-m", dense, "--hardware", "m1-8gb", "--memory", "100MB")
    assert done.out.rstrip().endswith("where 100 MB are.")


def test_fit_chooses_the_most_bits_and_says_how_to_convert(tq, dense):
    asked = ["-m", dense, "--hardware", "m1-8gb", "--context", "2048", "--fit", "--mlp-bits", "2"]
    document = planned(tq, *asked)
    fitting = [row["bits"] for row in document["bits"] if row["fits"]]
    assert [row["bits"] for row in document["bits"]] == [8, 7, 6, 5, 4, 3, 2]
    assert document["convert"] == f"tq convert -m {dense} --bits {max(fitting)} --mlp-bits 2"
    assert document["weights"]["size_bytes"] == next(
        row["weights_bytes"] for row in document["bits"] if row["bits"] == max(fitting)
    )
    done = tq("plan", *asked)
    assert done.out.rstrip().endswith(f"\n  tq convert -m {dense} --bits {max(fitting)} --mlp-bits 2")
    assert planned(tq, "-m", dense, "--memory", "1GB", "--hardware", "m1-8gb", "--fit", code=1)["verdict"] != "fits"


def test_details_are_by_role_and_by_kind_of_cache(tq, experts):
    done = tq("plan", "-m", experts, "--hardware", "m4-16gb", "-v", "--kv-bits", "k8v3")
    _, roles, kinds, *_ = done.out.split("\n\n")
    assert {line.split()[0] for line in roles.splitlines()[1:]} >= {"expert", "expert_down", "router", "head", "norm"}
    assert "all tokens, k8v3" in kinds and "4 x 128" in kinds


def test_this_machine_is_the_default(tq, checkpoint):
    import psutil

    done = tq("plan", "-m", checkpoint, "--json")
    document = json.loads(done.out)
    assert done.code == 0
    assert document["hardware"]["name"] == "this"
    assert document["hardware"]["memory_bytes"] == psutil.virtual_memory().total
    assert (document["context"], document["max_context"]) == (256, 256)


def test_a_profile_sets_keys_values_and_steps(tq, dense):
    document = planned(tq, "-m", dense, "--hardware", "m4-16gb", "--profile", "16gb", "--context", "8192")
    assert (document["kv"]["packed"], document["kv"]["prefill_step"]) == ("k8v3", 512)
    auto = planned(tq, "-m", dense, "--hardware", "m4-16gb", "--profile", "auto", "--context", "8192")
    assert auto["contexts"] == document["contexts"]  # of the machine that is planned for


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware", "m9"], "error: --hardware 'm9' is none that tq knows: this, or a chip (m1, m1-pro"),
        (["--context", "much"], "error: --context much is not a list of numbers"),
        (["--context", "0"], "error: --context 0 must be 1 or more"),
        (["--context", "100000"], "error: --context 100000 is more than this model's 256 tokens"),
        (["--memory", "lots"], "error: 'lots' is no size such as"),
        (["--memory", "9" * 400], "error: 99999999999999999999... is more than any machine has"),
        (["--prefill-step", "0"], "error: --prefill-step must be 1 or more, not 0"),
        (["--prefill-step", "-3"], "error: --prefill-step must be 1 or more, not -3"),
        (["--fit", "--bits", "3"], "error: --fit chooses the bits: leave --bits out"),
        (["--bits", "9"], "error: --bits 9 is not one of 1 to 8, ternary, none"),
        (["--kv-bits", "99"], "error: "),
    ],
)
def test_what_is_asked_wrongly_is_said_and_costs_2(tq, checkpoint, arguments, message):
    done = tq("plan", "-m", checkpoint, *arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(message)


def test_a_packed_checkpoint_takes_no_options_for_weights(tq, checkpoint, tmp_path):
    assert tq("convert", "-m", checkpoint, "-o", "packed").code == 0
    done = tq("plan", "-m", "packed", "--bits", "3")
    assert (done.code, done.err.splitlines()[0]) == (2, "error: packed is packed already")


def test_a_recipe_of_the_settings_is_for_conversions_only(tq, checkpoint, tmp_path):
    (tmp_path / "mine.toml").write_text("[weights]\nbits = 3\n")
    (tmp_path / "tq.toml").write_text('recipe = "mine.toml"')
    converted = planned(tq, "-m", checkpoint, "--hardware", "m4-16gb")
    assert converted["convert"].startswith(f"tq convert -m {checkpoint} --recipe ")
    assert tq("convert", "-m", checkpoint, "-o", "packed").code == 0
    packed = planned(tq, "-m", "packed", "--hardware", "m4-16gb")
    assert packed["packed"] and packed["weights"]["size_bytes"] == converted["weights"]["size_bytes"]


def test_a_model_that_is_not_there_costs_1(tq):
    done = tq("plan", "-m", "./nowhere")
    assert done.code == 1 and done.err.startswith("error: no such model: ./nowhere")


def test_a_recurrent_model_takes_the_same_at_every_context(tq, tmp_path):
    import tiny_models

    tiny_models.write_checkpoint(tmp_path / "mamba", "mamba2")
    document = planned(tq, "-m", tmp_path / "mamba", "--hardware", "m4-16gb")
    assert document["max_context"] is None or document["kv"]["token_bytes"] == 0
    assert len({row["cache_bytes"] for row in document["contexts"]}) == 1
    done = tq("plan", "-m", tmp_path / "mamba", "--kv-bits", "8,3")
    assert done.code == 2 and "no cache of this model can be packed" in done.err


def test_what_cannot_be_played_through_is_not_counted_and_said(tq, tmp_path):
    import tiny_models

    tiny_models.write_checkpoint(tmp_path / "dbrx", "dbrx")
    done = tq("plan", "-m", tmp_path / "dbrx", "--hardware", "m4-16gb")
    assert done.code == 0
    assert "what a prompt takes cannot be found out" in done.err and "it is not counted" in done.err
