"""A whole GRPO step, from prompts to updated weights: ours against TRL's GRPOTrainer with its own generation.

Both sides have the same weights, pictures, questions, rewards, loss (DAPO, on policy), clipping and AdamW, and draw
exactly NEW tokens a completion. What favours TRL: its pictures are drawn and decoded before, where ours draws its
puzzles within the step; no logging, saving and data loading is timed; and no layer's forward pass runs twice (gradient
checkpointing, its default).
"""

import math
import tempfile
from importlib.metadata import PackageNotFoundError, version

import torch
from learner import NEW, TEXT_HEADS, VISION, G

from sslr1 import config, model, ops, puzzles
from sslr1.learner import Learner
from sslr1.model import parallel
from sslr1.model.tiny import build_tiny
from sslr1.rollout import Engine, SamplerWeights

PROMPTS = 2
TRL_ROWS = 4  # completions of one of TRL's passes


def rows():
    row = {
        "what": f"GRPO step: {PROMPTS} prompts of 400 image tokens, G = {G}, {NEW} new tokens, one optimiser step",
        "against": "TRL's GRPOTrainer with model.generate",
        "goal": "6",
    }
    try:
        row["against"] = f"TRL {version('trl')}'s GRPOTrainer with model.generate"
    except PackageNotFoundError:
        yield {**row, "ours": None, "peer": None, "why_not": "trl is not installed"}
        return
    folder = build_tiny(tempfile.mkdtemp(), text=TEXT_HEADS, vision=VISION, max_pixels=560 * 560)
    spec = ops.PatchSpec.from_pretrained(folder)
    images = [torch.randint(0, 256, (575, 575, 3), dtype=torch.uint8) for _ in range(PROMPTS)]

    def draw():
        return puzzles.make(images, "rotation", level=2, spec=spec, thinking=False, wordings=1)

    settings = config.check(
        {
            "model": {"path": str(folder)},
            "data": {"path": "-"},
            "rollout": {"prompts": PROMPTS, "group_size": G, "max_tokens": NEW},
            "optim": {"lr": 1e-4, "warmup_steps": 0},
        }
    )
    ours, learner, engine = make_ours(folder, draw, settings)
    with torch.random.fork_rng(devices=[]):  # the trainer sets the seed, which the rows behind this one draw from too
        peer, seen = make_peer(folder, draw(), settings, engine.suppressed)

    # TRL's first step on our learner: the same weights, completions and rewards make the same gradient
    loss, norm = peer()
    prompts = model.prompts(draw(), engine.tokenizer)
    assert all(int((p.input_ids == engine.model.config.image_token_id).sum()) == 400 for p in prompts)
    samples = [model.Sample(torch.tensor(ids), torch.zeros(len(ids)), "", "length") for ids in seen["tokens"]]
    groups = [model.Group(prompt, samples[G * n : G * n + G]) for n, prompt in enumerate(prompts)]
    found = learner.step(groups, torch.tensor(seen["rewards"]).view(PROMPTS, G))
    assert math.isfinite(norm) and abs(found["grad_norm"] - norm) <= 1e-3 * norm and abs(found["loss"] - loss) <= 1e-5
    groups, found = ours()
    assert math.isfinite(found["loss"]) and found["grad_norm"] > 0
    drawn = [len(s.tokens) for group in groups for s in group.samples]
    assert drawn == [len(ids) for ids in seen["tokens"]] == [NEW] * PROMPTS * G
    yield {**row, "ours": ours, "peer": peer}
    parallel.stop()


def reward(answer, text):
    """The puzzle's own, which is 0 for whatever random weights say, and the share of different characters, so that a
    group's rewards differ and there is a gradient."""
    return puzzles.score(answer, text, thinking=False).reward + len(set(text)) / max(1, len(text))


