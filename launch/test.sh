#!/usr/bin/env bash
# The whole test suite, in the environment of local.sh plus the test extra. Arguments go to pytest.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/environment.sh"
make_environment "$root" "test"
cd "$root"
exec "$root/.venv/bin/python" -m pytest -n 2 "$@"
