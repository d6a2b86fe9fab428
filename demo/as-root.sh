#!/usr/bin/env bash
# as-root.sh COMMAND...   Runs the command as root: as it is, or through sudo.
set -euo pipefail
if [ "$(id -u)" = 0 ]; then exec "$@"; fi
command -v sudo >/dev/null || { echo "this step needs root, and there is no sudo: $*" >&2; exit 77; }
exec sudo "$@"
