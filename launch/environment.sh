# The launchers source this file. `make_environment ROOT EXTRA` installs gpt_jax into ROOT/.venv with
# exact versions, if it is not there yet or if the versions have changed. A stamp is written last, so
# that an interrupted install is not taken for a finished one. ROOT/.venv/constraints.txt has the
# versions, for `pip install -c` of a further extra.

# Prints the file of exact versions for PYTHON. The newest JAX needs Python 3.12, and 3.11 has an
# older one.
choose_constraints() { # ROOT PYTHON
    local version=py312
    "$2" -c 'import sys; sys.exit(sys.version_info < (3, 12))' || version=py311
    printf '%s' "$1/launch/constraints-$version.txt"
}

make_environment() {
    local root=$1 extra=$2 venv=$1/.venv python=${PYTHON:-python3}
    if ! command -v "$python" >/dev/null || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "gpt-jax needs Python 3.11 or newer as '$python'; install it or set PYTHON=/path/to/python3" >&2
        exit 2
    fi
    local stamp wanted constraints
    constraints=$(choose_constraints "$root" "$python")
    stamp=$venv/installed${extra:+-$extra}
    wanted=$(cat "$root/pyproject.toml" "$constraints" | cksum)
    # What is installed needs no lock, so that people who may only read the checkout can run it.
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    if [ ! -w "$root" ]; then
        echo "gpt-jax: $venv is not installed, and $root cannot be written; clone the repository to a folder of yours" >&2
        exit 2
    fi
    # Of two launches at once, one installs and the other waits. ">>" empties nothing, should a link lie there.
    exec 9>>"$root/.venv.lock"
    flock 9
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "gpt-jax: installing into $venv (once, about a minute)" >&2
        # venv refuses a link, and blames a package that is not missing.
        if [ -L "$venv" ]; then
            echo "gpt-jax: $venv is a link to $(readlink "$venv"), where these versions are not installed; remove the link, and start again" >&2
            exit 2
        fi
        "$python" -m venv "$venv" || {
            echo "gpt-jax: 'python3 -m venv' failed; on Debian or Ubuntu: apt-get install python3-venv" >&2
            exit 2
        }
        cp "$constraints" "$venv/constraints.txt"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            --constraint "$constraints" --editable "$root${extra:+[$extra]}" >&2
        printf '%s' "$wanted" >"$stamp"
    fi
    exec 9>&-
}
