"""`rollout.resample`: groups that all earned the same draw another puzzle of their slot, whatever the ranks."""

import zlib
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from sslr1 import config, model, train
from sslr1.data import Decoder, ImageFolder, ImageStore, PuzzleStream
from sslr1.model import Group
from sslr1.ops import PatchSpec
from sslr1.puzzles import Form

B, G, STEP = 12, 4, 3


def start(tiny, scenes, rounds, rank=0, size=1):
    """A rank's run whose engine is scripted, its first batch, and the list of what the engine was asked.

    A picture's checksum decides what its group earns: a third all 0, a third all 1, a third of each some."""
    folder = ImageFolder.scan(scenes)
    stream = PuzzleStream(
        ImageStore(folder, Decoder(), min_side=112),
        list(range(len(folder))),
        model.load_tokenizer(tiny),
        mixture={"rotation": 0.5, "ordering": 0.5},
        levels=lambda step, slot, name: 1,
        batch=B,
        seed=5,
        form=Form(spec=PatchSpec(max_pixels=112 * 112), thinking=False, wordings=1),
        rank=rank,
        world_size=size,
    )
    asked = []

    def generate(prompts, step, attempt, **_):
        assert step == STEP
        asked.append((attempt, [p.id for p in prompts]))
        kinds = [zlib.crc32(p.pixel_values.numpy().tobytes()) % 3 for p in prompts]
        return [Group(p, [sample(k if k < 2 else i % 2) for i in range(G)]) for p, k in zip(prompts, kinds)]

    session = SimpleNamespace(
        engine=SimpleNamespace(generate=generate),
        config=config.check({"model": {"path": "m"}, "data": {"path": "d"}, "rollout": {"resample": rounds}}),
        score=lambda answer, text: SimpleNamespace(reward=float(text)),
    )
    batch = stream.build(STEP)
    drawn = train.roll_out(session, batch, nullcontext)
    trained = train.resample(session, stream, batch, drawn, nullcontext)
    stream.close()
    return batch, drawn, trained, asked


def sample(earns):
    return SimpleNamespace(text=str(earns), finish="stop")


def content(out):
    """{slot: (its puzzle's patches and words, rewards)}"""
    return {
        g.prompt.id: (g.prompt.pixel_values.numpy().tobytes(), g.prompt.input_ids.tolist(), rewards.tolist())
        for g, rewards in zip(out.groups, out.rewards)
    }


def flat(out):
    return {g.prompt.id for g, row in zip(out.groups, out.rewards.tolist()) if len(set(row)) == 1}


@pytest.fixture(scope="module")
def three_rounds(tiny, scenes):
    return start(tiny, scenes, 3)


def test_what_teaches_nothing_draws_another_puzzle(three_rounds):
    batch, drawn, trained, asked = three_rounds
    before, after = content(drawn), content(trained)
    stuck, left = flat(drawn), flat(trained)
    assert stuck and left < stuck and trained.resampled == len(stuck - left)
    assert all(after[j] == before[j] for j in before if j in left or j not in stuck)  # nobody else moves
    assert all(after[j][0] != before[j][0] for j in stuck - left)
    assert [attempt for attempt, _ in asked] == list(range(len(asked))) and len(asked) <= 4
    assert asked[1][1] == sorted(stuck) and all(set(b[1]) <= set(a[1]) for a, b in pairwise(asked))
    assert [len(row) for row in trained.scores] == [G] * B
    assert torch.equal(trained.rewards, torch.tensor([[s.reward for s in row] for row in trained.scores]))
    other = [slot for slot in batch.slots if slot.first != slot.name]  # the mixture is kept where images allow it:
    assert len(other) <= 1 and all(
        slot.first == "ordering" for slot in other
    )  # not every scene's tiles can be told apart


def test_it_is_the_same_again_and_whatever_the_ranks(three_rounds, tiny, scenes):
    whole = content(three_rounds[2])
    parts = [start(tiny, scenes, 3, rank, 2)[2] for rank in (0, 1)]
    assert {**content(parts[0]), **content(parts[1])} == whole
    assert sum(part.resampled for part in parts) == three_rounds[2].resampled


def test_one_round_is_the_first_of_three_and_none_changes_nothing(three_rounds, tiny, scenes):
    once, three = content(start(tiny, scenes, 1)[2]), three_rounds
    second = three[3][2][1] if len(three[3]) > 2 else []
    assert all(once[j] == content(three[2])[j] for j in once if j not in second)
    _, drawn, trained, asked = start(tiny, scenes, 0)
    assert content(trained) == content(drawn) == content(three[1]) and trained.resampled == 0
    assert [attempt for attempt, _ in asked] == [0]
