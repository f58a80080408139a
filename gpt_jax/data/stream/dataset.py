"""The tokens that a run trains and is measured on: one text, or sources with weights.

A path names a folder made by `gpt-jax prepare`, a token file of another tool, or text files. The
tokens of the first two are used where they lie. Text files are tokenized into the cache.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from gpt_jax import config
from gpt_jax.data.stream import mixture
from gpt_jax.data.stream.fitting import check_begin, check_fim, check_named, require_tokenizer
from gpt_jax.data.tasks.tasks import TaskNote
from gpt_jax.data.tokenizers.begin import (
    begins_documents,
    keep_frame,
    name_begin,
    require_begin,
)
from gpt_jax.data.tokenizers.spec import Spec, resolve_tokenizer
from gpt_jax.data.tokenizers.vocabulary import Tokenizer
from gpt_jax.data.tokens import adopt, cache, corpus, mirror
from gpt_jax.data.tokens.cache import Prepared
from gpt_jax.data.tokens.shards import Tokens
from gpt_jax.errors import UsageError, escape
from gpt_jax.files import digest_json


class Part(NamedTuple):
    """One source."""

    name: str
    weight: float
    train: Tokens
    eval: Tokens | None  # None if nothing is held out
    task: TaskNote | None = None  # of a folder made with --task


@dataclass(frozen=True, eq=False)
class Dataset:
    """All sources, tokenized by one tokenizer."""

    parts: tuple[Part, ...]
    tokenizer: Tokenizer
    content: str  # digest of the text and of how it is split, as in cache.Prepared
    # The tokens of config.eval.sets by name, see sets.load_sets.
    sets: Mapping[str, Tokens] = field(default_factory=dict)
    set_digests: Mapping[str, str] = field(default_factory=dict)  # of their ids and documents

    @property
    def tasks(self) -> tuple[TaskNote, ...]:
        """The tasks of all sources, each once."""
        return tuple(dict.fromkeys(part.task for part in self.parts if part.task))

    @property
    def heldout(self) -> dict[str, Tokens]:
        """The held-out tokens of each source that has any."""
        return {part.name: part.eval for part in self.parts if part.eval is not None}


def read_note(manifest: Mapping) -> TaskNote | None:
    """The task of a corpus, or None if all of its text is learned as it stands."""
    settings = manifest["settings"]
    if "task" not in settings:
        return None
    return TaskNote(settings["task"], tuple(settings.get("task_options", {}).items()))


def of_text(prepared: Prepared) -> Dataset:
    """A Dataset of one text."""
    part = Part("text", 1.0, prepared.train, prepared.eval)
    return Dataset((part,), prepared.tokenizer, prepared.content)


def _folder(path: str, data: config.Data, report) -> Path | None:
    """The folder of shards that `path` names, or None if it names no folder of shards.

    A folder on an object store is copied to this machine first.
    """
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

    That is `required`, which the corpus may extend by further ids, or without it the one that
    `data.tokenizer` names.
    """
    if data.eval_path:
        raise UsageError(
            f"config.data.eval_path = {', '.join(data.eval_path)}: {path} was made by gpt-jax "
            "prepare, which has decided what is held out (--eval_fraction); leave it empty"
        )

    opened = corpus.open_corpus(folder)
    check_begin(field, path, opened, data)
    tokenizer = opened.tokenizer
    if required is None or not tokenizer.extends(required):
        require_tokenizer(f"{field} = {path}", tokenizer, required, "the tokenizer of this run")
    way_out = f"prepare {path} again with --tokenizer={tokenizer.name}+fim"
    check_fim(data, tokenizer.name, tokenizer.specials, f"{way_out}, or set config.data.fim=0")
    if required is None and data.tokenizer:
        check_named(field, path, tokenizer, data.tokenizer, named)
    return replace(opened, tokenizer=keep_frame(tokenizer, required, f"{field} = {path}"))


def _tell_begin(dataset: Dataset, data: config.Data, report) -> None:
    """Says it if documents lack the token that prompts of the model begin with."""
    tokenizer = dataset.tokenizer
    if data.begin or not begins_documents(tokenizer):
        return
    firsts = {int(part.train.ids(0, 1)[0]) for part in dataset.parts}
    if firsts != {tokenizer.begin}:  # A token file may have it.
        report(
            f"data: prompts of the model begin with {name_begin(tokenizer)}, and the documents do "
            "not; config.data.begin=true puts it there"
        )


