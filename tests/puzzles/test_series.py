"""A series: puzzles by number, whichever images are missing."""

import pytest
import torch

from sslr1.data.scenes import scene
from sslr1.errors import UserError
from sslr1.ops import PatchSpec
from sslr1.puzzles import Form
from sslr1.puzzles.series import SUBSTITUTES, Series

COUNT, USABLE = 120, 7


def series(images):
    form = Form(spec=PatchSpec(max_pixels=112 * 112), thinking=False)
    return Series(images.get, range(COUNT), [("rotation", 2)], form=form, pool=[], seed=2)


def test_one_usable_image_in_many_is_found():
    images = {USABLE: torch.from_numpy(scene(USABLE))}
    addresses = [series(images)[q].address for q in range(12)]
    assert {address.index for address in addresses} == {USABLE} and len(set(addresses)) == 12
    assert max(address.attempt % SUBSTITUTES for address in addresses) > 50  # of one puzzle
    assert [series(images)[q].address for q in reversed(range(12))] == addresses[::-1]


def test_no_usable_image_is_an_error():
    with pytest.raises(UserError, match=f"no image can decide a rotation puzzle of level 2 after {SUBSTITUTES} tries"):
        series({})[0]
