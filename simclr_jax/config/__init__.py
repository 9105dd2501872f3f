"""The configuration of a run: the options of `rows.py` and `evaluation_rows.py`, with their values.

A file in configs/ states only its differences from the defaults. The command line overrides single
options: `--config.data.batch_size=512`. The set of options is locked, so a misspelt one is an error.
"""

import json
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from simclr_jax import data
from simclr_jax.config import evaluation_rows, rows
from simclr_jax.encoders.heads import depth_of
from simclr_jax.errors import UserError

OPTIONS = (*rows.OPTIONS, *evaluation_rows.OPTIONS)

_BY_NAME = {option.name: option for option in OPTIONS}


def default() -> ConfigDict:
    """Returns all options with their defaults, locked."""
    return ConfigDict(_nested({option.name: option.default for option in OPTIONS})).lock()


def _nested(flat: dict[str, Any]) -> dict:
    """Turns {"a.b": value} into {"a": {"b": value}}."""
    nested: dict = {}
    for name, value in flat.items():
        *groups, last = name.split(".")
        holder = nested
        for group in groups:
            holder = holder.setdefault(group, {})
        holder[last] = value
    return nested


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Turns a nested configuration into {"a.b": value}."""
    flat: dict = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def set_options(config: ConfigDict, flat: dict[str, Any]) -> None:
    """Sets options, {"a.b": value}, of a configuration. A list becomes a tuple: JSON has no tuples.

    Raises:
      UserError: a value is of another type than the option's.
    """
    for name, value in flat.items():
        *groups, last = name.split(".")
        holder = config
        for group in groups:
            holder = holder[group]
        try:
            holder[last] = tuple(value) if isinstance(value, list) else value
        except TypeError as error:
            raise UserError(
                _BY_NAME[name].problem(value) or f"{name}={value!r}: {error}"
            ) from error


def from_dict(values: dict) -> ConfigDict:
    """Makes a locked configuration of nested plain values, as `config.to_dict()` or JSON give them.

    Options that are missing get their defaults.

    Raises:
      UserError: an option is not known.
    """
    flat = flatten(ConfigDict(values))
    for name in flat:
        if name not in _BY_NAME:
            raise UserError(
                f"the saved configuration has the option {name!r}, which this version does not know"
            )
    config = default()
    set_options(config, flat)
    return config


def with_defaults(then: dict, now: dict, group: str = "") -> dict:
    """Adds to options of an earlier version, {"a.b": value}, those of `now` that it lacks, at their defaults. Values
    are as in JSON; `group`, such as "model.", is left out of the names.
    """
    defaults = {name: _BY_NAME[group + name].default for name in now if name not in then}
    return then | json.loads(json.dumps(defaults))


def validate(config: ConfigDict, leaving_out: Sequence[str] = ()) -> None:
    """Raises a UserError for the first value that no run could use.

    `leaving_out`: names of options whose own values are not looked at.
    """
    values = flatten(config)
    for name, value in values.items():
        if name not in leaving_out:
            check_value(name, value)
    if config.train.steps == 0 and config.train.epochs == 0:
        raise UserError("train.epochs=0 and train.steps=0: set one of them")
    fractions, epochs = config.finetune.label_fractions, config.finetune.epochs
    different = len(set(fractions)) == len(fractions) > 0
    if len(fractions) != len(epochs) or not all(fractions) or not different:
        raise UserError(
            f"finetune.label_fractions={fractions} and finetune.epochs={epochs}: expected one or more different "
            "fractions above 0, and one number of epochs for each: give both options, such as "
            f"--config.finetune.epochs={','.join(['30'] * len(fractions)) or '30'}"
        )
    layers = depth_of(config.model.head, config.model.head_layers)
    if config.finetune.from_layer > layers:
        raise UserError(
            f"finetune.from_layer={config.finetune.from_layer}: the projection head has {layers} "
            "layers"
        )
    data.check(config.data.to_dict())


def allowed_values(name: str) -> str:
    """Returns in words what an option may be."""
    return _BY_NAME[name].allowed.text


def is_path(name: str) -> bool:
    """Returns whether an option is the path of a file or folder."""
    return _BY_NAME[name].allowed.are_paths


def check_value(name: str, value: Any) -> None:
    """Raises a UserError if an option may not have a value."""
    if problem := _BY_NAME[name].problem(value):
        raise UserError(problem)


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Lists the options that change what is learned and differ, as "name: old -> new"."""
    before, after = flatten(old), flatten(new)
    return [
        f"{name}: {before[name]} -> {after[name]}"
        for name in after
        if before[name] != after[name] and not _BY_NAME[name].resumable
    ]


def check_argument(argument: str, *allowed: str) -> None:
    """Checks the argument of a configuration file that takes one word, or none.

    Args:
      argument: the text after the colon of --config=FILE.py:ARGUMENT; may be empty.
      allowed: the words.

    Raises:
      ValueError: it is another word; `python_files.read_file` turns it into a UserError.
    """
    if argument not in ("", *allowed):
        raise ValueError(f"unknown argument {argument!r}: expected {', '.join(allowed)} or none")


def parse_argument(argument: str, **allowed: type) -> dict:
    """Reads the argument of a configuration file: "depth=50,width=2" -> {"depth": 50, "width": 2.0}.

    Args:
      argument: the text after the colon of --config=FILE.py:ARGUMENT; may be empty.
      allowed: name -> the type that reads its value.

    Raises:
      ValueError: a name is not allowed, or its value cannot be read; `python_files.read_file` turns it into
        a UserError.
    """
    values = {}
    for item in filter(None, argument.split(",")):
        name, _, value = item.partition("=")
        if name not in allowed:
            expected = f"any of {', '.join(allowed)}, as NAME=VALUE" if allowed else "no argument"
            raise ValueError(f"unknown argument {item!r}: expected {expected}")
        values[name] = allowed[name](value)
    return values
