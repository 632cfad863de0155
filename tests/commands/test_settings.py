"""Commands take their settings from tq.toml, variables and profiles, and doctor shows where each is from."""

import json
import socket
from pathlib import Path

import pytest

from tq.engine.cache.settings import KVSettings
from tq.engine.machine.settings import SETTINGS

PROFILE = '[machine]\nmemory_gb = 1\n[kv]\nbits = "k8v4"\nstart = 2000\n[prefill]\nstep = 77\n'


@pytest.fixture
def generated(monkeypatch):
    """The options and KV settings of each generation."""
    from tq.engine.run import generate

    seen = []
    real = generate.generate
    monkeypatch.setattr(generate, "generate", lambda *args, **more: seen.append(args[2:4]) or real(*args, **more))
    return seen


@pytest.fixture
def folder(tq, tmp_path):
    """Where commands run, with a tq.toml that names a profile beside it."""
    (tmp_path / "mine.toml").write_text(PROFILE)
    (tmp_path / "tq.toml").write_text('profile = "mine.toml"\n\n[kv]\nsink = 4\n')
    return tmp_path


def test_run_is_as_the_files_say_and_flags_are_stronger(tq, folder, checkpoint, generated, monkeypatch):
    arguments = ["run", "-m", checkpoint, "hello", "-n", "2"]
    result = tq(*arguments, "-v")
    assert result.code == 0
    assert f"kv.sink: 4 ({folder / 'tq.toml'}:4)" in result.err
    assert f"kv.bits: k8v4 ({folder / 'mine.toml'}:4)" in result.err
    monkeypatch.setenv("TQ_KV_BITS", "4")
    assert tq(*arguments, "--kv-start", "9", "--prefill-step", "5").code == 0
    assert tq(*arguments, "--kv-bits", "none", "--profile", "none").code == 0
    assert [(options.prefill_step, kv) for options, kv in generated] == [
        (77, KVSettings(8, 4, sink=4, start=2000)),
        (5, KVSettings(4, 4, sink=4, start=9)),
        (2048, None),
    ]


def test_chat_is_as_the_files_say(tq, folder, checkpoint, monkeypatch):
    from tq.engine.run import chat

    seen = []
    real = chat.Conversation
    monkeypatch.setattr(chat, "Conversation", lambda *args, **more: seen.append(args) or real(*args, **more))
    (folder / "tq.toml").write_text('prompt_cache = 0\nprofile = "mine.toml"')
    assert tq("chat", "-m", checkpoint, "-n", "2", stdin="Hello\n").code == 0
    ((_, _, options, kv, prompts),) = seen
    assert (options.prefill_step, kv, prompts) == (77, KVSettings(8, 4, start=2000), None)


def test_eval_measures_packed_keys_and_values_wherever_they_would_start(tq, folder, checkpoint):
    (folder / "text.txt").write_text("The ships went out to sea, and came back in the evening. " * 8)
    arguments = ["eval", "-m", checkpoint, "--data", "text.txt", "--seq-len", "200", "--json"]
    packed, plain = (json.loads(tq(*arguments, *more).out) for more in ([], ["--kv-bits", "none"]))
    assert packed["perplexity"] != plain["perplexity"]


def test_bench_is_as_the_files_say_and_a_sweep_as_its_option_says(tq, folder, checkpoint):
    arguments = ["bench", "-m", checkpoint, "--prompt", "4", "--generate", "2", "--rounds", "1", "--json"]
    assert [row["kv"] for row in json.loads(tq(*arguments).out)["rows"]] == ["k8v4"]
    assert [row["kv"] for row in json.loads(tq(*arguments, "--kv-bits", "none").out)["rows"]] == ["none"]


def test_convert_takes_a_recipe_from_tq_toml(tq, checkpoint, tmp_path):
    (tmp_path / "tq.toml").write_text('recipe = "weights.toml"')
    (tmp_path / "weights.toml").write_text("[weights]\nbits = 3\n[weights.mlp]\nbits = 2")
    arguments = ["convert", "-m", checkpoint, "--dry-run", "--json"]

    def bits(*more):
        plan = json.loads(tq(*arguments, *more).out)
        found = {tensor["role"]: tensor["spec"]["bits"] for tensor in plan["tensors"] if tensor["spec"]}
        return Path(plan["out"]).name, found["attention"], found["mlp"]

    assert bits() == ("tiny-tq-weights", 3, 2)
    assert bits("--mlp-bits", "5") == ("tiny-tq-weights", 3, 5)
    assert bits("--recipe", "none") == ("tiny-tq4", 4, 4)


def test_stream_and_serve_read_their_tables(tq, tmp_path, monkeypatch):
    monkeypatch.setenv("TQ_STREAM_POLICY", "lfru")
    result = tq("stream", "-m", "nothing", "hello")
    assert (result.code, "TQ_STREAM_POLICY=lfru" in result.err) == (2, True)
    monkeypatch.delenv("TQ_STREAM_POLICY")
    from tq.engine.stream import settings

    seen = []
    real = settings.StreamSettings.from_options
    monkeypatch.setattr(settings.StreamSettings, "from_options", lambda **given: seen.append(given) or real(**given))
    (tmp_path / "tq.toml").write_text('[stream]\nbudget = "3GB"\nworkers = 2\npolicy = "lfu"\nprefetch = "off"\n')
    assert tq("stream", "-m", "./nothing", "hello", "--workers", "5").code == 1
    given = {"budget": "3GB", "workers": 5, "policy": "lfu", "prefetch": "off", "max_active_experts": None}
    assert seen[-1] == given
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (tmp_path / "tq.toml").write_text(f"[serve]\nport = {port}\n")
        result = tq("serve", "-m", "./nothing")
        assert result.code == 1
        assert str(port) in result.err


