"""HF peft's adapters: its directories read and written, its configurations put into a model."""

from ._hf import inject as inject
from ._hf import load as load
from ._hf import save as save
