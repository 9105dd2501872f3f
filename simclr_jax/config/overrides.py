"""From the command line to a configuration: files in configs/, and --config.NAME=VALUE flags."""

import hashlib
import importlib.util
import inspect
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from simclr_jax.config import allowed_values, flatten, from_dict, validate
from simclr_jax.data import check_given
from simclr_jax.errors import UserError, near_names, one_line


def load(spec: str | None, overrides: Sequence[str], saved: dict | None = None) -> ConfigDict:
    """Loads the configuration of a run, validated and locked.

    Args:
      spec: "FILE.py" or "FILE.py:ARGUMENT", or the name of a configuration that comes with the package
        in place of the file; None: use `saved`.
      overrides: flags of the form "--config.a.b=value".
      saved: the configuration that a workdir was made with; None: the defaults.

    Raises:
      UserError: a file or option is not there, or a value is not allowed.
    """
    config = read_file(spec) if spec else from_dict(saved or {})
    source = config.data.source
    config = override(config, overrides)
    given = [flag.partition("=")[0].removeprefix("--config.") for flag in _join_values(overrides)]
    # A run may have a loss that its own configuration file adds, and commands that do not train need no loss.
    unknown = ("loss.name",) if spec is None and "loss.name" not in given else ()
    validate(config, unknown)
    check_is_read(config, given, source)
    return config


def read_file(spec: str) -> ConfigDict:
    """Runs `get_config(ARGUMENT)` of a configuration "FILE.py[:ARGUMENT]" or "NAME[:ARGUMENT]".

    Raises:
      UserError: there is no such file, or it fails; with the file and line of the failure.
    """
    name, argument = split_argument(spec)
    path = packaged().get(name, name)
    if not pathlib.Path(path).is_file() or not path.endswith(".py"):
        raise UserError(
            f"no configuration file {path!r}: expected FILE.py[:ARGUMENT], or one of "
            f"{', '.join(sorted(packaged()))}"
        )
    config = run_file(path, "get_config", argument)
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config returned {config!r}: expected a ConfigDict")
    return config


def split_argument(spec: str) -> tuple[str, str]:
    """Splits "FILE.py[:ARGUMENT]" or "NAME[:ARGUMENT]" into the file or name, and the argument or ""."""
    name, _, argument = spec.partition(":")
    file = re.match(r"(.+?\.py)(?::|$)", spec, re.DOTALL)
    if file and not name.isidentifier():  # the folder may have a colon
        name, argument = file[1], spec[len(file[1]) + 1 :]
    return name, argument


