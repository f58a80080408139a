"""Token files of other tools as what a run trains on, read where they lie (called by dataset).

Several files (the shards that llm.c writes) are one source: joined in the order of their names,
each ending a document, so that one cut in two by its tool counts as two. A row may reach over the
end of a file as over that of any document.
"""

import glob
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt_jax import config
from gpt_jax.data.read import sources
from gpt_jax.data.read.sources import TOKEN_FILES, Source
from gpt_jax.data.tokenizers.vocabulary import Tokenizer
from gpt_jax.data.tokens import cache, store
from gpt_jax.data.tokens.cache import Prepared
from gpt_jax.data.tokens.foreign import open_foreign, split
from gpt_jax.data.tokens.shards import DOCUMENT, Origin, TokenFile, Tokens
from gpt_jax.errors import UsageError
from gpt_jax.files import digest_json

AT_ONCE = 1 << 24  # ids whose bytes are counted at once
NANOGPT = ("train.bin", "val.bin")  # what a folder of nanoGPT holds


class Joined(NamedTuple):
    """Token files one after the other."""

    files: tuple[Path, ...]
    ids: tuple[np.ndarray, ...]  # of each file, memory-mapped
    headers: tuple[int, ...]  # bytes before them
    offsets: np.ndarray  # int64 [documents + 1] through all files
    kind: str


# ---- which files a path means ----


def _matches(path: str) -> list[Path]:
    """The token files that a path means by its name: itself, Megatron's prefix, a glob; [] for
    anything else."""
    here = Path(path).expanduser()
    if path.endswith(TOKEN_FILES) and (here.exists() or not glob.has_magic(path)):
        return [here]
    if not here.exists() and Path(f"{here}.idx").is_file():
        return [Path(f"{here}.bin")]
    found = (
        [Path(match) for match in sorted(glob.glob(str(here), recursive=True))]
        if not here.exists()
        else []
    )
    # Of Megatron's pairs one file stands for both.
    kept = [
        file for file in found if file.suffix != ".idx" or file.with_suffix(".bin") not in found
    ]
    return kept if all(file.suffix in TOKEN_FILES for file in kept) else []


def _folder(path: str) -> list[Path]:
    """train.bin and val.bin of a folder made by nanoGPT's prepare.py; [] for any other.
    UsageError beside text."""
    files = [Path(path).expanduser() / name for name in NANOGPT]
    if not all(file.is_file() for file in files):
        return []
    if text := sorted(file.name for file in files[0].parent.iterdir() if sources.suffixes(file)):
        raise UsageError(
            f"config.data.path = {path}: holds both text ({text[0]}) and token files "
            f"({', '.join(NANOGPT)}); give {path}/{text[0]}, or {path}/{NANOGPT[0]} with "
            f"config.data.eval_path={path}/{NANOGPT[1]}"
        )
    return files


def is_foreign(path: str) -> bool:
    """Whether a path means token files, by its name and what lies there."""
    return bool(_matches(path) or _folder(path))


def _files(paths: Sequence[str], field: str) -> tuple[Path, ...]:
    """The files that `paths` mean, each once. UsageError, by `field`, for anything else among
    them."""
    if other := [path for path in paths if not _matches(path)]:
        raise UsageError(
            f"{field} = {', '.join(paths)}: {other[0]} is no token file and cannot be joined with such; "
            "name texts and token files in config.data.sources"
        )
    files = [
        file.with_suffix(".bin") if file.suffix == ".idx" else file
        for path in paths
        for file in _matches(path)
    ]
    return tuple(dict.fromkeys(files))


# ---- what is in them ----


def _join(files: tuple[Path, ...], eot: int | None) -> Joined:
    """UsageError, naming the file, for one of no use."""
    opened = [open_foreign(file, eot) for file in files]
    begins = bool(opened[0].tokens[0] == eot)
    for i, one in enumerate(opened):
        if one.tokens.dtype != opened[0].tokens.dtype:
            raise UsageError(
                f"{files[i]}: holds {one.tokens.dtype} and {files[0]} {opened[0].tokens.dtype}; give files "
                "of one tool"
            )
        if one.kind != "megatron" and begins != bool(
            one.tokens[0] == eot
        ):  # cut within a document: as the first is
            opened[i] = one._replace(offsets=split(one.tokens, eot, begins))
    starts = np.cumsum([0, *(len(one.tokens) for one in opened)])
    offsets = np.concatenate(
        [one.offsets[:-1] + start for one, start in zip(opened, starts)] + [starts[-1:]]
    )
    return Joined(
        files,
        tuple(one.tokens for one in opened),
        tuple(one.header for one in opened),
        offsets,
        opened[0].kind,
    )


