"""LoRA: the functions (`linear`, `embedding`), their autograd, and the steps in ATen, as kernels, as references."""
