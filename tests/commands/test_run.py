"""`tq run`: where the prompt comes from, what goes to stdout, and what to stderr."""

import json

import pytest

from tq.commands import run as command


@pytest.fixture
def asked(monkeypatch):
    """The prompt that reaches the model."""
    seen = []
    from tq.engine.run import generate

    encode = generate.encode_prompt

    def spy(tokenizer, prompt, **options):
        seen.append((prompt, options))
        return encode(tokenizer, prompt, **options)

    monkeypatch.setattr(generate, "encode_prompt", spy)
    return seen


@pytest.mark.parametrize(
    ("arguments", "stdin", "prompt"),
    [
        (["Hi there"], "", "Hi there"),
        (["-p", "Hi"], "", "Hi"),
        (["-"], "from a pipe\n", "from a pipe"),
        ([], "from a pipe", "from a pipe"),
        (["Sum up:"], "a text\n", "Sum up:\n\na text"),
        (["-p", "Sum up:"], "a text", "Sum up:\n\na text"),
    ],
)
def test_the_prompt_comes_from_an_argument_an_option_or_a_pipe(tq, checkpoint, asked, arguments, stdin, prompt):
    assert tq("run", "-m", checkpoint, "-n", "1", *arguments, stdin=stdin).code == 0
    assert [text for text, _ in asked] == [prompt]


def test_the_answer_alone_is_on_stdout_and_ends_its_line(tq, checkpoint):
    plain = tq("run", "-m", checkpoint, "hello", "-n", "12", "--seed", "3")
    document = json.loads(tq("run", "-m", checkpoint, "hello", "-n", "12", "--seed", "3", "--json").out)
    assert plain.out == document["text"] + ("" if document["text"].endswith("\n") else "\n")
    assert document["model"] == str(checkpoint)
    assert (document["tokens"], document["reason"]) in [(12, "length"), (document["tokens"], "stop")]
    assert "answer" not in plain.err


def test_stats_go_to_stderr(tq, checkpoint):
    result = tq("run", "-m", checkpoint, "hello", "-n", "3", "--stats")
    assert "prompt " in result.err and "peak memory" in result.err
    assert "peak memory" not in result.out


def test_quiet_says_nothing(tq, checkpoint):
    assert tq("run", "-q", "-m", checkpoint, "hello", "-n", "3").err == ""


def test_options_reach_the_engine(tq, checkpoint, asked, monkeypatch):
    from tq.engine.run import generate

    given = []
    real = generate.generate
    monkeypatch.setattr(generate, "generate", lambda *args, **more: given.append(args[2]) or real(*args, **more))
    arguments = "--temp 0.5 --top-p 0.9 --top-k 7 --min-p 0.1 --repetition-penalty 1.1 --repetition-context 9".split()
    arguments += "--min-tokens 2 -n 5 --seed 4 --stop zz --stop yy --system Be.brief --no-think".split()
    assert tq("run", "-m", checkpoint, "hello", *arguments).code == 0
    assert given == [
        generate.GenerateOptions(
            max_tokens=5, temp=0.5, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.1, repetition_context=9,
            min_tokens=2, seed=4, stop=("zz", "yy"),
        )
    ]  # fmt: skip
    assert asked[0][1] == {"system": "Be.brief", "raw": False, "think": False}


def test_kv_options_reach_the_engine(tq, checkpoint, monkeypatch):
    from tq.engine.cache.settings import KVSettings
    from tq.engine.run import generate

    given = []
    real = generate.generate
    monkeypatch.setattr(generate, "generate", lambda *args, **more: given.append(args[3]) or real(*args, **more))
    arguments = "--kv-bits k4v4 --kv-k-bits 5 --kv-v-bits 3.5 --kv-sink 4 --kv-codec qjl,lloyd-max".split()
    result = tq("run", "-m", checkpoint, "hello", "-n", "3", *arguments)
    assert result.code == 0
    assert "save memory here, not time: no kernel reads them" in " ".join(result.err.split())
    assert tq("run", "-m", checkpoint, "hello", "-n", "3", "--kv-group-size", "32").code == 0
    assert given == [KVSettings(5, 3.5, "qjl", "lloyd-max", sink=4), KVSettings(group_size=32)]
    result = tq("run", "-m", checkpoint, "hello", "--kv-bits", "paper")
    assert result.code == 2
    assert "KV bits 'paper' are not one or two of 1, 2, 2.5" in " ".join(result.err.split())


def test_defaults_are_those_of_the_engine(tq, checkpoint, monkeypatch):
    from tq.engine.run import generate

    given = []
    real = generate.generate
    monkeypatch.setattr(generate, "generate", lambda *args, **more: given.append(args[2]) or real(*args, **more))
    assert tq("run", "-m", checkpoint, "hello").code == 0
    assert given == [generate.GenerateOptions()]


def test_verbose_says_which_blas(tq, checkpoint):
    assert "BLAS: " in tq("run", "-v", "-m", checkpoint, "hello", "-n", "1").err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--temp", "-1"], 2, "temp must be 0 (greedy) or more"),
        (["--max-tokens", "0"], 2, "max_tokens must be 1 or more"),
        (["-m", "./nothing"], 1, "no such model: ./nothing"),
    ],
)
def test_mistakes_are_sentences(tq, checkpoint, arguments, code, message):
    result = tq("run", "-m", checkpoint, "hello", *arguments)
    assert (result.code, result.out) == (code, "")
    assert message in result.err


def test_what_is_not_text_is_refused(checkpoint, program):
    code = (
        "import io, sys; sys.stdin = io.TextIOWrapper(io.BytesIO(bytes([255, 254, 0])), encoding='utf-8')\n"
        f"from tq.cli import run_command; sys.exit(run_command(['run', '-m', {str(checkpoint)!r}]))"
    )
    result = program(code=code)
    assert (result.code, result.err) == (1, "error: what was piped in is not text in UTF-8\n")


def test_a_terminal_on_stdin_is_not_read(monkeypatch):
    class Terminal:
        def isatty(self):
            return True

        def read(self):
            raise AssertionError("would wait for a person")

    monkeypatch.setattr("sys.stdin", Terminal())
    assert command.read_question("hello", None) == "hello"


@pytest.mark.parametrize(("how", "continues"), [([], False), (["--raw"], True)])
def test_a_raw_prompt_is_gone_on_with_to_the_letter(tq, checkpoint, monkeypatch, how, continues):
    from tq.engine.run import generate

    given = []
    real = generate.generate
    monkeypatch.setattr(generate, "generate", lambda *args, **more: given.append(more) or real(*args, **more))
    assert tq("run", "-m", checkpoint, "-n", "2", *how, "hello").code == 0
    assert given == [{"continues": continues}]