def _side(name: str, found: Joined, first: int, last: int, tokenizer: Tokenizer, report) -> Tokens:
    """Documents `first` to `last` of token files."""
    start, stop = int(found.offsets[first]), int(found.offsets[last])
    begins = np.cumsum([0, *map(len, found.ids)])
    parts = [
        ids[max(start - begin, 0) : max(stop - begin, 0)] for ids, begin in zip(found.ids, begins)
    ]
    size, unknown = 0, 0
    for file, ids in zip(found.files, parts):
        for at in range(0, len(ids), AT_ONCE):
            part = ids[at : at + AT_ONCE]
            if (largest := int(part.max())) >= tokenizer.vocab:
                raise UsageError(
                    f"{file.name}: holds the id {largest}, and config.data.tokenizer = {tokenizer.name} "
                    f"has {tokenizer.vocab} ids; name the tokenizer that made the file"
                )
            size += int(tokenizer.token_bytes[part].sum(dtype=np.int64))
            unknown += (
                int((part == tokenizer.unknown).sum()) if tokenizer.unknown is not None else 0
            )
    if unknown:
        report(
            f"data: {unknown:,} of the {stop - start:,} {name} tokens of {found.files[0].name} are <unk>: that text "
            "is lost, and bits per byte are of the rest"
        )
    firsts = np.searchsorted(
        found.offsets[:-1], begins
    )  # the number of the first document of each file
    docs = np.zeros(last - first, DOCUMENT)
    docs["piece"] = np.searchsorted(firsts, np.arange(first, last), "right") - 1
    docs["row"] = np.arange(first, last) - firsts[docs["piece"]]
    origins = tuple(
        Origin(file.name, 0, bool(count > 1)) for file, count in zip(found.files, np.diff(firsts))
    )
    skipped = np.maximum(start - begins[:-1], 0).tolist()  # ids of each file
    shards = tuple(
        TokenFile(file, ids.dtype, len(ids), header + skip * ids.itemsize)
        for file, ids, header, skip in zip(found.files, parts, found.headers, skipped)
        if len(ids)
    )
    return Tokens(name, shards, found.offsets[first : last + 1] - start, docs, size, origins)


def _whole(name: str, files: tuple[Path, ...], tokenizer: Tokenizer, report) -> Tokens:
    found = _join(files, tokenizer.eot)
    return _side(name, found, 0, len(found.offsets) - 1, tokenizer, report)


def heldout(path: str, tokenizer: Tokenizer, report: Callable[[str], None]) -> Tokens:
    """All of what a path of token files means. UsageError as `adopt`."""
    return _whole("eval", tuple(_folder(path)[1:]) or _files((path,), "--text"), tokenizer, report)


def adopt(
    paths: Sequence[str],
    data: config.Data,
    tokenizer: Tokenizer | None,
    report: Callable[[str], None],
    field: str = "config.data.path",
) -> Prepared:
    """Train and held-out tokens of token files: config.data.eval_path are others (and val.bin of
    nanoGPT's folder), or the last eval_fraction of the documents (of one document alone, of its
    tokens) is held out. All ids are looked at once, to be sure that they are in the vocabulary.
    UsageError for files or a tokenizer of no use."""
    named = ", ".join(paths)
    if tokenizer is None:
        raise UsageError(
            f"config.data.tokenizer = {data.tokenizer!r}: {named} does not say which tokenizer made its "
            "ids; name it by its file, such as tokenizer.json or a folder of encoder.json and vocab.bpe"
        )
    folder = _folder(paths[0]) if len(paths) == 1 else []
    files = tuple(folder[:1]) or _files(paths, field)
    others = (
        _files(data.eval_path, "config.data.eval_path") if data.eval_path else tuple(folder[1:])
    )
    found, held = _join(files, tokenizer.eot), None
    cut = len(found.offsets) - 1
    if others:
        held = _whole("eval", others, tokenizer, report)
    elif data.eval_fraction:
        border = int(found.offsets[-1] * (1 - data.eval_fraction))
        if len(found.offsets) == 2:
            found = found._replace(offsets=np.array([0, border, found.offsets[-1]]))
        cut = min(
            max(1, int(np.searchsorted(found.offsets[:-1], border, "left"))), len(found.offsets) - 2
        )
        held = _side("eval", found, cut, len(found.offsets) - 1, tokenizer, report)
    train = _side("train", found, 0, cut, tokenizer, report)
    count = f"{len(files):,} files, " if files[1:] else ""
    report(
        f"data: train on {cache.count(train)}, held out {cache.count(held)}; tokenizer {tokenizer.name} of "
        f"{tokenizer.vocab:,} ids; {named} ({count}{found.kind})"
    )
    indexes = [
        file.with_suffix(".idx") for file in (*files, *others) if file.with_suffix(".idx").exists()
    ]
    hashes = store.content_hashes(
        tuple(Source(file, file.name) for file in (*files, *others, *indexes)),
        Path(data.cache).expanduser(),
        data.workers,
    )
    return Prepared(
        train,
        held,
        tokenizer,
        files[0].parent,
        digest_json(hashes, tokenizer.fingerprint, [len(files)] if others else data.eval_fraction),
    )
