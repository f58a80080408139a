"""A cache folder of tokenized text files: written, opened, checked, and built once.

A cache is a folder with a shard for each side, `train` and `eval` (see shards.py), `origins.json`,
`tokenizer.json` and `meta.json`. It is built under another name, and renamed when all of it is on
disk. So a kill in the middle leaves nothing that looks usable.
"""

import contextlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt_jax.data.read.documents import Document
from gpt_jax.data.tokenizers.spec import tokenizer_from_json
from gpt_jax.data.tokenizers.vocabulary import Tokenizer
from gpt_jax.data.tokens import shards
from gpt_jax.data.tokens.marks import describe_marks, find_end_name, list_end_names
from gpt_jax.data.tokens.shards import SIDES, Origin, TokenFile, Tokens
from gpt_jax.errors import UsageError
from gpt_jax.files import hold_lock, write_file
from gpt_jax.schema import Each, read_json, require

FORMAT = 3
BATCH_CHARACTERS = 1 << 23  # encoded at once, and held in memory meanwhile
REPORT_SECONDS = 10  # between two lines of progress

COUNTS = dict.fromkeys(("documents", "tokens", "bytes", "lost"), "count")
META_SCHEMA = {
    "format": "count",
    "dtype": set(shards.ID_TYPES),
    "tokenizer": "text",
    **dict.fromkeys(SIDES, COUNTS),
    # Size and SHA-256 of each file of a side, by its suffix. Earlier versions noted none.
    "digests?": Each(Each(("count", "text"))),
}

Report = Callable[[str], None]


# ---- writing ----


class Part(NamedTuple):
    """A part of a document that is encoded by itself."""

    side: str  # a member of SIDES
    source: int  # number of the source
    document: Document
    text: str
    ends: bool  # whether the document ends here


class Encoded(NamedTuple):
    """A part with its ids."""

    part: Part
    ids: np.ndarray
    lost: int  # bytes whose characters the tokenizer does not know


def _split_into_parts(
    texts: Iterable[tuple[str, int, Document]], tokenizer: Tokenizer
) -> Iterator[Part]:
    for side, source, document in texts:
        parts = list(tokenizer.parts(document.text))
        for i, text in enumerate(parts, 1):
            yield Part(side, source, document, text, ends=i == len(parts))


def _encode(
    texts: Iterable[tuple[str, int, Document]], tokenizer: Tokenizer, workers: int
) -> Iterator[Encoded]:
    """The parts of all texts with their ids, in order.

    Threads encode, because the library releases the interpreter's lock. On 2 cores two threads
    encode 5.6 MB/s where two spawned processes encode 4.4.
    """

    def encode(part: Part) -> Encoded:
        try:
            ids = tokenizer.encode(part.text)
            return Encoded(part, ids, tokenizer.lost(part.text, ids))
        except UsageError as error:
            raise UsageError(f"{part.document.name}: {error}") from None

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        batch = []
        size = 0
        for part in _split_into_parts(texts, tokenizer):
            batch.append(part)
            size += len(part.text)
            if size >= BATCH_CHARACTERS:
                yield from pool.map(encode, batch)
                batch = []
                size = 0
        yield from pool.map(encode, batch)


def write_cache(
    folder: Path,
    texts: Iterable[tuple[str, int, Document]],
    tokenizer: Tokenizer,
    workers: int,
    report: Report,
    sources: list[str],
    about: dict,
    begin: int | None = None,
) -> None:
    """Fills `folder` with the tokens of `texts`: (side, number of the source, document).

    `sources` are the names of the sources. `about` becomes a part of the meta, which is written
    last. Each document begins with the id `begin`, if it is given.
    """
    dtype = shards.choose_id_type(tokenizer.vocab)
    several = [False] * len(sources)
    end_names = list_end_names(tokenizer)
    marks = Counter()
    last_report = time.monotonic()

    with contextlib.ExitStack() as stack:
        sides = {side: shards.Writer(folder / side, dtype, tokenizer.eot, begin) for side in SIDES}
        for out in sides.values():
            stack.callback(out.file.close)

        for part, ids, lost in _encode(texts, tokenizer, workers):
            out = sides[part.side]
            out.write(ids, lost)
            if part.ends:
                document = part.document
                several[part.source] |= document.name != sources[part.source]
                marks[find_end_name(document.text, end_names)] += 1
                size = len(document.text.encode())
                out.end(shards.hash_text(document.text), size, document.row, part.source)
            if time.monotonic() - last_report > REPORT_SECONDS:
                last_report = time.monotonic()
                done = sum(out.bytes for out in sides.values())
                report(f"data: tokenized {done / 1e6:,.0f} MB")

        digests = {side: out.close() for side, out in sides.items()}

    del marks[""]
    for line in describe_marks(marks, "--config.data.separator"):
        report(f"data: {line}")
    counts = {side: out.counts() for side, out in sides.items()}
    origins = [[name, 0, many] for name, many in zip(sources, several, strict=True)]
    _write_cards(
        folder, tokenizer, origins, {"dtype": dtype.name, **counts, "digests": digests}, about
    )


