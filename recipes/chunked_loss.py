"""Any loss over a large vocabulary without its logits: what it saves, and that a Llama trains as before.

    python recipes/chunked_loss.py
    python recipes/chunked_loss.py --most_tokens 8192 --seq_len 1024    # on a GPU

On one GPU, or on the CPU: the difference of every shipped loss, and of one written here, from plain torch in value and
gradient (float32); peak memory over the number of tokens, plain and chunked; and a full finetune of a Llama, with
transformers' own loss and the chunked one, step by step. Exits with 1 if more than rounding differs: in the first part
over 1e-5, in step n of the finetune over n * 1e-5 (float32) or n * 1e-3 (16 bits), for rounding stays in the weights.

On 2 idle CPU cores: 1 to 3 minutes and 4 GiB. Expect differences below 1e-6 in the first part; 1152 MiB plain and 150
to 220 chunked for 2048 tokens of SmolLM2-135M's vocabulary; and losses from 3.2 to 3.7, equal to 3e-6. On an H200, by
the second command: 1.5 minutes and 23 GiB, for all of a Llama-3.2-1B is trained; 12024 MiB plain and 157 chunked for
8192 tokens; losses from 11.9 to 5.9, equal to 1e-4 (bfloat16). A smaller GPU takes ``--model smollm2-135m-instruct``.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from lightning_qlora.modules.checkpoints.demo_model import DEMO_MODEL
from lightning_qlora.modules.checkpoints.random_weights import SHAPES
from lightning_qlora.modules.checkpoints.resolve import resolve_model
from lightning_qlora.modules.checkpoints.tokenizer import load_tokenizer
from lightning_qlora.modules.cli import run_recipe
from lightning_qlora.modules.data.stdlib_docs import stdlib_api_cards
from lightning_qlora.modules.hardware import capabilities, default_precision, peak_mib
from lightning_qlora.modules.losses import functional as losses
from lightning_qlora.modules.losses import linear_cross_entropy, linear_loss
from lightning_qlora.modules.models.causal_lm import LanguageModelHead
from lightning_qlora.modules.models.decoder import specialize
from lightning_qlora.modules.models.families import FAMILIES
from lightning_qlora.modules.training.run_directory import claim_directory

TOLERANCES = {"32-true": 1e-5, "bf16-mixed": 1e-3, "16-mixed": 1e-3}
SIZES = {"cuda": (128256, 2048, torch.float16), "cpu": (49152, 576, torch.float32)}  # vocabulary, hidden, dtype


def own_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What a user may write: a likelihood with an entropy bonus [C], and as a metric the right answers [C]."""
    log_p = torch.log_softmax(logits.float(), -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - 0.01 * entropy, (logits.argmax(-1) == labels).float()


def differences(device: str, tokens: int = 200, vocab_size: int = 5000) -> dict[str, list[float]]:
    """Each loss in chunks of 48 tokens against autograd through all logits, float32: of value, dX and dW, relative."""
    hidden, teacher = torch.randn(2, tokens, 64, device=device).unbind()
    weight, head = (torch.randn(2, vocab_size, 64, device=device) / 8).unbind()
    learned = hidden.requires_grad_(), weight.requires_grad_()
    labels = torch.randint(vocab_size, (tokens,), device=device)
    old, reference, advantages = (-torch.rand(3, tokens, device=device)).unbind()
    smoothed = functools.partial(losses.cross_entropy, label_smoothing=0.1, z_loss=1e-4, softcap=30.0)
    distilled = functools.partial(losses.kl_divergence_from_hidden, teacher_weight=head, temperature=2.0)
    cases: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
        "cross-entropy": (losses.cross_entropy, (labels,)),
        "cross-entropy, smoothed, z-loss, soft-capped": (smoothed, (labels,)),
        "focal": (losses.focal, (labels,)),
        "distillation from logits": (losses.kl_divergence, (teacher @ head.T,)),
        "distillation from hidden states": (distilled, (teacher,)),
        "GRPO": (losses.grpo, (labels, advantages + 0.5, old - 8, reference - 8)),
        "DPO": (losses.token_log_probs, (labels,)),
        "own loss of this recipe": (own_loss, (labels,)),
    }
    found = {}
    for name, (loss, tensors) in cases.items():
        reduction: Any = "none" if name == "DPO" else "mean"
        chunked = linear_loss(hidden, weight, *tensors, loss=loss, chunk_tokens=48, reduction=reduction)
        outcomes = []
        for results in (chunked, loss(hidden @ weight.T, *tensors)):
            values = results[0] if isinstance(results, tuple) else results
            value = (losses.dpo(values.view(8, -1), reference.view(8, -1) - 8)[0] if name == "DPO" else values).mean()
            outcomes.append((value.detach(), *torch.autograd.grad(value, learned)))
        found[name] = [float((a - b).norm() / b.norm()) for a, b in zip(*outcomes, strict=True)]
    return found


def loss_memory(loss: Callable[..., Tensor], tokens: int, device: str) -> float:
    """Peak MiB of cross-entropy and its backward, head frozen, of Llama-3.2-1B's size; on a CPU of SmolLM2-135M's."""
    vocab_size, hidden_size, dtype = SIZES[device]
    weight = torch.randn(vocab_size, hidden_size, device=device, dtype=dtype) / 16
    hidden = torch.randn(tokens, hidden_size, device=device, dtype=dtype, requires_grad=True)
    labels = torch.randint(vocab_size, (tokens,), device=device)
    for _ in range(2):  # the first time compiles, and allocates hidden.grad
        peak = peak_mib(lambda: loss(hidden, weight, labels).backward(), device)  # type: ignore[no-untyped-call]
    return peak


