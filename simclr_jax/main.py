"""The command line: flags to a mode. `python -m simclr_jax.main --help`."""

import argparse
import importlib
import os
import textwrap

import jax
from ml_collections import ConfigDict

from simclr_jax import processes, shell
from simclr_jax.config import flatten, is_path
from simclr_jax.config.overrides import load
from simclr_jax.config.python_files import own_files, split_argument
from simclr_jax.console import say
from simclr_jax.errors import Unavailable, UserError, near_names
from simclr_jax.files import check_bucket
from simclr_jax.modes import FLAGS, MODES, Mode, owners
from simclr_jax.training.program import program_in_words
from simclr_jax.training.record import run_record, saved_config

_COLUMNS = 79


def main(argv: list[str]) -> None:
    """Runs one mode. Raises UserError for what the user can mend, and Stopped if a signal has stopped a training."""
    parser = _parser()
    args, overrides = parser.parse_with_options(argv)
    mode = MODES[args.mode]
    flags = _flags_of(args)
    if not (args.workdir or (args.mode == "compile" and args.config)):
        raise UserError("no --workdir: expected the folder where everything is written")
    if args.workdir:
        check_bucket(args.workdir)
    if "topology" not in flags:  # compiling for a slice sets up JAX itself
        shell.keep_compiled_programs()
        # Before the configuration is loaded: its file may ask JAX for the devices.
        processes.start(args.coordinator, args.processes, args.process)
    config = None
    if "runs" in flags:  # each of the compared runs has its own configuration
        if args.config or overrides:
            given = " ".join(overrides) or f"--config={args.config}"
            raise UserError(f"--runs compares runs as they are: expected no {given}")
    else:
        if "extend" in flags and _is_automatic(args.config, overrides):
            raise UserError(
                "--extend without a length would train as long as the automatic settings say: give "
                "--config.train.epochs=N as well"
            )
        # Compiling for a slice, which no device here takes part in: JAX is not set up yet.
        alone = "topology" in flags
        if not alone:  # else some would wait here for others
            processes.check_alike({"--mode": args.mode, "--config given": str(bool(args.config))})
        below = _options_below(args, mode, alone)
        config = load(args.config, overrides, below)
        if not alone:
            _check_processes(args, flags, config)
        if below is not None and mode.of_a_run:
            _say_which_files_have_changed(args.workdir)
    run_mode = getattr(importlib.import_module(f"simclr_jax.{mode.module}"), mode.function)
    run_mode(*mode.leading, config, args.workdir, **flags)


def _check_processes(args: argparse.Namespace, flags: dict, config: ConfigDict) -> None:
    """Raises a UserError if the processes of a run have other options or another program. Paths of options and of --input
    and --output may differ: each host may have its own copy of the images, which are compared later.
    """
    if jax.process_count() == 1:
        return
    options = {name: repr(x) for name, x in flatten(config).items() if not is_path(name)}
    alike = {f"--{name}": str(x) for name, x in flags.items() if name not in ("input", "output")}
    code = {"code of --config": str(sorted(own_files().values()))}
    processes.check_alike(options | alike | {"--mode": args.mode} | code | program_in_words())


def _options_below(args: argparse.Namespace, mode: Mode, alone: bool) -> dict | None:
    """Returns the options that the flags --config.NAME=VALUE then change; None: start from the --config file. `alone`: see
    `saved_config`.
    """
    if mode.begins:
        return {"data": {"name": "imagenet2012"}} if not args.config else None
    if not args.config:
        return saved_config(args.workdir, alone)
    try:
        return saved_config(args.workdir, alone) if mode.of_a_run else None
    except Unavailable:
        raise
    except UserError:  # no run is there, or its config.json is damaged
        return None


def _is_automatic(spec: str | None, overrides: list[str]) -> bool:
    """Returns whether the length of a training is chosen from its images, by configs/folder.py."""
    lengths = ("--config.train.epochs", "--config.train.steps")
    name = os.path.basename(split_argument(spec or "")[0]).removesuffix(".py")
    return name == "folder" and not any(flag.startswith(lengths) for flag in overrides)


