#!/usr/bin/env bash
# Runs gpt-jax on all workers of Cloud TPU VMs, and starts it again where that helps.
#   ./launch/tpu_pod.sh --tpu=NAME[,NAME…] --zone=ZONE [--project=P] [--folder=gpt_jax] [--restarts=20] [--dry_run] \
#       -- train --config=configs/llama.py:1b --workdir=/mnt/runs/llama  # a folder that all workers share
# The TPU is one slice, or several that were made together as one queued resource. Those find each
# other through their metadata. The same command resumes.
# The code is expected in FOLDER of every worker's home, with a .venv that has the tpu extra. --setup
# copies the files of this checkout that git does not ignore, and makes .venv, on all workers. It
# leaves runs/ there alone. --dry_run prints the commands and runs none.
# It needs gcloud with an account.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
restartable=" 10 40 41 42 50 134 135 137 138 139 143 " first=5 most=300 # gpt_jax/errors.py; a test compares them
fail() {
    echo "tpu_pod.sh: $1" >&2
    exit 2
}

tpus="" place=() folder=gpt_jax restarts=20 dry="" setup=""
while [ $# -gt 0 ]; do
    case $1 in
    --tpu=*) tpus=${1#*=} ;;
    --zone=* | --project=*) place+=("$1") ;;
    --folder=*) folder=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --dry_run) dry=1 ;;
    --setup) setup=1 ;;
    -h | --help) sed -n '2,/^set -/s/^# //p' "${BASH_SOURCE[0]}" && exit 0 ;;
    --) shift && break ;;
    -*) fail "unknown flag $1; see --help" ;;
    *) break ;;
    esac
    shift
done
[ -n "$tpus" ] || fail "--tpu=NAME[,NAME…] is missing: which TPU VMs?"
[[ ",$tpus," != *,,* ]] || fail "--tpu=$tpus: an empty name"
# --setup replaces gpt_jax/ in this folder. So it must not be the home or the root, and it must have
# no characters that only a shell there would understand.
[[ $folder =~ ^/?(\.?[A-Za-z0-9_][A-Za-z0-9_.-]*/)*\.?[A-Za-z0-9_][A-Za-z0-9_.-]*/?$ ]] ||
    fail "--folder=$folder: expected a folder of its own below the workers' home, such as gpt_jax, or a whole path"
folder=${folder%/}
[[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts=$restarts: expected a number"
[ $# -gt 0 ] || [ -n "$setup" ] || fail "what is to run is missing: -- train --config=…"
case ${1:-} in
"" | evaluate | generate) ;;
train)
    for flag in "--workdir=DIR, a folder that all workers share" "--config=FILE, a file in the checkout"; do
        [[ " $* " == *" ${flag%%=*}"[\ =]* ]] || fail "train needs $flag"
    done
    ;;
*) fail "'$1' is no command that runs on several machines: train, evaluate, generate" ;;
esac
for word in "$@"; do
    case ${word%%=*} in --coordinator | --num_processes | --process_id | --local_device | --distributed | --cpu_devices)
        fail "${word%%=*}: the launcher gives it to each process; leave it out" ;;
    esac
done
[ -n "$dry" ] || command -v gcloud >/dev/null || fail "gcloud is not installed"
IFS=, read -ra names <<<"$tpus"

asked="" pause="" logs=$(mktemp -d) archive=$(mktemp)
mark='echo "gpt-jax ended with $?"' # gcloud's own exit code says little about many workers
start='echo "gpt-jax begins"'
trap 'rm -rf "$logs" "$archive"' EXIT
trap 'asked=1; wake; signal_all TERM' INT TERM # the programs save and end with 10

