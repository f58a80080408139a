"""Tasks: pure functions that make an Example of a row.

A task is a function `(row, field, label) -> Example`. `row` is a JSON object. `field` is the name
that --field gives, and `label` is what messages call it. It raises ValueError for a row that it
cannot read.
"""

from collections.abc import Callable

from gpt_jax.data.tasks.example import Example, Span, make_example


def _get(row: dict, field: str, kind: type, label: str):
    """row[field], which must be of `kind`."""
    if field not in row:
        raise ValueError(f"{label} is missing; fields there: {', '.join(row) or 'none'}")
    value = row[field]
    if not isinstance(value, kind):
        words = {str: "text", list: "a list", bool: "true or false"}
        raise ValueError(f"{label} holds {type(value).__name__}, expected {words[kind]}")
    return value


def plain(row: dict, field: str, label: str) -> Example:
    """The text of one field, learned whole."""
    return Example((Span(_get(row, field, str, label)),))


def spans(row: dict, field: str, label: str) -> Example:
    """`{"spans": [{"text": …, "learn": false}, …]}`, where `learn` is true if it is missing."""
    parts = []
    for i, part in enumerate(_get(row, "spans", list, "the field 'spans' of --task=spans")):
        where = f"spans[{i}]"
        if not isinstance(part, dict):
            raise ValueError(f"{where} is {type(part).__name__}, expected an object")
        text = _get(part, "text", str, f"{where}.text")
        learn = _get({"learn": True} | part, "learn", bool, f"{where}.learn")
        parts.append(Span(text, learn))
    return make_example(parts)


def supervised(row: dict, field: str, label: str) -> Example:
    """`{"prompt": …, "response": …}`, of which the response is learned."""
    prompt = _get(row, "prompt", str, "the field 'prompt' of --task=supervised")
    response = _get(row, "response", str, "the field 'response' of --task=supervised")
    return make_example([Span(prompt, learn=False), Span(response)])


TASKS: dict[str, Callable[[dict, str, str], Example]] = {
    "plain": plain,
    "spans": spans,
    "supervised": supervised,
}
