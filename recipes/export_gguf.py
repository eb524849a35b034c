"""Export a finetuned model to llama.cpp: one GGUF file, base and adapter merged, run in llama.cpp before it is kept.

    python recipes/export_gguf.py --adapter runs/fsdp2_qlora/adapter --type q8_0 --output runs/model.gguf
    python recipes/export_gguf.py --adapter my-adapter --type f16,q4_k_m,q8_0 --output model.gguf    # a file per type
    python recipes/export_gguf.py --adapter my-adapter --adapter_only --output adapter.gguf          # for --lora
    python recipes/export_gguf.py --model my-vlm --adapter my-adapter --output vlm.gguf    # and mmproj-vlm.gguf

Runs on the CPU, tensor by tensor, whatever the size of the model. Families: those of the README's list; tokenizers:
byte-level BPE and SentencePiece. Where xllamacpp is installed (the extra llama.cpp), each file is loaded in a real
llama.cpp and answers nine prompts: tokens, stop tokens, likeliest tokens and log-probabilities must be the model's, but
for the type's rounding. The demo model takes about a minute and 0.3 GiB of disk in f16.

Of vision-language models (Llava, Pixtral, Idefics3, SmolVLM, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Gemma3) the vision tower
and the projector become a second file, for llama.cpp's --mmproj, and questions about images are compared too.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from lightning_qlora.modules.checkpoints.resolve import resolve_model
from lightning_qlora.modules.checkpoints.tokenizer import load_tokenizer
from lightning_qlora.modules.cli import run_recipe
from lightning_qlora.modules.export.gguf import Exported, check_file_types, export_gguf, export_gguf_adapter
from lightning_qlora.modules.export.llama_cpp import PROMPTS, Verified
from lightning_qlora.modules.export.llama_cpp_process import is_available
from lightning_qlora.modules.export.mmproj import export_vision_gguf
from lightning_qlora.modules.export.vision_weights import is_vision_language, read_weights
from lightning_qlora.modules.export.weights import FinetunedWeights, find_base, logit_difference
from lightning_qlora.modules.training.run_directory import RunDirectory


def main(
    output: Path,
    adapter: Path | None = None,
    model: str | None = None,
    type: str = "f16",
    base: str | None = None,
    quantize_base: bool = False,
    adapter_only: bool = False,
    base_gguf: Path | None = None,
    mmproj: Path | None = None,
    mmproj_type: str = "f16",
    verify: bool = is_available(),
) -> None:
    """Merge, write and verify.

    Args:
        output: The GGUF file; must not exist. With several types, each is added to its name.
        adapter: Directory of a LoRA adapter in peft's format; without one, the model alone is exported.
        model: Base model, as for training. Default: the one that the adapter names.
        type: f16, bf16, f32, q8_0, q5_1, q5_0, q4_1, q4_0 or a K-quant such as q4_k_m (extra libgguf); several with
            commas between them.
        base: The unquantized original of a 4-bit --model. The adapter is merged into it, and by how much the logits
            differ from those that it was trained with is printed.
        quantize_base: Round a 16-bit base to NF4 first, as QLoRA training on it did.
        adapter_only: Write the adapter alone, for llama.cpp's --lora.
        base_gguf: With --adapter_only, a GGUF file of the base (f16, bf16 or f32) in which to verify the adapter.
        mmproj: File of a vision-language model's vision tower and projector; must not exist. Default: the output's name
            after "mmproj-".
        mmproj_type: f16, bf16 or f32: vision towers are not quantized.
        verify: Run each file in llama.cpp before it is kept. Default: if xllamacpp is installed.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # removes what is half written
    types = check_file_types(type.split(","))
    files = {each: output if len(types) == 1 else output.with_stem(f"{output.stem}-{each}") for each in types}
    for file in files.values():
        if file.exists():
            raise ValueError(f"{file} exists already. Name another --output.")
    directory = find_directory(adapter, model)
    has_vision = is_vision_language(directory)
    if mmproj is not None and (adapter_only or not has_vision):
        raise ValueError(
            f"--mmproj is for the vision tower, which {'--adapter_only' if has_vision else directory} has not."
        )
    vision = None
    if adapter_only:
        if adapter is None or base:
            raise ValueError("--adapter_only writes the adapter alone: pass --adapter, and no --base.")
        exported = [
            export_gguf_adapter(directory, adapter, file, file_type=each, base_gguf=base_gguf if verify else None)
            for each, file in files.items()
        ]
    elif has_vision:
        weights, tower = find_weights(directory, adapter, base, quantize_base), mmproj or mmproj_beside(output)
        print(f"Writing {tower}, then {', '.join(map(str, files.values()))} ...", flush=True)
        exported, vision = export_vision_gguf(
            weights, files, tower, mmproj_type=mmproj_type, progress=Tenths, verify=verify
        )
    else:
        weights = find_weights(directory, adapter, base, quantize_base)
        exported = []
        for each, file in files.items():
            print(f"Writing {file} ...", flush=True)
            exported.append(export_gguf(weights, file, file_type=each, progress=Tenths(), verify=verify))
    tokenizer = load_tokenizer(directory)
    for each in [*exported, vision] if vision else exported:
        counts = ", ".join(f"{count} {kind}" for kind, count in each.types.items())
        print(f"{each.path}: {each.adapted} adapted weights; tensors: {counts}.")
        seen = (each.verified, each.verified_images)
        for note in dict.fromkeys([*each.notes, *(note for one in seen if one for note in one.notes)]):
            print(f"note: {note}")
    if stops := exported[0].stop_tokens:
        print(f"Answers end at {', '.join(map(repr, tokenizer.convert_ids_to_tokens(stops)))}.")
    Console().print(table(exported))
    if not all(each.verified for each in exported):
        how = "pass --base_gguf" if adapter_only else "install the extra llama.cpp and leave --verify on"
        print(f"Not verified: to run it in llama.cpp, {how}.")