def run_file(path: str, function: str, argument: str = "") -> Any:
    """Returns what a function of a Python file returns.

    Args:
      path: the file.
      function: its name.
      argument: for the function, if it takes one.

    Raises:
      UserError: the file or the function fails; the message names the line. For a ValueError, by which a function
        refuses its argument, it is the error's own message.
    """
    # A name of its own in sys.modules, where dataclasses and pickle look up the module of a class.
    digest = hashlib.blake2b(os.path.abspath(path).encode(), digest_size=8).hexdigest()
    spec = importlib.util.spec_from_file_location(f"simclr_jax_file_{digest}", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        found = getattr(module, function, None)
        if found is None:
            raise UserError(f"{path} defines no {function}: expected a file that does")
        parameters = inspect.signature(found).parameters.values()
        if argument and not parameters:
            raise ValueError(f"{function} takes no argument")
        needed = any(p.default is p.empty for p in parameters)
        return found(argument) if argument or needed else found()
    except UserError:
        raise
    except Exception as error:  # whatever a file may do wrong
        message = " ".join(str(error.args[0] if error.args else error).split())
        if isinstance(error, ValueError):
            raise UserError(f"{path}{argument and ':'}{argument}: {message}") from error
        where = _line_of(error, path)
        raise UserError(f"{path}{where}: {type(error).__name__}: {message}") from error


def packaged(folder: str = ".") -> dict[str, str]:
    """Returns {name: file} of the configurations that come with the package or lie in its checkout, or of the
    files in a folder below them.
    """
    package = pathlib.Path(__file__).parent.parent
    roots = (package.parent / "configs", package / "configs")
    return {file.stem: str(file) for root in roots for file in (root / folder).glob("[!_]*.py")}


def _line_of(error: Exception, path: str) -> str:
    """Returns ", line N" of the last line of the file that the error went through, or ""."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        return f", line {error.lineno}"
    return f", line {frames[-1].lineno}" if frames else ""


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Applies "--config.a.b=value" flags; each value is read as the type of the option's default.

    Raises:
      UserError: an option is not known (names the nearest), or a value cannot be read.
    """
    known = flatten(config)
    overrides = _join_values(overrides)
    for flag in overrides:
        name, equals, _ = flag.removeprefix("--config.").partition("=")
        if not flag.startswith("--config."):
            raise UserError(f"unknown argument {flag!r}: options are given as --config.NAME=VALUE")
        check_is_known(name, known)
        if not equals:
            raise UserError(f"{flag} has no value: expected {flag}=VALUE")
    try:
        return _parsed(config, overrides)
    except _UNREADABLE as error:
        for flag in overrides:
            _check_can_be_read(config, flag)
        raise UserError(f"{' '.join(overrides)}: {one_line(error)}") from error


# Exceptions of absl and ml_collections for a value of another type than the option's.
_UNREADABLE = (flags.Error, TypeError, ValueError, SyntaxError)


def _parsed(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    values, argv = flags.FlagValues(), ["simclr_jax", *overrides]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    values(argv)
    return values["config"].value


def _check_can_be_read(config: ConfigDict, flag: str) -> None:
    """Raises a UserError if the value of one flag is of another type than its option's."""
    name, _, value = flag.removeprefix("--config.").partition("=")
    try:
        _parsed(config.copy_and_resolve_references(), [flag])
    except _UNREADABLE as error:
        raise UserError(f"{name}={value}: expected {allowed_values(name)}") from error


def check_is_known(name: str, known: Iterable[str]) -> None:
    """Raises a UserError, with names that are near, unless there is an option of this name."""
    known = list(known)
    if name in known:
        return
    last = name.rpartition(".")[2]
    same = [k for k in known if k.rpartition(".")[2] == last]
    raise UserError(
        f"unknown option {name!r}{near_names(name, known, 0.5, same)}; docs/options.md has all"
    )


def check_is_read(config: ConfigDict, given: Sequence[str], source: str) -> None:
    """Raises a UserError if an option was set that data.source does not read, such as data.name: a run on a folder
    that is to be evaluated on CIFAR-10 would be evaluated on the folder. Also if TFDS would write into the folder of
    a run's images.

    Args:
      config: the configuration.
      given: names of the options that were set beside it.
      source: data.source before they were set.
    """
    data = config.data
    if data.source == "tfds" != source and data.path and "data.path" not in given:
        raise UserError(
            f"data.source=tfds with data.path={data.path}, where the run's own images are and TFDS would write its data: "
            "add --config.data.path=, for the folder where TFDS keeps data, or another path"
        )
    if "data.name" in given and data.name and data.source != "tfds":
        needed = {"source": "tfds"}
        # Set for a run on files.
        needed |= {name: "" for name in ("path", "test_path") if data[name]}
        needed |= {"test_fraction": "0"} if data.test_fraction else {}
        more = " ".join(f"--config.data.{name}={value}" for name, value in needed.items())
        raise UserError(
            f"data.name={data.name} names a data set of TFDS, and data.source={data.source} does not read it: add {more}"
        )
    check_given(data, given)


def _join_values(arguments: Sequence[str]) -> list[str]:
    """Turns ["--config.a", "1"] and ["--config.a", "=", "1"] into ["--config.a=1"]; what is joined already passes."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1].endswith("=") and argument and not argument.startswith("--"):
            joined[-1] += argument
        elif joined and "=" not in joined[-1] and not argument.startswith("--"):
            joined[-1] += argument if argument.startswith("=") else f"={argument}"
        else:
            joined.append(argument)
    return joined
