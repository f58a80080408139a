"""How devices embed tokens when each has a part of the columns: two ways, and their bytes."""

import math
from typing import NamedTuple

from gpt_jax.config.check_list import Checks
from gpt_jax.config.fields import Config
from gpt_jax.config.meshes import BATCH_AXES, FSDP_AXES
from gpt_jax.config.model_fields import Model
from gpt_jax.config.run_fields import Train

FULL_BYTES = 4  # Of an entry in float32, and of a token's number.
ENTRY_BYTES = {"float32": 4, "bfloat16": 2}


class LookupSizes(NamedTuple):
    """What one device has in one lookup.

    - `rows`: rows of the table, of which the axis tensor leaves a device a part.
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
    """Returns the way that `asked`, a value of compute.embed_lookup, means for these sizes.

    `auto` takes the way that sends fewer bytes.
    """
    if asked != "auto":
        return asked
    counts = count_lookup_bytes(sizes)
    return min(counts, key=counts.__getitem__)


def is_rounded_at_once(model: Model) -> bool:
    """Whether embeddings are rounded to the compute dtype before anything is added to them.

    They then travel in that dtype, and are the same numbers as those that are rounded afterwards.
    """
    return model.embed_scale == 1 and model.position not in ("learned", "sinusoidal")


def find_lookup_sizes(config: Config, train: Train, shape: dict[str, int]) -> LookupSizes | None:
    """The sizes of the embedding's lookup in a microbatch of `train`, on a mesh of these axes.

    They are None if every device has all columns.
    """
    devices = math.prod(shape[axis] for axis in FSDP_AXES)
    if devices == 1 or config.mesh.zero == 1:
        return None

    pieces = math.prod(shape[axis] for axis in (*BATCH_AXES, "context"))
    dtype = config.compute.dtype if is_rounded_at_once(config.model) else "float32"
    return LookupSizes(
        rows=config.model.vocab // shape["tensor"],
        width=config.model.embed,
        tokens=train.batch_size * train.seq_len / train.accumulate / pieces,
        devices=devices,
        entry=ENTRY_BYTES[dtype],
    )


def check_lookup(checks: Checks, shape: dict[str, int]) -> None:
    """Columns that are asked for must be cut over devices."""
    config = checks.config
    checks.need(
        config.compute.embed_lookup != "columns"
        or find_lookup_sizes(config, config.train, shape) is not None,
        "compute.embed_lookup",
        "needs devices that share the columns of the embedding, and here each has all of them; "
        "use auto, or config.mesh.fsdp above 1 with config.mesh.zero=3",
    )
