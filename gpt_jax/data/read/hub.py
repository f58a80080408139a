"""Data sets of Hugging Face, streamed: `hf://name[:config][@split][#revision]`.

The split is `train` if none is named. `pin` puts the commit of the hub in the place of the
revision. A name may also be a folder of this machine, because `datasets` reads the files in it:
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
from gpt_jax.data.read.sources import HUB, walk
from gpt_jax.errors import UsageError, install_command
from gpt_jax.files import digest_json

COMMIT = re.compile(r"[0-9a-f]{40}")


class Name(NamedTuple):
    """The parts of a path."""

    name: str
    config: str | None
    split: str
    revision: str | None  # a branch, a tag or a commit; None means the hub's main

    @property
    def local(self) -> bool:
        """Whether the data set lies on this machine. `datasets` looks here first, too."""
        return os.path.exists(self.name)

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return not self.local and COMMIT.fullmatch(self.revision or "") is not None


def parse_name(path: str) -> Name:
    """The parts of a path. Raises UsageError if it names no data set.

    A name of the hub holds none of the signs between the parts. The path of a folder may. It is
    taken whole if such a folder is there, so that its name is not cut.
    """
    whole = path.removeprefix(HUB)
    if os.path.isdir(whole):
        return Name(whole, None, "train", None)
    stem, at, split = whole.rpartition("@")
    if at and os.path.isdir(stem):
        return Name(stem, None, split or "train", None)
    revision = re.search(r"#(\w[\w./-]*)$", whole)
    name, _, split = whole[: revision.start() if revision else None].partition("@")
    name, _, config = name.partition(":")
    if not name:
        raise UsageError(f"{path}: names no data set; write {HUB}name[:config][@split][#revision]")
    return Name(name, config or None, split or "train", revision and revision[1])


@contextlib.contextmanager
def _library(path: str) -> Iterator[None]:
    """Turns what `datasets` and the libraries under it say into a UsageError of one line.

    Names, networks and files are all outside of this program.
    """
    try:
        yield
    except UsageError:
        raise
    except ImportError as error:
        if error.name not in ("datasets", "huggingface_hub"):
            raise UsageError(f"{path}: {error}") from None
        raise UsageError(
            f"{path}: needs the package {error.name}; {install_command(error.name)}"
        ) from None
    except Exception as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from None


def pin(path: str, say: Callable[[str], None]) -> str:
    """`path` with the commit that the hub has for it now.

    So every worker and every later call reads the same. A folder of this machine, and a commit,
    stay the same. If the hub does not answer, `path` stays the same too, and `say` tells.
    """
    name = parse_name(path)
    if name.local or name.pinned:
        return path

    try:
        with _library(path):
            from huggingface_hub import HfApi

            sha = HfApi().dataset_info(name.name, revision=name.revision).sha
    except UsageError as error:
        say(f"no commit of the hub to hold on to, so a change there would not be noticed: {error}")
        return path
    assert sha is not None  # the hub has a commit for every revision
    return with_revision(path, sha)


def with_revision(path: str, commit: str) -> str:
    """`path` with another revision."""
    return f"{path.removesuffix(f'#{parse_name(path).revision}')}#{commit}"


def stream(path: str):
    """The data set as a `datasets.IterableDataset`. Raises UsageError if it cannot be read."""
    return _stream(path) if parse_name(path).pinned else _stream.__wrapped__(path)


@functools.lru_cache(4)  # The hub takes seconds to say what a set consists of.
def _stream(path: str):
    name = parse_name(path)
    with _library(path):
        import datasets

        return datasets.load_dataset(
            name.name, name.config, split=name.split, revision=name.revision, streaming=True
        )


# ---- what it is made of ----


def sizes(path: str) -> list[int]:
    """The bytes of each part in which the set can be read. They are 0 if they are not known."""
    return _sizes(path) if parse_name(path).pinned else _sizes.__wrapped__(path)


@functools.lru_cache(4)
def _sizes(path: str) -> list[int]:
    name = parse_name(path)
    count = stream(path).num_shards
    with _library(path):
        import datasets

        builder = datasets.load_dataset_builder(name.name, name.config, revision=name.revision)
        files = [str(file) for file in (builder.config.data_files or {}).get(name.split, ())]
        known = {file: os.path.getsize(file) for file in files} if name.local else _hub_sizes(name)

    each = [known.get(file.partition(f"@{name.revision}/")[2] or file, 0) for file in files]
    if not all(each):
        return [0] * count
    if len(each) == count:
        return each
    # A part may hold several files, or half a file.
    return [sum(each) // count] * count


def _hub_sizes(name: Name) -> dict[str, int]:
    """{path in the repository: bytes}. It is empty without a commit."""
    from huggingface_hub import HfApi

    if not name.pinned:
        return {}
    files = HfApi().dataset_info(name.name, revision=name.revision, files_metadata=True).siblings
    return {file.rfilename: file.size or 0 for file in files or ()}


def stamp(path: str) -> tuple[int, str]:
    """Returns (bytes, a text that changes when the set does). Unknown bytes are 0.

    The text is the commit. For a folder it is a digest of its files' sizes and times.
    """
    size = sum(sizes(path))
    name = parse_name(path)
    if not name.local:
        return size, name.revision or ""

    folder = Path(name.name)
    paths = [folder] if folder.is_file() else sorted(folder / path for path in walk(folder))
    files = [path for path in paths if path.is_file()]
    facts = []
    for file in files:
        stat = file.stat()
        facts.append([str(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    return size, digest_json(facts)


def rows(piece: Piece, reading: Reading) -> Iterator[Raw]:
    """Rows of the shards piece.start to piece.stop, in the order of the data set."""
    path = str(piece.source.path)
    dataset = stream(path)
    parts = [dataset]
    if piece.start or piece.stop >= 0:
        stop = dataset.num_shards if piece.stop < 0 else piece.stop
        parts = (dataset.shard(dataset.num_shards, i) for i in range(piece.start, stop))

    with _library(path):
        for row in (row for part in parts for row in part):
            try:
                value = field_text(row, reading)
            except Unreadable as why:
                value = why
            yield Raw(value)
