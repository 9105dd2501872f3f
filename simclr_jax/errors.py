"""Exceptions that end a command with one line and no traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Says in one line what was wrong, what was expected and what to do."""


class Unavailable(UserError):
    """Says that a storage or another process did not answer: the same command may succeed later, and a launcher may
    run it again.
    """


class NotFinite(UserError):
    """Says that a loss, a gradient or features are not finite: the same command ends there again."""


class Stopped(Exception):
    """Says that a signal has stopped a training, which is saved: the same command resumes from there."""


# Exit status of a process that ends because another process or a storage is gone or stuck: a launcher may restart
# all processes, as it must not after a user's mistake. EX_UNAVAILABLE of sysexits.h.
LOST = 69


def one_line(error: Exception) -> str:
    """Returns the message of an error of any type, without line breaks."""
    return " ".join(str(error).split())


def reason(error: Exception) -> str:
    """Returns why something failed, in a few words of one line: of an OSError those of the system, without the path."""
    return getattr(error, "strerror", None) or one_line(error) or repr(error)


def near_names(
    name: str, known: Iterable[str], cutoff: float = 0.6, also: Iterable[str] = ()
) -> str:
    """Returns "; near names: ..." for the end of a message, or "" if no known name is near a misspelt one.

    Args:
      name: the misspelt one.
      known: the names to choose from.
      cutoff: how alike two names must be, in [0, 1]; see `difflib.get_close_matches`.
      also: names that are near for another reason.
    """
    found = difflib.get_close_matches(name, known, cutoff=cutoff)
    found += [other for other in also if other not in found]
    return f"; near names: {', '.join(found)}" if found else ""
