"""`tq bench`: its tables in every form, its plots, what it refuses, and what an interrupted run still says."""

import csv
import io
import json
import sys

import pytest

from tq.commands import plots
from tq.errors import TQError

QUICK = ["--prompt", "6", "--generate", "3", "--rounds", "2"]


@pytest.fixture(autouse=True)
def bandwidth(monkeypatch):
    monkeypatch.setattr("tq.engine.ops.selftest.read_bandwidth", lambda: 20.0)


def document(tq, *arguments):
    result = tq("bench", *arguments, *QUICK, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


def table(text):
    """The last table of a text as dictionaries, cut where its header's columns begin."""
    lines = text.strip().split("\n\n")[-1].splitlines()
    header = lines[0]
    names = [name for name in header.split("  ") if name.strip()]
    return [name.strip() for name in names], lines[1:]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 30)
    return path


def test_a_table_for_people(tq, checkpoint):
    result = tq("bench", "-m", checkpoint, *QUICK, "--context", "0,9")
    assert result.code == 0
    heading, columns, *rows = [line for line in result.out.splitlines() if line]
    assert "threads, reads memory at 20.0 GB/s; tq" in heading
    assert columns.startswith(f"{checkpoint}: ") and "bits each), loaded in" in columns
    names, rows = table(result.out)
    assert names == [
        "model", "context", "prefill 6", "best prefill", "decode 3", "best decode", "of memory", "KV", "peak"
    ]  # fmt: skip
    assert [row.split()[:2] for row in rows] == [["tiny", "0"], ["tiny", "9"]]


def test_one_document_for_programs(tq, checkpoint):
    found = document(tq, "-m", checkpoint, "--context", "4")
    assert found["complete"] is True
    assert (found["prompt"], found["generate"], found["text"]) == (6, 3, None)
    assert {"chip", "threads", "tq", "mlx", "other_load_percent"} <= set(found["machine"])
    (model,), (row,) = found["models"], found["rows"]
    assert model["model"] == str(checkpoint)
    assert model["parameters"] * 4 == model["size_bytes"] == model["memory_bytes"]
    assert model["bits_per_weight"] == 32
    assert (row["label"], row["kv"], row["context"], row["rounds"]) == ("tiny", "none", 4, 2)
    assert row["prefill_ratio"] == row["decode_ratio"] == 1
    assert row["kv_bytes"] > 0 and row["peak_memory_bytes"] > row["kv_bytes"]


def test_models_are_compared_with_the_first(tq, checkpoint):
    result = tq("bench", "-m", checkpoint, "-m", checkpoint, *QUICK)
    names, rows = table(result.out)
    assert "prefill ×" in names and "decode ×" in names
    assert [row.split("  ")[0] for row in rows] == ["tiny", "tiny (2)"]
    assert rows[0].split().count("1.00") == 2


def test_the_same_records_as_csv_and_markdown(tq, checkpoint):
    arguments = ["bench", "-m", checkpoint, *QUICK, "--context", "0,5", "--format"]
    rows = list(csv.DictReader(io.StringIO(tq(*arguments, "csv").out)))
    assert [row["context"] for row in rows] == ["0", "5"]
    assert float(rows[1]["decode_tokens_per_second"]) > 0
    lines = tq(*arguments, "markdown").out.splitlines()
    assert lines[0].startswith("| model | context | prefill 6 |") and len(lines) == 4
    assert json.loads(tq(*arguments, "json").out)["rows"][1]["context"] == 5


def test_a_half_that_is_not_wanted_has_no_column(tq, checkpoint):
    names, _ = table(tq("bench", "-m", checkpoint, "--prompt", "0", "--generate", "2", "--rounds", "1").out)
    assert not any("prefill" in name for name in names)
    names, _ = table(tq("bench", "-m", checkpoint, "--prompt", "4", "--generate", "0", "--rounds", "1").out)
    assert not any("decode" in name for name in names)


