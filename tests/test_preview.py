"""The contact sheets."""

from PIL import Image

from sslr1 import puzzles
from tests.forks import launch


def test_a_sheet_a_puzzle_and_a_page(photographs, tmp_path):
    from sslr1.data.scenes import write_scenes

    folder = write_scenes(tmp_path / "images", 16, 288)
    for i, image in enumerate(photographs):
        Image.fromarray(image.numpy()).save(folder / f"photograph{i}.png")
    out = tmp_path / "out"
    launch("sslr1", "preview", folder, "--out", out, "--level", 1, 2, "--count", 1, "--html")
    assert {path.stem for path in out.glob("*.png")} == set(puzzles.NAMES)
    for path in out.glob("*.png"):
        with Image.open(path) as sheet:
            assert sheet.width == 1200 and sheet.height > 300 and len(sheet.getcolors(1 << 24)) > 1000
    page = (out / "index.html").read_text()
    assert (
        page.count("<figure>") == 2 * len(puzzles.NAMES)
        and "<script" not in page
        and "http" not in page.split("</style>")[1]
    )
    assert "&lt;think&gt;" in page and "<think>" not in page


def test_errors_are_one_line(tmp_path):
    done = launch("sslr1.preview", tmp_path, check=False)
    assert done.returncode == 2 and done.stderr.startswith(f"error: '{tmp_path}' holds no images"), done.stderr
    assert len(done.stderr.splitlines()) == 1
