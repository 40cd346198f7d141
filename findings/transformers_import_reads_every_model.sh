#!/usr/bin/env bash
# transformers 5.17.0: importing one model's configuration opens the source of every model there is, twice.
# Its imports are lazy, but to know which names there are, `import transformers` reads the text of each of the 1,500 and more .py files
# below transformers/models (define_import_structure), and importing anything of `transformers.models` reads them all once more; nothing is
# kept from one process to the next. That is 68 MB of text and about 3,100 opened files at each start of each process, before any model's code is
# imported. It concerns whoever starts many ranks from a Python environment on a network file system, or
# short-lived processes, or imports transformers in a command line's help.
# Exits 0 while this is so.
set -euo pipefail
home=$(mktemp -d); trap 'rm -rf "$home"' EXIT
"${PYTHON:-python3}" -m venv "$home/venv"
"$home/venv/bin/pip" install -q --disable-pip-version-check "transformers==5.17.0" "numpy==2.3.5" >&2
HOME=$home "$home/venv/bin/python" - <<'EOF'
import os
import sys
from collections import Counter

opened = Counter()


def hook(event, arguments):
    path = arguments[0] if event == "open" else None
    if isinstance(path, str) and f"{os.sep}transformers{os.sep}models{os.sep}" in path and path.endswith(".py"):
        opened[path] += 1


sys.addaudithook(hook)
import transformers

first = sum(opened.values())
from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl

size = sum(os.path.getsize(path) * times for path, times in opened.items()) / 1e6
twice = sum(times >= 2 for times in opened.values())
print(f"transformers {transformers.__version__}: `import transformers` opens {first:,} source files of models;")
print(f"with one model's configuration {sum(opened.values()):,} in all, {twice:,} of them at least twice: {size:.0f} MB")
sys.exit(not (first > 1000 and twice > 1000))
EOF
