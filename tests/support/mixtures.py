"""Command lines and streams of runs on the mixture of tests/run/mixture."""

import json

import runs
from streams import make_stream

from gpt_jax.data.stream import dataset

RUN = (
    "--config.train.steps=24",
    "--config.optim.learning_rate=5e-4",
    "--config.optim.eps=1e-6",
    "--config.checkpoint.every_steps=4",
    "--config.eval.every_steps=12",
    "--config.train.batch_size=24",
    "--config.eval.batch_size=24",
    "--config.data.path=()",
    "--config.data.packing=best_fit",
    "--config.data.document_mask=true",
    "--config.data.shuffle_documents=true",
    "--config.data.fim=0.3",
    "--config.data.block=20",
    "--config.data.phases=((4000,(0.2,0.2,0.6)),)",
)


def arguments(folder, workdir, *overrides):
    """The command line of `train` on the three sources of `folder`."""
    both, chat = folder / "both", folder / "chat"
    sources = f"(('wiki','{both}',0.5),('books','{both}',0.3),('chat','{chat}',0.2))"
    return [
        "train",
        f"--config={runs.TINY}",
        f"--workdir={workdir}",
        f"--config.data.sources={sources}",
        "--config.data.tokenizer=bytes+fim",
        "--config.log.progress=false",
        *RUN,
        *overrides,
    ]


def run_stream(workdir, start):
    """The stream of a run, made from its config alone."""
    config = runs.configs.from_dict(json.loads((workdir / "config.json").read_text()))
    data = dataset.load_dataset(config.data, lambda line: None)
    return make_stream(
        data, config.data, 32, 24, config.seed, slice(0, 24), start, config.train.steps
    )
