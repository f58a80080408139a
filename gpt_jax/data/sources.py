"""Files to documents: what a path means, which suffixes are read, and how (called by split and cache).

Text stays exact: no newline translation, no stripping. Everything unusable is a UsageError that names the file.
"""

import glob
import gzip
import io
import json
import lzma
import os
import sysconfig
import zlib
from pathlib import Path
from typing import BinaryIO, Callable, Iterable, Iterator, NamedTuple

from gpt_jax.errors import UsageError


class Source(NamedTuple):
    path: Path
    name: str  # for people and reports; the same on every machine


class Document(NamedTuple):
    name: str  # the source's, with `:line` or `:row` where a file holds several
    text: str
    replaced: int  # undecodable places that became U+FFFD


def _open_zstd(path: Path) -> BinaryIO:
    """Several frames in a row count as one file, and a file that is cut raises."""
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 1 << 17)


OPENERS = {"": lambda path: open(path, "rb"), ".gz": gzip.open, ".xz": lzma.open,
           ".zst": _open_zstd}


def _text(raw: bytes, path: Path, start: int, errors: str) -> tuple[str, int]:
    """(text, places replaced) of bytes that begin at byte `start` of the file."""
    if (nul := raw.find(b"\0")) >= 0:
        raise UsageError(f"{path}: byte {start + nul} is NUL, so this is a binary file (or UTF-16) among the text; "
                         "take it out of the data, or convert it to UTF-8")
    try:
        return raw.decode("utf-8"), 0
    except UnicodeDecodeError as error:
        if errors == "strict":
            raise UsageError(f"{path}: not UTF-8 at byte {start + error.start} (0x{raw[error.start]:02x}); convert the "
                             "file, or go on with --config.data.errors=replace") from None
    text = raw.decode("utf-8", "replace")
    return text, text.count("\ufffd") - raw.count("\ufffd".encode())


def _joined(text: str, place: str, errors: str) -> tuple[str, int]:
    """JSON can spell half a surrogate pair, which is no character: the same choice as for undecodable bytes."""
    try:
        text.encode()
        return text, 0
    except UnicodeEncodeError as error:
        if errors == "strict":
            raise UsageError(f"{place}: character {error.start} is a lone surrogate ({text[error.start]!r}); mend the "
                             "file, or go on with --config.data.errors=replace") from None
    mended = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return mended, mended.count("\ufffd") - text.count("\ufffd")


def _read_text(source: Source, opener: Callable, field: str, errors: str) -> Iterator[Document]:
    with opener(source.path) as file:
        yield Document(source.name, *_text(file.read(), source.path, 0, errors))


def _field(row, field: str, place: str) -> str:
    if not isinstance(row, dict):
        raise UsageError(f"{place}: expected a JSON object, got {type(row).__name__}")
    if field not in row:
        raise UsageError(f"{place}: config.data.field = {field!r} is missing; fields there: {', '.join(row) or 'none'}")
    if not isinstance(row[field], str):
        raise UsageError(f"{place}: config.data.field = {field!r} holds {type(row[field]).__name__}, expected text")
    return row[field]


def _read_jsonl(source: Source, opener: Callable, field: str, errors: str) -> Iterator[Document]:
    start = 0
    with opener(source.path) as file:
        for number, raw in enumerate(file, 1):  # binary files end lines at b"\n" only, never at U+2028
            line, replaced = _text(raw, source.path, start, errors)
            start += len(raw)
            if not line.strip():
                continue
            place = f"{source.path}:{number}"
            try:
                row = json.loads(line.removeprefix("\ufeff") if number == 1 else line)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{place}: not JSON: {error}") from None
            text, halves = _joined(_field(row, field, place), place, errors)
            yield Document(f"{source.name}:{number}", text, replaced + halves)


