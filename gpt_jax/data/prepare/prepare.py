"""From raw text to a corpus of token shards: what `gpt-jax prepare` does (called by the prepare
command).

The input is cut into units (see units), an engine runs them (see engines), and what they made is
put together (see assemble). Two phases when something has to be known of all documents first
(duplicates, characters), else one.
"""

import contextlib
import fcntl
import functools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt_jax.data.prepare import assemble, filters, identity, survey, units
from gpt_jax.data.prepare.units import WORK, PrepareJob, PrepareSettings, Unit
from gpt_jax.data.prepare.workers import ENGINES, Work
from gpt_jax.data.read import documents as readers
from gpt_jax.data.read.sources import HUB, Source, find
from gpt_jax.data.tokenizers.spec import (
    Spec,
    make_tokenizer,
    resolve_tokenizer,
    tokenizer_from_json,
)
from gpt_jax.data.tokenizers.vocabulary import Tokenizer
from gpt_jax.data.tokens import corpus
from gpt_jax.errors import DataError, UsageError
from gpt_jax.files import digest_json, replace_file

# Input of a unit when --piece_mb is 0: a five-hundredth of all, so that the last units keep all
# workers busy, but no more than is redone gladly after a kill, and no less than is worth three
# files.
UNITS, SMALLEST, LARGEST = 500, 4e6, 64e6


class Engine(NamedTuple):
    """Where the work is done; decides nothing about the output."""

    name: str = "local"  # a row of ENGINES
    workers: int = 1
    address: str = "local"  # of a Ray cluster


class Progress(NamedTuple):
    """How far a phase is."""

    phase: str
    done: int  # bytes of input of the finished units
    total: int
    documents: int  # read since the phase began in this process
    bytes: int  # of their text


Say = Callable[[str], None]
Show = Callable[[Progress], None]


def prepare_corpus(
    inputs: Mapping[str, tuple[str, ...]],
    folder: Path,
    settings: PrepareSettings,
    engine: Engine,
    say: Say,
    show: Show,
) -> dict:
    """Makes the corpus of `inputs` ({source: what sources.find takes}) in `folder`, or goes on
    where an earlier call was ended, and gives its manifest. The same input and settings make the
    same bytes, whatever the engine.

    UsageError for settings, files and a folder of no use, and for a full disk; DataError when
    the input or the module of a filter changes meanwhile; PeerFailed when a worker is killed.
    What is finished stays."""
    tokenizer = resolve_tokenizer(settings.tokenizer, "--tokenizer")
    survey.threshold(settings.dedup)
    filters.parse(settings.filters)
    found = {name: find(paths, f"--input {name}") for name, paths in inputs.items()}
    found, revisions = identity.pin(found, identity.earlier(folder).get("revisions", {}), say)
    stamps = {source.path: identity.stamp(source) for group in found.values() for source in group}
    places = Counter(identity.place(source.path) for group in found.values() for source in group)
    if again := [place for place, times in places.items() if times > 1]:
        more = f", and {len(again) - 1} more file{'s' * (len(again) > 2)}" if again[1:] else ""
        say(
            f"--input: {again[0]} is given {places[again[0]]} times{more}: their documents are taken as often"
        )
    with _output(folder):
        about = identity.describe(settings, tokenizer, found, revisions)
        state = {identity.place(path): list(map(str, value)) for path, value in stamps.items()}
        if corpus.is_corpus(folder):
            return _again(folder, about, state, say)
        _make_room(folder)
        with _locked(folder / WORK / "lock", folder):
            if not corpus.is_corpus(folder):
                _begin(folder, about, say)
                _make(
                    PrepareJob(folder, settings),
                    found,
                    stamps,
                    about,
                    state,
                    tokenizer,
                    engine,
                    say,
                    show,
                )
            assemble.clean(folder, corpus.read_manifest(folder))
    return corpus.read_manifest(folder)


@contextlib.contextmanager
def _output(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"--output={folder}: {error.strerror or error}; make room or choose a folder that can be "
            "written; what is finished stays: the same command goes on from there"
        ) from None


# ---- what is there already ----


