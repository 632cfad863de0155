"""The strongest source of a setting decides, every mistake is named with its place, and nothing else is read."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tq import settings
from tq.engine.cache.settings import KVSettings
from tq.engine.machine.settings import SETTINGS, config_files, resolve
from tq.engine.run.decode import PREFILL_STEP
from tq.engine.stream.settings import StreamSettings
from tq.errors import UsageError


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home with a user's tq.toml to write, and a project in it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    (tmp_path / "project" / "deep").mkdir(parents=True)
    (tmp_path / ".config" / "tq").mkdir(parents=True)
    return tmp_path


def user(home, text):
    (home / ".config" / "tq" / "tq.toml").write_text(text)


def project(home, text):
    (home / "project" / "tq.toml").write_text(text)


def settings_of(home, flags=None, **variables):
    """As in the project's folder."""
    found = resolve(flags, environment=variables, folder=home / "project")
    found.check()
    return found


def test_without_any_source_all_is_as_the_engine_has_it(home):
    found = settings_of(home)
    assert {value.source for value in found.found.values()} == {"default"}
    assert (found.kv, found.profile, found.recipe, found.files) == (None, None, None, ())
    assert (found.prompt_cache_bytes, found.prefix_cache_bytes, found.prefill_step) == (2e9, None, PREFILL_STEP)
    stream = StreamSettings.from_options(*(found[f"stream.{name}"] for name in STREAM), max_active_experts=None)
    assert stream == StreamSettings()


STREAM = ("budget", "workers", "policy", "prefetch")
SOURCES = {
    "flag": "--prefill-step",
    "variable": "TQ_PREFILL_STEP",
    "project": "tq.toml:2",
    "user": "tq.toml:3",
    "profile": "p.toml:4",
}


@pytest.mark.parametrize("n", range(5))
def test_each_source_is_stronger_than_the_next_and_says_where_it_is(home, n):
    user(home, "\n[prefill]\nstep = 4\n")
    (home / "p.toml").write_text("\n\n[prefill]\nstep = 5\n")
    flags, variables = {"profile": str(home / "p.toml"), "prefill.step": 1}, {"TQ_PREFILL_STEP": "2"}
    project(home, "[prefill]\nstep = 3\n")
    if n > 0:
        flags["prefill.step"] = None
    if n > 1:
        variables = {"TQ_PREFILL_STEP": ""}  # as if it were not set
    if n > 2:
        project(home, "")
    if n > 3:
        user(home, "")
    found = settings_of(home, flags, **variables).found["prefill.step"]
    source, where = list(SOURCES.items())[n]
    assert (found.value, found.source) == (n + 1, source)
    assert found.where.endswith(where)


def test_every_setting_can_be_set_by_its_variable_and_in_a_file(home):
    values = {
        "profile": "16gb", "recipe": "48gb", "prompt_cache": "1GB", "kv.bits": "k8v4", "kv.key_bits": 6,
        "kv.value_bits": 3.5, "kv.codec": "affine", "kv.group_size": 32, "kv.sink": 1, "kv.window": 2, "kv.start": 3,
        "prefill.step": 9, "serve.port": 0, "serve.parallel": 3, "serve.queue": 0, "serve.prefix_cache": "1GB",
        "stream.budget": "4GB", "stream.workers": 3, "stream.policy": "lfu", "stream.prefetch": "off",
    }  # fmt: skip
    assert set(values) == {setting.name for setting in SETTINGS}
    for name, value in values.items():
        variable = "TQ_" + name.replace(".", "_").upper()
        found = resolve({}, environment={variable: str(value)}, folder=home / "project")
        assert (found.mistakes, found[name], found.found[name].where) == ((), value, variable)
        table, _, key = name.rpartition(".")
        project(home, f"[{table}]\n{key} = {json.dumps(value)}" if table else f"{key} = {json.dumps(value)}")
        found = resolve({}, environment={}, folder=home / "project")
        assert (found.mistakes, found[name], found.found[name].source) == ((), value, "project")
        project(home, "")


# --- files ---


def test_the_nearest_file_up_to_the_root_of_a_repository_is_the_projects(home):
    project(home, "")
    deep = home / "project" / "deep"
    assert config_files(deep) == [("project", home / "project" / "tq.toml")]
    (deep / ".git").touch()  # a file in a worktree
    assert config_files(deep) == []
    (deep / "tq.toml").touch()
    assert config_files(deep) == [("project", deep / "tq.toml")]


