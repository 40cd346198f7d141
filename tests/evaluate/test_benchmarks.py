"""Benchmarks in VLMEvalKit's form: a made file read and checked cell by cell, its prompts against transformers' own
processor."""

import base64
import csv
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sslr1 import model, ops
from sslr1.data import Decoder
from sslr1.errors import UserError
from sslr1.evaluate import __main__ as evaluate
from sslr1.evaluate import benchmarks
from sslr1.integrations import trl
from sslr1.model import Sample
from sslr1.setup import entry
from tests.data import kinds

COLUMNS = ("index", "image", "question", "hint", "A", "B", "C", "D", "answer", "category")


def png(draw, height=30, width=40, mode="RGB"):
    file = io.BytesIO()
    Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def a_row(index, image, **cells):
    row = {"index": index, "image": image, "question": f"What is {index}?", "A": "one", "B": "two", "answer": "A"}
    return row | {"category": "x"} | cells


def write(path, rows, columns=COLUMNS):
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, delimiter="\t", extrasaction="raise")
        table.writeheader()
        table.writerows(rows)
    return path


@pytest.fixture
def images(draw):
    return [png(draw) for _ in range(4)]


def test_rows_are_read(tmp_path, images):
    a, b, c, d = images
    path = write(
        tmp_path / "made.tsv",
        [
            a_row(1, a, C="three, \"quoted\"\tand\nlonger", D="None", answer="d"),
            a_row(2, "1", hint="look", category=""),
            a_row("x-3", str([b, c]), question="<image>\nthen <image>?", A="", B="", answer="NO"),
            a_row(4, f'["{d}"]'),
            a_row(5, "x-3", question="Is <image 2> like <image 1>?", A="this: <image 1>"),
            a_row(6, f"data:image/png;base64,{a}"),
        ],
    )  # fmt: skip
    first, second, third, fourth, fifth, sixth = benchmarks.read(path)
    assert first.options == ("one", "two", 'three, "quoted"\tand\nlonger', "None") and first.answer == "D"
    assert (first.index, first.images, first.chance) == ("1", (a,), 0.25)
    assert second.images == (a,) and second.question == "Hint: look\nWhat is 2?" and second.options == ("one", "two")
    assert second.labels == {"category": ""}
    assert third.options == () and third.answer == "no" and third.images == (b, c) and third.chance == 0.5
    assert third.question == "<image 1>\nthen <image 2>?"
    assert fourth.images == (d,) and fifth.images == (b, c)
    benchmarks.check_images([first, second, third, fourth, fifth, sixth], path, 2)
    assert np.array_equal(np.asarray(benchmarks.decode(sixth.images[0])), np.asarray(benchmarks.decode(a)))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged EXIF data
