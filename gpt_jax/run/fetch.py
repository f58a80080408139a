"""Checkpoints at a URL, for whoever only reads them: a copy on this machine of what is needed.

Copies lie in `MIRROR/read/`, in a folder for each URL. Each file is compared with the digest in the
manifest, and appears whole or not at all. The optimiser's state, two thirds of the bytes, is left
out where nobody needs it. Nothing is deleted there but what is no part of the checkpoint.
"""

import contextlib
import hashlib
import re
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from gpt_jax.cluster import agree_on, exchange
from gpt_jax.config import Checkpoint
from gpt_jax.data import is_remote
from gpt_jax.errors import NoCheckpoint, UsageError
from gpt_jax.files import (
    Digest,
    describe_error,
    digest_file,
    hold_lock,
    is_inside,
    replace_file,
    replacing,
)
from gpt_jax.run.meta import META_SCHEMA
from gpt_jax.run.store import Store, check_url, in_threads
from gpt_jax.train import (
    CHECKPOINT_FOLDER,
    MANIFEST,
    META,
    parse_manifest,
    peek_meta,
    read_meta,
    resolve_checkpoint,
)

MIRROR = Checkpoint().mirror  # where local copies lie, unless another folder is named
MOMENTS = "train/"
# A run may delete the newest checkpoint while it is read. Then the next newest one is tried.
ATTEMPTS = 3
DELETED = "deleted by its run meanwhile"
MOST_TEXT = 200  # characters of a damage that travel to the other processes
STEP = re.compile(r"(\d+)/(.+)")

Say = Callable[[str], None]
Sizes = dict[str, int]  # bytes by name


def split_step(text: str) -> tuple[str, int]:
    """ "runs/a@300" -> ("runs/a", 300). Without a step it is 0, which is the newest.

    A text that is a path as a whole has no step.
    """
    path, at, step = text.rpartition("@")
    has_step = at and step.isdecimal() and not Path(text).exists()
    return (path, int(step)) if has_step else (text, 0)


def find_folder(mirror: str, kind: str, url: str) -> Path:
    """The folder below `mirror` for copies of a URL, which is not made."""
    url = url.rstrip("/")
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    return Path(mirror).expanduser().absolute() / kind / digest / url.rpartition("/")[2]


