"""The one exception a user can cause."""


class UserError(Exception):
    """A mistake in what the user asked for: one line that says what is wrong, where, and what to do (exit code 2).

    What the line quotes may come from anybody's file: whatever does not print is escaped.
    """

    def __init__(self, message: object) -> None:
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(message)))
