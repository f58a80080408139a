"""What a path means: files, folders, globs, URLs, data sets, and which suffixes are read (called
by readers, split, cache, prepare)."""

import glob
import os
import sysconfig
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from gpt_jax.data.read import remote
from gpt_jax.errors import UsageError

HUB = "hf://"  # a data set of Hugging Face: hf://name[:config][@split]


class Source(NamedTuple):
    path: Path | str  # str with `://`: an object store or hf://
    name: str  # for people and reports; the same on every machine


SUFFIXES = (
    ".txt",
    ".md",
    ".py",
    ".jsonl",
    ".json",
    ".csv",
    ".tsv",
    ".parquet",
    ".arrow",
)  # rows of formats.FORMATS
PACKINGS = ("", ".gz", ".xz", ".zst", ".bz2")  # rows of decoding.UNPACK
READABLE = f"{' '.join(SUFFIXES)}, each also with {' '.join(PACKINGS[1:])} after it"
EMPTY_PATHS = " is empty: name files, directories or globs, or the word stdlib"
TOKEN_FILES = (".bin", ".idx", ".npy")  # of other tools, see foreign


def suffixes(path: Path | str) -> tuple[str, str] | None:
    """(format, compression) of a file that can be read, else None."""
    if str(path).startswith(HUB):
        return HUB, ""
    pure = PurePosixPath(path)
    suffix = pure.suffix.lower()
    packing = suffix if suffix in PACKINGS else ""
    kind = pure.with_suffix("").suffix.lower() if packing else suffix
    return (kind, packing) if kind in SUFFIXES else None


def format_and_packing(source: Source) -> tuple[str, str]:
    """(format, compression) of a source. Every source can be read."""
    known = suffixes(source.path)
    assert known is not None
    return known


def _walk(folder: Path, name: str, excluded: Iterable[str] = ()) -> list[Source]:
    """Readable files under `folder`, by path; hidden and `excluded` folders are left out."""

    def fail(error):
        raise error

    found = []
    for here, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [f for f in folders if not f.startswith(".") and f not in excluded]
        found += [Path(here, f).relative_to(folder) for f in files if not f.startswith(".")]
    _refuse_prepared(str(folder), {path.as_posix() for path in found})
    return [
        _file(folder / path, f"{name}/{path.as_posix()}")
        for path in sorted(filter(suffixes, found))
    ]


def _file(path: Path, name: str) -> Source:
    if path.is_symlink() and not path.exists():
        raise UsageError(
            f"{path}: is a link to {os.readlink(path)}, which is not there; remove the link, or "
            "name the "
            "files without it"
        )
    return Source(path, name)


PREPARED = (
    ("corpus.json", "tokenizer.json"),
    ("work/settings.json", "work/lock"),
)  # in finished, unfinished output


def _refuse_prepared(folder: str, files: set[str]) -> None:
    """UsageError if `folder`, or one inside, was made by `gpt-jax prepare`: its indexes end in
    .json and are no text. `files`: what it holds, as paths relative to it."""
    for unfinished, (first, second) in enumerate(PREPARED):
        for path in sorted(path for path in files if f"/{path}".endswith(f"/{first}")):
            inside = path.removesuffix(first)
            if inside + second in files:
                way = (
                    "which has not finished; run the same command again, and then give that folder "
                    "as "
                    "config.data.path or in config.data.sources"
                    if unfinished
                    else "whose output is tokens and no text; give that folder itself as "
                    "config.data.path or in "
                    "config.data.sources, and as text what it was made from"
                )
                raise UsageError(
                    f"{f'{folder}/{inside}'.rstrip('/')}: was made by gpt-jax prepare, {way}"
                )


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
        for source in _walk(folder, "stdlib", NOT_LIBRARY)
        if Path(source.path).suffix == ".py"
    ]


def _one(path: Path) -> list[Source]:
    """What an existing file or folder holds."""
    if path.is_dir():
        return _walk(path, path.resolve().name)
    return [_file(path, path.name)] if suffixes(path) else []


def _one_remote(url: str) -> list[Source]:
    name = url.rstrip("/").rpartition("/")[2]
    if remote.is_folder(url):
        found = remote.walk(url)
        _refuse_prepared(url.rstrip("/"), set(found))
        return [
            Source(f"{url.rstrip('/')}/{path}", f"{name}/{path}")
            for path in found
            if suffixes(path)
        ]
    return [Source(url, name)] if suffixes(url) else []


def _expand(spec: str, key: str) -> list[Source]:
    here, path = not remote.is_remote(spec), Path(spec).expanduser()
    if spec == "stdlib":
        found = _standard_library()
    elif spec.startswith(HUB):
        found = [Source(spec, spec)]
    elif path.exists() if here else remote.exists(spec):
        found = _one(path) if here else _one_remote(spec)
    elif glob.has_magic(spec):
        matches = sorted(glob.glob(str(path), recursive=True)) if here else remote.glob(spec)
        if not matches:
            raise UsageError(f"{key} = {spec!r}: no file matches")
        found = []
        for match in matches:
            found += _one(Path(match)) if here else _one_remote(match)
    else:
        if here:
            _file(path, spec)  # has more to say of a link
        raise UsageError(f"{key} = {spec!r}: no such file or directory")
    if not found:
        raise UsageError(
            f"{key} = {spec!r}: no usable files; read are {READABLE}; token files of other tools "
            f"({' '.join(TOKEN_FILES)}, a glob of them) are read in place, as config.data.path or "
            "in "
            "config.data.sources, without gpt-jax prepare"
        )
    return found


def _named(spec: str, key: str) -> list[Source]:
    try:
        return _expand(spec, key)
    except UsageError as error:
        raise (
            error if str(error).startswith(key) else UsageError(f"{key} = {spec!r}: {error}")
        ) from None


def find_sources(paths: tuple[str, ...], key: str = "config.data.path") -> tuple[Source, ...]:
    """The files that `paths` mean, in a fixed order, each once: files, directories (recursive) and
    globs, here or on an object store (`gs://…`, `s3://…`, whatever fsspec opens), data sets
    `hf://name[:config][@split]`, and the word `stdlib`, the running interpreter's library without
    its tests (a folder of that name is `./stdlib`).

    UsageError, naming the setting `key`, for a path that does not exist or holds nothing that
    can be read."""
    if not paths:
        raise UsageError(key + EMPTY_PATHS)
    try:
        found = [source for spec in paths for source in _named(spec, key)]
        return tuple(
            {s.path if isinstance(s.path, str) else s.path.resolve(): s for s in found}.values()
        )
    except OSError as error:
        raise UsageError(f"{key} = {', '.join(paths)}: {error}") from None
