"""Files of all kinds, whole and spoilt: all decoders see the same pixels the same way up, and refuse the same files."""

import io
import resource
import sys

import numpy as np
import pytest
import torch
from PIL import Image, features

from sslr1.data import Decoder, decode, headers, pixels
from sslr1.data.decode import _Dali, _pillow, _turbo, formats, why
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
    """Upright, in its colours, the first picture of several. Both decoders within a mean of 6 levels of what was
    encoded (12 where a palette is fitted); of each other they don't differ at all."""
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
def test_transparent_pixels_are_white(array, backend):
    """Whatever colours are hidden there, in every format and depth that has transparency; as Qwen's own utilities show
    them."""
    files = kinds.see_through(array)
    for (name, (_, seen)), image in zip(files.items(), Decoder(backend).decode([file for file, _ in files.values()])):
        assert image is not None, name
        gap = np.abs(image.numpy().astype(int) - seen)
        assert gap.max() <= (12 if name == "AVIF" else 0), (name, gap.max())
    faint = Image.fromarray(np.dstack([array, array[..., 0]]))
    ground = Image.new("RGB", faint.size, (255, 255, 255))
    ground.paste(faint, mask=faint.split()[3])  # qwen_vl_utils 0.0.14, to_rgb
    (image,) = Decoder(backend).decode([kinds.encoded(faint, "PNG")])
    assert np.array_equal(image.numpy(), np.asarray(ground))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged EXIF data
@pytest.mark.parametrize("backend", DECODERS)
def test_exif_data_in_any_state_turns_alike_and_refuses_nothing(array, backend):
    """In every format, by every decoder, and of an image that somebody else has opened."""
    for name, (exif, orientation) in kinds.exif_data().items():
        assert pixels.orientation(exif) == orientation, name
        stored = kinds.turned(array, orientation)
        for kind in ("JPEG", "PNG", "WEBP"):
            options = (
                {"lossless": True} if kind == "WEBP" else {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
            )
            file = kinds.encoded(stored, kind, exif=exif, **options)
            (image,) = Decoder(backend).decode([file])
            assert image is not None and image.shape == array.shape, (name, kind)
            assert np.abs(image.numpy().astype(int) - array).mean() < 5, (name, kind)
            with Image.open(io.BytesIO(file)) as opened:
                assert np.array_equal(pixels.shown(opened), image.numpy()), (name, kind)


def test_what_xmp_says_counts_where_exif_says_nothing(array):
    for xmp in (
        b'<x tiff:Orientation="6"/>',
        b"<tiff:Orientation>6</tiff:Orientation>",
        b"<x tiff:Orientation = '6'/>",
    ):
        file = kinds.encoded(array, xmp=xmp)
        assert headers.read(file).orientation == headers.orientation(file) == 6
        for kind in ("WEBP", "JPEG"):
            (image,) = Decoder().decode([kinds.encoded(kinds.turned(array, 6), kind, xmp=xmp)])
            assert image.shape == array.shape
        assert headers.orientation(kinds.encoded(array, xmp=xmp, exif=kinds.exif(3))) == 3
    assert pixels.orientation(b"", b'tiff:Orientation="9"') == 1


def test_a_jpeg_that_only_pillow_reads_is_turned_by_the_same_reader(array):
    file = kinds.encoded(kinds.turned(array, 6), quality=95, exif=kinds.exif(6))
    padded = file[:2] + b"\xff" * 5 + file[2:]
    odd = file.replace(b"\xff\xc0", b"\xff\xfe\0\4hi\xff\xc0", 1)[:-2] + b"\xff\xfe\0\4hi\xff\xd9"
    cmyk = kinds.encoded(Image.fromarray(kinds.turned(array, 6)).convert("CMYK"), quality=95, exif=kinds.exif(6))
    for data in (file, padded, odd, cmyk):
        (image,) = Decoder().decode([data])
        assert image.shape == array.shape and np.abs(image.numpy().astype(int) - array).mean() < 8
        one, orientation = _pillow(data, None)
        assert orientation == 6 and np.array_equal(pixels.upright(one.numpy(), 6), image.numpy())
    assert headers.read(cmyk) is None and headers.read(padded)


@pytest.mark.parametrize("backend", DECODERS)
def test_reduced_images_agree_within_a_level(array, backend):
    """Resampling rounds differently: at most 3 levels anywhere, under half of one on average. Turned images are reduced
    as upright ones."""
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
        if a is not None and headers.read(file):  # not only by Pillow
            stored, orientation = _pillow(file, None)
            assert np.array_equal(pixels.upright(stored.numpy(), orientation), a.numpy())
    assert 10 < sum(image is None for image in dali) < len(files) - 10


def test_ordinary_files_go_the_fast_ways(array):
    """Were they not, all of the above would compare Pillow with itself."""
    sources = kinds.good(array)
    turned = [f"JPEG to be turned, {o}" for o in range(1, 9)]
    for name in ("JPEG", "JPEG, progressive", "JPEG, grey", *turned):
        file = sources[name][0]
        assert _turbo(file, headers.read(file)) is not None, name
    for name in ("PNG", "PNG, palette", "PNG, grey"):
        file = sources[name][0]
        assert headers.read(file), name
        assert not HAS_DALI or _Dali().decode(file, headers.read(file)) is not None, name
    special = [
        "JPEG, CMYK",
        "PNG, 16-bit grey",
        "PNG to be turned, 6",
        "PNG, alpha",
        "PNG, grey with alpha",
        "WebP",
        "GIF",
    ]
    assert not any(headers.read(sources[name][0]) for name in special)
    assert not any(headers.read(file) for file, _ in kinds.see_through(array).values())


@pytest.mark.parametrize(
    "brand, words", [(b"heic", "HEIC, not an image of a format that is read"), (b"isom", "not an image")]
)
def test_a_phones_file_under_another_name_is_named(brand, words):
    assert why(b"\0\0\0\x18ftyp" + brand + bytes(600)).startswith(words)


def test_avif_is_read_where_pillow_reads_it(array, monkeypatch):
    if "AVIF" not in formats():
        pytest.skip("this Pillow was built without AVIF")
    file = kinds.encoded(kinds.turned(array, 6), "AVIF", quality=90, exif=kinds.exif(6))
    (image,) = Decoder().decode([file])
    assert np.abs(image.numpy().astype(int) - array).mean() < 6
    monkeypatch.setattr(features, "check", lambda name: name != "avif")
    formats.cache_clear()
    try:
        assert "AVIF" not in formats() and Decoder().decode([file]) == [None]
        assert why(file).startswith("AVIF, not an image of a format that is read (JPEG, ")
    finally:
        formats.cache_clear()


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
    monkeypatch.setattr(decode, "_has_dali", lambda: True)
    with pytest.raises(UserError, match=r"DALI is installed, but does not import .*: set data\.decoder=pillow"):
        Decoder(max_side=8).decode([kinds.encoded(np.zeros((64, 64, 3), np.uint8))])
