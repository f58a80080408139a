"""The tables that map logical axes to mesh axes, and questions about the current mesh."""

import math
from collections.abc import Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

import jax
from jax.sharding import PartitionSpec as P

from gpt_jax import config
from gpt_jax.config import BATCH_AXES, FSDP_AXES

# Logical axis -> mesh axes. A name that neither table has raises KeyError and never means
# "replicated".
STORED = {
    "layers": None,
    "vocab": "tensor",
    "embed": FSDP_AXES,
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
    "expert_embed": ("fsdp", "context"),
    "position": None,
    "scale": None,
    "gate": None,
}
USED = STORED | {
    "embed": None,
    "expert_embed": None,
    "batch": BATCH_AXES,
    "seq": "context",
    "keys": None,
    "head_dim": None,
    "stream": ("context", "tensor"),
    "stages": "pipeline",
}


def _mesh():
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.are_all_axes_manual else mesh


# The entries of USED that `using_rules` has changed, during the trace of a function.
_CHANGED: ContextVar[Mapping] = ContextVar("changed", default=MappingProxyType({}))

# Inside a pipeline stage the axis `pipeline` lays out the stages, so it does not split the batch.
STAGE = {"batch": ("data", "fsdp", "expert")}

# Decoding does not split a sequence.
WHOLE_ROWS = {"seq": None, "stream": None}


@contextmanager
def using_rules(changes: dict):
    """USED with `changes`, for the code that is traced inside.

    Enter it in the traced function itself and never around a call of a jitted function. JAX does
    not see the changes, so it would reuse a trace made under other rules.
    """
    token = _CHANGED.set({**_CHANGED.get(), **changes})
    try:
        yield
    finally:
        _CHANGED.reset(token)


def make_spec(table: Mapping, axes: tuple[str | None, ...]) -> P:
    """The PartitionSpec of logical `axes`, without the mesh axes that are manual where it is asked.

    Raises ValueError if two of them use one mesh axis, and KeyError for an unknown name.
    """
    parts = [_drop_manual(table[axis]) if axis is not None else None for axis in axes]
    used = [name for part in parts for name in _names(part)]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} would use a mesh axis twice: {parts}")
    return P(*parts)


def _drop_manual(part):
    """The mesh axes of one dim that JAX still lays out: none that a shard_map has cut already."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    names = _names(part)
    left = tuple(name for name in names if name not in manual)
    return part if left == names else left or None


def used_spec(*axes: str | None) -> P:
    """The PartitionSpec of logical `axes` by the USED rules."""
    return make_spec({**USED, **_CHANGED.get()}, axes)


def habits() -> config.Habits:
    """The habits of the platform that the program is compiled for.

    It is the platform of the mesh, which need not be this process's. The mesh is part of the key
    of a compiled function, so that a cached one cannot have the habits of another platform.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    if device is None:
        device = jax.devices()[0]
    return config.find_habits(device.platform, device.device_kind)


def axis_size(axis: str) -> int:
    """Devices along mesh axis `axis` of the current mesh (1 without a mesh)."""
    mesh = _mesh()
    return 1 if mesh is None else mesh.shape[axis]


def count_parts(axis: str) -> int:
    """Pieces into which the USED rules cut logical `axis` (1 without a mesh).

    Mesh axes that are manual where it is asked do not count.
    """
    rules = {**USED, **_CHANGED.get()}
    return math.prod(map(axis_size, _names(_drop_manual(rules[axis]))))


def batch_spec() -> P:
    """How a column [B, T] of a batch lies on the mesh."""
    return P(BATCH_AXES, "context")


def _names(part) -> tuple[str, ...]:
    """The mesh axes of one dim of a PartitionSpec."""
    if part is None:
        return ()
    return (part,) if isinstance(part, str) else tuple(part)


def out_spec(*axes: str | None) -> P | None:
    """The `out_sharding` of a jnp operation: the USED spec on a mesh, None without one."""
    return None if _mesh() is None else used_spec(*axes)
