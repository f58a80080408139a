from .clock import (
    Clock as Clock,
    OneStepLate as OneStepLate,
)
from .page import (
    format_card as format_card,
    format_table as format_table,
    make_page as make_page,
)
from .report import write_report as write_report
from .sessions import (
    WALL_SECONDS as WALL_SECONDS,
    make_session_row as make_session_row,
    read_history as read_history,
)
from .summary import (
    Summary as Summary,
    find_samples as find_samples,
    format_summary as format_summary,
    library_versions as library_versions,
    summarize as summarize,
)
from .sums import (
    RunningSums as RunningSums,
    Sums as Sums,
    add_sums as add_sums,
    divide_sums as divide_sums,
    expert_metrics as expert_metrics,
    own_metrics as own_metrics,
    perplexity as perplexity,
)
from .writers import (
    BarWriter as BarWriter,
    JsonlWriter as JsonlWriter,
    TensorBoardWriter as TensorBoardWriter,
    Writers as Writers,
    read_jsonl as read_jsonl,
    save_file as save_file,
    saving as saving,
)
