"""Programs that were compiled before are loaded from a folder."""

import hashlib
import os
import platform
from collections.abc import Mapping
from pathlib import Path

from gpt_jax.errors import UsageError, complain
from gpt_jax.files import describe_error

FOLDER = "~/.cache/gpt_jax/compiled"
OFF = "none"
# JAX's own variables. What they say stays.
FOLDER_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
SHORTEST_VARIABLE = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
# Programs that compile faster are not kept. JAX's default of one second leaves out half of what a
# start of `generate` compiles.
SHORTEST_SECONDS = 0.1
MOST_BYTES = 4 * 2**30  # of a folder; the oldest programs go first


def keep_compiled(folder: str | None, environ: Mapping[str, str] = os.environ) -> None:
    """Lets JAX keep compiled programs in `folder`, and load them from there.

    None means FOLDER, and "none" keeps nothing. Call it before the first program compiles. Several
    processes may share the folder: process 0 of a job writes, and a file that cannot be read is
    compiled anew. Raises UsageError for a given folder that cannot be made.
    """
    import jax

    if folder == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if SHORTEST_VARIABLE not in environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST_SECONDS)
    if folder is None and FOLDER_VARIABLE in environ:
        return

    try:
        path = Path(folder or FOLDER).expanduser() / machine_digest(environ)
        make_folder(path)
        drop_oldest(path, MOST_BYTES)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        reason = describe_error(error)
        if folder is not None:
            raise UsageError(
                f"--compilation_cache={folder}: cannot be used ({reason}); "
                f"name another folder, or {OFF}"
            ) from None
        complain(f"{FOLDER} cannot be used ({reason}): programs are compiled at every start")
        return
    jax.config.update("jax_compilation_cache_dir", str(path))


def make_folder(path: Path) -> None:
    """Makes the folder for its owner alone, and says so once: whoever makes it says it.

    It holds programs that are run, so nobody else should write there.
    """
    if path.is_dir():
        return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:  # another process was faster
        return
    complain(f"keeping compiled programs in {path}; --compilation_cache={OFF} turns that off")


def machine_digest(environ: Mapping[str, str] = os.environ) -> str:
    """Eight hex digits of what the programs of a CPU depend on: its kind and its threads.

    Machines that share a home may have different ones.
    """
    facts = [platform.machine(), str(os.cpu_count()), environ.get("PJRT_NPROC", "")]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        facts.append(platform.processor())
    else:
        for name in ("model name", "flags", "Features"):  # of the first CPU
            facts += [line for line in lines if line.startswith(name)][:1]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def drop_oldest(path: Path, most_bytes: int) -> None:
    """Removes the programs that were written first, until the rest fits."""
    files = []
    for entry in os.scandir(path):
        if entry.is_file():
            status = entry.stat()
            files.append((status.st_mtime, status.st_size, entry.path))
    total = sum(size for _, size, _ in files)
    for _, size, name in sorted(files):
        if total <= most_bytes:
            return
        Path(name).unlink(missing_ok=True)  # another process may clear up too
        total -= size
