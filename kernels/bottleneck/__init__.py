"""The bottleneck beside a module: the function, its autograd, its kernel, and its reference."""
