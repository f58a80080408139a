"""How the bytes of a row become a document's text, and why some do not."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from gpt_jax.data.read.sources import Source
from gpt_jax.data.tasks.example import Span, make_example
from gpt_jax.data.tasks.options import Pairs
from gpt_jax.data.tasks.tasks import TASKS, name_field, read_options
from gpt_jax.errors import UsageError, plain

CHOICES = {
    "errors": ("strict", "replace"),
    "on_error": ("stop", "skip"),
    "documents": ("file", "line"),
    "task": tuple(TASKS),
}
SKIP = "gpt-jax prepare --on_error=skip leaves it out and counts it"
REPLACE = "--config.data.errors=replace (--errors=replace of prepare)"


@dataclass(frozen=True)
class Reading:
    """How documents are read. Raises UsageError for a value that means nothing."""

    # The text's column of .jsonl .json .csv .tsv .parquet .arrow and hf://.
    field: str = "text"

    # Undecodable bytes: strict | replace.
    errors: str = "strict"

    # They are tried in order. The first that decodes a document strictly wins.
    encodings: tuple[str, ...] = ("utf-8",)

    # A row that cannot be read is an error (stop), or is counted and left out (skip).
    on_error: str = "stop"

    # What one document of .txt .md .py is: file | line.
    documents: str = "file"

    # A row of TASKS: what is learned of a row that is a JSON object, or of a row of a table.
    task: str = "plain"

    # What stands between the documents of .txt .md .py, such as <|endoftext|>. It is taken out, and
    # so is the end of line after it. Empty: nothing does.
    separator: str = ""

    # Options of the task, by name.
    task_options: Pairs = ()

    def __post_init__(self):
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise UsageError(
                    f"{name} = {getattr(self, name)!r}: choose one of {', '.join(known)}"
                )

        try:
            read_options(self.task, self.task_options, self.field)
        except ValueError as error:
            raise UsageError(f"task_options {error}") from None
        if not self.encodings:
            raise UsageError("encodings is empty: name at least one, such as utf-8")
        for name in self.encodings:
            try:
                b"a".decode(name, "replace")
                "é".encode(name, "replace").decode(name, "replace")
            except (LookupError, UnicodeError):
                raise UsageError(
                    f"encodings = {name!r}: no text encoding of this name; known are utf-8, "
                    "utf-16, gb18030, big5, latin-1, shift-jis and the others of python"
                ) from None
        if self.separator:
            self._check_separator()

    def _check_separator(self) -> None:
        """Raises UsageError if the separator cannot be looked for."""
        said = f"separator = {self.separator!r}"
        if self.documents != "file":
            raise UsageError(
                f"{said}: is for documents = file, and documents = {self.documents} cuts at ends "
                "of lines; give one of them"
            )
        try:
            spellings = {self.separator.encode(name) for name in self.encodings}
        except UnicodeEncodeError:
            spellings = set()
        if len(spellings) != 1:
            raise UsageError(
                f"{said}: has no bytes that all of encodings = {', '.join(self.encodings)} share; "
                "name one encoding, or a separator of ASCII"
            )

    @property
    def label(self) -> str:
        """The field, for messages."""
        return name_field(self.field)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a table that the task needs."""
        return read_options(self.task, self.task_options, self.field).columns


class Piece(NamedTuple):
    """A part of a source that is read by itself."""

    source: Source

    # The first byte of lines, row group of .parquet or shard of hf://. It is 0 for other formats.
    start: int

    # Where the piece ends, or -1 for the end of the source. A row that begins before it belongs to
    # the piece.
    stop: int


class Unreadable(ValueError):
    """Why a row cannot be read."""


class Damaged(UsageError):
    """The rest of a file cannot be read."""

    remedy = "copy it again"


class Broken(Damaged):
    """The rest of a file cannot be read because nobody can tell where its next row begins."""

    remedy = "mend it"


class Decoded(NamedTuple):
    """A text, and how it was decoded."""

    text: str
    encoding: str
    replaced: int  # undecodable places that became U+FFFD
    spans: tuple[Span, ...] = ()  # of the text; () if all of it is learned


class Raw(NamedTuple):
    """A row of a file, before it becomes a document."""

    # Bytes that are not decoded yet, a text, the reason why there is none, or None for a header.
    value: bytes | Decoded | Unreadable | None

    # The byte of the file at which the bytes begin, if that is known.
    start: int = 0

    # The number in the file from 1. It is 0 if this piece does not know it, and -1 if the file is
    # one document.
    row: int = 0


# ---- text ----


