"""A corpus told in lines for people: what `gpt-jax prepare --inspect` prints."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpt_jax.data.tokenizers.vocabulary import Tokenizer
from gpt_jax.data.tokens import shards
from gpt_jax.data.tokens.corpus import PreparedCorpus, open_corpus
from gpt_jax.data.tokens.shards import SIDES, Tokens

LONGEST = 5  # documents that are named
SAMPLES = 3  # documents of which the beginning is shown
SAMPLE_TOKENS = 60


def inspect_corpus(folder: Path) -> Iterator[str]:
    """Sources, documents, tokens, bytes a token, what was left out, longest documents, samples.

    Raises UsageError and DataError as `open_corpus` does.
    """
    corpus = open_corpus(folder)
    yield from _summarize(folder, corpus)
    for name, sides in corpus.sources.items():
        for side, tokens in sides.items():
            if tokens is not None:
                yield from _describe_side(f"{name}/{side}", tokens, corpus.tokenizer)


def summarize_corpus(folder: Path) -> Iterator[str]:
    """The first lines of `inspect_corpus`: what the folder holds, and what was left out."""
    yield from _summarize(folder, open_corpus(folder))


def _summarize(folder: Path, corpus: PreparedCorpus) -> Iterator[str]:
    tokenizer = corpus.tokenizer
    yield (
        f"{folder}: tokenizer {tokenizer.name} of {tokenizer.vocab:,} ids "
        f"({tokenizer.fingerprint}), {corpus.manifest['dtype']}, content {corpus.content}"
    )
    yield from _tabulate(corpus)
    yield from describe_left_out(corpus.manifest["counts"])

    fraction = corpus.manifest["settings"]["eval_fraction"]
    for name, sides in corpus.sources.items():
        train = sides["train"]
        if fraction and sides["eval"] is None and train is not None:
            yield (
                f"{name}: none of its {train.documents:,} documents was held out "
                f"(--eval_fraction={fraction:g} goes by their hashes), so runs will know no "
                "held-out loss of it; cut it into more documents, or hold out more"
            )
        for side, counts in corpus.manifest["sources"][name].items():
            if "learned" in counts:
                yield (
                    f"{name}/{side}: {counts['learned'] / counts['tokens']:.1%} of the tokens are "
                    "learned (--task)"
                )
        for side, tokens in sides.items():
            if tokens is not None and tokens.lost:
                yield (
                    f"{name}/{side}: {shards.describe_lost(tokens)}; a tokenizer with byte "
                    "fallback, or one that is trained on such text, keeps it"
                )


# ---- the table ----


def _tabulate(corpus: PreparedCorpus) -> Iterator[str]:
    """A row for each source and side, and for the sums of several sources."""
    rows = [
        ("source", "side", "shards", "documents", "tokens", "bytes", "bytes/token", "tokens/byte")
    ]
    total = {side: np.zeros(4, int) for side in SIDES}
    for name, sides in corpus.sources.items():
        for side, tokens in sides.items():
            counts = _count(tokens)
            total[side] += counts
            rows.append(_make_row(name, side, counts))
    if len(corpus.sources) > 1:
        rows += [_make_row("all", side, counts) for side, counts in total.items()]

    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        names = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        yield "  ".join([*names, *numbers])


def _count(tokens: Tokens | None) -> list[int]:
    """Shards, documents, tokens and bytes."""
    if tokens is None:
        return [0, 0, 0, 0]
    return [len(tokens.shards), tokens.documents, tokens.size, tokens.bytes]


def _make_row(name: str, side: str, counts) -> tuple[str, str, str, str, str, str, str, str]:
    shards, documents, tokens, size = map(int, counts)
    return (
        name,
        side,
        f"{shards:,}",
        f"{documents:,}",
        f"{tokens:,}",
        f"{size:,}",
        f"{size / tokens:.3f}" if tokens else "-",
        f"{tokens / size:.4f}" if size else "-",
    )


# ---- what was left out ----


def describe_left_out(counts: dict) -> Iterator[str]:
    """What was read, and what of it is not in the corpus."""
    yield (
        f"read: {counts['documents']:,} documents with text; {counts['empty']:,} empty ones left "
        "out"
    )
    if counts["dedup"] == "none":
        yield "duplicates: not looked for (--dedup=none)"
    else:
        yield f"duplicates: {counts['exact']:,} exact, {counts['near']:,} near left out"
    for name, number in sorted(counts["filtered"].items()):
        yield f"filter {name}: {number:,} documents left out"

    if counts["skipped"]:
        places = "; ".join(counts["places"])
        yield f"rows that could not be read: {counts['skipped']:,} skipped, such as {places}"
    if counts["replaced"]:
        yield f"undecodable places: {counts['replaced']:,} replaced by U+FFFD"
    others = {name: number for name, number in counts["encodings"].items() if name != "utf-8"}
    if others:
        parts = [f"{number:,} documents in {name}" for name, number in sorted(others.items())]
        yield f"encodings: {', '.join(parts)}"


# ---- one side ----


def _describe_side(name: str, tokens: Tokens, tokenizer: Tokenizer) -> Iterator[str]:
    sizes = np.diff(tokens.offsets)
    longest = np.argsort(-sizes, kind="stable")[:LONGEST]
    copies = tokens.documents - len(np.unique(tokens.docs["hash"]))
    yield ""
    yield f"{name}: copies of another document inside: {copies:,}; longest documents"
    for number in longest:
        yield f"  {sizes[number]:>12,} tokens  {tokens.document_name(int(number))}"

    yield f"{name}: samples"
    for number in np.unique(np.linspace(0, tokens.documents - 1, SAMPLES).astype(int)):
        start = int(tokens.offsets[number])
        stop = int(tokens.offsets[number + 1])
        ids = tokens.ids(start, min(stop, start + SAMPLE_TOKENS))
        ellipsis = "…" if stop - start > SAMPLE_TOKENS else ""
        yield f"  {tokens.document_name(int(number))}: {tokenizer.decode(ids)!r}{ellipsis}"
