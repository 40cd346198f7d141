"""The loss, forward and backward, from hidden states and head to their gradients, against everything that computes the
same."""

import statistics
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path

import torch
from row import Row, Sides, device_of

from sslr1 import ops
from sslr1.ops import row_loss

G, ENTROPY = 8, 0.01
SHAPES = {
    "cpu": [(2048, 512, 32_000, torch.float32)],
    "cuda": [(16_384, 2048, 151_936, torch.bfloat16), (16_384, 3584, 152_064, torch.bfloat16)],
    "dry": [(128, 32, 301, torch.bfloat16)],
}


class Case:
    """Random states, head and tokens, 64 completions; each loss is a function of nothing that leaves gradients
    behind."""

    def __init__(self, N, D, V, dtype, device, equal_rewards=0):
        self.hidden = torch.randn(N, D, device=device).to(dtype).requires_grad_()
        self.head = (3 * torch.randn(V, D, device=device) / D**0.5).to(dtype).requires_grad_()
        self.tokens = torch.randint(0, V, (N,), device=device)
        self.sequence = torch.arange(N, device=device) * 64 // N
        self.rewards = torch.rand(64 // G, G, device=device)
        self.rewards[:equal_rewards] = 0.5
        self.advantage = ops.advantages(self.rewards).reshape(-1)[self.sequence].to(dtype)

    def ours_with_entropy(self):
        return self.ours(ENTROPY)

    def gradients(self, loss):
        loss.backward()
        found = self.hidden.grad, self.head.grad
        self.hidden.grad = self.head.grad = None
        return found

    def of(self, logprobs):
        """On-policy dapo."""
        return -((logprobs - logprobs.detach()).exp() * self.advantage).sum() / len(self.tokens)

    def ours(self, entropy=0.0):
        data = (self.hidden, self.head, self.tokens, self.sequence, self.rewards)
        return self.gradients(ops.grpo_loss(*data, entropy_coef=entropy).loss)

    def eager(self):
        """All logits at once, with the entropy as a part of the loss."""
        all_logprobs = (self.hidden @ self.head.T).float().log_softmax(-1)
        entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
        logprobs = all_logprobs.gather(-1, self.tokens[:, None])[:, 0]
        return self.gradients(self.of(logprobs) - ENTROPY * entropy.mean())

    def eager_trl(self):
        """The same by TRL's own function."""
        from trl.trainer.utils import selective_log_softmax_and_entropy

        logprobs, entropy = selective_log_softmax_and_entropy(self.hidden @ self.head.T, self.tokens)
        return self.gradients(self.of(logprobs) - ENTROPY * entropy.mean())

    def trl(self):
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        found = ChunkedLogProbFunction.apply(
            self.hidden, self.head, None, self.tokens, 1.0, 16_384, None, 1.0, ("entropy",)
        )
        return self.gradients(self.of(found[0]) - ENTROPY * found[1].mean())

    def liger(self):
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="dapo", compiled=self.hidden.is_cuda)
        S, T = 64, len(self.tokens) // 64
        advantages = ops.advantages(self.rewards).reshape(-1)
        mask = torch.ones(S, T, device=self.hidden.device)
        states = self.hidden.view(S, T, -1)
        return self.gradients(loss(states, self.head, self.tokens.view(S, T), mask, advantages)[0])

    def liger_cross_entropy(self):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return self.gradients(LigerFusedLinearCrossEntropyLoss()(self.head, self.hidden, self.tokens))

    def cut_cross_entropy(self):
        from cut_cross_entropy import linear_cross_entropy

        return self.gradients(linear_cross_entropy(self.hidden, self.head, self.tokens))

    def quack(self):
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        return self.gradients(chunked_linear_cross_entropy(self.hidden, self.head, self.tokens))

    def products(self, height=4096):
        """The three matrix products that no loss can do without."""
        height = height if self.hidden.is_cuda else 256
        with torch.no_grad():
            grad_head = torch.zeros_like(self.head)
            for states in self.hidden.split(height):
                logits = states @ self.head.T
                logits @ self.head
                grad_head.addmm_(logits.T, states)


def error(found, exact):
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact))


# (against, the peer, ours, goals on a CPU and a GPU); by value
PEERS = (
    ("the three bare matrix products in chunks", "products", "ours", ("", "0.87")),
    ("eager: all logits at once, with an entropy bonus", "eager", "ours_with_entropy", ("1.11", "")),
    ("eager, TRL's function, with an entropy bonus", "eager_trl", "ours_with_entropy", ("1.11", "")),
    ("TRL's chunked log-probs, with an entropy bonus", "trl", "ours_with_entropy", ("", "1.3")),
    ("LigerFusedLinearGRPOLoss", "liger", "ours", ("", "5")),
    ("Liger's fused linear cross-entropy", "liger_cross_entropy", "ours", ("", "2.5")),
    ("cut-cross-entropy", "cut_cross_entropy", "ours", ("", "")),
    ("quack's chunked linear cross-entropy", "quack", "ours", ("", "0.95")),
)


