"""Classification as text: a prompt with the row's texts, and the words of its label."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpt_jax.data.tasks.columns import get, get_text
from gpt_jax.data.tasks.example import Example, Span, make_example
from gpt_jax.data.tasks.options import Pairs, fill, list_places


@dataclass(frozen=True)
class Classify:
    """How a row is classified. Raises ValueError for options that name no task."""

    # The prompt. Names of columns stand in braces.
    prompt: str = "{text}\nLabel: "

    # The column of the label. Empty: rows have none, as those that gpt-jax classify reads.
    label: str = "label"

    # What is written for each value of the label: pairs of a value and its words.
    labels: Pairs = ()

    def __post_init__(self):
        if not self.labels:
            raise ValueError(
                "labels: is needed; give what is written for each value of the column "
                f'{self.label!r}, such as labels=\'{{"0": "no", "1": "yes"}}\''
            )
        values, words = zip(*self.labels, strict=True)
        if len(self.labels) < 2 or len(set(values)) < len(values) or len(set(words)) < len(words):
            raise ValueError(
                f"labels={dict(self.labels)}: expected two labels or more, each with its own words"
            )
        if not self.inputs:
            raise ValueError(
                f"prompt={self.prompt!r}: holds no column; write its name in braces, as in {{text}}"
            )
        if self.label in self.inputs:
            raise ValueError(
                f"prompt={self.prompt!r}: holds the column of the label, {self.label!r}, which "
                "tells the answer; leave it out"
            )

    @property
    def inputs(self) -> tuple[str, ...]:
        """The columns of the prompt."""
        return list_places(self.prompt)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the prompt, and of the label if rows have one."""
        return (*self.inputs, self.label) if self.label else self.inputs

    @property
    def names(self) -> tuple[str, ...]:
        """The values of the label, in their order."""
        return tuple(value for value, _ in self.labels)

    @property
    def words(self) -> tuple[str, ...]:
        """What is written for each of `names`."""
        return tuple(words for _, words in self.labels)


def make_prompt(row: Mapping[str, Any], options: Classify) -> str:
    """The prompt of a row. Raises ValueError for a column that is missing or empty."""
    texts = {
        name: get_text(dict(row), name, f"the column {name!r} of --task=classify")
        for name in options.inputs
    }
    return fill(options.prompt, texts)


def read_label(row: dict, options: Classify) -> str:
    """The label of a row, which is one of `options.names`. Raises ValueError for another one."""
    label = f"the label column {options.label!r} of --task=classify"
    value = row.get(options.label)
    # JSON and parquet may hold classes as numbers, and true or false.
    if isinstance(value, int):
        value = str(value).lower()
        row = {**row, options.label: value}
    value = get(row, options.label, str, label)
    if value not in options.names:
        raise ValueError(f"{label} holds {value!r}; labels are {', '.join(options.names)}")
    return value


def read_classified(row: dict, options: Classify) -> Example:
    """The prompt, and the words of the label, which are learned."""
    if not options.label:
        return Example((Span(make_prompt(row, options), learn=False),))
    words = dict(options.labels)[read_label(row, options)]
    return make_example([Span(make_prompt(row, options), learn=False), Span(words)])