def test_packed_keys_and_values_are_said_so(tq, checkpoint):
    arguments = ["--kv-bits", "8,4", "--kv-sink", "0", "--context", "200"]
    packed, plain = document(tq, "-m", checkpoint, *arguments), document(tq, "-m", checkpoint, "--context", "200")
    assert packed["rows"][0]["kv"] == "k8v4"
    assert packed["rows"][0]["kv_bytes"] != plain["rows"][0]["kv_bytes"]
    names, rows = table(tq("bench", "-m", checkpoint, *QUICK, *arguments).out)
    assert "KV as" in names and "k8v4" in rows[0]


def test_a_sweep_has_speed_and_quality(tq, checkpoint, text):
    arguments = ["-m", checkpoint, "--sweep", "kv", "--kv", "none,k8v4", "--context", "210", "--text", text]
    found = document(tq, *arguments, "--samples", "1")
    assert found["text"] == str(text)
    assert [(row["kv"], row["context"], row["windows"]) for row in found["rows"]] == [
        ("none", 210, 1),
        ("k8v4", 210, 1),
    ]
    plain, packed = found["rows"]
    assert (plain["kl_mean"], plain["top1_agreement"]) == (0, 1)
    assert 0 <= packed["kl_mean"] < 0.1 and packed["decode_tokens_per_second"] > 0
    assert packed["needles_found"] is None  # no room in 210 bytes
    result = tq("bench", *arguments, *QUICK)
    names, rows = table(result.out)
    assert names == [
        "KV", "context", "bytes", "of plain", "peak", "prefill 6", "prefill ×", "decode 3", "decode ×", "perplexity",
        "KL", "KL p99", "top-1", "needles",
    ]  # fmt: skip
    assert [row.split()[0] for row in rows] == ["none", "k8v4"]
    assert "a context of 210 has no room for the needle test" in result.err


def test_a_sweep_takes_the_text_that_ships_and_four_settings_by_default(tq, checkpoint, monkeypatch):
    from tq.commands import bench
    from tq.engine.run import kv_sweep

    asked = []
    monkeypatch.setattr(
        kv_sweep, "measure_quality", lambda loaded, kv, contexts, text, samples: asked.append((kv, samples)) or iter([])
    )
    found = document(tq, "-m", checkpoint, "--sweep", "kv", "--context", "8")
    assert [label for label, _ in asked[0][0]] == bench.SWEEP_KV.split(",")
    assert asked[0][1] == bench.SAMPLES
    assert found["text"] == "eval.txt of tq"
    assert [row["label"] for row in found["rows"]] == bench.SWEEP_KV.split(",")


def test_ctrl_c_prints_what_is_known(tq, checkpoint, monkeypatch):
    from tq.engine.run import bench

    rounds = []
    measure = bench._Run.measure

    def interrupted(self):
        rounds.append(self)
        if len(rounds) == 4:  # two of three rounds, and one of the other context
            raise KeyboardInterrupt
        measure(self)

    monkeypatch.setattr(bench._Run, "measure", interrupted)
    result = tq("bench", "-m", checkpoint, "--prompt", "3", "--generate", "2", "--rounds", "2", "--context", "0,4")
    assert result.code == 130
    assert "not complete: these are the numbers so far" in result.err
    assert [row.split()[1] for row in table(result.out)[1]] == ["0", "4"]
    rounds.clear()
    result = tq("bench", "-m", checkpoint, "--prompt", "3", "--generate", "2", "--rounds", "5", "--json")
    found = json.loads(result.out)
    assert (result.code, found["complete"], found["rows"][0]["rounds"]) == (130, False, 3)


def test_ctrl_c_before_the_first_number(tq, checkpoint, monkeypatch):
    from tq.engine.run import bench

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench._Run, "measure", interrupted)
    result = tq("bench", "-m", checkpoint, *QUICK)
    assert (result.code, result.out) == (130, "")
    assert "not complete: nothing is measured yet" in result.err


