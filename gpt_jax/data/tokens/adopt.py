"""Token files of other tools as what a run trains on, read where they lie.

Several files, such as the shards that llm.c writes, are one source. They are joined in the order of
their names. Each file ends a document, so a document that its tool cut in two counts as two. A row
may reach over the end of a file as over the end of any document.
"""

import glob
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt_jax import config
from gpt_jax.data.read import sources
from gpt_jax.data.read.sources import TOKEN_FILES, Source
from gpt_jax.data.tokenizers.begin import name_begin, require_begin
from gpt_jax.data.tokenizers.vocabulary import Tokenizer
from gpt_jax.data.tokens.cache import Prepared, describe_size
from gpt_jax.data.tokens.foreign import find_documents, open_foreign
from gpt_jax.data.tokens.hashes import hash_sources
from gpt_jax.data.tokens.shards import DOCUMENT, Origin, TokenFile, Tokens
from gpt_jax.errors import UsageError, escape
from gpt_jax.files import allow_open_files, digest_json

AT_ONCE = 1 << 24  # ids whose bytes are counted at once
NANOGPT = ("train.bin", "val.bin")  # what a folder of nanoGPT holds

Report = Callable[[str], None]


class Joined(NamedTuple):
    """Token files one after the other."""

    files: tuple[Path, ...]
    ids: tuple[np.ndarray, ...]  # of each file, memory-mapped
    headers: tuple[int, ...]  # bytes before the ids of each file
    offsets: np.ndarray  # int64 [documents + 1] through all files
    kind: str

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.offsets) - 1

    @property
    def begins(self) -> np.ndarray:
        """int64 [files + 1]: the first id of each file, then the end."""
        return np.cumsum([0, *map(len, self.ids)])


# ---- which files a path means ----


def _match(path: str) -> list[Path]:
    """The token files that a path means by its name: itself, Megatron's prefix, or a glob.

    The list is empty for anything else.
    """
    here = Path(path).expanduser()
    exists = here.exists()
    if path.endswith(TOKEN_FILES) and (exists or not glob.has_magic(path)):
        return [here]
    if exists:
        return []
    if Path(f"{here}.idx").is_file():
        return [Path(f"{here}.bin")]

    matches = [Path(match) for match in sorted(glob.glob(str(here), recursive=True))]
    # Of Megatron's pairs one file stands for both.
    kept = [
        file for file in matches if file.suffix != ".idx" or file.with_suffix(".bin") not in matches
    ]
    return kept if all(file.suffix in TOKEN_FILES for file in kept) else []


def _list_folder(path: str) -> list[Path]:
    """train.bin and val.bin of a folder made by nanoGPT's prepare.py; empty for any other folder.

    Raises UsageError if the folder holds text as well.
    """
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
    return bool(_match(path) or _list_folder(path))


def _list_files(paths: Sequence[str], field: str) -> tuple[Path, ...]:
    """The files that `paths` mean, each once.

    Raises UsageError, naming `field`, if one of them means anything else.
    """
    files = []
    for path in paths:
        matches = _match(path)
        if not matches:
            raise UsageError(
                f"{field} = {', '.join(paths)}: {path} is no token file and cannot be joined with "
                "such; name texts and token files in config.data.sources"
            )
        for file in matches:
            files.append(file.with_suffix(".bin") if file.suffix == ".idx" else file)
    return tuple(dict.fromkeys(files))


# ---- what is in them ----


def _join(files: tuple[Path, ...], tokenizer: Tokenizer, token_type: str) -> Joined:
    """Opens files and joins them. Raises UsageError, naming the file, for one that is no part."""
    allow_open_files()  # All of them are open at once.
    eot = tokenizer.eot
    opened = [open_foreign(file, eot, token_type, tokenizer.vocab) for file in files]
    first = opened[0]
    eot_begins = bool(first.tokens[0] == eot)
    for i, one in enumerate(opened):
        if one.tokens.dtype != first.tokens.dtype:
            raise UsageError(
                f"{files[i]}: holds {one.tokens.dtype} and {files[0]} {first.tokens.dtype}; give "
                "files of one tool"
            )
        # A file that was cut within a document has end of text where the first file has it.
        if one.kind != "megatron" and eot_begins != bool(one.tokens[0] == eot):
            opened[i] = one._replace(offsets=find_documents(one.tokens, eot, eot_begins))

    begins = np.cumsum([0, *(len(one.tokens) for one in opened)])
    starts = [one.offsets[:-1] + begin for one, begin in zip(opened, begins[:-1], strict=True)]
    return Joined(
        files,
        tuple(one.tokens for one in opened),
        tuple(one.header for one in opened),
        np.concatenate([*starts, begins[-1:]]),
        first.kind,
    )


