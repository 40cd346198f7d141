"""Take it elsewhere: a run's model as one Hugging Face folder, puzzles as another trainer's data.

python -m sslr1.export model RUN OUT [--checkpoint best|newest] [--dtype bfloat16|float16|float32]
python -m sslr1.export puzzles IMAGES OUT --format trl|verl|easyr1|ms-swift [--count N] [--val N] [--puzzle NAME …]
[--level L …]

What is written appears under its name when it is complete; a folder that isn't empty is left alone.
"""

import json
import os
import sys
import tempfile
import warnings
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from sslr1.__main__ import parsed
from sslr1.errors import UserError
from sslr1.puzzles.picture import MAX_SIDE, MIN_SIDE
from sslr1.setup import interrupt, processors

PARTS = ("state/trainer.json", "hf/config.json")  # of a checkpoint
ROWS = 64  # of the parquet file that are held at once


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
    for part in PARTS:
        if not (found / part).is_file():
            raise UserError(
                f"{str(source)!r} is neither a run's folder nor a checkpoint of one: {found / part} is missing"
            )
    return found


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
    for part in PARTS:
        if not (found / part).is_file():
            raise UserError(f"{found} is not whole: {found / part} is missing; {_there(runs)}")
    return found


def _there(runs) -> str:
    from sslr1.runs import checkpoint

    *others, newest = (path.name for path in checkpoint.steps(runs))
    return f"there {'are' if others else 'is'} {', '.join([*others, newest])}: --checkpoint newest takes {newest}"


def export_model(source, out, which="best", dtype=None) -> Path:
    """Write the policy of a checkpoint (`checkpoint_of`) as a complete Hugging Face folder; returns the checkpoint.

    Its parameters, float32 in any number of shards, are rounded to `dtype` once (default: the checkpoint's compute
    dtype).
    """
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    from sslr1 import model
    from sslr1.runs import checkpoint

    found = checkpoint_of(source, which)
    with written(out) as partial:
        hf = found / "hf"
        dtype = dtype or json.loads((hf / "config.json").read_text())["dtype"]
        network = model.load_model(hf, getattr(torch, dtype))
        state = {f"model.{name}": p.detach() for name, p in network.named_parameters()}
        dcp.load(state, storage_reader=HuggingFaceStorageReader(str(found / "state")), no_dist=True)
        checkpoint.save_hf(partial, network, model.load_tokenizer(hf), hf)
    return found


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
    **options,
) -> dict:
    """Write puzzles from a folder of images as the data of a trainer: `trl`, `verl`, `easyr1` (parquet, images
    embedded) or `ms-swift` (JSONL, images beside). Returns {file name: puzzles in it}.

    count: default one an image; val: from held-out images, which no other puzzle shows; puzzle, level: as in
    `series.kinds`; model: a folder whose image processor's sizes the canvases keep, default Qwen2.5-VL's; options:
    `puzzles.make`'s. `files.txt` lists the images that indices refer to. The same arguments and images give the same
    bytes.
    """
    from sslr1 import ops, puzzles
    from sslr1.data import ImageStore, Pool
    from sslr1.puzzles.series import Series, check, kinds

    write = _write_jsonl
    if trainer != "ms-swift":
        write = _write_parquet
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise UserError("parquet files need pyarrow: pip install 'sslr1[export]'") from None
    asked = kinds(puzzle or puzzles.NAMES, level)
    limits = {"max_pixels": max_pixels} if max_pixels else {}
    spec = ops.PatchSpec.from_pretrained(model, **limits) if model else ops.PatchSpec(**limits)
    form = puzzles.Form(spec=spec, **options)
    check(asked, spec, form.composed)
    store = ImageStore.scan(folder, min_side, max_side)
    if store.folder.about:
        print(f"{folder}: {store.folder.about}", file=sys.stderr)
    train, held_out = store.folder.hold_out() if val else (range(len(store.folder)), [])
    made = {}
    with written(out) as partial:
        for split, numbers, n in (("train", train, len(train) if count is None else count), ("val", held_out, val)):
            if not n:
                continue
            pool = Pool(store, numbers)
            series = Series(lambda i: store.pictures([i])[0], numbers, asked, seed=seed, form=form, pool=pool)
            drawn = (series[q] for q in range(n))
            try:
                made[write(partial, Path(out).absolute(), split, trainer, drawn)] = n
            except ValueError as error:  # of the images: none that decides a puzzle, or too few that differ
                raise UserError(f"{str(folder)!r}: {error}{store.complaint()}") from None
        store.folder.freeze(partial / "files.txt")
    if store.bad:
        print(f"{folder}: {store.complaint().removeprefix('; ')}", file=sys.stderr)
    return made


def _write_parquet(folder, final, split, trainer, drawn) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from sslr1 import integrations
    from sslr1.integrations import columns, trl

    module = getattr(integrations, trainer)
    schema = pa.schema([(name, columns.arrow(kind)) for name, kind in module.COLUMNS.items()])
    info = {"info": {"features": columns.features(module.COLUMNS)}}
    name = f"{split}.parquet"
    rows = (
        module.row(
            one,
            [trl.png(canvas) for canvas in one.render()],
            **({"split": split, "number": number} if trainer == "verl" else {}),
        )
        for number, one in enumerate(drawn)
    )
    with pq.ParquetWriter(folder / name, schema.with_metadata({"huggingface": json.dumps(info)})) as file:
        while some := list(islice(rows, ROWS)):
            file.write_table(pa.Table.from_pylist(some, file.schema))
    return name


def _write_jsonl(folder, final, split, trainer, drawn) -> str:
    from sslr1.integrations import ms_swift, trl

    name = f"{split}.jsonl"
    (folder / "images").mkdir(exist_ok=True)
    with (folder / name).open("w", encoding="utf-8") as file:
        for number, one in enumerate(drawn):
            canvases = one.render()
            paths = [f"images/{split}-{number:07d}-{k}.png" for k in range(len(canvases))]
            for path, canvas in zip(paths, canvases):
                (folder / path).write_bytes(trl.png(canvas)["bytes"])
            line = ms_swift.row(one, [str(final / path) for path in paths])
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return name


def main():
    asked = vars(parsed("export"))
    interrupt.unwind()  # what is half written goes
    try:
        import torch

        torch.set_num_threads(processors.threads())
        if asked.pop("what") == "model":
            from transformers.utils import logging

            logging.set_verbosity_error()
            logging.disable_progress_bar()
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            found = export_model(asked["source"], asked["out"], asked["checkpoint"], asked["dtype"])
            print(f"{asked['out']}: {found}")
        else:
            asked["thinking"] = not asked.pop("direct")
            for name, n in export_puzzles(asked.pop("folder"), out := asked.pop("out"), **asked).items():
                print(f"{Path(out) / name}: {n} puzzles")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        interrupt.leave("interrupted: nothing was written")


if __name__ == "__main__":
    main()
