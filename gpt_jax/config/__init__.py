"""The frozen `Config`: every knob of a run, its default and its limits (floor 0).

A config file returns a `ConfigDict` holding only what it changes; `from_dict` turns it into one
`Config` and is the last place that sees a ConfigDict. Each room receives its own section. Values
that must agree with each other are checked in `check`, before anything compiles.
"""

from gpt_jax.config.checks import check, faults, problems, resolve, shape_on, wsd_start
from gpt_jax.config.depth import LayerSpec, Layout, layer_specs, layout
from gpt_jax.config.fields import (
    BALANCES,
    DENSE_FFNS,
    DISPATCHES,
    DTYPES,
    ENDLESS,
    FFNS,
    INITS,
    KERNELS,
    MIXERS,
    NORMS,
    OBJECTIVES,
    OPTIMIZERS,
    POSITIONS,
    REMATS,
    RESUMABLE,
    ROUTERS,
    ROWS,
    SCHEDULES,
    SPLITS,
    WEIGHTS,
    Checkpoint,
    Config,
    Data,
    Eval,
    Group,
    Log,
    Mesh,
    Model,
    Optim,
    Train,
    knob,
)
from gpt_jax.config.meshes import (
    AXES,
    BATCH_AXES,
    FSDP_AXES,
    cross_slice,
    least_devices,
    mesh_shape,
    slices_problem,
)
from gpt_jax.config.read import changes, flatten, from_dict, override, parse, to_dict, to_json