def _say_which_files_have_changed(workdir: str) -> None:
    """Says so if the configuration file that was read now is not what it was when the run began, wherever it lies."""
    if not own_files():
        return
    then = {os.path.basename(x): n for x, n in (run_record(workdir) or {}).get("files", {}).items()}
    for path, digest in own_files().items():
        if then.get(os.path.basename(path), digest) != digest:
            say(
                f"config      {path} has changed since the run: its code may differ from what the run"
            )
            say("            was trained with")


def _flags_of(args: argparse.Namespace) -> dict:
    """Returns the flags of the mode, {name: value}. Raises a UserError if one is missing or another mode's."""
    mode = MODES[args.mode]
    given = {flag: getattr(args, flag) for flag in FLAGS if getattr(args, flag)}
    for flag in mode.needs:
        if flag not in given:
            choices = FLAGS[flag].choices
            expected = f", one of {', '.join(choices)}" if choices else ""
            raise UserError(f"--mode={args.mode} needs --{flag}{expected}")
    for flag in given:
        if flag not in mode.flags:
            raise UserError(f"--{flag} belongs to --mode={owners(flag)}, not to --mode={args.mode}")
    return given


def _mode(text: str) -> str:
    """Reads the name of a mode, for argparse."""
    if text not in MODES:
        hint = near_names(text, MODES, 0.5) or f": expected one of {', '.join(MODES)}"
        raise argparse.ArgumentTypeError(f"there is no mode {text!r}{hint}")
    return text


def _parser() -> shell.Parser:
    parser = shell.Parser(
        prog="python -m simclr_jax.main",
        usage="%(prog)s --workdir=DIR [--config=FILE.py[:ARG]] [--mode=MODE]\n"
        "       [--config.GROUP.OPTION=VALUE ...] [flags of the mode]",
        description="SimCLR pretraining and evaluation. Modes:\n\n" + _modes_in_words(),
        epilog=textwrap.fill(
            "Any option of docs/options.md can be set: --config.data.batch_size=512. Where the host cannot make views "
            "as fast as the device takes them (`python -m simclr_jax.bench e2e` says so): "
            "--config.data.color_on=device, with which a host makes 1.4 to 1.9 times as many, or "
            "--config.data.placement=device for images that fit into the device's memory.",
            _COLUMNS,
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE.py[:ARG]", help="configuration; default: that of the workdir"
    )
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        type=os.path.expanduser,
        help="where everything is written; needed by all modes but compile",
    )
    parser.add_argument(
        "--mode", type=_mode, default="pretrain", metavar="MODE", help="default: pretrain"
    )
    of_modes = parser.add_argument_group("flags of the modes")
    for name in FLAGS:
        _add_flag(of_modes, name)
    several = parser.add_argument_group(
        "several processes",
        "found automatically on Cloud TPU VMs and under SLURM; elsewhere give all three",
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    several.add_argument("--processes", type=int, metavar="N", help="how many there are")
    several.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")
    return parser


def _modes_in_words() -> str:
    """Returns a line or two for each mode."""
    indent = max(map(len, MODES)) + 4
    return "\n".join(
        textwrap.fill(
            mode.text,
            _COLUMNS,
            initial_indent=f"  {name}".ljust(indent),
            subsequent_indent=" " * indent,
        )
        for name, mode in MODES.items()
    )


def _add_flag(parser: argparse._ArgumentGroup, name: str) -> None:
    flag = FLAGS[name]
    help = f"for --mode={owners(name)}: {flag.meaning}"
    if flag.metavar or flag.choices:
        read, values = flag.read, flag.choices
        parser.add_argument(f"--{name}", metavar=flag.metavar, choices=values, type=read, help=help)
    else:
        parser.add_argument(f"--{name}", action="store_true", help=help)


def run() -> None:
    """Runs `main` for the shell; the console script simclr_jax."""
    shell.run(main)


if __name__ == "__main__":
    run()
