#!/bin/sh
# Run the tests on the versions that people have: each row in an environment of its own, unpinned.
#
#   scripts/matrix.sh [ROW ...]        e.g.  scripts/matrix.sh 3.0 tools        no ROW: all of them
#
# Needs uv, and the Pythons 3.10 to 3.13: on the PATH, in pyenv, or to be had through uv. With ANY_PYTHON=1 a row
# whose Python is missing runs on python3; each row says which one it had.
set -u

cd "$(dirname "$0")/.."
where=${MATRIX:-.matrix}
uv=${UV:-uv}
export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-1}" DO_NOT_TRACK=1
# Row, Python, DSPy, Optuna, how our other dependencies are resolved. `dspy-ai` is no pin: it only bounds dspy below.
# `newest` lifts our own upper bound, so that a new release of DSPy shows up here first.
rows='
3.0    3.10 dspy==3.0.* optuna>=4,<5  highest
3.1    3.11 dspy==3.1.* optuna>=4,<5  highest
3.2    3.12 dspy==3.2.* optuna>=4,<5  highest
3.3    3.13 dspy==3.3.* optuna>=5     highest
3.4    3.13 dspy==3.4.* optuna>=5     highest
oldest 3.10 dspy==3.0.* optuna==4.0.* lowest-direct
tools  3.11 dspy==3.4.* optuna>=5     highest
newest 3.13 dspy>=3.4   optuna>=5     highest
'
tests='pytest>=8 pytest-asyncio>=1 pytest-timeout pytest-xdist hypothesis numpy scipy hatchling'

# A pyenv shim is on the PATH for versions that it then refuses to run, and uv does not look into pyenv's folder.
find_python() { # version
    for python in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        if "$python" -c "" 2>/dev/null; then command -v "$python" && return; fi
    done
    if "$uv" python find --no-python-downloads "$1" 2>/dev/null; then return; fi
    if [ -n "${ANY_PYTHON:-}" ]; then echo python3; else echo "$1"; fi
}

install() {
    overrides=
    if [ "$1" = newest ]; then
        printf 'dspy>=3.4\ndspy-ai>=3.4\n' >"$where/overrides.txt" && overrides="--override $where/overrides.txt"
    fi
    "$uv" pip install -q --python "$where/$1/bin/python" --resolution "$5" $overrides "$3" "$4" "$6" &&
        "$uv" pip install -q --python "$where/$1/bin/python" $overrides $tests
}

run() { # row python dspy optuna resolution
    extras='.[report,postgresql]' mark='not slow' paths=tests
    case $1 in
        # What DSPy's version can change. All other tests run on these Pythons in `oldest` and `3.3`.
        3.0 | 3.4) paths='tests/conformance tests/programs tests/proposers tests/runner tests/storage tests/test_compile.py' ;;
        oldest) extras=. paths='tests --ignore=tests/test_docs.py' ;; # the pages use extras and newer versions
        tools) extras='.[report,integrations,dask]' mark='' paths='tests/conformance tests/integrations tests/test_docs.py' ;;
    esac
    if ! "$uv" venv -q --clear --python "$(find_python "$2")" "$where/$1"; then
        echo "row $1: there is no Python $2"
        return 1
    fi
    install "$@" "$extras" || { echo "row $1: could not be installed"; return 1; }
    "$where/$1/bin/python" -c "import dspy, optuna, platform as p; print('row $1: Python', p.python_version(), \
'DSPy', dspy.__version__, 'Optuna', optuna.__version__)" 2>/dev/null
    # What failed is repeated once, alone: on a busy machine tests of time limits fail beside others.
    set -- "$where/$1/bin/python" -m pytest -q -o "cache_dir=$where/$1/cache" -m "$mark"
    timeout 1800 "$@" -n auto --dist loadfile $paths || timeout 600 "$@" --last-failed --last-failed-no-failures none $paths
}

failed=
while read -r row python dspy optuna resolution; do
    [ -n "$row" ] || continue
    case " $* " in *" $row "* | "  ") ;; *) continue ;; esac
    run "$row" "$python" "$dspy" "$optuna" "$resolution" </dev/null || failed="$failed $row"
done <<ROWS
$rows
ROWS
if [ -n "$failed" ]; then
    echo "failed:$failed"
    for row in $failed; do cat "$where/$row/cache/v/cache/lastfailed" 2>/dev/null; done  # the names of the tests
    exit 1
fi
echo "all rows passed"
