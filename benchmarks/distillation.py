"""Fine-tunes with few labels, distils, and prints the table: `python benchmarks/distillation.py W CONFIG`.

The order of SimCLR v2's table (arXiv 2006.10029): a network trained on the labels alone, the pretrained one
fine-tuned with them, and students of it that see all images without labels: one of the same size, at
temperature 0.1, and one of half the width, so some quarter of the parameters, at 1.0. For each seed, in
folders below W:

    pretrained   the configuration, with a head of three layers
    small        the encoder of half the width, after one step: for its fine-tuning without pretraining
    SHARE_self, SHARE_small   students of the teacher fine-tuned with this share of the labels

Every command is one of `python -m simclr_jax.main`, with the options after CONFIG; a finished one is not run
again.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

from simclr_jax.config.overrides import override
from simclr_jax.config.python_files import read_file

SHARES = (0.01, 0.1)
EPOCHS = (60.0, 30.0)  # the least that configs/folder.py chooses for these shares
KINDS = (
    "labels only",
    "pretrained, fine-tuned",
    "distilled to itself",
    "labels only, small",
    "distilled to small",
)


class Runs:
    """The commands of one seed, and what they found."""

    def __init__(self, folder: pathlib.Path, options: list[str], seed: int, epochs: float | None):
        self.folder, self.seed, self.epochs = folder / str(seed), seed, epochs
        shares = f"--config.finetune.label_fractions={SHARES}"
        self.options = [*options, shares, f"--config.seed={seed}", "--config.eval.seeds=1"]

    def command(self, name: str, mode: str, result: str, *more: str) -> pathlib.Path:
        """Runs one command in the folder `name`, unless `result` is there. Returns the folder."""
        workdir = self.folder / name
        if not (workdir / result).exists():
            print(f"seed {self.seed}: {name}, {mode} ...", flush=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "simclr_jax.main", f"--mode={mode}"]
            with (self.folder / f"{name}_{mode}.log").open("a") as log:
                subprocess.run(
                    [*command, f"--workdir={workdir}", *self.options, *more],
                    stdout=log,
                    stderr=log,
                    check=True,
                )
        return workdir

    def fine_tuned(self, name: str, layer: int, *more: str) -> dict[str, dict[float, dict]]:
        """Pretrains into the folder `name`, fine-tunes from a layer of the head (0: h); returns
        {features: {share: row of the result}}.
        """
        self.command(name, "pretrain", "health.json", "--config.eval.after_training=none", *more)
        result = self.folder / name / ("finetune" + (f"_layer_{layer}" if layer else "") + ".json")
        if result.exists() and len(json.loads(result.read_text())["rows"]) < 2 * len(SHARES):
            result.unlink()  # left by an interrupted command, which goes on
        self.command(name, "finetune", result.name, f"--config.finetune.from_layer={layer}", *more)
        rows = json.loads(result.read_text())["rows"]
        found: dict[str, dict[float, dict]] = {}
        for row in rows:
            found.setdefault(row["features"], {})[row["label_fraction"]] = row
        return found

    def student(self, share: float, kind: str, teacher: pathlib.Path, *more: str) -> float:
        """Distils; returns the student's test accuracy."""
        name = f"{share:g}_{kind}"
        epochs = [f"--config.train.epochs={self.epochs:g}"] if self.epochs else []
        teacher_option = f"--config.distill.teacher={teacher}"
        workdir = self.command(name, "distill", "distill.json", teacher_option, *epochs, *more)
        rows = json.loads((workdir / "distill.json").read_text())["rows"]
        return next(row["accuracy"] for row in rows if row["features"] == "student")


def of_seed(runs: Runs, width: float) -> list[dict]:
    """Makes all runs of one seed; returns a line for each share and kind."""
    three = ("--config.model.head_layers=3",)
    half = (f"--config.model.width={width / 2:g}",)
    one_step = ("--config.train.steps=1", "--config.optimizer.warmup_epochs=0.0")
    large = runs.fine_tuned("pretrained", 1, *three)
    small = runs.fine_tuned("small", 0, *half, *one_step)
    found = []
    for share in SHARES:
        tuned = large["encoder"][share]
        teacher = runs.folder / "pretrained" / tuned["runs"][0]["classifier"]
        itself = runs.student(share, "self", teacher, "--config.distill.temperature=0.1")
        less = runs.student(share, "small", teacher, "--config.distill.temperature=1.0", *half)
        alone = [x["untrained encoder"][share]["accuracy"] for x in (large, small)]
        values = (alone[0], tuned["accuracy"], itself, alone[1], less)
        found += [
            {"seed": runs.seed, "share": share, "kind": kind, "accuracy": value}
            for kind, value in zip(KINDS, values, strict=True)
        ]
    return found


def show(lines: list[dict]) -> None:
    """Prints mean and deviation over seeds of each kind."""
    print(
        f"{'test accuracy':24}" + "".join(f"{f'{share:.0%} of the labels':>22}" for share in SHARES)
    )
    for kind in KINDS:
        cells = []
        for share in SHARES:
            values = [
                100 * x["accuracy"] for x in lines if (x["kind"], x["share"]) == (kind, share)
            ]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.1f} +- {spread:.1f} %")
        print(f"{kind:24}" + "".join(f"{cell:>22}" for cell in cells))


def main() -> None:
    """Runs what is not there yet, prints the table and writes W/distillation.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("config", help="a configuration file, FILE or FILE:ARGUMENT")
    parser.add_argument("--width", type=float, required=True, help="model.width of the teacher")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--student_epochs", type=float, help="default: those of pretraining")
    arguments, options = parser.parse_known_args()
    usual = override(read_file(arguments.config), options).finetune
    epochs = dict(zip(SHARES, EPOCHS, strict=True)) | dict(
        zip(usual.label_fractions, usual.epochs, strict=False)
    )
    options.append(f"--config.finetune.epochs={tuple(epochs[share] for share in SHARES)}")
    options = [f"--config={arguments.config}", *options]
    lines = []
    for seed in arguments.seeds:
        runs = Runs(arguments.workdir, options, seed, arguments.student_epochs)
        lines += of_seed(runs, arguments.width)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (arguments.workdir / "distillation.jsonl").write_text(text)
    show(lines)


if __name__ == "__main__":
    main()
