"""What a run trains and is measured on: one text, or sources with weights (called by experiment,
pipeline, commands).

A path is a folder made by `gpt-jax prepare` or a token file of another tool, whose tokens are used
where they lie, or text files, which are tokenized into the cache.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from gpt_jax import config
from gpt_jax.data.stream import mixture
from gpt_jax.data.tokenizers.spec import Spec, resolve_tokenizer
from gpt_jax.data.tokenizers.vocabulary import FIM_TOKENS, Tokenizer
from gpt_jax.data.tokens import adopt, cache, corpus, mirror
from gpt_jax.data.tokens.cache import Prepared
from gpt_jax.data.tokens.shards import Tokens
from gpt_jax.errors import UsageError
from gpt_jax.files import digest_json


class Part(NamedTuple):
    """One source."""

    name: str
    weight: float
    train: Tokens
    eval: Tokens | None  # None: nothing is held out


@dataclass(frozen=True, eq=False)
class Dataset:
    """All sources, tokenized alike."""

    parts: tuple[Part, ...]
    tokenizer: Tokenizer
    content: str  # digest of the text and of how it is split, as cache.Prepared has it

    @property
    def heldout(self) -> dict[str, Tokens]:
        """The held-out tokens of each source that has any."""
        return {part.name: part.eval for part in self.parts if part.eval is not None}


def of_text(prepared: Prepared) -> Dataset:
    """A text alone, as a Dataset."""
    return Dataset(
        (Part("text", 1.0, prepared.train, prepared.eval),), prepared.tokenizer, prepared.content
    )


def _require(field: str, found: Tokenizer, wanted: Tokenizer | None, what: str) -> None:
    if wanted is not None and wanted.fingerprint != found.fingerprint:
        raise UsageError(
            f"{field}: is tokenized by {found.name} ({found.fingerprint}), and {what} is {wanted.name} "
            f"({wanted.fingerprint}); prepare it again with that tokenizer"
        )


def _folder(path: str, data: config.Data, report) -> Path | None:
    """The folder of shards that `path` means, copied here if it lies on an object store; None
    for text files."""
    if mirror.is_remote_corpus(path):
        return mirror.mirror(path, Path(data.cache).expanduser(), report)
    folder = Path(path).expanduser()
    return folder if corpus.is_corpus(folder) else None


def _open(
    field: str,
    path: str,
    folder: Path,
    data: config.Data,
    required: Tokenizer | None,
    named: Tokenizer | Spec,
) -> corpus.PreparedCorpus:
    """The corpus in `folder`. Raises UsageError if another tokenizer made its tokens.

    That is `required`, or without it the one that `data.tokenizer` names.
    """
    if data.eval_path:
        raise UsageError(
            f"config.data.eval_path = {', '.join(data.eval_path)}: {path} was made by gpt-jax prepare, "
            "which has decided what is held out (--eval_fraction); leave it empty"
        )
    opened = corpus.open_corpus(folder)
    _require(f"{field} = {path}", opened.tokenizer, required, "the tokenizer of this run")
    check_fim(
        data,
        opened.tokenizer.name,
        opened.tokenizer.specials,
        f"prepare {path} again with --tokenizer={opened.tokenizer.name}+fim, or set config.data.fim=0",
    )
    if required is None and data.tokenizer:
        _check_named(field, path, opened.tokenizer, data.tokenizer, named)
    return opened


def _part(field: str, path: str, opened: corpus.PreparedCorpus, name: str, report) -> Part:
    """Source `name` of an opened corpus, with weight 1."""
    sides = opened.sources[name]
    if sides["train"] is None:
        raise UsageError(f"{field} = {path}: its source {name} has no tokens to train on")
    report(
        f"data: {name}: train on {cache.count(sides['train'])}, held out {cache.count(sides['eval'])}; tokenizer "
        f"{opened.tokenizer.name} of {opened.tokenizer.vocab:,} ids; {path}"
    )
    return Part(name, 1.0, sides["train"], sides["eval"])


def load_heldout(
    path: str, data: config.Data, tokenizer: Tokenizer, report: Callable[[str], None]
) -> dict[str, Tokens]:
    """What `gpt-jax evaluate --text` measures on, by the name of its row: all of a text, or what
    a folder made by `gpt-jax prepare` holds out, each of its sources. UsageError, naming --text,
    for one of no use."""
    folder = _folder(path, data, report)
    if folder is None and adopt.is_foreign(path):
        return {path: adopt.heldout(path, tokenizer, report)}
    if folder is None:
        return {path: cache.load_text((path,), tokenizer, data, report=report)}
    opened = corpus.open_corpus(folder)
    _require(f"--text = {path}", opened.tokenizer, tokenizer, "the tokenizer of the checkpoint")
    found = {
        name: sides["eval"] for name, sides in opened.sources.items() if sides["eval"] is not None
    }
    if not found:
        raise UsageError(
            f"--text = {path}: was made by gpt-jax prepare and holds nothing out; prepare it with "
            "--eval_fraction, or give the text itself"
        )
    for name, tokens in found.items():
        report(f"data: {path}: {name}: held out {cache.count(tokens)}")
    return {
        path if len(opened.sources) == 1 else f"{path}/{name}": tokens
        for name, tokens in found.items()
    }


def _check_named(
    field: str, path: str, found: Tokenizer, spec: str, named: Tokenizer | Spec
) -> None:
    """Raises UsageError when the config names another tokenizer than the shards have.

    A tokenizer that is made from text is known by its name alone.
    """
    if isinstance(named, Spec):
        differs = found.name != named.name
    else:
        differs = found.fingerprint != named.fingerprint
    if differs:
        raise UsageError(
            f"config.data.tokenizer = {spec!r}: {field} = {path} is tokenized by {found.name} "
            f"({found.fingerprint}); leave config.data.tokenizer empty to use that, or prepare the text "
            "again"
        )


ADD_FIM = "give config.data.tokenizer the ending +fim, as in bpe:4096+fim"


def check_fim(data: config.Data, name: str, specials: Collection[str], way: str = ADD_FIM) -> None:
    """UsageError for config.data.fim with a tokenizer, called `name`, whose special tokens are
    not enough; `way`: what can be done."""
    if data.fim and (missing := [token for token in FIM_TOKENS if token not in specials]):
        raise UsageError(
            f"config.data.fim = {data.fim}: the tokenizer {name} has no {missing[0]}; {way}"
        )


def load_dataset(
    data: config.Data, report: Callable[[str], None] = print, tokenizer: Tokenizer | None = None
) -> Dataset:
    """The sources of `data`, text files tokenized if need be; `tokenizer` (of a checkpoint)
    takes the place of `data.tokenizer`. UsageError for paths and settings of no use; DataError
    for damaged shards."""
    wanted = tokenizer or resolve_tokenizer(data.tokenizer)
    if data.fim and (tokenizer or data.tokenizer):  # else the tokenizer is that of a folder
        check_fim(data, data.tokenizer or wanted.name, wanted.specials)
    if data.sources and data.path:
        raise UsageError(
            f"config.data.sources and config.data.path = {', '.join(data.path)}: give one of them"
        )
    if data.sources:
        return _mixture(data, report, tokenizer, wanted)
    if data.phases or data.temperature:
        raise UsageError(
            "config.data.phases and config.data.temperature: are for config.data.sources, which is empty"
        )
    if data.weights != "tokens":
        raise UsageError(
            f"config.data.weights = {data.weights!r}: is for config.data.sources, which is empty"
        )
    folders = {path: folder for path in data.path if (folder := _folder(path, data, report))}
    if any(path not in folders and adopt.is_foreign(path) for path in data.path):
        is_named = (tokenizer or data.tokenizer) and isinstance(wanted, Tokenizer)
        return of_text(adopt.adopt(data.path, data, wanted if is_named else None, report))
    if not folders:
        return of_text(cache.prepare(data, wanted, report))
    path, folder = next(iter(folders.items()))
    if len(data.path) > 1:
        raise UsageError(
            f"config.data.path = {', '.join(data.path)}: {path} was made by gpt-jax prepare and cannot be "
            "joined with other paths; name them in config.data.sources"
        )
    opened = _open("config.data.path", path, folder, data, tokenizer, wanted)
    parts = [_part("config.data.path", path, opened, name, report) for name in opened.sources]
    # Without weights each source has its size for one: every token is seen as often as any other.
    parts = tuple(part._replace(weight=float(part.train.size)) for part in parts)
    # The names of several sources seed their orders, so they are part of what a run is.
    content = digest_json(opened.content, *opened.sources) if len(parts) > 1 else opened.content
    return Dataset(parts, opened.tokenizer, content)


def _mixture(
    data: config.Data, report, tokenizer: Tokenizer | None, wanted: Tokenizer | Spec
) -> Dataset:
    """`tokenizer` is that of a checkpoint, `wanted` that one or what the config names."""
    names = [name for name, _, _ in data.sources]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"config.data.sources: {twice[0]} is named twice")
    if missing := [name or path for name, path, _ in data.sources if not name or not path]:
        raise UsageError(f"config.data.sources: {missing[0]!r} needs both a name and a path")
    if "all" in names:
        raise UsageError(
            "config.data.sources: all is the name of the sum; give the source another one"
        )
    if data.eval_path:
        raise UsageError(
            f"config.data.eval_path = {', '.join(data.eval_path)}: is for config.data.path; of sources "
            "each holds out its own text"
        )
    mixture.check(((0, tuple(weight for _, _, weight in data.sources)), *data.phases), names)
    folders = {
        path: folder for _, path, _ in data.sources if (folder := _folder(path, data, report))
    }
    # What tokenizes the first prepared folder must tokenize all others, and tokenizes text files.
    opened = {}
    for path, folder in folders.items():
        opened[path] = _open("config.data.sources", path, folder, data, tokenizer, wanted)
        tokenizer = opened[path].tokenizer
    wanted = tokenizer or wanted
    if isinstance(wanted, Spec):
        raise UsageError(
            f"config.data.tokenizer = {data.tokenizer!r}: is made from text, and with several sources "
            "that is done once for all: gpt-jax prepare --input NAME=PATH … --output=DIR, then name DIR "
            "in config.data.sources"
        )
    parts, contents = [], []
    for i, (name, path, weight) in enumerate(data.sources):
        if path in opened:
            there = _name_there(f"config.data.sources[{i}]", name, path, opened[path])
            part = _part(f"config.data.sources[{i}]", path, opened[path], there, report)
            content = f"{opened[path].content} {there}"
        else:
            one = replace(data, path=(path,), sources=())

            def say(line, name=name):
                return report(f"{name}: {line}")

            found = of_text(
                adopt.adopt((path,), one, wanted, say, f"config.data.sources[{i}]")
                if adopt.is_foreign(path)
                else cache.prepare(one, wanted, say, f"config.data.sources[{i}]")
            )
            part, content = found.parts[0], found.content
        parts.append(part._replace(name=name, weight=weight))
        contents.append([name, content])
    return Dataset(tuple(parts), wanted, digest_json(contents))


def _name_there(field: str, name: str, path: str, opened: corpus.PreparedCorpus) -> str:
    """What the folder calls the source: by the same name, or it is the only one."""
    if name in opened.sources or len(opened.sources) == 1:
        return name if name in opened.sources else next(iter(opened.sources))
    raise UsageError(
        f"{field} = {name}: {path} holds several sources; name one of {', '.join(opened.sources)}"
    )
