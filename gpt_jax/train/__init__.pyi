from .checkpoint.arrays import restore_checkpoint as restore_checkpoint
from .checkpoint.checkpoints import (
    Checkpoints as Checkpoints,
    open_checkpoints as open_checkpoints,
)
from .checkpoint.manifest import (
    CHECKPOINT_FOLDER as CHECKPOINT_FOLDER,
    MANIFEST as MANIFEST,
    META as META,
    find_damage as find_damage,
    find_steps as find_steps,
    parse_manifest as parse_manifest,
    peek_meta as peek_meta,
    read_meta as read_meta,
    resolve_checkpoint as resolve_checkpoint,
    steps_in as steps_in,
)
from .checkpoint.outlet import NOWHERE as NOWHERE, Outlet as Outlet
from .checkpoint.slices import (
    Lazy as Lazy,
    list_slices as list_slices,
    read_slice as read_slice,
    write_slices as write_slices,
)
from .freeze import find_frozen as find_frozen, hold as hold
from .lora import (
    BASE as BASE,
    Adapted as Adapted,
    add_adapters as add_adapters,
    find_matrices as find_matrices,
    find_scale as find_scale,
    init_adapters as init_adapters,
    list_parts as list_parts,
    merge_adapters as merge_adapters,
    nest_paths as nest_paths,
)
from .objectives import (
    OBJECTIVES as OBJECTIVES,
    Network as Network,
    Readout as Readout,
    add_report as add_report,
    next_token as next_token,
    sum_cross_entropy as sum_cross_entropy,
    sum_logits as sum_logits,
    take_params as take_params,
)
from .optim.groups import describe_groups as describe_groups
from .optim.optimizer import (
    add_layer_rates as add_layer_rates,
    make_optimizer as make_optimizer,
    make_zero1 as make_zero1,
    rewind as rewind,
    scale_layers as scale_layers,
)
from .optim.schedule import make_schedule as make_schedule
from .optim.streaming import keep_on_host as keep_on_host
from .step import (
    TrainState as TrainState,
    eval_step as eval_step,
    gradients as gradients,
    init_state as init_state,
    train_step as train_step,
)
