"""The ground truth that travels through another trainer's data: an answer and the form that was asked for, as JSON.

It is all that some trainers hand to a reward, so it says everything that scoring takes.
"""

import json

from sslr1.puzzles.reward import Answer, score, starts_opened

COLUMNS = {"answer": "string", "id": "string", "puzzle": "string", "level": "int64"}  # types of `of`'s


def pack(answer, thinking=True) -> str:
    """JSON of an Answer's `to_dict()` and of whether <think></think> was asked for."""
    return json.dumps({**answer.to_dict(), "thinking": thinking})


def of(puzzle, name="answer") -> dict:
    """The columns of a `Puzzle`'s row that say what it is: its ground truth, under the name by which the trainer hands
    it to the reward, and `id`, `puzzle` and `level`."""
    at = puzzle.address
    return {name: pack(puzzle.answer, puzzle.form.thinking), "id": str(at), "puzzle": at.puzzle, "level": at.level}


def scored(truth, completion, rule="default", opened=None):
    """The Score of a completion. truth: what `pack` gave, or what it holds as a dict, or an Answer; <think></think> is
    asked for unless it says otherwise.

    opened: whether the model's chat template has written <think> before the completion, as those of thinking models do;
    None sees it from the completion, one that closes a thought which it didn't open. ValueError for an unknown rule,
    never for any completion.
    """
    thinking = True
    if not isinstance(truth, Answer):
        truth = json.loads(truth) if isinstance(truth, str) else truth
        truth, thinking = Answer.from_dict(truth), truth.get("thinking", True)
    if thinking and isinstance(completion, str):
        opened = starts_opened(completion) if opened is None else opened
        completion = "<think>" + completion if opened else completion
    return score(truth, completion, rule, thinking)
