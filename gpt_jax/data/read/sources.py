"""What a path means: files, folders, globs, URLs or data sets, and which suffixes can be read."""

import glob
import os
import sysconfig
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from gpt_jax.data.read import remote
from gpt_jax.errors import UsageError

HUB = "hf://"  # a data set of Hugging Face: hf://name[:config][@split]
LOCAL_URL = "file://"


class Source(NamedTuple):
    """A file, a remote file or a data set."""

    path: Path | str  # A str has `://`: an object store or hf://.
    name: str  # for people and reports; the same on every machine


# The rows of formats.FORMATS.
SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
# Files of dialogues. A folder's are passed over, because most files of this kind are settings.
NAMED_ONLY = (".yml", ".yaml")
# The rows of decoding.UNPACK, and no compression.
COMPRESSIONS = ("", ".gz", ".xz", ".zst", ".bz2")
READABLE = f"{' '.join(SUFFIXES)}, each also with {' '.join(COMPRESSIONS[1:])} after it"
# A hint where several paths were given to a field that a comma separates.
COMMA = "; a comma separates paths: one path that holds a comma is written \"('a,b.txt',)\""
EMPTY_PATHS = " is empty: name files, directories or globs, or the word stdlib"
# Token files of other tools, see tokens/foreign.py.
TOKEN_FILES = (".bin", ".idx", ".npy")


def suffixes(path: Path | str) -> tuple[str, str] | None:
    """(format, compression) of a file that can be read. None for other files."""
    if str(path).startswith(HUB):
        return HUB, ""
    pure = PurePosixPath(path)
    suffix = pure.suffix.lower()
    packing = suffix if suffix in COMPRESSIONS else ""
    kind = pure.with_suffix("").suffix.lower() if packing else suffix
    return (kind, packing) if kind in (*SUFFIXES, *NAMED_ONLY) else None


def is_listed(path: Path | str) -> bool:
    """Whether a file of a folder is read if the folder is named."""
    known = suffixes(path)
    return known is not None and known[0] not in NAMED_ONLY


def format_and_packing(source: Source) -> tuple[str, str]:
    """(format, compression) of a source. Every source can be read."""
    known = suffixes(source.path)
    assert known is not None
    return known


def walk(folder: Path, excluded: Iterable[str] = ()) -> list[Path]:
    """Files below `folder`, relative to it, without hidden and `excluded` ones.

    Links to folders are followed, as globs follow them. Each folder is listed once, so that links
    in a circle end. It is listed under its own path if that lies below `folder`. Raises OSError.
    """

    def fail(error):
        raise error

    paths = []
    seen = set()
    todo = [folder]
    for start in todo:  # which grows
        for here, folders, files in os.walk(start, onerror=fail):
            facts = os.stat(here)
            if (facts.st_dev, facts.st_ino) in seen:
                folders.clear()
                continue
            seen.add((facts.st_dev, facts.st_ino))

            folders[:] = [f for f in folders if not f.startswith(".") and f not in excluded]
            todo += sorted(path for f in folders if (path := Path(here, f)).is_symlink())
            paths += [Path(here, f).relative_to(folder) for f in files if not f.startswith(".")]
    return paths


def _list_folder(folder: Path, name: str, excluded: Iterable[str] = ()) -> list[Source]:
    """Readable files under `folder`, by path, see `walk`.

    Raises UsageError for a link to nothing that may have been a text or a folder of texts.
    """
    paths = walk(folder, excluded)
    _refuse_prepared(str(folder), {path.as_posix() for path in paths})
    return [
        _file(folder / path, f"{name}/{path.as_posix()}")
        for path in sorted(paths)
        if is_listed(path) or (not path.suffix and _is_broken(folder / path))
    ]


def _is_broken(path: Path) -> bool:
    """Whether a path is a link to nothing."""
    return path.is_symlink() and not path.exists()


def _file(path: Path, name: str) -> Source:
    if _is_broken(path):
        raise UsageError(
            f"{path}: is a link to {os.readlink(path)}, which is not there; "
            "remove the link, or name the files without it"
        )
    return Source(path, name)


# Two files that tell a folder of `gpt-jax prepare`, and what the user can do with it.
FINISHED = ("corpus.json", "tokenizer.json")
UNFINISHED = ("work/settings.json", "work/lock")
PREPARED = {
    FINISHED: "whose output is tokens and no text; give that folder itself as config.data.path "
    "or in config.data.sources, and as text what it was made from",
    UNFINISHED: "which has not finished; run the same command again, and then give that folder as "
    "config.data.path or in config.data.sources",
}


