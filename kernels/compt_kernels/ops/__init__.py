"""One operation a file: the schema of its kernels, their fakes, autograd, and the function users call."""
