"""What an editor finds for names of this package, asked of a language server as editors ask it.

The editable install maps the package to its folders by an import hook, which no editor runs; `.typing/` is what they go
by (see `[tool.pyright]` in pyproject.toml).
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest

ROOT = Path(__file__).resolve().parents[1]
SERVER = "from basedpyright.langserver import main; main()"


class LanguageServer:
    """The client's side of the Language Server Protocol: JSON with a length before it."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", SERVER, "--stdio"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.asked = 0
        folder = {"uri": ROOT.as_uri(), "name": "repository"}
        self.ask("initialize", processId=None, rootUri=ROOT.as_uri(), capabilities={}, workspaceFolders=[folder])
        self.send({"method": "initialized", "params": {}})

    def send(self, message: dict[str, Any]) -> None:
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        assert self.process.stdin is not None
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        self.process.stdin.flush()

    def ask(self, method: str, **params: Any) -> Any:
        """Send a request and wait for its result; messages that come in between need no answer."""
        self.asked += 1
        self.send({"id": self.asked, "method": method, "params": params})
        stdout = self.process.stdout
        assert stdout is not None
        while header := b"".join(iter(stdout.readline, b"\r\n")):
            length = re.search(rb"Content-Length: (\d+)", header)
            assert length, header
            message = json.loads(stdout.read(int(length[1])))
            if message.get("id") == self.asked and "method" not in message:
                return message["result"]
        raise AssertionError(f"the language server ended with {self.process.wait()}")

    def definition(self, path: Path, text: str, name: str) -> str:
        """Return the line of source where ``name`` is defined, for its last mention in a file of this text."""
        document = {"uri": path.as_uri(), "languageId": "python", "version": 1, "text": text}
        self.send({"method": "textDocument/didOpen", "params": {"textDocument": document}})
        before = text[: text.rindex(name)]
        position = {"line": before.count("\n"), "character": len(before) - before.rfind("\n") - 1}
        (found,) = self.ask("textDocument/definition", textDocument={"uri": path.as_uri()}, position=position)
        self.send({"method": "textDocument/didClose", "params": {"textDocument": {"uri": path.as_uri()}}})
        file = Path(unquote(urlparse(found["uri"]).path)).resolve()
        line = file.read_text(encoding="utf-8").splitlines()[found["range"]["start"]["line"]]
        return f"{file.relative_to(ROOT)}: {line}"


@pytest.fixture(scope="module")
def server() -> Iterator[LanguageServer]:
    server = LanguageServer()
    yield server
    server.process.kill()
    server.process.communicate()


@pytest.mark.parametrize(
    ("name", "definition"),
    [
        ("QLoRACausalLM", r"modules/training/\w+\.py: class QLoRACausalLM\("),
        ("ChatDataModule", r"modules/data/data_module\.py: class ChatDataModule\("),
        ("build_strategy", r"modules/distributed/strategies\.py: def build_strategy\("),
        ("RunReport", r"callbacks/report\.py: class RunReport\("),
    ],
)
def test_names_in_a_recipe_lead_to_their_files(server: LanguageServer, name: str, definition: str) -> None:
    recipe = ROOT / "recipes/fsdp2_qlora.py"
    assert re.match(definition, server.definition(recipe, recipe.read_text(encoding="utf-8"), f"{name}("))


@pytest.mark.parametrize(
    ("package", "name", "definition"),
    [
        ("modules", "QLoRACausalLM", r"modules/training/\w+\.py: class QLoRACausalLM\("),
        ("modules", "quantize_linears", r"modules/quantization/\w+\.py: def quantize_linears\("),
        ("modules.data", "GlobalBatchSampler", r"modules/data/sampler\.py: class GlobalBatchSampler\("),
        ("kernels.nf4", "dequantize_4bit", r"kernels/nf4\.py: def dequantize_4bit\("),
    ],
)
def test_exported_names_lead_to_their_files(server: LanguageServer, package: str, name: str, definition: str) -> None:
    text = f"from lightning_qlora.{package} import {name}\n\nprint({name})\n"
    assert re.match(definition, server.definition(ROOT / "recipes/unsaved.py", text, name))
