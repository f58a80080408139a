#!/usr/bin/env bash
# The checks before a commit: format, lint, types and the quick tests.
#   ./launch/check.sh
# They run in the environment of local.sh with the dev extra. Every check runs, also after one that
# failed. The output of the failed ones comes at the end, and the exit code is then 1.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/environment.sh"
make_environment "$root" "dev"
cd "$root"

bin=$root/.venv/bin
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
failed=()

check() { # NAME COMMAND…: prints the name, the command's last line, and the verdict
    local name=$1 began=$SECONDS verdict=passed
    shift
    echo "$name: ${*#"$root/"}"
    if ! "$@" >"$logs/$name" 2>&1 </dev/null; then
        verdict=FAILED
        failed+=("$name")
    fi
    echo "    $(grep -v '^[[:space:]]*$' "$logs/$name" | tail -n 1)"
    echo "    $verdict, $((SECONDS - began)) s"
}

check format "$bin/ruff" format --check .
check lint "$bin/ruff" check .
check types "$bin/pyright" --pythonpath "$bin/python" gpt_jax
check tests "$root/launch/test.sh" --quick

for name in "${failed[@]}"; do
    printf '\n==== %s failed ====\n' "$name"
    cat "$logs/$name"
done
if [ ${#failed[@]} -gt 0 ]; then
    printf '\nfailed: %s\n' "${failed[*]}"
    exit 1
fi
printf '\nall checks passed\n'
