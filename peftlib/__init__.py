"""Parameter-efficient fine-tuning primitives for PyTorch: exact, loud, light and fast, on any module."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from . import kernels as kernels
from ._core.activate import activate as activate
from ._core.activate import train_only as train_only
from ._core.activate import view as view
from ._core.adapter import Adapter as Adapter
from ._core.eject import eject as eject
from ._core.host import Adapters, Selection, rebuilt_host
from ._core.inject import inject as inject
from ._core.merge import merge as merge
from ._core.merge import merged as merged
from ._core.merge import merged_state_dict as merged_state_dict
from ._core.merge import unmerge as unmerge
from ._core.rename import copy as copy
from ._core.rename import rename as rename
from ._core.report import summary as summary
from ._core.route import route as route
from ._core.verify import verify as verify
from ._core.walk import adapters as adapters
from ._core.walk import parameters as parameters
from ._errors import AdapterError as AdapterError
from .algebra.combine import combine as combine
from .algebra.combine import convert as convert
from .algebra.extract import extract as extract
from .files.container import read_header as read_header
from .files.save_load import load as load
from .files.save_load import save as save
from .kinds.bottleneck import Bottleneck as Bottleneck
from .kinds.dora import DoRA as DoRA
from .kinds.full import Full as Full
from .kinds.ia3 import IA3 as IA3
from .kinds.lora import LoRA as LoRA
from .kinds.prefix import Prefix as Prefix
from .kinds.prompt import Prompt as Prompt
from .parallel import tensor_parallel as tensor_parallel
from .planning.plan import plan as plan
from .training import schedules as schedules
from .training.distillation import distill as distill
from .training.layer_groups import layer_groups as layer_groups
from .training.learning_rates import SlantedTriangular as SlantedTriangular
from .training.learning_rates import discriminative_lr as discriminative_lr
from .training.learning_rates import lora_plus_groups as lora_plus_groups
from .training.monitoring import monitor as monitor
from .training.regularizers import EWC as EWC
from .training.regularizers import L2SP as L2SP
from .training.trials import Trials as Trials
from .training.unfreezing import GradualUnfreezing as GradualUnfreezing

if TYPE_CHECKING:
    from . import exchange as exchange
    from . import hf as hf
    from . import lightning as lightning
    from . import plot as plot
    from . import search as search

    __version__: str

# A pickle, and `help`, find all that they name in the package itself, so that it can move inside.
_PICKLED_BESIDES = (Adapters, Selection, rebuilt_host)
for _item in [*globals().values()]:
    if getattr(_item, "__module__", "").startswith(f"{__name__}."):
        _item.__module__ = __name__

# A third of what importing all would take, and few programs use them.
_ON_USE = ("exchange", "hf", "lightning", "plot", "search")


def __getattr__(name: str) -> Any:
    if name in _ON_USE:
        return importlib.import_module(f".{name}", __name__)
    if name == "__version__":
        return importlib.metadata.version("peftlib")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