@contextlib.contextmanager
def writing(mirror: str, url: str) -> Iterator[None]:
    """Turns a failure of the local disk inside into a UsageError."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{url}: no copy below {mirror}: {describe_error(error)}; name a folder that has room "
            "with --mirror, or config.checkpoint.mirror in training"
        ) from None


class NothingThere(UsageError):
    """No finished step, or not the one that was asked for, lies at a URL."""


class Place(NamedTuple):
    """A folder of checkpoints in a store."""

    store: Store
    below: str  # its name in the store with a "/", or "" if it is the store's own folder
    steps: dict[int, Sizes]  # the files of each step, by their names in its folder

    @property
    def url(self) -> str:
        return f"{self.store.url}/{self.below}".rstrip("/")

    @property
    def sealed(self) -> list[int]:
        """The steps that are finished, in order."""
        return sorted(step for step, files in self.steps.items() if MANIFEST in files)

    def at(self, step: int) -> "RemoteStep":
        """A step, which has no files if it was not there when the store was looked at."""
        return RemoteStep(self.store, f"{self.below}{step}", self.steps.get(step, {}))


class RemoteStep(NamedTuple):
    """A step in a store: the name of its folder there, and the bytes of its files."""

    store: Store
    name: str
    sizes: Sizes

    @property
    def url(self) -> str:
        return f"{self.store.url}/{self.name}"


def group_steps(files: Sizes, below: str) -> dict[int, Sizes]:
    """The files of each step in the folder `below`, of all files in a store."""
    steps: dict[int, Sizes] = {}
    for name, size in files.items():
        match = STEP.fullmatch(name.removeprefix(below)) if name.startswith(below) else None
        if match:
            steps.setdefault(int(match[1]), {})[match[2]] = size
    return steps


def find_place(url: str, step: int, say: Say) -> tuple[Place, int]:
    """(folder of checkpoints, step or 0 for the newest) of a URL that a user typed.

    The URL is a workdir, its checkpoints or one step. Raises UsageError if nothing is there.
    """
    check_url("checkpoint ", url)
    store = Store(url, say)
    files = store.list()
    below = f"{CHECKPOINT_FOLDER}/"
    name = store.url.rpartition("/")[2]
    if not any(file.startswith(below) for file in files):
        below = ""
        if name.isdecimal() and MANIFEST in files:
            if step not in (0, int(name)):
                raise UsageError(
                    f"checkpoint {url!r}: is step {name}, but step {step} was asked for; drop one"
                )
            steps = {int(name): files}
            return Place(Store(store.url.rpartition("/")[0], say), "", steps), int(name)
    place = Place(store, below, group_steps(files, below))
    if not place.steps:
        raise NothingThere(f"checkpoint {url!r}: no checkpoints there; give a workdir")
    return place, step


def choose_steps(place: Place, step: int) -> list[int]:
    """The finished steps to try: `step`, or all from the newest. Raises UsageError if none is."""
    sealed = place.sealed
    if step in sealed:
        return [step]
    if step or not sealed:
        raise NothingThere(
            f"checkpoint {place.url!r}: no step {step or 'that is finished'}; "
            f"steps there: {', '.join(map(str, sealed)) or 'none'}"
        )
    return sealed[::-1]


class _Damaged(Exception):
    """A file of the store is not as its manifest says."""


def fetch_step(step: RemoteStep, folder: Path, is_wanted: Callable[[str], bool], tell: Say) -> str:
    """Copies a step into `folder`, and returns its damage or "".

    Only files for which `is_wanted(name)` holds are copied, and none that lies in `folder` as the
    manifest says. `tell` gets a line before the first one travels. Raises OSError for the local
    disk, and UsageError for a meta.json of another program.
    """
    raw = step.store.read(f"{step.name}/{MANIFEST}")
    if raw is None:
        return DELETED
    files = parse_manifest(raw)
    if files is None or not all(map(is_inside, files)):
        return f"{MANIFEST}: content changed"

    digests = {file: Digest(*pair) for file, pair in files.items()}
    _drop_others(folder, digests)
    wanted = [file for file in digests if is_wanted(file)]
    same = in_threads(lambda file: _is_same(folder / file, digests[file]), wanted)
    missing = [file for file, is_same in zip(wanted, same, strict=True) if not is_same]
    absent = [file for file in missing if file not in step.sizes]
    if absent:
        return f"{absent[0]}: missing"
    if missing:
        megabytes = sum(digests[file].size for file in missing) / 1e6
        tell(f"checkpoint: copying {megabytes:,.1f} MB from {step.url} to {folder}")

    def get(file: str) -> str:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            step.store.fetch(f"{step.name}/{file}", temporary)
            if digest_file(temporary) != digests[file]:
                raise _Damaged(f"{file}: content changed (sha256 differs)")
        return ""

    try:
        in_threads(get, missing)
    except _Damaged as error:
        return str(error)
    replace_file(folder / MANIFEST, raw)
    try:
        read_meta(folder.parent, int(folder.name), META_SCHEMA)
    except NoCheckpoint as error:
        return str(error)
    return ""


def _drop_others(folder: Path, names: Collection[str]) -> None:
    """Deletes what is no part of a step, such as the rest of a copy that was killed."""
    for path in sorted(folder.rglob("*")):
        if not path.is_dir() and path.relative_to(folder).as_posix() not in names:
            path.unlink()


def _is_same(path: Path, digest: Digest) -> bool:
    # A file of another size is not read.
    return path.is_file() and path.stat().st_size == digest.size and digest_file(path) == digest


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lets one process of this machine write into `folder` at a time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as closing:
        # Some file systems have no locks. Files are replaced whole, so two may write the same.
        with contextlib.suppress(OSError):
            closing.enter_context(hold_lock(folder.with_name(f".{folder.name}.lock")))
        yield


def find_checkpoint(
    path: str | Path, step: int, say: Say, mirror: str = MIRROR, has_moments: bool = False
) -> tuple[Path, int]:
    """(checkpoints directory, step) of a whole checkpoint, from a path or a URL that a user typed.

    A path is looked at as by `resolve_checkpoint`. Of a URL the step is copied below `mirror`, by
    each machine of a job, and the optimiser's state only if `has_moments`. All processes call it.
    Raises UsageError and NoCheckpoint.
    """
    if not is_remote(path):
        return resolve_checkpoint(path, step, say, META_SCHEMA)

    place, asked = find_place(str(path), step, say)
    target = find_folder(mirror, "read", place.url)
    is_wanted = _is_any if has_moments else _is_no_moment
    damaged = []
    newer = None
    attempts = ATTEMPTS
    while True:
        number = agree_on(partial(_next_older, place, asked, newer))
        if number is None:
            raise NoCheckpoint(f"{place.url}: no valid checkpoint; found {'; '.join(damaged)}")
        if number not in place.steps:
            # It was saved after this process had looked, and before process 0 did.
            place, _ = find_place(str(path), step, say)
        with writing(mirror, place.url), _alone(target / str(number)):
            damage = _fetch(place.at(number), target / str(number), is_wanted, say)
        reports = exchange({"damage": damage[:MOST_TEXT]})
        damage = next((report["damage"] for report in reports if report["damage"]), "")
        if not damage:
            say(f"checkpoint: step {number} of {place.url} lies in {target}")
            return target, number
        if damage == DELETED and not asked and attempts:
            say(f"step {number} of {place.url} was {DELETED}; taking the newest again")
            attempts -= 1
            place, _ = find_place(str(path), step, say)
            continue
        say(f"checkpoint step {number} in {place.url} is damaged and is passed over: {damage}")
        damaged.append(f"step {number}: {damage}")
        newer = number


def _fetch(step: RemoteStep, folder: Path, is_wanted: Callable[[str], bool], say: Say) -> str:
    """As `fetch_step`. A step that is deleted while it is copied is DELETED."""
    try:
        return fetch_step(step, folder, is_wanted, say)
    except UsageError:
        if step.store.read(f"{step.name}/{MANIFEST}") is not None:
            raise
        return DELETED


def _next_older(place: Place, asked: int, newer: int | None) -> int | None:
    """The finished step to try after `newer`, or None if there is no other."""
    steps = choose_steps(place, asked)
    return next((one for one in steps if newer is None or one < newer), None)


def _is_any(name: str) -> bool:
    return True


def _is_no_moment(name: str) -> bool:
    return not name.startswith(MOMENTS)


def peek_checkpoint(path: str | Path, step: int, mirror: str = MIRROR) -> tuple[dict, Path]:
    """(meta, checkpoints directory) of a path or a URL, without verifying files.

    Of a URL only that meta.json is copied. Every process reads it for itself. Raises UsageError if
    the path or the step does not exist.
    """
    if not is_remote(path):
        return peek_meta(path, step, META_SCHEMA), Path(path)
    place, asked = find_place(str(path), step, _say_nothing)
    number = choose_steps(place, asked)[0]
    target = find_folder(mirror, "read", place.url)
    file = target / str(number) / META
    with writing(mirror, place.url):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            place.store.fetch(f"{place.below}{number}/{META}", temporary)
    return read_meta(target, number, META_SCHEMA), target


def read_remote_file(url: str, name: str) -> bytes | None:
    """The content of a small file in the folder at a URL, or None if there is no such file.

    Raises UsageError if the store cannot be reached.
    """
    check_url("--workdir", url)
    return Store(url, _say_nothing).read(name)


def _say_nothing(line: str) -> None:
    """Drops a line about another try."""


def find_remote_damage(url: str) -> Iterator[tuple[int, str]]:
    """(step, its damage or "") of every finished step at a URL, read through and not kept.

    Raises UsageError if nothing is there.
    """
    place, asked = find_place(url, 0, _say_nothing)
    for number in [asked] if asked else place.sealed:
        yield number, _read_through(place.at(number))


def _read_through(step: RemoteStep) -> str:
    """The damage of a step, or ""."""
    raw = step.store.read(f"{step.name}/{MANIFEST}")
    files = None if raw is None else parse_manifest(raw)
    if files is None:
        return f"{MANIFEST}: content changed"
    extra = sorted({*step.sizes} - {*files, MANIFEST})
    if extra:
        return f"{extra[0]}: not part of the checkpoint as saved"

    def compare(file: str) -> str:
        size, sha256 = files[file]
        if file not in step.sizes:
            return f"{file}: missing"
        if step.sizes[file] != size:
            return f"{file}: {step.sizes[file]} bytes instead of {size}"
        found = step.store.digest(f"{step.name}/{file}")
        return "" if found == sha256 else f"{file}: content changed (sha256 differs)"

    return next(filter(None, in_threads(compare, sorted(files))), "")