run() { # runs one command, or prints it
    if [ -n "$dry" ]; then printf '%q ' "$@" && echo; else "$@"; fi
}
everywhere() { # runs a shell line on all workers of all slices at once, and keeps the output in $logs
    local name pids=()
    for name in "${names[@]}"; do
        { run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all --command="$start; $1; $mark" 2>&1 |
            tee "$logs/$name"; } &
        pids+=($!)
        [ -z "$dry" ] || wait $!
    done
    for pid in "${pids[@]}"; do
        while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done # A signal ends one `wait` but not the command.
    done
}
wake() { # ends the wait before a restart
    [ -z "$pause" ] || kill "$pause" 2>/dev/null || true
}
signal_all() {
    local name
    for name in "${names[@]}"; do
        run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all \
            --command="pkill -$1 -f '^[^ ]*python[0-9.]* [^ ]*gpt-jax '; true" </dev/null || true
    done
}
# Prints the exit code of all workers: the first that is neither 0 nor 40. A lost connection loses
# lines, which counts as 40.
ended() {
    local codes name
    codes=$(cat "$logs"/* | sed -n 's/^.*gpt-jax ended with \([0-9]*\)$/\1/p')
    for name in "${names[@]}"; do
        grep -q 'gpt-jax ended with [0-9]*$' "$logs/$name" || codes="$codes 40"
    done
    for code in $codes; do [ "$code" -eq 0 ] || [ "$code" -eq 40 ] || { echo "$code" && return; }; done
    case " $(echo $codes) " in *" 40 "*) echo 40 ;; *) echo 0 ;; esac
}

pack() { # writes this checkout into $archive
    cd "$root"
    if git rev-parse HEAD >/dev/null 2>&1; then
        git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' path; do
            [ ! -e "$path" ] || printf '%s\0' "$path"
        done | tar -czf "$archive" --null -T -
    else
        tar -czf "$archive" --exclude=./.git --exclude=./.venv --exclude=./runs --exclude=__pycache__ .
    fi
}

if [ -n "$setup" ]; then
    [ -n "$dry" ] || (pack)
    for name in "${names[@]}"; do
        run gcloud compute tpus tpu-vm scp "$archive" "$name:$folder.tar.gz" "${place[@]}" --worker=all
    done
    there=$(printf %q "$folder")
    # The old package goes first, because modules that have been deleted must not stay there.
    everywhere "mkdir -p $there && rm -rf $there/gpt_jax && tar -xzf $there.tar.gz -C $there && rm $there.tar.gz && \
cd $there && source launch/environment.sh && make_environment \$PWD tpu"
    [ -n "$dry" ] || [ "$(ended)" -eq 0 ] || fail "the setup failed, see above"
    [ $# -gt 0 ] || exit 0
fi

line="cd $(printf %q "$folder") && .venv/bin/gpt-jax $(printf '%q ' "$@")--distributed"
count=0
while true; do
    everywhere "$line"
    [ -z "$dry" ] || exit 0
    [ "$count" -gt 0 ] || [ -n "$asked" ] || grep -q 'gpt-jax begins$' "$logs"/* ||
        fail "no worker was reached, see above: are --tpu, --zone, --project and gcloud's account right?"
    code=$(ended)
    [ "$code" -ne 0 ] || exit 0
    [ -z "$asked" ] || exit "$code"
    if [[ $restartable != *" $code "* ]]; then
        echo "tpu_pod.sh: exit code $code: a restart would not help" >&2
        exit "$code"
    elif [ "$count" -ge "$restarts" ]; then
        echo "tpu_pod.sh: exit code $code, restarted $count times: not again" >&2
        exit "$code"
    fi
    wait=$((first << (count < 16 ? count : 16)))
    wait=$((wait < most ? wait : most)) count=$((count + 1))
    echo "tpu_pod.sh: exit code $code: restart $count of $restarts in $wait s" >&2
    sleep "$wait" & # A request to stop ends it, also one that comes between these lines.
    pause=$!
    [ -z "$asked" ] || wake
    wait $pause || true
    pause=""
    [ -n "$asked" ] || signal_all KILL # A lost connection may have left processes running.
    [ -z "$asked" ] || exit "$code"
done
