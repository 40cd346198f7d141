"""`python -m docs.picture runs/demo`: the top of a run's report as docs/pictures/report.png. Takes Chromium."""

import sys
import tempfile
from pathlib import Path

from PIL import Image

from sslr1.report.page import write
from tests.browser import Page

WIDTH, HEIGHT = 1280, 1065  # px of the page


def main(run):
    target = Path(__file__).parent / "pictures" / "report.png"
    with tempfile.TemporaryDirectory() as folder:
        file = write(run, Path(folder) / "report.html")
        with Page(file, Path(folder) / "profile", WIDTH) as page:
            page.screenshot(target, (0, 0, WIDTH, HEIGHT))
    with Image.open(target) as picture:  # a quarter of the bytes: charts and words have few colours
        picture.convert("RGB").quantize(64).save(target, optimize=True)
    print(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
