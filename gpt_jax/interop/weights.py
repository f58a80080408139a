"""Our parameters out of foreign tensors, and the other way, one tensor at a time."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, cast

import jax
import numpy as np

from gpt_jax import config as configs, sharding
from gpt_jax.errors import UsageError
from gpt_jax.interop.families import Family
from gpt_jax.interop.rows import LAYOUTS, Row
from gpt_jax.interop.strips import copy_into
from gpt_jax.model import abstract_params, describe_parameter

Slices = tuple[slice, ...]


class Readable(Protocol):
    """A tensor whose values are read when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self) -> np.ndarray: ...


class Slot(NamedTuple):
    """Where a foreign tensor, or a part of one, lies in a parameter.

    `index` leads to it in the dims before its own: the layer of a stack, and the expert.
    """

    path: str
    index: tuple[int, ...]


class Piece(NamedTuple):
    """A foreign tensor by name, how it is laid out, and where its parts go."""

    name: str
    layout: str
    slots: tuple[Slot, ...]


class Plan(NamedTuple):
    """The foreign tensors of a model, in the order of the family's table.

    `shapes` are those of our parameters by path.
    """

    model: configs.Model
    pieces: tuple[Piece, ...]
    shapes: Mapping[str, tuple[int, ...]]


def list_shapes(model: configs.Model) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's parameters by path."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(model))
    return {sharding.join_path(keys): leaf.shape for keys, leaf in leaves}


def make_plan(family: Family, model: configs.Model) -> Plan:
    """Which foreign tensors a model consists of.

    Raises UsageError if the family has no row for one of its parameters.
    """
    shapes = list_shapes(model)
    pieces = [piece for row in family.rows for piece in _expand(row, model, shapes)]

    covered = {slot.path for piece in pieces for slot in piece.slots}
    left_over = sorted(set(shapes) - covered)
    if left_over:
        raise UsageError(f"{family.name} has no tensors for {', '.join(left_over)}")
    return Plan(model, tuple(pieces), shapes)


def _expand(row: Row, model: configs.Model, shapes) -> Iterator[Piece]:
    """The tensors that a row stands for in this model. A row for what it lacks has none."""
    if "{layer}" not in row.theirs:
        if all(path in shapes for path in row.ours):
            yield Piece(row.theirs, row.layout, tuple(Slot(path, ()) for path in row.ours))
        return

    for layer in range(model.layers):
        place, index = find_layer(model, layer)
        paths = [f"{place}/{path}" for path in row.ours]
        if not all(path in shapes for path in paths):
            continue
        experts = [(e,) for e in range(model.experts)] if "{expert}" in row.theirs else [()]
        for expert in experts:
            name = row.theirs.replace("{layer}", str(layer))
            name = name.replace("{expert}", str(expert[0])) if expert else name
            yield Piece(name, row.layout, tuple(Slot(path, index + expert) for path in paths))


