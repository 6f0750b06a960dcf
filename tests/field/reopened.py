"""What a new process makes of saved adapters: it builds the same base, loads each file, and compares to the bit."""

import sys
from pathlib import Path

import families
import torch
from subject import Subject, same
from torch import Tensor, nn

import peftlib

Outputs = dict[str, list[Tensor]]


def outputs(subject: Subject, model: nn.Module) -> Outputs:
    """In both modes; in train mode the dropout masks come from one seed."""
    return {mode: subject.plain(model.train(mode == "train")) for mode in ("eval", "train")}


def differing(name: str, folder: Path) -> list[str]:
    """The files whose adapter gives other outputs here than those that lie beside it."""
    subject, found = Subject(families.build(name)), []
    for file in sorted(folder.glob("*.safetensors")):
        model = subject.fresh()
        peftlib.load(model, file)
        expected: Outputs = torch.load(file.with_suffix(".pt"))
        given = outputs(subject, model)
        found += [f"{file.stem} {mode}" for mode in given if not same(given[mode], expected[mode])]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("\n".join(differing(sys.argv[1], Path(sys.argv[2]))))
