from .layout import (
    constrain as constrain,
    find_gathered_axes as find_gathered_axes,
    gather as gather,
    gather_fsdp as gather_fsdp,
    gradient_spec as gradient_spec,
    has_partial_gradient as has_partial_gradient,
    lay_out_factors as lay_out_factors,
    lay_out_like as lay_out_like,
    make_zero_gradient as make_zero_gradient,
    off_stages as off_stages,
    over_stages as over_stages,
    reshape as reshape,
    scale as scale,
    scale_gradient as scale_gradient,
    send_narrow as send_narrow,
    split_dim as split_dim,
    stored_init as stored_init,
    sum_gradient_once as sum_gradient_once,
    use_vector as use_vector,
    use_weight as use_weight,
)
from .manual import (
    run_local as run_local,
    sum_over_copies as sum_over_copies,
)
from .memory import (
    HOST as HOST,
    describe_on_host as describe_on_host,
    is_on_host as is_on_host,
    to_device as to_device,
    to_host as to_host,
)
from .mesh import (
    describe_places as describe_places,
    find_unsharded as find_unsharded,
    join_path as join_path,
    make_concrete as make_concrete,
    make_mesh as make_mesh,
)
from .rows import (
    apply_in_text_order as apply_in_text_order,
    make_positions as make_positions,
    process_rows as process_rows,
    reorder as reorder,
    row_parts as row_parts,
    to_devices as to_devices,
    token_order as token_order,
)
from .rules import (
    STAGE as STAGE,
    STORED as STORED,
    WHOLE_ROWS as WHOLE_ROWS,
    axis_size as axis_size,
    batch_spec as batch_spec,
    count_parts as count_parts,
    habits as habits,
    make_spec as make_spec,
    out_spec as out_spec,
    used_spec as used_spec,
    using_rules as using_rules,
)
