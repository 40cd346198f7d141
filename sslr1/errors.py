"""The one exception that means: the user can mend this, and the message says how."""


class UserError(ValueError):
    """Entry points print it in one line and leave with exit code 2; anything else is a bug and keeps its traceback."""
