"""The frozen `Config`: every knob of a run, its default and its limits.

A config file returns a `ConfigDict` that holds only what it changes. `from_dict` turns it into one
`Config`, and is the last place that sees a ConfigDict. Each room receives its own section. `check`
compares values that must agree with each other, before anything compiles.
"""

from gpt_jax.config.batch_sizes import (
    BatchSizes,
    Level,
    at_shape,
    find_ramp_entry,
    list_levels,
    make_batch_sizes,
    read_batch_sizes,
)
from gpt_jax.config.checks import check, problems, shape_on
from gpt_jax.config.data_fields import Data
from gpt_jax.config.describe import describe_config, make_page, make_schema
from gpt_jax.config.field_checks import faults
from gpt_jax.config.fields import RESUMABLE, Config
from gpt_jax.config.habits import (
    GROUPED_WIDTH,
    Habits,
    choose_expert_matmul,
    describe_habits,
    find_habits,
)
from gpt_jax.config.knobs import (
    DENSE_FFNS,
    ENDLESS,
    EVALUATORS,
    FFNS,
    INITS,
    KERNELS,
    MATMULS,
    MIXERS,
    NORMS,
    OBJECTIVES,
    OPTIMIZERS,
    PACKINGS,
    POSITIONS,
    REMATS,
    ROUTERS,
    SCHEDULES,
    SPLITS,
    knob,
)
from gpt_jax.config.layers import LayerSpec, Layout, has_bias, has_experts, layer_specs, layout
from gpt_jax.config.lookups import LookupSizes, choose_embed_lookup, count_lookup_bytes
from gpt_jax.config.mesh_checks import widest_tensor
from gpt_jax.config.meshes import (
    AXES,
    BATCH_AXES,
    COPY_AXES,
    FSDP_AXES,
    cross_slice,
    least_devices,
    mesh_shape,
    slices_problem,
)
from gpt_jax.config.model_fields import Compute, Model
from gpt_jax.config.read import (
    changes,
    flatten,
    from_dict,
    override,
    parse,
    read_saved,
    to_dict,
    to_json,
)
from gpt_jax.config.remat import REMAT_NAMES, describe_remat, list_marked, list_unread
from gpt_jax.config.resolve import (
    describe_inference,
    for_inference,
    resolve,
    set_remat,
    wsd_start,
)
from gpt_jax.config.run_fields import Checkpoint, Eval, Group, Init, Log, Mesh, Optim, Train

__all__ = [
    "AXES",
    "BATCH_AXES",
    "COPY_AXES",
    "DENSE_FFNS",
    "ENDLESS",
    "EVALUATORS",
    "FFNS",
    "FSDP_AXES",
    "GROUPED_WIDTH",
    "INITS",
    "KERNELS",
    "MATMULS",
    "MIXERS",
    "NORMS",
    "OBJECTIVES",
    "OPTIMIZERS",
    "PACKINGS",
    "POSITIONS",
    "REMATS",
    "REMAT_NAMES",
    "RESUMABLE",
    "ROUTERS",
    "SCHEDULES",
    "SPLITS",
    "BatchSizes",
    "Checkpoint",
    "Compute",
    "Config",
    "Data",
    "Eval",
    "Group",
    "Habits",
    "Init",
    "LayerSpec",
    "Layout",
    "Level",
    "Log",
    "LookupSizes",
    "Mesh",
    "Model",
    "Optim",
    "Train",
    "at_shape",
    "changes",
    "check",
    "choose_embed_lookup",
    "choose_expert_matmul",
    "count_lookup_bytes",
    "cross_slice",
    "describe_config",
    "describe_habits",
    "describe_inference",
    "describe_remat",
    "faults",
    "find_habits",
    "find_ramp_entry",
    "flatten",
    "for_inference",
    "from_dict",
    "has_bias",
    "has_experts",
    "knob",
    "layer_specs",
    "layout",
    "least_devices",
    "list_levels",
    "list_marked",
    "list_unread",
    "make_batch_sizes",
    "make_page",
    "make_schema",
    "mesh_shape",
    "override",
    "parse",
    "problems",
    "read_batch_sizes",
    "read_saved",
    "resolve",
    "set_remat",
    "shape_on",
    "slices_problem",
    "to_dict",
    "to_json",
    "widest_tensor",
    "wsd_start",
]
