"""The loss, forward and backward, from hidden states and head to their gradients, against everything that computes the same."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from sslr1 import ops
from sslr1.ops import row_loss

G, ENTROPY = 8, 0.01
SHAPES = {
    "cpu": [(2048, 512, 32_000, torch.float32)],
    "cuda": [(16_384, 2048, 151_936, torch.bfloat16), (16_384, 3584, 152_064, torch.bfloat16)],
}


class Case:
    """Random states, head and tokens, 64 completions; each loss is a function of nothing that leaves gradients behind."""

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


def rows():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for N, D, V, dtype in SHAPES[device]:
        case = Case(N, D, V, dtype, device)
        shape = f"N={N:,} D={D} V={V:,} {str(dtype).removeprefix('torch.')}"
        check(device, dtype)
        cpu, bonus = device == "cpu", "with an entropy bonus"
        peers = [
            (f"eager: all logits at once, {bonus}", case.eager, case.ours_with_entropy, "1.11" if cpu else ""),
            (f"eager, TRL's function, {bonus}", case.eager_trl, case.ours_with_entropy, "1.11" if cpu else ""),
            (f"TRL's chunked log-probs, {bonus}", case.trl, case.ours_with_entropy, "" if cpu else "1.3"),
            ("LigerFusedLinearGRPOLoss", case.liger, case.ours, "" if cpu else "5"),
            ("Liger's fused linear cross-entropy", case.liger_cross_entropy, case.ours, "" if cpu else "2.5"),
            ("cut-cross-entropy", case.cut_cross_entropy, case.ours, ""),
            ("quack's chunked linear cross-entropy", case.quack, case.ours, "" if cpu else "0.95"),
            ("the three bare matrix products in chunks", case.products, case.ours, "" if cpu else "0.87"),
        ]
        for against, peer, ours, goal in peers:
            row = {"what": f"loss, forward and backward: {shape}", "against": against, "goal": goal}
            why_not = reason(peer)
            if why_not:
                yield {**row, "ours": None, "peer": None, "why_not": why_not}
                continue
            extra = {"flops": 6 * N * D * V, "device": device}
            if not cpu:
                extra["extra_mb"] = [round(cuda_peak(f)) for f in (ours, peer)]
            elif "bonus" in against:
                extra["extra_mb"] = [round(peak(f.__name__, N, D, V)) for f in (ours, peer)]
            yield {**row, "ours": ours, "peer": peer, **extra}
        half = Case(N, D, V, dtype, device, equal_rewards=4)
        yield {
            "what": f"the same, half of the groups with equal rewards: {shape}",
            "against": "ours with all groups of unequal rewards",
            "ours": half.ours,
            "peer": case.ours,
            "goal": "1.33",
        }

        @torch.no_grad()
        def forward_eager(case=case):
            all_logprobs = (case.hidden @ case.head.T).float().log_softmax(-1)
            -(all_logprobs.exp() * all_logprobs).sum(-1)
            return all_logprobs.gather(-1, case.tokens[:, None])

        def forward(case=case):
            return ops.token_logprobs(case.hidden.detach(), case.head.detach(), case.tokens)

        yield {
            "what": f"log-probs and entropy, no gradient: {shape}",
            "against": "eager: all logits at once",
            "ours": forward,
            "peer": forward_eager,
            "goal": "",
            "flops": 2 * N * D * V,
            "device": device,
            **({} if cpu else {"extra_mb": [round(cuda_peak(f)) for f in (forward, forward_eager)]}),
        }
        yield row_kernel(V, dtype, device)


def row_kernel(V, dtype, device):
    """A chunk's logits to their gradient: what stands between the loss's matrix products."""
    height, wide = (4096, torch.float32) if device == "cuda" else (256, torch.float32)
    logits, start = (torch.empty(height, V, device=device) for _ in range(2))
    start.normal_(std=3)
    slopes = torch.empty(height, V, device=device, dtype=dtype) if dtype != wide else logits
    tokens = torch.randint(0, V, (height,), device=device)
    ones = torch.ones(height, device=device)
    data = row_loss.Coefficients(torch.randn(height, device=device), ones / height, 0 * ones, 0.01 * ones)

    def run(backend):
        return row_loss.row_loss(logits, tokens, data, 1.0, backend, slopes)

    backend = row_loss.choose_backend("auto", wide, logits.device)
    logits.copy_(start)
    expected = run("reference")[0]
    logits.copy_(start)
    assert (run(backend)[0] - expected).abs().max() <= 1e-4
    logits.copy_(start)
    return {
        "what": f"row kernel, {backend}: {height:,} rows of logits to their gradient, V={V:,} {str(dtype).removeprefix('torch.')}",
        "against": "plain PyTorch in float64",
        "ours": lambda: run(backend),
        "peer": lambda: run("reference"),
        "goal": "",
        "bytes": logits.nbytes + slopes.nbytes,
        "device": device,
    }


def cuda_peak(run) -> float:
    """MB that a call adds on the GPU; its second, since the first compiles."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    torch.cuda.synchronize()
    del kept
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def check(device, dtype):
    """Ours against float64 on a smaller case of the same kind, before anything is timed."""
    small = Case(512, 64, 5003, dtype, device)
    found = small.ours()
    exact = Case.__new__(Case)
    exact.__dict__ = {k: v.detach().double() if v.is_floating_point() else v for k, v in small.__dict__.items()}
    exact.advantage = ops.advantages(small.rewards).reshape(-1)[small.sequence].double()
    exact.hidden.requires_grad_(), exact.head.requires_grad_()
    logits = (exact.hidden @ exact.head.T).log_softmax(-1)
    wanted = exact.gradients(exact.of(logits.gather(-1, exact.tokens[:, None])[:, 0]))
    assert error(found, wanted) <= (1e-5 if dtype == torch.float32 else 4e-3)


def reason(peer) -> str:
    """Why a peer can't run here, empty if it can."""
    try:
        peer()
    except Exception as problem:
        text = str(problem).strip().splitlines() or [""]
        return f"can't run: {type(problem).__name__}: {text[0][:90]}"
    return ""


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
