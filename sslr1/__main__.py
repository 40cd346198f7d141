"""`sslr1 train …` and `python -m sslr1 train …`: the same as `python -m sslr1.train …`."""

import runpy
import sys

import sslr1

COMMANDS = ("train", "warmup", "evaluate", "preview", "report", "compare", "export")
MODULES = {"compare": "report.compare"}


def main():
    sslr1.begin_program()
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        asked = " ".join(sys.argv[1:2])
        print(f"error: {asked!r} is not a command; use one of: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    command = sys.argv.pop(1)
    runpy.run_module(f"sslr1.{MODULES.get(command, command)}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