@pytest.mark.parametrize("command", ["run", "chat", "eval", "bench", "convert", "serve", "stream"])
def test_a_mistake_in_a_file_ends_every_command_before_it_begins(tq, tmp_path, command):
    (tmp_path / "tq.toml").write_text("[kv]\nbitz = 4\n")
    result = tq(command, "-m", "./nothing", *(["hello"] if command in ("run", "stream") else []))
    assert (result.code, result.out) == (2, "")
    assert f"{tmp_path / 'tq.toml'}:2: unknown key kv.bitz" in result.err
    assert "did you mean bits?" in result.err


def test_auto_says_what_it_picks_and_why(tq, checkpoint, monkeypatch):
    from tq.engine.machine import limits

    monkeypatch.setattr(limits, "memory_bytes", lambda: 50 * 2**30)
    result = tq("run", "-m", checkpoint, "hello", "-n", "1", "-v", "--profile", "auto")
    assert "profile: 48gb is the largest of 8gb, 16gb" in result.err
    assert "48gb.toml:" in result.err


def test_a_machine_below_its_profile_is_told_so_once(tq, checkpoint, monkeypatch):
    from tq.engine.machine import limits

    monkeypatch.setattr(limits, "memory_bytes", lambda: 10 * 2**30)
    result = tq("run", "-m", checkpoint, "hello", "-n", "1", "--profile", "16gb")
    assert result.code == 0
    assert result.err.count("the profile is for 16 GB of memory, and this machine has 10.0: --profile auto") == 1
    assert "machine has" not in tq("run", "-q", "-m", checkpoint, "hello", "-n", "1", "--profile", "16gb").err


# --- doctor ---


def doctor(tq, *arguments):
    result = tq("doctor", "--json", *arguments)
    document = json.loads(result.out)
    settings = {row["name"]: row for row in document["settings"]}
    return result.code, settings, [f for f in document["findings"] if f["name"] in ("settings", "profile")]


def test_doctor_shows_every_setting_and_where_it_is_from(tq, folder, monkeypatch):
    monkeypatch.setenv("TQ_PREFILL_STEP", "9")
    monkeypatch.setenv("TQ_API_KEY", "do not show me")
    code, settings, findings = doctor(tq)
    assert code == 0
    assert {setting.name for setting in SETTINGS} < set(settings)
    shown = {name: (settings[name]["value"], settings[name]["source"], settings[name]["where"]) for name in settings}
    assert shown["kv.sink"] == (4, "project", f"{folder / 'tq.toml'}:4")
    assert shown["kv.bits"] == ("k8v4", "profile", f"{folder / 'mine.toml'}:4")
    assert shown["prefill.step"] == (9, "variable", "TQ_PREFILL_STEP")
    assert shown["kv.window"] == (32, "default", "default")
    assert shown["TQ_THREADS"] == ("1", "variable", "TQ_THREADS")
    assert shown["TQ_API_KEY"] == ("(not shown)", "variable", "TQ_API_KEY")
    assert str(folder / "tq.toml") in findings[0]["fact"]
    assert findings[1]["fact"] == str(folder / "mine.toml")
    text = tq("doctor").out
    assert "do not show me" not in text
    assert any(line.split() == ["kv.sink", "4", f"{folder / 'tq.toml'}:4"] for line in text.splitlines())


def test_doctor_reports_every_mistake_and_goes_on(tq, tmp_path, monkeypatch):
    (tmp_path / "tq.toml").write_text('recipe = "none.toml"\n[kv]\nbitz = 4\nsink = -1\n')
    monkeypatch.setenv("TQ_KV_STRAT", "3")
    code, settings, findings = doctor(tq, "--profile", "17gb")
    assert code == 1
    facts = [(finding["ok"], finding["fact"], finding["fix"]) for finding in findings]
    assert facts[0][2] == "TQ_KV_STRAT is no setting: did you mean TQ_KV_START?"
    assert [(ok, fact.split(": ", 1)[1]) for ok, fact, _ in facts[1:4]] == [
        (False, "unknown key kv.bitz"),
        (False, "kv.sink: KV sink is -1 tokens: give 0 or more"),
        (False, "no recipe file or profile '17gb'"),
    ]
    assert settings["kv.sink"]["source"] == "default"
    (tmp_path / "tq.toml").write_text('recipe = "none.toml"\n[kv]\ncodec = "polar"\n')
    code, _, findings = doctor(tq)
    assert (code, [finding["ok"] for finding in findings]) == (1, [True, False, False, True])


def test_doctor_says_what_a_profile_counts_on_and_the_machine_lacks(tq, monkeypatch):
    from tq.engine.machine import limits

    monkeypatch.setattr(limits, "memory_bytes", lambda: 16 * 2**30)
    monkeypatch.setattr(limits, "gpu_limit_bytes", lambda: 12124 << 20)
    _, _, findings = doctor(tq, "--profile", "auto")
    assert "16gb.toml: 16gb is the largest of 8gb, 16gb" in findings[-1]["fact"]
    assert "sudo sysctl iogpu.wired_limit_mb=13312" in findings[-1]["fix"]
    assert doctor(tq)[2][-1]["fact"] == "none is asked for"


def test_settings_are_read_before_mlx_is_there(program, tmp_path):
    """On Linux a BLAS must be loaded before it."""
    (tmp_path / "tq.toml").write_text('profile = "auto"\n[kv]\nbits = 4\n[stream]\npolicy = "lfu"\nbudget = "4GB"\n')
    code = (
        "import sys; from tq.commands.options import read_settings; from tq.output import Output\n"
        "assert read_settings(Output()).kv is not None\n"
        "print([name for name in sys.modules if name.startswith('mlx')])"
    )
    assert program(code=code).out == "[]\n"
