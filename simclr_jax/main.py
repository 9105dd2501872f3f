"""The command line: flags to a mode. `python -m simclr_jax.main --help`."""

import argparse
import importlib
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable

import jax

from simclr_jax import processes
from simclr_jax.config.overrides import load
from simclr_jax.errors import LOST, Unavailable, UserError
from simclr_jax.files import cache_folder, check_bucket, storage_error
from simclr_jax.modes import MODES
from simclr_jax.training.workdir import saved_config

# Exit status of a command that a signal has stopped. The same command goes on from there, so a launcher must not
# take it for finished. EX_TEMPFAIL of sysexits.h.
STOPPED = 75


def main(argv: list[str]) -> None:
    """Runs one mode. Raises UserError for what the user can mend, and SystemExit with the status STOPPED if
    a signal has stopped a training.
    """
    args, overrides = _parser().parse_known_args(argv)
    mode = MODES[args.mode]
    flags = _flags_of(args)
    if not (args.workdir or (args.mode == "compile" and args.config)):
        raise UserError("no --workdir: expected the folder where everything is written")
    if args.workdir:
        check_bucket(args.workdir)
    if "topology" not in flags:  # compiling for a slice sets up JAX itself
        keep_compiled_programs()
        # Before the configuration is loaded: its file may ask JAX for the devices.
        processes.start(args.coordinator, args.processes, args.process)
    config = None
    if "runs" in flags:  # each of the compared runs has its own configuration
        if args.config or overrides:
            given = " ".join(overrides) or f"--config={args.config}"
            raise UserError(f"--runs compares runs as they are: expected no {given}")
    else:
        saved = {"data": {"name": "imagenet2012"}} if mode.begins else None
        if not args.config and not mode.begins:
            saved = saved_config(args.workdir)
        config = load(args.config, overrides, saved)
    run_mode = getattr(importlib.import_module(f"simclr_jax.{mode.module}"), mode.function)
    if mode.function == "evaluate_features":
        run_mode(args.mode, config, args.workdir, **flags)
        return
    result = run_mode(config, args.workdir, **flags)
    if mode.trains and (result is None or result is False):
        sys.exit(STOPPED)


