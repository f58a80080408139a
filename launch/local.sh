#!/usr/bin/env bash
# Runs `gpt-jax "$@"` in an environment of its own. The first call makes .venv.
#   ./launch/local.sh train --config=configs/quickstart.py --workdir=runs/quickstart
# With --processes=N, --devices_per_process=M or --restarts=K it runs `gpt-jax launch local "$@"`.
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
