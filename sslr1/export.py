"""Take it elsewhere: a run's model as one Hugging Face folder, puzzles as another trainer's data.

python -m sslr1.export model RUN OUT [--checkpoint best|newest] [--dtype bfloat16|float16|float32] [--adapter]
python -m sslr1.export puzzles IMAGES OUT --format trl|verl|easyr1|ms-swift [--count N] [--val N] [--puzzle NAME …]
[--level L …] [--image-format png|jpeg] [--workers N]

What is written appears under its name when it is complete; a folder that isn't empty is left alone.
"""

import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path

from sslr1.__main__ import parsed
from sslr1.errors import UserError
from sslr1.model.folder import holds_adapter
from sslr1.puzzles.picture import MAX_SIDE, MIN_SIDE
from sslr1.setup import interrupt, processors

PARTS = ("state/trainer.json", "hf/config.json")  # of a checkpoint, whose hf/ may be an adapter in place of a model
ROWS = 64  # of the parquet file that are held at once
FEW = 32  # puzzles by which size and time of the others are told


@contextmanager
def written(out):
    """A folder to write to, renamed to `out` afterwards; nothing is left of it after an error. UserError if `out` holds
    anything."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{str(out)!r} is there already: give a new or an empty folder")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.absolute().parent) as beside:
        partial = Path(beside) / "partial"
        partial.mkdir()
        yield partial
        os.replace(partial, out)


def checkpoint_of(source, which="best") -> Path:
    """The checkpoint folder that `source` names: a run's best or newest one, one itself, or its state/ or hf/. Raises
    UserError."""
    source = Path(source)
    if not source.is_dir():
        raise UserError(f"{str(source)!r} is not a folder")
    runs = source / "checkpoints"
    if runs.is_dir():
        return _of_run(source, runs, which)
    found = source.parent if source.name in ("state", "hf") else source
    if missing := _missing(found):
        raise UserError(f"{str(source)!r} is neither a run's folder nor a checkpoint of one: {missing} is missing")
    return found


def _missing(found) -> Path | None:
    """What a checkpoint lacks."""
    parts = PARTS[:1] if holds_adapter(found / "hf") else PARTS
    return next((found / part for part in parts if not (found / part).is_file()), None)


def _of_run(source, runs, which) -> Path:
    from sslr1.runs import checkpoint

    found = checkpoint.newest(runs)
    if found is None:
        raise UserError(f"{str(source)!r} has no complete checkpoint yet")
    if which == "best":
        trainer = found / "state" / "trainer.json"
        try:
            best = json.loads(trainer.read_text(encoding="utf-8"))["best_step"]
        except (OSError, ValueError, KeyError, TypeError):
            what = "which says what the best checkpoint is, can't be read"
            raise UserError(f"{trainer}, {what}; {_there(runs)}") from None
        found = found if best is None else runs / f"step-{best:06d}"
        if not found.is_dir():
            raise UserError(
                f"{str(source)!r}: its best checkpoint, {found.name}, is no longer there; {_there(runs)}, and a "
                "checkpoint's own folder can be given in place of the run's"
            )
    if missing := _missing(found):
        raise UserError(f"{found} is not whole: {missing} is missing; {_there(runs)}")
    return found


def _there(runs) -> str:
    from sslr1.runs import checkpoint

    *others, newest = (path.name for path in checkpoint.steps(runs))
    return f"there {'are' if others else 'is'} {', '.join([*others, newest])}: --checkpoint newest takes {newest}"


def export_model(source, out, which="best", dtype=None, adapter=False) -> Path:
    """Write the policy of a checkpoint (`checkpoint_of`) as a complete Hugging Face folder; returns the checkpoint.

    Its parameters, float32 in any number of shards, are rounded to `dtype` once (default: the checkpoint's compute
    dtype). A run that trained an adapter gives its base in `dtype` with the adapter added to it, or with `adapter` that
    alone, as PEFT has it. Raises UserError, also for an adapter of a run that trained none.
    """
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    from sslr1 import model
    from sslr1.runs import checkpoint

    found = checkpoint_of(source, which)
    if adapter and not holds_adapter(found / "hf"):
        raise UserError(f"{found} has no adapter: its run trained the model itself (model.lora.rank is 0)")
    with written(out) as partial:
        hf = found / "hf"
        if adapter:
            shutil.copytree(hf, partial, dirs_exist_ok=True)
            return found
        network = model.load_model(hf, getattr(torch, dtype or _computed_in(found)))
        if not holds_adapter(hf):
            state = {f"model.{name}": p.detach() for name, p in network.named_parameters()}
            dcp.load(state, storage_reader=HuggingFaceStorageReader(str(found / "state")), no_dist=True)
        checkpoint.save_hf(partial, network, model.load_tokenizer(hf), hf)
    return found


def _computed_in(found) -> str:
    """The compute dtype of a checkpoint's run."""
    if not holds_adapter(found / "hf"):
        return json.loads((found / "hf" / "config.json").read_text())["dtype"]
    return json.loads((found / "state" / "trainer.json").read_text())["made_by"]["dtype"].removeprefix("torch.")


