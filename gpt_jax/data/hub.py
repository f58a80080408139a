"""Data sets of Hugging Face, streamed: `hf://name[:config][@split]` (called by formats). Without a split, `train`.

A name that is a folder of this machine works as well, for `datasets` reads the files in it: `hf:///data/stories@train`.
"""

import contextlib
from typing import Iterator

from gpt_jax.data.decoding import Piece, Raw, Reading, Unreadable, field_text
from gpt_jax.data.sources import HUB
from gpt_jax.errors import UsageError


def parse(path: str) -> tuple[str, str | None, str]:
    """(name, config, split) of hf://name[:config][@split]."""
    name, _, split = path.removeprefix(HUB).partition("@")
    name, _, settings = name.partition(":")
    if not name:
        raise UsageError(f"{path}: names no data set; write {HUB}name[:config][@split]")
    return name, settings or None, split or "train"


@contextlib.contextmanager
def _library(path: str) -> Iterator[None]:
    """What `datasets` and the libraries under it say, in one line: names, networks and files are all outside."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from None


def stream(path: str):
    """The data set as a `datasets.IterableDataset`. UsageError for one that cannot be had."""
    name, settings, split = parse(path)
    try:
        import datasets
    except ImportError:
        raise UsageError(f"{path}: needs the package datasets; pip install 'gpt_jax[hf]'") from None
    with _library(path):
        return datasets.load_dataset(name, settings, split=split, streaming=True)


def shards(path: str) -> int:
    """How many parts it can be read in."""
    return stream(path).num_shards


def rows(piece: Piece, reading: Reading) -> Iterator[Raw]:
    """Rows of the shards piece.start to piece.stop, in the order of the data set."""
    dataset = stream(piece.source.path)
    whole = piece.start == 0 and piece.stop < 0
    stop = dataset.num_shards if piece.stop < 0 else piece.stop
    parts = [dataset] if whole else (dataset.shard(dataset.num_shards, i) for i in range(piece.start, stop))
    with _library(piece.source.path):
        for row in (row for part in parts for row in part):
            try:
                value = field_text(row, reading)
            except Unreadable as why:
                value = why
            yield Raw(value)
