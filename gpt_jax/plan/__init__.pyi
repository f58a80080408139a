from .compiled import compile_step as compile_step
from .job import (
    make_job as make_job,
    resolve_vocab as resolve_vocab,
)
from .report import (
    estimate_horizon as estimate_horizon,
    explain_nothing_fits as explain_nothing_fits,
    format_arithmetic as format_arithmetic,
    format_command as format_command,
    format_compiled as format_compiled,
    format_head as format_head,
    format_horizon as format_horizon,
    format_mesh as format_mesh,
    format_ranking as format_ranking,
    format_seconds as format_seconds,
    job_as_data as job_as_data,
    list_uncounted as list_uncounted,
    ranking_as_data as ranking_as_data,
)
from .roofline import (
    choose_plan_kernel as choose_plan_kernel,
    estimate_job as estimate_job,
    find_problems as find_problems,
    format_verdict as format_verdict,
)
from .schedule import estimate_schedule as estimate_schedule
from .search import (
    CLOSE as CLOSE,
    find_advice as find_advice,
    is_searched as is_searched,
    list_overrides as list_overrides,
    lower_limit as lower_limit,
    search_meshes as search_meshes,
)
from .topology import parse_topology as parse_topology
