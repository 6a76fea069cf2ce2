"""The one exception a user can cause."""


class UserError(Exception):
    """A mistake in what the user asked for: one line that says what is wrong, where, and what to do (exit code 2)."""
