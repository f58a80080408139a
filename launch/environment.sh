# Sourced by the launchers: make_environment ROOT EXTRA installs gpt_jax, pinned, into ROOT/.venv when it is not there yet
# or the pins have changed. A stamp written last tells a finished install from an interrupted one.

make_environment() {
    local root=$1 extra=$2 venv=$1/.venv python=${PYTHON:-python3}
    if ! command -v "$python" >/dev/null || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "gpt-jax needs Python 3.11 or newer as '$python'; install it or set PYTHON=/path/to/python3" >&2
        exit 2
    fi
    exec 9>"$root/.venv.lock" # two launches at once install once
    flock 9
    local stamp wanted
    stamp=$venv/installed${extra:+-$extra}
    wanted=$(cat "$root/pyproject.toml" "$root/launch/constraints.txt" | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "gpt-jax: installing into $venv (once, about a minute)" >&2
        "$python" -m venv "$venv" || {
            echo "gpt-jax: 'python3 -m venv' failed; on Debian or Ubuntu: apt-get install python3-venv" >&2
            exit 2
        }
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            --constraint "$root/launch/constraints.txt" --editable "$root${extra:+[$extra]}" >&2
        printf '%s' "$wanted" >"$stamp"
    fi
    exec 9>&-
}
