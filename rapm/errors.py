"""What ends a command with one line instead of a traceback."""


class UserError(Exception):
    """A mistake in what the user asked for: one line that says what is wrong, where, and what to do (exit code 2).

    What the line quotes may come from anybody's file: whatever does not print is escaped.
    """

    def __init__(self, message: object) -> None:
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(message)))


class RunError(RuntimeError):
    """A run that cannot go on: one line that says why (exit code 1). What was computed is kept."""


class ExportError(RuntimeError):
    """Files that do not do in stock software what the student does, or that the hub does not take (exit code 1)."""
