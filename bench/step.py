"""A whole GRPO step, from prompts to updated weights. On a CPU ours against TRL's GRPOTrainer with its own generation:
2 prompts and a small model. On a GPU three steps of 64 prompts and a model of the 3B shape, by phase; and TRL at a size
where it comes to an end.

Both sides have the same weights, pictures, questions, rewards, loss (DAPO, on policy), clipping and AdamW, and draw
exactly as many tokens a completion. What favours TRL: its pictures are drawn and decoded before, where ours draws its
puzzles within the step; no logging, saving and data loading is timed; and on the CPU no layer's forward pass runs twice
(gradient checkpointing, its default, which both sides have on the GPU). On a GPU TRL's weights, gradients and moments
are all bfloat16, so that both sides fit; ours are float32 but for the moments. What favours ours: on AMD's CPUs with
AVX-512 its float32 products go to oneDNN (sslr1/ops/products.py), TRL's to MKL, as torch has it.
"""

import math
import tempfile
import time
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise

import torch
from grpo import LARGE, SMALL, TINY, Case
from row import Row, Sides, finish

from sslr1 import model, puzzles

TRL_ROWS = 4  # completions of one of TRL's passes
STEPS = 3  # by phase; the first one compiles and captures
PHASES = ("draw and render", "generate", "reward", "learn", "refresh")
SHAPES = {
    "cpu": (SMALL, dict(visual=400, prompts=2, group_size=16, new=32)),
    "cuda": (LARGE, dict(visual=400, prompts=64, group_size=8, new=200)),
    "dry": (TINY, dict(visual=16, prompts=4, group_size=4, new=6)),
}
AGAINST_TRL = {
    "cpu": SHAPES["cpu"],
    "cuda": (LARGE, dict(visual=400, prompts=4, group_size=8, new=64)),
    "dry": SHAPES["dry"],
}


def rows(mode):
    """On a GPU the steps by phase, `rows_against_trl` apart from them."""
    return rows_against_trl(mode) if mode == "cpu" else rows_by_phase(mode)


def counted(shape, sizes, mode):
    called = f", {shape.called}" if mode != "cpu" else ""
    return (
        f"GRPO step{called}: {sizes['prompts']} prompts of {sizes['visual']} image tokens, G = {sizes['group_size']}, "
        f"{sizes['new']} new tokens, one optimiser step"
    )


def rows_by_phase(mode):
    shape, sizes = SHAPES[mode]
    made = cache(lambda: PhasedStep(Case(shape, **sizes)))  # when the first row is measured
    what = counted(shape, sizes, mode)
    return [
        Row(what=f"{what}, {n} of {STEPS}", make=lambda: Sides(ours=made(), facts=made().facts, once=True))
        for n in range(1, STEPS + 1)
    ]


class PhasedStep:
    """Calls make one step each; `facts`: where its time went, and what it took."""

    def __init__(self, case):
        self.case, self.engine, self.learner = case, case.engine(case.weights.model), case.learner  # made untimed

    def __call__(self):
        marks, peaks = [], []

        def mark():
            finish()
            marks.append(time.perf_counter())
            if self.case.shape.device == "cuda":
                peaks.append(torch.cuda.max_memory_allocated() / 1e9)

        if self.case.shape.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        mark()
        _, learned = one_step(self.case, self.engine, mark)
        seconds = dict(zip(PHASES, (b - a for a, b in pairwise(marks))))
        return learned, seconds, peaks

    def facts(self, found):
        learned, seconds, peaks = found
        case = self.case
        whole, drawn = sum(seconds.values()), case.prompts * case.group_size * case.new
        return {
            "phases_s": seconds,
            "tokens_s": {
                "drawn, of generate": drawn / seconds["generate"],
                "computed, of learn": learned.computed / seconds["learn"],
                "drawn, of the step": drawn / whole,
            },
            "learn": {"s": seconds["learn"], "flops": learned.flops},
            "gap_to_sampler": learned.metrics["sampling/logp_difference/mean"],
            "grad_norm": learned.metrics["grad_norm"],
            "planned_gb": case.planned_gb(kept=self.engine.kept_bytes > 0),
        } | ({"peak_gb": max(peaks), "peak_gb_generate": peaks[2]} if peaks else {})


def one_step(case, engine, mark=lambda: None):
    """As sslr1/train.py's loop makes one; (groups, metrics). mark: called after each of PHASES."""
    batch = case.draw()
    prompts = model.prompts(batch, case.tokenizer)
    mark()
    groups = engine.generate(prompts, group_size=case.group_size, step=case.learner.step_number)
    mark()
    rewards = [[reward(answer, s.text) for s in group.samples] for answer, group in zip(batch.answers, groups)]
    mark()
    case.make_room(engine)
    learned = case.learner.step(groups, torch.tensor(rewards))
    mark()
    case.weights.refresh(case.policy)
    mark()
    return groups, learned


def rows_against_trl(mode):
    shape, sizes = AGAINST_TRL[mode]
    return [
        Row(
            what=counted(shape, sizes, mode),
            against="TRL's GRPOTrainer with model.generate",
            goal="6" if mode == "cpu" else "3",
            make=partial(against_trl, shape, sizes, mode),
        )
    ]


def against_trl(shape, sizes, mode):
    if mode == "cuda":
        version("trl")  # without it the row is none: ours has rows of its own
    case = Case(shape, **sizes)
    G, NEW = case.group_size, case.new
    engine = case.engine(case.weights.model)

    @cache
    def trainer():
        version("trl")
        with torch.random.fork_rng(
            devices=[]
        ):  # the trainer sets the seed, which the rows after this one draw from too
            return make_peer(case, engine.suppressed)

    def check(mine, theirs):
        groups, found = mine
        assert math.isfinite(found.metrics["loss"]) and found.metrics["grad_norm"] > 0
        assert [len(s.tokens) for group in groups for s in group.samples] == [NEW] * case.prompts * G
        if theirs is None:
            return
        # TRL's first step on our learner, whose weights a step at the rise's foot has hardly moved: the same
        # completions and rewards make the same gradient
        (loss, norm), seen = theirs, trainer()[1]
        prompts = model.prompts(case.draw(), engine.tokenizer)
        assert all(int((p.input_ids == engine.model.config.image_token_id).sum()) == case.visual for p in prompts)
        samples = [model.Sample(torch.tensor(ids), torch.zeros(len(ids)), "", "length") for ids in seen["tokens"]]
        groups = [model.Group(prompt, samples[G * n : G * n + G]) for n, prompt in enumerate(prompts)]
        found = case.learner.step(groups, torch.tensor(seen["rewards"]).view(case.prompts, G))
        near = 1e-3 if case.dtype == torch.float32 else 0.05
        assert (
            math.isfinite(norm)
            and abs(found.metrics["grad_norm"] - norm) <= near * norm
            and abs(found.metrics["loss"] - loss) <= near
        )
        assert [len(ids) for ids in seen["tokens"]] == [NEW] * case.prompts * G

    def facts(_):
        try:
            return {"peer": f"TRL {version('trl')}"}
        except PackageNotFoundError:
            return {}

    return Sides(ours=lambda: one_step(case, engine), peer=lambda: trainer()[0](), check=check, facts=facts)


def reward(answer, text):
    """The puzzle's own, which is 0 for whatever random weights say, and the share of different characters, so that a
    group's rewards differ and there is a gradient."""
    return puzzles.score(answer, text, thinking=False).reward + len(set(text)) / max(1, len(text))


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
            chat_template_kwargs={"enable_thinking": False},  # as `Case.draw` has it
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