def _part(field: str, path: str, opened: corpus.PreparedCorpus, name: str, report) -> Part:
    """Source `name` of an opened corpus, with weight 1.

    Raises UsageError if the source has no tokens to train on.
    """
    sides = opened.sources[name]
    if sides["train"] is None:
        raise UsageError(f"{field} = {path}: its source {name} has no tokens to train on")
    if opened.manifest["sources"][name]["train"].get("learned", 1) == 0:
        raise UsageError(
            f"{field} = {path}: its source {name} has no token that is learned (--task), so there "
            "is nothing to predict; prepare rows with answers"
        )

    train = cache.describe_size(sides["train"])
    heldout = cache.describe_size(sides["eval"])
    report(
        f"data: {name}: train on {train}, held out {heldout}; tokenizer "
        f"{opened.tokenizer.name} of {opened.tokenizer.vocab:,} ids; {escape(path)}"
    )
    return Part(name, 1.0, sides["train"], sides["eval"], read_note(opened.manifest))


def load_heldout(
    path: str,
    data: config.Data,
    tokenizer: Tokenizer,
    report: Callable[[str], None],
    field: str = "--text",
    name: str = "",
) -> dict[str, Tokens]:
    """The tokens that `gpt-jax evaluate --text` measures on, by the name of their row.

    They are all of a text. Of a folder made by `gpt-jax prepare` they are what each source holds
    out. A row is called `name`, or by the path, and each of several sources `name/source`. Raises
    UsageError, which names `field`, if the path cannot be used.
    """
    name = name or path
    folder = _folder(path, data, report)
    if folder is None and adopt.is_foreign(path):
        return {name: adopt.adopt_heldout(path, tokenizer, data, report, field)}
    if folder is None:
        return {name: cache.load_text((path,), tokenizer, data, report, field)}

    opened = corpus.open_corpus(folder)
    check_begin(field, path, opened, data)
    what = "the tokenizer of the checkpoint"
    require_tokenizer(f"{field} = {path}", opened.tokenizer, tokenizer, what)
    heldout = {
        source: sides["eval"]
        for source, sides in opened.sources.items()
        if sides["eval"] is not None
    }
    if not heldout:
        raise UsageError(
            f"{field} = {path}: was made by gpt-jax prepare and holds nothing out; prepare it with "
            "--eval_fraction, or give the text itself"
        )

    for source, tokens in heldout.items():
        report(f"data: {escape(path)}: {source}: held out {cache.describe_size(tokens)}")
    is_alone = len(opened.sources) == 1
    return {name if is_alone else f"{name}/{source}": tokens for source, tokens in heldout.items()}


def _check_without_sources(data: config.Data) -> None:
    """Raises UsageError for a field that has no meaning while config.data.sources is empty."""
    if data.phases or data.temperature:
        raise UsageError(
            "config.data.phases and config.data.temperature: are for config.data.sources, which "
            "is empty"
        )
    if data.weights != "tokens":
        raise UsageError(
            f"config.data.weights = {data.weights!r}: is for config.data.sources, which is empty"
        )


def load_dataset(
    data: config.Data, report: Callable[[str], None] = print, tokenizer: Tokenizer | None = None
) -> Dataset:
    """The sources of `data`. Text files are tokenized first unless the cache has them.

    `tokenizer`, which a checkpoint has, takes the place of `data.tokenizer`. Raises UsageError if
    paths or settings cannot be used. Raises DataError if shards are damaged.
    """
    dataset = _load(data, report, tokenizer)
    _tell_begin(dataset, data, report)
    return dataset


