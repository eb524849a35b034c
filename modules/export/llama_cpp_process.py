"""llama.cpp as a process of its own, because a file that it cannot compute ends the process.

Needs the ``llama.cpp`` extra (``xllamacpp``, llama.cpp as a wheel).
"""

from __future__ import annotations

import base64
import functools
import json
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor


def is_available() -> bool:
    """Whether the ``llama.cpp`` extra is installed."""
    return find_spec("xllamacpp") is not None


class LlamaCpp:
    """A GGUF file in llama.cpp, as a context manager.

    Args:
        model: The file.
        context: Tokens that a request may have.
        lora: An adapter as a GGUF file, which is added to the model.
        mmproj: A vision tower as a GGUF file.
        threads: Threads it computes with; by default as many as torch.

    Attributes:
        context: Tokens that a request may have: what was asked for, or what the file allows.
        media_marker: What stands for an image in a prompt.

    Raises:
        ValueError: If the extra is not installed, or llama.cpp cannot load the file.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        context: int = 1024,
        lora: str | Path | None = None,
        mmproj: str | Path | None = None,
        threads: int | None = None,
    ) -> None:
        if not is_available():
            raise ValueError(
                "xllamacpp is not installed, so the file cannot be run. Install it: pip install "
                "'lightning-qlora[llama.cpp]'; or pass --verify=false."
            )
        self.model = Path(model)
        options = {
            "model": str(model), "context": context, "lora": None if lora is None else str(lora),
            "mmproj": None if mmproj is None else str(mmproj),
            "threads": threads or torch.get_num_threads(),
        }  # fmt: skip
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as this object
        # -P: a directory in which a package `kernels` lies, like this repository, must not be on the path.
        command = [sys.executable, "-P", "-m", f"{__package__}._llama_cpp_server", json.dumps(options)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        assert self._process.stdout is not None
        # Not through a proxy, which the environment may name.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._address = ""
        for line in self._process.stdout:
            if line.startswith("http"):
                self._address = line.strip()
                properties = self._get("/props")
                self.context = int(properties["default_generation_settings"]["n_ctx"])
                self.media_marker = str(properties.get("media_marker", "<__media__>"))
                return
        self.close()
        raise ValueError(f"llama.cpp cannot load {model}: {self._last_error()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _last_error(self) -> str:
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        told = [
            line for line in lines if "error" in line.lower() or "failed" in line.lower() or "unknown" in line.lower()
        ]
        return (told or lines or ["it said nothing"])[0]

    def _get(self, path: str) -> Any:
        return self._request(urllib.request.Request(self._address + path))

    def _post(self, path: str, **body: Any) -> Any:
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        return self._request(urllib.request.Request(self._address + path, data, headers))

    def _request(self, request: urllib.request.Request) -> Any:
        try:
            with self._opener.open(request) as response:
                return json.load(response)
        except OSError as error:
            detail = error.read().decode() if isinstance(error, urllib.error.HTTPError) else self._last_error()
            raise ValueError(f"llama.cpp fails with {self.model} ({error}): {detail}") from error

    def _complete(self, prompt: Any, tokens: int, **options: Any) -> Any:
        return self._post(
            "/completion",
            prompt=prompt,
            n_predict=tokens,
            samplers=["top_k"],
            top_k=1,
            return_tokens=True,
            **options,
        )

    def tokenize(self, text: str, *, add_special: bool) -> list[int]:
        """The ids of a text, in which special tokens are recognised.

        Args:
            text: The text.
            add_special: Whether bos and eos are added as the file says.
        """
        return [int(token) for token in self._post("/tokenize", content=text, add_special=add_special)["tokens"]]

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """A chat as text by the file's chat template, up to where the assistant begins."""
        return str(self._post("/apply-template", messages=list(messages))["prompt"])

    def log_probs(self, ids: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the token after ``ids``, of the ``count`` likeliest ones.

        Returns:
            Their ids, int64 [count], and log-probabilities, float32 [count].
        """
        return self._log_probs(list(ids), 1, count)[0]

    def log_probs_of_images(
        self, text: str, images: Sequence[bytes], positions: int, count: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Log-probabilities of the tokens after a text with images, and after the same followed by one, two, ... times
        the token :attr:`letter`.

        Args:
            text: With :attr:`media_marker` for each image. llama.cpp puts bos before it as the file says.
            images: Files, such as PNG.
            positions: How many tokens.
            count: As of :meth:`log_probs`.

        Returns:
            As :meth:`log_probs`, for each position.
        """
        files = [base64.b64encode(image).decode() for image in images]
        return self._log_probs({"prompt_string": text, "multimodal_data": files}, positions, count)

    @functools.cached_property
    def letter(self) -> int:
        """The token of "a"."""
        return self.tokenize("a", add_special=False)[-1]

    def _log_probs(self, prompt: Any, positions: int, count: int) -> list[tuple[Tensor, Tensor]]:
        # Log-probabilities come from before sampling, but are left out beside a part of a character. So "a" is sampled.
        answer = self._complete(prompt, positions, n_probs=count, logit_bias=[[self.letter, 1e6]])
        found = [each["top_logprobs"] for each in answer["completion_probabilities"]]
        return [(torch.tensor([e["id"] for e in row]), torch.tensor([e["logprob"] for e in row])) for row in found]

    def greedy(self, ids: Sequence[int], tokens: int) -> list[int]:
        """The likeliest token after ``ids``, and so on, up to ``tokens`` or the end of the answer."""
        return [int(token) for token in self._complete(list(ids), tokens)["tokens"]]

    def stops_at(self, token: int, ids: Sequence[int]) -> bool:
        """Whether ``token`` ends an answer: it is made the likeliest one after ``ids``."""
        answer = self._complete(list(ids), 2, logit_bias=[[token, 1e6]])
        return bool(answer["stop_type"] == "eos")
