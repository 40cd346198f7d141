"""What a batch's pictures are made from: each image once, no larger than shown; and patches as the bytes they show."""

import pytest
import torch

from sslr1 import ops, puzzles


def test_reduced_images_give_the_same_canvases(seed):
    """Of images several times as large as what is shown of them, to the last bit."""
    images = list(torch.randint(0, 256, (6, 1501, 1203, 3), dtype=torch.uint8))
    spec = ops.PatchSpec(max_pixels=168 * 168)
    names = ["rotation", "similarity", "inpainting", "ordering", "correspondence", "similarity"]
    batch = puzzles.make(images, names, level=2, spec=spec, seed=seed)
    assert (
        len(batch.images)
        == len({id(x) for puzzle in batch for x in puzzle.images})
        < sum(len(puzzle.images) for puzzle in batch)
    )
    less, plan = batch.plan.reduced(batch.images)
    assert sum(x.nbytes for x in less) < 0.3 * sum(x.nbytes for x in batch.images)
    full = batch.render_patches()[0]
    assert torch.equal(ops.render_patches(less, plan, spec)[0], full)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [ops.PatchSpec(), ops.PatchSpec(patch=16, mean=(0.5,) * 3, std=(0.5,) * 3)])
def test_patches_travel_as_bytes(seed, dtype, spec):
    images = torch.randint(0, 256, (2, 200, 200, 3), dtype=torch.uint8)
    patches = puzzles.make(images, "ordering", level=2, spec=spec).render_patches()[0].to(dtype)
    shown = ops.patch_bytes(patches, spec)
    assert shown.dtype == torch.uint8 and shown.numel() * spec.temporal == patches.numel()
    assert torch.equal(ops.patches_of(shown, spec, dtype), patches)
    with pytest.raises(ValueError, match="none of this PatchSpec's"):
        ops.patch_bytes(patches + 1e-2, spec)


def test_what_has_been_decoded_on_the_device_is_not_copied_there(seed, monkeypatch):
    from sslr1.puzzles import puzzle
    from sslr1.puzzles.picture import Picture

    images, rendered = torch.randint(0, 256, (5, 300, 400, 3), dtype=torch.uint8), []
    pictures = [Picture(image, image.to("meta")) for image in images[:4]] + [Picture(images[4])]
    batch = puzzles.make(pictures, ["rotation", "ordering", "similarity", "rotation", "inpainting"], seed=seed)
    monkeypatch.setattr(puzzle, "render_patches", lambda images, *_: rendered.extend(images))
    before = ops.transfer.total()
    batch.render_patches(device="meta")
    assert len(rendered) == 5 and all(image.is_meta for image in rendered)
    assert 0 < ops.transfer.total() - before < 2 * images[4].nbytes  # the last one's, aligned
