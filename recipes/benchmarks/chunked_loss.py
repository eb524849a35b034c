"""Time and memory of linear + loss, forward and backward: the chunked loss, plain torch, Liger and Apple's CCE.

    python recipes/benchmarks/chunked_loss.py                # all rows on one CUDA GPU, about two minutes
    python recipes/benchmarks/chunked_loss.py --only dpo     # rows whose name contains "dpo"

Checks first that gradients are as exact as plain torch's, by float32, and stops if not. 8192 tokens, vocabulary 128256.
``liger_kernel`` and ``cut_cross_entropy`` are compared where they are installed. A row that fails is reported as such.
Results go to ``results/chunked_loss.json``.
"""

from __future__ import annotations

import argparse
import functools
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.nn.functional as F
from record import RESULTS, save_record
from torch import Tensor

from lightning_qlora.modules.losses import functional as losses
from lightning_qlora.modules.losses import linear_loss

TOKENS, VOCAB, SEQUENCES = 8192, 128256, 8
COLUMNS = [
    "setting",
    "implementation",
    "p20, ms",
    "p50, ms",
    "p80, ms",
    "peak above inputs, MiB",
    "of which gradients, MiB",
]
#: Implementations in the table of the benchmarks' README.
SHOWN = {
    "linear_loss",
    "linear_loss, bf16 sum",
    "matrix products alone, chunk 1024",
    "plain torch",
    "plain torch, compiled",
    "Liger",
    "Apple CCE",
}
Step = Callable[[], Tensor]


class Case:
    """Inputs of one setting. ``hidden`` [T, H] always learns, ``weight`` [V, H] if ``trained``."""

    def __init__(self, hidden_size: int, dtype: torch.dtype, trained: bool = False, tokens: int = TOKENS) -> None:
        torch.manual_seed(0)
        make = functools.partial(torch.randn, device="cuda", dtype=dtype)
        self.hidden = make(tokens, hidden_size).requires_grad_()
        self.weight = (make(VOCAB, hidden_size) * hidden_size**-0.5).requires_grad_(trained)
        self.labels = torch.randint(VOCAB, (tokens,), device="cuda")

    def forget(self) -> None:
        """Drop the gradients."""
        self.hidden.grad = self.weight.grad = None

    def sequences(self) -> tuple[Tensor, Tensor, Tensor]:
        """``hidden`` [SEQUENCES, S, H], which is what learns from now on, ``weight``, and ``labels`` [SEQUENCES, S]."""
        self.hidden = self.hidden.detach().view(SEQUENCES, -1, self.hidden.shape[1]).requires_grad_()
        return self.hidden, self.weight, self.labels.view(SEQUENCES, -1)

    def backward(self, loss: Callable[[], Tensor]) -> Step:
        """A step that forgets the last gradients, then goes forward and backward."""

        def step() -> Tensor:
            self.forget()
            value = loss()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        return step


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The loss as one writes it."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def own_gather(logits: Tensor, labels: Tensor) -> Tensor:
    """A user's own loss [C]: entropy-regularized likelihood, written without a thought about speed."""
    log_p = torch.log_softmax(logits.float(), -1)
    return -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1) + 0.01 * (log_p.exp() * log_p).sum(-1)


