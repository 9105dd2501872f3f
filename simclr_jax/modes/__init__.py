"""The modes of the command line, and the flags that belong to some of them.

To add a mode, write its file and a row in `MODES`; for a flag that it alone has, a row in `FLAGS`. An evaluation is
a mode by its row in `EVALUATIONS` or in `TRAININGS`.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

from simclr_jax.evals import EVALUATIONS
from simclr_jax.evals.classifiers import TRAININGS


class Mode(NamedTuple):
    """A mode: a function of the configuration, the workdir and the mode's flags.

    Attributes:
      module, function: where it is, below simclr_jax.
      text: what it does, for --help.
      needs: names of the flags that must be given.
      takes: names of the flags that may be given besides.
      of_a_run: it works on the run in --workdir and uses its options; a --config file is run only for the encoders,
        losses and sources that it adds.
      begins: it makes the workdir; so without --config the defaults apply, with ImageNet as the data.
      leading: arguments of the function before the configuration.
    """

    module: str
    function: str
    text: str
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    of_a_run: bool = False
    begins: bool = False
    leading: tuple[str, ...] = ()

    @property
    def flags(self) -> tuple[str, ...]:
        """Returns the names of all flags that may be given."""
        return (*self.needs, *self.takes)


class Flag(NamedTuple):
    """A flag of the command line that belongs to the modes which need or take it.

    Attributes:
      meaning: for --help, after the names of the modes.
      metavar: stands for the value in --help; None: the flag has no value, or `choices`.
      choices: allowed values; None: any.
      read: makes the value of its text.
    """

    meaning: str
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    read: Callable[[str], object] = str


def _count(text: str) -> int:
    """Reads a whole number of 1 or more, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of 1 or more")
    return int(text)


FLAGS = {
    "topology": Flag(
        "the slice, such as v5e:16x16, or several: 2xv5e:16x16", metavar="[Nx]KIND:SHAPE"
    ),
    "format": Flag(
        "what to write", choices=("safetensors", "stablehlo", "savedmodel", "huggingface")
    ),
    "input": Flag(
        "what to read. embed: a folder, FILE.npz, FILES.parquet, NAME:SPLIT of a TFDS data set, or train or test for "
        "the run's own data (./train is a folder); neighbours: the file that --mode=embed wrote; import: a file of "
        "weights",
        metavar="WHAT",
    ),
    "output": Flag(
        "the file to write, by default in the workdir. embed: FILE.parquet or FILE.npz, no default; neighbours: "
        "FILE.parquet is a table, any other name a picture",
        metavar="PATH",
    ),
    "with_z": Flag("write the projections z too"),
    "query": Flag(
        "names of images, one with commas in double quotes; default: eight, evenly spaced, for a picture, all for a "
        "table",
        metavar="A,B,...",
    ),
    "k": Flag("how many neighbours; default: 8", metavar="N", read=_count),
    "follow": Flag(
        "evaluate each new checkpoint of a run that another process trains, until its last step"
    ),
    "runs": Flag("compare these workdirs, in WORKDIR/runs.html", metavar="'A B RUNS/*'"),
    "extend": Flag("go on, with other train.epochs or train.steps than before"),
    "study": Flag(
        "such as configs/studies/loss.py; some have the paper's levels, too",
        metavar="FILE.py[:paper]",
    ),
    "part": Flag(
        "only every N-th run from the I-th on, so that N programs share a study", metavar="I/N"
    ),
    "dry_run": Flag("list the runs and estimate their time"),
}


MODES = {
    "pretrain": Mode(
        "modes.pretrain",
        "pretrain_and_evaluate",
        "train the encoder; ends with a probe where the data have labels",
        takes=("extend",),
    ),
    **{
        name: Mode(
            "evals.follow",
            "evaluate_or_follow",
            evaluation.text,
            takes=("follow",),
            of_a_run=True,
            leading=(name,),
        )
        for name, evaluation in EVALUATIONS.items()
    },
    **{
        name: Mode("evals.evaluate", "evaluate", training.text, of_a_run=True, leading=(name,))
        for name, training in TRAININGS.items()
    },
    "distill": Mode(
        "modes.distill",
        "distill",
        "train a student to classify as a teacher does, without labels",
    ),
    "embed": Mode(
        "modes.embed",
        "embed",
        "the representations of every image of a folder, file or split, to a file",
        needs=("input", "output"),
        takes=("with_z",),
        of_a_run=True,
    ),
    "neighbours": Mode(
        "modes.neighbours",
        "neighbours",
        "a picture of the nearest neighbours of some images, or a table of all, from a file that embed wrote",
        needs=("input",),
        takes=("output", "query", "k"),
    ),
    "export": Mode(
        "modes.export",
        "export",
        "the encoder, or a classifier, for other programs",
        needs=("format",),
        takes=("output",),
        of_a_run=True,
    ),
    "import": Mode(
        "modes.import_weights",
        "import_weights",
        "weights of google-research/simclr, torchvision or timm, into a workdir",
        needs=("input",),
        begins=True,
    ),
    "study": Mode(
        "modes.study",
        "run_study",
        "a table or figure of the paper, from runs of its own; see configs/studies",
        needs=("study",),
        takes=("part", "dry_run"),
    ),
    "report": Mode(
        "modes.report",
        "report",
        "a page about the run, for a browser: health, curves, views, neighbours, map; or about several",
        takes=("runs", "output"),
        of_a_run=True,
    ),
    "views": Mode(
        "modes.report",
        "views",
        "a page of what training would see of some images: look at it before you train",
        takes=("output",),
    ),
    "explain": Mode(
        "modes.explain",
        "explain",
        "what a configuration comes to: steps, memory, time an epoch, and what is unusual about it",
        takes=("topology",),
    ),
    "compile": Mode(
        "modes.compile",
        "compile_for",
        "compile the train step for a TPU slice that need not be there",
        needs=("topology",),
    ),
}


def owners(flag: str) -> str:
    """Returns the names of the modes that have a flag, such as "embed, neighbours and import"."""
    *others, last = [name for name, mode in MODES.items() if flag in mode.flags]
    return f"{', '.join(others)} and {last}" if others else last