class Finetune(L.LightningModule):
    """All weights of a Llama by the loss that its class computes; ``losses`` has one value a step."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def training_step(self, ids: Tensor) -> Tensor:
        """Mean cross-entropy of the next token over ``ids`` [B, S]."""
        loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, a small constant rate."""
        return torch.optim.AdamW(self.parameters(), lr=2e-5)


def finetune(chunked: bool, directory: Path | None, ids: Tensor, device: str) -> dict[str, Any]:
    """Losses of a step for each batch of ``ids`` [steps, B, S], and peak MiB; a random 1B without a ``directory``."""
    if directory:
        model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    else:
        with torch.device(device):
            model = LlamaForCausalLM(SHAPES["llama-3.2-1b"].config())
        L.seed_everything(0, verbose=False)  # the two kinds draw differently themselves
        for _, parameter in sorted(model.named_parameters()):
            torch.nn.init.normal_(parameter, 0.0 if parameter.ndim > 1 else 1.0, 0.02)
    if chunked:
        windows = [None] * model.config.num_hidden_layers
        specialize(model, FAMILIES["llama"], LanguageModelHead(), attention=None, windows=windows)
    task = Finetune(model.train())
    trainer = L.Trainer(
        max_steps=len(ids), accelerator=device, devices=1, precision=default_precision(), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    peak = peak_mib(lambda: trainer.fit(task, DataLoader(ids, batch_size=None)), device)  # type: ignore[arg-type]
    return {"losses": task.losses, "peak_mib": peak}


def main(
    model: str | None = None,
    max_steps: int = 5,
    batch_size: int = 2,
    seq_len: int = 64,
    most_tokens: int = 2048,
    output_dir: Path = Path("runs/chunked_loss"),
) -> None:
    """Compare, measure, plot and finetune.

    Args:
        model: Model to finetune: the demo model, a directory of 16-bit weights, a GGUF file, or a hub name. Default:
            the demo model on CPU; on a GPU random weights of Llama-3.2-1B's shape, trained on bytes.
        max_steps: Optimizer steps of the finetune; 0 leaves it out.
        batch_size: Sequences per step.
        seq_len: Tokens per sequence.
        most_tokens: Largest number of tokens in the memory plot.
        output_dir: Directory for ``report.json`` and ``memory.png``.
    """
    device = capabilities().device_type
    if max_steps < 0 or batch_size < 1 or seq_len < 2 or most_tokens < 8:
        raise ValueError("--max_steps must be at least 0, --batch_size 1, --seq_len 2 and --most_tokens 8.")
    _claim = claim_directory(output_dir)  # while this runs, no other may use it
    directory = resolve_model(model or DEMO_MODEL) if max_steps and (model or device == "cpu") else None
    torch.manual_seed(0)
    found = differences(device)
    report: dict[str, Any] = {"device": capabilities().name, "torch": torch.__version__, "differences": found}
    wrong = [name for name, figures in found.items() if not all(x <= TOLERANCES["32-true"] for x in figures)]
    print(f"{'relative difference from plain torch':46}{'value':>10}{'dX':>10}{'dW':>10}")
    for name, figures in found.items():
        print(f"{name:46}" + "".join(f"{figure:>10.1e}" for figure in figures))
    memory = report["peak_mib"] = {"tokens": [most_tokens * part // 8 for part in (1, 2, 4, 8)]}
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    kinds = {"plain": lambda h, w, y: F.cross_entropy(F.linear(h, w).float(), y), "chunked": linear_cross_entropy}
    for name, loss in kinds.items():
        memory[name] = [loss_memory(loss, int(tokens), device) for tokens in memory["tokens"]]
        print(f"{name + ', peak MiB of tokens':46}", dict(zip(memory["tokens"], map(round, memory[name]), strict=True)))
        axes.plot(memory["tokens"], memory[name], label=name, marker="o")
    output_dir.mkdir(parents=True, exist_ok=True)
    axes.set(title=f"Vocabulary {SIZES[device][0]}, {device}", xlabel="tokens", ylabel="peak MiB", ylim=(0, None))
    axes.legend()
    figure.savefig(output_dir / "memory.png")
    if max_steps:
        wanted = max_steps * batch_size * seq_len
        text = "\n".join(m["content"] for card in stdlib_api_cards() for m in card["messages"])[: 16 * wanted]
        tokens = load_tokenizer(directory)(text)["input_ids"] if directory else list(text.encode())
        ids = torch.tensor(tokens)[torch.arange(wanted) % len(tokens)].view(max_steps, batch_size, seq_len)
        runs = {"plain": False, "chunked": True}
        report["finetune"] = {name: finetune(chunked, directory, ids, device) for name, chunked in runs.items()}
        for step, (a, b) in enumerate(zip(*(run["losses"] for run in report["finetune"].values()), strict=True), 1):
            difference = abs(a - b) / a
            wrong += [] if difference <= step * TOLERANCES[default_precision()] else [f"step {step}"]
            print(f"step {step}: loss {a:.6f} plain, {b:.6f} chunked, relative difference {difference:.1e}")
        print("peak MiB:", {name: round(run["peak_mib"]) for name, run in report["finetune"].items()})
    (output_dir / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"Wrote {output_dir / 'report.json'} and {output_dir / 'memory.png'}.")
    if wrong:
        sys.exit(f"error: what differs from plain torch by more than rounding: {', '.join(wrong)}")  # status 1


if __name__ == "__main__":
    sys.exit(run_recipe(main))
