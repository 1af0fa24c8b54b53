#!/usr/bin/env bash
# build_archives.sh PYTHON FOLDER [options of python -m build]: archives in FOLDER, checked.
# On Linux a wheel gets the oldest system it runs on as its tag; nothing is copied into it.
set -euo pipefail
python=$1 folder=$2
shift 2
raw=$folder/raw
rm -rf "$raw" "$folder"/*.whl "$folder"/*.tar.gz
"$python" -m build --outdir "$raw" "$@"
if [ "$(uname)" = Linux ]; then
    PATH=$(dirname "$python"):$PATH
    "$python" -m auditwheel repair --wheel-dir "$folder" "$raw"/*.whl
    rm "$raw"/*.whl
fi
find "$raw" -type f -exec mv {} "$folder" \;
rmdir "$raw"
find "$folder" -maxdepth 1 \( -name '*.whl' -o -name '*.tar.gz' \) \
    -exec "$python" "$(dirname "$0")/../tests/archives/check_archives.py" {} +
