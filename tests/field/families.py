"""What the sweep is over: every model type of transformers, every family of timm, the shelf; each built by name."""

import functools
import hashlib
import importlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import inputs
import shelf
import torch
import transformers
from recipes import RECIPES, Recipe, tiny
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_LIMIT = 30_000_000  # parameters; a copy of a model is made for each law
_PATIENCE = 5  # seconds of work for finding a recipe
_HEADS = (
    "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "MASKED_LM",
    "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION", "AUDIO_CLASSIFICATION", "CTC", "OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION", "UNIVERSAL_SEGMENTATION", "DEPTH_ESTIMATION", "TIME_SERIES_PREDICTION", "PRETRAINING",
)  # fmt: skip


@dataclass(frozen=True)
class Built:
    """A model in eval mode that has run once, the keywords that it is called with, how it was and is made again."""

    model: nn.Module
    inputs: dict[str, Any]
    recipe: str
    again: Callable[[], nn.Module]

    @property
    def generates(self) -> bool:
        can = getattr(self.model, "can_generate", None)
        return bool(can and can()) and not {"input_ids", "decoder_input_ids"}.isdisjoint(self.inputs)


def names() -> list[str]:
    timm = _timm_families(_timm()) if _timm() else ()
    theirs = [*(f"timm/{name}" for name in timm), *(f"hf/{kind}" for kind in CONFIG_MAPPING if _classes(kind))]
    return [*(f"shelf/{name}" for name in shelf.NETS), *sorted(theirs, key=_scattered)]


def _scattered(name: str) -> str:
    """An order in which the first hundred are of all families, whatever the alphabet says."""
    return hashlib.sha256(name.encode()).hexdigest()


def build(name: str) -> Built:
    family, _, own = name.partition("/")
    return {"shelf": _from_shelf, "timm": _from_timm, "hf": _from_transformers}[family](own)


def _from_shelf(name: str) -> Built:
    torch.manual_seed(1)
    model, given = shelf.NETS[name]()
    return _ran(Built(model.eval(), given, "by hand", lambda: _from_shelf(name).model))


@torch.no_grad()
def _ran(built: Built) -> Built:
    """What a first run leaves behind, a cached table or bounded norms, is the base's own."""
    built.model(**built.inputs)
    return built


def _timm() -> Any:
    """None where it, or torchvision beneath it, cannot be imported."""
    try:
        return importlib.import_module("timm")
    except (ImportError, RuntimeError):
        return None


def _timm_families(timm: Any) -> Iterator[str]:
    """The smallest model of each module of timm, by what its name says of size."""
    order = ("test_", "nano", "atto", "pico", "femto", "xxs", "xs", "tiny", "small", "18", "b0")
    for module in timm.list_modules():
        models = timm.list_models(module=module)
        if models:
            yield min(models, key=lambda name: next((i for i, word in enumerate(order) if word in name), 99))


def _from_timm(name: str) -> Built:
    """On small images where the family takes them."""
    timm, error = _timm(), None
    for side, options in ((64, {}), (64, {"img_size": 64}), (None, {})):
        try:
            again = functools.partial(_timm_model, timm, name, options)
            model = again()
            shape = (3, side, side) if side else model.default_cfg["input_size"]
            return _ran(Built(model, {"x": torch.randn(2, *shape)}, f"{shape[-1]} pixels", again))
        except Exception as raised:  # of images of another size
            error = error or raised
    raise error or RuntimeError(name)


def _timm_model(timm: Any, name: str, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(1)
    model = timm.create_model(name, pretrained=False, num_classes=7, **options).eval()
    if sum(parameter.numel() for parameter in model.parameters()) > _LIMIT:
        raise ValueError("too many parameters")
    return stirred(model)


def _classes(kind: str) -> list[str]:
    """Classes of a model type, the richest first: one that generates, one with a task head, the bare model."""
    mappings = [*(f"MODEL_FOR_{head}_MAPPING_NAMES" for head in _HEADS), "MODEL_MAPPING_NAMES"]
    found = [getattr(modeling_auto, mapping).get(kind) for mapping in mappings]
    flat = [one for value in found for one in (value if isinstance(value, (list, tuple)) else [value]) if one]
    return list(dict.fromkeys(flat))


def _from_transformers(kind: str) -> Built:
    """The first recipe and class that build and run; what is raised tells of the first that was built, else of any."""
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    errors: list[tuple[int, str]] = []
    started = time.process_time()
    for recipe, cls in _plans(kind):
        if time.process_time() - started > _PATIENCE:
            break
        model = None
        try:
            model = _tiny_model(cls, tiny(CONFIG_MAPPING[kind], recipe))
            again = functools.partial(_tiny_model, cls, model.config)
            return Built(model, inputs.found(model), f"{recipe.name}, {cls}", again)
        except ImportError as error:
            raise RuntimeError(" ".join(str(error).split())[:120]) from error
        except Exception as error:  # a guess of ours, or of theirs
            errors.append((model is None, f"{cls}, {recipe.name}: {type(error).__name__}: {error}"))
    raise RuntimeError(min(errors, key=lambda item: item[0])[1])


def _plans(kind: str) -> Iterator[tuple[Recipe, str]]:
    classes = _classes(kind)
    chosen = dict.fromkeys([*classes[:2], classes[-1]])
    return ((recipe, cls) for recipe in RECIPES for cls in chosen)


def _tiny_model(cls: str, config: Any) -> Any:
    model_class = _class_named(cls, config)
    count = _parameters_of(model_class, config)
    if count > _LIMIT:
        raise ValueError(f"{count / 1e6:.0f} million parameters")
    torch.manual_seed(1)
    return stirred(model_class(config).float().eval())


def _class_named(cls: str, config: Any) -> Any:
    """Some are not exported; they stand beside their configuration."""
    if hasattr(transformers, cls):
        return getattr(transformers, cls)
    return getattr(importlib.import_module(type(config).__module__.replace("configuration_", "modeling_")), cls)


def _parameters_of(model_class: Any, config: Any) -> int:
    """Counted without memory; a few cannot be made so, and are counted by the limit of the process."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in model_class(config).parameters())
    except Exception:
        return 0


@torch.no_grad()
def stirred(model: nn.Module) -> nn.Module:
    """No weight is zero any more, or all that stands behind it would be unseen: gates, scales, biases."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model
