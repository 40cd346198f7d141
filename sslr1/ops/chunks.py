"""Rows of states through the head, a chunk at a time: the only place where logits exist."""

import torch

from sslr1.ops import row_loss as rows

SMALL = 16.0  # logits (over the temperature) that float32 sums well enough
LEADERS = 8  # how many of a row's largest it sums again otherwise


def float_logits(hidden, lm_head):
    """Logits [N, V] in float32 (float64 for float64) from states and head, unrounded. No gradient on GPUs."""
    return product(hidden, lm_head.T, wide_dtype(hidden.dtype))


def wide_dtype(dtype):
    return torch.promote_types(dtype, torch.float32)  # rounded logits would put per cents of error into the ratio


def product_dtype(hidden):
    """What is multiplied: a GPU's states, head and logits' gradients as the model computes, while a CPU is no slower in
    float32. Sums are wide in both."""
    return hidden.dtype if hidden.is_cuda else wide_dtype(hidden.dtype)


def product(a, b, dtype, out=None):
    """a @ b, summed and given in `dtype`."""
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype, out=out)
    return torch.mm(a.to(dtype), b.to(dtype), out=out)


def add_product(into, a, b):
    """into += a @ b, summed in the dtype of `into`."""
    if a.is_cuda and a.dtype != into.dtype:
        torch.addmm(into, a, b, out_dtype=into.dtype, out=into)
    else:
        into.addmm_(a.to(into.dtype), b.to(into.dtype))


def default_height(N, D, device) -> int:
    """Rows whose logits exist at a time, unless given: where the matrix products have their full rate already."""
    most = (8192 if D >= 3072 else 4096) if device == "cuda" else 256
    return min(most, 1 << max(4, (N - 1).bit_length()))


class Chunks:
    """Rows of states through the head, `height` at a time and always filled up to that: a matrix product of another
    height rounds differently, and a row must not depend on how many others there are."""

    def __init__(self, hidden, lm_head, tokens, temperature, backend, height):
        N, D = hidden.shape
        self.hidden, self.tokens, self.temperature, self.wide = hidden, tokens, temperature, wide_dtype(hidden.dtype)
        self.backend = rows.choose_backend(backend, self.wide, hidden.device)
        self.height = height or default_height(N, D, hidden.device.type)
        self.dtype = product_dtype(hidden)
        self.weight = lm_head.to(self.dtype)
        self.states = hidden.new_zeros(self.height, D, dtype=self.dtype)
        self.logits = hidden.new_empty(self.height, len(lm_head), dtype=self.wide)
        self.slopes = hidden.new_empty(self.height, len(lm_head), dtype=self.dtype) if self.dtype != self.wide else None
        self.exact = None
        self.logprobs, self.entropy = (hidden.new_empty(N, dtype=self.wide) for _ in range(2))

    def over(self, numbers):
        """(row numbers, tokens, logits) of chunk after chunk, until the next; tokens, logits and `states` filled up."""
        for index in numbers.split(self.height) if len(numbers) else ():
            self.states[: len(index)] = self.hidden.index_select(0, index)
            self.states[len(index) :].zero_()
            product(self.states, self.weight.T, self.wide, out=self.logits)
            picked = self.fill(self.tokens, index)
            if self.hidden.dtype == torch.float32:
                self.sharpen(picked)
            yield index, picked, self.logits

    def sharpen(self, picked):
        """Form once more in float64, in rows with logits beyond SMALL, the few of them that a log-prob is made of, and
        shift the row so that its largest is 0: of a sum as large as 90 float32 leaves 1e-5 or 2e-5, and off-policy
        e^(logp - old) is wrong by as much."""
        large = torch.maximum(self.logits.amax(1), -self.logits.amin(1)) > SMALL * self.temperature
        if not large.is_cuda and not large.any():  # a GPU would have to wait for the answer
            return
        places = torch.cat([picked[:, None], self.logits.topk(min(LEADERS, self.logits.shape[1])).indices], 1)
        if self.exact is None:  # kept from chunk to chunk: what comes and goes leaves holes
            two = self.states.new_empty(2, *self.states.shape, dtype=torch.float64)
            self.exact = (*two, torch.empty_like(self.states))
        states, weights, found = self.exact
        states.copy_(self.states)
        exact = []
        for place in places.unbind(1):
            weights.copy_(torch.index_select(self.weight, 0, place, out=found))
            exact.append(weights.mul_(states).sum(1))
        exact = torch.stack(exact, 1)
        # A softmax sees no shift: less the largest, those that count are small, and float32 keeps their digits
        shift = torch.where(large, exact.amax(1), 0.0).to(self.wide)[:, None]
        self.logits.sub_(shift)
        sharp = torch.where(large[:, None], (exact - shift).to(self.wide), self.logits.gather(1, places))
        self.logits.scatter_(1, places, sharp)

    def fill(self, column, index):
        """column[index] and zeros up to the chunk's height."""
        return torch.cat([column[index], column.new_zeros(self.height - len(index))])

    def note(self, index, found):
        self.logprobs[index], self.entropy[index] = (x[: len(index)] for x in found)

    def statistics(self, numbers):
        for index, picked, logits in self.over(numbers):
            self.note(index, rows.row_logprobs(logits, picked, self.temperature, self.backend))
