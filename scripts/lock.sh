#!/bin/sh
# Pins what requirements/*.in ask for, for every supported Python, into requirements/*.txt.
# Needs uv (`pip install uv`); only who changes a dependency runs this.
set -eu
cd "$(dirname "$0")/../requirements"
for name in runtime dev; do
  uv pip compile --quiet --universal --python-version 3.10 --index-strategy unsafe-best-match \
    --no-annotate --no-emit-index-url --no-emit-find-links \
    --custom-compile-command "make lock" "$@" "$name.in" -o "$name.txt"
done