def _check_begin(joined: Joined, tokenizer: Tokenizer, data: config.Data) -> None:
    """Raises UsageError if config.data.begin asks for a token that a document does not have."""
    if not data.begin:
        return
    for file, ids, begin, end in zip(
        joined.files, joined.ids, joined.begins[:-1], joined.begins[1:], strict=True
    ):
        first, last = np.searchsorted(joined.offsets[:-1], (begin, end))
        starts = joined.offsets[first:last] - begin
        # A tool that cuts documents between files begins a file inside of one.
        firsts = ids[starts[1:] if len(starts) > 1 else starts]
        others = firsts[firsts != tokenizer.begin]
        if len(others):
            raise UsageError(
                f"config.data.begin = True: a document of {file} begins with the id "
                f"{others[0]} and not with {name_begin(tokenizer)}, and token files are "
                "used as they are; leave it out, or use the text"
            )


class Range(NamedTuple):
    """The ids of each file that belong to some documents."""

    start: int  # of the first document, through all files
    stop: int
    parts: tuple[np.ndarray, ...]  # of each file
    skipped: tuple[int, ...]  # ids of each file before its part


def _slice(joined: Joined, first: int, last: int) -> Range:
    """The ids of documents `first` to `last`."""
    start = int(joined.offsets[first])
    stop = int(joined.offsets[last])
    parts = []
    skipped = []
    for ids, begin in zip(joined.ids, joined.begins[:-1].tolist(), strict=True):
        parts.append(ids[max(start - begin, 0) : max(stop - begin, 0)])
        skipped.append(max(start - begin, 0))
    return Range(start, stop, tuple(parts), tuple(skipped))


def _count_bytes(joined: Joined, ids: Range, tokenizer: Tokenizer) -> tuple[int, int]:
    """Bytes that the ids stand for, and how many ids are unknown characters.

    Raises UsageError, naming the file, for an id that the tokenizer does not have.
    """
    size = 0
    unknown = 0
    for file, part in zip(joined.files, ids.parts, strict=True):
        for at in range(0, len(part), AT_ONCE):
            block = part[at : at + AT_ONCE]
            largest = int(block.max())
            if largest >= tokenizer.vocab:
                raise UsageError(
                    f"{file.name}: holds the id {largest}, and config.data.tokenizer = "
                    f"{tokenizer.name} has {tokenizer.vocab} ids; name the tokenizer that made "
                    "the file"
                )
            size += int(tokenizer.token_bytes[block].sum(dtype=np.int64))
            if tokenizer.unknown is not None:
                unknown += int((block == tokenizer.unknown).sum())
    return size, unknown


def _describe_documents(
    joined: Joined, first: int, last: int
) -> tuple[np.ndarray, tuple[Origin, ...]]:
    """DOCUMENT of documents `first` to `last`, and the Origin of each file."""
    firsts = np.searchsorted(joined.offsets[:-1], joined.begins)  # first document of each file
    numbers = np.arange(first, last)
    docs = np.zeros(last - first, DOCUMENT)
    docs["piece"] = np.searchsorted(firsts, numbers, "right") - 1
    docs["row"] = numbers - firsts[docs["piece"]]
    origins = tuple(
        Origin(file.name, 0, bool(count > 1))
        for file, count in zip(joined.files, np.diff(firsts), strict=True)
    )
    return docs, origins


def _make_tokens(
    name: str, joined: Joined, first: int, last: int, tokenizer: Tokenizer, report: Report
) -> Tokens:
    """Documents `first` to `last` of token files, as one side of a run."""
    ids = _slice(joined, first, last)
    size, unknown = _count_bytes(joined, ids, tokenizer)
    if unknown:
        report(
            f"data: {unknown:,} of the {ids.stop - ids.start:,} {name} tokens of "
            f"{joined.files[0].name} are <unk>: that text is lost, and bits per byte are of the "
            "rest"
        )

    shards = []
    for i, part in enumerate(ids.parts):
        if len(part):
            header = joined.headers[i] + ids.skipped[i] * part.itemsize
            shards.append(TokenFile(joined.files[i], part.dtype, len(part), header))
    docs, origins = _describe_documents(joined, first, last)
    offsets = joined.offsets[first : last + 1] - ids.start
    return Tokens(name, tuple(shards), offsets, docs, size, origins)


