"""Puzzles in TRL's GRPOTrainer: python examples/trl_grpo.py [IMAGES MODEL] [--out DIR] [--steps N] [--count N]

Without a folder of images and a Qwen2.5-VL a tiny one with random weights sees procedural scenes, a minute's work for a
CPU. It earns nothing, since nobody taught it to put its answer into a box: `make demo` does, and leaves both below
runs/:
    python examples/trl_grpo.py runs/builtin/scenes-2000 runs/demo/checkpoints/step-000120/hf --min-side 112
"""

import argparse
import importlib.util
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoProcessor, AutoTokenizer, Qwen2_5_VLProcessor
from trl import GRPOConfig, GRPOTrainer

from sslr1.data import Decoder, ImageFolder, ImageStore, Pool
from sslr1.data.scenes import write_scenes
from sslr1.integrations import trl as puzzles
from sslr1.model.tiny import build_tiny
from sslr1.ops import PatchSpec

MAX_PIXELS = 451584  # of a picture: 576 visual tokens of Qwen2.5-VL


def train(images, model, out, *, steps, count, min_side=252, thinking=True, reward=puzzles.reward, **options):
    """Train a model on `count` puzzles of a folder of images; returns the trainer. options: GRPOConfig's."""
    store = ImageStore(ImageFolder.scan(images), Decoder(max_side=768), min_side)
    spec = PatchSpec.from_pretrained(model)
    spec = replace(spec, max_pixels=min(spec.max_pixels, MAX_PIXELS))
    gpu = torch.cuda.is_available()
    trainer = GRPOTrainer(
        model=str(model),
        reward_funcs=reward,
        processing_class=processor(model),
        train_dataset=puzzles.dataset(Pool(store, range(len(store.folder))), count=count, spec=spec, thinking=thinking),
        args=GRPOConfig(
            str(out), max_steps=steps, logging_steps=1, report_to="none", use_cpu=not gpu, bf16=gpu, **options
        ),
    )
    trainer.train()
    return trainer


def processor(model):
    """Hugging Face's own; without torchvision, which only videos need, one for pictures alone."""
    if importlib.util.find_spec("torchvision"):
        return AutoProcessor.from_pretrained(model)
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class ForPictures(Qwen2_5_VLProcessor):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            self.image_token, self.video_token = "<|image_pad|>", None
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            super(Qwen2_5_VLProcessor, self).__init__(image_processor, tokenizer, chat_template=chat_template)

    tokenizer = AutoTokenizer.from_pretrained(model)
    return ForPictures(Qwen2VLImageProcessorPil.from_pretrained(model), tokenizer, tokenizer.chat_template)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("images", nargs="?", type=Path)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/trl"))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--min-side", type=int, default=252)
    asked = parser.parse_args()
    small = not torch.cuda.is_available()
    trainer = train(
        asked.images or write_scenes(asked.out / "scenes", 64, 288),
        asked.model or build_tiny(asked.out / "tiny"),
        asked.out,
        steps=asked.steps,
        count=asked.count,
        min_side=asked.min_side,
        thinking=not small,
        num_generations=8,
        per_device_train_batch_size=8,
        max_completion_length=16 if small else 512,
    )
    for line in trainer.state.log_history:
        print({name: line[name] for name in ("step", "loss", "reward", "grad_norm") if name in line})
