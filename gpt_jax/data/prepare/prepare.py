"""From raw text to a corpus of token shards: what `gpt-jax prepare` does.

The input is cut into units (units.py), an engine runs them (workers.py), and what they made is put
together (assemble.py). If something has to be known of all documents first, such as duplicates or
characters, a scan of all units comes before.
"""

import functools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from gpt_jax.data.prepare import assemble, filters, identity, output, survey, units
from gpt_jax.data.prepare.own_tokenizer import make_own_tokenizer
from gpt_jax.data.prepare.units import WORK, PrepareJob, PrepareSettings, Unit
from gpt_jax.data.prepare.workers import ENGINES, Work
from gpt_jax.data.read import documents as readers
from gpt_jax.data.read.sources import HUB, Source, find_sources
from gpt_jax.data.tasks.tasks import complete_options, list_specials
from gpt_jax.data.tokenizers.begin import require_begin
from gpt_jax.data.tokenizers.spec import (
    Spec,
    parse_tokenizer_spec,
    resolve_tokenizer,
)
from gpt_jax.data.tokenizers.vocabulary import Tokenizer
from gpt_jax.data.tokens import corpus
from gpt_jax.data.tokens.inspect import describe_left_out
from gpt_jax.data.tokens.marks import describe_marks
from gpt_jax.errors import DataError, UsageError
from gpt_jax.files import digest_json, replace_file

# If --piece_mb is 0, there are so many units, which keeps all workers busy until the end.
UNITS = 500
# The bytes of a unit. The largest may be done again after a kill, and the smallest is worth its
# three files.
SMALLEST = 4e6
LARGEST = 64e6
# A unit is full from this part of its target on, because pieces of a file come out a little smaller
# than asked for.
FULL = 0.6

Say = Callable[[str], None]


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


Show = Callable[[Progress], None]


class Inputs(NamedTuple):
    """What is read, as it was when the call began."""

    sources: Mapping[str, Sequence[Source]]
    stamps: Mapping[
        Path | str, tuple[int, str]
    ]  # by path: bytes, and what changes with the content

    def state(self) -> dict[str, list[str]]:
        """The stamps, by the places of the files."""
        return {
            identity.locate(path): [str(size), stamp] for path, (size, stamp) in self.stamps.items()
        }


class Call(NamedTuple):
    """One call of `gpt-jax prepare`."""

    job: PrepareJob
    inputs: Inputs
    about: dict  # the settings as the manifest has them
    tokenizer: Tokenizer | Spec
    engine: Engine
    say: Say
    show: Show


def _open_tokenizer(settings: PrepareSettings) -> Tokenizer | Spec:
    """Opens the tokenizer of the settings. Raises UsageError if it cannot do what they ask."""
    tokenizer = resolve_tokenizer(settings.tokenizer, "--tokenizer")
    if settings.begin:
        tokenizer = require_begin(tokenizer, "--begin")
    if settings.reading.task != "plain" and getattr(tokenizer, "prefix", b""):
        raise UsageError(
            f"--task={settings.reading.task}: the tokenizer {tokenizer.name} puts a space in front "
            "of each text, so also in front of each span; take another --tokenizer"
        )
    return tokenizer


def prepare_corpus(
    paths: Mapping[str, tuple[str, ...]],
    folder: Path,
    settings: PrepareSettings,
    engine: Engine,
    say: Say,
    show: Show,
) -> dict:
    """Makes the corpus of `paths` in `folder`, and gives its manifest.

    `paths` are {source: what sources.find_sources takes}. A call that was ended is continued by the
    same call. The same input and settings make the same bytes, whatever the engine.

    Raises UsageError for settings, files and a folder that cannot serve, and for a full disk.
    Raises DataError when the input or the module of a filter changes meanwhile, and PeerFailed when
    a worker is killed. What is finished stays.
    """
    tokenizer = _open_tokenizer(settings)
    settings = complete_settings(settings, tokenizer)
    for note in getattr(tokenizer, "notes", ()):
        say(f"tokenizer {tokenizer.name}: {note}")
    survey.parse_threshold(settings.dedup)
    filters.parse_filters(settings.filters)

    sources = {name: find_sources(given, f"--input {name}") for name, given in paths.items()}
    earlier = identity.read_settings(folder).get("revisions", {})
    sources, revisions = identity.pin_revisions(sources, earlier, say)
    files = [source.path for group in sources.values() for source in group]
    _report_repeated(files, say)
    inputs = Inputs(sources, {path: identity.stamp(path) for path in files})

    with output.explain_errors(folder):
        about = identity.describe(settings, tokenizer, sources, revisions)
        if corpus.is_corpus(folder):
            return output.answer_finished(folder, about, inputs.state(), say)

        output.make_room(folder)
        with output.hold_lock(folder):
            if not corpus.is_corpus(folder):
                output.begin(folder, about, say)
                job = PrepareJob(folder, settings)
                _make(Call(job, inputs, about, tokenizer, engine, say, show))
            assemble.clean(folder, corpus.read_manifest(folder))
    return corpus.read_manifest(folder)


