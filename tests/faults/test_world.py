"""A run goes on at another world size: with the same puzzles, and from the same samples with the same step."""

import json

import pytest
from safetensors.torch import load_file

from sslr1 import model
from sslr1.config.inputs import Lora
from sslr1.runs import checkpoint
from tests.faults.runs import check_whole, command, finish, records
from tests.forks import launch
from tests.learner.test_learner import make_groups, make_learner


@pytest.mark.parametrize("rank", [0, 4], ids=["whole", "adapters"])
def test_recorded_samples_give_the_same_step(tmp_path, tiny, photographs, seed, one_process, rank):
    """Loss and gradient norm of the first step from a checkpoint, in float32, on one rank and on two."""
    learner, weights = make_learner(tiny, one_process, lora=Lora(rank=rank, vision="all-linear") if rank else None)
    for again in range(3):
        learner.step(*make_groups(tiny, photographs, seed + again))
    options = dict(sampler=weights.model, tokenizer=model.load_tokenizer(tiny), source=tiny, world=one_process)
    path = checkpoint.save(tmp_path, 3, learner=learner, trainer={}, **options)
    found = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.safetensors"
        launch("tests.faults.share", out, seed + 9, tiny, path, rank, ranks=ranks)
        found.append(load_file(out)["numbers"].tolist())
    assert found[0][1] > 0 and found[0][3] == pytest.approx(1e-3, rel=0.1)  # the schedule's place is kept too
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def asked(run):
    """{(step, slot): (puzzle, answer)} of the samples that were written down."""
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_bytes().split(b"\n") if line]
    return {(row["step"], row["slot"]): (row["puzzle"], json.dumps(row["answer"])) for row in rows}


@pytest.mark.slow
def test_two_ranks_then_one_then_two_go_through_the_same_puzzles(tmp_path, unbroken, warm, scenes):
    """Rank 0 writes down its own slots: all four on one rank, every other one on two."""
    whole, run = asked(unbroken), tmp_path / "run"
    for ranks, steps in ((2, 2), (1, 4), (2, 6)):
        out, _ = finish(command(tmp_path, warm, scenes, f"train.steps={steps}", ranks=ranks))
        if steps > 2:
            assert f"ranks {3 - ranks} → {ranks}" in out
    mixed = asked(run)
    assert set(mixed) == {key for key in whole if key[0] in (3, 4) or key[1] % 2 == 0}
    assert all(mixed[key] == whole[key] for key in mixed)
    assert [int(row["step"]) for row in records(run)] == list(range(7)) and check_whole(run)
    for key in ("reward", "grad_norm", "entropy"):
        pairs = [(float(a[key]), float(b[key])) for a, b in zip(records(run)[1:2], records(unbroken)[1:2])]
        assert all(b == pytest.approx(a, rel=1e-3, abs=1e-4) for a, b in pairs), (key, pairs)
