"""What every entry point builds from a configuration: folders, images, tokenizer, policy and sampler."""

import os
import shutil
import time
from pathlib import Path

import torch

from sslr1 import distributed, model, ops
from sslr1.config import BUILTIN_IMAGES, BUILTIN_MODELS, Config
from sslr1.data import Decoder, ImageFolder, ImageStore, bad
from sslr1.data.images import ABOUT, SPLIT
from sslr1.errors import UserError
from sslr1.files import write_whole
from sslr1.model import lora, parallel, shared_prefix
from sslr1.model.folder import base_of, holds_adapter
from sslr1.puzzles import series
from sslr1.rollout import Engine, SamplerWeights
from sslr1.setup import lengths, processors
from sslr1.setup import tasks as own
from sslr1.setup.session import Images, Session, form_of

FOUND_EVERY_S = 5.0


def builtin(config: Config, data=True) -> tuple:
    """(the model's path; with `data`, what data.path gives); what is built in is made below log.dir if it isn't there
    yet."""
    model_path, data_path = config.model.path, config.data.path
    home = Path(config.log.dir)
    if family := BUILTIN_MODELS.get(model_path):
        from sslr1.model.tiny import build_tiny

        model_path = home / "builtin" / model_path.removeprefix("builtin:")
        if not model_path.exists():  # beside it and renamed: other runs may start now, too
            made = build_tiny(model_path.with_name(f"{model_path.name}-{os.getpid()}.partial"), family=family)
            try:
                made.rename(model_path)
            except OSError:
                shutil.rmtree(made)
                if not model_path.exists():
                    raise
                # another one was first
    if data and data_path == BUILTIN_IMAGES:
        from sslr1.data.scenes import write_scenes

        data_path = home / "builtin" / f"scenes-{config.data.scenes}"
        write_scenes(data_path, config.data.scenes)
    return Path(model_path), data_path if data else None


def build(
    config: Config,
    world: distributed.World,
    folder: Path | None = None,
    data=True,
    forms=(),
    learns=True,
    stored: Path | None = None,
) -> Session:
    """Build everything. Rank 0 makes what is missing on disk first. Errors that a user can mend are raised before the
    model is loaded wherever possible. With a run folder, its frozen list of images is used, or made. Without `data`
    there are no images, and the configuration's are not looked at. forms: those that are asked for by --form, "direct"
    and "thinking", in place of the configuration's. learns: whether a Learner will be given what is rolled out. stored:
    the folder of somebody's run or model that the configuration was found in: functions of tasks are not imported from
    it."""
    torch.set_num_threads(processors.threads(config.train.threads))
    if world.device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a pass over memory that all of it writes anyway
    _check_ranks(config, world, data)
    dtype = _compute_dtype(config.model.dtype, world.device)
    listing = folder / "files.txt" if folder else None
    distributed.agree(_problem(_prepare, config, listing, data, forms) if world.main else None, world)
    model_path, data_path = builtin(config, data)

    tokenizer = model.load_tokenizer(model_path)
    limits = {k: v for k in ("min_pixels", "max_pixels") if (v := getattr(config.puzzles, k))}
    spec = ops.PatchSpec.from_pretrained(base_of(model_path), dtype=dtype, **limits)
    if data:
        examples = series.check(lengths.kinds(config), spec, config.puzzles.composed)
    tasks = _tasks(config, world, tokenizer, spec, folder, stored, learns) if data else {}
    images, evaluation = _images(config, data_path, listing, world.device) if data else (None, None)
    longest = None
    if data and learns:
        longest = lengths.bounds(examples, tokenizer, form_of(config.puzzles, spec), config.data.max_side)[0]
        distributed.agree(_problem(lengths.check_token_budget, config, longest) if world.main else None, world)

    policy, weights = _networks(config, world, model_path, dtype)
    return Session(
        config=config,
        world=world,
        folder=folder,
        model_path=model_path,
        tokenizer=tokenizer,
        spec=spec,
        images=images,
        evaluation=evaluation,
        policy=policy,
        weights=weights,
        engine=_engine(config, policy, weights, tokenizer),
        longest=max([longest.tokens, *(task.longest[0] for task in tasks.values())]) if longest else 0,
        opening=_openings(tokenizer, config, forms),
        tasks=tasks,
    )


def _tasks(config, world, tokenizer, spec, folder, stored, learns) -> dict:
    """The user's own questions. Rank 0 looks through the rows, and where there is a run's folder the others read there
    what it found."""
    tasks = {}

    def open_all():
        report = (lambda name: _found(f"tasks.{name}", "rows looked at")) if world.main else None
        functions = own.functions(config, [stored, folder])
        tasks.update(own.open_tasks(config, tokenizer, spec, functions, folder, learns and world.main, report))
        if learns:
            own.check_token_budget(config, tasks)

    distributed.agree(_problem(open_all) if world.main else None, world)
    if not world.main:
        open_all()
    return tasks


