"""A tiny Llama in every form that a checkpoint comes in, and chat data for it. Nothing is downloaded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports below, which read it once
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as recipes have it

import json
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import bitsandbytes as bnb
import pytest
import torch
import torch.distributed as dist
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_qlora.modules.attention import AttentionRequest, choose_attention
from lightning_qlora.modules.hardware import capabilities
from tests.chats import CHATML
from tests.distributed import RankPools

transformers.utils.logging.disable_progress_bar()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job; children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

VOCAB_SIZE = 300


def _save_tokenizer(directory: Path) -> None:
    """Byte-level BPE, ChatML, end of turn ``<|im_end|>`` and padding ``<|endoftext|>``."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["user assistant what is the name of a thing"] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    tokenizer.save_pretrained(directory)


def _save_llama(directory: Path, seed: int = 0, **options: object) -> Path:
    """Random bf16 weights. Blocks cross the rows of down_proj [64, 160]; norms are not one, so that they matter."""
    torch.manual_seed(seed)
    shape: dict[str, object] = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 512,
    }
    config = LlamaConfig(**{**shape, **options}, initializer_range=0.1, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    model.to(torch.bfloat16).save_pretrained(directory)
    _save_tokenizer(directory)
    return directory


def _save_4bit(source: Path, directory: Path, **options: object) -> Path:
    """What transformers and bitsandbytes make of ``source``, as 4-bit checkpoints on the hub are made."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, **{"bnb_4bit_quant_type": "nf4", **options})
    model = LlamaForCausalLM.from_pretrained(source, quantization_config=quantization, device_map="cpu")
    model.save_pretrained(directory)
    _save_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def all_ranks() -> Iterator[RankPools]:
    with RankPools() as pools:
        yield pools


@pytest.fixture(scope="module")
def ranks(all_ranks: RankPools) -> Iterator[RankPools]:
    """Worker processes. The first two on the CPU stay for the next module that asks for them."""
    yield all_ranks
    # An idle rank holds 0.6 GB of memory, and on a GPU its CUDA context too.
    all_ranks.shrink("cpu", 2)
    all_ranks.shrink("cuda", 0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute on one thread: a tiny model gains nothing from more, and on a busy machine they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_graphs() -> Iterator[None]:
    """Nothing is compiled yet, and nothing that the test compiles stays."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def tiny_llama_dirs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """16-bit checkpoints.

    ``untied``; ``tied``; ``other``, of the shape of ``untied`` but other weights; ``aligned``, whose rows are whole
    blocks; ``biased``, with biases in all projections.
    """
    root = tmp_path_factory.mktemp("llama")
    return MappingProxyType(
        {
            "untied": _save_llama(root / "untied"),
            "tied": _save_llama(root / "tied", tie_word_embeddings=True),
            "other": _save_llama(root / "other", seed=1),
            "aligned": _save_llama(root / "aligned", intermediate_size=192),
            "biased": _save_llama(root / "biased", attention_bias=True, mlp_bias=True),
        }
    )


@pytest.fixture(scope="session")
def tiny_llama_dir(tiny_llama_dirs: Mapping[str, Path]) -> Path:
    """A Llama of 2 layers, hidden size 64 and 300 tokens with its tokenizer, bf16, embeddings not tied. Read only."""
    return tiny_llama_dirs["untied"]


@pytest.fixture(scope="session")
def tiny_llama_4bit_dirs(
    tiny_llama_dirs: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Path]:
    """``tiny_llama_dir`` as bitsandbytes 4-bit checkpoints.

    ``nested`` (NF4, double quantization), ``plain`` (float32 absmax), ``bf16-storage`` (packed bytes as bfloat16, as
    checkpoints for FSDP are), ``fp4``, ``partial`` (one projection left in 16 bit), ``tied`` and ``aligned`` (of those
    models).
    """
    root = tmp_path_factory.mktemp("llama-4bit")
    double = {"bnb_4bit_use_double_quant": True}
    skipped = ["lm_head", "model.layers.1.mlp.down_proj"]
    variants: dict[str, tuple[str, dict[str, object]]] = {
        "nested": ("untied", double),
        "plain": ("untied", {}),
        "bf16-storage": ("untied", {**double, "bnb_4bit_quant_storage": torch.bfloat16}),
        "fp4": ("untied", {**double, "bnb_4bit_quant_type": "fp4"}),
        "partial": ("untied", {**double, "llm_int8_skip_modules": skipped}),
        "tied": ("tied", double),
        "aligned": ("aligned", double),
    }
    return MappingProxyType(
        {
            name: _save_4bit(tiny_llama_dirs[source], root / name, **options)
            for name, (source, options) in variants.items()
        }
    )


@pytest.fixture(scope="session")
def tiny_llama_4bit_dir(tiny_llama_4bit_dirs: Mapping[str, Path]) -> Path:
    """``tiny_llama_dir`` in NF4 with double quantization, as checkpoints on the hub are. Read only."""
    return tiny_llama_4bit_dirs["nested"]


def load_stock_4bit(directory: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """What transformers and bitsandbytes make of a checkpoint; a 16-bit one is quantized to double-quantized NF4."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    if "quantization_config" in json.loads((directory / "config.json").read_text()):
        quantization = None
    return LlamaForCausalLM.from_pretrained(
        directory, dtype=dtype, device_map="cpu", quantization_config=quantization
    ).eval()


@pytest.fixture(scope="session")
def stock_4bit_llama() -> Callable[..., LlamaForCausalLM]:
    """``stock_4bit_llama(directory, dtype=torch.float32)``: the model of stock transformers with bitsandbytes layers.

    Only to look at: on CPUs with AVX512-BF16 its layers repack their weights in their first forward in eval mode.
    """
    return load_stock_4bit


@pytest.fixture(scope="session")
def dense_llama() -> Callable[[Path], LlamaForCausalLM]:
    """``dense_llama(directory)``: that model as a plain float32 Llama of bitsandbytes' dequantized weights."""

    def load(directory: Path) -> LlamaForCausalLM:
        quantized = load_stock_4bit(directory)
        state = {name: p for name, p in quantized.state_dict().items() if ".weight." not in name}
        for name, module in quantized.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                # In float32, where bitsandbytes would round to the dtype that was quantized; and as one row, because
                # its CPU kernel (0.50) takes the wrong blocks where 64 does not divide the rows.
                quant_state, shape = module.weight.quant_state, module.weight.quant_state.shape
                quant_state.dtype, quant_state.shape = torch.float32, torch.Size([1, shape.numel()])
                state[f"{name}.weight"] = bnb.functional.dequantize_4bit(module.weight.data, quant_state).view(shape)
        config = LlamaConfig.from_pretrained(directory)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        dense = LlamaForCausalLM(config).eval()
        dense.load_state_dict(state)
        return dense

    return load


@pytest.fixture
def write_chats(tmp_path: Path) -> Callable[..., Path]:
    """``write_chats(count=8, name="chats.jsonl")`` writes that many chats of growing length and returns the file."""

    def write(count: int = 8, name: str = "chats.jsonl") -> Path:
        path = tmp_path / name
        rows = [
            [
                {"role": "user", "content": f"what is thing {i}?"},
                {"role": "assistant", "content": "a " * (1 + 3 * i % 17) + f"name {i}"},
            ]
            for i in range(count)
        ]
        path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def one_process_group() -> Iterator[None]:
    """A process group of this process alone, for what needs a mesh but no other rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def no_group_left() -> Iterator[None]:
    """For tests that train in this process: ends its process group, and takes back the variables of its rendezvous."""
    environment = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def needs_attention() -> Callable[[str, torch.dtype], None]:
    """Skips a test where this GPU has no such attention, with the words in which a user is refused it."""

    def check(backend: str, dtype: torch.dtype) -> None:
        name = "sdpa" if backend == "sdpa_repeated_kv" else backend
        here = capabilities()
        if dtype == torch.bfloat16 and not here.bf16:
            pytest.skip(f"{here.name} has no bf16 arithmetic")
        try:
            chosen, reason = choose_attention(
                name, AttentionRequest(packed=True, compute_capability=here.compute_capability, dtype=dtype)
            )
        except ValueError as error:
            pytest.skip(str(error))
        if name != "sdpa" and chosen.name != name:
            pytest.skip(reason)

    return check
