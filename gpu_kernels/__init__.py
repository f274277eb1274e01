"""Kernels for the GPU, each beside its plain PyTorch twin."""
