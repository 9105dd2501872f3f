"""From the command line to a configuration: --config=FILE and --config.NAME=VALUE flags."""

from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from simclr_jax.config import allowed_values, default, flatten, from_dict, is_path, validate
from simclr_jax.config.python_files import read_file
from simclr_jax.console import say
from simclr_jax.data import check_given
from simclr_jax.errors import UserError, near_names, one_line
from simclr_jax.files import absolute


def load(spec: str | None, overrides: Sequence[str], saved: dict | None = None) -> ConfigDict:
    """Loads the configuration of a run, validated and locked.

    Args:
      spec: "FILE.py" or "FILE.py:ARGUMENT", or the name of a configuration that comes with the package
        in place of the file; None: there is none.
      overrides: flags of the form "--config.a.b=value".
      saved: the configuration that a workdir was made with. If given, it is used and the options of `spec` are not: the
        file is run only for the encoders, losses and sources that it adds. None: there is none; without both the
        defaults apply.

    Raises:
      UserError: a file or option is not there, or a value is not allowed.
    """
    given = [flag.partition("=")[0].removeprefix("--config.") for flag in _join_values(overrides)]
    config = from_dict(saved or {})
    if spec:
        of_file = read_file(spec)
        _check_is_whole(of_file, spec)
        if saved is None:
            config = of_file
        else:
            _say_what_differs(config, of_file, spec, given)
    source = config.data.source
    config = override(config, overrides)
    # A run may have a loss that its own configuration file adds, and commands that do not train need no loss.
    is_of_a_run = spec is None or saved is not None
    unknown = ("loss.name",) if is_of_a_run and "loss.name" not in given else ()
    validate(config, unknown)
    check_is_read(config, given, source)
    return config


def _check_is_whole(config: ConfigDict, spec: str) -> None:
    """Raises a UserError if a file's configuration lacks an option."""
    if lacking := sorted(flatten(default()).keys() - flatten(config).keys()):
        raise UserError(
            f"{spec} has no option {lacking[0]}: expected config.default(), with changes"
        )


_SHOWN = 4  # options of a file that are not used


def _say_what_differs(
    of_run: ConfigDict, of_file: ConfigDict, spec: str, given: Sequence[str]
) -> None:
    """Says which options of a file are not used, as a command on a run uses those of the run; not of those that are
    `given` as flags.
    """

    def comparable(name: str, value: Any) -> Any:
        return absolute(value) if value and is_path(name) else value

    run, file = flatten(of_run), flatten(of_file)
    differ = [
        f"{name} is {run[name]!r} in the run, {file[name]!r} in the file"
        for name in run
        if name not in given and comparable(name, run[name]) != comparable(name, file[name])
    ]
    if differ:
        say(
            f"config      the run's own options are used. {spec} has other values, which are ignored:"
        )
        for line in differ[:_SHOWN]:
            say(f"            {line}")
        more = f"and {len(differ) - _SHOWN} more. " if len(differ) > _SHOWN else ""
        say(f"            {more}To change one, give --config.NAME=VALUE")


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Sets the options of "--config.a.b=value" flags in `config` itself, and returns it; each value is read as the type
    of the option's default.

    Raises:
      UserError: an option is not known (names the nearest), or a value cannot be read.
    """
    known = flatten(config)
    overrides = _join_values(overrides)
    for flag in overrides:
        name, equals, _ = flag.removeprefix("--config.").partition("=")
        if not flag.startswith("--config."):
            raise UserError(
                f"unknown argument {flag!r}: options are given as --config.NAME=VALUE, a mode as --mode=NAME, and a value with "
                "spaces in quotes"
            )
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
        is_value = joined and joined[-1].startswith("--config.") and not argument.startswith("--")
        if is_value and joined[-1].endswith("=") and argument:
            joined[-1] += argument
        elif is_value and "=" not in joined[-1]:
            joined[-1] += argument if argument.startswith("=") else f"={argument}"
        else:
            joined.append(argument)
    return joined