def find_directory(adapter: Path | None, model: str | None) -> Path:
    """The directory of the base."""
    if adapter is None:
        if model is None:
            raise ValueError("Pass --adapter, or --model to export a model without an adapter.")
        return resolve_model(model)
    try:
        found = find_base(model, adapter)
    except ValueError as error:
        if meant := RunDirectory.adapter_meant_by(adapter):
            raise ValueError(f"{error} Did you mean {meant}?") from error
        raise
    if found.warning:
        print(f"warning: {found.warning}")
    return found.directory


def find_weights(directory: Path, adapter: Path | None, base: str | None, quantize_base: bool) -> FinetunedWeights:
    """What is exported; says what becomes of a 4-bit base, and what another base changes."""
    weights = read_weights(directory, adapter, quantize_base=quantize_base)
    if base is None:
        if weights.is_4bit:
            print(
                "The base is 4-bit: its weights are dequantized. --base merges into the unquantized original instead."
            )
        return weights
    original = read_weights(resolve_model(base), adapter)
    ids = torch.tensor(load_tokenizer(directory)("\n".join(PROMPTS))["input_ids"])
    difference = logit_difference(weights, original, ids)
    print(
        f"Merged into {base}: logits differ from those with {directory}, which the adapter was trained on, by "
        f"{difference.mean:.3g} on average and {difference.largest:.3g} at most; KL divergence {difference.kl:.3g} "
        "nats per token."
    )
    return original


def mmproj_beside(output: Path) -> Path:
    """Where the vision tower goes by default."""
    return output.with_name(f"mmproj-{output.name}")


class Tenths:
    """Prints a line for each tenth of the file."""

    def __init__(self) -> None:
        self.printed = 0

    def __call__(self, done: int, total: int) -> None:
        if (tenths := 10 * done // total) > self.printed:
            self.printed = tenths
            print(f"  {10 * tenths} % of {total / 2**30:.2f} GiB", flush=True)


def table(exported: list[Exported]) -> Table:
    """A row for each file."""
    result = Table("type", "MiB", "seconds", "KL, nats per token", "top-1 equal", "log-probabilities differ by")
    for each in exported:
        file = [f"{each.total_bytes / 2**20:.1f}", f"{each.seconds:.1f}"]
        result.add_row(each.file_type, *file, *figures(each.verified))
        if each.verified_images:
            result.add_row(f"{each.file_type} on images", "", "", *figures(each.verified_images))
    return result


def figures(seen: Verified | None) -> list[str]:
    """The row's last three cells."""
    return [f"{seen.kl:.2g}", f"{seen.top1:.1%}", f"{seen.difference:.2g}"] if seen else ["not verified"] * 3


if __name__ == "__main__":
    sys.exit(run_recipe(main))
