"""Further held-out texts of a run, which `config.eval.sets` names."""

import hashlib
from collections.abc import Callable
from dataclasses import replace

from gpt_jax import config
from gpt_jax.data.stream.dataset import Dataset, load_heldout
from gpt_jax.data.tokens.shards import Tokens
from gpt_jax.errors import UsageError

# Ids of a set that are hashed at once.
CHUNK = 1 << 20


def load_sets(
    dataset: Dataset,
    sets: tuple[tuple[str, str], ...],
    data: config.Data,
    report: Callable[[str], None] = print,
) -> Dataset:
    """`dataset` with the tokens of `sets`, which are (name, path) each.

    A set is all of a text, or what a folder made by `gpt-jax prepare` holds out. Each of several
    sources there is a set `name/source`. Raises UsageError if a path cannot be used, or if a set
    has the name of a source.
    """
    # A set of several sources has metrics named set/source.
    names = [part.name.split("/")[0] for part in dataset.parts]
    loaded: dict[str, Tokens] = {}
    for i, (name, path) in enumerate(sets):
        field = f"config.eval.sets[{i}]"
        # A single text is a source without a name of its own.
        if name in names and len(names) > 1:
            raise UsageError(
                f"{field} = {name}: is the name of a source of {data.where}; choose another"
            )

        def report_set(line: str, name=name) -> None:
            report(f"{name}: {line}")

        try:
            loaded |= load_heldout(path, data, dataset.tokenizer, report_set, field, name)
        except UsageError as error:
            # What is wrong inside a file is said of the file alone.
            if str(error).startswith(field):
                raise
            raise UsageError(f"{field} = {name}: {error}") from None
    digests = {name: digest_set(tokens) for name, tokens in loaded.items()}
    return replace(dataset, sets=loaded, set_digests=digests)


def digest_set(tokens: Tokens) -> str:
    """A digest of the ids of a set, and of where its documents begin."""
    digest = hashlib.sha256(tokens.offsets.tobytes())
    for start in range(0, tokens.size, CHUNK):
        digest.update(tokens.ids(start, min(start + CHUNK, tokens.size)).tobytes())
    return digest.hexdigest()[:20]
