"""LoRA files of tools other than HF peft: kohya, diffusers, loralib and torchtune."""

from .tools import load as load
from .tools import save as save
