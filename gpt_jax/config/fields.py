"""The whole `Config`: one section for each room, and what may change when a run resumes.

A field whose value 0 means "derived" says so in its help; `resolve` fills it in.
"""

from dataclasses import dataclass

from gpt_jax.config.data_fields import Data
from gpt_jax.config.knobs import knob
from gpt_jax.config.model_fields import Compute, Model
from gpt_jax.config.run_fields import Checkpoint, Eval, Init, Log, Lora, Mesh, Optim, Train


@dataclass(frozen=True)
class Config:
    """One run. A section is handed to the room that it is for."""

    seed: int = knob(0, "The seed of everything random in the run.", low=0, high=2**32 - 1)
    init: Init = Init()
    lora: Lora = Lora()
    model: Model = Model()
    compute: Compute = Compute()
    data: Data = Data()
    mesh: Mesh = Mesh()
    optim: Optim = Optim()
    train: Train = Train()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()


# Sections and fields that may change when a run resumes, because they alter neither the layout of
# the parameters nor their meaning. compute.dtype and compute.matmul_dtype are missing because they
# change the precision of matmuls, and the losses would no longer be those of one run.
#
# The text says what the change does to the course of training. It is empty if it does nothing.
RATE = "the rate follows the new schedule from here on"
SIZES = "the order of the examples stays, and the learning-rate schedule counts steps as before"
RESUMABLE = {
    "log": "",
    "eval": "",
    "checkpoint": "",
    "mesh": "",
    "compute.kernel": "",
    "compute.expert_matmul": "",
    "compute.embed_lookup": "sums over devices are rounded in another way from here on",
    "compute.remat": "",
    "compute.remat_save": "",
    "compute.remat_offload": "",
    "compute.reduce_dtype": "sums over devices are rounded in another way from here on",
    "compute.unroll": "",
    "compute.shard_sequence": "",
    "compute.pipeline_rounds": "",
    "compute.pipeline_microbatches": "",
    "compute.compiler_options": "",
    "compute.ignore_miscompiles": "",
    "train.steps": "",
    "train.batch_size": SIZES,
    "train.batch_ramp": SIZES,
    "train.length_ramp": "the order of the examples stays, and rows ahead have other lengths",
    "train.hang_minutes": "",
    "train.accumulate": "",
    "train.reduce_once": "sums over devices are rounded in another way from here on",
    "train.loss_chunk": "",
    "data.path": "",
    "data.eval_path": "",
    "data.cache": "",
    "data.workers": "",
    "data.prefetch": "",
    "data.threads": "",
    "data.sources.paths": "",
    "data.phases": "phases that lie ahead have other weights",
    "optim.state_memory": "",
    "optim.learning_rate": RATE,
    "optim.schedule": RATE,
    "optim.warmup_steps": RATE,
    "optim.decay_steps": RATE,
    "optim.decay_fraction": RATE,
    "optim.final_fraction": RATE,
    "optim.weight_decay": "weights shrink at the new pace from here on",
    "optim.clip": "gradients are clipped at the new norm from here on",
}
