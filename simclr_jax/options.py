"""One option: its name, its default, what it may be, and why it is there.

`config/rows.py` lists the options of a run. An encoder, a loss, a distortion or a source lists its own
beside its code, and `config/rows.py` collects them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Allowed(NamedTuple):
    """The values that an option may have.

    Attributes:
      holds: value -> whether the option may have it.
      says: the values in words, after "expected", or a function that returns them.
      are_paths: whether they are paths of files or folders, which the record of a run makes absolute.
    """

    holds: Callable[[Any], bool]
    says: str | Callable[[], str]
    are_paths: bool = False

    @property
    def text(self) -> str:
        """The values in words."""
        return self.says if isinstance(self.says, str) else self.says()


class Option(NamedTuple):
    """One row of the table of options.

    Attributes:
      name: "group.name", as in --config.group.name=VALUE.
      default: the value without a flag.
      allowed: the values that it may have.
      why: meaning, unit and reason, for a person.
      resumable: a resumed run may have another value, as it does not change what is learned.
    """

    name: str
    default: Any
    allowed: Allowed
    why: str
    resumable: bool = False

    def problem(self, value: Any) -> str | None:
        """Returns what is wrong with a value, or None if the option may have it."""
        if self.allowed.holds(value):
            return None
        return f"{self.name}={value!r}: expected {self.allowed.text}"


def option_field(default: Any, allowed: Allowed, why: str) -> Any:
    """Makes a dataclass's field an option, for `options_of`; the arguments are those of `Option`."""
    return dataclasses.field(default=default, metadata={"allowed": allowed, "why": why})


def options_of(kind: type, group: str) -> tuple[Option, ...]:
    """Returns the options "group.FIELD" of a dataclass whose fields are each an `option_field`."""
    return tuple(
        Option(f"{group}.{field.name}", field.default, **field.metadata)
        for field in dataclasses.fields(kind)
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def whole(low: int, high: int = 2**31 - 1) -> Allowed:
    """Allows the whole numbers from `low` to `high`."""
    return Allowed(
        lambda value: _is_whole(value) and low <= value <= high,
        f"a whole number from {low:,} to {high:,}",
    )


def number(low: float, high: float) -> Allowed:
    """Allows the finite numbers from `low` to `high`."""
    return Allowed(
        lambda value: _is_number(value) and low <= value <= high,
        f"a number from {low:g} to {high:g}",
    )


def below(low: float, high: float) -> Allowed:
    """Allows the finite numbers from `low` up to, but not including, `high`."""
    return Allowed(
        lambda value: _is_number(value) and low <= value < high,
        f"a number from {low:g} to below {high:g}",
    )


def one_of(*values: Any) -> Allowed:
    """Allows these values."""
    return Allowed(
        lambda value: value in values and type(value) in {type(v) for v in values},
        f"one of {', '.join(map(str, values))}",
    )


def name_in(table: Mapping[str, Any]) -> Allowed:
    """Allows the names of a table, also those that are added to it later: a loss of one's own, say."""
    return Allowed(
        lambda value: isinstance(value, str) and value in table,
        lambda: f"one of {', '.join(table)}, or one that the file given as --config adds",
    )


def flag() -> Allowed:
    """Allows True and False."""
    return Allowed(lambda value: isinstance(value, bool), "True or False")


def text() -> Allowed:
    """Allows any text."""
    return Allowed(lambda value: isinstance(value, str), "text")


def path() -> Allowed:
    """Allows the path of a file or folder, or an address such as gs://BUCKET/FOLDER; "" for none."""
    return text()._replace(are_paths=True)


def each(allowed: Allowed, least: int = 0) -> Allowed:
    """Allows tuples of at least `least` elements, every element one of `allowed`."""
    count = f"{least} or more values" if least else "any number of values"
    return Allowed(
        lambda value: (
            isinstance(value, tuple) and len(value) >= least and all(map(allowed.holds, value))
        ),
        f"a tuple of {count}, each {allowed.text}",
    )


def interval(low: float, high: float) -> Allowed:
    """Allows pairs (a, b) with low <= a <= b <= high."""
    return Allowed(
        lambda value: (
            isinstance(value, tuple)
            and len(value) == 2
            and all(map(_is_number, value))
            and low <= value[0] <= value[1] <= high
        ),
        f"(low, high) with {low:g} <= low <= high <= {high:g}",
    )