def _read_parquet(source: Source, opener: Callable, field: str, errors: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with opener(source.path) as raw, pyarrow.parquet.ParquetFile(raw) as file:
            if field not in (names := file.schema_arrow.names):
                raise UsageError(f"{source.path}: config.data.field = {field!r} is missing; columns there: "
                                 f"{', '.join(names)}")
            if (kind := file.schema_arrow.field(field).type) not in (pyarrow.string(), pyarrow.large_string()):
                raise UsageError(f"{source.path}: config.data.field = {field!r} holds {kind}, expected text")
            row = 0
            for batch in file.iter_batches(1024, columns=[field]):
                for value in batch.column(0).cast(pyarrow.large_binary()):  # decoded here, for the choice of `errors`
                    row += 1
                    place = Path(f"{source.path}:{row}")
                    if not value.is_valid:
                        raise UsageError(f"{place}: config.data.field = {field!r} is null, expected text")
                    yield Document(f"{source.name}:{row}", *_text(value.as_py(), place, 0, errors))
    except pyarrow.ArrowException as error:
        raise UsageError(f"{source.path}: not a readable parquet file: {error}") from None


READERS = {".txt": _read_text, ".md": _read_text, ".py": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
SUFFIXES = f"{' '.join(READERS)}, and all but .parquet with {' '.join(k for k in OPENERS if k)} after it"


def suffixes(path: Path) -> tuple[str, str] | None:
    """(format, compression) of a file that can be read, else None."""
    suffix = path.suffix.lower()
    packing = suffix if suffix in OPENERS else ""
    kind = path.with_suffix("").suffix.lower() if packing else suffix
    return (kind, packing) if kind in READERS and not (packing and kind == ".parquet") else None


def _walk(folder: Path, name: str, excluded: Iterable[str] = ()) -> list[Source]:
    """Readable files under `folder`, by path; hidden and `excluded` folders are left out."""
    def fail(error):
        raise error

    found = []
    for here, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [f for f in folders if not f.startswith(".") and f not in excluded]
        paths = [Path(here, f).relative_to(folder) for f in files if not f.startswith(".")]
        found += [path for path in paths if suffixes(path)]
    return [Source(folder / path, f"{name}/{path.as_posix()}") for path in sorted(found)]


NOT_LIBRARY = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled")


def _standard_library() -> list[Source]:
    folder = Path(sysconfig.get_path("stdlib"))
    return [source for source in _walk(folder, "stdlib", NOT_LIBRARY) if source.path.suffix == ".py"]


def _expand(spec: str, key: str) -> list[Source]:
    path = Path(spec).expanduser()
    if spec == "stdlib":
        found = _standard_library()
    elif path.is_dir():
        found = _walk(path, path.resolve().name)
    elif path.exists():
        found = [Source(path, path.name)] if suffixes(path) else []
    elif glob.has_magic(spec):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        if not matches:
            raise UsageError(f"{key} = {spec!r}: no file matches")
        found = [s for m in matches for s in
                 (_walk(m, m.resolve().name) if m.is_dir() else [Source(m, m.name)] if suffixes(m) else [])]
    else:
        raise UsageError(f"{key} = {spec!r}: no such file or directory")
    if not found:
        raise UsageError(f"{key} = {spec!r}: no usable files; read are {SUFFIXES}")
    return found


def find(paths: tuple[str, ...], key: str = "config.data.path") -> tuple[Source, ...]:
    """The files that `paths` mean, in a fixed order, each once: files, directories (recursive), globs, and the word
    `stdlib`, the running interpreter's library without its tests (a folder of that name is `./stdlib`).

    UsageError, naming the setting `key`, for a path that does not exist or holds nothing that can be read."""
    if not paths:
        raise UsageError(f"{key} is empty: name files, directories or globs, or the word stdlib")
    try:
        found = [source for spec in paths for source in _expand(spec, key)]
        return tuple({source.path.resolve(): source for source in found}.values())
    except OSError as error:
        raise UsageError(f"{key} = {', '.join(paths)}: {error}") from None


def documents(sources: Iterable[Source], field: str, errors: str) -> Iterator[Document]:
    """Every document that has text, in order. `field` names the text of .jsonl and .parquet; `errors` is `strict` or
    `replace`. UsageError for a file that cannot be read, naming it and the place in it."""
    for source in sources:
        kind, packing = suffixes(source.path)
        try:
            yield from (d for d in READERS[kind](source, OPENERS[packing], field, errors) if d.text)
        except ImportError as error:
            raise UsageError(f"{source.path}: reading it needs a package; pip install {error.name}") from None
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise UsageError(f"{source.path}: a damaged or incomplete {packing} file: {error}") from None
        except OSError as error:
            if error.errno is None:  # pyarrow's word for damage, not the system's
                raise UsageError(f"{source.path}: a damaged or incomplete {packing} file: {error}") from None
            raise UsageError(f"{source.path}: cannot be read: {error.strerror}") from None
