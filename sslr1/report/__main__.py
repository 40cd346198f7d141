"""python -m sslr1.report RUNFOLDER [--out FILE]"""

import argparse

from sslr1.errors import UserError
from sslr1.report.page import write


def main():
    parser = argparse.ArgumentParser(prog="python -m sslr1.report", description="Write report.html of a run folder.")
    parser.add_argument("folder", help="a run folder, e.g. runs/demo")
    parser.add_argument("--out", help="the file to write (default: report.html in the run folder)")
    arguments = parser.parse_args()
    try:
        print(write(arguments.folder, arguments.out))
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
