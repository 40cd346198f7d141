"""What every entry point builds from a configuration: folders, images, tokenizer, policy and sampler."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sslr1 import distributed, model, ops, puzzles
from sslr1.config import Config
from sslr1.data import Decoder, ImageFolder, ImageStore, Pool, PuzzleStream, bad
from sslr1.data.images import ABOUT
from sslr1.errors import UserError
from sslr1.files import write_whole
from sslr1.model import parallel
from sslr1.puzzles import series
from sslr1.rollout import Engine, SamplerWeights
from sslr1.setup import processors

BUILTIN_MODEL, BUILTIN_IMAGES = "builtin:tiny", "builtin:scenes"


@dataclass
class Images:
    """A store and its image numbers, to train on and held out."""

    store: ImageStore
    train: list
    held_out: list


@dataclass
class Built:
    """Everything that stands between a configuration and a training loop."""

    config: Config
    world: distributed.World
    folder: Path | None
    model_path: Path
    tokenizer: object
    spec: ops.PatchSpec
    images: Images | None
    evaluation: Images | None
    policy: object
    weights: SamplerWeights
    engine: Engine
    opening: str = ""  # what the chat template has written of every completion

    def score(self, answer, text):
        """A completion's Score by the run's rule; its text is what the model wrote behind the chat template's opening."""
        puzzle = self.config.puzzles
        return puzzles.score(answer, self.opening + text, puzzle.rule, puzzle.thinking)

    def summary(self) -> str:
        """One line for the start of a run: what was found, and what was chosen where there was a choice."""
        images, world = self.images, self.world
        return (
            f"{len(images.train)} images to train on, {len(self.evaluation.held_out)} held out, decoded by {images.store.decoder.backend}, "
            f"rendered by {ops.choose_backend('auto', torch.device('cpu'))}; {world.size} {world.device.type} rank(s), "
            f"{torch.get_num_threads()} thread(s) each, {self.spec.dtype}".replace("torch.", "")
            + (f", attention by {ops.flash.library()}" if world.device.type == "cuda" else "")
        )

    def not_read(self) -> list:
        """A line for each folder of images in which not all is read."""
        stores = {id(images.store): images.store for images in (self.images, self.evaluation)}.values()
        return [f"{store.folder.root}: {store.folder.about}" for store in stores if store.folder.about]

    def reference(self, path):
        """The frozen policy of loss.kl_coef from a checkpoint's hf/ folder, which holds it in the compute dtype. All ranks must
        call it. Raises UserError."""
        problem, train = None, self.config.train
        if self.world.main and not path.is_dir():
            problem = UserError(
                f"{path} is gone, which loss.kl_coef={self.config.loss.kl_coef} measures from: start a run of another "
                "log.name, or set loss.kl_coef=0 and checkpoint.allow_change=true"
            )
        distributed.agree(problem, self.world)
        return model.load_reference(path, self.world, self.spec.dtype, train.replicate, train.compile)

    def form(self, thinking=None) -> puzzles.Form:
        """How the configuration's puzzles are put; thinking or not as given."""
        return form_of(self.config.puzzles, self.spec, thinking)

    def stream(self, batch=None, levels=None) -> PuzzleStream:
        """The training stream of this rank; `batch` puzzles a step (default rollout.prompts), at the levels that `levels`
        gives for (step, slot, puzzle) (default puzzles.levels)."""
        c = self.config
        return PuzzleStream(
            self.images.store,
            self.images.train,
            self.tokenizer,
            mixture=c.puzzles.mixture,
            levels=levels or (lambda step, slot, name: c.puzzles.levels[name]),
            batch=batch or c.rollout.prompts,
            seed=c.train.seed,
            form=self.form(),
            rank=self.world.rank,
            world_size=self.world.size,
        )


def form_of(settings, spec, thinking=None) -> puzzles.Form:
    """How puzzles of the configuration's section are put; thinking or not as given."""
    thinking = settings.thinking if thinking is None else thinking
    return puzzles.Form(spec=spec, thinking=thinking, wordings=settings.wordings, composed=settings.composed)


def builtin(config: Config, data=True) -> tuple[Path, Path]:
    """Paths of the model and the images; what is built in is made below log.dir if it isn't there yet (without `data`, the
    model alone)."""
    model_path, data_path = config.model.path, config.data.path
    home = Path(config.log.dir)
    if model_path == BUILTIN_MODEL:
        from sslr1.model.tiny import build_tiny

        model_path = home / "builtin" / "tiny"
        if not (model_path / "preprocessor_config.json").exists():
            build_tiny(model_path)
    if data and data_path == BUILTIN_IMAGES:
        from sslr1.data.scenes import write_scenes

        data_path = home / "builtin" / f"scenes-{config.data.scenes}"
        write_scenes(data_path, config.data.scenes)
    return Path(model_path), Path(data_path)


