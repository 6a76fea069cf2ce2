"""What ends a command with one line instead of a traceback."""


class UserError(Exception):
    """A mistake in what the user asked for: one line that says what is wrong, where, and what to do (exit code 2)."""


class RunError(RuntimeError):
    """A run that cannot go on: one line that says why (exit code 1). What was computed is kept."""