def make_ours(folder, draw, settings):
    """(a function that makes one step as sslr1/train.py's loop does and returns groups and metrics, learner, engine)"""
    world, tokenizer = parallel.start("cpu"), model.load_tokenizer(folder)
    network = model.skeleton(folder)
    weights = SamplerWeights(network, torch.float32)
    policy = parallel.shard(model.Policy(network), world)
    parallel.materialize(policy, world.device)
    model.load_weights(policy.model, folder)
    weights.attach(policy, world)
    engine = Engine(weights.model, tokenizer, max_tokens=NEW)
    engine.suppressed, engine.stop_ids = sorted({*engine.suppressed, *engine.stop_ids}), [-1]  # none stops early
    learner = Learner(
        policy,
        world,
        optim=settings.optim,
        loss=settings.loss,
        temperature=settings.rollout.temperature,
        max_tokens=NEW,
        token_budget=settings.train.token_budget,
        steps=settings.train.steps,
    )

    def ours():
        batch = draw()
        prompts = model.prompts(batch, tokenizer)
        groups = engine.generate(prompts, group_size=G, step=learner.step_number)
        rewards = [[reward(answer, s.text) for s in group.samples] for answer, group in zip(batch.answers, groups)]
        learned = learner.step(groups, torch.tensor(rewards))
        weights.refresh(policy)
        return groups, learned

    return ours, learner, engine


def make_peer(folder, batch, settings, suppressed):
    """(a function that makes one optimiser step by the calls of `Trainer.train` and returns loss and gradient norm, a
    dict of what TRL's reward function last saw and gave)"""
    from datasets import Dataset
    from PIL import Image
    from trl import GRPOConfig, GRPOTrainer

    data = {"prompt": [], "image": [], "number": list(range(PROMPTS))}
    for question, (canvas,) in zip(batch.questions, batch.render()):
        data["prompt"].append([{"role": "user", "content": question.removeprefix("<image>")}])
        data["image"].append(Image.fromarray(canvas.numpy()))
    seen = {}

    def rewards(completions, completion_ids, number, **_):
        found = [reward(batch.answers[n], message["content"]) for n, (message,) in zip(number, completions)]
        seen.update(tokens=completion_ids, rewards=found)
        return found

    optim, loss, rollout = settings.optim, settings.loss, settings.rollout
    trainer = GRPOTrainer(
        model=model.load_model(folder),
        reward_funcs=rewards,
        processing_class=make_processor(folder),
        train_dataset=Dataset.from_dict(data),
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            shuffle_dataset=False,
            per_device_train_batch_size=TRL_ROWS,
            gradient_accumulation_steps=PROMPTS * G // TRL_ROWS,
            num_generations=G,
            max_completion_length=NEW,
            generation_kwargs={"min_new_tokens": NEW, "suppress_tokens": suppressed},
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            loss_type=loss.loss_type,
            epsilon=loss.clip_low,
            epsilon_high=loss.clip_high,
            beta=0.0,
            learning_rate=optim.lr,
            lr_scheduler_type=optim.schedule,
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            adam_epsilon=optim.eps,
            weight_decay=optim.weight_decay,
            max_grad_norm=optim.clip_norm,
        ),
    )
    loader = trainer.get_train_dataloader()
    network, _ = trainer._prepare_for_training(1 << 20, loader, None)
    passes = trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    drawn = next(iter(loader))  # a row for each completion; the first pass generates and scores for all
    assert [row["number"] for row in drawn] == [n for n in range(PROMPTS) for _ in range(G)]

    def peer():
        loss = sum(float(trainer.training_step(network, drawn, None)) for _ in range(passes))
        norm = float(trainer._clip_grad_norm(network))
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        network.zero_grad()
        trainer.state.global_step += 1
        return loss, norm

    return peer, seen


def make_processor(folder):
    """Hugging Face's processor of the folder without one for videos, which would need torchvision."""
    from transformers import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class ImageProcessor(Qwen2_5_VLProcessor):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            self.image_token, self.video_token = "<|image_pad|>", None
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            super(Qwen2_5_VLProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)

    tokenizer = model.load_tokenizer(folder)
    return ImageProcessor(Qwen2VLImageProcessorPil.from_pretrained(folder), tokenizer, tokenizer.chat_template)
