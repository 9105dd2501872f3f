"""Tables 8 and B.5: logistic regression on other data, by the protocol of appendix B.8.

The data sets are those of the paper's twelve that TFDS has, and Fashion-MNIST, if they are prepared on this machine,
in TFDS_DATA_DIR or ~/tensorflow_datasets; none is downloaded. Birdsnap and Aircraft are not in TFDS.
"""

from typing import Any

from simclr_jax.data.tfds import is_prepared
from simclr_jax.errors import UserError
from simclr_jax.studies import Factor, Level, Published, Study, above

# Where TFDS keeps the validation images apart, the paper trains on both (appendix B.8). SUN397 is the first of its
# standard partitions, 19,850 training and as many test images.
_BOTH = "train+validation"
# name: TFDS's name, training and test split, Table B.5 (ResNet-50): linear evaluation of SimCLR.
DATA_SETS = {
    "Food-101": ("food101", "train", "validation", 68.4),
    "CIFAR-10": ("cifar10", "train", "test", 90.6),
    "CIFAR-100": ("cifar100", "train", "test", 71.6),
    "SUN397": ("sun397/standard-part1-120k", "train", "test", 58.8),
    "Cars": ("cars196", "train", "test", 50.3),
    "VOC 2007": ("voc/2007", _BOTH, "test", 80.5),
    "DTD": ("dtd", _BOTH, "test", 74.5),
    "Pets": ("oxford_iiit_pet", "train", "test", 83.6),
    "Caltech-101": ("caltech101", "train", "test", 90.3),
    "Flowers": ("oxford_flowers102", _BOTH, "test", 91.2),
    "Fashion-MNIST": ("fashion_mnist", "train", "test", None),  # not the paper's; small
}


def get_study() -> Study:
    """2 runs per seed: pretrained, and the encoder as it was initialised."""
    there = {name: row for name, row in DATA_SETS.items() if is_prepared(row[0])}
    if not there:
        raise UserError(
            "none of the data sets of the study transfer is prepared: expected one or more of "
            f"{', '.join(row[0] for row in DATA_SETS.values())} in TFDS_DATA_DIR or ~/tensorflow_datasets"
        )
    starts = {
        "SimCLR": Level({}),
        # Steps at rate 0 give BatchNorm its running statistics; with the last scale of a block at zero the network
        # would be its shortcuts alone, and too weak to compare with.
        "untrained": Level(
            {
                "train.steps": 100,
                "optimizer.warmup_epochs": 0.0,
                "optimizer.learning_rate": 0.0,
                "model.zero_init_residual": False,
            }
        ),
    }
    own: dict[str, Any] = {"data.source": "tfds", "data.path": "", "data.test_path": ""}
    own |= {"data.labels_file": "", "data.folder_labels": False, "data.test_fraction": 0.0}
    published: dict[tuple[str, ...], float] = {
        ("SimCLR", name): value for name, (*_, value) in there.items() if value
    }
    # One reading has no name in the keys.
    if len(there) == 1:
        published = {key[:1]: value for key, value in published.items()}
    names = [(name,) if len(there) > 1 else () for name in there]
    return Study(
        title="Transfer by logistic regression (Table B.5)",
        factors=(Factor("encoder", starts),),
        evaluation="transfer",
        readings={
            name: own | {"data.name": tfds_name, "data.train_split": train, "data.test_split": test}
            for name, (tfds_name, train, test, _) in there.items()
        },
        claims=tuple(
            above(f"pretraining helps on {name}", ("SimCLR", *rest), ("untrained", *rest))
            for name, rest in zip(there, names, strict=True)
        ),
        published=Published("paper, Table B.5: ResNet-50, from ImageNet", published)
        if published
        else None,
    )
