"""Trains ours and lightly's parts on the same images: `python benchmarks/learning.py DATA`.

DATA is a folder with train/CLASS/FILE and test/CLASS/FILE, or an .npz file of train_images and
test_images, uint8 [N, H, W, 1 or 3], train_labels and test_labels. Three kinds of runs, each with
several seeds, each a process of its own:

    ours         the automatic settings of configs/folder.py on a CPU
    lightly      the same encoder, epochs, batch, temperature, crops and strength of colour, built
                 from lightly's parts, with the optimizer of its documentation, at the documented
                 learning rate or four times it, whichever is better on the validation part
    ours, time   ours with as many epochs as fit into the seconds that lightly's training took

One probe judges all runs: scikit-learn's logistic regression on standardised features. Its C is chosen on the
same validation part, a tenth of the training images, as lightly's learning rate. A finished run is not run again: its
line is in --runs, with all the options that it read.
"""

import argparse
import ast
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import numpy as np

LABELS, DRAWS, NEIGHBOURS = 10, 5, 20
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # scikit-learn's C
MOST_TRAINING = 10_000  # images that the probe is fitted on
# The rate of lightly's documentation, and four times it: in a short training the best rate may be higher.
LIGHTLY_RATES = (0.06, 0.24)
# The options that other flags decide, or that this program itself sets.
NOT_SET = {"seed", "train.epochs", "train.steps", "train.log_every_steps", "views.flip"}
# The options that other kinds than ours read.
READ = {
    "raw pixels": ("data.image_size",),
    "lightly": (
        "data.image_size",
        "data.batch_size",
        "views.color_strength",
        "views.crop_area",
        "views.blur_probability",
        "model.width",
        "loss.temperature",
        "train.epochs",
        "lightly.learning_rate",
    ),
}


class Run(NamedTuple):
    """One run: of which data and kind, with which seed and options, and whether views are flipped.

    The options are those of `settings` and of the command line, as far as the kind reads them.
    """

    path: pathlib.Path
    kind: str
    seed: int
    options: dict
    flip: bool

    def named(self) -> dict:
        """Returns what distinguishes the run from others on the same data."""
        named = {"kind": self.kind, "seed": self.seed, "options": self.options, "flip": self.flip}
        return json.loads(json.dumps(named))  # tuples become lists, as in the file


class Part(NamedTuple):
    """The training or the test images, uint8 [H, W, 3] each, of any sizes, and their labels [N]."""

    images: list[np.ndarray]
    labels: np.ndarray


def load(path: pathlib.Path) -> dict[str, Part]:
    """Reads {"train", "test"} from a folder or an .npz file."""
    if path.is_dir():
        train, classes = read_folder(path / "train")
        return {"train": train, "test": read_folder(path / "test", classes)[0]}
    with np.load(path) as file:
        return {
            name: Part([in_color(x) for x in file[f"{name}_images"]], file[f"{name}_labels"])
            for name in ("train", "test")
        }


def in_color(image: np.ndarray) -> np.ndarray:
    """Turns [H, W, 1 or 3] into [H, W, 3]."""
    return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image


def read_folder(
    root: pathlib.Path, classes: tuple[str, ...] | None = None
) -> tuple[Part, tuple[str, ...]]:
    """Reads the image files of class folders. Returns them and the names of the classes, which number the labels: those
    that are there, or `classes`.
    """
    from simclr_jax.data import pixels
    from simclr_jax.data.folder import open_split

    source = open_split(str(root), labels=True, classes=classes).source
    images = [pixels.read(source[i].image) for i in range(len(source))]
    return Part(images, source.labels), source.classes


def settings(images: list[np.ndarray]) -> dict:
    """Returns the options that `configs/folder.py` chooses for these images on a CPU."""
    from simclr_jax.config.suggest import suggest_settings

    short_side = int(np.median([min(x.shape[:2]) for x in images]))
    return {c.option: c.value for c in suggest_settings(len(images), short_side, False)}


