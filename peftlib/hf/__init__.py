"""HF peft's adapters: its directories read and written, its configurations put into a model."""

from .directory import inject as inject
from .directory import load as load
from .directory import save as save
