"""The one exception that means: the user can mend this, show the message and no traceback."""


class UserError(Exception):
    """Says in one line what was wrong, what was expected and what to do."""
