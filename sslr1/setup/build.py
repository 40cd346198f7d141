"""What every entry point builds from a configuration: folders, images, tokenizer, policy and sampler."""

import os
import shutil
from pathlib import Path

import torch

from sslr1 import distributed, model, ops, puzzles
from sslr1.config import BUILTIN_IMAGES, BUILTIN_MODEL, Config
from sslr1.data import Decoder, ImageFolder, ImageStore, Pool, bad
from sslr1.data.images import ABOUT
from sslr1.errors import UserError
from sslr1.files import write_whole
from sslr1.model import lora, parallel
from sslr1.model.folder import base_of, holds_adapter
from sslr1.puzzles import series
from sslr1.rollout import Engine, SamplerWeights
from sslr1.setup import processors
from sslr1.setup.session import Images, Session, form_of


def builtin(config: Config, data=True) -> tuple[Path, Path | None]:
    """Paths of the model and, with `data`, the images; what is built in is made below log.dir if it isn't there yet."""
    model_path, data_path = config.model.path, config.data.path
    home = Path(config.log.dir)
    if model_path == BUILTIN_MODEL:
        from sslr1.model.tiny import build_tiny

        model_path = home / "builtin" / "tiny"
        if not model_path.exists():  # beside it and renamed: other runs may start now, too
            made = build_tiny(model_path.with_name(f"tiny-{os.getpid()}.partial"))
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
    return Path(model_path), Path(data_path) if data else None


def build(config: Config, world: distributed.World, folder: Path | None = None, data=True, forms=()) -> Session:
    """Build everything. Rank 0 makes what is missing on disk first. Errors that a user can mend are raised before the
    model is loaded wherever possible. With a run folder, its frozen list of images is used, or made. Without `data`
    there are no images, and the configuration's are not looked at. forms: those that are asked for by --form, "direct"
    and "thinking", in place of the configuration's."""
    torch.set_num_threads(processors.threads(config.train.threads))
    if world.device.type == "cpu":
        torch.use_deterministic_algorithms(True)
    _check_ranks(config, world, data)
    dtype = _compute_dtype(config.model.dtype, world.device)
    listing = folder / "files.txt" if folder else None
    distributed.agree(_problem(_prepare, config, listing, data, forms) if world.main else None, world)
    model_path, data_path = builtin(config, data)

    tokenizer = model.load_tokenizer(model_path)
    limits = {k: v for k in ("min_pixels", "max_pixels") if (v := getattr(config.puzzles, k))}
    spec = ops.PatchSpec.from_pretrained(base_of(model_path), dtype=dtype, **limits)
    if data:
        series.check(_kinds(config), spec, config.puzzles.composed)
    images, evaluation = _images(config, data_path, listing) if data else (None, None)
    asked = folder and world.main
    distributed.agree(_problem(check_token_budget, config, images, tokenizer, spec) if asked else None, world)

    policy, weights = _networks(config, world, model_path, dtype)
    c = config.rollout
    engine = Engine(
        weights.model,
        tokenizer,
        max_tokens=c.max_tokens,
        wave_rows=c.wave_rows,
        wave_groups=c.wave_groups,
        batch_invariant=c.batch_invariant,
        look_every=c.look_every,
        cuda_graphs=c.cuda_graphs,
    )
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
        engine=engine,
        opening=_openings(tokenizer, config, forms),
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
        found = ImageFolder.scan(data_path)
        if listing:
            if found.refused:
                bad.write(listing.with_name(bad.NAME), bad.refusals(found))
            write_whole(listing.with_name(ABOUT), found.about + "\n")
            found.freeze(listing)
    if data and config.eval.path:
        ImageFolder.scan(config.eval.path, "eval.path")


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


def check_token_budget(config, images, tokenizer, spec) -> None:
    """Raises UserError where a micro-batch can't hold a prompt with the longest completion, as puzzles of the largest
    files show, at each level that training may come to. What is longer still ends the run when it comes."""
    store, c = images.store, config.puzzles
    largest = sorted(images.train, key=lambda number: -store.folder.files[number][1])[:4]
    found = {number: image for number, image in zip(largest, store.pictures(largest)) if image is not None}
    form = form_of(c, spec)
    for name, level in _kinds(config) if found else ():
        pool = Pool(store, images.train)
        try:
            made = [
                puzzles.puzzle_at(puzzles.Address(name, level, config.train.seed, 0, 0, number), image, form, pool)
                for number, image in found.items()
            ]
        except puzzles.PoolError:  # images alike, which the stream passes over
            continue
        longest = max(len(prompt.input_ids) for prompt in model.prompts(puzzles.PuzzleBatch(made, form), tokenizer))
        needed = longest + config.rollout.max_tokens
        if needed > config.train.token_budget:
            raise UserError(
                f"train.token_budget is {config.train.token_budget}: a prompt of {longest} tokens ({name}, level "
                f"{level}) and a completion of rollout.max_tokens={config.rollout.max_tokens} don't fit; set it to "
                f"{needed} or more, or lower puzzles.max_pixels"
            )


def _kinds(config) -> list:
    """[(puzzle, level)] that training may come to."""
    c = config.puzzles
    adaptive = c.curriculum == "adaptive"
    return [(name, level) for name in c.mixture for level in (puzzles.LEVELS[name] if adaptive else [c.levels[name]])]


def _images(config, data_path, listing) -> tuple[Images, Images]:
    """Images to train on, and those to evaluate on."""
    decoder = Decoder(config.data.decoder, torch.get_num_threads(), config.data.max_side)
    room = config.data.cache_mb << 20
    files = ImageFolder.thaw(data_path, listing) if listing else ImageFolder.scan(data_path)
    store = ImageStore(files, decoder, config.data.min_side, room)
    if not config.eval.path:
        train, held_out = store.folder.hold_out(config.data.holdout)
        both = Images(store=store, train=train, held_out=held_out)
        return both, both
    other = ImageStore(ImageFolder.scan(config.eval.path, "eval.path"), decoder, config.data.min_side, room)
    training = Images(store=store, train=list(range(len(store.folder))), held_out=[])
    return training, Images(store=other, train=[], held_out=list(range(len(other.folder))))
