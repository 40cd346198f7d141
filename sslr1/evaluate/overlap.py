"""Which of the images to train on show the same pictures as a benchmark's.

python -m sslr1.evaluate.overlap IMAGES [IMAGES …] --against BENCHMARK [--out excluded.txt]

Writes their names, one a line, for data.exclude, and beside it the pairs with their likeness.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from sslr1.__main__ import parsed
from sslr1.data import likeness
from sslr1.data.images import ImageFolder
from sslr1.data.sources import Source
from sslr1.errors import UserError
from sslr1.evaluate import benchmarks
from sslr1.files import write_whole
from sslr1.runs.progress import Progress
from sslr1.setup import processors

CHUNK = 1024  # images between two signs of progress


def of_folder(paths, column=None) -> tuple[list, object]:
    """(what each image is called, a function from its number to its thumbnail) of one or several sources."""
    folder = ImageFolder.scan([Source(path, None, column) for path in paths], "", fewest=1)
    names = [file.path for file in folder.files]
    return names, lambda number: likeness.thumbnail(folder.read(number))


def of_benchmark(path) -> tuple[list, object]:
    """The same of the pictures of a benchmark in VLMEvalKit's form."""
    pictures = [(row.index, source) for row in benchmarks.read(path) for source in row.images]

    def thumbnail(number):
        return likeness.of_grey(np.asarray(benchmarks.decode(pictures[number][1]).convert("L")))

    return [f"{path}, question {index}" for index, _ in pictures], thumbnail


def thumbnails(names, thumbnail, threads, what) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [n, 32, 32], numbers of the images that they are of). Says which are missing."""
    found, reasons, progress = [], [], Progress(True, stderr=True)

    def one(number):
        try:
            return number, thumbnail(number)
        except (OSError, ValueError) as error:
            reasons.append(f"{names[number]}: {error}")

    progress.start(what, len(names))
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(names), CHUNK):
            found += filter(None, pool.map(one, range(start, min(start + CHUNK, len(names)))))
            progress.show(min(start + CHUNK, len(names)), {})
    progress.stop()
    if not found:
        raise UserError(f"none of the {len(names):,} images of {what} can be read, e.g. {reasons[0]}")
    if reasons:
        print(f"{what}: {len(reasons):,} images can't be read and are not compared, e.g. {reasons[0]}")
    return np.stack([thumb for _, thumb in found]), np.array([number for number, _ in found])


def find(images, against, threads=1) -> list:
    """[(image, the other's, likeness)] of two results of `of_folder` or `of_benchmark`, in their order."""
    (first, of_first), (second, of_second) = (
        thumbnails(*side, threads, what) for side, what in ((images, "images to train on"), (against, "the benchmark"))
    )
    found = sorted((int(of_first[i]), int(of_second[j]), x) for i, j, x in likeness.pairs(first, second))
    return [(images[0][i], against[0][j], x) for i, j, x in found]


def main():
    arguments = parsed("overlap")
    out = Path(arguments.out)
    try:
        images = of_folder(arguments.images, arguments.column)
        tables = arguments.against.lower().endswith(".tsv")
        against = of_benchmark(arguments.against) if tables else of_folder([arguments.against])
        found = find(images, against, processors.threads())
        names = dict.fromkeys(image for image, _, _ in found)
        write_whole(out, "".join(f"{name}\n" for name in names))
        pairs = out.with_name(f"{out.stem}.pairs.tsv")
        write_whole(pairs, "".join(f"{image}\t{other}\t{x:.3f}\n" for image, other, x in found))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    others = len({other for _, other, _ in found})
    print(
        f"{len(names):,} of {len(images[0]):,} images show the same as {others:,} of {len(against[0]):,} of "
        f"{arguments.against}: {out}, pairs in {pairs}" + (f"; set data.exclude={out}" if names else "")
    )


if __name__ == "__main__":
    main()
