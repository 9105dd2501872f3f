"""The modes of the command line, one row each: those of `MODES`, and one for each evaluation of features.

To add one, write its file and a row in `MODES`.
"""

from typing import NamedTuple

from simclr_jax.evals import EVALUATIONS


class Mode(NamedTuple):
    """A mode: a function of the configuration, the workdir and the mode's flags.

    Attributes:
      module, function: where it is, below simclr_jax.
      text: what it does, for --help.
      needs: names of the flags that must be given.
      takes: names of the flags that may be given besides.
      trains: a signal may stop it; then it returns False or None, and the same command goes on.
      begins: it makes the workdir; so without --config the defaults apply, with ImageNet as the data.
    """

    module: str
    function: str
    text: str
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    trains: bool = False
    begins: bool = False


MODES = {
    "pretrain": Mode(
        "modes.pretrain",
        "pretrain_and_evaluate",
        "train the encoder; ends with a probe where the data have labels",
        takes=("extend",),
        trains=True,
    ),
    **{
        name: Mode("evals.evaluate", "evaluate_features", evaluation.text, takes=("follow",))
        for name, evaluation in EVALUATIONS.items()
    },
    "linear": Mode(
        "evals.finetune", "linear", "linear evaluation by SGD on random crops", trains=True
    ),
    "finetune": Mode(
        "evals.finetune",
        "finetune",
        "train the whole network with all labels and with few",
        trains=True,
    ),
    "transfer_finetune": Mode(
        "evals.finetune",
        "transfer_finetune",
        "train the whole network with a grid of settings, as for transfer to other data",
        trains=True,
    ),
    "distill": Mode(
        "modes.distill",
        "distill",
        "train a student to classify as a teacher does, without labels",
        trains=True,
    ),
    "embed": Mode(
        "modes.embed",
        "embed",
        "the representations of every image of a folder, file or split, to a file",
        needs=("input", "output"),
        takes=("with_z",),
    ),
    "neighbours": Mode(
        "modes.neighbours",
        "neighbours",
        "a picture of the nearest neighbours of some images, or a table of all, from such a file",
        needs=("input",),
        takes=("output", "query", "k"),
    ),
    "export": Mode(
        "modes.export",
        "export",
        "the encoder, or a classifier, for other programs",
        needs=("format",),
        takes=("output",),
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
        trains=True,
    ),
    "report": Mode(
        "modes.report",
        "report",
        "a page about the run, for a browser: health, curves, views, neighbours, map; or about several",
        takes=("runs", "output"),
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
