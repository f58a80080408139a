"""Dialogues in text files: texts alone, of two who speak in turns.

The shape of a .txt tells how it is cut. Where turns are parted by `__eou__`, a line is a dialogue.
Otherwise a line is a turn, and an empty line ends a dialogue. A .yml has a list `conversations` of
lists of texts, as ChatterBot's corpora do.
"""

from collections.abc import Iterator

from gpt_jax.data.read.decoding import (
    Decoded,
    Piece,
    Raw,
    Reading,
    Unreadable,
    decode,
    field_text,
)
from gpt_jax.data.read.text_rows import lines
from gpt_jax.data.read.unpacking import opened, read_whole
from gpt_jax.errors import plain

END_OF_TURN = "__eou__"  # the mark of DailyDialog


def dialogues(piece: Piece, reading: Reading) -> Iterator[Raw]:
    """A row for each dialogue of a text file."""
    turns: list[Decoded] = []
    start = 0
    for number, raw in enumerate(lines(piece, reading), 1):
        try:
            if isinstance(raw.value, Unreadable):
                raise raw.value
            assert isinstance(raw.value, bytes)  # as all other rows of `lines`
            line = decode(raw.value, reading, raw.start)
        except Unreadable as why:
            yield Raw(why, raw.start, number)
            continue
        text = line.text.removeprefix("\ufeff").strip()
        if END_OF_TURN in text:
            # What follows a tabulator is about the dialogue and no part of it.
            said = text.partition("\t")[0].split(END_OF_TURN)
            yield make_row([line._replace(text=turn) for turn in said], reading, raw.start, number)
            continue
        start = start or number
        if text:
            turns.append(line._replace(text=text))
        elif turns:
            yield make_row(turns, reading, raw.start, start)
            turns = []
        if not text:
            start = 0
    if turns:
        yield make_row(turns, reading, 0, start)


def make_row(turns: list[Decoded], reading: Reading, start: int, number: int) -> Raw:
    """The row of a dialogue. Turns without text, such as one after the last mark, are none."""
    texts = [turn.text.strip() for turn in turns if turn.text.strip()]
    replaced = sum(turn.replaced for turn in turns)
    try:
        return Raw(
            field_text({"turns": texts}, reading, turns[0].encoding, replaced), start, number
        )
    except Unreadable as why:
        return Raw(why, start, number)


def yaml_dialogues(piece: Piece, reading: Reading) -> Iterator[Raw]:
    """A row for each entry of `conversations`. The file is read as a whole."""
    try:
        with opened(piece.source) as file:
            content = read_whole(file)
        if isinstance(content, Unreadable):
            raise content
        text = decode(content, reading)
        conversations = parse_conversations(text.text)
    except Unreadable as why:
        yield Raw(why, 0, -1)
        return
    for number, turns in enumerate(conversations, 1):
        replaced = text.replaced if number == 1 else 0
        try:
            row = {"turns": turns}
            yield Raw(field_text(row, reading, text.encoding, replaced), 0, number)
        except Unreadable as why:
            yield Raw(why, 0, number)


def parse_conversations(text: str) -> list:
    """The list `conversations` of a YAML text. Raises Unreadable."""
    import yaml

    try:
        # The base loader keeps every scalar a text: `- - No` is a word and no truth value.
        values = yaml.load(text, yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise Unreadable(f"not YAML: {plain(error)}") from None
    conversations = values.get("conversations") if isinstance(values, dict) else None
    if not isinstance(conversations, list):
        raise Unreadable("holds no list `conversations` of lists of texts")
    return conversations
