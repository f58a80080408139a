"""How a file's bytes are unpacked and become a document's text, and why some do not (called by
formats, hub and readers)."""

import contextlib
import gzip
import io
import json
import lzma
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from gpt_jax.data.read import remote
from gpt_jax.data.read.sources import Source, format_and_packing
from gpt_jax.errors import UsageError

BUFFER = 1 << 17
CHOICES = {
    "errors": ("strict", "replace"),
    "on_error": ("stop", "skip"),
    "documents": ("file", "line"),
}
SKIP = "gpt-jax prepare --on_error=skip leaves it out and counts it"
REPLACE = "--config.data.errors=replace (--errors=replace of prepare)"


@dataclass(frozen=True)
class Reading:
    """How documents are read. UsageError for a value that means nothing."""

    field: str = "text"  # the text's column of .jsonl .json .csv .tsv .parquet .arrow and hf://
    errors: str = "strict"  # strict | replace: undecodable bytes
    encodings: tuple[str, ...] = (
        "utf-8",
    )  # tried in order; the first that decodes a document strictly wins
    on_error: str = (
        "stop"  # stop | skip: a row that cannot be read is an error, or is counted and left out
    )
    documents: str = "file"  # file | line: what one document of .txt .md .py is

    def __post_init__(self):
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise UsageError(f"{name} = {getattr(self, name)!r}: is one of {', '.join(known)}")
        if not self.encodings:
            raise UsageError("encodings is empty: name at least one, such as utf-8")
        for name in self.encodings:
            try:
                b"a".decode(name, "replace")
                "é".encode(name, "replace").decode(name, "replace")
            except (LookupError, UnicodeError):
                raise UsageError(
                    f"encodings = {name!r}: no text encoding of this name; known are utf-8, "
                    "utf-16, "
                    "gb18030, big5, latin-1, shift-jis and the others of python"
                ) from None

    @property
    def label(self) -> str:
        return f"config.data.field = {self.field!r} (--field of prepare)"


class Piece(NamedTuple):
    """A part of a source that is read by itself."""

    source: Source
    start: int  # first byte of lines, first row group of .parquet, first shard of hf://; else 0
    stop: int  # where it ends (a row that begins before it belongs to this piece); -1: the end


class Unreadable(ValueError):
    """Why a row cannot be read."""


class Damaged(UsageError):
    """The rest of a file cannot be read."""


class Decoded(NamedTuple):
    text: str
    encoding: str
    replaced: int  # undecodable places that became U+FFFD


class Raw(NamedTuple):
    """A row: bytes not yet decoded, or what came decoded, or why there is none. None: a header,
    no document."""

    value: bytes | Decoded | Unreadable | None
    start: int = 0  # byte of the file at which bytes begin, where that is known
    # number in the file from 1, where a later piece knows it; 0: not known; -1: the file is one
    # document
    row: int = 0


# ---- unpacking ----


def _unpack_arrow(file: BinaryIO, compression: str) -> BinaryIO:
    """pyarrow takes several frames for one file, and refuses a torn end and whatever follows the
    last frame."""
    import pyarrow

    return pyarrow.input_stream(file, compression=compression)


def _streams_of_xz(file: BinaryIO) -> Iterator[bytes]:
    """lzma.LZMAFile takes a later stream that it cannot decode for the end of the file, and says
    nothing."""
    rest = b""
    while True:
        stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)
        while not stream.eof:
            if stream.needs_input and not (rest := rest or file.read(BUFFER)):
                raise EOFError("it ends before its last stream does")
            packed, rest = rest, b""
            yield stream.decompress(packed, BUFFER)
        rest, padding = stream.unused_data, 0
        while (rest := rest or file.read(BUFFER)) and not rest[0]:
            size, rest = len(rest), rest.lstrip(b"\0")
            padding += size - len(rest)
        if padding % 4:
            raise lzma.LZMAError("what follows a stream is neither padding nor another one")
        if not rest:
            return


class _Blocks(io.RawIOBase):
    """A file to read, made of blocks of bytes."""

    def __init__(self, blocks: Iterator[bytes]):
        self.blocks, self.left = blocks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, out) -> int:
        while not self.left and (block := next(self.blocks, None)) is not None:
            self.left = block
        taken, self.left = self.left[: len(out)], self.left[len(out) :]
        out[: len(taken)] = taken
        return len(taken)


