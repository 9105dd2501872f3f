"""Which program a run has: the versions of the packages, and the commit and content of this one."""

import hashlib
import importlib.metadata
import pathlib
import re
import subprocess

_PACKAGES = ("simclr_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

# `git archive` puts the commit in place of the words between the dollar signs (.gitattributes).
_ARCHIVED = "$Format:%H$"


def versions() -> dict[str, str]:
    """Returns {package: version} of what a result may depend on."""
    return {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str:
    """Returns the version of a package; one that is imported from a clone, as ours may be, need not have any."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str | None:
    """Returns the commit of the checkout that this package runs from, or of the archive that `git archive` made of it;
    None: it is neither. A package that lies somewhere below another project's checkout, such as in its .venv, is none of
    that project.
    """
    here = pathlib.Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return _ARCHIVED if re.fullmatch(r"[0-9a-f]{40,}", _ARCHIVED) else None
    try:
        found = subprocess.run(
            [
                "git",
                "-C",
                str(here),
                "describe",
                "--always",
                "--exclude=*",
                "--dirty",
                "--abbrev=40",
            ],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def program_in_words() -> dict[str, str]:
    """Returns {what it is: text} of what must be alike on all processes of a run."""
    package = pathlib.Path(__file__).resolve().parents[1]
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(package.rglob("[!.]*.py")):
        content = file.read_bytes()
        if file.samefile(__file__):  # which `git archive` changes
            content = re.sub(rb"(?m)^_ARCHIVED = .*", b"", content)
        digest.update(f"{file.relative_to(package)}\n".encode() + content)
    found = versions()
    found.pop("simclr_jax")  # an installed one may be of the same content
    return {"code": digest.hexdigest(), "versions of packages": str(sorted(found.items()))}


def what_changed(then: dict) -> list[str]:
    """Lists how the program differs from the one that wrote a record of a run, in words."""
    before = then.get("versions", {})
    found = [
        f"{name} {before[name]} then, {version} now"
        for name, version in versions().items()
        if before.get(name, version) != version
    ]
    now = commit() or "unknown"
    if then.get("commit") and then["commit"] != now:
        found.append(f"commit {_short(then['commit'])} then, {_short(now)} now")
    return found


def _short(commit: str) -> str:
    name, dash, state = commit.partition("-")
    return name[:12] + dash + state