def ours(data: dict[str, Part], options: dict, run: Run) -> dict:
    """Trains ours. Returns {"train", "test": features, "seconds", "contrastive": accuracy}."""
    from simclr_jax import config, load_encoder
    from simclr_jax.modes.pretrain import pretrain
    from simclr_jax.shell import keep_compiled_programs

    keep_compiled_programs()  # as the command does
    c = config.default()
    config.set_options(c, options)
    c.data.source, c.data.path = "arrays", str(run.path)
    if run.path.is_dir():
        c.data.source, c.data.path = "folder", str(run.path / "train")
    c.seed, c.views.flip, c.train.log_every_steps = run.seed, run.flip, 20
    with tempfile.TemporaryDirectory() as workdir:
        began = time.monotonic()
        pretrain(c, workdir)
        seconds = time.monotonic() - began
        lines = pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()
        told = [x["contrastive_top1"] for x in map(json.loads, lines) if "contrastive_top1" in x]
        encoder = load_encoder(workdir)
    found = {name: encoder.embed(part.images) for name, part in data.items()}
    return found | {"seconds": seconds, "contrastive": told[-1]}


def resized(images: list[np.ndarray], size: int) -> np.ndarray:
    """Resizes the largest centred square of each image to [N, size, size, 3], by Pillow."""
    from PIL import Image, ImageOps

    return np.stack(
        [np.asarray(ImageOps.fit(Image.fromarray(x), (size, size), Image.BICUBIC)) for x in images]
    )


