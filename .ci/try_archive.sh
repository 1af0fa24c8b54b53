#!/usr/bin/env bash
# try_archive.sh PYTHON ARCHIVE [options of smoke.py]: a fresh venv, the archive, every op once.
# A wheel has nothing but the venv on its PATH: no compiler, no CMake. An sdist is compiled, and
# without a compiler it has to say what to do.
set -euo pipefail
python=$1 archive=$(realpath "$2")
here=$(realpath "$(dirname "$0")")
shift 2
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"$python" -m venv "$place/venv"
cd "$place"
pip() { # PATH arguments
    PATH=$1 "$place/venv/bin/python" -m pip --disable-pip-version-check "${@:2}"
}

if [[ $archive == *.whl ]]; then
    path=$place/venv/bin
    for tool in cc c++ gcc g++ clang nvcc cmake ninja make; do
        if [ -x "$path/$tool" ]; then
            echo "try_archive: the PATH must have no $tool" >&2
            exit 1
        fi
    done
else
    path=$place/venv/bin:$PATH
    # CMake looks beyond the PATH.
    if CXX=$place/no-compiler pip "$path" install --no-deps "$archive" >log 2>&1; then
        echo "try_archive: built $archive without a compiler" >&2
        exit 1
    fi
    grep --quiet 'Debian, Ubuntu *apt install g++' log || { cat log >&2; exit 1; }
    echo "without a compiler: says what to install"
fi
pip "$path" install --quiet --constraint "$here/constraints.txt" "$archive"
pip "$path" check
PATH=$path "$place/venv/bin/python" -I "$here/../tests/archives/smoke.py" "$@"
