"""Triton kernels, installed as `sslr1.kernels`. Each file: a kernel and its launcher; references are in `sslr1.ops`."""
