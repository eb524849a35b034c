"""llama.cpp's server as a process: ``python -m ..._llama_cpp_server '{"model": "m.gguf", ...}'``.

Prints its address once the model is loaded, and ends when its standard input does.
"""

import json
import sys
from typing import Any


def _serve(options: dict[str, Any]) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options["model"]
    params.n_ctx = options["context"]
    params.n_parallel = 1
    params.port = 0  # any free one
    params.warmup = False
    params.verbosity = 1  # errors
    # As exact as it computes: what is measured is the file.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options["threads"]
    if options["mmproj"] is not None:
        params.mmproj.path = options["mmproj"]
        params.mmproj_use_gpu = False
    if options["lora"] is not None:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = options["lora"], 1.0
        params.lora_adapters = [lora]
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
