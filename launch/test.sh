#!/usr/bin/env bash
# The tests, in the environment of local.sh with the test extra. Other arguments go to pytest.
#   ./launch/test.sh            # all tests but those of the deep tier
#   ./launch/test.sh --quick    # the tests that show most faults in little time
#   ./launch/test.sh --deep     # more settings of them and drills of minutes; then some
#                               # numerical tests again, with XLA's compiler as users have it
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/environment.sh"
make_environment "$root" "test"
cd "$root"
tier=()
case ${1:-} in
--quick)
    shift
    tier=(tests/test_floors.py tests/test_docs.py tests/config tests/hardware tests/metrics tests/sharding
        tests/data/test_batches.py tests/data/test_order.py tests/data/test_rows.py tests/data/test_mixture.py
        tests/data/test_packing.py tests/data/test_transforms.py
        tests/model/test_parameters.py tests/plan/test_memory.py tests/train/test_schedule.py tests/train/test_step.py)
    ;;
--deep)
    shift
    "$root/.venv/bin/python" -m pytest -n 2 --dist worksteal -m deep "$@"
    export DEFAULT_COMPILER=1 # see tests/conftest.py
    tier=(tests/train/test_step.py tests/model/test_parameters.py tests/model/test_model.py::test_logits_equal_numpy)
    ;;
esac
exec "$root/.venv/bin/python" -m pytest -n 2 --dist worksteal "${tier[@]}" "$@"
