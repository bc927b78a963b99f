#!/bin/sh
# Makes the environment if there is none, and opens the page: ./start.sh [--update] [--setup] [options of sdlora ui]
set -eu
cd "$(dirname "$0")"
if [ ! -x .venv/bin/python ]; then
    found=""
    for python in "${PYTHON:-}" python3.13 python3.12 python3.11 python3 python; do
        [ -n "$python" ] || continue
        if "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            found=$python
            break
        fi
    done
    if [ -z "$found" ]; then
        echo "sdlora needs Python 3.11, 3.12 or 3.13; install one, or name it: PYTHON=/path/to/python $0" >&2
        exit 2
    fi
    echo "making the environment in $PWD/.venv ..."
    if ! "$found" -m venv .venv; then
        echo "no environment could be made with $found (Debian, Ubuntu: sudo apt install python3-venv)" >&2
        exit 2
    fi
fi
exec .venv/bin/python -m sdlora.commands.start "$@"
