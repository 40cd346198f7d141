"""Packing: positions against transformers' own, splits, and who sees whom."""

from dataclasses import replace

import pytest
import torch

from sslr1 import model, ops, puzzles
from sslr1.model import Group, Prompt, Sample
from sslr1.ops.attention import group_mask


@pytest.fixture(scope="module")
def loaded(any_tiny):
    return model.load_model(any_tiny), model.load_tokenizer(any_tiny), spec_of(any_tiny)


def spec_of(folder):
    """The folder's own, with canvases of up to 24 visual tokens."""
    spec = ops.PatchSpec.from_pretrained(folder)
    return replace(spec, max_pixels=24 * spec.unit**2)


def some_prompts(tokenizer, photographs, spec, level=1, **options):
    names = ["rotation", "ordering", "similarity", "ordering"]
    return model.prompts(puzzles.make(photographs, names, level=level, spec=spec, **options), tokenizer)


def with_samples(prompts, lengths, vocabulary=300):
    return [
        Group(p, [Sample(torch.randint(0, vocabulary, (n,)), torch.zeros(n), "", "stop") for n in row])
        for p, row in zip(prompts, lengths)
    ]


def test_positions_are_transformers_own(loaded, photographs, seed):
    network, tokenizer, spec = loaded
    pad = network.config.image_token_id
    for level in (1, 2):
        for prompt in some_prompts(tokenizer, photographs, spec, level, seed=seed):
            types = (prompt.input_ids == pad).int()[None]
            expected, delta = network.model.get_rope_index(prompt.input_ids[None], types, prompt.image_grid_thw)
            got = model.mrope_positions(prompt.input_ids, prompt.image_grid_thw, pad, 2)
            assert torch.equal(got, expected[:, 0])
            assert int(got.max()) + 1 == len(prompt.input_ids) + int(
                delta
            )  # where transformers goes on when it generates
    # two images side by side with no text between them, and one at the very start and end
    ids = torch.tensor([pad] * 4 + [pad] * 8 + [1, 2] + [pad] * 4)
    grid = torch.tensor([[1, 4, 4], [1, 4, 8], [1, 4, 4]])
    got = model.mrope_positions(ids, grid, pad, 2)
    expected = torch.cat(
        [
            network.model.get_vision_position_ids(0, grid[0], 1, 2),
            network.model.get_vision_position_ids(2, grid[1], 1, 2),
            torch.arange(6, 8).expand(3, 2),
            network.model.get_vision_position_ids(8, grid[2], 1, 2),
        ],
        1,
    )
    assert torch.equal(got, expected)


def test_positions_of_images_of_any_size(loaded, draw):
    """Between texts of any length, empty ones but for the tokens around an image included."""
    network = loaded[0]
    pad = network.config.image_token_id
    for _ in range(30):
        sizes = draw.integers(1, 30, (int(draw.integers(0, 6)), 2)).tolist()
        grid = torch.tensor([[1, 2 * h, 2 * w] for h, w in sizes], dtype=torch.int64).view(-1, 3)
        ids = [torch.randint(0, 300, (int(draw.integers(1, 9)),))]
        for h, w in sizes:
            ids += [torch.full((h * w,), pad), torch.randint(0, 300, (int(draw.integers(1, 9)),))]
        ids = torch.cat(ids)
        expected, _ = network.model.get_rope_index(ids[None], (ids == pad).int()[None], grid)
        assert torch.equal(model.mrope_positions(ids, grid, pad, 2), expected[:, 0])


def test_packed_rows(loaded, photographs, seed):
    network, tokenizer, spec = loaded
    prompts = some_prompts(tokenizer, photographs, spec)
    groups = with_samples(prompts, [[3, 1, 0], [2, 5, 4], [0, 0, 0], [1, 1, 1]])
    packed = model.pack(groups, image_token_id=network.config.image_token_id, merge=2)
    assert packed.layout.groups == [
        (len(p.input_ids), tuple(n for n in row if n))
        for p, row in zip(prompts, [[3, 1, 0], [2, 5, 4], [0, 0, 0], [1, 1, 1]])
    ]
    assert packed.tokens.tolist() == [t for g in groups for s in g.samples for t in s.tokens.tolist()]
    assert packed.sequence.tolist() == [0, 0, 0, 1, 3, 3, 4, 4, 4, 4, 4, 5, 5, 5, 5, 9, 10, 11]
    row, places = 0, iter(range(len(packed.tokens)))
    for group in groups:
        L = len(group.prompt.input_ids)
        end, top = row + L - 1, int(packed.position_ids[:, row : row + L].max())
        row += L
        for sample in group.samples:
            for t in range(len(sample.tokens)):
                place = next(places)
                assert packed.predictors[place] == (end if t == 0 else row + t - 1)
                assert packed.position_ids[:, row + t].tolist() == [top + 1 + t] * 3
                assert packed.input_ids[row + t] == sample.tokens[t]
            row += len(sample.tokens)
    assert row == len(packed.input_ids)


def test_mask_lets_completions_see_their_prompt_and_themselves():
    mask = group_mask(2, (2, 1))
    assert mask.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]


def sized(*lengths, prompt=10):
    empty = Prompt(torch.zeros(prompt, dtype=torch.int64), torch.zeros(0, 1176), torch.zeros(0, 3, dtype=torch.int64))
    return [
        Group(empty, [Sample(torch.zeros(n, dtype=torch.int64), torch.zeros(n), "", "stop") for n in row])
        for row in lengths
    ]


def test_split_covers_everything_once_and_keeps_the_budget(draw):
    for _ in range(100):
        groups = sized(*[draw.integers(0, 12, 4).tolist() for _ in range(draw.integers(1, 9))])
        budget = int(draw.integers(22, 120))
        batches = model.split(groups, budget)
        seen = [(n, s) for batch in batches for n, samples in batch for s in samples]
        assert sorted(seen) == [(n, s) for n, g in enumerate(groups) for s in range(4)]
        for batch in batches:
            assert sum(10 + sum(len(groups[n].samples[s].tokens) for s in samples) for n, samples in batch) <= budget
        count = len(batches) + int(draw.integers(0, 3))
        if count <= 4 * len(groups):
            more = model.split(groups, budget, count)
            assert len(more) == count
            assert sorted((n, s) for b in more for n, samples in b for s in samples) == sorted(seen)


def test_split_errors():
    with pytest.raises(ValueError, match="token_budget is 15"):
        model.split(sized([3, 6]), 15)
    with pytest.raises(ValueError, match="3 micro-batches"):
        model.split(sized([1, 1]), 100, 3)
