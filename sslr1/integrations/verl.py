"""verl: `reward.custom_reward_function.path=<this file>`, `.name=compute_score`. examples/verl.sh is the whole command.

A row of its parquet file: `data_source` (`sslr1/<puzzle>`, by which verl groups its metrics), `prompt` (a conversation,
`<image>` where each goes), `images`, `ability`, `reward_model.ground_truth` and `extra_info`, which holds the puzzle's
address.
"""

from dataclasses import asdict

from sslr1.integrations import easyr1, truth

COLUMNS = {
    "data_source": "string",
    "prompt": [{"role": "string", "content": "string"}],
    "images": ["image"],
    "ability": "string",
    "reward_model": {"style": "string", "ground_truth": "string"},
    "extra_info": {
        "split": "string",
        "index": "int64",
        "id": "string",
        "chance": "float64",
        "address": {
            "puzzle": "string",
            **{name: "int64" for name in ("level", "seed", "epoch", "attempt", "index")},
        },
    },
}


def compute_score(
    data_source, solution_str=None, ground_truth=None, extra_info=None, *, rule="default", opened=None, **_
):
    """{score, acc, format}: the reward, 1.0 if the answer is exactly right, 1.0 if the form was kept; verl trains on
    `score` and logs all three. data_source and extra_info are not looked at. opened: see `truth.scored`; verl passes it
    from reward.custom_reward_function.reward_kwargs. Called with one list, as EasyR1 does, it answers as EasyR1 wants.
    """
    if isinstance(data_source, list):
        return easyr1.compute_score(data_source, rule, opened)
    found = truth.scored(ground_truth, solution_str, rule, opened)
    return {"score": found.reward, "acc": found.exact, "format": float(found.format_ok)}


def row(puzzle, images, number, split="train") -> dict:
    """A `Puzzle` as a row; images: whatever stands for its canvases, in order; number: of the row."""
    return {
        "data_source": f"sslr1/{puzzle.address.puzzle}",
        "prompt": [{"role": "user", "content": puzzle.question}],
        "images": images,
        "ability": "vision",
        "reward_model": {"style": "rule", "ground_truth": truth.pack(puzzle.answer, puzzle.form.thinking)},
        "extra_info": {
            "split": split,
            "index": number,
            "id": str(puzzle.address),
            "chance": puzzle.chance,
            "address": asdict(puzzle.address),
        },
    }
