from .branch import open_branch as open_branch
from .compare import measure as measure, subtract as subtract
from .convert import (
    average as average,
    open_model as open_model,
    write_native as write_native,
)
from .loop import run_training as run_training
from .meta import (
    META_SCHEMA as META_SCHEMA,
    count_tokens as count_tokens,
    read_past_sizes as read_past_sizes,
)
from .notes import (
    describe_fp8 as describe_fp8,
    format_count as format_count,
    token_flops as token_flops,
)
from .parts import (
    build as build,
    make_network as make_network,
    make_steps as make_steps,
)
from .restore import load_model as load_model, load_step as load_step
from .source import read_start_tokenizer as read_start_tokenizer, take_model as take_model
