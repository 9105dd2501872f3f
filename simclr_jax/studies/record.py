"""Recognises a finished run of a study by everything that decides its outcome."""

import hashlib
import json

from etils import epath
from ml_collections import ConfigDict

from simclr_jax import config as config_lib
from simclr_jax.errors import UserError
from simclr_jax.evals import subjects
from simclr_jax.files import read_json
from simclr_jax.studies.contract import Study
from simclr_jax.studies.outcomes import AGAIN, OUTCOME

# Options of the group "data" that name files: images and labels are identified by their fingerprint, not by paths.
FILES_OF_DATA = ("path", "test_path", "labels_file")

# Options that do not change an outcome: a finished run stays valid if they differ.
_DECIDES_NOTHING = (
    "checkpoint.",
    "health.",
    "eval.batch_size",
    "eval.every_",
    "eval.on_the_way",
    *(f"data.{name}" for name in FILES_OF_DATA),
    "train.hang_seconds",
    "train.log_every_steps",
    "train.report",
    "train.sinks",
)
# These change no outcome either. They count as at their defaults, so that studies of earlier versions go on.
_SAME_OUTCOME = (
    "data.max_broken",
    "eval.label_fraction",
    "eval.labels_per_class",  # which row is read is recorded apart
    "loss.implementation",
    "mesh.fsdp",
    "model.remat",
)
# Groups of options that matter to a study only if its evaluation has the group's name.
_OF_OTHER_MODES = ("finetune.", "linear.", "transfer_finetune.", "distill.")


def check_finished(folder: epath.Path, about: dict[str, dict]) -> None:
    """Raises a UserError if a run of a study was finished with other options or data, whosever part it was.

    `about`: {run: what `about_run` says of it}.
    """
    for name, now in about.items():
        file = folder / name / OUTCOME
        if file.exists() and (differ := _differences(read_json(file, AGAIN)["about"], now)):
            raise UserError(
                f"{file} was made with other {', '.join(differ)}: use another --workdir, or remove {file.parent}"
            )


def fingerprints(config: ConfigDict, configs: dict[str, ConfigDict]) -> dict[str, str]:
    """Returns a digest of the images of each run, {name: configuration}. They are those of `config`, the study's, unless
    a level of the study names other files.
    """
    usual = [config.data[name] for name in FILES_OF_DATA]
    found = dict.fromkeys(configs, subjects.fingerprint(subjects.labelled(config)))
    for name, own in configs.items():
        if [own.data[x] for x in FILES_OF_DATA] != usual:
            found[name] = subjects.fingerprint(subjects.labelled(own))
    return found


def about_run(config: ConfigDict, study: Study, images: str) -> dict:
    """Returns everything that decides the outcome of a run, JSON-able; `images`: a digest of the data."""
    without = (*_DECIDES_NOTHING, *(set(_OF_OTHER_MODES) - {f"{study.evaluation}."}))
    options = {k: v for k, v in config_lib.flatten(config).items() if not k.startswith(without)}
    options |= {o.name: o.default for o in config_lib.OPTIONS if o.name in _SAME_OUTCOME}
    return {
        "options": options,
        "evaluation": study.evaluation,
        "labels per class": study.labels_per_class,
        "readings": {name: dict(overrides) for name, overrides in study.readings.items()},
        "data": images,
    }


def _differences(then: dict | str, now: dict) -> list[str]:
    """Names what differs between two results of `about_run`: options, and the other keys.

    `then` may be of an earlier version: options that it lacks count as at their defaults. Still
    earlier versions recorded a digest, a text, in place of the dict.
    """
    if isinstance(then, str):
        content = repr(tuple(now.values())).encode()
        same = then == hashlib.blake2b(content, digest_size=16).hexdigest()
        return [] if same else ["options, data or readings"]
    now = json.loads(json.dumps(now))
    before = config_lib.with_defaults(then["options"], now["options"])
    names = sorted(before.keys() | now["options"].keys())
    differ = [name for name in names if before.get(name) != now["options"].get(name)]
    return differ + [name for name in now if name != "options" and then[name] != now[name]]
