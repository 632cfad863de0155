"""Events that long work yields and commands render. Values only: nothing here prints."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Work done so far, in one unit ("weights", "bytes", "tokens", "windows")."""

    done: int
    total: int
    unit: str
    label: str = ""


@dataclass(frozen=True)
class Note:
    """Something a person should know, said once."""

    message: str
