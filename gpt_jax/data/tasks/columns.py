"""What a row of data holds: texts in columns, or a ValueError that says what is wrong."""

from typing import Any

WORDS = {str: "text", list: "a list", bool: "true or false"}


def get(row: dict, field: str, kind: type, label: str) -> Any:
    """row[field], which must be of `kind`. `label` is what messages call it."""
    if field not in row:
        raise ValueError(f"{label} is missing; fields there: {', '.join(row) or 'none'}")
    value = row[field]
    if not isinstance(value, kind):
        raise ValueError(f"{label} holds {type(value).__name__}, expected {WORDS[kind]}")
    return value


def get_text(row: dict, column: str, label: str) -> str:
    """The text of a column, which must hold more than white space."""
    text = get(row, column, str, label)
    if not text.strip():
        raise ValueError(f"{label} is empty")
    return text
