"""The mathematics of every operation in plain PyTorch: the CPU path of training, and what the kernels must equal."""
