"""Which code runs here: what every process says at its start, and what a job compares (floor 0)."""

import hashlib
import socket
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]  # gpt_jax/


def code_version() -> str:
    """ "0.1.0 3f2a9c1 source 1b9c44e0": package, commit ("+" after it: changed since) where
    there is a git checkout, and a digest of the package's source, which tells two machines apart
    whatever they were installed from."""
    commit = git_commit(PACKAGE)
    return " ".join(
        [package_version(), *([commit] if commit else []), f"source {source_digest(PACKAGE)}"]
    )


def code_identity() -> str:
    """What has to be equal on all processes of a job: the source and JAX. Not the commit, which
    one machine may lack."""
    return f"source {source_digest(PACKAGE)} jax {metadata.version('jax')}"


def describe_process_code(process: int) -> str:
    """ "process 1 on n2 with code 0.1.0 source 1b9c44e0 jax 0.10.2"."""
    return f"process {process} on {socket.gethostname()} with code {code_version()} jax {metadata.version('jax')}"


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
    """The commit that `folder` is checked out from, "+" where its files differ; "" without git
    or where the folder only lies inside somebody else's checkout."""

    def git(*words):
        done = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        if not git("ls-files", "__init__.py"):
            return ""
        commit = git("rev-parse", "--short=10", "HEAD")
        return (commit or "") + ("+" if commit and git("status", "--porcelain", "--", ".") else "")
    except OSError:  # no git on this machine
        return ""


def format_start_line(
    process: int, processes: int, host: str, devices: int, kind: str, places: str, version: str
) -> str:
    """What every process prints at its start. `places`: where its devices sit in the mesh, as
    text ("" for unknown)."""
    return (
        f"process {process} of {processes} on {host}: {devices} local {kind} device{'s' * (devices != 1)}"
        f"{f', mesh {places}' if places else ''}, code {version}"
    )
