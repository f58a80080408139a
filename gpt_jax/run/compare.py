"""The weights of a model as figures, alone and beside another's, a slice at a time."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gpt_jax.errors import UsageError
from gpt_jax.interop import Origin, find_depths
from gpt_jax.train import list_slices


class Measured(NamedTuple):
    """A parameter in figures. `norm` is the Euclidean one, and `largest` of absolute values."""

    path: str
    shape: tuple[int, ...]
    size: int  # bytes in float32
    norm: float
    largest: float


class Difference(NamedTuple):
    """A parameter of one model minus that of another.

    `relative` is the norm of the difference in parts of the first one's norm. `largest` is that of
    absolute values. Where an entry is no number, both are NaN.
    """

    path: str
    shape: tuple[int, ...]
    largest: float
    relative: float

    @property
    def is_equal(self) -> bool:
        """Whether no entry differs."""
        return self.largest == 0


def _read_slices(origin: Origin, path: str, depth: int) -> Iterator[np.ndarray]:
    for index in list_slices(origin.shapes[path], depth):
        yield origin.read(path, index).astype(np.float64)


def measure(origin: Origin) -> Iterator[Measured]:
    """The figures of each parameter, in the order of their paths."""
    depths = find_depths(origin.model)
    for path in sorted(origin.shapes):
        squares = largest = 0.0
        for values in _read_slices(origin, path, depths[path]):
            squares += float((values**2).sum())
            largest = float(np.maximum(largest, np.abs(values).max(initial=0)))
        shape = origin.shapes[path]
        yield Measured(path, shape, 4 * int(np.prod(shape)), squares**0.5, largest)


def subtract(first: Origin, second: Origin) -> Iterator[Difference]:
    """How far each parameter of two models lies apart.

    Raises UsageError, with a line for each, if they do not have the same parameters.
    """
    names = sorted({*first.shapes, *second.shapes})
    lines = [
        f"{name}: {_show(first.shapes.get(name))} in {first.name}, "
        f"{_show(second.shapes.get(name))} in {second.name}"
        for name in names
        if first.shapes.get(name) != second.shapes.get(name)
    ]
    if lines:
        raise UsageError("the two models do not have the same parameters", *lines)

    depths = find_depths(first.model)
    for path in names:
        squares = norm = largest = 0.0
        pairs = zip(
            _read_slices(first, path, depths[path]),
            _read_slices(second, path, depths[path]),
            strict=True,
        )
        for mine, theirs in pairs:
            apart = mine - theirs
            squares += float((apart**2).sum())
            norm += float((mine**2).sum())
            largest = float(np.maximum(largest, np.abs(apart).max(initial=0)))
        relative = (squares / norm) ** 0.5 if norm else float(squares > 0)
        yield Difference(path, first.shapes[path], largest, relative)


def _show(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