def test_outside_of_a_repository_and_the_home_only_the_folder_itself_counts(home, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    (folder / "tq.toml").touch()
    (folder / "below").mkdir()
    assert config_files(folder / "below") == []
    assert config_files(folder) == [("project", folder / "tq.toml")]


def test_the_users_file_is_where_xdg_says_and_counts_once(home, monkeypatch):
    user(home, "")
    theirs = home / ".config" / "tq" / "tq.toml"
    assert config_files(home / "project") == [("user", theirs)]
    assert config_files(theirs.parent) == [("project", theirs)]
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "elsewhere"))
    assert config_files(home / "project") == []


def test_a_home_may_be_a_link_and_a_folder_may_be_gone(home, monkeypatch, tmp_path_factory):
    (home / "tq.toml").touch()
    link = tmp_path_factory.mktemp("links") / "me"
    link.symlink_to(home)
    monkeypatch.setenv("HOME", str(link))
    assert config_files(home / "project") == [("project", home / "tq.toml")]
    gone = tmp_path_factory.mktemp("gone")
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert config_files() == []


def test_a_user_without_a_home_has_the_projects_file(home, monkeypatch):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    project(home, "")
    assert config_files(home / "project") == [("project", home / "project" / "tq.toml")]


# --- profiles ---


def test_a_profile_is_applied_only_if_somebody_asks(home):
    assert settings_of(home).profile is None
    for found in (
        settings_of(home, {"profile": "16gb"}),
        settings_of(home, TQ_PROFILE="16gb"),
        (project(home, 'profile = "16gb"'), settings_of(home))[1],
    ):
        assert found.profile.path.name == "16gb.toml"
        assert found.kv is not None
        assert found.found["kv.bits"].source == "profile"
        assert "16gb.toml:" in found.found["kv.bits"].where
    assert settings_of(home, {"profile": "none"}).profile is None


def test_auto_is_the_profile_for_this_machine(home):
    found = resolve({"profile": "auto"}, environment={}, folder=home, memory_bytes=17 * 2**30)
    assert found.profile.path.name == "16gb.toml"
    assert "17.0 GiB" in found.profile_reason
    found = resolve({"profile": "auto"}, environment={}, folder=home, memory_bytes=2**30)
    assert (found.profile, found.mistakes) == (None, ())
    assert "all for more" in found.profile_reason


def test_files_beside_tq_toml_are_found_from_anywhere(home):
    project(home, 'profile = "mine.toml"\nrecipe = "weights.toml"\n')
    (home / "project" / "mine.toml").write_text("prompt_cache = 0\n")
    found = resolve({}, environment={}, folder=home / "project" / "deep")
    assert found.prompt_cache_bytes == 0
    assert found.recipe == str(home / "project" / "weights.toml")
    assert settings_of(home, {"recipe": "none"}).recipe is None


# --- keys and values ---


def test_any_value_of_kv_packs_and_none_takes_it_back(home):
    user(home, "[kv]\nsink = 4\n")
    assert settings_of(home).kv == KVSettings(sink=4)
    assert settings_of(home).found["kv.bits"].value == "k8v3"
    assert settings_of(home, {"kv.bits": "none"}).kv is None
    project(home, '[kv]\nbits = "None"\nwindow = 64\n')
    assert settings_of(home).kv is None
    assert settings_of(home, {"kv.start": 100}).kv == KVSettings(sink=4, window=64, start=100)
    user(home, "[kv]\nbits = 4\nkey_bits = 5\n")
    assert settings_of(home, {"kv.start": 100}).kv == KVSettings(5, 4, window=64, start=100)


def test_bits_name_a_whole_format_and_leave_the_rest(home):
    user(home, '[kv]\nbits = "k8v4"\ncodec = "affine"\ngroup_size = 32\nsink = 4\nstart = 2000\n')
    assert settings_of(home).kv == KVSettings(8, 4, "affine", "affine", 4, group_size=32, start=2000)
    assert settings_of(home, {"kv.bits": "4"}).kv == KVSettings(4, 4, sink=4, start=2000)
    assert settings_of(home, {"kv.bits": "polar"}).kv == KVSettings(4, 4, "polar", "polar", 4, start=2000)
    assert settings_of(home, {"kv.key_bits": 6.0}).kv == KVSettings(6, 4, "affine", "affine", 4, 32, 32, 2000)


