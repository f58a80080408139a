"""How devices embed tokens when each has a part of the columns: two ways, and their bytes."""

from typing import NamedTuple

FULL_BYTES = 4  # Of an entry in float32, and of a token's number.


class LookupSizes(NamedTuple):
    """What one device has in one lookup.

    - `rows`: rows of the table. The axis tensor cuts the vocabulary.
    - `width`: columns of the whole table.
    - `tokens`: the device's own tokens.
    - `devices`: how many devices share the columns.
    - `entry`: bytes of an entry of what is looked up.
    """

    rows: int
    width: int
    tokens: float
    devices: int
    entry: int


def count_lookup_bytes(sizes: LookupSizes) -> dict[str, float]:
    """Counts what one device sends in a lookup and its gradient, by way.

    - `tables`: the table is gathered in float32, and its gradient is scattered.
    - `columns`: numbers of tokens are gathered, and what is looked up travels there and back.
    """
    others = (sizes.devices - 1) / sizes.devices
    table = sizes.rows * sizes.width * FULL_BYTES
    numbers = sizes.tokens * sizes.devices * FULL_BYTES
    looked_up = sizes.tokens * sizes.width * sizes.entry
    return {"tables": others * 2 * table, "columns": others * (numbers + 2 * looked_up)}


def choose_embed_lookup(asked: str, sizes: LookupSizes) -> str:
    """Returns the way that `asked`, a value of compute.embed_lookup, means for these sizes."""
    if asked != "auto":
        return asked
    counts = count_lookup_bytes(sizes)
    return min(counts, key=counts.__getitem__)
