"""Parameter-efficient fine-tuning primitives for PyTorch: exact, loud, light and fast, on any module."""

from . import kernels as kernels
from ._adapter import Adapter as Adapter
from ._choose import activate as activate
from ._choose import train_only as train_only
from ._choose import view as view
from ._errors import AdapterError as AdapterError
from ._file import read_header as read_header
from ._io import load as load
from ._io import save as save
from ._merge import merge as merge
from ._merge import merged as merged
from ._merge import merged_state_dict as merged_state_dict
from ._merge import unmerge as unmerge
from ._model import eject as eject
from ._model import inject as inject
from ._report import plan as plan
from ._report import summary as summary
from ._verify import verify as verify
from ._walk import adapters as adapters
from ._walk import parameters as parameters
from .full import Full as Full
from .lora import LoRA as LoRA
