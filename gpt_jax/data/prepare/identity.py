"""What tells one call of `gpt-jax prepare` from another.

That is its settings, the code of its filters, and the state of its input. A later call continues
the work of an earlier one only where all of them are the same, and the program is too.
"""

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from gpt_jax.data.prepare import filters
from gpt_jax.data.prepare.units import WORK, PrepareSettings
from gpt_jax.data.read import hub, remote
from gpt_jax.data.read.sources import HUB, Source
from gpt_jax.data.tokenizers.spec import Spec
from gpt_jax.data.tokenizers.vocabulary import Tokenizer
from gpt_jax.data.tokens import corpus
from gpt_jax.errors import UsageError
from gpt_jax.files import describe_error, digest_file
from gpt_jax.schema import Each, read_json

Say = Callable[[str], None]

DATA = Path(__file__).resolve().parents[1]  # gpt_jax/data
# Rooms of the code that turns text into shards.
ROOMS = ("read", "tasks", "tokenizers", "tokens", "prepare")
# Packages whose other version may read, filter or tokenize otherwise.
PACKAGES = (
    "datasets",
    "datasketch",
    "jinja2",
    "numpy",
    "py3langid",
    "pyarrow",
    "sentencepiece",
    "tokenizers",
)

# Input of so many bytes at most is hashed when it has become a corpus, which takes seconds.
HASHED_BYTES = 4e9

# Keys of the settings that are no flags, in words.
WORDS = {
    "code": "the source code of --filters",
    "revisions": "the revision of --input",
}


# What settings.json holds that is looked into. All else is compared as it is.
SETTINGS_SCHEMA = {"program?": Each("text"), "revisions?": Each("text")}


# ---- settings ----


def describe(
    settings: PrepareSettings,
    tokenizer: Tokenizer | Spec,
    sources: Mapping[str, Sequence[Source]],
    revisions: Mapping[str, str],
) -> dict:
    """The settings as the manifest has them, by the names of the flags.

    They include the code of the user's own filters and the commits of data sets, if there are any.
    """
    about = asdict(settings)
    about |= about.pop("reading") | {"input": list(sources)}
    # As it was written before there were tasks, separators and tokens that begin documents.
    if about["task"] == "plain":
        del about["task"]
    about["task_options"] = dict(about["task_options"])
    for key in ("task_options", "separator", "begin"):
        if not about[key]:
            del about[key]
    if isinstance(tokenizer, Spec):
        about["tokenizer"] = tokenizer.name
    else:
        about["tokenizer"] = f"{tokenizer.name} ({tokenizer.fingerprint})"

    pinned = {"code": filters.digest_code(settings.filters), "revisions": dict(revisions)}
    about |= {key: value for key, value in pinned.items() if value}
    return json.loads(json.dumps(about))  # tuples become lists, as they are when read back


def refuse_other(folder: Path, then: dict, now: dict) -> None:
    """Raises UsageError if the settings of an earlier call differ from those of this one."""
    other = [key for key in {**now, **then} if then.get(key) != now.get(key)]
    if other:
        differences = ", ".join(
            f"{WORDS.get(key, f'--{key}')} was {then.get(key)} and is {now.get(key)}"
            for key in other
        )
        raise UsageError(
            f"--output={folder}: was begun with other settings: {differences}; give the same ones, "
            "choose another folder, or remove this one"
        )


# ---- the program ----


def identify_program() -> dict[str, str]:
    """What decides the output beside settings and input: our code, Python and packages."""
    program = {
        "code": digest_sources(DATA),
        "python": ".".join(platform.python_version_tuple()[:2]),
    }
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            program[name] = metadata.version(name)
    return program


def digest_sources(folder: Path) -> str:
    """Eight hex digits of the .py files of ROOMS, which lie in `folder`."""
    digest = hashlib.sha256()
    for path in sorted(path for room in ROOMS for path in (folder / room).glob("*.py")):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def refuse_other_program(folder: Path, then: dict | None, now: dict) -> None:
    """Raises UsageError if another version of the program began the work.

    `then` is what it noted, which is None for versions that noted nothing.
    """
    if then == now:
        return
    then = then or {}
    differences = ", ".join(
        f"{key} was {then.get(key, 'not noted')} and is {now.get(key, 'missing')}"
        for key in {**now, **then}
        if then.get(key) != now.get(key)
    )
    raise UsageError(
        f"--output={folder}: was begun by another version of this program: {differences}; the two "
        "may make different tokens, so finish it with that version, choose another folder, or "
        "remove this one"
    )


