"""From `config.Data` to token files: `prepare` for a run, `load_text` for a given tokenizer.

The cache is keyed by the content of the files, how they are split and what tokenizes them. So a
changed source gets another cache, and the cache of an unchanged one is used again.
"""

import os
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from gpt_jax import config
from gpt_jax.data.read import remote, sources
from gpt_jax.data.read.sources import Source
from gpt_jax.data.tokenizers.begin import require_begin
from gpt_jax.data.tokenizers.spec import Spec, make_tokenizer
from gpt_jax.data.tokenizers.vocabulary import Tokenizer, with_frame
from gpt_jax.data.tokens import shards, split, store
from gpt_jax.data.tokens.copies import Copies
from gpt_jax.data.tokens.hashes import hash_sources, locate_stamps
from gpt_jax.data.tokens.shards import Tokens
from gpt_jax.errors import DataError, UsageError
from gpt_jax.files import describe_error, digest_json, hold_lock

Report = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a run trains and is measured on."""

    train: Tokens
    eval: Tokens | None  # None: config.data.eval_fraction is 0 and eval_path is empty
    tokenizer: Tokenizer
    folder: Path  # where the token files lie
    # Digest of the text and of how it is split, whatever the files are called. Of token files it
    # is a digest of the ids.
    content: str


@dataclass(frozen=True, eq=False)
class Cached:
    """A cache folder that was opened."""

    sides: dict[str, Tokens | None]
    tokenizer: Tokenizer
    folder: Path
    content: str  # as Prepared has it


def _make_tokenizer(spec: Spec, corpus: split.SplitCorpus, report: Report) -> Tokenizer:
    """Makes the tokenizer from the text: characters from all of it, BPE from the training side."""
    if spec.vocab:
        report(f"data: training a byte-level BPE of {spec.vocab:,} tokens")
    return make_tokenizer(spec, lambda: corpus.side(split.TRAIN), corpus.characters)


def _digest_content(
    data: config.Data, train: tuple[Source, ...], held: tuple[Source, ...], hashes: list[str]
) -> str:
    """A digest of what the files hold, how they are read, and how they are split."""
    splitting = None if held else [data.split, data.eval_fraction]
    # The kinds of files decide how their bytes are read.
    kinds = [sources.suffixes(source.path) for source in (*train, *held)]
    # Without the task and its options, which are for prepared folders, and without a separator that
    # is not there. So caches keep their names.
    *reading, _, separator, _ = astuple(split.make_reading(data))
    reading += [separator] if separator else []
    return digest_json(len(train), kinds, hashes, reading, splitting)


def _hash_once(
    everything: tuple[Source, ...], root: Path, workers: int, copies: Copies, report: Report
) -> list[str]:
    """`hash_sources`. Of several processes that share the cache, one reads a text of a store."""
    root.mkdir(parents=True, exist_ok=True)
    # A cache that is finished may be read-only, and then nothing is built or remembered.
    is_remote = any(remote.is_remote(source.path) for source in everything)
    if not (is_remote and os.access(root, os.W_OK)):
        return hash_sources(everything, root, workers)

    def read_remote(url: str) -> str:
        return copies.fetch(url).sha256

    def wait() -> None:
        report("data: waiting for another process that reads the same text from its store")

    with hold_lock(locate_stamps(everything, root).with_suffix(".lock"), wait):
        return hash_sources(everything, root, workers, read_remote)


def _check_unchanged(
    everything: tuple[Source, ...], root: Path, data: config.Data, hashes: list[str]
) -> None:
    """Raises DataError if a local file has another SHA-256 by now. Remote ones were copied."""
    places = [i for i, source in enumerate(everything) if not remote.is_remote(source.path)]
    local = tuple(everything[i] for i in places)
    if hash_sources(local, root, data.workers) != [hashes[i] for i in places]:
        raise DataError(f"{', '.join(data.path)}: changed while being read; start again")


def _load_or_build(
    data: config.Data,
    train: tuple[Source, ...],
    held: tuple[Source, ...],
    tokenizer: Tokenizer | Spec,
    report: Report,
) -> Cached:
    """Opens the cache of training sources and held-out sources, built if need be."""
    if data.begin:
        tokenizer = require_begin(tokenizer, "config.data.begin = True")
    root = Path(data.cache).expanduser()
    everything = (*train, *held)
    names = [source.name for source in everything]
    key = tokenizer.name if isinstance(tokenizer, Spec) else tokenizer.fingerprint
    wants_characters = isinstance(tokenizer, Spec) and tokenizer.needs_characters
    begins = (tokenizer.begin,) if isinstance(tokenizer, Tokenizer) and data.begin else ()

    try:
        with Copies(root) as copies, copies.name_urls():
            hashes = _hash_once(everything, root, data.workers, copies, report)
            content = _digest_content(data, train, held, hashes)
            # Without a begin that is not there, so caches keep their names.
            folder = root / digest_json(store.FORMAT, names, content, key, *begins)

            def build(building: Path) -> None:
                local = copies.localize(everything, hashes)
                sides = local[: len(train)], local[len(train) :]
                corpus = split.plan_split(*sides, data, wants_characters)
                for note in corpus.notes:
                    report(f"data: {note}")
                using = tokenizer
                if isinstance(using, Spec):
                    using = _make_tokenizer(using, corpus, report)
                about = data.workers, report, names, {"hashes": hashes}
                store.write_cache(building, corpus.texts(), using, *about, *begins)
                _check_unchanged(everything, root, data, hashes)

            sides, using = store.load_or_build(folder, build, report)
    except OSError as error:
        raise UsageError(
            f"config.data.cache = {data.cache!r}: {describe_error(error)}; choose a folder that "
            "can be written and has room"
        ) from None
    except MemoryError:
        way = "lower config.data.workers, or cut the longest documents"
        raise UsageError(f"{data.where}: memory ran out while it was tokenized; {way}") from None
    if isinstance(tokenizer, Tokenizer):  # The cache may have been built by one without a frame.
        using = with_frame(using, tokenizer.begin, tokenizer.ends)
    return Cached(sides, using, folder, content)


def describe_size(tokens: Tokens | None) -> str:
    """How much text there is, for people."""
    if tokens is None:
        return "nothing"
    plural = "s" if tokens.documents > 1 else ""
    line = f"{tokens.size:,} tokens in {tokens.documents:,} document{plural}"
    lost = shards.describe_lost(tokens)
    return f"{line} ({lost})" if lost else line


def prepare(
    data: config.Data,
    tokenizer: Tokenizer | Spec,
    report: Report = print,
    field: str = "config.data.path",
) -> Prepared:
    """Tokens to train on and held-out tokens, from the cache or built now.

    A Spec is made into a tokenizer from the text. `field` is where the path was given, and messages
    name it. Raises UsageError for paths, files, settings and a cache folder that cannot serve.
    Raises DataError if a source changes meanwhile.
    """
    train = sources.find_sources(data.path, field)
    held = ()
    if data.eval_path:
        held = sources.find_sources(data.eval_path, "config.data.eval_path")

    cached = _load_or_build(data, train, held, tokenizer, report)
    train_tokens = cached.sides["train"]
    held_tokens = cached.sides["eval"]
    if train_tokens is None:
        raise UsageError(f"{field} = {', '.join(data.path)}: the tokenizer makes no tokens of it")

    made = cached.tokenizer
    lossy = "" if made.lossless else " (not lossless: it normalises text)"
    report(
        f"data: train on {describe_size(train_tokens)}, held out {describe_size(held_tokens)}; "
        f"tokenizer {made.name} of {made.vocab:,} ids{lossy}; {cached.folder}"
    )
    for note in made.notes:
        report(f"data: tokenizer {made.name}: {note}")
    return Prepared(train_tokens, held_tokens, made, cached.folder, cached.content)


def load_text(
    paths: tuple[str, ...],
    tokenizer: Tokenizer,
    data: config.Data,
    report: Report = print,
    field: str = "--text",
) -> Tokens:
    """All documents of `paths` as held-out tokens, cached like any other text.

    Of `data` only how text is read, the cache and the workers count. `field` is where the paths
    were given, and messages name it. Raises UsageError when there is no text.
    """
    data = replace(data, path=tuple(paths), eval_path=())
    held = sources.find_sources(data.path, field)
    cached = _load_or_build(data, (), held, tokenizer, report)
    tokens = cached.sides["eval"]
    if tokens is None:
        raise UsageError(f"{field} = {', '.join(paths)}: the tokenizer makes no tokens of it")
    report(f"data: {describe_size(tokens)}; {cached.folder}")
    return tokens
