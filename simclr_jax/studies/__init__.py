"""Studies: the paper's tables and figures as sets of runs. A study is one file in configs/studies/."""

from simclr_jax.studies.claims import above, among_best, best, rises
from simclr_jax.studies.contract import Factor, Level, Published, Study, of_scale

__all__ = [
    "Factor",
    "Level",
    "Published",
    "Study",
    "above",
    "among_best",
    "best",
    "of_scale",
    "rises",
]