def own_torch(logits: Tensor, labels: Tensor) -> Tensor:
    """A user's own loss [C] by torch's cross-entropy."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def products(case: Case, chunk: int) -> Step:
    """The matrix products alone, in chunks: what no loss can be faster than."""
    logits = torch.empty(chunk, VOCAB, dtype=case.hidden.dtype, device="cuda")
    out = torch.empty_like(case.hidden)
    total = torch.zeros_like(case.weight, dtype=torch.float32) if case.weight.requires_grad else None

    @torch.no_grad()
    def step() -> Tensor:
        for start in range(0, len(out), chunk):
            rows = slice(start, min(start + chunk, len(out)))
            part = logits[: rows.stop - start]
            torch.mm(case.hidden[rows], case.weight.t(), out=part)
            torch.mm(part, case.weight, out=out[rows])
            if total is not None:
                torch.addmm(total, part.t(), case.hidden[rows], out_dtype=torch.float32, out=total)
        return out

    return step


def cross_entropy_rows(case: Case) -> Iterator[tuple[str, Callable[[], Step]]]:
    """Names and makers of steps; a maker that cannot import its library raises ImportError."""
    h, w, y = case.hidden, case.weight, case.labels

    def ours(labels: Tensor = y, *, loss: Any = losses.cross_entropy, **options: Any) -> Callable[[], Step]:
        return lambda: case.backward(lambda: linear_loss(h, w, labels, loss=loss, **options))

    def liger() -> Step:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss()
        return case.backward(lambda: loss(w, h, y))

    def cce() -> Step:
        from cut_cross_entropy import linear_cross_entropy

        return case.backward(lambda: linear_cross_entropy(h, w, y))

    yield "linear_loss", ours()
    if w.requires_grad:
        for chunk in (512, 2048):
            yield f"linear_loss, chunk {chunk}", ours(chunk_tokens=chunk)
        yield "linear_loss, bf16 sum", ours(weight_grad_dtype=torch.bfloat16)
        yield "linear_loss, bf16 sum, chunk 2048", ours(weight_grad_dtype=torch.bfloat16, chunk_tokens=2048)
    yield "matrix products alone, chunk 1024", lambda: products(case, 1024)
    yield "plain torch", lambda: case.backward(lambda: plain(h, w, y))
    compiled = torch.compile(plain)
    yield "plain torch, compiled", lambda: case.backward(lambda: compiled(h, w, y))
    yield "Liger", liger
    yield "Apple CCE", cce


def variant_rows(case: Case) -> Iterator[tuple[str, Callable[[], Step]]]:
    """What a user's own loss costs, what ignored tokens save, and what the choices of this implementation are worth."""
    h, w, y = case.hidden, case.weight, case.labels
    half = torch.where(torch.arange(TOKENS, device="cuda") < TOKENS // 2, -100, y)
    mask = half != -100

    def ours(labels: Tensor = y, *, loss: Any = losses.cross_entropy, **options: Any) -> Callable[[], Step]:
        return lambda: case.backward(lambda: linear_loss(h, w, labels, loss=loss, **options))

    yield "linear_loss, own loss", ours(loss=own_gather)
    yield "linear_loss, own loss by F.cross_entropy", ours(loss=own_torch)
    for chunk in (256, 384, 1024, 2048):
        yield f"linear_loss, chunk {chunk}", ours(chunk_tokens=chunk)
    for chunk in (384, 512):
        yield f"matrix products alone, chunk {chunk}", functools.partial(products, case, chunk)
    yield "linear_loss, half ignored, no mask", ours(half)
    yield "linear_loss, half ignored, mask", ours(half, mask=mask)
    yield "linear_loss, half ignored, mask and num_tokens", ours(half, mask=mask, num_tokens=TOKENS // 2)
    yield "linear_loss, loss not compiled", ours(compile_loss=False)


def grpo_rows(case: Case) -> Iterator[tuple[str, Callable[[], Step]]]:
    """GRPO over ``SEQUENCES`` completions, mean over tokens."""
    h, w, y = case.sequences()
    advantages = torch.randn(SEQUENCES, device="cuda")
    with torch.no_grad():
        now = linear_loss(h, w, y, loss=losses.token_log_probs, reduction="none")
    old, reference = now + 0.1 * torch.randn_like(now), now + 0.1 * torch.randn_like(now)
    each = advantages[:, None].expand_as(y).contiguous()

    def liger() -> Step:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        loss, mask = LigerFusedLinearGRPOLoss(loss_type="bnpo"), torch.ones_like(now)
        return case.backward(
            lambda: loss(h, w, y, mask, advantages, ref_per_token_logps=reference, old_per_token_logps=old)[0]
        )

    yield "linear_loss", lambda: case.backward(lambda: linear_loss(h, w, y, each, old, reference, loss=losses.grpo)[0])
    yield "Liger", liger


def dpo_rows(case: Case) -> Iterator[tuple[str, Callable[[], Step]]]:
    """DPO over ``SEQUENCES`` / 2 pairs, with a reference model's hidden states and head."""
    h, w, y = case.sequences()
    reference = (h + 0.1 * torch.randn_like(h)).detach()
    head = w.detach()
    score = functools.partial(linear_loss, loss=losses.token_log_probs, reduction="none")

    def ours() -> Tensor:
        with torch.no_grad():
            by_reference = score(reference, head, y)
        return losses.dpo(score(h, w, y), by_reference)[0].mean()

    def liger() -> Step:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        loss = LigerFusedLinearDPOLoss(beta=0.1)
        return case.backward(lambda: loss(w, h, y, ref_input=reference, ref_weight=head)[0])

    yield "linear_loss", lambda: case.backward(ours)
    yield "Liger", liger


Rows = Iterator[tuple[str, Callable[[], Step]]]
#: Hidden size, dtype, whether the head is trained, and the rows of each setting; the most important first.
SETTINGS: dict[str, tuple[int, torch.dtype, bool, Callable[[Case], Rows]]] = {
    "H 2048 bf16": (2048, torch.bfloat16, False, cross_entropy_rows),
    "H 2048 bf16, head trained": (2048, torch.bfloat16, True, cross_entropy_rows),
    "H 2048 fp16": (2048, torch.float16, False, cross_entropy_rows),
    "H 4096 bf16": (4096, torch.bfloat16, False, cross_entropy_rows),
    "GRPO, H 2048 bf16": (2048, torch.bfloat16, False, grpo_rows),
    "DPO, H 2048 bf16": (2048, torch.bfloat16, False, dpo_rows),
    "GRPO, H 2048 bf16, head trained": (2048, torch.bfloat16, True, grpo_rows),
    "DPO, H 2048 bf16, head trained": (2048, torch.bfloat16, True, dpo_rows),
    "H 2048 bf16, variants": (2048, torch.bfloat16, False, variant_rows),
}


def relative_errors() -> dict[str, float]:
    """Errors of the gradients by float32, over those of plain torch in the same dtype: at most 1.5 is asked for."""
    torch.backends.cuda.matmul.allow_tf32 = False
    found = {}
    for dtype in (torch.bfloat16, torch.float16):
        case = Case(2048, dtype, trained=True, tokens=1024)
        exact = [t.detach().float().requires_grad_() for t in (case.hidden, case.weight)]
        truth = torch.autograd.grad(plain(exact[0], exact[1], case.labels), exact)
        theirs = torch.autograd.grad(plain(case.hidden, case.weight, case.labels), (case.hidden, case.weight))
        ours = {
            "": linear_loss(case.hidden, case.weight, case.labels, loss=losses.cross_entropy),
            ", own loss F.cross_entropy": linear_loss(case.hidden, case.weight, case.labels, loss=own_torch),
        }
        if dtype == torch.bfloat16:
            ours[", bf16 sum"] = linear_loss(
                case.hidden, case.weight, case.labels, loss=losses.cross_entropy, weight_grad_dtype=dtype
            )
        for name, value in ours.items():
            gradients = torch.autograd.grad(value, (case.hidden, case.weight))
            for what, mine, other, true in zip(("dX", "dW"), gradients, theirs, truth, strict=True):
                ratio = (mine.float() - true).norm() / (other.float() - true).norm()
                found[f"{what} {str(dtype)[6:]}{name}"] = float(ratio)
    return found


def measure(step: Step, forget: Callable[[], None]) -> tuple[list[float], float, float, float]:
    """Milliseconds (p20, p50, p80), peak above inputs and what remains after in MiB, and the value."""
    from triton.testing import do_bench

    value = float(step().detach().float().sum())  # compiles
    step()
    torch.cuda.synchronize()
    times = do_bench(step, warmup=30, rep=150, quantiles=[0.2, 0.5, 0.8])
    forget()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    mib = 2.0**20
    peak = (torch.cuda.max_memory_allocated() - before) / mib
    return times, peak, (torch.cuda.memory_allocated() - before) / mib, value


def kernels() -> str:
    """Where the GPU's time goes in one step of the first setting."""
    from torch.profiler import ProfilerActivity, profile

    case = Case(2048, torch.bfloat16)
    step = case.backward(lambda: linear_loss(case.hidden, case.weight, case.labels, loss=losses.cross_entropy))
    step()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    table: str = profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=12, max_name_column_width=90)
    return table


def main() -> int:
    """Check, measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of 'setting: implementation'")
    parser.add_argument("--budget", type=float, default=140.0, help="seconds after which rows are skipped")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", default=None)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA GPU.", file=sys.stderr)
        return 1
    start = monotonic()
    errors = relative_errors()
    print(f"error of gradients over plain torch's: {errors}", flush=True)
    exact = all(ratio <= 1.5 for name, ratio in errors.items() if "bf16 sum" not in name)
    rows: list[list[Any]] = []
    failures: dict[str, str] = {}
    values: dict[str, float] = {}
    for setting, (hidden_size, dtype, trained, make_rows) in SETTINGS.items():
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        case = Case(hidden_size, dtype, trained)
        try:
            makers = list(make_rows(case))
        except Exception:
            failures[setting] = traceback.format_exc()
            continue
        for name, maker in makers:
            label = f"{setting}: {name}"
            if arguments.only.lower() not in label.lower():
                continue
            if monotonic() - start > arguments.budget:
                failures[label] = "skipped: out of time"
                continue
            try:
                times, peak, kept, values[label] = measure(maker(), case.forget)
                rows.append([setting, name, *(round(t, 2) for t in times), round(peak), round(kept)])
                print(f"{monotonic() - start:6.1f} s", *rows[-1], f"value {values[label]:.6f}", sep=" | ", flush=True)
            except ImportError as error:
                failures[label] = f"not installed: {error}"
            except Exception:
                failures[label] = traceback.format_exc()
                print(label, failures[label][-600:], flush=True)
            torch.cuda.empty_cache()
        del makers
    try:
        profile = kernels()
    except Exception:
        profile = traceback.format_exc()
    print(profile)
    path = save_record(
        "chunked_loss",
        COLUMNS,
        rows,
        notes=f"{TOKENS} tokens, vocabulary {VOCAB}, forward and backward; the head is frozen unless said otherwise.",
        directory=arguments.results,
        commit=arguments.commit,
        shown=[i for i, row in enumerate(rows) if "variants" not in row[0] and row[1] in SHOWN],
        gradient_error_over_plain=errors,
        values=values,
        failures=failures,
        kernels=profile,
    )
    print(path)
    if not exact:
        print("Gradients are less exact than 1.5 times plain torch's error.", file=sys.stderr)
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
