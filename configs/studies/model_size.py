"""Figure 7: deeper and wider encoders, pretrained without labels and trained with them.

--study=model_size          ResNet-10 and 18 at an eighth to a half of their width, for CPUs
--study=model_size:paper    ResNet-18, 34 and 50 at 1, 2 and 4 times their width, for `configs/imagenet.py` on
                            a pod: 18 runs. The paper also has ResNet-101 and 152 at 1 and 2 times

Supervised training sees the same views as SimCLR, with colour distortion and blur, and is judged by a probe of h. The
paper's supervised networks see crops and flips alone, and their own classifier is judged.
"""

from simclr_jax.studies import Factor, Level, Published, Study, of_scale, rises
from simclr_jax.studies.claims import Claim, compared
from simclr_jax.studies.contract import Scores, Verdict

_SMALL = ("0.125", "0.25", "0.5"), ("10", "18")
_PAPER = ("1", "2", "4"), ("18", "34", "50")
# 100 epochs without labels; with labels 90 epochs, ResNet-50 alone.
_FIGURE_7 = {
    "ResNet-18": (50.4, 59.5, 65.7),
    "ResNet-34": (54.5, 62.7, 68.3),
    "ResNet-50": (64.5, 69.7, 72.8),
    "ResNet-50, supervised": (76.5, 77.8, 78.4),
}


def get_study(argument: str = "") -> Study:
    """`argument`: "" or "paper". 12 runs per seed, or 18 and one seed."""
    widths, depths = of_scale(argument, small=_SMALL, paper=_PAPER)
    encoders = {
        f"ResNet-{d}{suffix}": Level({"model.depth": int(d)} | options)
        for suffix, options in (("", {}), (", supervised", {"train.objective": "supervised"}))
        for d in depths
    }
    published: dict[tuple[str, ...], float] = {
        (width, name): value
        for name, values in _FIGURE_7.items()
        for width, value in zip(_PAPER[0], values, strict=True)
    }
    return Study(
        title="Depth and width of the encoder (figure 7)",
        factors=(
            Factor("width", {w: Level({"model.width": float(w)}) for w in widths}, numbers=True),
            Factor("encoder", encoders),
        ),
        claims=(
            *(
                rises(f"a wider {name} learns more", [(w, name) for w in widths])
                for name in encoders
            ),
            *(gains_more(f"ResNet-{depth}", widths[0], widths[-1]) for depth in depths),
        ),
        published=Published("paper, figure 7: ImageNet, top-1, linear or supervised", published)
        if argument
        else None,
        seeds=1 if argument else 3,
    )


def gains_more(encoder: str, narrow: str, wide: str) -> Claim:
    """Claims that SimCLR gains more from width than supervised training does."""
    text = f"{encoder} gains more from width without labels than with them"

    def verdict(scores: Scores) -> Verdict:
        keys = [(w, name) for name in (encoder, f"{encoder}, supervised") for w in (wide, narrow)]
        runs = [scores.get(key, {}) for key in keys]
        differences = [
            runs[0][seed] - runs[1][seed] - (runs[2][seed] - runs[3][seed])
            for seed in sorted(set.intersection(*map(set, runs)))
        ]
        if not differences:
            return Verdict(text, None, "the ends of both are needed")
        return Verdict(text, sum(differences) > 0, compared(differences))

    return verdict