def export_puzzles(
    folder,
    out,
    trainer,
    *,
    count=None,
    val=0,
    puzzle=None,
    level=None,
    seed=0,
    model=None,
    max_pixels=None,
    min_side=MIN_SIDE,
    max_side=MAX_SIDE,
    image_format="png",
    workers=1,
    **options,
) -> dict:
    """Write puzzles from a folder of images as the data of a trainer: `trl`, `verl`, `easyr1` (parquet, images
    embedded) or `ms-swift` (JSONL, images beside, by paths relative to it). Returns {file name: puzzles in it}.

    count: default one an image; val: from held-out images, which no other puzzle shows; puzzle, level: as in
    `series.kinds`; model: a folder whose image processor's sizes the canvases keep, default Qwen2.5-VL's; image_format:
    png, lossless, or jpeg; workers: processes that make them; options: `puzzles.make`'s. `files.txt` lists the images
    that indices refer to. The same arguments and images give the same bytes, whatever the workers. With several, a
    program of your own that calls this has to be guarded by `if __name__ == "__main__"`.
    """
    from sslr1 import ops, puzzles
    from sslr1.data import ImageStore
    from sslr1.integrations import rows
    from sslr1.puzzles.series import check, kinds

    write = _writer(trainer)
    asked = kinds(puzzle or puzzles.NAMES, level)
    limits = {"max_pixels": max_pixels} if max_pixels else {}
    spec = ops.PatchSpec.from_pretrained(model, **limits) if model else ops.PatchSpec(**limits)
    form = puzzles.Form(spec=spec, **options)
    check(asked, spec, form.composed)
    store = ImageStore.scan(folder, min_side, max_side)
    if store.folder.about:
        print(f"{folder}: {store.folder.about}", file=sys.stderr)
    train, held_out = store.folder.hold_out() if val else (range(len(store.folder)), [])
    counts = {"train": len(train) if count is None else count, "val": val}
    splits = {"train": train, "val": held_out}
    splits = {split: numbers for split, numbers in splits.items() if counts[split]}
    source = {"folder": store.folder, "sides": (min_side, max_side), "splits": splits, "trainer": trainer}
    source |= {"kinds": asked, "form": form, "seed": seed, "image_format": image_format}
    total, done = sum(counts.values()), {}
    workers = min(workers, max(1, total // FEW))  # another process takes seconds to start
    with closing(Outlook(total, workers)) as outlook, written(out) as partial, rows.made(source, workers) as made:
        for split in splits:
            drawn = _drawn(made(split, counts[split]), store, folder, outlook)
            done[write(partial, split, trainer, drawn)] = counts[split]
        store.folder.freeze(partial / "files.txt")
    if store.bad:
        print(f"{folder}: {store.complaint().removeprefix('; ')}", file=sys.stderr)
    return done


def _writer(trainer):
    """What writes its rows. Raises UserError, before an image is read, without the package for it."""
    if trainer == "ms-swift":
        return _write_jsonl
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UserError("parquet files need pyarrow: pip install 'sslr1[export]'") from None
    return _write_parquet


class Outlook:
    """Progress on stderr, and once it can be told, how large all will be and how long it will take."""

    def __init__(self, total, workers):
        from sslr1.integrations.rows import AHEAD, CHUNK
        from sslr1.runs.progress import Progress

        self.total, self.few = total, max(FEW, AHEAD * CHUNK * workers)
        self.progress = Progress(True, stderr=True)
        self.progress.start("puzzles", total)
        self.done = self.size = 0
        self.first = None  # when the first were there, and how many: what starting takes is no measure

    def close(self) -> None:
        self.progress.stop()

    def add(self, rows) -> None:
        """rows: (row, {path: bytes})."""
        for row, files in rows:
            images = row.get("images", ())
            self.size += sum(map(len, files.values())) or sum(len(image["bytes"]) for image in images)
        self.done += len(rows)
        now = time.monotonic()
        self.first = self.first or (now, self.done)
        if self.few and self.done - self.first[1] >= self.few and self.done < self.total:
            left = (now - self.first[0]) / (self.done - self.first[1]) * (self.total - self.done)
            size = self.size / self.done * self.total
            time_left = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"
            self.progress.say(f"{self.total:,} puzzles: about {size / 1e6:,.0f} MB, {time_left} to go")
            self.few = 0
        self.progress.show(self.done, {})


def _drawn(chunks, store, folder, outlook):
    """(row, {path: bytes}) after one another. Raises UserError where no image can decide a puzzle."""
    for rows, bad, error in chunks:
        store.bad |= bad
        if error:  # of the images: none that decides a puzzle, or too few that differ
            raise UserError(f"{str(folder)!r}: {error}{store.complaint()}") from None
        outlook.add(rows)
        yield from rows


def _write_parquet(folder, split, trainer, drawn) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from sslr1 import integrations
    from sslr1.integrations import columns

    module = getattr(integrations, trainer)
    schema = pa.schema([(name, columns.arrow(kind)) for name, kind in module.COLUMNS.items()])
    info = {"info": {"features": columns.features(module.COLUMNS)}}
    name = f"{split}.parquet"
    with pq.ParquetWriter(folder / name, schema.with_metadata({"huggingface": json.dumps(info)})) as file:
        while some := [row for row, _ in islice(drawn, ROWS)]:
            file.write_table(pa.Table.from_pylist(some, file.schema))
    return name


def _write_jsonl(folder, split, trainer, drawn) -> str:
    name = f"{split}.jsonl"
    (folder / "images").mkdir(exist_ok=True)
    with (folder / name).open("w", encoding="utf-8") as file:
        for row, files in drawn:
            for path, data in files.items():
                (folder / path).write_bytes(data)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return name


def main():
    asked = vars(parsed("export"))
    interrupt.unwind()  # what is half written goes
    try:
        import torch

        processors.collect_as_usual()
        torch.set_num_threads(processors.threads())
        if asked.pop("what") == "model":
            from transformers.utils import logging

            logging.set_verbosity_error()
            logging.disable_progress_bar()
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            found = export_model(*(asked[key] for key in ("source", "out", "checkpoint", "dtype", "adapter")))
            print(f"{asked['out']}: {found}")
        else:
            asked["thinking"] = not asked.pop("direct")
            asked["workers"] = asked["workers"] or processors.share()
            for name, n in export_puzzles(asked.pop("folder"), out := asked.pop("out"), **asked).items():
                print(f"{Path(out) / name}: {n} puzzles")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        interrupt.leave("interrupted: nothing was written")


if __name__ == "__main__":
    main()