def _flags_of(args: argparse.Namespace) -> dict:
    """Returns the flags of the mode, {name: value}. Raises a UserError if one is missing or another mode's."""
    mode = MODES[args.mode]
    known = {flag for other in MODES.values() for flag in (*other.needs, *other.takes)}
    given = {flag: getattr(args, flag) for flag in sorted(known) if getattr(args, flag)}
    for flag in mode.needs:
        if flag not in given:
            raise UserError(f"--mode={args.mode} and --{flag} go together: give both")
    for flag in given:
        if flag not in (*mode.needs, *mode.takes):
            owners = [name for name, other in MODES.items() if flag in (*other.needs, *other.takes)]
            raise UserError(
                f"--{flag} belongs to --mode={' and '.join(owners)}, not to --mode={args.mode}"
            )
    return given


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m simclr_jax.main",
        description="SimCLR pretraining and evaluation.",
        epilog="Any option of docs/options.md can be set: --config.data.batch_size=512. Where "
        "the host cannot make views as fast as the device takes them (`python -m simclr_jax.bench "
        "e2e` says so): --config.data.color_on=device, with which a host makes 1.4 to 1.9 times as many, "
        "or --config.data.placement=device for images that fit into the device's memory.",
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
    modes = "; ".join(f"{name}: {mode.text}" for name, mode in MODES.items())
    parser.add_argument("--mode", choices=MODES, default="pretrain", help=modes)
    parser.add_argument(
        "--topology",
        metavar="[Nx]KIND:SHAPE",
        help="for --mode=compile and explain: the slice, such as v5e:16x16, or several: 2xv5e:16x16",
    )
    parser.add_argument(
        "--format",
        choices=("safetensors", "stablehlo", "savedmodel", "huggingface"),
        help="for --mode=export",
    )
    parser.add_argument(
        "--input",
        metavar="WHAT",
        help="for --mode=embed: a folder, FILE.npz, FILES.parquet, NAME:SPLIT of a TFDS data set, or train or "
        "test for the run's own data (./train is a folder); for neighbours: the file that --mode=embed wrote; for import: a file of weights",
    )
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="for --mode=embed: FILE.parquet or FILE.npz; for export, neighbours, report and views: the "
        "file, by default in the workdir; for neighbours FILE.parquet is a table",
    )
    parser.add_argument(
        "--with_z", action="store_true", help="for --mode=embed: write the projections z too"
    )
    parser.add_argument(
        "--query",
        metavar="A,B,...",
        help="for --mode=neighbours: names of images, one with commas in double quotes; default: eight, evenly spaced, for a picture, all for a table",
    )
    parser.add_argument(
        "--k", type=_count, metavar="N", help="for --mode=neighbours: how many; default: 8"
    )
    parser.add_argument(
        "--follow",
        action="store_true",
        help="for probe, knn and transfer: evaluate each new checkpoint of a run that another process "
        "trains, until its last step",
    )
    parser.add_argument(
        "--runs",
        metavar="'A B RUNS/*'",
        help="for --mode=report: compare these workdirs, in WORKDIR/runs.html",
    )
    parser.add_argument(
        "--extend",
        action="store_true",
        help="for --mode=pretrain: go on, with other train.epochs or train.steps than before",
    )
    _add_flags_of_studies(parser)
    several = parser.add_argument_group(
        "several processes", "found out on Cloud TPU VMs and under SLURM; elsewhere all three"
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    several.add_argument("--processes", type=int, metavar="N", help="how many there are")
    several.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")
    return parser


def _count(text: str) -> int:
    """Reads a whole number of 1 or more, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of 1 or more")
    return int(text)


def _add_flags_of_studies(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--study",
        metavar="FILE.py[:paper]",
        help="for --mode=study: such as configs/studies/loss.py; some have the paper's levels, too",
    )
    parser.add_argument(
        "--part",
        metavar="I/N",
        help="for --mode=study: only every N-th run from the I-th on, so that N programs share a study",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="for --mode=study: list the runs and estimate their time",
    )


def keep_compiled_programs() -> None:
    """Keeps compiled programs across runs: compiled once for each machine and version."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder()))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # By default JAX keeps only programs that took 1 s to compile; a run has some ten of 0.2 to 0.9 s, 2 to 3 s in
        # all.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def shell(command: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Runs a command for the shell: one line and exit status 1 for a user's mistake, 69 (`LOST`) where a storage or
    another process does not answer, 130 (`processes.INTERRUPTED`) for Ctrl-C,
    and 75 (`STOPPED`) for a training that a signal has stopped.
    """
    # Hide TensorFlow's own log below fatal errors: what matters comes as an exception, which is reported once.
    # Importing JAX sets "1".
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    # TensorFlow's plain kernels instead of oneDNN's, for the same numbers on every CPU.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    processes.keep_freed_memory(os.environ)
    try:
        command(arguments)
    except Exception as raised:
        error = raised
        if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
            error = UserError(_out_of_memory(error))
        error = storage_error(error) or error
        if jax.distributed.is_initialized():
            if not isinstance(error, UserError | jax.errors.JaxRuntimeError):
                traceback.print_exc()
            processes.end(error)
        if not isinstance(error, UserError):
            raise
        if isinstance(error, Unavailable):
            print(f"error: {error}", file=sys.stderr)
            sys.exit(LOST)
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        text = "interrupted: training and embedding go on where they were by the same command"
        print(text, file=sys.stderr)
        sys.exit(processes.INTERRUPTED)


def _out_of_memory(error: Exception) -> str:
    wanted = re.search(r"allocat\w* (\d[\w.]*(?: ?[KMG]i?B| bytes)?)", str(error))
    return (
        "out of memory"
        + (f" while allocating {wanted[1]}" if wanted else "")
        + ": train.microbatches=4 needs about a quarter of the activations' memory, model.remat=True "
        "keeps fewer of them for one more forward pass, mesh.fsdp divides the parameters, and a smaller "
        "data.batch_size or eval.batch_size needs less of all; --mode=compile says how much"
    )


def run(command: Callable[[list[str]], None] | None = None) -> None:
    """Runs a command, by default `main`, with the arguments that the shell gave; the console script simclr_jax."""
    mend_unraisable()
    if (
        signal.getsignal(signal.SIGINT) == signal.default_int_handler
    ):  # else ignored, as of a job in the background
        signal.signal(signal.SIGINT, processes.end_interrupted)
    status: object = 1  # if any exception but SystemExit ends the command
    try:
        shell(command or main, sys.argv[1:])
        status = 0
    except SystemExit as ended:
        status = ended.code
        if status == processes.INTERRUPTED:
            processes.exit_now(status)
        raise
    finally:
        processes.exit_within(status)


def mend_unraisable() -> None:
    """Hides the pages that Orbax's threads write when a disk is full, because `shell` reports that in one line.
    Also repeats a Ctrl-C that came where Python ignores exceptions, such as in JAX's garbage-collector callback.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    show = sys.unraisablehook

    def show_others(unraisable) -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            main_thread = threading.main_thread().ident
            # Later, as it would be ignored here.
            again = threading.Timer(0.1, signal.pthread_kill, [main_thread, signal.SIGINT])
            again.daemon = True
            again.start()
        elif str(unraisable.exc_value) != "Event loop is closed":  # raised by an abandoned save
            show(unraisable)

    sys.unraisablehook = show_others


if __name__ == "__main__":
    run()
