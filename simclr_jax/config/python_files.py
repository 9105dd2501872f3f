"""Python files that make something: a configuration, in configs/, or a study, in configs/studies/."""

import hashlib
import importlib.util
import inspect
import os
import pathlib
import re
import sys
import traceback
from typing import Any

from ml_collections import ConfigDict

from simclr_jax.errors import UserError, near_names

# {absolute path: digest of the content} of the newest configuration, unless it is the package's.
_own: dict[str, str] = {}


def read_file(spec: str) -> ConfigDict:
    """Runs `get_config(ARGUMENT)` of a configuration, see `made_by`."""
    path, config = made_by(spec, "get_config", ConfigDict, "configuration file")
    _own.clear()
    if not any(os.path.samefile(path, known) for known in packaged().values()):
        content = pathlib.Path(path).read_bytes()
        _own[os.path.abspath(path)] = hashlib.blake2b(content, digest_size=16).hexdigest()
    return config


def own_files() -> dict[str, str]:
    """Returns {absolute path: digest of the content} of the configuration that was read last, {} if it is the package's."""
    return dict(_own)


def made_by(spec: str, function: str, kind: type, what: str, folder: str = ".") -> tuple[str, Any]:
    """Runs a function of a file, with the argument that follows the file's name.

    Args:
      spec: "FILE.py[:ARGUMENT]", or "NAME[:ARGUMENT]" of a file that comes with the package.
      function: its name.
      kind: type of what it returns.
      what: what such a file is, for messages.
      folder: where the package has such files, below configs/.

    Returns:
      (path of the file, what the function returned)

    Raises:
      UserError: there is no such file, it fails, with the file and line of the failure, or it returns something else.
    """
    name, argument = split_argument(spec)
    known = packaged(folder)
    path = known.get(name, name)
    if not pathlib.Path(path).is_file() or not path.endswith(".py"):
        short = pathlib.Path(path).stem
        hint = f"; {short} is one of these" if short in known else near_names(name, known)
        if pathlib.Path(path).is_dir() and "folder" in known:
            hint = f". It is a folder of images? --config=folder:{path}"
        raise UserError(
            f"no {what} {path!r}: expected FILE.py[:ARGUMENT], or one of {', '.join(sorted(known))}{hint}"
        )
    made = run_file(path, function, argument)
    if not isinstance(made, kind):
        raise UserError(f"{path}: {function} returned {made!r}: expected a {kind.__name__}")
    return path, made


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
        message = _message_of(error)
        if isinstance(error, ValueError):
            raise UserError(f"{path}{argument and ':'}{argument}: {message}") from error
        where = _line_of(error, path)
        raise UserError(f"{path}{where}: {type(error).__name__}: {message}") from error


def _message_of(error: Exception) -> str:
    """Returns what an error says, in one line. ml_collections puts one error into another, and lists the whole
    configuration for a name that it does not know.
    """
    said: Any = error
    while isinstance(said, Exception) and said.args:
        said = said.args[0]
    text = " ".join(str(said).split())
    return re.sub(r" Other fields present: .*?(?= Did you mean |$)", "", text)


def packaged(folder: str = ".") -> dict[str, str]:
    """Returns {name: file} of the configurations that come with the package or lie in its checkout, or of the
    files in a folder below them.
    """
    package = pathlib.Path(__file__).parent.parent
    roots = (package.parent / "configs", package / "configs")
    return {file.stem: str(file) for root in roots for file in (root / folder).glob("[!_]*.py")}


def _line_of(error: Exception, path: str) -> str:
    """Returns ", line N" of the last line of the file that the error went through, or ""."""
    file = os.path.abspath(path)  # as Python's import names it
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        return f", line {error.lineno}"
    return f", line {frames[-1].lineno}" if frames else ""
