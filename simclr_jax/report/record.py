"""What a workdir holds about its run, whatever state the run is in."""

import dataclasses
import json
import pathlib
from typing import Any

from simclr_jax.config import flatten, from_dict
from simclr_jax.errors import UserError

# Results of evaluations: WORKDIR/NAME.json, and WORKDIR/NAME_DATA_DIGEST.json on other data.
_RESULTS = ("probe", "knn", "linear", "finetune", "transfer", "transfer_finetune")


@dataclasses.dataclass(frozen=True)
class Record:
    """A run's files.

    Attributes:
      workdir: the folder.
      about: config.json: {"config", "plan", "versions", "time", ...}.
      lines: metrics.jsonl, each {"step", name: value}.
      health: health.json, {"name", "because"}; None: no verdict has been passed.
      results: {file name without ".json": what an evaluation wrote}.
      failed: not_finite_step_N.json files, by name: steps whose loss or gradient was not finite.
    """

    workdir: pathlib.Path
    about: dict[str, Any]
    lines: list[dict[str, float]]
    health: dict[str, str] | None
    results: dict[str, dict]
    failed: list[str]

    @property
    def name(self) -> str:
        """The folder's name, for a person."""
        return self.workdir.absolute().name

    @property
    def options(self) -> dict[str, Any]:
        """{option: value} of the configuration."""
        return flatten(from_dict(self.about["config"]))

    @property
    def steps(self) -> int:
        """Steps that the metrics tell of."""
        return max((int(line["step"]) for line in self.lines), default=0)

    @property
    def state(self) -> str:
        """How far the run is: "finished", "at step ...", or "failed ...". One that was stopped looks as one
        that goes on.
        """
        planned = self.about["plan"]["steps"]
        if self.has_failed:
            return f"failed after step {self.steps} of {planned}"
        return "finished" if self.steps >= planned else f"at step {self.steps} of {planned}"

    @property
    def has_failed(self) -> bool:
        """Whether a loss or gradient that was not finite ended the run before its last step."""
        return bool(self.failed) and self.steps < self.about["plan"]["steps"]

    def verdict(self) -> dict[str, Any]:
        """Returns {"name", "because", "is_bad"}: the run's own verdict, or why there is none yet."""
        if self.has_failed:
            said = {
                "name": self.state,
                "because": f"not finite; {', '.join(self.failed)} names the images",
            }
            return said | {"is_bad": True}
        if self.health is None:
            return {
                "name": self.state,
                "because": "no verdict has been passed yet",
                "is_bad": False,
            }
        return self.health | {"is_bad": self.health["name"] != "sound"}

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Returns the steps at which a metric was written, and its values."""
        found = {int(line["step"]): line[name] for line in self.lines if name in line}
        return list(found), list(found.values())

    def last(self, name: str) -> float | None:
        """Returns the newest value of a metric."""
        values = self.series(name)[1]
        return values[-1] if values else None


def read_record(workdir: str) -> Record:
    """Reads a workdir. Raises a UserError if it holds no run, or a file of it cannot be read."""
    root = pathlib.Path(workdir).expanduser()
    about = _json(root / "config.json")
    if about is None or "plan" not in about:
        raise UserError(
            f"no run in {workdir}: expected a workdir of --mode=pretrain, with its config.json"
        )
    results = {path.stem: _json(path) for path in sorted(root.glob("*.json"))}
    return Record(
        root,
        about,
        _lines(root / "metrics.jsonl"),
        _json(root / "health.json"),
        {
            name: found
            for name, found in results.items()
            if found and name.startswith(_RESULTS) and "rows" in found
        },
        sorted(path.name for path in root.glob("not_finite_step_*.json")),
    )


def _json(path: pathlib.Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _lines(path: pathlib.Path) -> list[dict[str, float]]:
    """Reads metrics; a last line that is still being written is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
