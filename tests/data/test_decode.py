"""Files of all kinds, whole and spoilt: both decoders see the same pixels the same way up, and refuse the same files."""

import resource
import sys

import numpy as np
import pytest
import torch

from sslr1.data import Decoder, headers
from sslr1.data.decode import why
from sslr1.data.scenes import scene
from sslr1.errors import UserError
from tests.data import kinds

HAS_DALI = Decoder().backend == "dali"
DECODERS = [
    "pillow",
    pytest.param("dali", marks=pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")),
]


@pytest.fixture(scope="module")
def array():
    return np.ascontiguousarray(scene(7, 160)[:112])


@pytest.mark.parametrize("backend", DECODERS)
def test_every_kind_of_image_is_seen_as_it_is(array, backend):
    """Upright, in its colours, the first picture of several. Both decoders within a mean of 6 levels of what was encoded (12
    where a palette is fitted); of each other they don't differ at all."""
    files = kinds.good(array)
    images = Decoder(backend, 2).decode([file for file, _, _ in files.values()])
    pillow = Decoder("pillow").decode([file for file, _, _ in files.values()])
    for (name, (_, seen, tolerance)), image, other in zip(files.items(), images, pillow):
        assert image is not None, name
        assert torch.equal(image, other), name
        if seen is None:
            assert image.shape == (8, 30000, 3)
            continue
        assert image.shape == seen.shape and image.dtype == torch.uint8, name
        assert np.abs(image.numpy().astype(int) - seen).mean() <= tolerance, name


@pytest.mark.parametrize("backend", DECODERS)
def test_reduced_images_agree_within_a_level(array, backend):
    """Resampling rounds differently: at most 3 levels anywhere, under half of one on average. Turned images are reduced as
    upright ones."""
    large = np.ascontiguousarray(array.repeat(2, 0).repeat(2, 1))
    files = [kinds.encoded(kinds.turned(large, o), "PNG", exif=kinds.exif(o)) for o in (1, 6)]
    files += [kinds.encoded(kinds.turned(large, o), quality=95, exif=kinds.exif(o)) for o in (1, 6, 7)]
    for image, other in zip(
        Decoder(backend, max_side=150).decode(files), Decoder("pillow", max_side=150).decode(files)
    ):
        assert image.shape == other.shape == (105, 150, 3)
        gap = (image.int() - other.int()).abs().float()
        assert gap.max() <= 3 and gap.mean() < 0.5


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("backend", DECODERS)
def test_bad_files_are_refused_with_a_reason(array, backend):
    files = kinds.bad(array)
    for (name, (file, words)), image in zip(files.items(), Decoder(backend).decode([f for f, _ in files.values()])):
        assert image is None, name
        assert words in why(file) and "\n" not in why(file) and len(why(file)) < 200, (name, why(file))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged headers
@pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
def test_decoders_agree_on_mutated_files(array, draw):
    """Which of them are bad, and every pixel of the others."""
    sources = kinds.good(array)
    names = ["JPEG", "JPEG, progressive", "JPEG, CMYK", "JPEG to be turned, 6", "PNG", "WebP", "GIF", "BMP", "TIFF"]
    files = [kinds.mutated(sources[name][0], draw) for name in names * 4 + names[:4] * 26]
    dali, pillow = (Decoder(backend).decode(files) for backend in ("dali", "pillow"))
    for file, a, b in zip(files, dali, pillow):
        assert (a is None) == (b is None), why(file)
        assert a is None or torch.equal(a, b)
    assert 10 < sum(image is None for image in dali) < len(files) - 10


def test_ordinary_files_are_dalis(array):
    """Were they not, all of the above would compare Pillow with itself."""
    sources = kinds.good(array)
    ordinary = [
        "JPEG",
        "JPEG, progressive",
        "JPEG, grey",
        "PNG",
        "PNG, palette",
        *[f"JPEG to be turned, {o}" for o in range(1, 9)],
    ]
    assert all(headers.read(sources[name][0]) for name in ordinary)
    special = ["JPEG, CMYK", "PNG, 16-bit grey", "PNG to be turned, 6", "WebP", "GIF"]
    assert not any(headers.read(sources[name][0]) for name in special)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("backend", DECODERS)
def test_bombs_take_no_memory(backend):
    """They would take 0.3 to 2.7 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (
        Decoder(backend).decode([kinds.bomb(k, side) for k in ("JPEG", "PNG") for side in (10000, 30000)]) == [None] * 4
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150 << 10


def test_a_decoder_that_is_not_there_is_refused_in_words(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert Decoder().backend == "pillow"
    with pytest.raises(UserError, match=r"data\.decoder is dali, which is not installed"):
        Decoder("dali")
