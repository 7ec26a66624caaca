#!/usr/bin/env bash
# The main job on every Python this project supports, each in an environment of its own.
# A missing interpreter is reported as skipped; that of all is a failure. Use those of pyenv with
# PYENV_VERSION=3.10.13:3.12.1:3.13.0 supply_chain/pythons.sh
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
failed=0 tested=0
for version in 3.10 3.11 3.12 3.13; do
    python="python$version"
    if ! "$python" -c "import ensurepip, venv" 2>/dev/null; then
        echo "Python $version: skipped: there is no $python with venv here"
        continue
    fi
    tested=$((tested + 1))
    folder=".venv-$version"
    rm -rf "$folder" build
    if "$python" -m venv "$folder" &&
        "$folder/bin/python" -m pip install --quiet '.[cpu,serve,sign]' &&
        supply_chain/smoke.sh "$folder/bin" > "$folder/smoke.txt"; then
        echo "Python $version: passed ($("$folder/bin/python" --version))"
    else
        echo "Python $version: FAILED"
        failed=1
    fi
done
[ "$tested" -gt 0 ] || echo "no Python was tested"
[ "$failed" = 0 ] && [ "$tested" -gt 0 ]
