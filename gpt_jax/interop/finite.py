"""Entries of weights that are NaN or infinite: counted as a model is read, and told in a line."""

from collections.abc import Iterator, Mapping
from typing import cast

import numpy as np

from gpt_jax.interop.origin import Origin
from gpt_jax.interop.weights import Slices, find_depths

# Entries that are looked at together. What is needed beside them is a byte for each.
BLOCK = 2**20
# Tensors that a line names. A broken model may have hundreds.
NAMED = 20


def count_nonfinite(values: np.ndarray) -> int:
    """How many entries are NaN or infinite. It looks at a block at a time and copies nothing."""
    if not values.size:
        return 0
    blocks = cast(
        Iterator[np.ndarray],
        np.nditer(values, ["external_loop", "buffered"], buffersize=BLOCK),
    )
    return sum(block.size - int(np.count_nonzero(np.isfinite(block))) for block in blocks)


def watch(origin: Origin) -> tuple[Origin, Mapping[str, int]]:
    """The model, and a table of the entries of its tensors that are not finite, by name.

    The table fills while the model is read. Where it came from other tensors, it has their names.
    Entries that are read twice are counted twice.
    """
    depths = find_depths(origin.model)
    counts: dict[str, int] = {}

    def read(path: str, index: Slices) -> np.ndarray:
        values = origin.read(path, index)
        depth = depths[path]
        shape = origin.shapes[path]
        outer = [
            range(*part.indices(size))
            for part, size in zip(index[:depth], shape[:depth], strict=True)
        ]
        for at in np.ndindex(*values.shape[:depth]):
            count = count_nonfinite(values[at])
            if count:
                place = tuple(dim[i] for dim, i in zip(outer, at, strict=True))
                name = origin.name_slice(path, place)
                counts[name] = counts.get(name, 0) + count
        return values

    return origin._replace(read=read), counts


def describe_nonfinite(counts: Mapping[str, int]) -> str:
    """One line with the tensors that hold NaN or infinity, and how many entries. "" if none does.

    >>> describe_nonfinite({"head/kernel": 3})
    'NaN or infinity in 1 tensor: head/kernel (3)'
    """
    if not counts:
        return ""
    rows = sorted(counts.items())
    named = [f"{name} ({count:,})" for name, count in rows[:NAMED]]
    rest = [count for _, count in rows[NAMED:]]
    if rest:
        named.append(f"and {len(rest):,} more ({sum(rest):,})")
    tensors = "tensor" if len(counts) == 1 else "tensors"
    return f"NaN or infinity in {len(counts):,} {tensors}: {', '.join(named)}"
