"""LoRA files of tools other than HF peft: kohya, diffusers, loralib and torchtune."""

from ._exchange import load as load
from ._exchange import save as save
