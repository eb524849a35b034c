"""Counting the graphs that torch.compile makes."""

from typing import Any

import torch
from torch import Tensor


class Graphs:
    """A backend of ``torch.compile`` that counts its graphs.

    Args:
        backend: What runs them: ``"eager"`` as they are, ``"aot_eager_decomp_partition"`` traced and partitioned as by
            the default backend, without code being generated, ``"inductor"`` in full.
    """

    def __init__(self, backend: str = "aot_eager_decomp_partition") -> None:
        self.count = 0
        self._compile = torch._dynamo.lookup_backend(backend)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.count += 1
        return self._compile(graph, inputs)
