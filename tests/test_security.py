"""No file that a user is handed can run code or write outside of the workdir."""

import ast
import pathlib

import numpy as np
import pytest

from simclr_jax import config
from simclr_jax.data import open_source
from simclr_jax.errors import UserError
from simclr_jax.pretrained import load_encoder

PACKAGE = pathlib.Path(__file__).parent.parent / "simclr_jax"

# Modules that read objects as code, start programs, or unpack archives into paths of their choice.
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "subprocess"}
MODULES |= {"tarfile", "pty", "ctypes"}
CALLS = {
    "eval",
    "exec",
    "system",
    "popen",
    "spawnv",
    "execv",
    "extractall",
    "extract",
    "unpack_archive",
}


def offences(tree):
    """What a module does of the above, as (line, what)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            owner = getattr(getattr(node.func, "value", None), "id", "")
            if name in CALLS:
                yield node.lineno, name
            if (owner, name) == ("np", "load"):
                allowed = [k.value for k in node.keywords if k.arg == "allow_pickle"]
                if not allowed or getattr(allowed[0], "value", True) is not False:
                    yield node.lineno, "np.load that may unpickle"
            if any(k.arg == "shell" for k in node.keywords):
                yield node.lineno, "shell"
            continue
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.partition(".")[0] in MODULES)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_no_module_unpickles_starts_programs_or_unpacks_archives(path):
    # `extract` is the name of our own function of features.
    tree = ast.parse(path.read_text())
    found = [what for _, what in offences(tree) if what != "extract"]
    allowed = ["ctypes"] if calls_the_c_library_only(tree) else []
    assert found == allowed + (["subprocess"] if starts_git_only(tree) else [])


def calls_the_c_library_only(tree):
    """Whether a module loads libraries, and each is what the process has loaded already: no name of a file."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    loads = [c for c in calls if getattr(getattr(c.func, "value", None), "id", "") == "ctypes"]
    return bool(loads) and all(ast.unparse(c) == "ctypes.CDLL(None)" for c in loads)


def starts_git_only(tree):
    """Whether a module starts programs, and each is git with arguments that no user gives."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    starts = [c for c in calls if getattr(getattr(c.func, "value", None), "id", "") == "subprocess"]
    return bool(starts) and all(
        ast.unparse(c.args[0]).startswith("['git', '-C', str(here), ") for c in starts
    )


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from subprocess import run",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "os.system(config.name)",
        "archive.extractall(where)",
        "run(command, shell=True)",
        "import subprocess; subprocess.run(['git', '-C', config.path])",
        "import subprocess; subprocess.run([config.name])",
    ],
)
def test_the_check_finds_what_it_looks_for(text):
    assert list(offences(ast.parse(text)))
    assert not starts_git_only(ast.parse(text))


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def opened(**options):
    return open_source(config.default().data.to_dict() | {"seed": 0} | options)


def test_arrays_with_objects_are_refused_unopened(tmp_path):
    with (tmp_path / "x.npz").open("wb") as file:
        np.savez(file, train_images=np.array([Bomb(tmp_path / "ran")], dtype=object))
    with pytest.raises(UserError, match=r"cannot be read as an .npz file"):
        opened(source="arrays", path=str(tmp_path / "x.npz"))
    assert not (tmp_path / "ran").exists()


def test_a_data_sets_name_is_no_path(tmp_path):
    with pytest.raises(UserError):
        opened(name="../../x", path=str(tmp_path / "data"))
    assert list(tmp_path.iterdir()) == []


def test_options_of_a_checkpoint_are_data(tmp_path):
    """They are JSON; a checkpoint with anything else there is refused."""
    (tmp_path / "c/encoder").mkdir(parents=True)
    (tmp_path / "c/config").mkdir()
    (tmp_path / "c/config/metadata").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(UserError, match="cannot be read"):
        load_encoder(tmp_path / "c")