# ---- settings of an earlier call ----


def read_settings(folder: Path) -> dict:
    """The settings that an earlier call has left in a folder, finished or not; {} without one."""
    if corpus.is_corpus(folder):
        return corpus.read_manifest(folder)["settings"]
    try:
        return read_json((folder / WORK / "settings.json").read_bytes(), SETTINGS_SCHEMA)
    except (OSError, ValueError):
        # What is wrong with a folder is said where it is written to.
        return {}


# ---- the input ----


def pin_revisions(
    sources: Mapping[str, Sequence[Source]], before: Mapping[str, str], say: Say
) -> tuple[dict[str, tuple[Source, ...]], dict[str, str]]:
    """The sources, those of the hub with a commit in their path; and {path as typed: its commit}.

    The commit is that of an earlier call for this folder (`before`), else the hub's newest.
    """
    pinned = {}
    revisions = {}
    for name, group in sources.items():
        paths = []
        for source in group:
            path = source.path
            if isinstance(path, str) and path.startswith(HUB):
                path = _pin(path, before.get(path), say)
                if hub.parse_name(path).pinned:
                    revisions[source.path] = hub.parse_name(path).revision
            paths.append(source._replace(path=path))
        pinned[name] = tuple(paths)
    return pinned, revisions


def _pin(path: str, commit: str | None, say: Say) -> str:
    """`path` with `commit`, or with the hub's newest. Says which commit it is."""
    pinned = hub.with_revision(path, commit) if commit else hub.pin(path, say)
    name = hub.parse_name(pinned)
    if name.pinned:
        say(f"{path}: revision {name.revision}{', as before' if commit else ''}")
    return pinned


def locate(path: Path | str) -> str:
    """Where an input lies, however the path to it is spelt.

    A URL stays as it is. A file has its absolute path.
    """
    if remote.is_remote(path) or str(path).startswith(HUB):
        return str(path)
    return str(Path(path).resolve())


def stamp(path: Path | str) -> tuple[int, str]:
    """(bytes of a file or a data set, what changes when it does).

    Of a local file these are the times of its content and of its inode, because a program can set
    back the first. Raises UsageError if it cannot be read.
    """
    if isinstance(path, str):
        return hub.stamp(path) if path.startswith(HUB) else remote.stamp(path)
    try:
        stat = os.stat(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {describe_error(error)}") from None
    return stat.st_size, f"{stat.st_mtime_ns} {stat.st_ctime_ns}"


def note_inputs(stamps: Mapping[Path | str, tuple[int, str]]) -> dict[str, list[str]]:
    """What inputs.json says of each input: bytes, stamp, and SHA-256 of a small local file.

    Raises UsageError if a file cannot be read.
    """
    facts = {locate(path): [str(size), stamp] for path, (size, stamp) in stamps.items()}
    local = [path for path in stamps if isinstance(path, Path)]
    if sum(stamps[path][0] for path in local) <= HASHED_BYTES:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for path, sha256 in zip(local, pool.map(_hash, local), strict=True):
                facts[locate(path)].append(sha256)
    return facts


def _hash(path: Path) -> str:
    try:
        return digest_file(path).sha256
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {describe_error(error)}") from None


def has_changed(place: str, before: list[str], now: list[str]) -> bool:
    """Whether an input is another than the one that inputs.json tells of.

    Copying a file or changing its owner changes its stamp alone. Its SHA-256 then decides, if it
    was noted. `now` are the bytes and the stamp.
    """
    if len(before) < 2:  # No version has written so little.
        return True
    size, stamp, *sha256 = before
    if [size, stamp] == now:
        return False
    if size != now[0]:
        return True
    if sha256:
        return _hash(Path(place)) != sha256[0]
    # An earlier version noted the time of the content alone.
    return " " in stamp or stamp != now[1].partition(" ")[0]