UNPACK = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".xz": lambda file: _Blocks(_streams_of_xz(file)),
    ".zst": lambda file: _unpack_arrow(file, "zstd"),
    ".bz2": lambda file: _unpack_arrow(file, "bz2"),
}


@contextlib.contextmanager
def opened(source: Source, seekable: bool = False) -> Iterator[io.BufferedReader]:
    """The unpacked bytes of a file. `seekable`: a packed one is unpacked into a temporary file
    first."""
    _, packing = format_and_packing(source)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(remote.open_binary(source.path))
        if packing:
            file = stack.enter_context(UNPACK[packing](file))
        if packing and seekable:
            whole = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file, whole, 1 << 20)
            whole.seek(0)
            file = whole
        yield file if isinstance(file, io.BufferedReader) else io.BufferedReader(file, BUFFER)


# ---- text ----


def plain(text) -> str:
    """What a file or a library says, for a message: one line, and nothing in it that a terminal
    would obey or hide."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(text).split()))


def listed(names: Iterable) -> str:
    return plain(", ".join(map(str, names))) or "none"


def decode(raw: bytes, reading: Reading, start: int = 0) -> Decoded:
    """The text of bytes that begin at byte `start` of a file. Unreadable if no encoding fits."""
    wrong = ""
    for name in reading.encodings:
        try:
            text = raw.decode(name)
        except UnicodeDecodeError as error:
            wrong = (
                wrong
                or f"not {name.upper()} at byte {start + error.start} (0x{raw[error.start]:02x})"
            )
            continue
        if "\0" not in text:
            return Decoded(text, name, 0)
    if (nul := raw.find(b"\0")) >= 0:
        raise Unreadable(
            f"byte {start + nul} is NUL, so this is a binary file (or UTF-16) among the text; take "
            "it out "
            "of the data, or convert it to UTF-8"
        )
    if reading.errors == "strict":
        others = "".join(f", nor {name.upper()}" for name in reading.encodings[1:])
        raise Unreadable(
            f"{wrong}{others}; convert the file, name its encoding, or go on with {REPLACE}"
        )
    name = reading.encodings[0]
    text = raw.decode(name, "replace")
    try:
        there = raw.count("\ufffd".encode(name))
    except UnicodeEncodeError:  # cannot be spelt, so none is there
        there = 0
    return Decoded(text, name, text.count("\ufffd") - there)


def parse_json(text: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"not JSON: {error}") from None


def field_text(
    row, reading: Reading, encoding: str = "utf-8", replaced: int = 0, check: bool = True
) -> Decoded:
    """The text of a row, which must be a dict. `check`: JSON can spell half a surrogate pair,
    which is no character: the same choice as for undecodable bytes."""
    if not isinstance(row, dict):
        raise Unreadable(f"expected a JSON object, got {type(row).__name__}")
    if reading.field not in row:
        raise Unreadable(f"{reading.label} is missing; fields there: {listed(row)}")
    text = row[reading.field]
    if not isinstance(text, str):
        raise Unreadable(f"{reading.label} holds {type(text).__name__}, expected text")
    try:
        if check and not text.isascii():
            text.encode()
        return Decoded(text, encoding, replaced)
    except UnicodeEncodeError as error:
        if reading.errors == "strict":
            raise Unreadable(
                f"character {error.start} is a lone surrogate ({text[error.start]!r}); mend the "
                "file, or "
                f"go on with {REPLACE}"
            ) from None
    mended = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return Decoded(mended, encoding, replaced + mended.count("\ufffd") - text.count("\ufffd"))


def json_text(line: Decoded, reading: Reading) -> Decoded:
    """The text of a line that holds a JSON object; "" for a blank line."""
    text = line.text.removeprefix("\ufeff")
    if not text or text.isspace():
        return line._replace(text="")
    escapes = "\\u" in text  # decoded bytes hold no surrogate, only JSON's escapes can
    return field_text(parse_json(text), reading, line.encoding, line.replaced, escapes)


def line_text(line: Decoded, reading: Reading) -> Decoded:
    """A line without its end; "" for a blank line."""
    text = line.text.removesuffix("\n").removesuffix("\r")
    return line._replace(text="" if text.isspace() else text)


def plain_text(text: Decoded, reading: Reading) -> Decoded:
    return text
