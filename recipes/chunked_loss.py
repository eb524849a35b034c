"""Any loss over a large vocabulary without its logits: what it saves, and that a Llama trains as before.

    python recipes/chunked_loss.py
    python recipes/chunked_loss.py --max_steps 0      # without the finetune

Runs on one GPU, or on the CPU. Three parts: the difference of every shipped loss, and of one written here, from plain
torch in value and gradient; the peak memory over the number of tokens, plain and chunked; and a full finetune, plain
and chunked, of the demo model (SmolLM2-135M; on a GPU a Llama-3.2-1B shape with random weights) whose losses are
compared step by step. Expect differences of rounding alone. Writes ``report.json`` and ``memory.svg``.
"""

from __future__ import annotations

import ctypes
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lightning_qlora.modules import losses
from lightning_qlora.modules.hub import DEMO_MODEL, resolve_model
from lightning_qlora.modules.linear_loss import linear_loss
from lightning_qlora.modules.stdlib_docs import stdlib_api_cards

LLAMA_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip


def own_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What a user may write: a likelihood with an entropy bonus [C], and as a metric the right answers [C]."""
    log_p = torch.log_softmax(logits.float(), -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    right = (logits.argmax(-1) == labels).float()
    return -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - 0.01 * entropy, right


def shipped_losses(tokens: int, vocab_size: int, device: str) -> Iterator[tuple[str, Any, tuple[Tensor, ...]]]:
    """Name, loss and per-token tensors."""
    labels = torch.randint(vocab_size, (tokens,), device=device)
    old, reference, advantages = (-torch.rand(3, tokens, device=device)).unbind()
    yield "cross-entropy", losses.cross_entropy, (labels,)
    smoothed = functools.partial(losses.cross_entropy, label_smoothing=0.1, z_loss=1e-4, softcap=30.0)
    yield "cross-entropy, smoothed, z-loss, soft-capped", smoothed, (labels,)
    yield "focal", losses.focal, (labels,)
    yield "distillation", losses.kl_divergence, (torch.randn(tokens, vocab_size, device=device),)
    yield "GRPO", losses.grpo, (labels, advantages + 0.5, old - 8, reference - 8)
    yield "log-probabilities (for DPO)", losses.token_log_probs, (labels,)
    yield "own loss of this recipe", own_loss, (labels,)


def differences(device: str, tokens: int = 200, hidden_size: int = 64, vocab_size: int = 5000) -> list[dict[str, Any]]:
    """Each loss in chunks of 48 tokens against autograd through all logits, float32: relative differences."""
    hidden = torch.randn(tokens, hidden_size, device=device, requires_grad=True)
    weight = (torch.randn(vocab_size, hidden_size, device=device) / 8).requires_grad_()
    rows = []
    for name, loss, tensors in shipped_losses(tokens, vocab_size, device):
        outputs = loss(hidden @ weight.T, *tensors), linear_loss(hidden, weight, *tensors, loss=loss, chunk_tokens=48)
        plain, ours = (output[0] if isinstance(output, tuple) else output for output in outputs)
        plain = plain.mean()
        truth = torch.autograd.grad(plain, (hidden, weight))
        gradients = torch.autograd.grad(ours, (hidden, weight))
        with torch.no_grad():
            found = [float((a - b).norm() / b.norm()) for a, b in zip((ours, *gradients), (plain, *truth), strict=True)]
        rows.append({"loss": name, "value": found[0], "hidden_gradient": found[1], "weight_gradient": found[2]})
    return rows


def peak_mib(function: Callable[[], Any], device: str) -> float:
    """Memory in MiB that a call takes above what is in use before: of the GPU, or of this process (Linux)."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        in_use = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - in_use) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before, and would be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # restarts VmHWM, the peak of resident memory

    def resident(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def memory_over_tokens(
    device: str, most_tokens: int, vocab_size: int, hidden_size: int = 512
) -> list[dict[str, float]]:
    """Peak memory of cross-entropy, forward and backward, head frozen."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    weight = torch.randn(vocab_size, hidden_size, device=device, dtype=dtype) / 16
    points = []
    for tokens in [most_tokens // 8, most_tokens // 4, most_tokens // 2, most_tokens]:
        hidden = torch.randn(tokens, hidden_size, device=device, dtype=dtype, requires_grad=True)
        labels = torch.randint(vocab_size, (tokens,), device=device)

        def plain(h: Tensor = hidden, y: Tensor = labels) -> None:
            F.cross_entropy(F.linear(h, weight).float(), y).backward()  # type: ignore[no-untyped-call]

        def chunked(h: Tensor = hidden, y: Tensor = labels) -> None:
            linear_loss(h, weight, y, loss=losses.cross_entropy).backward()

        chunked()  # compiles, and allocates hidden.grad
        points.append({"tokens": tokens, "plain": peak_mib(plain, device), "chunked": peak_mib(chunked, device)})
    return points


def save_plot(path: Path, points: list[dict[str, float]], title: str) -> None:
    """Draw MiB over tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in ("plain", "chunked"):
        axes.plot([p["tokens"] for p in points], [p[name] for p in points], label=name, marker="o")
    axes.set(title=title, xlabel="tokens", ylabel="peak memory, MiB", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


class Finetune(L.LightningModule):
    """All weights of a Llama, with the loss from all logits or in chunks; ``losses`` has one value a step."""

    def __init__(self, model: LlamaForCausalLM, chunked: bool) -> None:
        super().__init__()
        self.model, self.chunked = model, chunked
        self.losses: list[float] = []

    def training_step(self, ids: Tensor) -> Tensor:
        """Mean cross-entropy of the next token over ``ids`` [B, S]."""
        hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        weight, labels = self.model.lm_head.weight, ids[:, 1:]
        if self.chunked:
            loss: Tensor = linear_loss(hidden, weight, labels, loss=losses.cross_entropy)
        else:
            loss = F.cross_entropy(F.linear(hidden, weight).flatten(0, 1).float(), labels.flatten())
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, a small constant rate."""
        return torch.optim.AdamW(self.parameters(), lr=2e-5)


def finetune(directory: Path, device: str, max_steps: int, batch_size: int, seq_len: int) -> dict[str, list[float]]:
    """Losses of ``max_steps`` steps, plain and chunked, from the same weights on the same batches."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    cards = stdlib_api_cards()[: max_steps * batch_size]
    text = "\n".join(message["content"] for card in cards for message in card["messages"])
    ids = torch.tensor(tokenizer(text)["input_ids"])
    ids = ids.repeat(-(-max_steps * batch_size * seq_len // len(ids)))[: max_steps * batch_size * seq_len]
    found = {}
    for name in ("plain", "chunked"):
        L.seed_everything(0, verbose=False)
        if device == "cuda":
            with torch.device("cuda"):
                model = LlamaForCausalLM(LlamaConfig(**LLAMA_1B)).bfloat16()
        else:
            model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        task = Finetune(model.train(), chunked=name == "chunked")
        trainer = L.Trainer(
            max_steps=max_steps, accelerator=device, devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(task, DataLoader(ids.view(-1, seq_len), batch_size=batch_size))  # type: ignore[arg-type]
        found[name] = task.losses
        del model, task, trainer
    return found


def main(
    model: str = DEMO_MODEL,
    max_steps: int = 3,
    batch_size: int = 2,
    seq_len: int = 64,
    most_tokens: int | None = None,
    output_dir: Path = Path("runs/chunked_loss"),
) -> None:
    """Compare, measure, plot and finetune.

    Args:
        model: A Llama's directory, or the demo model: of the finetune (on a GPU only its tokenizer is used).
        max_steps: Optimizer steps of the finetune; 0 leaves it out.
        batch_size: Sequences a step.
        seq_len: Tokens of a sequence.
        most_tokens: Of the memory plot; 8192 on a GPU and 2048 on a CPU if not given.
        output_dir: Directory for ``report.json`` and ``memory.svg``.
    """
    for name, value, least in (("max_steps", max_steps, 0), ("batch_size", batch_size, 1), ("seq_len", seq_len, 2)):
        if value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}.")
    if most_tokens is not None and most_tokens < 8:
        raise ValueError(f"--most_tokens must be at least 8, an eighth of it being measured too, got {most_tokens}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    directory = resolve_model(model) if max_steps else None
    torch.manual_seed(0)
    report: dict[str, Any] = {"device": device, "torch": torch.__version__, "differences": differences(device)}
    print(f"{'relative difference from plain torch':46}{'value':>10}{'dX':>10}{'dW':>10}")
    for row in report["differences"]:
        name, *figures = row.values()
        print(f"{name:46}" + "".join(f"{figure:>10.1e}" for figure in figures))
    vocab_size = 128256 if device == "cuda" else 49152
    most = most_tokens or (8192 if device == "cuda" else 2048)
    report["peak_mib"] = memory_over_tokens(device, most, vocab_size)
    for point in report["peak_mib"]:
        print(f"{point['tokens']:>6} tokens: {point['plain']:>7.0f} MiB plain, {point['chunked']:>7.0f} MiB chunked")
    if directory is not None:
        report["losses"] = finetune(directory, device, max_steps, batch_size, seq_len)
        for step, (plain, ours) in enumerate(zip(*report["losses"].values(), strict=True), 1):
            print(f"step {step}: loss {plain:.6f} plain, {ours:.6f} chunked")
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    save_plot(
        output_dir / "memory.svg", report["peak_mib"], f"Linear + cross-entropy, vocabulary {vocab_size}, {device}"
    )
    print(f"Wrote {output_dir / 'report.json'} and {output_dir / 'memory.svg'}.")


if __name__ == "__main__":
    from lightning_qlora.modules.cli import run_recipe

    sys.exit(run_recipe(main))
