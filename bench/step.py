"""A whole GRPO step, from prompts to updated weights: ours against TRL's GRPOTrainer with its own generation. On a CPU 2 prompts and
a small model; on a GPU 64 prompts and one of the 3B shape.

Both sides have the same weights, pictures, questions, rewards, loss (DAPO, on policy), clipping and AdamW, and draw
exactly as many tokens a completion. What favours TRL: its pictures are drawn and decoded before, where ours draws its
puzzles within the step; no logging, saving and data loading is timed; and on the CPU no layer's forward pass runs twice (gradient
checkpointing, its default, which both sides have on the GPU). There its weights, gradients and moments are all bfloat16, so that both
sides fit; ours are float32 but for the moments.
"""

import math
import tempfile
from importlib.metadata import PackageNotFoundError, version

import torch
from grpo import SMALL, Case, shape

from sslr1 import model, puzzles
from sslr1.model import parallel

TRL_ROWS = 4  # completions of one of TRL's passes


def rows():
    small = shape() is SMALL
    yield row(Case(SMALL, 400, 2, 16, 32) if small else Case(shape(), 400, 64, 8, 200))
    parallel.stop()


def row(case):
    G, NEW = case.group_size, case.new
    called = "" if case.shape is SMALL else f", {case.shape.called}"
    out = {
        "what": f"GRPO step{called}: {case.prompts} prompts of {case.visual} image tokens, G = {G}, {NEW} new tokens, one optimiser step",
        "against": "TRL's GRPOTrainer with model.generate",
        "goal": "6" if case.shape is SMALL else "3",
        "device": case.shape.device,
    }
    ours, engine = make_ours(case)
    groups, found = ours()
    assert math.isfinite(found["loss"]) and found["grad_norm"] > 0
    assert [len(s.tokens) for group in groups for s in group.samples] == [NEW] * case.prompts * G
    if case.shape.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        ours()
        out["peak_gb"] = [torch.cuda.max_memory_allocated() / 1e9, case.planned_gb()]
    try:
        out["against"] = f"TRL {version('trl')}'s GRPOTrainer with model.generate"
    except PackageNotFoundError:
        return {**out, "ours": ours, "peer": None, "why_not": "trl is not installed"}
    with torch.random.fork_rng(devices=[]):  # the trainer sets the seed, which the rows behind this one draw from too
        try:
            peer, seen = make_peer(case, engine.suppressed)
            loss, norm = peer()
        except torch.OutOfMemoryError as problem:
            return {**out, "ours": ours, "peer": None, "why_not": f"can't run: {str(problem)[:90]}"}

    # TRL's first step on our learner, whose weights a step at the rise's foot has hardly moved: the same completions and rewards
    # make the same gradient
    prompts = model.prompts(case.draw(), engine.tokenizer)
    assert all(int((p.input_ids == engine.model.config.image_token_id).sum()) == case.visual for p in prompts)
    samples = [model.Sample(torch.tensor(ids), torch.zeros(len(ids)), "", "length") for ids in seen["tokens"]]
    groups = [model.Group(prompt, samples[G * n : G * n + G]) for n, prompt in enumerate(prompts)]
    found = case.learner.step(groups, torch.tensor(seen["rewards"]).view(case.prompts, G))
    near = 1e-3 if case.dtype == torch.float32 else 0.05
    assert math.isfinite(norm) and abs(found["grad_norm"] - norm) <= near * norm and abs(found["loss"] - loss) <= near
    assert [len(ids) for ids in seen["tokens"]] == [NEW] * case.prompts * G
    return {**out, "ours": ours, "peer": peer}


def reward(answer, text):
    """The puzzle's own, which is 0 for whatever random weights say, and the share of different characters, so that a
    group's rewards differ and there is a gradient."""
    return puzzles.score(answer, text, thinking=False).reward + len(set(text)) / max(1, len(text))


def make_ours(case):
    """(a function that makes one step as sslr1/train.py's loop does and returns groups and metrics, engine)"""
    engine = case.engine(case.weights.model)

    def ours():
        batch = case.draw()
        prompts = model.prompts(batch, case.tokenizer)
        groups = engine.generate(prompts, group_size=case.group_size, step=case.learner.step_number)
        rewards = [[reward(answer, s.text) for s in group.samples] for answer, group in zip(batch.answers, groups)]
        learned = case.learner.step(groups, torch.tensor(rewards))
        case.weights.refresh(case.policy)
        return groups, learned

    return ours, engine


def make_peer(case, suppressed):
    """(a function that makes one optimiser step by the calls of `Trainer.train` and returns loss and gradient norm, a
    dict of what TRL's reward function last saw and gave)"""
    from datasets import Dataset
    from PIL import Image
    from trl import GRPOConfig, GRPOTrainer

    G, batch, small = case.group_size, case.draw(), case.shape.device == "cpu"
    data = {"prompt": [], "image": [], "number": list(range(case.prompts))}
    for question, (canvas,) in zip(batch.questions, batch.render()):
        data["prompt"].append([{"role": "user", "content": question.removeprefix("<image>")}])
        data["image"].append(Image.fromarray(canvas.numpy()))
    seen = {}

    def rewards(completions, completion_ids, number, **_):
        found = [reward(batch.answers[n], message["content"]) for n, (message,) in zip(number, completions)]
        seen.update(tokens=completion_ids, rewards=found)
        return found

    optim, loss = case.optim, case.loss
    trainer = GRPOTrainer(
        model=model.load_model(case.folder, case.dtype),
        reward_funcs=rewards,
        processing_class=make_processor(case.folder),
        train_dataset=Dataset.from_dict(data),
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            report_to="none",
            use_cpu=small,
            bf16=not small,
            gradient_checkpointing=not small,
            shuffle_dataset=False,
            per_device_train_batch_size=TRL_ROWS,
            gradient_accumulation_steps=case.prompts * G // TRL_ROWS,
            num_generations=G,
            max_completion_length=case.new,
            generation_kwargs={"min_new_tokens": case.new, "suppress_tokens": suppressed},
            temperature=1.0,
            top_p=1.0,
            top_k=0,
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
    assert [row["number"] for row in drawn] == [n for n in range(case.prompts) for _ in range(G)]

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
