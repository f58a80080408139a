"""Checks that a source of tokens, its tokenizer and the config fit each other."""

from collections.abc import Collection

from gpt_jax import config
from gpt_jax.data.tokenizers.spec import Spec
from gpt_jax.data.tokenizers.vocabulary import FIM_TOKENS, Tokenizer
from gpt_jax.data.tokens import corpus
from gpt_jax.errors import UsageError

ADD_FIM = "give config.data.tokenizer the ending +fim, as in bpe:4096+fim"


def require_tokenizer(field: str, actual: Tokenizer, wanted: Tokenizer | None, what: str) -> None:
    """Raises UsageError if `field` has another tokenizer than `wanted`, which `what` describes."""
    if wanted is not None and wanted.fingerprint != actual.fingerprint:
        raise UsageError(
            f"{field}: is tokenized by {actual.name} ({actual.fingerprint}), and {what} is "
            f"{wanted.name} ({wanted.fingerprint}); prepare it again with that tokenizer"
        )


def check_begin(field: str, path: str, opened: corpus.PreparedCorpus, data: config.Data) -> None:
    """Raises UsageError unless the documents of a corpus begin as config.data.begin says."""
    if opened.begins == data.begin:
        return
    flag = "with --begin" if data.begin else "without --begin"
    way = f"prepare it again {flag}"
    if field.startswith("config."):  # No other command takes settings of the data.
        way += f", or set config.data.begin={str(not data.begin).lower()}"
    does = "begin" if opened.begins else "do not begin"
    raise UsageError(
        f"{field} = {path}: its documents {does} with the token that begins a text, and "
        f"config.data.begin is {str(data.begin).lower()}; {way}"
    )


def check_named(
    field: str, path: str, actual: Tokenizer, spec: str, named: Tokenizer | Spec
) -> None:
    """Raises UsageError if the config names another tokenizer than the shards have.

    A tokenizer that is made from text is known by its name alone.
    """
    if isinstance(named, Spec):
        differs = actual.name != named.name
    else:
        differs = actual.fingerprint != named.fingerprint
    if differs:
        raise UsageError(
            f"config.data.tokenizer = {spec!r}: {field} = {path} is tokenized by {actual.name} "
            f"({actual.fingerprint}); leave config.data.tokenizer empty to use that, or prepare "
            "the text again"
        )


def check_fim(data: config.Data, name: str, specials: Collection[str], way: str = ADD_FIM) -> None:
    """Raises UsageError if config.data.fim needs special tokens that the tokenizer lacks.

    `name` is the tokenizer's, and `way` tells the user what can be done.
    """
    missing = [token for token in FIM_TOKENS if token not in specials]
    if data.fim and missing:
        raise UsageError(
            f"config.data.fim = {data.fim}: the tokenizer {name} has no {missing[0]}; {way}"
        )
