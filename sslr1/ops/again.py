"""What a layer computes between its matrix products, kept for the backward pass as its inputs alone.

A matrix product keeps what it reads, for its matrix's gradient. Where that is cheap to compute (a norm, SwiGLU), its
inputs are kept anyway: by the residual sum that a norm reads, by the products that SwiGLU does. So what such an
operation returns is marked, on its storage, with how it came about; `linear` and `lora_linear` then keep its inputs in
place of it and compute it again in the backward pass, once for all products that read it.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Recipe(NamedTuple):
    """How a tensor came about: make(*inputs), in this shape; the version that it had then (another one: it has been
    written to since); and what the products that read it share."""

    make: object
    inputs: tuple
    shape: torch.Size
    version: int
    readers: object


class _Readers:
    """How many products have kept a recipe, and, in the backward pass, what it makes until the last of them has had
    it."""

    def __init__(self):
        self.count, self.left, self.made = 0, 0, None

    def take(self, make, shape, inputs):
        if self.made is None:
            with torch.no_grad():
                self.made, self.left = make(*inputs), self.count
        made = self.made
        self.left -= 1
        if self.left <= 0:
            self.made = None
        return made.view(shape)


def is_plain() -> bool:
    """Whether nothing is kept here: without gradients, or where torch.compile decides what is."""
    return torch.compiler.is_compiling() or not torch.is_grad_enabled()


def mark(out, make, *inputs):
    """`out`, which is make(*inputs), marked so that its readers keep the inputs in its place."""
    if out.is_contiguous():
        inputs = tuple(x.detach() for x in inputs)
        out.untyped_storage().recipe = Recipe(make, inputs, out.shape, out._version, _Readers())
    return out


def recipe_of(x) -> Recipe | None:
    """The mark of what `x` is, or is a view of, None where it has none or has been written to."""
    recipe = getattr(x.untyped_storage(), "recipe", None)
    if recipe is None or x._version != recipe.version or x.numel() != recipe.shape.numel() or not x.is_contiguous():
        return None
    return recipe


def to_keep(x) -> tuple:
    """(tensors, again): what to save for the backward pass of something that reads x, and a function that makes of
    them, as they are there, what x is. x itself, where it isn't marked."""
    recipe = None if torch.compiler.is_compiling() else recipe_of(x)
    if recipe is None:
        return (x,), _itself
    recipe.readers.count += 1
    return recipe.inputs, partial(recipe.readers.take, recipe.make, x.shape)


def _itself(tensors):
    return tensors[0]


def linear(x, weight, bias=None):
    """F.linear, which keeps a marked x as its inputs."""
    if is_plain() or not weight.requires_grad or recipe_of(x) is None:
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        tensors, ctx.again = to_keep(x)
        ctx.save_for_backward(weight, *tensors)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, *tensors = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        x = ctx.again(tensors)
        flat = grad.reshape(-1, grad.shape[-1])
        grad_x = (flat @ weight).view(x.shape) if wants_x else None
        grad_weight = flat.t() @ x.view(-1, x.shape[-1]) if wants_weight else None
        return grad_x, grad_weight, flat.sum(0) if wants_bias else None
