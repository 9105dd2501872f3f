"""Images that cannot be read: skipped, counted, and named in a report in the workdir."""

import json
import math
from collections.abc import Iterable
from typing import NamedTuple

from etils import epath

from simclr_jax.console import say
from simclr_jax.data.split import Split
from simclr_jax.errors import UserError
from simclr_jax.files import write_text

_ALL_TRIED = 2000  # images that are all tried where too many of some are broken: some 10 s
_SAID = 5  # broken images named on the terminal; the report names all


class Broken:
    """The broken images of a split, as far as they have been met.

    Attributes:
      report: the file that names them; None: none.
    """

    def __init__(
        self,
        split: Split,
        limit: float,
        report: epath.Path | None = None,
        whole: Split | None = None,
    ):
        """Reads an earlier report and keeps its entries that still cannot be read.

        Args:
          split: the images.
          limit: the share of the images that may be broken.
          report: a file of one JSON object a line, {"index", "image", "problem"}; None: none.
          whole: the split from which `split` was drawn; None: `split` itself. `limit` is a share of its
            images, so that a small subset does not fail for one broken image.
        """
        self._split, self._limit, self.report = split, limit, report
        self._limit_of = (whole or split).count
        self._problems: dict[int, str] = {}
        self._lines: list[str] = []
        if report is not None and report.exists():
            known = [_index_of(line) for line in report.read_text().splitlines()]
            self._note([i for i in known if i is not None and i < split.count], say_it=False)
            self._write()
            self._check()

    @property
    def indices(self) -> set[int]:
        """Returns the indices of the broken images."""
        return set(self._problems)

    def find(self, indices: Iterable[int]) -> bool:
        """Tries to read these images and notes those that cannot be. Returns whether there are any.

        Raises:
          UserError: they are more than the limit allows; with examples.
        """
        before = len(self._problems)
        self._note([i for i in indices if i not in self._problems], say_it=True)
        if len(self._problems) > before:
            self._write()
        self._check()
        return len(self._problems) > before

    def _is_too_many(self) -> bool:
        bad = len(self._problems)
        return bad > self._limit * self._limit_of or bad == self._split.count

    def _check(self) -> None:
        count = self._split.count
        if not self._is_too_many():
            return
        if count <= _ALL_TRIED:  # else they would be found a few at a time
            self._note(set(range(count)) - self.indices, say_it=False)
            self._write()
        bad = len(self._problems)
        some = sorted(self._problems.items())[:3]
        names = ", ".join(f"{self._split.name_of(i)} ({problem})" for i, problem in some)
        where = f"; {self.report} names all that were met" if self.report else ""
        if bad == count:
            raise UserError(f"none of {count} images can be read, such as {names}{where}")
        of = "" if self._limit_of == count else f" of {self._limit_of}"
        enough = math.floor(100 * bad / self._limit_of + 1) / 100
        cure = f"give --config.data.max_broken={enough:g}"
        cure = cure if count <= _ALL_TRIED else "raise data.max_broken"
        raise UserError(
            f"{bad} of {count} images cannot be read, more than the "
            f"share of {self._limit:g}{of} that data.max_broken allows, such as {names}: mend or "
            f"remove them, or {cure}{where}"
        )

    def _note(self, indices: Iterable[int], say_it: bool) -> None:
        problems = self._split.problems(set(map(int, indices)))
        for index, problem in sorted(problems.items()):
            self._problems[index] = problem
            name = self._split.name_of(index)
            self._lines.append(json.dumps({"index": index, "image": name, "problem": problem}))
            if say_it and len(self._problems) <= _SAID:
                say(f"skipped     {name}: {problem}")
            elif say_it and len(self._problems) == _SAID + 1:
                where = f": all are in {self.report}" if self.report else ""
                say(f"skipped     ... and more{where}")

    def say_how_many(self) -> None:
        """Says how many images were skipped, and where they are named, if any were."""
        if self._problems:
            count = len(self._problems)
            images = f"{count} image{'s' * (count > 1)}"
            say(f"skipped     {images} that cannot be read, see {self.report}")

    def _write(self) -> None:
        """Writes the report; removes it if all images that were broken are mended."""
        if self.report is None:
            return
        if not self._lines:
            self.report.unlink(missing_ok=True)
            return
        write_text(self.report, "".join(f"{line}\n" for line in self._lines))


def _index_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["index"])
    except (ValueError, TypeError, KeyError):  # cut off when the run was killed, or edited
        return None


class Images(NamedTuple):
    """A split and its broken images.

    Attributes:
      split: the images.
      broken: which of them are known to be broken.
    """

    split: Split
    broken: Broken
