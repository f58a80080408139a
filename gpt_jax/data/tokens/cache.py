"""From `config.Data` to token files: `prepare` for a run, `load_text` for any text with a given
tokenizer (called by experiment, loop and commands).

The cache is keyed by the content of the files, how they are split and what tokenizes them, so a
changed source is another cache and an unchanged one is found again.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from gpt_jax import config
from gpt_jax.data.read import sources
from gpt_jax.data.tokenizers.spec import Spec, make_tokenizer
from gpt_jax.data.tokenizers.vocabulary import Tokenizer
from gpt_jax.data.tokens import shards, split, store
from gpt_jax.data.tokens.shards import Tokens
from gpt_jax.errors import DataError, UsageError
from gpt_jax.files import digest_json


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a run trains and is measured on."""

    train: Tokens
    eval: Tokens | None  # None: config.data.eval_fraction is 0 and there is no eval_path
    tokenizer: Tokenizer
    folder: Path  # where it all lies
    # digest of the text and of how it is split, whatever the files are called; of token files, of
    # the ids
    content: str


def _make_tokenizer(
    spec: Spec, corpus: split.SplitCorpus, report: Callable[[str], None]
) -> Tokenizer:
    """Makes the tokenizer from the text: characters from all of it, BPE from the training side."""
    if spec.vocab:
        report(f"data: training a byte-level BPE of {spec.vocab:,} tokens")
    return make_tokenizer(spec, lambda: corpus.side(split.TRAIN), corpus.characters)


def _content(data: config.Data, found, held, hashes: list[str]) -> str:
    splitting = None if held else [data.split, data.eval_fraction]
    kinds = [
        sources.suffixes(source.path) for source in (*found, *held)
    ]  # which decide how the bytes are read
    return digest_json(len(found), kinds, hashes, astuple(split.reading_of(data)), splitting)


def _obtain(data: config.Data, found, held, tokenizer: Tokenizer | Spec, report):
    """(sides, tokenizer, folder, content) for training sources `found` and held-out sources
    `held`, built if need be."""
    root = Path(data.cache).expanduser()
    if isinstance(tokenizer, Spec):
        key, wants_characters = tokenizer.name, tokenizer.needs_characters
    else:
        key, wants_characters = tokenizer.fingerprint, False
    try:
        hashes = store.content_hashes((*found, *held), root, data.workers)
        content = _content(data, found, held, hashes)
        folder = root / digest_json(
            store.FORMAT,
            [s.name for s in (*found, *held)],
            content,
            key,
        )

        def build(building: Path) -> None:
            corpus = split.plan(found, held, data, wants_characters)
            for note in corpus.notes:
                report(f"data: {note}")
            using = tokenizer
            if isinstance(using, Spec):
                using = _make_tokenizer(using, corpus, report)
            names = [source.name for source in (*found, *held)]
            store.write(
                building, corpus.texts(), using, data.workers, report, names, {"hashes": hashes}
            )
            if store.content_hashes((*found, *held), root, data.workers) != hashes:
                raise DataError(f"{', '.join(data.path)}: changed while being read; start again")

        sides, using = store.obtain(folder, build, report)
    except OSError as error:
        raise UsageError(
            f"config.data.cache = {data.cache!r}: {error.strerror or error}; choose a folder that can "
            "be written and has room"
        ) from None
    return sides, using, folder, content


def count(tokens: Tokens | None) -> str:
    """How much there is, for people."""
    if tokens is None:
        return "nothing"
    gone = f" ({said})" if (said := shards.lost(tokens)) else ""
    return f"{tokens.size:,} tokens in {tokens.documents:,} document{'s' * (tokens.documents > 1)}{gone}"


def prepare(
    data: config.Data,
    tokenizer: Tokenizer | Spec,
    report: Callable[[str], None] = print,
    field: str = "config.data.path",
) -> Prepared:
    """Tokens to train on and held-out tokens, from the cache or built now.

    A Spec is made into a tokenizer from the text. `field` is where the path was given, for messages.

    UsageError for paths, files, settings or a cache folder of no use; DataError if a source changes
    meanwhile.
    """
    found = sources.find(data.path, field)
    held = sources.find(data.eval_path, "config.data.eval_path") if data.eval_path else ()
    sides, tokenizer, folder, content = _obtain(data, found, held, tokenizer, report)
    train, held_out = sides["train"], sides["eval"]
    if train is None:
        raise UsageError(f"{field} = {', '.join(data.path)}: the tokenizer makes no tokens of it")
    report(
        f"data: train on {count(train)}, held out {count(held_out)}; tokenizer {tokenizer.name} of "
        f"{tokenizer.vocab:,} ids{'' if tokenizer.lossless else ' (not lossless: it normalises text)'}; {folder}"
    )
    return Prepared(train, held_out, tokenizer, folder, content)


def load_text(
    paths: tuple[str, ...],
    tokenizer: Tokenizer,
    data: config.Data,
    report: Callable[[str], None] = print,
) -> Tokens:
    """All documents of `paths` as held-out tokens, cached like any other; of `data` only how
    text is read, cache and workers count. UsageError, naming the flag --text, when there is no
    text."""
    data = replace(data, path=tuple(paths), eval_path=())
    sides, _, folder, _ = _obtain(data, (), sources.find(data.path, "--text"), tokenizer, report)
    if sides["eval"] is None:
        raise UsageError(f"--text = {', '.join(paths)}: the tokenizer makes no tokens of it")
    report(f"data: {count(sides['eval'])}; {folder}")
    return sides["eval"]
