#!/usr/bin/env bash
# gpt-jax in an environment of its own: makes .venv at the first call, then runs `gpt-jax "$@"`.
#   ./launch/local.sh train --config=configs/quickstart.py --workdir=runs/quickstart
# With --processes=N, --devices_per_process=M or --restarts=K anywhere: as `gpt-jax launch local`, real processes.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/environment.sh"
make_environment "$root" ""
launcher=()
[ "${1:-}" = launch ] || for word in "$@"; do
    case $word in --processes | --processes=* | --devices_per_process | --devices_per_process=* | --restarts | --restarts=*)
        launcher=(launch local) ;;
    esac
done
exec "$root/.venv/bin/gpt-jax" "${launcher[@]}" "$@"
