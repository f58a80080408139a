"""The token that the model of a tokenizer expects before each text, such as <s>.

The tokenizer of a converted model knows it. Any other is asked here, if documents are to begin
with it.
"""

from collections.abc import Callable

from gpt_jax.data.tokenizers.bpe import find_begin
from gpt_jax.data.tokenizers.files import find_sentencepiece_begin
from gpt_jax.data.tokenizers.spec import Spec
from gpt_jax.data.tokenizers.vocabulary import Tokenizer, with_frame
from gpt_jax.errors import UsageError

# How the file of a tokenizer tells the token. The other kinds have none.
FINDERS: dict[str, Callable[[Tokenizer], int | None]] = {
    "json": find_begin,
    "sentencepiece": find_sentencepiece_begin,
}


def require_begin(tokenizer: Tokenizer | Spec, field: str) -> Tokenizer:
    """`tokenizer` with its `begin`, which documents are to begin with.

    Raises UsageError, which starts with `field`, for a tokenizer that has no such token, and for
    one whose end of text serves as that token.
    """
    way = (
        "name the tokenizer of a model that has one, such as a tokenizer.json whose "
        "post_processor adds it, or leave the field out"
    )
    if isinstance(tokenizer, Spec):
        raise UsageError(
            f"{field}: the tokenizer {tokenizer.name} is made from the text and has no token that "
            f"begins one; {way}"
        )

    begin = tokenizer.begin
    if begin is None and tokenizer.kind in FINDERS:
        begin = FINDERS[tokenizer.kind](tokenizer)
    if begin is None:
        raise UsageError(
            f"{field}: the tokenizer {tokenizer.name} has no token that begins a text; {way}"
        )
    framed = with_frame(tokenizer, begin, tokenizer.ends)
    if begin == tokenizer.eot:
        raise UsageError(
            f"{field}: the tokenizer {tokenizer.name} begins and ends texts with one token, "
            f"{name_begin(framed)}, which stands between documents already; leave it out"
        )
    return framed


def begins_documents(tokenizer: Tokenizer | None) -> bool:
    """Whether the model of a tokenizer was trained with a token before each document."""
    return tokenizer is not None and tokenizer.begin not in (None, tokenizer.eot)


def name_begin(tokenizer: Tokenizer) -> str:
    """The name of the token, or its number."""
    names = [name for name, i in tokenizer.specials.items() if i == tokenizer.begin]
    return names[0] if names else str(tokenizer.begin)


def keep_frame(tokenizer: Tokenizer, required: Tokenizer | None, field: str) -> Tokenizer:
    """`tokenizer` of some tokens with what frames a text for the model that a run starts from.

    `required` is the tokenizer of that model, if there is one. Raises UsageError, which starts with
    `field`, if the documents begin with another token than the model expects.
    """
    if required is None:
        return tokenizer
    begin = tokenizer.begin if required.begin is None else required.begin
    if tokenizer.begin not in (None, begin):
        raise UsageError(
            f"{field}: its documents begin with {name_begin(tokenizer)}, and texts of "
            f"the model with {name_begin(required)}; prepare it again with the "
            "tokenizer of the model"
        )
    return with_frame(tokenizer, begin, required.ends or tokenizer.ends)