def lightly(data: dict[str, Part], options: dict, run: Run) -> dict:
    """Trains lightly's parts; see `ours`."""
    from peers import torch

    t = torch()
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform
    from PIL import Image

    t.manual_seed(run.seed)
    size, batch = options["data.image_size"], options["data.batch_size"]
    transform = SimCLRTransform(
        input_size=size,
        cj_strength=options["views.color_strength"],
        min_scale=options["views.crop_area"][0],
        gaussian_blur=options["views.blur_probability"],
        hf_prob=0.5 if run.flip else 0.0,
    )
    pictures = [Image.fromarray(x) for x in data["train"].images]

    class Views(t.utils.data.Dataset):
        def __len__(self):
            return len(pictures)

        def __getitem__(self, i):
            return transform(pictures[i])

    encoder = torch_resnet(t, options["model.width"])
    width = encoder[-1].width
    head = SimCLRProjectionHead(width, width, 128)
    loss_of = NTXentLoss(temperature=options["loss.temperature"])
    parameters = [*encoder.parameters(), *head.parameters()]
    steps = round(options["train.epochs"] * len(pictures) / batch)
    rate = options["lightly.learning_rate"]
    optimizer = t.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=5e-4)
    schedule = t.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loader = t.utils.data.DataLoader(
        Views(), batch, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
    )
    began, step, right = time.monotonic(), 0, []
    while step < steps:
        for first, second in loader:
            z0, z1 = (head(encoder(x)) for x in (first, second))
            loss = loss_of(z0, z1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            right.append(contrastive_accuracy(t, z0.detach(), z1.detach()))
            if step == steps:
                break
    seconds = time.monotonic() - began
    encoder.eval()
    found = {}
    mean, std = (np.float32(x) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for name, part in data.items():
        x = (resized(part.images, size) / np.float32(255) - mean) / std
        blocks = t.from_numpy(x.transpose(0, 3, 1, 2).copy()).split(256)
        with t.no_grad():
            found[name] = t.cat([encoder(block) for block in blocks]).numpy()
    return found | {"seconds": seconds, "contrastive": statistics.mean(right[-20:])}


def contrastive_accuracy(t, z0, z1) -> float:
    """Share of the views whose nearest of all 2B - 1 others is their partner."""
    z = t.nn.functional.normalize(t.cat([z0, z1]))
    similar = (z @ z.T).fill_diagonal_(-2)
    partner = t.arange(len(z)).roll(len(z0))
    return (similar.argmax(1) == partner).float().mean().item()


def torch_resnet(t, factor: float):
    """ResNet-10 of torchvision's blocks and initialisation, with the "strided" stem of ours."""
    from torchvision.models.resnet import BasicBlock, conv1x1

    channels = round(64 * factor)
    layers = [
        t.nn.Conv2d(3, channels, 3, 2, 1, bias=False),
        t.nn.BatchNorm2d(channels),
        t.nn.ReLU(),
    ]
    for stage in range(4):
        out, stride = channels * 2**stage, 1 if stage == 0 else 2
        source = channels if stage == 0 else out // 2
        shortcut = None
        if stage:
            shortcut = t.nn.Sequential(conv1x1(source, out, stride), t.nn.BatchNorm2d(out))
        layers.append(BasicBlock(source, out, stride, shortcut))
    for module in t.nn.Sequential(*layers).modules():
        if isinstance(module, t.nn.Conv2d):
            t.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    class Mean(t.nn.Module):
        width = channels * 8

        def forward(self, x):
            return x.mean((2, 3))

    return t.nn.Sequential(*layers, Mean())


def judge(features: dict[str, np.ndarray], data: dict[str, Part]) -> dict:
    """Returns accuracies: on the test images with 10 labels per class, all labels and by 20 nearest neighbours, and
    with all labels on the validation part.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import StandardScaler, normalize

    train, test = features["train"], features["test"]
    y, wanted = data["train"].labels, data["test"].labels
    neighbours = KNeighborsClassifier(NEIGHBOURS, metric="euclidean")
    knn = neighbours.fit(normalize(train), y).score(normalize(test), wanted)
    scaler = StandardScaler().fit(train)
    train, test = scaler.transform(train), scaler.transform(test)

    def fitted(rows, strength):
        return LogisticRegression(C=strength, max_iter=300).fit(train[rows], y[rows])

    def probe(rows, held):
        chosen = max(
            (fitted(rows, strength) for strength in STRENGTHS),
            key=lambda model: model.score(train[held], y[held]),
        )
        return chosen.score(test, wanted), chosen.score(train[held], y[held])

    order = np.random.default_rng(0).permutation(len(y))[:MOST_TRAINING]
    held, rest = order[: len(order) // 10], order[len(order) // 10 :]
    few = []
    for draw in range(DRAWS):
        rng = np.random.default_rng(draw)
        rows = [rng.permutation(rest[y[rest] == c])[:LABELS] for c in np.unique(y)]
        few.append(probe(np.concatenate(rows), held)[0])
    on_test, on_held = probe(rest, held)
    return {"ten": statistics.mean(few), "all": on_test, "knn": knn, "held": on_held}


def rank(h: np.ndarray) -> float:
    """RankMe: exp of the entropy of the singular values' shares (Garrido et al. 2023)."""
    s = np.linalg.svd(h[:4096] - h[:4096].mean(0), compute_uv=False)
    p = s / s.sum() + 1e-7
    return float(np.exp(-np.sum(p * np.log(p))))


def one(run: Run, data: dict[str, Part]) -> dict:
    """Makes one run on the images of its path, and judges it."""
    if run.kind.startswith("ours"):
        from simclr_jax.shell import keep_freed_memory

        keep_freed_memory(os.environ)  # as the command does
    options = run.options
    if run.kind == "raw pixels":
        size = options["data.image_size"]
        flat = {
            k: resized(x.images, size).reshape(len(x.labels), -1) / 255 for k, x in data.items()
        }
        return run.named() | judge(flat, data)
    found = (lightly if run.kind == "lightly" else ours)(data, options, run)
    about = {"seconds": found["seconds"], "contrastive": found["contrastive"]}
    about |= {"epochs": options["train.epochs"], "rank": rank(found["train"])}
    return run.named() | judge(found, data) | about


def main() -> None:
    """Runs what is not in --runs yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data")
    parser.add_argument("--runs", help="a file of one JSON line a run; default: DATA.runs.jsonl")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, help="default: what the automatic settings choose")
    parser.add_argument("--no_flip", action="store_true", help="digits and letters have a left")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="in place of the automatic one, such as loss.temperature=0.2; lightly's parts take what they have",
    )
    parser.add_argument("--only_ours", action="store_true", help="at equal epochs, without peer")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name in {option.partition("=")[0] for option in arguments.set} & NOT_SET:
        parser.error(f"--set={name}: expected --seeds, --epochs or --no_flip, or nothing")
    data = load(pathlib.Path(arguments.data))
    automatic = settings(data["train"].images)
    if arguments.one:
        kind, seed = arguments.one
        asked = run_of(arguments, automatic, kind, int(seed), arguments.epochs, arguments.set)
        print("RESULT " + json.dumps(one(asked, data)))
        return
    runs = pathlib.Path(arguments.runs or f"{arguments.data}.runs.jsonl")
    done = [json.loads(line) for line in runs.read_text().splitlines()] if runs.exists() else []

    def run(kind, seed, epochs, rate=None):
        changes = [*arguments.set, *([f"lightly.learning_rate={rate}"] if rate else [])]
        named = run_of(arguments, automatic, kind, seed, epochs, changes).named()
        # Lines without "held" are of an earlier version of this file.
        found = [r for r in done if r | named == r and "held" in r]
        if found:
            return found[0]
        command = [sys.executable, __file__, arguments.data, "--one", kind, str(seed)]
        command += [f"--epochs={epochs}"] if epochs else []
        command += ["--no_flip"] if arguments.no_flip else []
        command += [f"--set={option}" for option in changes]
        print(f"{kind}, seed {seed} ...", flush=True)
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        line = process.stdout.rpartition("RESULT ")[2]
        with runs.open("a") as file:
            file.write(line)
        return json.loads(line)

    shown = {"raw pixels": [run("raw pixels", 0, None)]}
    seeds, rates = range(arguments.seeds), () if arguments.only_ours else LIGHTLY_RATES
    theirs: dict[float, list[dict]] = {rate: [] for rate in rates}
    shown["ours"] = []
    for seed in seeds:
        shown["ours"].append(run("ours", seed, arguments.epochs))
        for rate in rates:
            theirs[rate].append(run("lightly", seed, arguments.epochs, rate))
    if rates:
        chosen = max(rates, key=lambda rate: statistics.mean(r["held"] for r in theirs[rate]))
        shown |= {f"lightly, {rate}": theirs[rate] for rate in rates}
        shown["ours, time"] = [
            run("ours, time", seed, ours["epochs"] * lightly["seconds"] / ours["seconds"])
            for seed, ours, lightly in zip(seeds, shown["ours"], theirs[chosen], strict=True)
        ]
    show(shown)
    if rates:
        print(f"The validation part chooses lightly's learning rate {chosen}.")


def run_of(
    arguments: argparse.Namespace,
    automatic: dict,
    kind: str,
    seed: int,
    epochs: float | None,
    changes: list[str],
) -> Run:
    """Makes a run of the command's arguments, the automatic settings and changes to them, ["OPTION=VALUE"]."""
    given = {name: read_value(text) for name, text in (x.split("=", 1) for x in changes)}
    options = automatic | given | ({"train.epochs": epochs} if epochs else {})
    options = {k: v for k, v in options.items() if k in READ.get(kind, options)}
    return Run(pathlib.Path(arguments.data), kind, seed, options, not arguments.no_flip)


def read_value(text: str) -> Any:
    """Reads a Python number, tuple or the like; anything else is itself, such as adamw."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def show(done: dict[str, list[dict]]) -> None:
    """Prints mean and spread over seeds of each kind of run, {name: runs}."""
    columns = {"ten": 100, "all": 100, "knn": 100, "held": 100, "contrastive": 100}
    columns |= {"rank": 1, "seconds": 1}
    names = ["10 labels", "all", "20-NN", "validation", "contrastive", "rank of h", "seconds"]
    print(f"{'':16}" + "".join(f"{name:>16}" for name in names))
    for kind, rows in done.items():
        cells = []
        for column, factor in columns.items():
            values = [factor * row[column] for row in rows if column in row]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.1f} +- {spread:.1f}" if values else "")
        print(f"{kind:16}" + "".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    main()
