"""Names of end of text that stand in the text of documents.

Such text is encoded as ordinary characters. It often means that documents were joined in one file.
"""

from gpt_jax.data.tokenizers.vocabulary import EOT, Tokenizer


def list_end_names(tokenizer: Tokenizer) -> tuple[str, ...]:
    """`<|endoftext|>`, which data sets use whatever the tokenizer is, and the tokenizer's own."""
    own = [name for name, i in tokenizer.specials.items() if i == tokenizer.eot]
    return tuple(dict.fromkeys([EOT, *own]))


def find_end_name(text: str, names: tuple[str, ...]) -> str:
    """The first of `names` that a text holds, "" if it holds none."""
    return next((name for name in names if name in text), "")


def describe_marks(marks: dict[str, int], field: str) -> list[str]:
    """A line for each name that documents hold. `marks` counts the documents by name."""
    return [
        f"{count:,} document{'s' if count > 1 else ''} hold{'' if count > 1 else 's'} the text "
        f"{name}, which is encoded as ordinary characters and ends nothing; {field}='{name}' cuts "
        "text files there"
        for name, count in sorted(marks.items())
    ]
