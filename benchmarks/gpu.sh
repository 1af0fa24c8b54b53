#!/usr/bin/env bash
# gpu.sh: build, test, check and measure everything on this machine's NVIDIA GPU, in under nine minutes.
#
#     benchmarks/gpu.sh [--out FOLDER] [--seconds S] [--rehearse]
#
# It needs no network: an interpreter ($PYTHON, else python3) with torch, triton, pytest and pybind11, and
# nvcc, cmake, make or ninja, and a C++ compiler; it says what is missing. The modules are built for this
# machine's GPU alone and installed into the checkout. compute-sanitizer and peers are used where they are.
# FOLDER (benchmarks) gets RESULTS-gpu.md and RESULTS-gpu.json; logs go to build/gpu. Status 1: something
# of ours failed; 2: something is missing. --rehearse tries everything but kernels, on a CPU, and writes to
# FOLDER alone.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
left() { echo $((seconds - SECONDS)); }

has() { command -v "$1" > /dev/null; }

imports() { "$python" -c "import $1" > /dev/null 2>&1; }

# What is missing of what cannot be done without, one a line.
missing() {
    has "$python" || { echo "$python (or set PYTHON)"; return; }
    for module in torch pytest; do
        imports "$module" || echo "the Python package $module in $python"
    done
    [ -z "$rehearse" ] || return
    for module in triton pybind11; do
        imports "$module" || echo "the Python package $module in $python"
    done
    if imports torch && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo "an NVIDIA GPU that torch sees"
    fi
    has nvcc || echo "nvcc, the compiler of the CUDA toolkit, on the PATH"
    has cmake || echo "cmake"
    has ninja || has make || echo "ninja or make"
    has "${CXX:-c++}" || echo "a C++ compiler (c++, or set CXX)"
}

# stage NAME LIMIT COMMAND...: run it for at most LIMIT seconds; keep its output and what became of it.
stage() {
    local name=$1 limit=$2 began=$SECONDS status result
    shift 2
    echo "== $name, $limit s at most"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$work/$name.log"
    status=${PIPESTATUS[0]}
    case $status in
        0) result=ok ;;
        124 | 137) result="stopped after $limit s" ;;
        *) result="FAILED with status $status" ;;
    esac
    echo "$name: $result, $((SECONDS - began)) s" >> "$work/stages"
    return "$status"
}

skip() { echo "$1: left out, $2" | tee -a "$work/stages"; }

# shellcheck disable=SC2329
configure() {
    local version capability architecture generator=()
    version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
    capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
    architecture=$capability-real
    [ "$capability" != 90 ] || architecture=90a-real # wgmma is of this chip alone
    ! has ninja || generator=(-G Ninja)
    cmake "${generator[@]}" -S . -B "$work/cmake" -DCMAKE_BUILD_TYPE=Release -DPYFEAT_CUDA=ON \
        -DPYFEAT_CUDA_ARCHITECTURES="$architecture" -DSKBUILD_PROJECT_VERSION="$version" \
        -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
        -DPython_EXECUTABLE="$(command -v "$python")" -DPYTHON_EXECUTABLE="$(command -v "$python")"
}

# The CPU module first: without that of CUDA, Triton can still be tested.
# shellcheck disable=SC2329
build() {
    local jobs module
    jobs=$(nproc)
    configure || return
    for module in _C _cuda; do
        cmake --build "$work/cmake" --target "$module" --parallel "$jobs" || return
        cp "$work/cmake/$module".*so pyfeat/ || return
    done
}

# shellcheck disable=SC2329
run_tests() {
    local files workers=()
    if [ -n "$rehearse" ]; then
        mapfile -t files < <(grep -l 'support_gpu' tests/test_*.py)
        "$python" -m pytest -q -m gpu --collect-only -q "${files[@]}"
        return
    fi
    # On a GPU the tests of kernels in an interpreter or an emulation use the device instead.
    mapfile -t files < <(grep -lE 'support_(gpu|triton|cuda)' tests/test_*.py)
    ! imports xdist || workers=(-n 6)
    "$python" -m pytest -q -m gpu -W default -p no:cacheprovider "${workers[@]}" "${files[@]}"
}

# sanitize TOOL: every op once. Without torch's cache every tensor ends where its memory does.
# shellcheck disable=SC2329
sanitize() {
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
        "$python" -m benchmarks.gpu.small
}

main() {
    python=${PYTHON:-python3} out=benchmarks seconds=520 rehearse=
    while [ $# -gt 0 ]; do
        case $1 in
            --out) out=${2:?gpu.sh: --out needs a folder}; shift ;;
            --seconds) seconds=${2:?gpu.sh: --seconds needs a number}; shift ;;
            --rehearse) rehearse=--rehearse ;;
            *) echo "gpu.sh: arguments must be --out FOLDER, --seconds S or --rehearse, got $1" >&2; exit 2 ;;
        esac
        shift
    done
    SECONDS=0 failed=0
    work=build/gpu
    [ -z "$rehearse" ] || work=$out/log
    mkdir -p "$work" "$out"
    : > "$work/stages"
    # Stages are processes of their own, which timeout can stop; shellcheck does not see that they are called.
    export python rehearse work
    export -f has imports configure build run_tests sanitize

    lacking=$(missing)
    if [ -n "$lacking" ]; then
        echo "gpu.sh: missing on this machine:" >&2
        while read -r line; do echo "  - $line" >&2; done <<< "$lacking"
        exit 2
    fi

    # What was built must run: a test that would skip it fails.
    export PYFEAT_REQUIRED_BACKENDS=
    if [ -n "$rehearse" ]; then
        skip build "a rehearsal"
    else
        PYFEAT_REQUIRED_BACKENDS=triton
        if stage build 190 bash -c build; then
            PYFEAT_REQUIRED_BACKENDS="cuda triton"
        else
            failed=1
        fi
        if ! imports pyfeat; then
            echo "gpu.sh: pyfeat was not built, see $work/build.log" >&2
            exit 1
        fi
    fi

    limit=$(($(left) / 2))
    [ -n "$rehearse" ] || [ "$limit" -lt 140 ] || limit=140
    stage tests "$limit" bash -c run_tests || failed=1

    for tool in memcheck racecheck; do
        if ! has compute-sanitizer || [ -n "$rehearse" ]; then
            skip "$tool" "there is no compute-sanitizer here"
        elif ! stage "$tool" 45 bash -c "sanitize $tool"; then
            if grep -q 'Device not supported' "$work/$tool.log"; then
                skip "$tool" "it does not support this device"
            else
                failed=1
            fi
        fi
    done

    echo "== races"
    limit=$(left)
    timeout --kill-after=5 "$limit" "$python" -m benchmarks.gpu $rehearse --seconds $((limit - 15)) \
        --stages "$work/stages" --out "$out/RESULTS-gpu.md" --json "$out/RESULTS-gpu.json" \
        2> "$work/races.log" | tee "$work/races.out" | grep --line-buffered '^\['
    status=${PIPESTATUS[0]}
    if [ "$status" != 0 ]; then
        failed=1
        tail -n 5 "$work/races.log"
    fi
    cat "$work/stages"
    grep -v '^\[' "$work/races.out"
    return "$failed"
}

# The script is read to its end before anything runs.
main "$@"
exit
