"""Data sets of Hugging Face, streamed: `hf://name[:config][@split][#revision]` (called by formats,
readers, prepare). Without a split, `train`; `pin` puts the commit of the hub in the place of the
revision.

A name that is a folder of this machine works as well, for `datasets` reads the files in it:
`hf:///data/stories@train`.
"""

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from gpt_jax.data.read.decoding import Piece, Raw, Reading, Unreadable, field_text
from gpt_jax.data.read.sources import HUB
from gpt_jax.errors import UsageError
from gpt_jax.files import digest_json

COMMIT = re.compile(r"[0-9a-f]{40}")


class Name(NamedTuple):
    """A path taken apart."""

    name: str
    config: str | None
    split: str
    revision: str | None  # a branch, a tag or a commit; None: the hub's main

    @property
    def local(self) -> bool:
        """Whether it lies on this machine; `datasets` looks here first, too."""
        return os.path.exists(self.name)

    @property
    def pinned(self) -> bool:
        """Whether it is a commit, which never changes."""
        return not self.local and COMMIT.fullmatch(self.revision or "") is not None


def parse_name(path: str) -> Name:
    """UsageError for a path that names no data set."""
    whole = path.removeprefix(HUB)
    revision = re.search(r"#(\w[\w./-]*)$", whole)
    name, _, split = whole[: revision.start() if revision else None].partition("@")
    name, _, config = name.partition(":")
    if not name:
        raise UsageError(f"{path}: names no data set; write {HUB}name[:config][@split][#revision]")
    return Name(name, config or None, split or "train", revision and revision[1])


@contextlib.contextmanager
def _library(path: str) -> Iterator[None]:
    """What `datasets` and the libraries under it say, in one line: names, networks and files are
    all outside."""
    try:
        yield
    except UsageError:
        raise
    except ImportError as error:
        package = error.name if error.name in ("datasets", "huggingface_hub") else None
        raise UsageError(
            f"{path}: needs the package {package}; pip install 'gpt_jax[hf]'"
            if package
            else f"{path}: {error}"
        ) from None
    except Exception as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from None


def pin(path: str, say: Callable[[str], None]) -> str:
    """`path` with the commit that the hub has for it now, so that every worker and every later
    call reads the same; a folder of this machine, or a commit, as it is. Says so where the hub
    does not answer."""
    found = parse_name(path)
    if found.local or found.pinned:
        return path
    try:
        with _library(path):
            from huggingface_hub import HfApi

            sha = HfApi().dataset_info(found.name, revision=found.revision).sha
    except UsageError as error:
        say(f"no commit of the hub to hold on to, so a change there would not be noticed: {error}")
        return path
    assert sha is not None  # the hub has a commit for every revision
    return with_revision(path, sha)


def with_revision(path: str, commit: str) -> str:
    """`path` with another revision."""
    return f"{path.removesuffix(f'#{parse_name(path).revision}')}#{commit}"


def stream(path: str):
    """The data set as a `datasets.IterableDataset`. UsageError for one that cannot be had."""
    return _stream(path) if parse_name(path).pinned else _stream.__wrapped__(path)


@functools.lru_cache(4)  # asking the hub what a set consists of takes seconds
def _stream(path: str):
    found = parse_name(path)
    with _library(path):
        import datasets

        return datasets.load_dataset(
            found.name, found.config, split=found.split, revision=found.revision, streaming=True
        )


# ---- what it is made of ----


def sizes(path: str) -> list[int]:
    """Bytes of each part that it can be read in, all 0 where that is not known."""
    return _sizes(path) if parse_name(path).pinned else _sizes.__wrapped__(path)


@functools.lru_cache(4)
def _sizes(path: str) -> list[int]:
    found, count = parse_name(path), stream(path).num_shards
    with _library(path):
        import datasets

        builder = datasets.load_dataset_builder(found.name, found.config, revision=found.revision)
        files = [str(file) for file in (builder.config.data_files or {}).get(found.split, ())]
        known = (
            {file: os.path.getsize(file) for file in files} if found.local else _hub_sizes(found)
        )
    each = [known.get(file.partition(f"@{found.revision}/")[2] or file, 0) for file in files]
    if len(each) == count and all(each):
        return each
    return [
        sum(each) // count if all(each) else 0
    ] * count  # files of which a part holds several, or half a one


def _hub_sizes(found: Name) -> dict[str, int]:
    """{path in the repository: bytes}; nothing without a commit."""
    from huggingface_hub import HfApi

    if not found.pinned:
        return {}
    files = HfApi().dataset_info(found.name, revision=found.revision, files_metadata=True).siblings
    return {file.rfilename: file.size or 0 for file in files or ()}


def stamp(path: str) -> tuple[int, str]:
    """(bytes, 0 where that is not known; what changes when it does): the commit, or sizes and
    times of a folder's files, as of any file."""
    found = parse_name(path)
    if not found.local:
        return sum(sizes(path)), found.revision or ""
    files = sorted(
        file for file in [Path(found.name), *Path(found.name).rglob("*")] if file.is_file()
    )
    return sum(sizes(path)), digest_json(
        [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    )


def rows(piece: Piece, reading: Reading) -> Iterator[Raw]:
    """Rows of the shards piece.start to piece.stop, in the order of the data set."""
    path = str(piece.source.path)
    dataset = stream(path)
    whole = piece.start == 0 and piece.stop < 0
    stop = dataset.num_shards if piece.stop < 0 else piece.stop
    parts = (
        [dataset]
        if whole
        else (dataset.shard(dataset.num_shards, i) for i in range(piece.start, stop))
    )
    with _library(path):
        for row in (row for part in parts for row in part):
            try:
                value = field_text(row, reading)
            except Unreadable as why:
                value = why
            yield Raw(value)
