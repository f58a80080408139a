"""An example: spans of text, each learned or not, and special tokens between them."""

from collections.abc import Iterable
from typing import NamedTuple


class Span(NamedTuple):
    """Some text of an example."""

    text: str
    learn: bool = True  # whether a model learns to write it
    # Whether `text` is the name of a special token. It is that token then, and no text.
    special: bool = False


class Example(NamedTuple):
    """What a model reads, in order.

    A span is tokenized by itself, so no token holds characters of two spans. What ends a document
    is learned if its last span is.
    """

    spans: tuple[Span, ...]

    @property
    def text(self) -> str:
        """All of the text, without the names of special tokens."""
        if len(self.spans) == 1 and not self.spans[0].special:
            return self.spans[0].text
        return "".join(span.text for span in self.spans if not span.special)

    @property
    def is_plain(self) -> bool:
        """Whether it is one text that is learned."""
        return len(self.spans) == 1 and self.spans[0].learn and not self.spans[0].special


def make_example(spans: Iterable[Span]) -> Example:
    """The example of `spans`, those without text left out, and neighbours with one flag joined.

    So an example that is learned whole is tokenized as its text is. Special tokens stay apart.
    """
    joined: list[Span] = []
    for span in spans:
        if not span.text:
            continue
        flags = span.learn, span.special
        if joined and not span.special and flags == (joined[-1].learn, joined[-1].special):
            joined[-1] = Span(joined[-1].text + span.text, span.learn)
        else:
            joined.append(span)
    return Example(tuple(joined) or (Span(""),))
