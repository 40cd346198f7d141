"""Training that goes on where it was stopped: the loop of bench/photos.py's supervised stages. The state is a
safetensors file: parameters, AdamW's moments, the step, what the stage notes, and what it was made by, which a later
slice must agree with.
"""

import json
import math
import os
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

MOMENTS = ("exp_avg", "exp_avg_sq")
EVERY_S = 300  # between two states at least
RISE = 0.05  # of the steps, over which the learning rate rises; then it falls as a cosine, where it falls


class OutOfTime(Exception):
    """The slice is over; what it has made is kept."""


class Deadline:
    """`hours` from now, None for none."""

    def __init__(self, hours=None):
        self.at = time.monotonic() + 3600 * hours if hours is not None else math.inf

    def over(self) -> bool:
        return time.monotonic() >= self.at

    def left_s(self) -> float:
        return self.at - time.monotonic()


def factor(step, steps, falls=True, rise=None) -> float:
    rise = max(1, round(RISE * steps) if rise is None else rise)
    if step < rise or not falls:
        return min(1.0, (step + 1) / rise)
    return 0.5 + 0.5 * math.cos(math.pi * (step - rise) / max(1, steps - rise))


def train(
    parameters,
    rates,
    loss_at,
    steps,
    *,
    kept,
    made_by,
    deadline,
    every=25,
    falls=True,
    rise=None,
    narrow=True,
    say=print,
    notes=None,
    over=None,
) -> float:
    """AdamW for `steps` steps of loss_at(step) -> (loss, {name: number}); returns the seconds of all slices. Raises
    OutOfTime, and ValueError where `kept` is of other settings.

    parameters: {name: Parameter}; rates: {name: learning rate at the top}; kept: the state's file; made_by: JSON-able;
    falls: whether the rate falls again; rise: over how many steps it rises, RISE of all unless given; narrow: whether
    to multiply in bfloat16, weights in float32; notes: a JSON-able dict that loss_at fills, kept with the state;
    over(): whether to stop before `steps`."""
    kept, notes = Path(kept), {} if notes is None else notes
    made_by = json.dumps({**made_by, "narrow": narrow}, sort_keys=True)
    options = dict(betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    groups = [{"params": [parameters[name]], "lr": rates[name], "top": rates[name]} for name in parameters]
    optimizer = torch.optim.AdamW(groups, **options)
    first, spent = _load(kept, parameters, optimizer, made_by, notes)
    if first:
        say(f"{kept.stem}: going on from step {first} of {steps}")
    began, written, last = time.monotonic(), time.monotonic(), first

    def save() -> float:
        seconds = spent + time.monotonic() - began
        _save(kept, parameters, optimizer, made_by, notes, last, seconds)
        return seconds

    for step in range(first, steps):
        if over is not None and over():
            break
        if deadline.over():
            save()
            raise OutOfTime(f"{kept.stem}: step {step} of {steps}")
        for group in optimizer.param_groups:
            group["lr"] = group["top"] * factor(step, steps, falls, rise)
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            loss, numbers = loss_at(step)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{kept.stem}: the loss of step {step} is {loss}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last = step + 1
        if step % every == 0 or step + 1 == steps:
            told = " ".join(f"{name} {value:.3f}" for name, value in {"loss": loss.item(), **numbers}.items())
            say(f"{kept.stem} {step + 1}/{steps} {spent + time.monotonic() - began:.0f} s {told}")
        if time.monotonic() - written > EVERY_S:
            save()
            written = time.monotonic()
    return save() if last > first else spent


def _save(kept, parameters, optimizer, made_by, notes, step, spent):
    tensors = {f"parameter.{name}": p.detach() for name, p in parameters.items()}
    for moment in MOMENTS:
        tensors |= {
            f"{moment}.{name}": optimizer.state[p][moment] for name, p in parameters.items() if optimizer.state[p]
        }
    partial = kept.with_suffix(".partial")
    kept.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    about = {"step": str(step), "spent": str(spent), "made_by": made_by, "notes": json.dumps(notes)}
    save_file(whole, partial, about)
    os.replace(partial, kept)


@torch.no_grad()
def _load(kept, parameters, optimizer, made_by, notes):
    """(step, seconds) of a state that is there, having filled parameters, moments and notes from it; else zeros."""
    if not kept.exists():
        return 0, 0.0
    with safe_open(kept, "pt") as file:
        about = file.metadata()
        if about["made_by"] != made_by:
            raise ValueError(f"{kept} was made by {about['made_by']}, now it is {made_by}: begin in another folder")
        step, names = int(about["step"]), set(file.keys())
        notes |= json.loads(about.get("notes", "{}"))
        for name, p in parameters.items():
            p.copy_(file.get_tensor(f"parameter.{name}"))
            if f"exp_avg.{name}" in names:
                found = {moment: file.get_tensor(f"{moment}.{name}") for moment in MOMENTS}
                optimizer.state[p] = {"step": torch.tensor(float(step)), **found}
    return step, float(about["spent"])
