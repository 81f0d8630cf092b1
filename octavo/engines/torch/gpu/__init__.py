"""The decoder on a GPU: plain PyTorch, with kernels in Triton for what lies between the matrix products.

All of it runs on a CPU too, where each kernel's reference takes its place: that is how it is tested without a GPU.
"""
