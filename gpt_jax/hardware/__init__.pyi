from .chips import (
    CHIPS as CHIPS,
    GIB as GIB,
    GPU_FRACTION as GPU_FRACTION,
    Chip as Chip,
    find_peak as find_peak,
    peak_flops as peak_flops,
    peak_fp8_flops as peak_fp8_flops,
)
from .flops import (
    flops_per_token as flops_per_token,
    mfu as mfu,
    mfu_metrics as mfu_metrics,
)
from .miscompiles import check_miscompiles as check_miscompiles
from .xla_flags import add_xla_flags as add_xla_flags
from .xla_options import (
    check_xla_options as check_xla_options,
    choose_xla_options as choose_xla_options,
    describe_xla_options as describe_xla_options,
    find_option_fault as find_option_fault,
)