def build(config: Config, world: distributed.World, folder: Path | None = None, data=True, forms=()) -> Built:
    """Build everything. Rank 0 makes what is missing on disk first. Errors that a user can mend are raised before the model
    is loaded wherever possible. With a run folder, its frozen list of images is used, or made. Without `data` there are
    no images, and the configuration's are not looked at. forms: those that are asked for by --form, "direct" and "thinking", in place
    of the configuration's."""
    torch.set_num_threads(processors.threads(config.train.threads))
    if world.device.type == "cpu":
        torch.use_deterministic_algorithms(True)
    if data and config.rollout.prompts % world.size:
        raise UserError(f"rollout.prompts is {config.rollout.prompts}, not divisible by the {world.size} ranks")
    if world.size % config.train.replicate:
        raise UserError(f"train.replicate is {config.train.replicate}, which does not divide the {world.size} ranks")
    dtype = config.model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if world.device.type == "cuda" else "float32"
    if dtype == "bfloat16" and world.device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise UserError(
            f"model.dtype is {config.model.dtype}, and this GPU has no bfloat16 of its own: set model.dtype=float32"
        )
    dtype = getattr(torch, dtype)

    listing = folder / "files.txt" if folder else None
    problem = None
    if world.main:
        try:
            model_path, data_path = builtin(config, data)
            _openings(model.load_tokenizer(model_path), config, forms)
            model.check_patches(model_path, ops.PatchSpec.from_pretrained(model_path))
            if data and (not listing or not listing.exists()):
                found = ImageFolder.scan(data_path)
                if listing:
                    if found.refused:
                        bad.write(folder / bad.NAME, bad.refusals(found))
                    write_whole(listing.with_name(ABOUT), found.about + "\n")
                    found.freeze(listing)
            if data and config.eval.path:
                ImageFolder.scan(config.eval.path)
        except (OSError, UserError) as error:
            problem = error
    distributed.agree(problem, world)
    model_path, data_path = builtin(config, data)

    tokenizer = model.load_tokenizer(model_path)
    limits = {k: v for k in ("min_pixels", "max_pixels") if (v := getattr(config.puzzles, k))}
    spec = ops.PatchSpec.from_pretrained(model_path, dtype=dtype, **limits)
    if data:
        series.check(_kinds(config), spec, config.puzzles.composed)
    images, evaluation = _images(config, data_path, listing) if data else (None, None)

    problem = None
    if folder and world.main:
        try:
            check_token_budget(config, images, tokenizer, spec)
        except UserError as error:
            problem = error
    distributed.agree(problem, world)

    network = model.skeleton(model_path)
    model.freeze(network, config.model.frozen)
    weights = SamplerWeights(network, dtype)
    train = config.train
    policy = parallel.shard(model.Policy(network), world, dtype, train.replicate, train.recompute, train.compile)
    parallel.materialize(policy, world.device)
    model.load_weights(policy.model, model_path)
    weights.attach(policy, world)
    names = "max_tokens wave_rows wave_groups batch_invariant look_every cuda_graphs".split()
    engine = Engine(weights.model, tokenizer, **{name: getattr(config.rollout, name) for name in names})
    opening = _openings(tokenizer, config, forms)
    return Built(
        config, world, folder, model_path, tokenizer, spec, images, evaluation, policy, weights, engine, opening
    )


def _openings(tokenizer, config, forms) -> str:
    """What the chat template opens in the configuration's form, or in the last of `forms`. Raises UserError where it opens <think> in a
    form without thinking."""
    opening = "" if forms else model.opening(tokenizer, config.puzzles.thinking)
    for form in forms:
        asked = "the direct form is asked for (a benchmark's, unless --form is given)"
        opening = model.opening(tokenizer, form == "thinking", asked, "give --form thinking")
    return opening


def check_token_budget(config, images, tokenizer, spec) -> None:
    """Raises UserError where a micro-batch can't hold a prompt with the longest completion, as puzzles of the largest files show,
    at each level that training may come to. What is longer still ends the run when it comes."""
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
                f"train.token_budget is {config.train.token_budget}: a prompt of {longest} tokens ({name}, level {level}) and "
                f"a completion of rollout.max_tokens={config.rollout.max_tokens} don't fit; set it to {needed} or more, or "
                "lower puzzles.max_pixels"
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
    images = Images(store, *store.folder.hold_out(config.data.holdout))
    if not config.eval.path:
        return images, images
    other = ImageStore(ImageFolder.scan(config.eval.path), decoder, config.data.min_side, room)
    everything = list(range(len(store.folder)))
    return replace(images, train=everything, held_out=[]), Images(other, [], list(range(len(other.folder))))
