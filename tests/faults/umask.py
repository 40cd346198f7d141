"""`python -m tests.faults.umask OCTAL MODULE …`: a program under another umask."""

import os
import runpy
import sys

if __name__ == "__main__":
    os.umask(int(sys.argv[1], 8))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