def complete_settings(settings: PrepareSettings, tokenizer: Tokenizer | Spec) -> PrepareSettings:
    """The settings, with options of the task that the tokenizer's files decide.

    Raises UsageError for a tokenizer that lacks special tokens of the task.
    """
    reading = settings.reading
    path = Path(parse_tokenizer_spec(settings.tokenizer, "--tokenizer").base).expanduser()
    folder = str(path) if path.exists() else ""
    options = complete_options(
        reading.task, reading.task_options, folder, tokenizer.specials, "--task_options"
    )
    missing = [
        name for name in list_specials(reading.task, options) if name not in tokenizer.specials
    ]
    if missing:
        raise UsageError(
            f"--task={reading.task}: writes the special token {missing[0]}, which --tokenizer="
            f"{settings.tokenizer} lacks; give --tokenizer={settings.tokenizer or 'bytes'}+chat"
        )
    return replace(settings, reading=replace(reading, task_options=options))


def _report_repeated(paths: Sequence[Path | str], say: Say) -> None:
    """Says which files are given several times."""
    times = Counter(map(identity.locate, paths))
    repeated = [place for place, count in times.items() if count > 1]
    if repeated:
        others = len(repeated) - 1
        more = f", and {others} more file{'s' if others > 1 else ''}" if others else ""
        say(
            f"--input: {repeated[0]} is given {times[repeated[0]]} times{more}: their documents "
            "are taken as often"
        )


# ---- units ----


def plan_units(inputs: Inputs, settings: PrepareSettings, about: dict) -> list[Unit]:
    """The units in the order of the input.

    Large files are cut where their format allows it, small ones joined.
    """
    total = sum(size for size, _ in inputs.stamps.values())
    target = settings.piece_mb * 1e6 or min(max(total / UNITS, SMALLEST), LARGEST)
    planned = []
    for name, sources in inputs.sources.items():
        number = 0
        pieces = []
        size = 0.0
        for source in sources:
            cut = readers.cut_source(source, int(target), settings.reading)
            source_size, _ = inputs.stamps[source.path]
            if not source_size and str(source.path).startswith(HUB):
                source_size = len(cut) * target  # nobody knows it, so each shard is a unit
            for piece in cut:
                pieces.append(piece)
                size += source_size / len(cut)
                if size >= FULL * target:
                    planned.append(_make_unit(name, number, pieces, size, inputs, about))
                    number += 1
                    pieces = []
                    size = 0.0
        if pieces:
            planned.append(_make_unit(name, number, pieces, size, inputs, about))
    return planned


def _make_unit(
    name: str, number: int, pieces: list, size: float, inputs: Inputs, about: dict
) -> Unit:
    parts = []
    for source, start, stop in pieces:
        place = identity.locate(source.path)
        parts.append([place, source.name, start, stop, *inputs.stamps[source.path]])
    key = digest_json(about, name, number, parts)
    return Unit(name, number, tuple(pieces), int(size), key)


# ---- the work ----


