from .branch import open_branch as open_branch
from .compare import measure as measure, subtract as subtract
from .convert import (
    average as average,
    export_adapters as export_adapters,
    open_model as open_model,
    write_native as write_native,
)
from .fetch import (
    NothingThere as NothingThere,
    find_checkpoint as find_checkpoint,
    find_remote_damage as find_remote_damage,
    peek_checkpoint as peek_checkpoint,
    read_remote_file as read_remote_file,
)
from .lineage import describe_entry as describe_entry
from .loop import run_training as run_training
from .meta import (
    META_SCHEMA as META_SCHEMA,
    count_tokens as count_tokens,
    read_config as read_config,
    read_past_sizes as read_past_sizes,
)
from .mirror import opening_workdir as opening_workdir
from .notes import (
    describe_fp8 as describe_fp8,
    format_count as format_count,
    token_flops as token_flops,
)
from .parts import (
    build as build,
    build_on as build_on,
    make_network as make_network,
    make_steps as make_steps,
)
from .restore import load_model as load_model, load_step as load_step
from .send import opening_target as opening_target
from .source import (
    copy_tokenizer as copy_tokenizer,
    read_start_tokenizer as read_start_tokenizer,
    take_model as take_model,
)
from .store import check_scheme as check_scheme, check_url as check_url
