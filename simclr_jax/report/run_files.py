"""Reads what a workdir holds about its run, whatever state the run is in."""

import dataclasses
import json
import os
import re
from typing import Any

from etils import epath

from simclr_jax.assemble import references
from simclr_jax.config import flatten, from_dict
from simclr_jax.errors import UserError
from simclr_jax.evals import EVALUATIONS
from simclr_jax.evals.classifiers import TRAININGS
from simclr_jax.evals.verdict import judge_accuracy
from simclr_jax.files import absolute
from simclr_jax.training.log import SKIPPED_IN_A_ROW
from simclr_jax.training.metrics import last_values, read_lines
from simclr_jax.training.plan import Plan
from simclr_jax.training.record import is_of_run, run_record
from simclr_jax.training.verdict import HEALTH, NOT_JUDGED, References, Verdict, judge

# Results are in WORKDIR/NAME.json, and in WORKDIR/NAME_DATA_DIGEST.json on other data.
_RESULTS = (*EVALUATIONS, *TRAININGS, "distill")


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """A run's files.

    Attributes:
      workdir: the folder.
      about: config.json: {"config", "plan", "versions", "time", ...}.
      lines: metrics.jsonl, each {"step", name: value}.
      health: health.json, {"name", "because"}; None: no verdict has been passed.
      results: {file name without ".json": what an evaluation wrote}.
      title: what to call it; "": the folder's name.
      failed: not_finite_step_N.json files, by name: steps whose loss or gradient was not finite.
    """

    workdir: epath.Path
    about: dict[str, Any]
    lines: list[dict[str, float]]
    health: dict[str, str] | None
    results: dict[str, dict]
    failed: list[str]
    title: str = ""

    @property
    def name(self) -> str:
        """Returns the title, or the folder's name."""
        return self.title or os.path.basename(absolute(str(self.workdir)).rstrip("/"))

    @property
    def is_contrastive(self) -> bool:
        """Returns whether the run trained on pairs of views, with projections; a distillation does not."""
        return self.about.get("mode", "pretrain") == "pretrain"

    @property
    def loss_unit(self) -> str:
        """Returns "nats", or "" for the margin losses, whose values are differences of cosines."""
        is_margin = self.options["loss.name"].startswith("margin")
        return "" if self.is_contrastive and is_margin else "nats"

    @property
    def options(self) -> dict[str, Any]:
        """Returns {option: value} of the configuration."""
        return flatten(from_dict(self.about["config"]))

    @property
    def references(self) -> References:
        """Returns the numbers that the metrics are held against."""
        if "references" in self.about:
            return References(**self.about["references"])
        # A run of an earlier version.
        return references(from_dict(self.about["config"]), Plan(**self.about["plan"]))

    @property
    def is_imported(self) -> bool:
        """Returns whether the weights were not trained here, but imported."""
        return "imported" in self.about

    @property
    def steps(self) -> int:
        """Returns the last step that metrics tell of, 0 before the first."""
        return max((int(line["step"]) for line in self.lines), default=0)

    @property
    def state(self) -> str:
        """Returns how far the run is: "finished", "at step N of M", "failed after step N of M", or "imported" of weights
        that were not trained here. Nothing tells a run that was stopped from one that goes on.
        """
        if self.is_imported:
            return "imported"
        planned = self.about["plan"]["steps"]
        if self.has_failed:
            return f"failed after step {self.steps} of {planned}"
        return "finished" if self.steps >= planned else f"at step {self.steps} of {planned}"

    @property
    def has_failed(self) -> bool:
        """Returns whether a loss or gradient that was not finite seems to have ended the run: that of a step after the
        last report or, with train.skip_not_finite, those of more than SKIPPED_IN_A_ROW steps in a row, of which the last
        is after the last report.
        """
        failed = {_step_of(name) for name in self.failed}
        last = max(failed, default=0)
        skipped = SKIPPED_IN_A_ROW if self.options["train.skip_not_finite"] else 0
        ended = {last - i for i in range(skipped + 1)} <= failed
        return ended and self.steps < last and self.steps < self.about["plan"]["steps"]

    def verdict(self) -> dict[str, Any]:
        """Returns {"name", "because", "is_bad"}: the verdict that the run ended with, or, of one that has not
        ended, on its newest metrics.
        """
        if self.has_failed:
            said = f"not finite; {', '.join(self.failed)} names the images"
            return {"name": self.state, "because": said, "is_bad": True}
        found = self.health
        if found is None or self.steps < self.about["plan"]["steps"]:
            found = self._now()
        if found is None:
            said = "" if self.lines or self.is_imported else "nothing is reported yet"
            return {"name": self.state, "because": said, "is_bad": False}
        passed = Verdict(found["name"], found["because"])
        if not passed.is_bad:
            passed = self._evaluated(passed)
        return passed._asdict() | {"is_bad": passed.is_bad}

    def _evaluated(self, trained: Verdict) -> Verdict:
        """Returns the verdict of an evaluation of features at the run's last step, on its own data, if it is bad, or if
        training had none. Of what is trained by labels, the untrained encoder may well be as good.
        """
        newest = last_values(self.lines)
        verdict = trained
        for name in EVALUATIONS:
            result = self.results.get(name, {})
            if result.get("step") != self.about["plan"]["steps"]:
                continue
            found = judge_accuracy(result["rows"], newest, result.get("test_images"))
            if found and found.is_bad:
                return found
            if found and trained.name == NOT_JUDGED:
                verdict = found
        return verdict

    def _now(self) -> dict[str, str] | None:
        lines = [line for line in self.lines if "loss" in line and "z_std" in line]
        if not lines:
            return None
        return judge(int(lines[-1]["step"]), lines[-1], self.references)._asdict()

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Returns the steps at which a metric was written, and its values."""
        found = {int(line["step"]): line[name] for line in self.lines if name in line}
        return list(found), list(found.values())

    def last(self, name: str) -> float | None:
        """Returns the newest value of a metric."""
        values = self.series(name)[1]
        return values[-1] if values else None


def read_run_files(workdir: str) -> RunFiles:
    """Reads a workdir. Raises a UserError if it holds no run, or a file of it cannot be read."""
    root = epath.Path(absolute(workdir))
    about = run_record(root)
    if about is None:
        raise UserError(
            f"no run in {workdir}: expected a workdir of --mode=pretrain or distill, with its config.json"
        )
    try:
        flatten(from_dict(about["config"]))
    except (UserError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{root / 'config.json'} is not of this version: {error}") from error
    results = {
        path.stem: _json(path)
        for path in sorted(root.glob("*.json"))
        if path.stem.startswith(_RESULTS)
    }
    return RunFiles(
        root,
        about,
        read_lines(root / "metrics.jsonl"),
        _json(root / HEALTH),
        {
            name: found
            for name, found in results.items()
            if found and "rows" in found and is_of_run(found, about.get("run"))
        },
        sorted(path.name for path in root.glob("not_finite_step_*.json")),
    )


def _step_of(name: str) -> int:
    """Returns N of not_finite_step_N.json or not_finite_step_N_process_I.json."""
    return int(re.findall(r"\d+", name)[0])


def _json(path: epath.Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
