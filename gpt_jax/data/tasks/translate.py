"""Translation as text: a prompt with a sentence, and its translation."""

from dataclasses import dataclass

from gpt_jax.data.tasks.columns import get_text
from gpt_jax.data.tasks.example import Example, Span, make_example
from gpt_jax.data.tasks.options import fill, list_places

DIRECTIONS = ("forward", "backward")
PLACES = ("text", "from", "to")


@dataclass(frozen=True)
class Translate:
    """How a pair of texts is translated. Raises ValueError for options that name no task."""

    # The columns of the two texts.
    source: str = "source"
    target: str = "target"

    # What the prompt calls the two languages. Empty: by the names of the columns.
    source_language: str = ""
    target_language: str = ""

    # forward writes the target, and backward writes the source.
    direction: str = "forward"

    # The prompt. {text} is the text to translate, and {from} and {to} are the languages.
    prompt: str = "Translate {from} to {to}: {text}\n"

    def __post_init__(self):
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction={self.direction}: choose one of {', '.join(DIRECTIONS)}")
        places = list_places(self.prompt)
        unknown = [name for name in places if name not in PLACES]
        if unknown or "text" not in places:
            raise ValueError(
                f"prompt={self.prompt!r}: expected {{text}}, and perhaps {{from}} and {{to}}"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the two texts."""
        return self.source, self.target


def read_translated(row: dict, options: Translate) -> Example:
    """The prompt with one text, and the other one, which is learned."""
    texts = [
        (
            get_text(row, column, f"the {side} column {column!r} of --task=translate"),
            language or column,
        )
        for side, column, language in (
            ("source", options.source, options.source_language),
            ("target", options.target, options.target_language),
        )
    ]
    if options.direction == "backward":
        texts.reverse()
    (text, before), (translation, after) = texts
    prompt = fill(options.prompt, {"text": text, "from": before, "to": after})
    return make_example([Span(prompt, learn=False), Span(translation)])
