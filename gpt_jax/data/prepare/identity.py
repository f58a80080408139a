"""What tells one call of `gpt-jax prepare` from another: its settings, the code of its filters, the
state of its input (called by prepare). What an earlier call has begun is gone on with only where
all of them are the same.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from gpt_jax.data.prepare import filters
from gpt_jax.data.prepare.units import WORK, PrepareSettings
from gpt_jax.data.read import hub, remote
from gpt_jax.data.read.sources import HUB, Source
from gpt_jax.data.tokenizers.spec import Spec
from gpt_jax.data.tokenizers.vocabulary import Tokenizer
from gpt_jax.data.tokens import corpus
from gpt_jax.errors import UsageError

Say = Callable[[str], None]


def describe(
    settings: PrepareSettings,
    tokenizer: Tokenizer | Spec,
    found: Mapping[str, Sequence[Source]],
    revisions: Mapping[str, str],
) -> dict:
    """The settings as the manifest has them, by the names of the flags; with them the code of
    the user's own filters and the commits of data sets, where there are any."""
    plain = asdict(settings)
    plain |= plain.pop("reading") | {"input": list(found)}
    if isinstance(tokenizer, Spec):
        plain["tokenizer"] = tokenizer.name
    else:
        plain["tokenizer"] = f"{tokenizer.name} ({tokenizer.fingerprint})"
    pinned = {"code": filters.code(settings.filters), "revisions": dict(revisions)}
    plain |= {key: value for key, value in pinned.items() if value}
    return json.loads(json.dumps(plain))  # tuples become lists, as they are when read back


WORDS = {
    "code": "the source code of --filters",
    "revisions": "the revision of --input",
}  # no flags of these names


def refuse_other(folder: Path, then: dict, now: dict) -> None:
    other = [key for key in {**now, **then} if then.get(key) != now.get(key)]
    if other:
        differences = ", ".join(
            f"{WORDS.get(key, f'--{key}')} was {then.get(key)} and is {now.get(key)}"
            for key in other
        )
        raise UsageError(
            f"--output={folder}: was begun with other settings: {differences}; give the same ones, choose "
            "another folder, or remove this one"
        )


def earlier(folder: Path) -> dict:
    """The settings that an earlier call has left in the folder, finished or not; {} without one."""
    if corpus.is_corpus(folder):
        return corpus.read_manifest(folder)["settings"]
    try:
        return json.loads((folder / WORK / "settings.json").read_bytes())
    except (
        OSError,
        ValueError,
    ):  # there is none, and what is wrong with the folder is said where it is written to
        return {}


def pin(
    found: Mapping[str, Sequence[Source]], before: Mapping[str, str], say: Say
) -> tuple[dict[str, tuple[Source, ...]], dict[str, str]]:
    """(the sources, those of the hub with a commit in their path; {path as typed: its commit}).
    The commit is that of an earlier call for this folder (`before`), else the hub's newest."""
    pinned, revisions = {}, {}
    for name, sources in found.items():
        pinned[name] = []
        for source in sources:
            path = source.path
            if str(path).startswith(HUB):
                commit = before.get(path)
                path = hub.at(path, commit) if commit else hub.pin(path, say)
                if hub.parse(path).pinned:
                    revisions[source.path] = hub.parse(path).revision
                    say(
                        f"{source.path}: revision {hub.parse(path).revision}{', as before' if commit else ''}"
                    )
            pinned[name].append(source._replace(path=path))
    return {name: tuple(sources) for name, sources in pinned.items()}, revisions


def place(path: Path | str) -> str:
    """Where an input lies, however the path to it is spelt: URLs as they are, files by their
    absolute path."""
    return (
        str(path)
        if remote.is_remote(path) or str(path).startswith(HUB)
        else str(Path(path).resolve())
    )


def stamp(source: Source) -> tuple[int, str]:
    """(bytes of a file or a data set, what changes when it does)."""
    if str(source.path).startswith(HUB):
        return hub.stamp(source.path)
    if remote.is_remote(source.path):
        return remote.stamp(source.path)
    try:
        stat = os.stat(source.path)
    except OSError as error:
        raise UsageError(f"{source.path}: cannot be read: {error.strerror}") from None
    return stat.st_size, str(stat.st_mtime_ns)