def listed(names: Iterable) -> str:
    """Names in one line, for a message."""
    return plain(", ".join(map(str, names))) or "none"


def decode(raw: bytes, reading: Reading, start: int = 0) -> Decoded:
    """The text of bytes that begin at byte `start` of a file.

    Raises Unreadable if no encoding fits.
    """
    first_error = ""
    for name in reading.encodings:
        try:
            text = raw.decode(name)
        except UnicodeDecodeError as error:
            place = f"byte {start + error.start} (0x{raw[error.start]:02x})"
            first_error = first_error or f"not {name.upper()} at {place}"
            continue
        if "\0" not in text:
            return Decoded(text, name, 0)

    nul = raw.find(b"\0")
    if nul >= 0:
        raise Unreadable(
            f"byte {start + nul} is NUL, so this is a binary file (or UTF-16) among the text; "
            "take it out of the data, or convert it to UTF-8"
        )
    if reading.errors == "strict":
        others = "".join(f", nor {name.upper()}" for name in reading.encodings[1:])
        raise Unreadable(
            f"{first_error}{others}; convert the file to UTF-8; a run, and prepare, can also name "
            f"its encoding, or go on with {REPLACE}"
        )

    name = reading.encodings[0]
    text = raw.decode(name, "replace")
    try:
        there = raw.count("\ufffd".encode(name))
    except UnicodeEncodeError:  # This encoding has no such character, so the text had none.
        there = 0
    return Decoded(text, name, text.count("\ufffd") - there)


def parse_json(text: str):
    """The value of a text. Raises Unreadable if it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"not JSON: {error}") from None


def check_column(names: list[str], piece: Piece, reading: Reading, more: str = "") -> None:
    """Raises UsageError unless exactly one column has the name."""
    path = piece.source.path
    count = names.count(reading.field)
    if not count:
        raise UsageError(
            f"{path}: {reading.label} is missing; columns there: {listed(names)}{more}"
        )
    if count > 1:
        raise UsageError(
            f"{path}: {reading.label} names {count} columns; columns there: {listed(names)}; "
            "rename all but the one to be read"
        )


def field_text(
    row, reading: Reading, encoding: str = "utf-8", replaced: int = 0, check: bool = True
) -> Decoded:
    """The text of a row, which must be a dict.

    `check` looks for halves of surrogate pairs, which JSON can spell and which are no characters.
    They are treated as undecodable bytes are. Raises Unreadable.
    """
    if not isinstance(row, dict):
        raise Unreadable(f"expected a JSON object, got {type(row).__name__}")
    options = read_options(reading.task, reading.task_options, reading.field)
    try:
        example = TASKS[reading.task].read(row, options)
    except ValueError as error:
        raise Unreadable(plain(error)) from None
    if check and not example.text.isascii():
        mended = [_mend(span.text, reading) for span in example.spans]
        replaced += sum(count for _, count in mended)
        texts = (text for text, _ in mended)
        example = make_example(map(_replace_text, example.spans, texts))
    return Decoded(example.text, encoding, replaced, () if example.is_plain else example.spans)


def _replace_text(span: Span, text: str) -> Span:
    return span._replace(text=text)


def _mend(text: str, reading: Reading) -> tuple[str, int]:
    """(`text` without lone surrogates, how many of them became U+FFFD)."""
    try:
        text.encode()
        return text, 0
    except UnicodeEncodeError as error:
        if reading.errors == "strict":
            raise Unreadable(
                f"character {error.start} is a lone surrogate ({text[error.start]!r}); mend the "
                f"file, or go on with {REPLACE}"
            ) from None
    mended = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return mended, mended.count("\ufffd") - text.count("\ufffd")


def json_text(line: Decoded, reading: Reading) -> Decoded:
    """The text of a line that holds a JSON object; "" for a blank line."""
    text = line.text.removeprefix("\ufeff")
    if not text or text.isspace():
        return line._replace(text="")
    escapes = "\\u" in text  # Decoded bytes hold no surrogate, but JSON's escapes can.
    return field_text(parse_json(text), reading, line.encoding, line.replaced, escapes)


def line_text(line: Decoded, reading: Reading) -> Decoded:
    """A line without its end; "" for a blank line."""
    text = line.text.removesuffix("\n").removesuffix("\r")
    return line._replace(text="" if text.isspace() else text)


def plain_text(text: Decoded, reading: Reading) -> Decoded:
    """The text of a whole file, unchanged."""
    return text


def separated_text(text: Decoded, reading: Reading) -> Decoded:
    """What stands between two separators, unchanged; "" if it is blank."""
    return text._replace(text="") if text.text.isspace() else text
