"""Copies of matrices that may lie transposed in memory, at the speed of plain copies."""

import numpy as np

# Columns that are copied together. One at a time a copy would read a whole line of the cache for
# each entry.
STRIP = 64


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """Copies `source` into `target`, an array of its shape, and casts it to the target's dtype.

    A transposed matrix is copied in strips. Each is cast first, in the order in which it lies in
    memory. What is needed beside both is one strip.
    """
    is_transposed = source.ndim == 2 and abs(source.strides[0]) < abs(source.strides[1])
    if not is_transposed:
        target[...] = source
        return

    for start in range(0, source.shape[1], STRIP):
        columns = slice(start, start + STRIP)
        target[:, columns] = source[:, columns].astype(target.dtype)