def _again(folder: Path, about: dict, state: dict, say: Say) -> dict:
    """The folder is finished: the same call is answered, any other refused."""
    manifest = corpus.read_manifest(folder)
    identity.refuse_other(folder, manifest["settings"], about)
    inputs = folder / assemble.INPUTS  # no part of a corpus, so a copy need not have it
    before = json.loads(inputs.read_bytes()) if inputs.exists() else {}
    before = {identity.place(path): value for path, value in before.items()}
    changed = (
        [path for path in {**before, **state} if before.get(path) != state.get(path)]
        if inputs.exists()
        else []
    )
    if changed:
        more = f" and {len(changed) - 1} more" if changed[1:] else ""
        raise UsageError(
            f"--output={folder}: is finished, and the input has changed since ({changed[0]}{more}); "
            "choose another folder, or remove this one"
        )
    corpus.check_sizes(folder, manifest)
    if assemble.leftovers(folder, manifest):  # else it need not be writable
        (folder / WORK).mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another call has cleaned up meanwhile
            with _locked(folder / WORK / "lock", folder):
                assemble.clean(folder, manifest)
    say(
        f"{folder}: is finished already, with these settings and this input (each file has its size; that its content "
        f"is whole is checked by gpt-jax prepare --verify={folder})"
    )
    return manifest


def _make_room(folder: Path) -> None:
    if folder.is_symlink() and not folder.exists():
        raise UsageError(
            f"--output={folder}: is a link to {os.readlink(folder)}, which is not there; make that folder, or "
            "remove the link"
        )
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output={folder}: is a file; name a folder")
    work = folder / WORK
    if not work.is_dir() and folder.is_dir() and any(folder.iterdir()):
        raise UsageError(
            f"--output={folder}: is not empty, and nothing there was begun by gpt-jax prepare; name a new "
            "folder"
        )
    work.mkdir(parents=True, exist_ok=True)


def _begin(folder: Path, about: dict, say: Say) -> None:
    """Under the lock: a call that is refused leaves no settings behind."""
    work = folder / WORK
    begun = work / "settings.json"
    if begun.exists() and any(
        work.glob("*-*.json")
    ):  # before the first unit is done, nothing would be lost
        identity.refuse_other(folder, json.loads(begun.read_bytes()), about)
        say(f"{folder}: goes on from where an earlier call ended")
    else:
        replace_file(begun, json.dumps(about).encode())


@contextlib.contextmanager
def _locked(path: Path, folder: Path) -> Iterator[None]:
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"--output={folder}: another gpt-jax prepare is at work there; wait for it, or choose "
                "another folder"
            ) from None
        yield  # the end of the process gives the lock back, whatever ends it


# ---- units ----


def plan(
    found: Mapping[str, Sequence[Source]], stamps: Mapping, settings: PrepareSettings, about: dict
) -> list[Unit]:
    """The units in the order of the input. Large files are cut where their format allows it,
    small ones joined."""
    total = sum(size for size, _ in stamps.values())
    target = settings.piece_mb * 1e6 or min(max(total / UNITS, SMALLEST), LARGEST)
    made = []
    for name, sources in found.items():
        number, held, size = 0, [], 0.0
        for source in sources:
            pieces, whole = (
                readers.cut(source, int(target), settings.reading),
                stamps[source.path][0],
            )
            if not whole and str(source.path).startswith(HUB):
                whole = len(pieces) * target  # nobody knows: each shard is a unit
            for piece in pieces:
                held.append(piece)
                size += whole / len(pieces)
                if (
                    size >= 0.6 * target
                ):  # pieces of a file come out a little smaller than asked for
                    made.append(_unit(name, number, held, size, stamps, about))
                    number, held, size = number + 1, [], 0.0
        if held:
            made.append(_unit(name, number, held, size, stamps, about))
    return made


def _unit(name: str, number: int, pieces: list, size: float, stamps: Mapping, about: dict) -> Unit:
    parts = [
        [
            identity.place(piece.source.path),
            piece.source.name,
            piece.start,
            piece.stop,
            *stamps[piece.source.path],
        ]
        for piece in pieces
    ]
    return Unit(name, number, tuple(pieces), int(size), digest_json(about, name, number, parts))


# ---- the work ----


