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
from .question_files import find_questions as find_questions
from .questions import (
    check_questions as check_questions,
    measure_questions as measure_questions,
)
from .samples import (
    choose_prompts as choose_prompts,
    draw_samples as draw_samples,
)
from .subject import Subject as Subject