def _load(data: config.Data, report, tokenizer: Tokenizer | None) -> Dataset:
    """The sources of `data`, see `load_dataset`."""
    wanted = tokenizer or resolve_tokenizer(data.tokenizer)
    # If no tokenizer is named, `_open` checks the one of the folder.
    if data.fim and (tokenizer or data.tokenizer):
        check_fim(data, data.tokenizer or wanted.name, wanted.specials)
    if data.sources and data.path:
        raise UsageError(
            f"config.data.sources and config.data.path = {', '.join(data.path)}: give one of them"
        )
    if data.sources:
        return _mixture(data, report, tokenizer, wanted)

    _check_without_sources(data)
    folders = {path: folder for path in data.path if (folder := _folder(path, data, report))}
    if any(path not in folders and adopt.is_foreign(path) for path in data.path):
        is_named = tokenizer or data.tokenizer
        named = wanted if is_named and isinstance(wanted, Tokenizer) else None
        return of_text(adopt.adopt(data.path, data, named, report))
    if not folders:
        return of_text(cache.prepare(data, wanted, report))

    path, folder = next(iter(folders.items()))
    if len(data.path) > 1:
        raise UsageError(
            f"config.data.path = {', '.join(data.path)}: {path} was made by gpt-jax prepare and "
            "cannot be joined with other paths; name them in config.data.sources"
        )

    opened = _open("config.data.path", path, folder, data, tokenizer, wanted)
    parts = [_part("config.data.path", path, opened, name, report) for name in opened.sources]
    # The weight of each source is its size, so that every token is seen as often as any other.
    parts = tuple(part._replace(weight=float(part.train.size)) for part in parts)

    # The names of several sources seed their orders, so they are part of what a run is.
    content = digest_json(opened.content, *opened.sources) if len(parts) > 1 else opened.content
    return Dataset(parts, opened.tokenizer, content)


def _check_sources(data: config.Data) -> None:
    """Raises UsageError if config.data.sources or a field that goes with it cannot be used."""
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
            f"config.data.eval_path = {', '.join(data.eval_path)}: is for config.data.path; of "
            "sources each holds out its own text"
        )
    weights = tuple(weight for _, _, weight in data.sources)
    mixture.check(((0, weights), *data.phases), names)


def _mixture(
    data: config.Data, report, tokenizer: Tokenizer | None, wanted: Tokenizer | Spec
) -> Dataset:
    """The Dataset of config.data.sources.

    `tokenizer` is that of a checkpoint. `wanted` is the same one, or the one that the config
    names. Raises UsageError if the sources cannot be used together.
    """
    _check_sources(data)
    folders = {
        path: folder for _, path, _ in data.sources if (folder := _folder(path, data, report))
    }

    # The tokenizer of the first prepared folder must be that of all others. It also tokenizes the
    # text files.
    opened = {}
    for path, folder in folders.items():
        opened[path] = _open("config.data.sources", path, folder, data, tokenizer, wanted)
        tokenizer = opened[path].tokenizer
    wanted = tokenizer or wanted
    if isinstance(wanted, Spec):
        raise UsageError(
            f"config.data.tokenizer = {data.tokenizer!r}: is made from text, and with several "
            "sources that is done once for all: gpt-jax prepare --input NAME=PATH … --output=DIR, "
            "then name DIR in config.data.sources"
        )

    if data.begin:
        wanted = require_begin(wanted, "config.data.begin = True")
    parts = []
    contents = []
    for i, (name, path, weight) in enumerate(data.sources):
        field = f"config.data.sources[{i}]"
        if path in opened:
            corpus_name = _name_in_corpus(field, name, path, opened[path])
            part = _part(field, path, opened[path], corpus_name, report)
            content = f"{opened[path].content} {corpus_name}"
        else:
            text = _load_source(field, name, path, data, wanted, report)
            part = text.parts[0]
            content = text.content
        parts.append(part._replace(name=name, weight=weight))
        contents.append([name, content])
    return Dataset(tuple(parts), wanted, digest_json(contents))


def _load_source(
    field: str, name: str, path: str, data: config.Data, tokenizer: Tokenizer, report
) -> Dataset:
    """Source `name`, which is text files or a token file of another tool, as a Dataset."""
    alone = replace(data, path=(path,), sources=())

    def report_source(line):
        return report(f"{name}: {line}")

    if adopt.is_foreign(path):
        return of_text(adopt.adopt((path,), alone, tokenizer, report_source, field))
    return of_text(cache.prepare(alone, tokenizer, report_source, field))


def _name_in_corpus(field: str, name: str, path: str, opened: corpus.PreparedCorpus) -> str:
    """What the folder calls source `name`: the same, unless its only source has another name.

    Raises UsageError if several sources have other names.
    """
    if name in opened.sources:
        return name
    if len(opened.sources) == 1:
        return next(iter(opened.sources))
    raise UsageError(
        f"{field} = {name}: {path} holds several sources; name one of {', '.join(opened.sources)}"
    )
