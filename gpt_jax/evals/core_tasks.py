"""The 22 tasks of CORE, as data (DataComp-LM, arXiv:2406.11794).

CORE is the mean of their centred accuracies. Files, few-shot counts and delimiters are those of
`eval/heavy.yaml` in mlfoundations/dclm, and the baselines those of its `eval_meta_data.csv`. Which
tasks belong to CORE says the list `low_variance_datasets` there.
"""

from typing import NamedTuple


class CoreTask(NamedTuple):
    """A task: its file in the bundle, and how its questions are put.

    `delimiter` stands between a context and its continuation. `baseline` is the accuracy of
    guessing, in percent.
    """

    name: str
    kind: str
    file: str
    shots: int
    delimiter: str
    baseline: float


CHOICE = "multiple_choice"
SCHEMA = "schema"
LANGUAGE = "language_modeling"
ANSWER = "\nAnswer: "

CORE_TASKS = (
    CoreTask("hellaswag_zeroshot", CHOICE, "language_understanding/hellaswag.jsonl", 0, " ", 25),
    CoreTask("jeopardy", LANGUAGE, "world_knowledge/jeopardy_all.jsonl", 10, ANSWER, 0),
    CoreTask(
        "bigbench_qa_wikidata", LANGUAGE, "world_knowledge/bigbench_qa_wikidata.jsonl", 10, " ", 0
    ),
    CoreTask("arc_easy", CHOICE, "world_knowledge/arc_easy.jsonl", 10, ANSWER, 25),
    CoreTask("arc_challenge", CHOICE, "world_knowledge/arc_challenge.jsonl", 10, ANSWER, 25),
    CoreTask("copa", CHOICE, "commonsense_reasoning/copa.jsonl", 0, " ", 50),
    # Guessing among four choices is right in 25 %. CORE is computed with the published 40.3.
    CoreTask("commonsense_qa", CHOICE, "commonsense_reasoning/commonsense_qa.jsonl", 10, " ", 40.3),
    CoreTask("piqa", CHOICE, "commonsense_reasoning/piqa.jsonl", 10, ANSWER, 50),
    CoreTask("openbook_qa", CHOICE, "commonsense_reasoning/openbook_qa.jsonl", 0, " ", 25),
    CoreTask("lambada_openai", LANGUAGE, "language_understanding/lambada_openai.jsonl", 0, " ", 0),
    CoreTask("hellaswag", CHOICE, "language_understanding/hellaswag.jsonl", 10, " ", 25),
    CoreTask("winograd", SCHEMA, "language_understanding/winograd_wsc.jsonl", 0, " ", 50),
    CoreTask("winogrande", SCHEMA, "language_understanding/winogrande.jsonl", 0, " ", 50),
    CoreTask(
        "bigbench_dyck_languages",
        LANGUAGE,
        "symbolic_problem_solving/bigbench_dyck_languages.jsonl",
        10,
        " ",
        0,
    ),
    CoreTask(
        "agi_eval_lsat_ar", CHOICE, "symbolic_problem_solving/agi_eval_lsat_ar.jsonl", 3, " ", 25
    ),
    CoreTask(
        "bigbench_cs_algorithms",
        LANGUAGE,
        "symbolic_problem_solving/bigbench_cs_algorithms.jsonl",
        10,
        " ",
        0,
    ),
    CoreTask(
        "bigbench_operators",
        LANGUAGE,
        "symbolic_problem_solving/bigbench_operators.jsonl",
        10,
        " ",
        0,
    ),
    CoreTask(
        "bigbench_repeat_copy_logic",
        LANGUAGE,
        "symbolic_problem_solving/bigbench_repeat_copy_logic.jsonl",
        10,
        " ",
        0,
    ),
    CoreTask("squad", LANGUAGE, "reading_comprehension/squad.jsonl", 10, " ", 0),
    CoreTask("coqa", LANGUAGE, "reading_comprehension/coqa.jsonl", 0, " ", 0),
    CoreTask("boolq", CHOICE, "reading_comprehension/boolq.jsonl", 10, ANSWER, 62),
    CoreTask(
        "bigbench_language_identification",
        CHOICE,
        "language_understanding/bigbench_language_identification.jsonl",
        10,
        " ",
        25,
    ),
)
BY_NAME = {task.name: task for task in CORE_TASKS}
