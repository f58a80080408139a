#!/usr/bin/env bash
# Tests the SLURM launchers with a real SLURM on this machine: one slurmctld and two slurmd.
#   ./launch/slurm_test.sh            # apt-get installs slurmctld slurmd slurm-client munge if needed
#   ./launch/slurm_test.sh -- sinfo   # runs another command in that SLURM
# Call it as root, on Debian or Ubuntu. The daemons have namespaces of their own (files, processes,
# network) and a folder that is removed at the end. Exit code 77 means that it cannot run here, and
# the last line says why. Other arguments go to pytest. PYTHON names another interpreter.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
leave_out() {
    echo "slurm test left out: $1"
    exit 77
}
missing() { # prints those of the programs that are not installed
    local program
    for program in "$@"; do command -v "$program" >/dev/null || printf ' %s' "$program"; done
}

if [ "${1:-}" != --inside ]; then
    [ "$(id -u)" = 0 ] || leave_out "needs root, for apt-get and namespaces of its own"
    if [ -n "$(missing slurmctld slurmd sbatch munged ip)" ]; then
        command -v apt-get >/dev/null || leave_out "SLURM is not installed and there is no apt-get"
        { apt-get update && apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2; } \
            >/dev/null 2>&1 || leave_out "apt-get cannot install slurmctld slurmd slurm-client munge iproute2 here"
    fi
    lacking=$(missing slurmctld slurmd sbatch munged ip unshare)
    [ -z "$lacking" ] || leave_out "not here:$lacking"
    unshare --mount --pid --net --fork --kill-child --mount-proc true 2>/dev/null \
        || leave_out "namespaces are not allowed here"
    if [ -z "${PYTHON:-}" ]; then
        source "$root/launch/environment.sh"
        make_environment "$root" test
        PYTHON=$root/.venv/bin/python
    fi
    export PYTHON
    folder=$(mktemp -d /tmp/gpt_jax_slurm.XXXXXX)
    export GPT_JAX_SLURM=$folder
    unshare --mount --pid --net --fork --kill-child --mount-proc "${BASH_SOURCE[0]}" --inside "$@" &
    trap 'kill -KILL %1 2>/dev/null || true; rm -rf "$folder"' EXIT # All daemons end with %1.
    trap 'exit 130' INT TERM
    wait %1
    exit
fi

shift
folder=$GPT_JAX_SLURM
ip link set lo up
# SLURM looks for an address of this machine, and 127.0.0.1 does not count for getaddrinfo.
ip address add 127.0.0.2/8 dev lo
{ cat /etc/hosts; echo "127.0.0.1 n1 n2 $(hostname)"; } >"$folder/hosts"
mount --bind "$folder/hosts" /etc/hosts

head -c 1024 /dev/urandom >"$folder/munge.key"
chmod 400 "$folder/munge.key"
chmod 755 "$folder"
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"

cat >"$folder/slurm.conf" <<EOF
ClusterName=gpt_jax
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=15
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/linear
ReturnToService=2
MessageTimeout=60
SlurmdTimeout=600
KillWait=120
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=17001 CPUs=1
NodeName=n2 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=17002 CPUs=1
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=120
PartitionName=high Nodes=n1,n2 PriorityTier=10
EOF
mkdir "$folder/state" "$folder/n1" "$folder/n2"
export SLURM_CONF=$folder/slurm.conf
slurmctld
for node in n1 n2; do slurmd -N "$node"; done
idle() { [ "$(timeout 10 sinfo --noheader --states=idle --format=%D --partition=low 2>/dev/null)" = 2 ]; }
for _ in $(seq 30); do
    idle && break
    sleep 1
done
idle || {
    tail -n 20 "$folder/slurmctld.log" "$folder/n1.log"
    leave_out "the nodes of a SLURM on this machine do not come up (logs above)"
}
cd "$root"
if [ "${1:-}" = -- ]; then
    "${@:2}"
    exit
fi
"$PYTHON" -m pytest -p no:cacheprovider tests/slurm/check_slurm.py "$@"
