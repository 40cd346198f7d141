"""samples.jsonl and its pictures."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sslr1 import model, ops, puzzles
from sslr1.runs.records import JsonLines
from sslr1.runs.samples import MOST_PIXELS, MOST_WIDTH, Samples, write_strip


def crops(path, sizes):
    """The pictures of a strip, uint8 [H, W, 3] each."""
    strip, left, out = np.asarray(Image.open(path).convert("RGB")), 0, []
    for height, width in sizes:
        out.append(strip[:height, left : left + width])
        left += width
    assert strip.shape[1] == left
    return out


def far(a, b):
    """Mean difference of two pictures in grey levels."""
    return np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean()


@pytest.mark.parametrize("composed", [False, True])
def test_a_record_holds_the_puzzle_that_the_model_was_given(tmp_path, tiny, photographs, composed, seed):
    spec = ops.PatchSpec(max_pixels=200_000)
    names = ["rotation", "similarity", "ordering", "correspondence"]
    batch = puzzles.make(photographs, names, level=2, seed=seed, spec=spec, composed=composed)
    prompts = model.prompts(batch, model.load_tokenizer(tiny), first_id=5)
    texts = ["\\boxed{A} \u2028", "", "\\boxed{1}"]
    groups = [SimpleNamespace(samples=[SimpleNamespace(text=t, tokens=t.split(), finish="stop") for t in texts])] * 4
    scores = [[puzzles.score(a, t) for t in texts] for a in batch.answers]
    advantages = torch.arange(12.0).view(4, 3)
    samples = Samples(tmp_path)
    for step in (1, 2, 3):
        samples.write(step, batch, prompts[:3], groups, scores, advantages)
    lines = JsonLines(tmp_path / "samples.jsonl").read()
    assert [(r["step"], r["puzzle"], r["slot"]) for r in lines] == [
        (s, names[i], 5 + i) for s in (1, 2, 3) for i in range(3)
    ]
    for i, (line, canvases) in enumerate(zip(lines[:3], batch.render())):
        assert line["question"] == batch.questions[i] and line["answer"] == batch.answers[i].to_dict()
        shown = crops(tmp_path / line["picture"], line["sizes"])
        assert len(shown) == len(canvases) == line["question"].count("<image>")
        for picture, canvas in zip(shown, canvases):
            whole = Image.fromarray(canvas.numpy()).resize(picture.shape[1::-1], Image.Resampling.LANCZOS)
            assert far(picture, whole) < 8
        assert [c["advantage"] for c in line["completions"]] == advantages[i].tolist()
        assert [c["text"] for c in line["completions"]] == texts
        assert [c["reward"] for c in line["completions"]] == [s.reward for s in scores[i]]
    samples.cut(1)
    assert JsonLines(tmp_path / "samples.jsonl").read() == lines[:3]
    assert sorted(p.name for p in samples.pictures.iterdir()) == [f"step-000001-slot-{j}.webp" for j in (5, 6, 7)]


def test_pictures_are_reduced_as_little_as_bounds_allow(tmp_path, draw, photographs):
    path = tmp_path / "strip.webp"
    for sizes in ([(112, 112)], [(700, 900), (301, 77)], [(28, 17_000)], [(600, 600)] * 9):
        smooth = np.asarray(Image.fromarray(photographs[0].numpy()))
        canvases = [torch.from_numpy(np.array(Image.fromarray(smooth).resize((w, h)))) for h, w in sizes]
        found = write_strip(path, canvases)
        scale = found[0][1] / sizes[0][1]
        area, width = sum(h * w for h, w in found), sum(w for _, w in found)
        assert area <= MOST_PIXELS and width <= MOST_WIDTH
        assert scale == 1 or area > 0.97 * MOST_PIXELS or width > 0.97 * MOST_WIDTH
        for picture, canvas in zip(crops(path, found), canvases):
            whole = Image.fromarray(canvas.numpy()).resize(picture.shape[1::-1], Image.Resampling.LANCZOS)
            assert far(picture, whole) < 8
