"""LoRA files of tools other than HF peft: kohya, diffusers, loralib and torchtune."""

from .read import load as load
from .write import save as save
