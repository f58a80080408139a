from .agree import (
    agree_on as agree_on,
    exchange as exchange,
    find_disagreements as find_disagreements,
)
from .code import (
    code_identity as code_identity,
    code_version as code_version,
    describe_process_code as describe_process_code,
    format_start_line as format_start_line,
)
from .job import (
    JOBS as JOBS,
    end_process as end_process,
    is_peer_gone as is_peer_gone,
)
from .join import (
    group_size as group_size,
    join_job as join_job,
    tell_problems as tell_problems,
)
from .launch_kubernetes import (
    TPU_NODES as TPU_NODES,
    KubernetesOptions as KubernetesOptions,
    dump_yaml as dump_yaml,
    make_jobset as make_jobset,
    parse_mounts as parse_mounts,
)
from .launch_local import (
    MOST_PROCESSES as MOST_PROCESSES,
    LocalGroup as LocalGroup,
    run_processes as run_processes,
)
from .launch_slurm import (
    SLURM_SAVE_SECONDS as SLURM_SAVE_SECONDS,
    SlurmShape as SlurmShape,
    SlurmTask as SlurmTask,
    make_slurm_parameters as make_slurm_parameters,
    parse_sbatch_options as parse_sbatch_options,
)
from .place import JobFlags as JobFlags
from .rendezvous import split_address as split_address
from .signals import (
    StopRequest as StopRequest,
    watchdog as watchdog,
)
