"""What a tokenizer file must keep to, tried on a few texts when the file is read."""

from collections.abc import Iterable

from gpt_jax.data.tokenizers.vocabulary import Tokenizer
from gpt_jax.errors import UsageError

# Words, spaces, ends of lines, digits, signs, and characters of 2, 3 and 4 bytes.
PROBE = "The café,\r\n\tit's  2024!\n\n 我们 👍 x_y (z) "


def find_made(tokenizer: Tokenizer, names: Iterable[str]) -> list[str]:
    """Those of the special tokens `names` that the tokenizer makes of plain text."""
    made = []
    specials = set(tokenizer.specials.values())
    for name in names:
        # Some tokenizers take a name for a token only where it stands alone.
        texts = (name, f" {name} ", f"a{name}b", f"{name}{name}", f"\n{name}\n")
        ids = tokenizer.encode_batch(texts)
        if any(not specials.isdisjoint(row.tolist()) for row in ids):
            made.append(name)
    return made


def check_promises(tokenizer: Tokenizer) -> Tokenizer:
    """`tokenizer`, if it makes no special token of text, and gives text back if it says so.

    Raises UsageError if it does not.
    """
    made = find_made(tokenizer, tokenizer.specials)
    if made:
        raise UsageError(
            f"tokenizer {tokenizer.name}: makes the special token {made[0]} of plain text that "
            "says so, and a document would end in its middle; give that token another name in the "
            "file, or use another tokenizer"
        )

    back = tokenizer.decode(tokenizer.encode(PROBE))
    if tokenizer.lossless and back != PROBE:
        raise UsageError(
            f"tokenizer {tokenizer.name}: gives {back!r} back for {PROBE!r}, and nothing in the "
            "file says why; use another tokenizer"
        )
    return tokenizer