def _make(call: Call) -> None:
    """Runs the phases and writes the corpus. The manifest is the last file."""
    job = call.job
    settings = job.settings
    todo = plan_units(call.inputs, settings, call.about)
    for name in call.inputs.sources:
        (job.folder / name).mkdir(exist_ok=True)

    scans = _scan(call, todo)
    keys = None
    dropped = (0, 0)
    if settings.dedup != "none":
        keys, *dropped = survey.decide(job, todo, scans, call.say)

    tokenizer = call.tokenizer
    if isinstance(tokenizer, Spec):
        tokenizer = make_own_tokenizer(call.job, tokenizer, todo, scans, keys, call.say)
    replace_file(job.folder / WORK / "tokenizer.json", tokenizer.to_json().encode())
    todo = [
        unit._replace(key=digest_json(unit.key, tokenizer.fingerprint, keys and keys[i]))
        for i, unit in enumerate(todo)
    ]
    tokenize = functools.partial(
        units.tokenize,
        fingerprint=tokenizer.fingerprint,
        keep=keys is not None,
        begin=tokenizer.begin if settings.begin else None,
    )
    made = run_phase(call, "tokens", todo, tokenize)
    _refuse_changes(call)
    _tell_marks(call, made)

    manifest = assemble.assemble(job, todo, made, scans or made, tokenizer, call.about, dropped)
    _check_sides(call, manifest)
    inputs = identity.note_inputs(call.inputs.stamps)
    replace_file(job.folder / corpus.INPUTS, json.dumps(inputs, indent=1).encode())
    replace_file(job.folder / corpus.MANIFEST, corpus.seal(manifest))


def _scan(call: Call, todo: Sequence[Unit]) -> list[dict]:
    """The scans of all units, if something has to be known of all documents; else none."""
    tokenizer = call.tokenizer
    wants_characters = isinstance(tokenizer, Spec) and tokenizer.needs_characters
    if call.job.settings.dedup == "none" and not wants_characters:
        return []
    scan = functools.partial(survey.scan, wants_characters=wants_characters)
    return run_phase(call, "scan", todo, scan)


def _refuse_changes(call: Call) -> None:
    """Raises DataError if the input or a filter has changed during the work."""
    for path, before in call.inputs.stamps.items():
        if identity.stamp(path) != before:
            raise DataError(f"{path}: changed while being read; run the command again")
    for spec, code in filters.digest_code(call.job.settings.filters).items():
        if code != call.about["code"][spec]:
            raise DataError(
                f"--filters {spec}: its module was edited while it was in use; remove "
                f"--output={call.job.folder} and run the command again"
            )


def _tell_marks(call: Call, made: Sequence[dict]) -> None:
    """Says how many documents hold a name of end of text."""
    marks = Counter()
    for marker in made:
        marks.update(marker.get("marks", {}))  # an older version has not counted them
    for line in describe_marks(marks, "--separator"):
        call.say(line)


def _check_sides(call: Call, manifest: dict) -> None:
    """Raises UsageError if no text is left to train on. Says it if nothing is held out."""
    sources = manifest["sources"].values()
    if not any(source["train"]["documents"] for source in sources):
        lines = "; ".join(describe_left_out(manifest["counts"]))
        raise UsageError(f"--input: no text is left to train on; {lines}")
    fraction = call.job.settings.eval_fraction
    if fraction and not any(source["eval"]["documents"] for source in sources):
        call.say(f"nothing is held out: none of the documents is in --eval_fraction={fraction}")


def run_phase(call: Call, phase: str, todo: Sequence[Unit], function: Callable) -> list[dict]:
    """What `function(job, unit, tick)` makes of every unit, in order.

    A unit that a marker says is done is not done again.
    """
    results = {}
    for i, unit in enumerate(todo):
        marker = units.read_marker(call.job, phase, unit)
        if marker is not None:
            results[i] = marker
    missing = [i for i in range(len(todo)) if i not in results]
    total = sum(todo[i].size for i in missing)
    done = 0
    documents = 0
    size = 0

    def tick(more_documents: int, more_bytes: int) -> None:
        nonlocal documents, size
        documents += more_documents
        size += more_bytes
        call.show(Progress(phase, done, total, documents, size))

    tick(0, 0)
    work = Work(
        functools.partial(function, call.job),
        [todo[i] for i in missing],
        call.engine.workers,
        tick,
        Unit.describe,
        call.engine.address,
    )
    for number, result in ENGINES[call.engine.name](work):
        results[missing[number]] = result
        done += todo[missing[number]].size
        tick(0, 0)
    return [results[i] for i in range(len(todo))]
