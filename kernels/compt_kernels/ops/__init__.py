"""One operation a file: schema, fake kernel, autograd, and the choice between the kernels and the reference."""