def find_layer(model: configs.Model, layer: int) -> tuple[str, tuple[int, ...]]:
    """Where the parameters of a layer stand: the path before theirs, and the index in a stack."""
    plan = configs.layout(configs.layer_specs(model))
    size = len(plan.period)
    if layer < size * plan.repeats:
        return f"blocks/{layer % size}", (layer // size,)
    return f"tail/{layer - size * plan.repeats}", ()


def find_shape(plan: Plan, piece: Piece) -> tuple[int, ...]:
    """The shape that a foreign tensor must have."""
    parts = []
    for slot in piece.slots:
        shape = plan.shapes[slot.path][len(slot.index) :]
        parts.append(np.broadcast_to(np.zeros((), np.uint8), shape))
    return LAYOUTS[piece.layout].join(parts, plan.model).shape


def is_leftover(name: str, family: Family) -> bool:
    """Whether a tensor holds nothing that was learned."""
    return name.endswith(family.leftovers)


def find_tensor(family: Family, path: str) -> str:
    """The name of the tensor that is one whole parameter of ours."""
    return next(row.theirs for row in family.rows if row.ours == (path,))


def name_fully(tensors: Mapping[str, Readable], family: Family) -> Mapping[str, Readable]:
    """The tensors with the prefix that a file of the model without its head leaves out."""
    prefix = family.base
    if any(name.startswith(prefix) for name in tensors):
        return tensors
    head = find_tensor(family, "head/kernel")
    return {name if name == head else prefix + name: tensor for name, tensor in tensors.items()}


def check_tensors(plan: Plan, family: Family, tensors: Mapping[str, Readable], where: str) -> None:
    """Raises UsageError, with a line for each tensor that is missing, surplus or misshapen."""
    wanted = {piece.name: find_shape(plan, piece) for piece in plan.pieces}
    lines = []
    for name, shape in wanted.items():
        if name not in tensors:
            lines.append(f"{where}: {name} {list(shape)} is missing")
        elif tuple(tensors[name].shape) != shape:
            found = list(tensors[name].shape)
            lines.append(f"{where}: {name} is {found}, and {list(shape)} is needed")
    lines += [
        f"{where}: {name} {list(tensor.shape)} has no place in {family.name}"
        for name, tensor in tensors.items()
        if name not in wanted and not is_leftover(name, family)
    ]
    if lines:
        raise UsageError(*lines)


class Weights:
    """The parameters of a model, made out of foreign tensors when they are asked for."""

    def __init__(self, plan: Plan, tensors: Mapping[str, Readable]):
        self.plan = plan
        self._tensors = tensors
        self._places: dict[str, dict[tuple[int, ...], tuple[Piece, int]]] = {}
        for piece in plan.pieces:
            for part, slot in enumerate(piece.slots):
                self._places.setdefault(slot.path, {})[slot.index] = piece, part

    def read(self, path: str, index: Slices) -> np.ndarray:
        """The part `index` of a parameter, in float32.

        It holds the part and one foreign tensor.
        """
        places = self._places[path]
        depth = len(next(iter(places)))
        shape = self.plan.shapes[path]
        bounds = [part.indices(size) for part, size in zip(index, shape, strict=True)]
        values = np.empty([len(range(*bound)) for bound in bounds], np.float32)

        outer = [range(*bound) for bound in bounds[:depth]]
        for at in np.ndindex(*values.shape[:depth]):
            piece, part = places[tuple(dim[i] for dim, i in zip(outer, at, strict=True))]
            tensor = self._tensors[piece.name].read()
            whole = LAYOUTS[piece.layout].split(tensor, self.plan.model)[part]
            copy_into(values[at], whole[index[depth:]])
        return values

    def find_name(self, path: str, place: tuple[int, ...]) -> str:
        """The name of the foreign tensor that holds the entry `place` of a parameter."""
        return self._places[path][place][0].name


def load_params(read: Callable[[str, Slices], np.ndarray], abstract: Any) -> Any:
    """The parameters on the devices of a mesh, each device's shard read by itself.

    `read(path, index)` makes a part of a parameter. `abstract` is the tree of
    jax.ShapeDtypeStruct with concrete shardings.
    """

    def make(keys, leaf):
        path = sharding.join_path(keys)
        # Devices that keep the same part share one copy of it on the host.
        parts: dict[str, np.ndarray] = {}

        def read_part(index):
            if str(index) not in parts:
                parts[str(index)] = read(path, cast(Slices, index))
            return parts[str(index)]

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, read_part)

    return jax.tree_util.tree_map_with_path(make, abstract)


def join_piece(plan: Plan, piece: Piece, read: Callable[[str, Slices], np.ndarray]) -> np.ndarray:
    """A foreign tensor, made of the parts of our parameters that `read` gives."""
    parts = []
    for slot in piece.slots:
        depth = len(slot.index)
        shape = plan.shapes[slot.path]
        index = (*(slice(i, i + 1) for i in slot.index), *map(slice, shape[depth:]))
        parts.append(read(slot.path, index).reshape(shape[depth:]))
    return LAYOUTS[piece.layout].join(parts, plan.model)


def find_depths(model: configs.Model) -> dict[str, int]:
    """How many dims of each parameter count layers and experts, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(model))
    depths = {}
    for keys, _ in leaves:
        parameter = describe_parameter(sharding.join_path(keys))
        has_experts = parameter.axes[:1] == ("experts",)
        depths[parameter.path] = int(parameter.stacked) + int(has_experts)
    return depths
