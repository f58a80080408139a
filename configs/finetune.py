"""Fine-tuning of all weights of a checkpoint on short examples of a task.

    gpt-jax prepare --input=talks.jsonl --task=chat --tokenizer=DIR --eval_fraction=0.05 \\
        --output=data/talks
    gpt-jax train --config=configs/finetune.py:chat --config.init.from=DIR \\
        --config.data.path=data/talks --workdir=runs/talks

DIR is a workdir of a run, or a directory of Hugging Face, and the corpus must have its tokenizer.
docs/tasks.md says what each task reads.

    task       tokens a row  peak rate  steps  what an evaluation measures
    chat       1,024         2e-5       300    loss of answers
    classify     256         5e-5       300    loss of labels, and labels of held-out rows
    translate    256         5e-5       500    loss of translations

Whole examples share a row (best_fit), and neither see nor predict each other. A context of the
model that is shorter needs a shorter --config.train.seq_len. Only what the task learns counts, so a
step of 32 rows learns a part of its tokens. Rates are those that are usual for a whole model of
hundreds of millions of parameters; a model of one million wants about 1e-3.
"""

from ml_collections import ConfigDict

TASKS = {
    "chat": dict(seq_len=1024, rate=2e-5, steps=300, evaluators=("heldout",)),
    "classify": dict(seq_len=256, rate=5e-5, steps=300, evaluators=("heldout", "classification")),
    "translate": dict(seq_len=256, rate=5e-5, steps=500, evaluators=("heldout",)),
}


def get_config(arg: str = "chat") -> ConfigDict:
    if arg not in TASKS:
        raise ValueError(f"finetune:{arg}: choose one of {', '.join(TASKS)}")
    task = TASKS[arg]
    return ConfigDict(
        dict(
            init=dict(model="checkpoint"),
            model={},  # The checkpoint says it. Fields such as dropout may be set here.
            data=dict(packing="best_fit", document_mask=True),
            optim=dict(
                optimizer="adamw",
                learning_rate=task["rate"],
                b1=0.9,
                b2=0.95,
                weight_decay=0.0,
                clip=1.0,
                schedule="cosine",
                warmup_steps=task["steps"] // 20,
                final_fraction=0.1,
            ),
            train=dict(steps=task["steps"], batch_size=32, seq_len=task["seq_len"]),
            eval=dict(every_steps=100, evaluators=task["evaluators"], samples=0),
            checkpoint=dict(every_steps=100),
        )
    )
