"""Batches decoded on a GPU: the search for files that fail, with a stand-in decoder; the rest with DALI's own decoder
on the CPU in the GPU's place, in the same pipeline."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from sslr1.data import Decoder, ImageFolder, ImageStore, decode, headers, mixed
from sslr1.data.scenes import scene
from sslr1.errors import UserError
from sslr1.puzzles.picture import Picture
from tests.data import kinds

CPU = torch.device("cpu")
HAS_DALI = Decoder().backend == "dali"
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")


@pytest.fixture(scope="module")
def array():
    return np.ascontiguousarray(scene(7, 160)[:112])


class Frame:
    def __init__(self, pixels):
        self.pixels = pixels

    def shape(self):
        return list(self.pixels.shape)


class Pipeline:
    """A decoder that fails at the files in `fails`, and is unusable then. `made`, `runs`: all of them so far."""

    made, runs = 0, 0

    def __init__(self, fails):
        self.fails, self.dead = fails, False
        Pipeline.made += 1

    def feed_input(self, name, files):
        self.files = [bytes(file) for file in files]

    def run(self):
        Pipeline.runs += 1
        assert not self.dead and len(self.files) <= mixed.BATCH
        if self.fails & {*self.files}:
            self.dead = True
            raise RuntimeError("Error in MIXED operator\n  it was there")
        return ([Frame(torch.from_numpy(np.array(Image.open(io.BytesIO(file))))) for file in self.files],)


@pytest.fixture
def stand_in(monkeypatch):
    """stand_in(fails, sound): a Mixed on such a decoder."""
    monkeypatch.setattr(mixed, "_copy", lambda frame, image: image.copy_(frame.pixels))
    monkeypatch.setattr(Pipeline, "made", 0)
    monkeypatch.setattr(Pipeline, "runs", 0)

    def make(fails, sound=lambda data, header: True):
        return mixed.Mixed(CPU, 1, sound, lambda *_: Pipeline(fails))

    return make


@pytest.fixture(scope="module")
def files():
    """100 that differ."""
    return [kinds.encoded(np.full((16, 16 + n, 3), n, np.uint8)) for n in range(100)]


def decoded(decoder, files):
    return decoder.decode(files, [headers.read(file) for file in files])


def assert_right(images, files, fails):
    for n, (image, file) in enumerate(zip(images, files, strict=True)):
        assert (image is None) == (file in fails), n
        assert image is None or (image.shape[1] == 16 + n and abs(int(image.float().mean()) - n) <= 1)


def test_whole_batches(stand_in, files):
    assert_right(decoded(stand_in(set()), files), files, {})
    assert (Pipeline.made, Pipeline.runs) == (1, 2)
    assert decoded(stand_in(set()), []) == []


@pytest.mark.parametrize("count", [1, 2, 5])
def test_files_at_which_only_this_decoder_fails_are_searched_for(stand_in, files, draw, count):
    """Each costs a pipeline for every halving; those beside it keep their places."""
    some = files[: mixed.BATCH]
    fails = {some[n] for n in draw.choice(len(some), count, replace=False)}
    decoder = stand_in(fails)
    assert_right(decoded(decoder, some), some, fails)
    depth = math.ceil(math.log2(len(some)))
    assert Pipeline.made <= 1 + count * (1 + depth) and Pipeline.runs <= 1 + 2 * count * (1 + depth)
    before = Pipeline.made
    assert_right(decoded(decoder, some[:1]), some[:1], fails)
    assert Pipeline.made <= before + 1


def test_damaged_files_cost_a_batch_one_pipeline(stand_in, files, draw):
    fails = {files[n] for n in draw.choice(len(files), 9, replace=False)}
    decoder = stand_in(fails, lambda data, header: data not in fails)
    assert_right(decoded(decoder, files), files, fails)
    assert Pipeline.made <= 3 and Pipeline.runs <= 4  # of two batches
    assert decoded(decoder, [*fails]) == [None] * 9


def test_a_decoder_that_always_fails_is_no_file_of_its_own(stand_in, files):
    with pytest.raises(UserError, match=r"fails at each of 8 files .*Error in MIXED operator it was there.*=dali"):
        decoded(stand_in({*files}), files[:8])


def test_batches_are_bounded(monkeypatch):
    sizes = [headers.Header(True, 10, 10)] * 130
    assert [len(batch) for batch in mixed._batches(sizes)] == [64, 64, 2] and not [*mixed._batches([])]
    monkeypatch.setattr(mixed, "BATCH_PIXELS", 250)
    assert [*mixed._batches([*sizes[:5], headers.Header(True, 50, 5)])] == [[0, 1], [2, 3], [4], [5]]


@pytest.fixture
def decoder():
    """dali_gpu's, on the CPU."""

    def make(**options):
        made = Decoder("dali", **options)
        made._mixed = mixed.Mixed(CPU, 1, decode._sound)
        return made

    return make


def host(image):
    return image.host if isinstance(image, mixed.Decoded) else image


