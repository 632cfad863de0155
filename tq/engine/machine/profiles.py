"""Where the profiles are that ship with tq: facts of a machine and numbers tuned for it, one TOML file each."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2]


def profile_names() -> list[str]:
    """Every name that `profile_path` knows."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


def profile_path(name: str) -> Path | None:
    """The file of a profile, or None if there is no such profile."""
    path = _folder() / f"{name}.toml"
    # A name, not a path: "../other" is a file that the user means.
    return path if Path(name).name == name and path.is_file() else None


def _folder() -> Path:
    """Inside the package in a wheel, beside it in a checkout."""
    inside = PACKAGE / "profiles"
    return inside if inside.is_dir() else PACKAGE.parent / "profiles"
