"""The one exception that means: the user can mend this, show the message and no traceback."""


class UserError(Exception):
    """Says in one line what was wrong, what was expected and what to do."""


def one_line(error: Exception) -> str:
    """Returns the message of an error, whatever it is of, without line breaks."""
    return " ".join(str(error).split())