@needs_dali
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_every_kind_of_file_is_what_other_decoders_make_of_it(array, decoder):
    """With DALI's CPU decoder in the GPU's place even in every pixel: in order, upright; bad files among them."""
    good = [file for file, *_ in kinds.good(array).values()]
    turned = [kinds.encoded(kinds.turned(array, o), quality=95, exif=kinds.exif(o)) for o in range(1, 9)]
    bad = [file for file, _ in kinds.bad(array).values()]
    cut = turned[0][: len(turned[0]) // 2]  # a good header before a damaged body
    files = [x for some in zip(good, [*turned, *bad, cut] * 4, strict=False) for x in some] + [cut, *turned]
    found, other = decoder().decode(files), Decoder("dali").decode(files)
    assert all((a is None) == (b is None) and (a is None or torch.equal(host(a), b)) for a, b in zip(found, other))
    there = [image for image in found if isinstance(image, mixed.Decoded)]
    assert len(there) > 16 and all(torch.equal(*pair) and pair.device.is_contiguous() for pair in there)
    assert None in found and any(isinstance(image, torch.Tensor) for image in found)


@needs_dali
def test_images_are_reduced_where_they_are_decoded(array, decoder):
    """By torch, within a few levels of Pillow; what is near the wanted size is left as it is."""
    large = np.ascontiguousarray(array.repeat(2, 0).repeat(2, 1))
    files = [kinds.encoded(kinds.turned(large, o), quality=95, exif=kinds.exif(o)) for o in (1, 6)]
    files.append(kinds.encoded(array, quality=95))
    found, other = decoder(max_side=150).decode(files), Decoder("pillow", max_side=150).decode(files)
    for pair, theirs in zip(found, other):
        assert isinstance(pair, mixed.Decoded) and pair.host.shape == theirs.shape
        gap = (pair.host.int() - theirs.int()).abs().float()
        assert gap.max() <= 3 and gap.mean() < 0.5
    assert found[0].host.shape == (105, 150, 3) and torch.equal(found[2].host, other[2])


@needs_dali
def test_pictures_keep_both(scenes, decoder):
    """A store's, and pieces of long ones; files that go another way have one on the CPU only."""
    store = ImageStore(ImageFolder.scan(scenes), decoder(), min_side=112)
    for picture in store.pictures([3, 4, 3]):
        assert torch.equal(picture.pixels, picture.on_device)
    plain = ImageStore(ImageFolder.scan(scenes), Decoder(), min_side=112)
    assert plain.pictures([3])[0].on_device is None
    long = torch.randint(0, 256, (20, 200, 3), dtype=torch.uint8)
    piece = Picture(long, long.clone()).piece(np.random.default_rng(0))
    assert piece.pixels.shape == (20, 60, 3) and torch.equal(piece.pixels, piece.on_device)
    assert Picture(long).piece(np.random.default_rng(0)).on_device is None


def test_it_is_refused_without_a_gpu():
    words = "which is not installed" if not HAS_DALI else "without a GPU: set data.decoder=auto"
    for device in (None, CPU):
        with pytest.raises(UserError, match=f"data.decoder is dali_gpu, .*{words}"):
            Decoder("dali_gpu", device=device)


def test_a_run_keeps_to_it(tmp_path):
    """Puzzles are drawn from what is decoded."""
    from sslr1 import config  # which a GPU machine may lack pydantic for

    def settings(name):
        return config.check({"model": {"path": "m"}, "data": {"path": "d", "decoder": name}})

    for before, after in (("dali", "dali_gpu"), ("dali_gpu", "dali"), ("auto", "dali_gpu"), ("dali_gpu", "pillow")):
        started = tmp_path / "config.yaml"
        started.write_text(config.dump(settings(before)))
        with pytest.raises(config.ConfigError, match=f"data.decoder: {before} → {after}"):
            config.check_unchanged(started, settings(after))
        config.check_unchanged(started, settings(before))


@pytest.mark.gpu
@needs_dali
def test_on_a_gpu(array):
    """Orientation, order, bad files, and pixels near those of libjpeg-turbo; nothing of it takes the process down."""
    device = torch.device("cuda", 0)
    turned = [kinds.encoded(kinds.turned(array, o), quality=95, exif=kinds.exif(o)) for o in range(1, 9)]
    cut = turned[0][: len(turned[0]) // 2]
    files = [*turned[:3], cut, *turned[3:], *(file for file, _ in kinds.bad(array).values())]
    found, other = Decoder("dali_gpu", 2, device=device).decode(files), Decoder("dali").decode(files)
    for pair, theirs in zip(found, other):
        assert (pair is None) == (theirs is None)
        if isinstance(pair, mixed.Decoded):
            assert pair.device.device == device and torch.equal(pair.device.cpu(), pair.host)
            gap = (pair.host.int() - theirs.int()).abs().float()
            assert pair.host.shape == theirs.shape and gap.mean() < 2
    assert sum(isinstance(pair, mixed.Decoded) for pair in found) >= 8
    reduced = Decoder("dali_gpu", 2, max_side=80, device=device).decode(turned)
    assert all(max(pair.device.shape) == 80 and pair.device.is_cuda for pair in reduced)