def _refuse_prepared(folder: str, files: set[str]) -> None:
    """Raises UsageError if `gpt-jax prepare` made `folder`, or a folder inside.

    Its indexes end in .json and are no text. `files` are the paths in it, relative to it.
    """
    for (first, second), way_out in PREPARED.items():
        for path in sorted(path for path in files if f"/{path}".endswith(f"/{first}")):
            inside = path.removesuffix(first)
            if inside + second in files:
                place = f"{folder}/{inside}".rstrip("/")
                raise UsageError(f"{place}: was made by gpt-jax prepare, {way_out}")


# Folders that `stdlib` leaves out.
NOT_LIBRARY = (
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "_bundled",
)


def _standard_library() -> list[Source]:
    folder = Path(sysconfig.get_path("stdlib"))
    return [
        source
        for source in _list_folder(folder, "stdlib", NOT_LIBRARY)
        if Path(source.path).suffix == ".py"
    ]


def _one(path: Path) -> list[Source]:
    """What an existing file or folder holds."""
    if path.is_dir():
        return _list_folder(path, path.resolve().name)
    return [_file(path, path.name)] if suffixes(path) else []


def _one_remote(url: str) -> list[Source]:
    """What an existing remote file or folder holds."""
    name = url.rstrip("/").rpartition("/")[2]
    if not remote.is_folder(url):
        return [Source(url, name)] if suffixes(url) else []

    folder = url.rstrip("/")
    if url.startswith(LOCAL_URL):  # fsspec would leave linked folders out
        paths = sorted(path.as_posix() for path in walk(Path(folder.removeprefix(LOCAL_URL))))
    else:
        paths = remote.walk(url)
    _refuse_prepared(folder, set(paths))
    return [Source(f"{folder}/{path}", f"{name}/{path}") for path in paths if is_listed(path)]


def _expand(spec: str, key: str, hint: str) -> list[Source]:
    """The sources that one path means.

    Raises UsageError if there is none. `hint` is said of a path that is not there.
    """
    is_local = not remote.is_remote(spec)
    path = Path(spec).expanduser()
    if spec == "stdlib":
        sources = _standard_library()
    elif spec.startswith(HUB):
        sources = [Source(spec, spec)]
    elif path.exists() if is_local else remote.exists(spec):
        sources = _one(path) if is_local else _one_remote(spec)
    elif glob.has_magic(spec):
        sources = _expand_glob(spec, key)
    else:
        if is_local:
            _file(path, spec)  # It says more about a link whose target is not there.
        raise UsageError(f"{key} = {spec!r}: no such file or directory{hint}")

    if not sources:
        raise UsageError(
            f"{key} = {spec!r}: no usable files; read are {READABLE}; token files of other tools "
            f"({' '.join(TOKEN_FILES)}, a glob of them) are read in place, as config.data.path "
            "or in config.data.sources, without gpt-jax prepare"
        )
    return sources


def _expand_glob(spec: str, key: str) -> list[Source]:
    """The sources that match a glob. Raises UsageError if no file matches."""
    is_local = not remote.is_remote(spec)
    path = Path(spec).expanduser()
    matches = sorted(glob.glob(str(path), recursive=True)) if is_local else remote.glob(spec)
    if not matches:
        raise UsageError(f"{key} = {spec!r}: no file matches")

    sources = []
    for match in matches:
        sources += _one(Path(match)) if is_local else _one_remote(match)
    return sources


def _named(spec: str, key: str, hint: str) -> list[Source]:
    """`_expand`, with the setting `key` in every refusal."""
    try:
        return _expand(spec, key, hint)
    except UsageError as error:
        if str(error).startswith(key):
            raise
        raise UsageError(f"{key} = {spec!r}: {error}") from None


def find_sources(paths: tuple[str, ...], key: str = "config.data.path") -> tuple[Source, ...]:
    """The sources that `paths` mean, in a fixed order, each once and by its first name.

    A path is a file, a folder with all below it, or a glob. It may lie on an object store
    (`gs://…`, `s3://…`, whatever fsspec opens). It may also be a data set
    `hf://name[:config][@split]`, or the word `stdlib`. That is the running interpreter's library
    without its tests; a folder of that name is `./stdlib`.

    Raises UsageError, which names the setting `key`, for a path that does not exist or holds
    nothing that can be read.
    """
    if not paths:
        raise UsageError(key + EMPTY_PATHS)
    hint = COMMA if paths[1:] and key.startswith("config.") else ""
    try:
        sources = {}
        for source in [source for spec in paths for source in _named(spec, key, hint)]:
            path = source.path
            sources.setdefault(path if isinstance(path, str) else path.resolve(), source)
        return tuple(sources.values())
    except OSError as error:
        raise UsageError(f"{key} = {', '.join(paths)}: {error}") from None