def test_bits_may_be_a_number_and_a_variable(home):
    project(home, "[kv]\nbits = 4\n")
    assert settings_of(home).kv == KVSettings(4, 4)
    project(home, "[kv]\nbits = 2.5\n")
    assert settings_of(home).kv == KVSettings(2.5, 2.5)
    assert settings_of(home, TQ_KV_BITS="8,3", TQ_KV_SINK="0").kv == KVSettings(8, 3, sink=0)


def test_what_does_not_go_together_names_where_it_is_from(home):
    project(home, '[kv]\ncodec = "polar"\n')
    with pytest.raises(UsageError, match="8 bits of keys are not one of 3, 4, 5, 6, which polar takes") as error:
        settings_of(home)
    assert error.value.hint == f"kv.codec from {home / 'project' / 'tq.toml'}:2"
    with pytest.raises(UsageError) as error:
        settings_of(home, {"kv.bits": "9"})
    assert error.value.hint == "for example --kv-bits 8,3: keys, values"


FORMAT = {"bits", "key_bits", "value_bits", "codec", "group_size"}
TABLES = st.fixed_dictionaries(
    {},
    optional={
        "bits": st.sampled_from(["none", "none", "k8v3", "4", "5,2"]),
        "key_bits": st.sampled_from([3, 6]),
        "value_bits": st.sampled_from([2, 7]),
        "codec": st.sampled_from(["affine", "lloyd-max", "lloyd-max,affine"]),
        "group_size": st.sampled_from([32, 64]),
        "sink": st.integers(0, 99),
        "window": st.integers(0, 99),
        "start": st.integers(0, 99),
    },
)


def expected(layers):
    """The rules, from the weakest source up."""
    state, packed = {}, False
    for layer in filter(None, reversed(layers)):
        packed = layer.get("bits") != "none"
        if layer.get("bits", "none") != "none":
            state = {name: value for name, value in state.items() if name not in FORMAT}
        state |= {name: value for name, value in layer.items() if value != "none"}
    return (KVSettings.from_options(**state) or KVSettings()) if packed else None


