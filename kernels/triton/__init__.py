"""Triton kernels, installed as `sslr1.kernels`. Each file holds one kernel and its launcher; references are in `sslr1.ops`."""
