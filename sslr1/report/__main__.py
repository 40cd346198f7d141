"""python -m sslr1.report RUNFOLDER [--out FILE]"""

import sys

from sslr1.__main__ import parsed
from sslr1.errors import UserError
from sslr1.report.page import write


def main():
    arguments = parsed("report")
    try:
        print(write(arguments.folder, arguments.out))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