def rows(mode):
    found = []
    for N, D, V, dtype in SHAPES[mode]:
        case, shape = (N, D, V, dtype, device_of(mode)), f"N={N:,} D={D} V={V:,} {str(dtype).removeprefix('torch.')}"
        against_peers = [
            Row(
                what=f"loss, forward and backward: {shape}",
                against=against,
                goal=goals[mode != "cpu"],
                make=partial(against_peer, case, peer, ours, mode),
            )
            for against, peer, ours, goals in PEERS
        ]
        found += [
            against_peers[0],
            row_of_kernel(V, dtype, mode),
            Row(
                what=f"the same, half of the groups with equal rewards: {shape}",
                against="ours with all groups of unequal rewards",
                goal="1.33",
                make=partial(half_of_the_groups, case),
            ),
            Row(
                what=f"log-probs and entropy, no gradient: {shape}",
                against="eager: all logits at once",
                make=partial(without_gradient, case, mode),
            ),
            *against_peers[1:],
        ]
    return found


def against_peer(arguments, peer, ours, mode):
    N, D, V, dtype, device = arguments
    case, memory = Case(*arguments), cuda_peak if device == "cuda" else None
    if mode == "cpu" and ours == "ours_with_entropy":
        memory = lambda run: peak(run.__name__, N, D, V)  # noqa: E731
    return Sides(
        ours=getattr(case, ours),
        peer=getattr(case, peer),
        check=lambda *_: check(device, dtype),
        memory=memory,
        flops=6 * N * D * V,
        alone=peer == "products",
    )


def half_of_the_groups(arguments):
    return Sides(ours=Case(*arguments, equal_rewards=4).ours, peer=Case(*arguments).ours)


def without_gradient(arguments, mode):
    N, D, V, _, device = arguments
    case = Case(*arguments)

    @torch.no_grad()
    def eager():
        all_logprobs = (case.hidden @ case.head.T).float().log_softmax(-1)
        -(all_logprobs.exp() * all_logprobs).sum(-1)
        return all_logprobs.gather(-1, case.tokens[:, None])

    def ours():
        return ops.token_logprobs(case.hidden.detach(), case.head.detach(), case.tokens)

    return Sides(ours=ours, peer=eager, memory=cuda_peak if device == "cuda" else None, flops=2 * N * D * V)


def row_of_kernel(V, dtype, mode):
    height = {"cpu": 256, "cuda": 4096, "dry": 8}[mode]
    return Row(
        what=f"row kernel: {height:,} rows of logits to their gradient, V={V:,} {str(dtype).removeprefix('torch.')}",
        against="plain PyTorch in float64",
        make=partial(row_kernel, height, V, dtype, device_of(mode)),
    )


def row_kernel(height, V, dtype, device):
    """A chunk's logits to their gradient: what stands between the loss's matrix products."""
    logits, start = (torch.empty(height, V, device=device) for _ in range(2))
    start.normal_(std=3)
    logits.copy_(start)
    apart = device == "cuda" and dtype != torch.float32  # a CPU's products take float32, so in place
    slopes = torch.empty(height, V, device=device, dtype=dtype) if apart else logits
    tokens = torch.randint(0, V, (height,), device=device)
    ones = torch.ones(height, device=device)
    data = row_loss.Coefficients(torch.randn(height, device=device), ones / height, 0 * ones, 0.01 * ones)

    def run(backend):
        return row_loss.row_loss(logits, tokens, data, 1.0, backend, slopes)

    def check(mine, theirs):
        logits.copy_(start)
        expected = run("reference")[0]
        logits.copy_(start)
        assert (run(backend)[0] - expected).abs().max() <= 1e-4
        logits.copy_(start)

    backend = row_loss.choose_backend("auto", torch.float32, logits.device)
    return Sides(
        ours=lambda: run(backend),
        peer=lambda: run("reference"),
        check=check,
        facts=lambda _: {"backend": backend},
        bytes=logits.nbytes + slopes.nbytes,
    )


def cuda_peak(run) -> float:
    """MB that a call adds on the GPU; not its first, which compiles."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    torch.cuda.synchronize()
    del kept
    return (torch.cuda.max_memory_allocated() - before) / 1e6


@cache
def check(device, dtype):
    """Ours against float64 on a smaller case of the same kind."""
    small = Case(512, 64, 5003, dtype, device)
    found = small.ours()
    exact = Case.__new__(Case)
    exact.__dict__ = {k: v.detach().double() if v.is_floating_point() else v for k, v in small.__dict__.items()}
    exact.advantage = ops.advantages(small.rewards).reshape(-1)[small.sequence].double()
    exact.hidden.requires_grad_(), exact.head.requires_grad_()
    logits = (exact.hidden @ exact.head.T).log_softmax(-1)
    wanted = exact.gradients(exact.of(logits.gather(-1, exact.tokens[:, None])[:, 0]))
    off, bound = error(found, wanted), 1e-5 if dtype == torch.float32 else 4e-3
    assert off <= bound, f"the gradient is {off:.2g} off that in float64, {bound:.0e} are allowed"


def peak(name, N, D, V) -> float:
    """MB that one call adds to a process of its own."""
    command = [sys.executable, __file__, name, *map(str, (N, D, V))]
    return statistics.median(float(subprocess.check_output(command)) for _ in range(3))


if __name__ == "__main__":  # in that process
    name, *shape = sys.argv[1:]
    torch.manual_seed(time.time_ns() % 2**31)
    case = Case(*map(int, shape), torch.float32, "cpu")

    def status(field):  # not ru_maxrss, which a process takes over from the one that starts it
        (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)]
        return int(line.split()[1]) / 1024

    before = status("VmRSS")
    getattr(case, name)()
    print(status("VmHWM") - before)