def _write_cards(
    folder: Path, tokenizer: Tokenizer, origins: list, shard_facts: dict, about: dict
) -> None:
    """Writes what says what the shards are. The meta is last, so that it marks a whole cache."""
    write_file(folder / "origins.json", json.dumps(origins).encode())
    write_file(folder / "tokenizer.json", tokenizer.to_json().encode())
    meta = {"format": FORMAT, "tokenizer": tokenizer.fingerprint, **shard_facts, **about}
    write_file(folder / "meta.json", json.dumps(meta, indent=1).encode())


# ---- opening ----


class Unusable(Exception):
    """A cache folder that is not whole; the message says why."""


def load_cache(folder: Path) -> tuple[dict[str, Tokens | None], Tokenizer]:
    """The tokens of each side of a cache folder, None without text, and its tokenizer.

    Raises Unusable when anything does not fit.
    """
    try:
        meta = read_json((folder / "meta.json").read_bytes(), {"format": "count"})
        if meta["format"] != FORMAT:
            raise Unusable(f"has format {meta['format']}, not {FORMAT}")
        require(meta, META_SCHEMA)
        tokenizer = tokenizer_from_json((folder / "tokenizer.json").read_text())
        if tokenizer.fingerprint != meta["tokenizer"]:
            raise Unusable("holds another tokenizer than its meta says")
        rows = read_json((folder / "origins.json").read_bytes(), shards.ORIGINS_SCHEMA)
        origins = tuple(Origin(*row) for row in rows)
        sides = {side: _open_side(folder, side, meta, origins) for side in SIDES}
        return sides, tokenizer
    except (OSError, ValueError, UsageError) as error:
        raise Unusable(f"cannot be read ({error})") from None


def _open_side(folder: Path, side: str, meta: dict, origins: tuple[Origin, ...]) -> Tokens | None:
    counts = meta[side]
    digests = {suffix: row[1] for suffix, row in meta.get("digests", {}).get(side, {}).items()}
    file = TokenFile(
        folder / f"{side}.tokens",
        np.dtype(meta["dtype"]),
        counts["tokens"],
        sha256=digests.get(".tokens", ""),
    )
    size = os.path.getsize(file.path)
    wanted = file.size * file.dtype.itemsize
    if size != wanted:
        raise Unusable(f"{side}.tokens has {size} bytes, its meta says {wanted}")

    wanted = digests.get(".offsets", "")
    offsets, docs = shards.open_index(folder / side, counts["documents"], file.size, wanted)
    if not file.size:
        return None
    return Tokens(side, (file,), offsets, docs, counts["bytes"], origins, counts["lost"])


# ---- building once ----


def load_or_build(
    folder: Path, build: Callable[[Path], None], report: Report
) -> tuple[dict[str, Tokens | None], Tokenizer]:
    """`load_cache(folder)`, after `build(temporary folder)` if there is no whole cache yet.

    Of several processes that ask at once, one builds and the others wait.
    """
    if folder.is_dir():
        # The reason is reported under the lock, where the folder is read again.
        with contextlib.suppress(Unusable):
            return load_cache(folder)

    folder.parent.mkdir(parents=True, exist_ok=True)

    def wait() -> None:
        report(f"data: waiting for another process that builds {folder.name}")

    with hold_lock(folder.with_suffix(".lock"), wait):
        if folder.is_dir():
            try:
                return load_cache(folder)
            except Unusable as why:
                report(f"data: the cache {folder} {why}; it is built again")
                shutil.rmtree(folder)

        building = folder.with_suffix(".building")
        if building.is_symlink():  # rmtree refuses a link, and what it leads to is not ours
            building.unlink()
        shutil.rmtree(building, ignore_errors=True)  # what a killed build left
        building.mkdir()
        try:
            build(building)
            os.replace(building, folder)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        return load_cache(folder)