@given(st.lists(TABLES, min_size=5, max_size=5), st.lists(st.none() | st.integers(1, 9), min_size=5, max_size=5))
@hypothesis_settings(max_examples=80, deadline=None)
def test_sources_of_every_kind_together(tables, steps):
    layers = [dict(table) for table in tables]
    layers[0].pop("window", None)  # has no flag
    texts = [
        "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
        for table in ({} if step is None else {"step": step} for step in steps)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config" / "tq").mkdir(parents=True)
        paths = [folder / "tq.toml", folder / "config" / "tq" / "tq.toml", folder / "profile.toml"]
        for path, table, text in zip(paths, layers[2:], texts[2:], strict=True):
            kv = "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
            path.write_text(f"[kv]\n{kv}[prefill]\n{text}")
        variables = {f"TQ_KV_{key.upper()}": str(value) for key, value in layers[1].items()}
        if steps[1] is not None:
            variables["TQ_PREFILL_STEP"] = str(steps[1])
        flags = {f"kv.{key}": value for key, value in layers[0].items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
            found = resolve(
                {**flags, "prefill.step": steps[0], "profile": str(paths[2])}, environment=variables, folder=folder
            )
    assert found.mistakes == ()
    assert found.prefill_step == next((step for step in steps if step is not None), PREFILL_STEP)
    assert found.kv == expected(layers)


# --- mistakes ---


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ('profil = "auto"', "1: unknown key profil", "did you mean profile?"),
        ("[kvs]", "1: unknown key kvs", "did you mean kv?"),
        ("[kv]\nbit = 4", "2: unknown key kv.bit", "did you mean bits?"),
        ("kv.bit = 4", "1: unknown key kv.bit", "did you mean bits?"),
        ("kv = 4", "1: kv must be a table, which begins with a line [kv]", None),
        ("kv = {bit = 4}", "1: unknown key kv.bit", "did you mean bits?"),
        (
            "[weights]\nbits = 3",
            "1: unknown key weights",
            'this belongs into a recipe: write a file, and recipe = "FIL',
        ),
        ("[machine]\nmemory_gb = 3", "1: unknown key machine", "this belongs into a profile: write a file, and prof"),
        ("profile = 16", "1: profile: input should be a valid string (it is 16)", None),
        ("prompt_cache = true", "1: prompt_cache: input should be a valid string (it is True)", None),
        ('prompt_cache = "much"', "1: prompt_cache: 'much' is no size such as 500MB, 8GB or 0", None),
        ('[kv]\nbits = "paper2.5"', "2: kv.bits: KV bits 'paper2.5' are not one or two of", "did you mean paper-2.5?"),
        ("[kv]\nbits = [8, 3]", "2: kv.bits: input should be a valid string (it is [8, 3])", None),
        ("[kv]\nkey_bits = 9", "2: kv.key_bits: 9 bits of keys are not one of 1, 2", "for example"),
        ('[kv]\ncodec = "polr"', "2: kv.codec: KV codec 'polr' is not one of lloyd-max", "did you mean polar?"),
        ('[kv]\ncodec = "qjl"', "2: kv.codec: the KV codec qjl is for keys", "--kv-codec qjl,lloyd-max"),
        ("[kv]\ngroup_size = 48", "2: kv.group_size: KV group size 48 is not one of 0, 32, 64, 128", None),
        ("[kv]\nsink = -1", "2: kv.sink: KV sink is -1 tokens: give 0 or more", None),
        ("[kv]\nwindow = -1", "2: kv.window: KV window is -1 tokens: give 0 or more", None),
        ("[kv]\nstart = 1.5", "2: kv.start: input should be a valid integer (it is 1.5)", None),
        ('[kv]\nsink = "4"', "2: kv.sink: input should be a valid integer (it is '4')", None),
        ("[prefill]\nstep = 0", "2: prefill.step: input should be greater than or equal to 1 (it is 0)", None),
        ("[serve]\nhost = '0.0.0.0'", "2: unknown key serve.host", "only --host says who"),
        ("[serve]\nport = 65536", "2: serve.port: input should be less than or equal to 65535 (it is 65536)", None),
        ("[serve]\nparallel = 0", "2: serve.parallel: input should be greater than or equal to 1 (it is 0)", None),
        ("[serve]\nqueue = -1", "2: serve.queue: input should be greater than or equal to 0 (it is -1)", None),
        ('[serve]\nprefix_cache = "x"', "2: serve.prefix_cache: 'x' is no size such as 500MB, 8GB or 0", None),
        ('[stream]\nbudget = "x"', "2: stream.budget: 'x' is no size such as 500MB, 8GB or 0", None),
        ("[stream]\nworkers = 99", "2: stream.workers: the number of workers is 99: it must be from 1 to 64", None),
        ('[stream]\npolicy = "lfru"', "2: stream.policy: ", None),
        ('[stream]\nprefetch = "never"', "2: stream.prefetch: prefetch 'never' is not one of auto, on, off", None),
        ("[prefill\n", " not a readable TOML file: Expected ']'", None),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_line(home, text, message, hint):
    project(home, text)
    with pytest.raises(UsageError) as error:
        settings_of(home)
    assert error.value.message.startswith(f"{home / 'project' / 'tq.toml'}:{message}")
    assert (error.value.hint or "").startswith(hint or "") and bool(error.value.hint) == bool(hint)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"TQ_KV_SINK": "x"}, "TQ_KV_SINK=x: input should be a valid integer (it is 'x')"),
        ({"TQ_KV_BITS": "paper"}, "TQ_KV_BITS=paper: KV bits 'paper' are not one or two of"),
        ({"TQ_PREFILL_STEP": "0"}, "TQ_PREFILL_STEP=0: input should be greater than or equal to 1"),
        ({"TQ_PROMPT_CACHE": "1 x"}, "TQ_PROMPT_CACHE=1 x: '1 x' is no size such as"),
        ({"TQ_PROFILE": "17gb"}, "TQ_PROFILE: no recipe file or profile '17gb'"),
    ],
)
def test_a_mistake_in_a_variable_is_named_with_it(home, variables, message):
    with pytest.raises(UsageError) as error:
        settings_of(home, **variables)
    assert error.value.message.startswith(message)


