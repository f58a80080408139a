"""Where weights come from: the entries of a checkpoint's lineage, made and shown."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpt_jax import config as configs
from gpt_jax.errors import UsageError
from gpt_jax.files import describe_error, digest_file
from gpt_jax.interop import Origin
from gpt_jax.run.meta import count_tokens
from gpt_jax.train import MANIFEST

Entry = dict[str, Any]
THREADS = 8  # that hash files. SHA-256 leaves Python's lock, and a disk serves several readers.
SHOWN = 16  # hex digits of a digest that people see


def make_run_entry(
    meta: dict, config: configs.Config, directory: Path, step: int, path: str = ""
) -> Entry:
    """The entry of a checkpoint of ours. Its manifest stands for all its files.

    `path` names the run, if it is not the folder above `directory`. Raises UsageError if the
    manifest cannot be read.
    """
    return {
        "from": path or str(directory.parent),
        "step": step,
        "tokens": count_tokens(meta, config, directory),
        "data": config.data.where,
        "content": meta["data"]["content"],
        "digests": digest_files([directory / str(step) / MANIFEST]),
    }


def make_foreign_entry(origin: Origin, digests: dict[str, str]) -> Entry:
    """The entry of a model of another project. Nobody knows its tokens and its text."""
    return {
        "from": origin.name,
        "step": 0,
        "tokens": 0,
        "data": f"a {origin.family}",
        "content": "",
        "family": origin.family,
        "digests": digests,
    }


def digest_files(files: Sequence[Path]) -> dict[str, str]:
    """The SHA-256 of each file by name. It reads all of them. Raises UsageError."""
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            digests = list(pool.map(digest_file, files))
    except OSError as error:
        raise UsageError(f"{error.filename}: {describe_error(error)}") from None
    return {file.name: digest.sha256 for file, digest in zip(files, digests, strict=True)}


def describe_entry(entry: Entry) -> str:
    """A line for people."""
    line = f"{entry['from']}: step {entry['step']:,}, {entry['tokens']:,} tokens of {entry['data']}"
    if "family" in entry:
        line = f"{entry['from']}: a {entry['family']} of another project"
    digests = sorted(entry.get("digests", {}).items())
    if digests:
        line += f"; SHA-256 {', '.join(f'{name} {digest[:SHOWN]}' for name, digest in digests)}"
    return line
