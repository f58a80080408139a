"""The text side of decoding: a row takes tokens and gives characters, up to a stop string."""

from collections.abc import Sequence
from typing import NamedTuple

from gpt_jax.data import StreamDecoder, Tokenizer


class Completion(NamedTuple):
    """A finished row.

    `tokens` are the new ones without the end-of-text token. `text` is their text up to the stop
    string. `finish` is length, stop or eot.
    """

    prompt: int
    sample: int
    tokens: tuple[int, ...]
    text: str
    finish: str


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Finds the place where `text` is cut, or None without a stop string in it.

    The text is cut at the start of the stop string that is complete first, and of several at the
    longest. It does not matter how the text was split into tokens.
    """
    matches = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    return min(matches)[1] if matches else None


def held_back(text: str, stops: Sequence[str]) -> int:
    """Counts the last characters that may be the beginning of a stop string."""
    return max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
    )


class Row:
    """One row's text: it takes tokens, and gives the characters that may be shown.

    `finish` is None until the row ends. `starts` tells that no text comes before it.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], limit: int, starts: bool = False
    ):
        self._decoder = StreamDecoder(tokenizer, starts)
        self._ends = {tokenizer.eot, *tokenizer.ends}
        self._stops = stops
        self._limit = limit
        self._waiting = ""  # characters that may be the beginning of a stop string

        self.tokens: list[int] = []
        self.text = ""
        self.finish: str | None = None

    def push(self, token: int) -> str:
        """Takes one token, and returns the characters that it makes certain."""
        if token in self._ends:
            shown = self._end("eot")
        else:
            self.tokens.append(token)
            shown = self._take(self._decoder.feed(token))
            if self.finish is None and len(self.tokens) == self._limit:
                shown += self._end("length")
        self.text += shown
        return shown

    def _take(self, text: str) -> str:
        """Takes text, and returns what can be no part of a stop string."""
        text = self._waiting + text
        cut = first_stop(text, self._stops)
        if cut is not None:
            self.finish = "stop"
        else:
            cut = len(text) - held_back(text, self._stops)

        self._waiting = text[cut:]
        return text[:cut]

    def _end(self, reason: str) -> str:
        """Ends the row, and returns the rest of its text."""
        shown = self._take(self._decoder.flush())
        if self.finish is None:
            self.finish = reason
            shown += self._waiting
        return shown


def complete(row: Row, prompt: int, sample_number: int) -> Completion | None:
    """Makes the completion of a row that has ended."""
    if row.finish is None:
        return None
    return Completion(prompt, sample_number, tuple(row.tokens), row.text, row.finish)
