"""A folder of token shards made by `gpt-jax prepare`: opened, verified and looked into (called by
dataset, prepare and the prepare command).

    corpus.json                  the manifest, written last: what is inside, and the SHA-256 of every other file
    tokenizer.json               what made the tokens (Tokenizer.to_json)
    SOURCE/train-00000.tokens …  token shards (see shards); `eval-…` where text is held out
    SOURCE/train.offsets .docs   the index over all shards of a side
    SOURCE/origins.json          the input files, for the names of documents
    inputs.json                  where the input was, to notice that it has changed; not part of the corpus
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt_jax.data.tokenizers.spec import tokenizer_from_json
from gpt_jax.data.tokenizers.vocabulary import Tokenizer
from gpt_jax.data.tokens import shards
from gpt_jax.data.tokens.shards import SIDES, Origin, TokenFile, Tokens
from gpt_jax.errors import DataError, UsageError
from gpt_jax.files import digest_file

FORMAT = 1
MANIFEST = "corpus.json"
LONGEST, SAMPLES, SAMPLE_TOKENS = 5, 3, 60  # of --inspect


@dataclass(frozen=True, eq=False)
class PreparedCorpus:
    """An opened folder."""

    tokenizer: Tokenizer
    sources: Mapping[
        str, Mapping[str, Tokens | None]
    ]  # {source: {side: tokens, or None without any}}
    # digest of the texts and of how they are split, whatever the files are called and tokenized by
    content: str
    manifest: dict


def is_corpus(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def seal(manifest: dict) -> bytes:
    """The manifest as it is written, with a digest of itself."""
    return json.dumps(manifest | {"digest": _digest(manifest)}, indent=1).encode()


def _digest(manifest: dict) -> str:
    body = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def parse_manifest(raw: bytes, path: str) -> dict:
    """What `seal` made. DataError for damage, UsageError for another format; `path` for the
    message."""
    try:
        manifest = json.loads(raw)
        whole, number = manifest["digest"] == _digest(manifest), manifest["format"]
    except (ValueError, KeyError, TypeError):
        whole, number = False, FORMAT
    if not whole:
        raise DataError(
            f"{path}: damaged, its digest does not fit; copy it again, or remove the folder and prepare it "
            "again"
        )
    if number != FORMAT:
        raise UsageError(
            f"{path}: has format {number}, this version reads {FORMAT}; prepare it again"
        )
    return manifest


def read_manifest(folder: Path) -> dict:
    """The manifest of a folder. UsageError when it holds no corpus or one of another format,
    DataError for damage."""
    path = folder / MANIFEST
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except (FileNotFoundError, NotADirectoryError):
        unfinished = (
            ": it is unfinished, run the same command again" if (folder / "work").is_dir() else ""
        )
        raise UsageError(
            f"{folder}: no {MANIFEST} there, so no output of gpt-jax prepare{unfinished}"
        ) from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None


def _remedy(folder: Path) -> str:
    return f"copy it again, or remove {folder} and prepare it again"


def check_sizes(folder: Path, manifest: dict) -> None:
    """DataError naming the first file that is missing or has another size than the manifest
    says."""
    for name, (size, _) in manifest["files"].items():
        try:
            found = os.path.getsize(folder / name)
        except OSError as error:
            raise DataError(f"{folder / name}: {error.strerror}; {_remedy(folder)}") from None
        if found != size:
            raise DataError(
                f"{folder / name}: has {found} bytes, {MANIFEST} says {size}; run gpt-jax prepare "
                f"--verify={folder} for all damage, then {_remedy(folder)}"
            )


def open_corpus(folder: Path) -> PreparedCorpus:
    """The tokens in `folder`, read from where they lie. Each file's size is checked, the hashes are
    not (see `verify`).

    UsageError when there is no corpus; DataError naming the file that is missing, cut or does
    not fit."""
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    try:
        tokenizer = tokenizer_from_json((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, UsageError) as error:
        raise DataError(
            f"{folder / 'tokenizer.json'}: damaged ({error}); {_remedy(folder)}"
        ) from None
    if tokenizer.fingerprint != manifest["tokenizer"]["fingerprint"]:
        raise DataError(
            f"{folder / 'tokenizer.json'}: is {tokenizer.fingerprint}, and the shards are of "
            f"{manifest['tokenizer']['fingerprint']}; put back the one that made them"
        )
    sources = {
        name: _open_source(folder / name, source, np.dtype(manifest["dtype"]))
        for name, source in manifest["sources"].items()
    }
    return PreparedCorpus(tokenizer, sources, manifest["content"], manifest)


def _open_source(folder: Path, source: dict, dtype: np.dtype) -> dict[str, Tokens | None]:
    try:
        origins = tuple(
            Origin(*origin) for origin in json.loads((folder / "origins.json").read_bytes())
        )
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{folder / 'origins.json'}: damaged ({error}); {_remedy(folder.parent)}"
        ) from None
    return {side: _open_side(folder, side, source[side], dtype, origins) for side in SIDES}


def _open_side(
    folder: Path, side: str, counts: dict, dtype: np.dtype, origins: tuple[Origin, ...]
) -> Tokens | None:
    if not counts["tokens"]:
        return None
    files = tuple(TokenFile(folder / name, dtype, tokens) for name, tokens in counts["shards"])
    try:
        offsets, docs = shards.open_index(
            folder / side, counts["documents"], sum(file.size for file in files)
        )
    except ValueError as error:
        raise DataError(f"{folder}/{error}; {_remedy(folder.parent)}") from None
    return Tokens(side, files, offsets, docs, counts["bytes"], origins, counts.get("lost", 0))


def verify_corpus(folder: Path, say: Callable[[str], None]) -> list[str]:
    """Reads every file and compares its hash; the names of the damaged ones, each said with what
    is wrong."""
    files = read_manifest(folder)["files"]
    there = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
    for name in there:
        if name not in files and name not in (MANIFEST, "inputs.json"):
            say(f"{folder / name}: is no part of the corpus; it is neither read nor checked")

    def look(name: str) -> str | None:
        size, sha256 = files[name]
        try:
            found = digest_file(folder / name)
        except OSError as error:
            return error.strerror
        if found.size != size:
            return f"has {found.size} bytes instead of {size}"
        return None if found.sha256 == sha256 else "its checksum is wrong"

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the interpreter's lock
        wrong = {name: reason for name, reason in zip(files, pool.map(look, files)) if reason}
    for name, reason in wrong.items():
        say(f"{folder / name}: {reason}")
    return list(wrong)


# ---- looking inside ----


def inspect_corpus(folder: Path) -> Iterator[str]:
    """Lines for people: sources, documents, tokens, bytes a token, what was left out, longest
    documents, samples."""
    corpus = open_corpus(folder)
    tokenizer = corpus.tokenizer
    yield from _summary(folder, corpus)
    for name, sides in corpus.sources.items():
        for side, tokens in sides.items():
            if tokens is not None:
                yield from _look_at(f"{name}/{side}", tokens, tokenizer)


def summarize_corpus(folder: Path) -> Iterator[str]:
    """The first lines of `inspect`: what is inside, and what was left out."""
    yield from _summary(folder, open_corpus(folder))


def _summary(folder: Path, corpus: PreparedCorpus) -> Iterator[str]:
    tokenizer = corpus.tokenizer
    yield (
        f"{folder}: tokenizer {tokenizer.name} of {tokenizer.vocab:,} ids ({tokenizer.fingerprint}), "
        f"{corpus.manifest['dtype']}, content {corpus.content}"
    )
    yield from _table(corpus)
    yield from left_out(corpus.manifest["counts"])
    part = corpus.manifest["settings"]["eval_fraction"]
    for name, sides in corpus.sources.items():
        if part and sides["eval"] is None and sides["train"] is not None:
            yield (
                f"{name}: none of its {sides['train'].documents:,} documents was held out (--eval_fraction={part:g} goes by "
                "their hashes), so runs will know no held-out loss of it; cut it into more documents, or hold out more"
            )
        for side, tokens in sides.items():
            if tokens is not None and tokens.lost:
                yield (
                    f"{name}/{side}: {shards.lost(tokens)}; a tokenizer with byte fallback, or one that is trained "
                    "on such text, keeps it"
                )


def _table(corpus: PreparedCorpus) -> Iterator[str]:
    rows = [
        ("source", "side", "shards", "documents", "tokens", "bytes", "bytes/token", "tokens/byte")
    ]
    total = {side: [0, 0, 0, 0] for side in SIDES}
    for name, sides in corpus.sources.items():
        for side, tokens in sides.items():
            found = (
                [0] * 4
                if tokens is None
                else [len(tokens.shards), tokens.documents, tokens.size, tokens.bytes]
            )
            total[side] = [a + b for a, b in zip(total[side], found)]
            rows.append(_row(name, side, *found))
    if len(corpus.sources) > 1:
        rows += [_row("all", side, *found) for side, found in total.items()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        yield "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths))
        )


def _row(
    name: str, side: str, files: int, documents: int, tokens: int, size: int
) -> tuple[str, ...]:
    return (
        name,
        side,
        f"{files:,}",
        f"{documents:,}",
        f"{tokens:,}",
        f"{size:,}",
        f"{size / tokens:.3f}" if tokens else "-",
        f"{tokens / size:.4f}" if size else "-",
    )


def left_out(counts: dict) -> Iterator[str]:
    """What was read and what of it is not in the corpus, as lines."""
    yield f"read: {counts['documents']:,} documents with text; {counts['empty']:,} empty ones left out"
    yield (
        f"duplicates: {counts['exact']:,} exact, {counts['near']:,} near left out"
        if counts["dedup"] != "none"
        else ("duplicates: not looked for (--dedup=none)")
    )
    for name, number in sorted(counts["filtered"].items()):
        yield f"filter {name}: {number:,} documents left out"
    if counts["skipped"]:
        yield f"rows that could not be read: {counts['skipped']:,} skipped, such as {'; '.join(counts['places'])}"
    if counts["replaced"]:
        yield f"undecodable places: {counts['replaced']:,} replaced by U+FFFD"
    others = {name: number for name, number in counts["encodings"].items() if name != "utf-8"}
    if others:
        yield "encodings: " + ", ".join(
            f"{number:,} documents in {name}" for name, number in sorted(others.items())
        )


def _look_at(name: str, tokens: Tokens, tokenizer: Tokenizer) -> Iterator[str]:
    sizes = np.diff(tokens.offsets)
    longest = np.argsort(-sizes, kind="stable")[:LONGEST]
    again = tokens.documents - len(np.unique(tokens.docs["hash"]))
    yield ""
    yield f"{name}: copies of another document inside: {again:,}; longest documents"
    for number in longest:
        yield f"  {sizes[number]:>12,} tokens  {tokens.document_name(int(number))}"
    yield f"{name}: samples"
    for number in np.unique(np.linspace(0, tokens.documents - 1, SAMPLES).astype(int)):
        start, stop = int(tokens.offsets[number]), int(tokens.offsets[number + 1])
        ids = tokens.ids(start, min(stop, start + SAMPLE_TOKENS))
        cut = "…" if stop - start > SAMPLE_TOKENS else ""
        yield f"  {tokens.document_name(int(number))}: {tokenizer.decode(ids)!r}{cut}"
