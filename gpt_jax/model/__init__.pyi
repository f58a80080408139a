from .attention.conformance import measure_conformance as measure_conformance
from .attention.kernels import (
    KERNELS as KERNELS,
    choose_kernel as choose_kernel,
    make_problem as make_problem,
)
from .count import count_params as count_params
from .experts.local_experts import choose_block_rows as choose_block_rows
from .kv_cache import make_cache as make_cache
from .layers.linear import ADAPTERS as ADAPTERS, MULTIPLIERS as MULTIPLIERS
from .layers.mlp import FFNS as FFNS
from .leaks import check_leaks as check_leaks
from .parameters import (
    MULTIPLIED as MULTIPLIED,
    describe_parameter as describe_parameter,
    number_layers as number_layers,
)
from .taps import (
    capture as capture,
    list_layers as list_layers,
    list_names as list_names,
)
from .transformer import (
    Transformer as Transformer,
    abstract_params as abstract_params,
    init_params as init_params,
)
