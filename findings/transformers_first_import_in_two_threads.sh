#!/usr/bin/env bash
# transformers 5.17.0 (and CPython 3.11, 3.12): `from transformers import AutoConfig` in a thread raises "ImportError:
# cannot import name 'AutoConfig' from 'transformers'" if another thread is just importing transformers for the first
# time. At the end of its import the package puts another object, a lazy module, into sys.modules in its own place. A
# thread whose import statement found the first object there, while that was being initialised, waits for it and then
# gets that object, which has no such names, though the import has succeeded. A moment later the same line works. Three
# threads that each import what they need inside their function met it in 2 of 4 starts. It concerns servers, data
# loaders and trainers that import transformers lazily from threads: import it once before they start.
# Exits 0 while this is so.
set -euo pipefail
home=$(mktemp -d); trap 'rm -rf "$home"' EXIT
"${PYTHON:-python3}" -m venv "$home/venv"
"$home/venv/bin/pip" install -q --disable-pip-version-check "transformers==5.17.0" "numpy==2.3.5" >&2
HOME=$home "$home/venv/bin/python" - <<'EOF2'
import sys
import threading
import time
from importlib import import_module

first = threading.Thread(target=import_module, args=("transformers",))
first.start()
while "transformers" not in sys.modules:  # the first thread has begun
    time.sleep(0.001)
found = []
try:
    from transformers import AutoConfig
except ImportError as error:
    found.append(str(error).split(" (")[0])
first.join()
from transformers import AutoConfig  # the same line again

import transformers

print(f"Python {sys.version.split()[0]}, transformers {transformers.__version__}, in a second thread: {found or 'no error'}")
sys.exit(not found)
EOF2