def test_pictures_are_those_of_training(draw):
    """Transparent, turned, 16-bit, CMYK, animated: benchmarks, TRL's data set and training decode alike."""
    array = draw.integers(0, 256, (14, 20, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    files = {
        name: file for name, (file, seen, _) in kinds.good(array).items() if seen is not None and min(seen.shape) > 2
    }
    files |= {f"see-through {name}": file for name, (file, _) in kinds.see_through(array).items()}
    for (name, file), image in zip(files.items(), Decoder().decode(files.values())):
        asked = benchmarks.decode(base64.b64encode(file).decode())
        assert asked.mode == "RGB" and np.array_equal(np.asarray(asked), image.numpy()), name
        with Image.open(io.BytesIO(file)) as opened:
            (given,) = trl._Pixels([opened])
            assert torch.equal(given, image), name
    for bad in (Image.new("F", (30, 30)), Image.new("I", (30, 30))):
        with pytest.raises(ValueError, match="image 0: 32-bit pixels"):
            trl._Pixels([bad])[0]


def test_paths_are_relative_to_the_file(tmp_path, draw):
    (tmp_path / "pictures").mkdir()
    for name in ("p.png", "q.png"):
        Image.fromarray(draw.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(tmp_path / "pictures" / name)
    columns = ("index", "image_path", "question", "context", "answer")
    rows = [
        dict(index=1, image_path="pictures/p.png", question="Is it?", context="A tale.", answer="Yes"),
        dict(index=2, image_path="['pictures/p.png', 'pictures/q.png']", question="Is it?", answer="No"),
        dict(index=3, image_path=str(tmp_path / "pictures" / "q.png"), question="Is it?", answer="No"),
    ]
    one, two, three = benchmarks.read(write(tmp_path / "made.tsv", rows, columns))
    assert one.question == "A tale.\nIs it?" and len(two.images) == 2
    assert two.images[1].read_bytes() == three.images[0].read_bytes()
    benchmarks.check_images([one, two, three], "made.tsv")


def test_rows_that_name_rows_that_name_rows(tmp_path, images):
    """VLMEvalKit follows them where the row between comes first; here in any order, as long as they don't lead
    round."""
    rows = [a_row(0, images[0]), a_row(1, "0"), a_row(2, "1"), a_row(3, "4"), a_row(4, "2"), a_row(5, "['4', '6']")]
    found = benchmarks.read(write(tmp_path / "made.tsv", [*rows, a_row(6, str(images[1:3]))]))
    assert [row.images for row in found] == [(images[0],)] * 5 + [tuple(images[:3]), tuple(images[1:3])]
    with pytest.raises(UserError, match="row 1, column image: it leads round to row '1' again"):
        benchmarks.read(write(tmp_path / "made.tsv", [a_row(1, "2"), a_row(2, "3"), a_row(3, "1")]))


def test_rows_that_show_no_picture_are_left_out_and_counted(tmp_path, images):
    """Whatever else is in them, as in VLMEvalKit, whose reader takes "nan" and the like for empty cells."""
    rows = [
        a_row(1, images[0]),
        a_row(2, "", answer=""),
        a_row(3, "nan"),
        a_row(4, " "),
        a_row("", "None"),
        a_row(5, "1"),
    ]
    found = benchmarks.read(write(tmp_path / "made.tsv", rows))
    assert [row.index for row in found] == ["1", "5"] and found.without_picture == 4
    assert benchmarks.read(write(tmp_path / "made.tsv", rows[:1])).without_picture == 0
    with pytest.raises(UserError, match=r"made\.tsv: none of its 2 rows has a picture"):
        benchmarks.read(write(tmp_path / "made.tsv", rows[1:3]))
    with pytest.raises(
        UserError, match="row 2, column image: '7' is neither base64 nor the index of another row with a"
    ):
        benchmarks.read(write(tmp_path / "made.tsv", [a_row(7, ""), a_row(8, "7"), a_row(9, images[0])]))


def test_ready_made_rotations_are_left_out(tmp_path, images):
    rows = [
        a_row(7, images[0], C="three", answer="B"),
        a_row(1000007, "7", question="What is 7?", A="two", B="three", C="one", answer="A"),
        a_row(2000007, "7", question="What is 7?", A="three", B="one", C="two", answer="C"),
        a_row(1000008, images[1]),  # of no other row
        a_row(3000007, images[2], question="Another?", A="two", B="three", C="one", answer="A"),  # another question
    ]
    found = benchmarks.read(write(tmp_path / "made.tsv", rows))
    assert [row.index for row in found] == ["7", "1000008", "3000007"]
    made = benchmarks.asked(found[:1], circular=True)
    theirs = [tuple(row[letter] for letter in "ABC") + (row["answer"],) for row in rows[:3]]
    assert [(*row.options, row.answer) for row in made] == theirs


def test_rotations(tmp_path, images):
    path = write(
        tmp_path / "made.tsv",
        [a_row(1, images[0], C="three", answer="C"), a_row(2, images[1], A="", B="", answer="No")],
    )
    rows = benchmarks.read(path)
    assert benchmarks.asked(rows) == rows
    made = benchmarks.asked(rows, circular=True)
    assert [(r.index, r.rotation) for r in made] == [("1", 0), ("1", 1), ("1", 2), ("2", 0)]
    assert all(r.options["ABC".index(r.answer)] == "three" for r in made[:3]) and [r.answer for r in made] == [
        "C",
        "B",
        "A",
        "no",
    ]


def test_pictures_keep_to_the_options_that_are_rotated(tmp_path, images):
    row = a_row(1, str(images[:3]), question="Like <image>?", A="<image>", B="<image>", answer="A")
    (read,) = benchmarks.read(write(tmp_path / "made.tsv", [row]))
    assert benchmarks.question(read) == (f"Like <image>?\nA. <image>\nB. <image>\n{benchmarks.LETTER}", [0, 1, 2])
    assert benchmarks.question(benchmarks.rotated(read, 1))[1] == [0, 2, 1]


def test_the_wording(tmp_path, images):
    rows = [
        a_row(1, str(images[:2])),
        a_row(2, images[0], A="", B="", answer="Yes"),
        a_row(3, images[0], A="", B="", answer="Yes", question="Is it? Please answer yes or no."),
    ]
    one, two, three = benchmarks.read(write(tmp_path / "made.tsv", rows))
    asked = "<image>\n<image>\nWhat is 1?\nA. one\nB. two\nAnswer with the option letter directly."
    assert benchmarks.question(one) == (asked, [0, 1])
    assert benchmarks.question(two)[0] == "<image>\nWhat is 2?\nAnswer Yes or No directly."
    assert benchmarks.question(three)[0] == "<image>\nIs it? Please answer yes or no."
    for row in (one, two, three):
        thinking = benchmarks.question(row, thinking=True)[0]
        assert "<think></think>" in thinking and r"\boxed{}" in thinking and "directly" not in thinking


UNDECODED = "row with index '2', column image: can't be decoded"
BROKEN = {
    "missing question": (dict(drop="question"), "column question is missing; it has index, image"),
    "missing answer": (dict(drop="answer"), "column answer is missing"),
    "missing index": (dict(drop="index"), "column index is missing"),
    "missing image": (dict(drop="image"), "column image (or image_path) is missing"),
    "empty question": (dict(question=" "), "row 2, column question: empty"),
    "empty answer": (dict(answer=""), "row 2, column answer: empty"),
    "empty index": (dict(index=""), "row 2, column index: empty"),
    "twice": (dict(index="1"), "row 2, column index: '1' is there already"),
    "no such option": (dict(answer="C"), "row 2, column answer: 'C' is not one of A, B"),
    "an answer in words": (dict(answer="one"), "row 2, column answer: 'one' is not one of A, B"),
    "neither yes nor no": (dict(A="", B="", answer="B"), "row 2, column answer: 'B' is not one of Yes, No"),
    "a gap": (dict(D="four"), "row 2, column C: empty, though there is an option D"),
    "one option": (dict(B=""), "row 2, column B: empty, though there is an option A"),
    "no base64": (dict(image="!" * 100), UNDECODED),
    "a stray mark": (dict(image="stray"), f"{UNDECODED}: Only base64 data is allowed"),
    "no image": (dict(image=base64.b64encode(b"x" * 100).decode()), f"{UNDECODED}: not an image of a format"),
    "cut off": (dict(image="cut"), UNDECODED),
    "too long": (dict(image="long"), f"{UNDECODED}: 402x2 px is longer"),
    "no such row": (dict(image="17"), "row 2, column image: '17' is neither base64 nor the index of another row"),
    "a row that names itself": (dict(image="2"), "row 2, column image: it leads round to row '2' again"),
    "no list": (dict(image="['a', b]"), "row 2, column image: starts with [ but is not a list of strings"),
    "a list of numbers": (dict(image="[1, 2]"), "row 2, column image: not a list of strings"),
    "an empty list": (dict(image="[]"), "row 2, column image: not a list of strings"),
    "marks": (
        dict(question="<image> and <image>?"),
        "row 2, column question: <image>, of 2, does not fit the row's pictures, which are 1",
    ),
    "a mark": (dict(A="<image 2>"), "row 2, column A: <image 2> does not fit the row's pictures, which are 1"),
    "the model's mark": (dict(B="<|image_pad|>"), "row 2, column B: <|image_pad|> is the model's own mark"),
}  # fmt: skip


@pytest.mark.parametrize("change, words", BROKEN.values(), ids=BROKEN)
def test_broken_files_end_in_one_line_before_a_model_is_loaded(
    tmp_path, tiny, draw, monkeypatch, capsys, change, words
):
    whole, drop = png(draw), change.pop("drop", None) if "drop" in change else None
    special = {"cut": whole[: len(whole) // 8 * 4], "long": png(draw, 2, 402), "stray": f"{whole[:40]}!{whole[40:]}"}
    change = {**change, "image": special.get(change["image"], change["image"])} if "image" in change else change
    rows = [a_row(1, whole), a_row(2, whole) | change, a_row(3, "1")]
    columns = [column for column in COLUMNS if column != drop]
    path = write(tmp_path / "made.tsv", [{k: v for k, v in row.items() if k != drop} for row in rows], columns)
    monkeypatch.setattr("sys.argv", ["evaluate", str(tiny), "--benchmark", str(path)])
    monkeypatch.setattr(entry, "session", lambda *_, **__: pytest.fail("it went on to load a model"))
    with pytest.raises(SystemExit) as end:
        evaluate.main()
    told = capsys.readouterr()
    assert end.value.code == 2 and told.err.count("\n") == 1 and not told.out
    assert told.err.startswith(f"error: {path}") and words in told.err, told.err


def test_broken_tables(tmp_path, draw):
    path = tmp_path / "made.tsv"
    header = "index\timage\tquestion\tanswer\n"
    for text, words in (
        ("", "is empty"),
        (header, "no rows below the header"),
        (header + "1\t2\n", "row 1: 2 cells, but the header has 4"),
        (header + '1\t"2\tx\tYes\n', "is not a table with tabs between its cells: unexpected end of data"),
        ("index\tindex\timage\tquestion\tanswer\n", "column index is there 2 times"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=f"made.tsv.*{words}"):
            benchmarks.read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        benchmarks.read(path)
    with pytest.raises(UserError, match="can't be read: No such file"):
        benchmarks.read(tmp_path / "none.tsv")
    columns = ("index", "image_path", "question", "answer")
    write(path, [dict(index=1, image_path="none.png", question="?", answer="Yes")], columns)
    with pytest.raises(UserError, match=r"row 1, column image_path: .*none\.png is not a file"):
        benchmarks.read(path)


def their_processor(folder, max_pixels):
    """transformers' own processor of the folder, without one for videos, which would need torchvision."""
    from transformers import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class ImageProcessor(Qwen2_5_VLProcessor):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            self.image_token, self.video_token = "<|image_pad|>", None
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            super(Qwen2_5_VLProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)

    images = Qwen2VLImageProcessorPil.from_pretrained(folder)
    images.size = {**dict(images.size), "longest_edge": max_pixels}
    tokenizer = model.load_tokenizer(folder)
    return ImageProcessor(images, tokenizer, tokenizer.chat_template)


def test_prompts_are_those_of_transformers_own_processor(any_tiny, tmp_path, draw):
    """Pictures too small, too large, grey, see-through, of odd sizes, several, in the middle of the text."""
    pictures = [
        png(draw, 33, 47),
        png(draw, 210, 130),
        png(draw, 61, 300, "L"),
        png(draw, 90, 90, "RGBA"),
        png(draw, 5, 8),
    ]
    rows = [a_row(i, picture) for i, picture in enumerate(pictures)]
    rows += [
        a_row(10, str(pictures[:3])),
        a_row(11, str(pictures[1:3]), question="From <image 2> to <image 1>: the same?", A="", B="", answer="Yes"),
    ]
    read = benchmarks.read(write(tmp_path / "made.tsv", rows))
    spec, tokenizer, most = ops.PatchSpec.from_pretrained(any_tiny), model.load_tokenizer(any_tiny), 150 * 150
    process = benchmarks.image_processor(spec, most)
    sizes = set()
    for row in read:
        ours = benchmarks.prompt(row, tokenizer, spec.merge, process)
        text, places = benchmarks.question(row)
        content = []
        for piece in text.split("<image>"):
            content += [{"type": "text", "text": piece}] * bool(piece) + [{"type": "image"}]
        message = [{"role": "user", "content": content[:-1]}]
        processor = their_processor(any_tiny, round(most / len(places)))
        asked = processor.apply_chat_template(message, add_generation_prompt=True, enable_thinking=False)
        shown = [benchmarks.decode(row.images[k]) for k in places]
        theirs = processor(text=[asked], images=shown, return_tensors="pt")
        assert ours.input_ids.tolist() == theirs["input_ids"][0].tolist()
        assert (ours.pixel_values == theirs["pixel_values"]).all() and len(ours.pixel_values) == len(
            theirs["pixel_values"]
        )
        assert ours.image_grid_thw.tolist() == theirs["image_grid_thw"].tolist()
        assert (ours.image_grid_thw.prod(1) * spec.patch**2 <= most / len(places)).all()
        sizes |= {tuple(grid) for grid in ours.image_grid_thw.tolist()}
    assert len(sizes) > 4
    assert {benchmarks.decode(picture).mode for picture in pictures} == {"RGB"}
    bf16 = benchmarks.image_processor(ops.PatchSpec.from_pretrained(any_tiny, dtype=torch.bfloat16), most)
    assert bf16([benchmarks.decode(pictures[0])])[0].dtype == torch.bfloat16


def test_a_prompt_needs_a_picture_for_every_mark(tiny):
    with pytest.raises(ValueError, match="places for 2 images was given 1"):
        model.prompt("<image><image>", torch.zeros(16, 1176), torch.tensor([[1, 4, 4]]), model.load_tokenizer(tiny), 2)


def test_a_made_benchmark_is_scored(tiny, tmp_path, images, one_process, monkeypatch):
    """Known completions to known questions, in batches that both limits end; numbers worked out by hand."""
    said = {
        ("1", 0): "A", ("1", 1): "B", ("1", 2): "The answer is (c).",
        ("2", 0): r"<think>B?</think>\boxed{B}", ("2", 1): "B",
        ("3", 0): "Yes, it is no dog.",
        ("4", 0): "two", ("4", 1): "cat",
    }  # fmt: skip
    rows = [
        a_row(1, images[0], C="three"),
        a_row(2, images[1], answer="B", category="y"),
        a_row(3, images[2], A="", B="", answer="Yes"),
        a_row(4, "1", answer="B", category="y"),
    ]
    asked = benchmarks.asked(benchmarks.read(write(tmp_path / "made.tsv", rows)), circular=True)
    tokenizer, spec, batches = model.load_tokenizer(tiny), ops.PatchSpec.from_pretrained(tiny), []

    def generate(prompts, group_size, temperature, max_tokens):
        assert (group_size, temperature, max_tokens) == (1, 0, 7)
        batches.append(len(prompts))
        out = []
        for prompt in prompts:
            (row,) = (
                r
                for r in asked
                if tokenizer.decode(prompt.input_ids).replace("<|image_pad|>", "").count(written(r)) == 1
            )
            sample = Sample(prompt.input_ids, prompt.input_ids, said[row.index, row.rotation], "stop")
            out.append(SimpleNamespace(samples=[sample]))
        return out

    def written(row):
        return "".join(f"\n{letter}. {text}" for letter, text in zip("ABC", row.options)).join(
            (row.question, "\nAnswer")
        )

    session = SimpleNamespace(
        world=one_process, spec=spec, tokenizer=tokenizer, engine=SimpleNamespace(generate=generate)
    )
    monkeypatch.setattr(benchmarks, "CHUNK", 3)
    done = []
    records = benchmarks.ask_benchmark(session, asked, "direct", 112 * 112, 7, done.append)
    assert batches == [3, 3, 2] and done == [3, 6, 8]
    assert [(r["index"], r["rotation"]) for r in records] == [(row.index, row.rotation) for row in asked]
    assert [r["extracted"] for r in records] == ["A", "B", "C", "B", "B", "yes", "B", None]
    assert [r["answer"] for r in records] == ["A", "C", "B", "B", "A", "yes", "B", "A"]
    found = evaluate.scoring.summarise(records, "made")
    plain, circular = found["measures"]["plain"], found["measures"]["circular"]
    assert (plain["n"], plain["accuracy"], circular["n"], circular["accuracy"]) == (4, 1.0, 4, 0.25)
    assert plain["chance"] == pytest.approx((1 / 3 + 3 / 2) / 4)
    assert circular["chance"] == pytest.approx((1 / 27 + 1 / 4 + 1 / 2 + 1 / 4) / 4)
    assert found["groups"]["category"]["y"]["n"] == 2 and found["unreadable"] == 1
    patches = len(benchmarks.prompt(asked[0], tokenizer, 2, benchmarks.image_processor(spec, 112 * 112)).pixel_values)
    monkeypatch.setattr(benchmarks, "CHUNK_PATCHES", 2 * patches)  # all pictures are alike
    batches.clear()
    assert benchmarks.ask_benchmark(session, asked, "direct", 112 * 112, 7, done.append) == records
    assert batches == [2, 2, 2, 2]