def test_mistakes_in_flags_and_profiles_are_named(home):
    for flags, size in (
        ({"prompt_cache": "x"}, "prompt_cache_bytes"),
        ({"serve.prefix_cache": "x"}, "prefix_cache_bytes"),
    ):
        with pytest.raises(UsageError, match=r"--pr[a-z]+-cache: 'x' is no size such as 500MB, 8GB or 0"):
            getattr(settings_of(home, flags), size)
    with pytest.raises(UsageError, match=r"p.toml:1: unknown key profile") as error:
        (home / "p.toml").write_text('profile = "16gb"')
        settings_of(home, {"profile": str(home / "p.toml")})
    assert error.value.hint == "this belongs into tq.toml"


def test_all_mistakes_are_reported_at_once_in_the_order_of_lines(home):
    project(home, '[kv]\nsink = -1\nbitz = 4\n[prefill]\nstep = "x"\n')
    user(home, "nothing = 1")
    with pytest.raises(UsageError) as error:
        settings_of(home, {"profile": "17gb"})
    first, *lines = error.value.message.splitlines()
    assert first == "5 mistakes in settings"
    assert [line.split(": ")[1].split(" (")[0] for line in lines] == [
        "kv.sink", "unknown key kv.bitz", "prefill.step", "unknown key nothing", "no recipe file or profile '17gb'",
    ]  # fmt: skip
    assert "did you mean bits?" in lines[1]


def test_a_file_with_a_mistake_says_nothing_else(home):
    project(home, "[kv]\nsink = 4\nbitz = 4\n")
    found = resolve({}, environment={}, folder=home / "project")
    assert (found.kv, found.files, len(found.mistakes)) == (None, (), 1)


def test_the_documentation_has_every_setting_with_its_flag_variable_and_default():
    text = (Path(__file__).parents[3] / "docs" / "settings.md").read_text()
    rows = [[cell.strip(" `") for cell in line.split("|")[1:5]] for line in text.splitlines() if line.startswith("| `")]
    assert rows == [[s.name, s.flag or "", s.variable, "" if s.default is None else str(s.default)] for s in SETTINGS]


def test_folders_that_nobody_may_look_into_have_no_settings(home, monkeypatch):
    project(home, "[prefill]\nstep = 3\n")
    stat = Path.stat

    def refuse(path, **how):
        if path.name in (".git", "tq.toml"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **how)

    monkeypatch.setattr(Path, "stat", refuse)  # nothing is closed to root, who may run this
    assert [path for _, path in config_files(home / "project")] == [home / "project" / "tq.toml"]


def test_a_file_that_is_nested_deeper_than_python_goes_is_a_mistake(home):
    project(home, "x = " + "[" * 5000)
    with pytest.raises(UsageError, match=r"tq\.toml: not a readable TOML file: "):
        settings_of(home)


@pytest.mark.parametrize(("root", "is_used"), [("/elsewhere", True), ("elsewhere", False), ("", False)])
def test_folders_of_a_user_are_absolute(home, monkeypatch, root, is_used):
    for variable, name, path in (
        ("XDG_CONFIG_HOME", ".config", lambda: settings.config_file().parent),
        ("XDG_CACHE_HOME", ".cache", settings.cache_dir),
    ):
        monkeypatch.setenv(variable, root)
        assert path() == (Path(root) if is_used else home / name) / "tq"


@pytest.mark.parametrize(
    ("option", "variable", "key"),
    [(None, None, None), (None, "", None), (None, "a\n", "a"), (" b ", "a", "b"), ("b", "", "b")],
)
def test_a_key_is_what_a_header_can_hold(monkeypatch, option, variable, key):
    monkeypatch.delenv("TQ_API_KEY", raising=False)
    if variable is not None:
        monkeypatch.setenv("TQ_API_KEY", variable)
    assert settings.api_key(option) == key


@pytest.mark.parametrize(("option", "variable", "name"), [(" ", "a", "--api-key"), (None, " \n", "TQ_API_KEY")])
def test_a_blank_key_opens_nothing(monkeypatch, option, variable, name):
    monkeypatch.setenv("TQ_API_KEY", variable)
    with pytest.raises(UsageError, match=f"{name} is empty"):
        settings.api_key(option)


def test_sizes():
    assert [settings.size_bytes(text) for text in ("0", "1.5 kB", "8GB", "2t")] == [0, 1500, 8 * 10**9, 2 * 10**12]
    for text in ("-1GB", "GB", "1e3", "8 GiB", "nan", ""):
        with pytest.raises(UsageError, match="is no size"):
            settings.size_bytes(text)
    with pytest.raises(UsageError, match="more than any machine has"):
        settings.size_bytes("9" * 400)
