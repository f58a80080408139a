from .classification import (
    measure_classification as measure_classification,
    tabulate_confusion as tabulate_confusion,
)
from .classification_page import make_classification_page as make_classification_page
from .classified import check_labelled as check_labelled
from .compared import compare_tasks as compare_tasks
from .core import (
    CoreSettings as CoreSettings,
    check_core as check_core,
    measure_core as measure_core,
)
from .core_mean import (
    compare_core_means as compare_core_means,
    find_core_mean as find_core_mean,
)
from .evaluators import (
    EVALUATORS as EVALUATORS,
    Evaluation as Evaluation,
    run_evaluators as run_evaluators,
)
from .harness import (
    TaskSettings as TaskSettings,
    list_measured as list_measured,
    run_tasks as run_tasks,
)
from .heldout import (
    average_by_source as average_by_source,
    compute_heldout_metrics as compute_heldout_metrics,
    measure_xz_bits_per_byte as measure_xz_bits_per_byte,
    sum_heldout as sum_heldout,
)
from .question_files import (
    check_set_names as check_set_names,
    find_questions as find_questions,
)
from .questions import (
    answer_files as answer_files,
    check_questions as check_questions,
    measure_questions as measure_questions,
    summarize_files as summarize_files,
)
from .results import (
    read_results as read_results,
    summarize_task as summarize_task,
    to_json as to_json,
)
from .results_page import (
    Comparison as Comparison,
    Page as Page,
    format_difference as format_difference,
    make_results_page as make_results_page,
)
from .samples import (
    choose_prompts as choose_prompts,
    draw_samples as draw_samples,
)
from .subject import Subject as Subject
