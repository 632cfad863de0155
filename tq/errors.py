"""What a person may do wrong, or meet, in one sentence with a hint. Not for programmers' mistakes."""


class TQError(Exception):
    """A failure that a person can act on.

    Args:
        message: One sentence, without a full stop, that names the valid values.
        hint: The next thing to try, or None.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(TQError):
    """The command line, a recipe or a setting asks for something that does not exist."""

    exit_code = 2