def _adopt_whole(
    name: str, files: tuple[Path, ...], tokenizer: Tokenizer, data: config.Data, report: Report
) -> Tokens:
    joined = _join(files, tokenizer, data.token_type)
    _check_begin(joined, tokenizer, data)
    return _make_tokens(name, joined, 0, joined.documents, tokenizer, report)


def adopt_heldout(
    path: str, tokenizer: Tokenizer, data: config.Data, report: Report, field: str = "--text"
) -> Tokens:
    """All tokens of a path of token files, as held-out text. Raises UsageError as `adopt` does.

    `field` is where the path was given.
    """
    files = tuple(_list_folder(path)[1:]) or _list_files((path,), field)
    return _adopt_whole("eval", files, tokenizer, data, report)


def _place_border(joined: Joined, fraction: float) -> tuple[Joined, int]:
    """The files, and the number of the first document that is held out.

    A single document is cut in two, so it becomes two documents.
    """
    border = int(joined.offsets[-1] * (1 - fraction))
    if joined.documents == 1:
        joined = joined._replace(offsets=np.array([0, border, joined.offsets[-1]]))
    first_held = int(np.searchsorted(joined.offsets[:-1], border, "left"))
    return joined, min(max(1, first_held), joined.documents - 1)


def _list_sides(
    paths: Sequence[str], data: config.Data, field: str
) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The files to train on, and those that are held out, if files are."""
    folder = _list_folder(paths[0]) if len(paths) == 1 else []
    files = tuple(folder[:1]) or _list_files(paths, field)
    if data.eval_path:
        return files, _list_files(data.eval_path, "config.data.eval_path")
    return files, tuple(folder[1:])


def adopt(
    paths: Sequence[str],
    data: config.Data,
    tokenizer: Tokenizer | None,
    report: Report,
    field: str = "config.data.path",
) -> Prepared:
    """Train and held-out tokens of token files.

    Held out is what config.data.eval_path names, or val.bin of nanoGPT's folder. Without either it
    is the last eval_fraction of the documents, or of the tokens if there is one document only. All
    ids are read once, to be sure that they are in the vocabulary.

    Raises UsageError if no tokenizer is given, for files that cannot be read, and for ids that the
    tokenizer does not have.
    """
    named = ", ".join(paths)
    if tokenizer is None:
        raise UsageError(
            f"config.data.tokenizer = {data.tokenizer!r}: {named} does not say which tokenizer "
            "made its ids; name it by its file, such as tokenizer.json or a folder of encoder.json "
            "and vocab.bpe"
        )

    if data.begin:
        tokenizer = require_begin(tokenizer, "config.data.begin = True")
    files, held_files = _list_sides(paths, data, field)
    joined = _join(files, tokenizer, data.token_type)
    _check_begin(joined, tokenizer, data)
    held = None
    border = joined.documents
    if held_files:
        held = _adopt_whole("eval", held_files, tokenizer, data, report)
    elif data.eval_fraction:
        joined, border = _place_border(joined, data.eval_fraction)
        held = _make_tokens("eval", joined, border, joined.documents, tokenizer, report)
    train = _make_tokens("train", joined, 0, border, tokenizer, report)

    count = f"{len(files):,} files, " if files[1:] else ""
    report(
        f"data: train on {describe_size(train)}, held out {describe_size(held)}; tokenizer "
        f"{tokenizer.name} of {tokenizer.vocab:,} ids; {escape(named)} ({count}{joined.kind})"
    )
    content = _digest_content((*files, *held_files), data)
    # The same bytes are other ids. Digests of other files stay what they were.
    if joined.kind == "nanogpt" and joined.ids[0].dtype != np.uint16:
        content.append(joined.ids[0].dtype.name)
    splitting = [len(files)] if held_files else data.eval_fraction
    digest = digest_json(content, tokenizer.fingerprint, splitting)
    return Prepared(train, held, tokenizer, files[0].parent, digest)


def _digest_content(files: tuple[Path, ...], data: config.Data) -> list[str]:
    """SHA-256 of the files, and of Megatron's indexes beside them."""
    indexes = [file.with_suffix(".idx") for file in files]
    indexes = [index for index in indexes if index.exists()]
    found = tuple(Source(file, file.name) for file in (*files, *indexes))
    return hash_sources(found, Path(data.cache).expanduser(), data.workers)
