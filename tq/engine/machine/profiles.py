"""Profiles, one TOML file each: facts of a machine and numbers tuned for it. Those that ship with tq have names."""

from pathlib import Path

from tq.engine.machine.tables import Profile
from tq.engine.machine.toml_file import TomlFile, read, refuse
from tq.errors import UsageError

PACKAGE = Path(__file__).resolve().parents[2]
GIB = 2**30
# Of what is built in, what Linux calls the total may be less: firmware and the kernel have taken their part.
VISIBLE_SHARE = 15 / 16


def profile_names() -> list[str]:
    """Every name that `profile_path` knows, the smallest machine first."""
    return sorted((path.stem for path in _folder().glob("*.toml")), key=lambda name: (len(name), name))


def profile_path(name: str | Path) -> Path:
    """The file of a profile or recipe: one that ships with tq, by its name, or any other by its path.

    Raises:
        UsageError: There is no such profile and no such file.
    """
    path = _shipped(name) or Path(name).expanduser()
    if not path.exists():
        raise UsageError(f"no recipe file or profile {str(name)!r}", f"profiles: {', '.join(profile_names())}")
    return path


def beside(name: str, folder: Path) -> str:
    """What a file in a folder means by a name or path: paths begin in the folder."""
    return name if _shipped(name) else str(folder / Path(name).expanduser())


def load_profile(name: str | Path) -> Profile:
    """A profile or recipe by its name or path.

    Raises:
        UsageError: There is none, or it has mistakes.
    """
    found = read(profile_path(name), Profile)
    if isinstance(found, TomlFile):
        return found.values
    refuse(found)
    raise AssertionError("a file is read or has mistakes")


def pick_profile(memory_bytes: int) -> tuple[str | None, str]:
    """The profile for the largest machine that is not above one with so much memory, and why this one or none."""
    sizes = {name: _memory_gb(name) for name in profile_names()}
    machine = f"this machine, whose system sees {memory_bytes / GIB:.1f} GiB of memory"
    fitting = [name for name, gb in sizes.items() if gb * VISIBLE_SHARE * GIB <= memory_bytes]
    if not fitting:
        return None, f"{', '.join(sizes)} are all for more than {machine}"
    best = max(fitting, key=sizes.__getitem__)
    return best, f"{best} is the largest of {', '.join(sizes)} that is not for more than {machine}"


def _memory_gb(name: str) -> float:
    machine = load_profile(name).machine
    assert machine is not None, f"the profile {name} says nothing about its machine"
    return machine.memory_gb


def _shipped(name: str | Path) -> Path | None:
    path = _folder() / f"{name}.toml"
    # A name, not a path: "../other" is a file that the user means.
    return path if Path(name).name == str(name) and path.is_file() else None


def _folder() -> Path:
    """Inside the package in a wheel, beside it in a checkout."""
    inside = PACKAGE / "profiles"
    return inside if inside.is_dir() else PACKAGE.parent / "profiles"
