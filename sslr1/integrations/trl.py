"""TRL's GRPOTrainer: `GRPOTrainer(model, reward_funcs=trl.reward, train_dataset=trl.dataset(images), …)`. Tested with
TRL 1.16.0.

A row, in memory or in a parquet file (`sslr1 export puzzles … --format trl`): `prompt`, a conversation with a place for
each image between its words; `images`, in order; `answer`, for the reward; `id`, `puzzle` and `level`.
"""

import io

from sslr1.integrations import columns, truth

QUALITY = 95  # of JPEG files
COLUMNS = {
    "prompt": [{"role": "string", "content": [{"type": "string", "text": "string"}]}],
    "images": ["image"],
    **truth.COLUMNS,
}


def reward(completions, answer, rule="default", opened=None, **_) -> list:
    """Rewards of completions, floats, as TRL calls its reward functions: plain strings or conversations, every column
    of the data as a list of as many. opened: see `truth.scored`. `functools.partial(reward, rule="paper")` takes
    another rule."""
    return [truth.scored(a, _text(completion), rule, opened).reward for a, completion in zip(answer, completions)]


def _text(completion):
    """What the assistant said: of a conversation, the last message's text."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"] if completion else ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content or [])


def row(puzzle, images) -> dict:
    """A `Puzzle` as a row; images: whatever stands for its canvases, in order."""
    pieces = puzzle.question.split("<image>")
    content = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
    for piece in pieces[1:]:
        content.append({"type": "image", "text": None})
        if piece:
            content.append({"type": "text", "text": piece})
    return {"prompt": [{"role": "user", "content": content}], "images": images, **truth.of(puzzle)}


def dataset(images, puzzle=None, *, level=None, count=None, seed=0, pool=None, **options):
    """A `datasets.Dataset` of puzzles, held in memory; for more than that, export them and load the parquet file.

    images: a sequence (len, [i]) of PIL images, of uint8 [H, W, 3] tensors or arrays, or a `sslr1.data.Pool`. puzzle: a
    name or several, all five unless given; level: one or several, each puzzle's own start unless given; they come in
    turn. count: how many puzzles, one an image unless given; seed: names every random draw. pool: as for
    `puzzles.make`, by default these images. options: `make`'s thinking, composed, wordings, and spec, which should be
    the model's (`PatchSpec.from_pretrained(folder)`), or its processor resizes what was puzzle.

    PIL images are shown as training shows their files: turned by EXIF, on white where they are transparent, 16 bits
    scaled to 8.

    Raises UserError for unknown puzzles and levels, for a spec that leaves a puzzle no canvas, and if the images can't
    decide one.
    """
    from datasets import Dataset, Features

    from sslr1.puzzles.batch import NAMES
    from sslr1.puzzles.puzzle import Form
    from sslr1.puzzles.series import Series, check, kinds

    images, asked = _Pixels(images), kinds(puzzle or NAMES, level)
    form = Form(**options)
    check(asked, form.spec, form.composed)
    pool = images if pool is None else pool
    series = Series(images.__getitem__, range(len(images)), asked, seed=seed, form=form, pool=pool)
    drawn = (series[q] for q in range(len(images) if count is None else count))
    features = Features.from_dict(columns.features(COLUMNS))
    rows = [row(one, [{"bytes": encoded(canvas), "path": None} for canvas in one.render()]) for one in drawn]
    return Dataset.from_list(rows, features)


def encoded(canvas, image_format="png") -> bytes:
    """A uint8 [H, W, 3] canvas as a file: a PNG, which keeps it, or a JPEG of QUALITY without subsampling, which
    doesn't quite."""
    from PIL import Image

    data = io.BytesIO()
    # PNG's fastest level: 6 % more bytes in a third of the time, which is most of what an export takes
    options = {"png": {"compress_level": 1}, "jpeg": {"quality": QUALITY, "subsampling": 0}}[image_format]
    Image.fromarray(canvas.cpu().numpy()).save(data, image_format.upper(), **options)
    return data.getvalue()


class _Pixels:
    """A sequence of images as uint8 [H, W, 3] tensors: PIL images as training would decode their files; Pictures as
    they are."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        import torch
        from PIL import Image

        from sslr1.data import pixels
        from sslr1.puzzles.picture import Picture

        image = self.images[int(i)]
        if isinstance(image, Picture):  # of `sslr1.data.Pool`
            return image
        if isinstance(image, Image.Image):
            try:
                image = pixels.shown(image)
            except ValueError as error:
                raise ValueError(f"image {i}: {error}") from None
        return image if isinstance(image, torch.Tensor) else torch.from_numpy(image)
