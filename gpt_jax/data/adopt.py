"""Token files of other tools as what a run trains on, read where they lie (called by dataset)."""

from pathlib import Path
from typing import Callable

import numpy as np

from gpt_jax import config
from gpt_jax.data import cache, store
from gpt_jax.data.cache import Prepared
from gpt_jax.data.foreign import Foreign, open_foreign
from gpt_jax.data.shards import DOCUMENT, Origin, TokenArray, Tokens, digest
from gpt_jax.data.sources import Source
from gpt_jax.data.tokenizer import Tokenizer, known_tokenizer
from gpt_jax.errors import UsageError

SUFFIXES = (".bin", ".idx", ".npy")
AT_ONCE = 1 << 24  # ids whose bytes are counted at once


def is_foreign(path: str) -> bool:
    """Whether a path is a token file by its name."""
    return path.endswith(SUFFIXES)


def _side(name: str, found: Foreign, first: int, last: int, tokenizer: Tokenizer, origin: Origin) -> Tokens:
    """Documents `first` to `last` of a token file."""
    start, stop = int(found.offsets[first]), int(found.offsets[last])
    ids = found.tokens[start:stop]
    largest, size = 0, 0
    for at in range(0, len(ids), AT_ONCE):
        part = ids[at: at + AT_ONCE]
        largest = max(largest, int(part.max()))
        if largest >= tokenizer.vocab:
            raise UsageError(f"{origin.name}: holds the id {largest}, and config.data.tokenizer = {tokenizer.name} has "
                             f"{tokenizer.vocab} ids; name the tokenizer that made the file")
        size += int(tokenizer.token_bytes[part].sum(dtype=np.int64))
    docs = np.zeros(last - first, DOCUMENT)
    docs["row"] = np.arange(first, last)
    return Tokens(name, (TokenArray(ids),), found.offsets[first: last + 1] - start, docs, size, (origin,))


def _open(path: str, tokenizer: Tokenizer) -> tuple[Foreign, Origin]:
    found = open_foreign(Path(path).expanduser(), tokenizer.eot)
    return found, Origin(Path(path).name, 0, len(found.offsets) > 2)


def adopt(path: str, data: config.Data, wanted: Tokenizer | None, report: Callable[[str], None]) -> Prepared:
    """Train and held-out tokens of a token file: config.data.eval_path is another one, or the last eval_fraction of the
    documents (of a file of one document, of its tokens) is held out. All ids are looked at once, to be sure that they
    are in the vocabulary. UsageError for a file or tokenizer of no use."""
    tokenizer = wanted or known_tokenizer(data.tokenizer)
    if tokenizer is None or not (wanted or data.tokenizer):
        raise UsageError(f"config.data.tokenizer = {data.tokenizer!r}: {path} does not say which tokenizer made its "
                         "ids; name it by its file, such as tokenizer.json or a folder of encoder.json and vocab.bpe")
    found, origin = _open(path, tokenizer)
    paths, held = [path], None
    if data.eval_path:
        if len(data.eval_path) > 1 or not is_foreign(data.eval_path[0]):
            raise UsageError(f"config.data.eval_path = {', '.join(data.eval_path)}: expected one token file, as "
                             f"config.data.path = {path} is")
        paths.append(data.eval_path[0])
        other, its_origin = _open(data.eval_path[0], tokenizer)
        held = _side("eval", other, 0, len(other.offsets) - 1, tokenizer, its_origin)
        cut = len(found.offsets) - 1
    else:
        border = int(len(found.tokens) * (1 - data.eval_fraction))
        if len(found.offsets) == 2 and data.eval_fraction:
            found = found._replace(offsets=np.array([0, border, len(found.tokens)]))
        cut = max(1, int(np.searchsorted(found.offsets[:-1], border, "left")))
        if data.eval_fraction:
            cut = min(cut, len(found.offsets) - 2)
            held = _side("eval", found, cut, len(found.offsets) - 1, tokenizer, origin)
    train = _side("train", found, 0, cut, tokenizer, origin)
    report(f"data: train on {cache.count(train)}, held out {cache.count(held)}; tokenizer {tokenizer.name} of "
           f"{tokenizer.vocab:,} ids; {path} ({found.kind})")
    files = tuple(Source(Path(p).expanduser(), p) for p in paths)
    hashes = store.content_hashes(files, Path(data.cache).expanduser(), 1)
    return Prepared(train, held, tokenizer, Path(path).parent,
                    digest(hashes, tokenizer.fingerprint, None if data.eval_path else data.eval_fraction))
