"""The command line of the benchmarks: `python -m simclr_jax.bench --help`."""

import datetime
import importlib.metadata
import pathlib
from collections.abc import Callable

import jax

from simclr_jax.bench.e2e import measure_e2e
from simclr_jax.bench.input import measure_input
from simclr_jax.bench.loss import measure_loss
from simclr_jax.bench.step import measure_step
from simclr_jax.config.overrides import load
from simclr_jax.console import duration, say, show_table
from simclr_jax.errors import UserError
from simclr_jax.files import write_json
from simclr_jax.shell import Parser, keep_compiled_programs, run

# column of the table: how its value is written.
_COLUMNS: dict[str, tuple[str, Callable]] = {
    "pairs": ("pairs", "{:,}".format),
    "seconds": ("ms", lambda s: f"{1e3 * s:,.1f}"),
    "temporary_bytes": ("temporary MB", lambda b: f"{b / 1e6:,.1f}"),
    "images_per_second": ("images/s", "{:,.1f}".format),
    "views_per_second": ("views/s", "{:,.1f}".format),
    "views_per_second_per_device": ("views/s a device", "{:,.1f}".format),
    "share_of_supervised": ("of supervised", "{:.0%}".format),
    "share_waiting_for_input": ("waiting for input", "{:.0%}".format),
    "flops_per_second_per_device": ("GFLOP/s a device", lambda f: f"{f / 1e9:,.0f}"),
    "share_of_peak": ("of bfloat16 peak", "{:.0%}".format),
    "peak_memory_bytes": ("GiB a device", lambda b: f"{b / 2**30:.2f}"),
    "seconds_to_first_step": ("to first step", duration),
    "seconds_to_first_batch": ("to first batch", duration),
}


def _show(title: str, rows: list[dict]) -> None:
    """A column for each thing measured; of the loss, which has many, a row for each."""
    names = [n for n in _COLUMNS if any(row.get(n) is not None for row in rows)]

    def cell(row: dict, name: str) -> str:
        return _COLUMNS[name][1](row[name]) if row.get(name) is not None else ""

    if "pairs" in names:
        header = ["", *(_COLUMNS[n][0] for n in names)]
        show_table(title, header, [[row["of"], *(cell(row, n) for n in names)] for row in rows])
        return
    header = ["", *(row["of"] for row in rows)]
    show_table(title, header, [[_COLUMNS[n][0], *(cell(row, n) for row in rows)] for n in names])


def main(argv: list[str]) -> None:
    """Measures, shows a table and writes JSON. Raises UserError for what the user can mend."""
    parser = Parser(
        prog="python -m simclr_jax.bench",
        description="How fast the parts of a run are.",
        epilog="Any option can be set, as in simclr_jax.main: --config.data.batch_size=512",
        allow_abbrev=False,
    )
    parser.add_argument(
        "what",
        choices=("input", "step", "loss", "e2e"),
        help="input: the host's batches; step: the device's steps on random views, beside "
        "supervised ones; loss: NT-Xent by size; e2e: both together, as in a run",
    )
    parser.add_argument("--config", metavar="FILE.py[:ARG]", help="needed by all but loss")
    parser.add_argument("--seconds", type=float, default=20.0, help="to measure for; default 20")
    parser.add_argument("--output", metavar="FILE.json", help="default: bench_WHAT.json")
    args, overrides = parser.parse_with_options(argv)
    if args.seconds <= 0:
        raise UserError(f"--seconds={args.seconds:g}: expected a number above 0")
    keep_compiled_programs()
    if args.what == "loss":
        if args.config or overrides:
            raise UserError("bench loss takes no configuration: it measures sizes of its own")
        config, rows = None, measure_loss(args.seconds)
    else:
        if not args.config:
            raise UserError(f"bench {args.what} needs a --config=configs/NAME.py")
        config = load(args.config, overrides)
        measure = {"input": measure_input, "step": measure_step, "e2e": measure_e2e}[args.what]
        rows = measure(config, args.seconds)
    kinds = sorted({d.device_kind for d in jax.devices()})
    say()
    _show(f"{args.what}, {jax.device_count()} x {', '.join(kinds)}", rows)
    result = {
        "what": args.what,
        "date": datetime.date.today().isoformat(),
        "devices": [str(d.device_kind) for d in jax.devices()],
        "versions": {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "flax", "numpy")},
        "config": config.to_dict() if config else None,
        "rows": rows,
    }
    path = pathlib.Path(args.output or f"bench_{args.what}.json")
    write_json(path, result)
    say(f"written to {path}")


if __name__ == "__main__":
    run(main)
