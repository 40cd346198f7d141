"""EasyR1: `worker.reward.reward_function=<this file>:compute_score`. examples/easyr1.sh is the whole command.

A row of its parquet file: `problem` (`<image>` where each image goes), `images`, `answer`; EasyR1 hands the answer to
the reward as `ground_truth`, and nothing else of the row.
"""

from sslr1.integrations import truth

REWARD_NAME = "sslr1"
REWARD_TYPE = "batch"  # EasyR1 of 2026 reads it here, earlier ones from worker.reward.reward_type
COLUMNS = {"problem": "string", "images": ["image"], **truth.COLUMNS}


def compute_score(reward_inputs, rule="default", opened=None) -> list:
    """A dict a completion: {overall, accuracy, format}: the reward, which EasyR1 trains on, 1.0 if the answer is
    exactly right, 1.0 if the form was kept. reward_inputs: dicts with `response` and `ground_truth`. opened: see
    `truth.scored`; EasyR1 passes it from worker.reward.reward_function_kwargs."""
    scores = [truth.scored(one["ground_truth"], one["response"], rule, opened) for one in reward_inputs]
    return [{"overall": s.reward, "accuracy": s.exact, "format": float(s.format_ok)} for s in scores]


def row(puzzle, images) -> dict:
    """A `Puzzle` as a row; images: whatever stands for its canvases, in order."""
    return {"problem": puzzle.question, "images": images, **truth.of(puzzle)}
