"""Prints every option as a page of Markdown: `python -m simclr_jax.config > docs/options.md`."""

import itertools

from simclr_jax.config import OPTIONS
from simclr_jax.options import Option

_HEAD = """# Every option
Set any with `--config.NAME=VALUE`, or in a file in `configs/`; several values in brackets and quotes, `--config.views.crop_area='(0.2, 1.0)'`. This page is printed by `python -m simclr_jax.config`. A run may go on, after it was stopped, with other values of the options marked *; `data.path` and `model.init_from` may name another place that holds the same images or weights.
"""


def page() -> str:
    """Returns the page: a table for each group of options."""
    groups = itertools.groupby(
        sorted(OPTIONS, key=lambda option: _group(option)), key=lambda option: _group(option)
    )
    tables = [_table(group, list(options)) for group, options in groups]
    return "\n".join([_HEAD, *tables])


def _group(option: Option) -> str:
    return option.name.rpartition(".")[0]


def _table(group: str, options: list[Option]) -> str:
    title = f"## {group}\n" if group else ""
    lines = [
        f"| `{o.name}`{'*' if o.resumable else ''} | {_shown(o.default)} | {o.allowed.text} | {o.why} |"
        for o in options
    ]
    return "\n".join(
        [
            title + "| option | default | allowed | meaning |",
            "| --- | --- | --- | --- |",
            *lines,
            "",
        ]
    )


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(f'{x:.4g}' for x in value)})"
    return f"{value:g}" if isinstance(value, float) else str(value) if value != "" else '""'


if __name__ == "__main__":
    print(page(), end="")
