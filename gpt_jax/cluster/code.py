"""Which code runs here: what every process says at its start, and what a job compares."""

import hashlib
import socket
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]  # gpt_jax/


def code_version() -> str:
    """Package, commit and source digest, as in "0.1.0 3f2a9c1 source 1b9c44e0".

    The commit stands where there is a git checkout, with "+" after it if files have changed since.
    The digest of the package's source tells two machines apart whatever they were installed from.
    """
    words = [package_version(), git_commit(PACKAGE), f"source {source_digest(PACKAGE)}"]
    return " ".join(word for word in words if word)


def code_identity() -> str:
    """What has to be equal on all processes of a job: the source and JAX.

    The commit is no part of it, because a machine without git lacks it.
    """
    return f"source {source_digest(PACKAGE)} jax {metadata.version('jax')}"


def describe_process_code(process: int) -> str:
    """ "process 1 on n2 with code 0.1.0 source 1b9c44e0 jax 0.10.2"."""
    code = f"{code_version()} jax {metadata.version('jax')}"
    return f"process {process} on {socket.gethostname()} with code {code}"


def package_version() -> str:
    try:
        return metadata.version("gpt_jax")
    except metadata.PackageNotFoundError:  # run from a folder that nobody installed
        return "not installed"


def source_digest(folder: Path) -> str:
    """Eight hex digits over the names and bytes of all .py files below `folder`."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:8]


def git_commit(folder: Path) -> str:
    """The commit that `folder` is checked out from, with "+" where its files differ.

    It is "" without git, and where the folder only lies inside somebody else's checkout.
    """
    try:
        if not run_git(folder, "ls-files", "__init__.py"):
            return ""
        commit = run_git(folder, "rev-parse", "--short=10", "HEAD")
        if commit and run_git(folder, "status", "--porcelain", "--", "."):
            commit += "+"
        return commit
    except OSError:  # no git on this machine
        return ""


def run_git(folder: Path, *words: str) -> str:
    """What a git command prints; "" if it fails. Raises OSError where there is no git."""
    process = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True)
    return process.stdout.strip() if process.returncode == 0 else ""


def format_start_line(
    process: int, processes: int, host: str, devices: int, kind: str, places: str, version: str
) -> str:
    """What every process prints at its start.

    `places` says where its devices sit in the mesh; "" if that is unknown.
    """
    plural = "" if devices == 1 else "s"
    mesh = f", mesh {places}" if places else ""
    return (
        f"process {process} of {processes} on {host}: {devices} local {kind} device{plural}"
        f"{mesh}, code {version}"
    )
