"""Triton kernels behind `torch.library` operators. One kernel a file."""