def _engine(config, policy, weights, tokenizer) -> Engine:
    c = config.rollout
    return Engine(
        weights.model,
        tokenizer,
        max_tokens=c.max_tokens,
        wave_rows=c.wave_rows,
        wave_groups=c.wave_groups,
        batch_invariant=c.batch_invariant,
        look_every=c.look_every,
        cuda_graphs=c.cuda_graphs,
        keeps_seen=not shared_prefix.trains_tower(policy.model),
    )


def _problem(work, *arguments):
    """What a user can mend of what `work` came to, None if nothing; for `distributed.agree`."""
    try:
        work(*arguments)
    except (OSError, UserError) as error:
        return error


def _check_ranks(config, world, data):
    if data and config.rollout.prompts % world.size:
        raise UserError(f"rollout.prompts is {config.rollout.prompts}, not divisible by the {world.size} ranks")
    if world.size % config.train.replicate:
        raise UserError(f"train.replicate is {config.train.replicate}, which does not divide the {world.size} ranks")


def _compute_dtype(asked, device) -> torch.dtype:
    dtype = asked
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    if dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise UserError(f"model.dtype is {asked}, and this GPU has no bfloat16 of its own: set model.dtype=float32")
    return getattr(torch, dtype)


def _prepare(config, listing, data, forms):
    """Make what is missing on disk, and look at what a start would stumble over. On rank 0."""
    model_path, data_path = builtin(config, data)
    _openings(model.load_tokenizer(model_path), config, forms)
    model.check_patches(model_path, ops.PatchSpec.from_pretrained(base_of(model_path)))
    if config.model.lora.rank or holds_adapter(model_path):
        lora.wanted(config.model.lora, model.skeleton(model_path), model_path)
    if data and (not listing or not listing.exists()):
        scratch, report = listing and listing.parent, _found("data.path")
        found = ImageFolder.scan(data_path, scratch=scratch, report=report, exclude=config.data.exclude)
        if listing:
            if found.refused:
                bad.write(listing.with_name(bad.NAME), bad.refusals(found))
            write_whole(listing.with_name(ABOUT), found.about + "\n")
            found.freeze(listing)
            found.hold_out(config.data.holdout, listing.with_name(SPLIT))
    if data and config.eval.path:
        ImageFolder.scan(config.eval.path, "eval.path", report=_found("eval.path"))


def _found(key, what="images found"):
    """What says now and then how many images, or what else, are found, to whom waits for it."""
    last = time.monotonic()

    def report(count):
        nonlocal last
        if time.monotonic() - last >= FOUND_EVERY_S:
            last = time.monotonic()
            print(f"{key}: {count:,} {what} so far", flush=True)

    return report


def _networks(config, world, model_path, dtype):
    """The policy, sharded and loaded, and the sampler's weights."""
    network, c = model.skeleton(model_path), config.train
    model.freeze(network, config.model.frozen)
    if adapted := lora.wanted(config.model.lora, network, model_path):
        lora.add(network, adapted, dtype)
    weights = SamplerWeights(network, dtype)
    policy = parallel.shard(model.Policy(network), world, dtype, c.replicate, c.recompute, c.compile)
    parallel.materialize(policy, world.device)
    model.load_weights(policy.model, model_path)
    if holds_adapter(model_path):
        lora.load(policy.model, model_path)
    elif adapted:
        lora.begin(policy.model, c.seed)
    weights.attach(policy, world)
    return policy, weights


def _openings(tokenizer, config, forms) -> str:
    """What the chat template opens in the configuration's form, or in the last of `forms`. Raises UserError where it
    opens <think> in a form without thinking."""
    opening = "" if forms else model.opening(tokenizer, config.puzzles.thinking)
    for form in forms:
        asked = "the direct form is asked for (a benchmark's, unless --form is given)"
        opening = model.opening(tokenizer, form == "thinking", asked, "give --form thinking")
    return opening


def _images(config, data_path, listing, device) -> tuple[Images, Images]:
    """Images to train on, and those to evaluate on."""
    decoder = Decoder(config.data.decoder, torch.get_num_threads(), config.data.max_side, device)
    room = config.data.cache_mb << 20
    if listing:
        files = ImageFolder.thaw(data_path, listing)
    else:
        files = ImageFolder.scan(data_path, exclude=config.data.exclude)
    store = ImageStore(files, decoder, config.data.min_side, room)
    if not config.eval.path:
        train, held_out = store.folder.hold_out(config.data.holdout, listing and listing.with_name(SPLIT))
        both = Images(store=store, train=train, held_out=held_out)
        return both, both
    other = ImageStore(ImageFolder.scan(config.eval.path, "eval.path"), decoder, config.data.min_side, room)
    training = Images(store=store, train=range(len(store.folder)), held_out=[])
    return training, Images(store=other, train=[], held_out=range(len(other.folder)))
