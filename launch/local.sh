#!/usr/bin/env bash
# gpt-jax in an environment of its own: makes .venv at the first call, then runs `gpt-jax "$@"`.
#   ./launch/local.sh train --config=configs/quickstart.py --workdir=runs/quickstart
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/environment.sh"
make_environment "$root" ""
exec "$root/.venv/bin/gpt-jax" "$@"
