from .command_line import CommandLine as CommandLine
from .compiled import compile_job as compile_job
from .data import make_data as make_data
from .job import resolve_vocab as resolve_vocab
from .lines import write_lines as write_lines
from .plan import (
    Request as Request,
    make_plan as make_plan,
)
from .search import is_searched as is_searched
from .topology import parse_topology as parse_topology