def _make(
    job: PrepareJob,
    found,
    stamps,
    about: dict,
    state: dict,
    wanted: Tokenizer | Spec,
    engine: Engine,
    say: Say,
    show: Show,
) -> None:
    settings, todo, scans, keys, dropped = (
        job.settings,
        plan(found, stamps, job.settings, about),
        None,
        None,
        (0, 0),
    )
    for name in found:
        (job.folder / name).mkdir(exist_ok=True)
    wants_characters = isinstance(wanted, Spec) and wanted.needs_characters
    if settings.dedup != "none" or wants_characters:
        scan = functools.partial(survey.scan, wants_characters=wants_characters)
        scans = run_phase(job, "scan", todo, scan, engine, show)
    if settings.dedup != "none":
        keys, *dropped = survey.decide(job, todo, scans)
    if isinstance(wanted, Spec):
        tokenizer = _made(job, wanted, todo, scans, keys, say)
    else:
        tokenizer = wanted
    tokenizer_file = job.folder / WORK / "tokenizer.json"
    replace_file(tokenizer_file, tokenizer.to_json().encode())
    todo = [
        unit._replace(key=digest_json(unit.key, tokenizer.fingerprint, keys and keys[i]))
        for i, unit in enumerate(todo)
    ]
    function = functools.partial(
        units.tokenize, fingerprint=tokenizer.fingerprint, keep=keys is not None
    )
    made = run_phase(job, "tokens", todo, function, engine, show)
    if changed := [
        path for path, before in stamps.items() if identity.stamp(Source(path, "")) != before
    ]:
        raise DataError(f"{changed[0]}: changed while being read; run the command again")
    if changed := [
        spec for spec, code in filters.code(settings.filters).items() if code != about["code"][spec]
    ]:
        raise DataError(
            f"--filters {changed[0]}: its module was edited while it was in use; remove "
            f"--output={job.folder} and run the command again"
        )
    manifest = assemble.assemble(job, todo, made, scans or made, tokenizer, about, dropped)
    if not any(source["train"]["documents"] for source in manifest["sources"].values()):
        raise UsageError(
            f"--input: no text is left to train on; {'; '.join(corpus.left_out(manifest['counts']))}"
        )
    if settings.eval_fraction and not any(
        source["eval"]["documents"] for source in manifest["sources"].values()
    ):
        say(
            f"nothing is held out: none of the documents is in --eval_fraction={settings.eval_fraction}"
        )
    replace_file(job.folder / assemble.INPUTS, json.dumps(state, indent=1).encode())
    replace_file(job.folder / corpus.MANIFEST, corpus.seal(manifest))


def run_phase(
    job: PrepareJob,
    phase: str,
    todo: Sequence[Unit],
    function: Callable,
    engine: Engine,
    show: Show,
) -> list[dict]:
    """What `function(job, unit, tick)` makes of every unit, in order; what a marker says is done
    is not done again."""
    made = [units.finished(job, phase, unit) for unit in todo]
    missing = [i for i, result in enumerate(made) if result is None]
    documents, size = 0, 0
    total = sum(todo[i].size for i in missing)
    done = 0

    def tick(more: int, text: int) -> None:
        nonlocal documents, size
        documents, size = documents + more, size + text
        show(Progress(phase, done, total, documents, size))

    tick(0, 0)
    work = Work(
        functools.partial(function, job),
        [todo[i] for i in missing],
        engine.workers,
        tick,
        Unit.describe,
        engine.address,
    )
    for number, result in ENGINES[engine.name](work):
        made[missing[number]] = result
        done += todo[missing[number]].size
        tick(0, 0)
    return made


def _made(job: PrepareJob, spec: Spec, todo: Sequence[Unit], scans, keys, say: Say) -> Tokenizer:
    """The tokenizer that is made from the text: characters of all of it, BPE of a sample of the
    training side. Kept among the work, so that it is not made again."""
    path = job.folder / WORK / f"trained-{digest_json([unit.key for unit in todo], keys)}.json"
    if not path.exists():
        characters = "".join(sorted(set().union(*(scan["characters"] for scan in scans or ()))))
        say(f"tokenizer: making {spec.name}")
        made = make_tokenizer(spec, lambda: _sample(job, todo, keys is not None), characters)
        replace_file(path, made.to_json().encode())
    return tokenizer_from_json(path.read_text(encoding="utf-8"))


def _sample(job: PrepareJob, todo: Sequence[Unit], keep: bool) -> Iterator[str]:
    """At most `tokenizer_mb` of text to train on, from the beginning of every unit as its share
    of the input."""
    total, most = max(sum(unit.size for unit in todo), 1), job.settings.tokenizer_mb * 1e6
    for unit in todo:
        room = int(most * unit.size / total)
        kept = np.fromfile(job.folder / units.keep_file(unit), bool) if keep else None
        for text in units.read(job, unit, units.Counts(), kept) if room else ():
            if units.is_held_out(text.hash, job.settings.eval_fraction):
                continue
            part = text.text.encode()[:room].decode("utf-8", "ignore")  # not half a character
            yield part
            room -= len(part.encode())
            if room <= 0 or len(part) < len(text.text):
                break
