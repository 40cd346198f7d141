"""ms-swift: `--external_plugins examples/ms_swift_plugin.py --reward_funcs sslr1`. examples/ms_swift.sh is the whole
command.

A line of its JSONL file: `messages` (`<image>` where each image goes), `images` (paths relative to the file's folder,
which ROOT_IMAGE_DIR tells ms-swift) and the columns that it hands to rewards: `solution`, `id`, `puzzle` and `level`.
"""

from sslr1.integrations import trl, truth


def reward(completions, solution, rule="default", opened=None, **_) -> list:
    """Rewards of completions, floats, as ms-swift calls its reward functions: every column of the data as a list of as
    many. opened: see `truth.scored`."""
    return trl.reward(completions, solution, rule, opened)


def row(puzzle, images) -> dict:
    """A `Puzzle` as a row; images: paths of its canvases, in order."""
    messages = [{"role": "user", "content": puzzle.question}]
    return {"messages": messages, "images": images, **truth.of(puzzle, "solution")}