def test_a_busy_machine_is_warned_of(tq, checkpoint, monkeypatch):
    from tq.engine.run.other_load import OtherLoad

    monkeypatch.setattr(OtherLoad, "percent", lambda self: 42.0)
    assert "warning: other programs took 42 % of the processors" in tq("bench", "-m", checkpoint, *QUICK).err
    monkeypatch.setattr(OtherLoad, "percent", lambda self: 2.0)
    assert "other programs" not in tq("bench", "-m", checkpoint, *QUICK).err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "-1"], "prompt must be 0 or more, not -1"),
        (["--prompt", "0", "--generate", "0"], "there is nothing to measure"),
        (["--rounds", "0"], "rounds must be 1 or more, not 0"),
        (["--context", "many"], "--context many is not a list of numbers"),
        (["--context", "0,-4"], "--context 0,-4 is not a list of numbers"),
        (["--context", "4,4"], "contexts 4, 4 have one twice"),
        (["--context", "9999"], "a context of 9999 tokens and 512 more do not fit tiny, which takes 256"),
        (["--kv", "none,k8v4"], "--kv is for --sweep kv"),
        (["--text", "x.txt"], "--text is for --sweep kv"),
        (["--samples", "3"], "--samples is for --sweep kv"),
        (["--sweep", "all"], "'all' is not"),
        (["--sweep", "kv", "-m", "another"], "--sweep kv is for one model, not 2"),
        (["--sweep", "kv", "--kv-bits", "4"], "--kv-bits is not for --sweep kv, which takes --kv"),
        (["--sweep", "kv", "--kv", "none,k9v9"], "9 bits of keys are not one of"),
        (["--sweep", "kv", "--context", "0,512"], "the contexts of a sweep must be 2 or more, not 0"),
        (
            ["--sweep", "kv", "--context", "8", "--prompt", "4", "--generate", "4", "--samples", "0"],
            "samples must be 1",
        ),
        (["--kv-bits", "9"], "9 bits of keys are not one of"),
        (["--format", "xml"], "'xml' is not one of"),
        (["--json", "--format", "csv"], "--json and --format csv are two forms of one result"),
        (["--json", "--plot", "-"], "--plot - goes with --format table, not with json"),
        (["--plot", "a.jpeg"], "--plot a.jpeg does not end in .png, .svg, .pdf"),
        (["--plot", "nowhere/a.png"], "--plot nowhere/a.png cannot be written"),
    ],
)
def test_nonsense_is_refused_with_a_sentence(tq, checkpoint, arguments, message):
    result = tq("bench", "-m", checkpoint, *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err


def test_a_model_is_needed_and_must_exist(tq):
    assert tq("bench").code == 2
    assert tq("bench", "-m", "./nothing").code == 1


@pytest.mark.parametrize(("target", "library"), [("-", "plotext"), ("a.png", "matplotlib")])
def test_a_plot_without_its_library_is_refused_before_measuring(tq, checkpoint, monkeypatch, target, library):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TQError) as error:
        plots.check(target)
    assert error.value.message == f"--plot {target} needs {library}, which is not installed"
    assert error.value.hint == "pip install 'tq[plot]'"


def test_a_plot_in_a_file(tq, checkpoint, tmp_path):
    pytest.importorskip("matplotlib")
    for name, head in (("a.png", b"\x89PNG"), ("b.svg", b"<?xml")):
        result = tq("bench", "-m", checkpoint, *QUICK, "--context", "0,8", "--plot", name)
        assert result.code == 0 and f"drawn in {name}" in result.err
        assert (tmp_path / name).read_bytes().startswith(head)


@pytest.mark.parametrize("contexts", ["5", "0,8"])
def test_a_plot_in_the_terminal(tq, checkpoint, contexts):
    pytest.importorskip("plotext")
    result = tq("bench", "-m", checkpoint, "-m", checkpoint, *QUICK, "--context", contexts, "--plot", "-")
    assert result.code == 0
    for title in ("prefill, tokens/s", "decode, tokens/s", "peak memory, MB"):
        assert title in result.out
    assert "tiny (2)" in result.out.split("prefill, tokens/s")[1]
    assert "\x1b" not in result.out


def test_panels_have_the_numbers_there_are():
    records = [
        {"label": "a", "context": 0, "x": 2, "y": None},
        {"label": "a", "context": 8, "x": 4, "y": None},
        {"label": "b", "context": 0, "x": 6},
    ]
    (panel,) = plots.panels(records, {"x": ("an x", 0.5), "y": ("a y", 1), "z": ("a z", 1)})
    assert panel == plots.Panel("an x", {"a": [(0, 1.0), (8, 2.0)], "b": [(0, 3.0)]})
    assert panel.contexts == [0, 8]
