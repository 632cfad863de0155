"""The shape of the project: imports go down only, the terminal stays out of the engine, and help needs no engine."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A module may import its own level and those above it in this table.
LEVELS = [
    ["tq", "tq.errors", "tq.settings", "tq.engine", "tq.engine.events", "tq.data"],
    ["tq.engine.quantize", "tq.metal", "tq.cpu"],
    ["tq.engine.ops"],
    ["tq.engine.model", "tq.engine.cache", "tq.engine.stream", "tq.engine.machine"],
    ["tq.engine.run"],
    ["tq.output"],
    ["tq.commands"],
    ["tq.cli"],
    ["tq.__main__"],
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
TERMINAL = {"typer", "rich", "prompt_toolkit"}
MAY_USE_TERMINAL = {"tq.output", "tq.commands", "tq.cli"}
MAY_USE_MLX_LM = {"tq.engine.model", "tq.engine.cache", "tq.engine.run"}
MODULES = sorted(ROOT.glob("tq/**/*.py"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(name):
    """The longest name of the table that `name` is or lies in."""
    parts = name.split(".")
    return next(
        (
            known
            for n in range(len(parts), 0, -1)
            if (known := ".".join(parts[:n])) in LEVEL and (n > 1 or name == "tq")
        ),
        None,
    )


def imports(path):
    """(name, whether at the top level of the module) for everything that a module imports."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    # `if TYPE_CHECKING:` imports nothing.
    inside |= {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        top = id(node) not in inside
        if isinstance(node, ast.Import):
            yield from ((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            if module.split(".")[0] == "tq":
                # `from tq.engine import ops` imports tq.engine.ops; `from tq import __version__` only tq.
                yield from ((f"{module}.{alias.name}", top) for alias in node.names)
            else:
                yield module, top


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_down_only(path):
    if module_name(path) == "tq":
        pytest.skip("the public API is the top and imports nothing when it is imported")
    own = package_of(module_name(path))
    assert own is not None, f"{path} is in no level of the table"
    for name, _ in imports(path):
        if name.split(".")[0] == "tq":
            target = package_of(name) or "tq"
            assert LEVEL[target] <= LEVEL[own], f"{module_name(path)} imports {name}, which is above it"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_terminal_libraries_stay_in_the_command_line(path):
    used = {name.split(".")[0] for name, _ in imports(path)}
    if package_of(module_name(path)) not in MAY_USE_TERMINAL:
        assert not used & TERMINAL
    if module_name(path).startswith("tq.engine"):
        assert "print" not in {
            node.func.id
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_mlx_lm_is_imported_late_and_only_where_it_belongs(path):
    for name, top in imports(path):
        if name.split(".")[0] in ("mlx_lm", "transformers"):
            assert package_of(module_name(path)) in MAY_USE_MLX_LM
            assert not top, f"{module_name(path)} imports {name} when it is imported"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_every_file_says_what_it_is_and_is_short(path):
    text = path.read_text()
    assert not text.strip() or ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= 500


HEAVY = ["mlx", "mlx_lm", "transformers", "numpy", "huggingface_hub", "rich.progress"]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["convert", "--help"], ["run", "-h"], ["run", "--modle"], ["convert"]]
)
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys; from tq.cli import run_command\n"
        f"run_command({arguments!r})\n"
        f"print('loaded', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded []"


def test_importing_tq_imports_nothing():
    code = "import sys, tq; print([name for name in sys.modules if name.startswith(('mlx', 'numpy', 'tq.'))])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
