"""The one exception that means: the user can mend this, show the message and no traceback."""


class UserError(Exception):
    """Says in one line what was wrong, what was expected and what to do."""


class Unavailable(UserError):
    """Says that a storage or another process did not answer: the same command may succeed later, and a launcher may
    run it again.
    """


class NotFinite(UserError):
    """Says that a training cannot go on, as its loss or gradient is not finite: the same command ends there again."""


# Exit status of a process that ends because another process or a storage is gone or stuck: a launcher may restart
# all processes, as it must not after a user's mistake. EX_UNAVAILABLE of sysexits.h.
LOST = 69


def one_line(error: Exception) -> str:
    """Returns the message of an error of any type, without line breaks."""
    return " ".join(str(error).split())
