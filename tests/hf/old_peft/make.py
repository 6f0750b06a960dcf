"""Made the folders beside it: what peft 0.18.1 and 0.19.0 saved, and in `changes.safetensors` what they add to a stack.

`pip install --target old --no-deps peft==0.18.1`, then `PYTHONPATH=old python make.py`."""

from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

SHAPES = {False: {"up": (3, 8, 4), "square": (3, 4, 4)}, True: {"up": (3, 4, 8), "square": (3, 4, 4)}}


class Experts(nn.Module):
    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        for name, shape in SHAPES[is_transposed].items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return x


def make(is_transposed: bool, folder: Path) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=["layer.up", "layer.square"])
    model = peft.get_peft_model(nn.ModuleDict({"layer": Experts(is_transposed)}), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape))
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink()
    merged = model.merge_and_unload().state_dict()  # the base is zero
    save_file({key: value.contiguous() for key, value in merged.items()}, folder / "changes.safetensors")


if __name__ == "__main__":
    for is_transposed in (False, True):
        make(is_transposed, Path(__file__).parent / f"{peft.__version__}{'_transposed' * is_transposed}")
