"""Models in: names, directories and files to weights, from safetensors (16-bit or bitsandbytes 4-bit) and GGUF."""
