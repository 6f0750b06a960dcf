"""What torch and other libraries do around a module, under names that change: fast paths, caches, attention, hooks."""

import contextlib
import inspect
import itertools
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import Proxy
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils._pytree import tree_leaves

from .._errors import AdapterError

# Classes whose forward has a path around their children's forward, and the attribute that switches it off.
FAST_PATHS: dict[type[nn.Module], tuple[str, object]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}

# Classes of others whose forward rescales weights inside it in place when their mode changes: the entry of their config
# that says after how many blocks, and the list of the blocks.
_RESCALING = {"RwkvModel": ("rescale_every", "blocks")}


def require_steady(named: Iterable[tuple[str, nn.Module]], host_names: Iterable[str]) -> None:
    """Where a forward rescales weights in place, what an adapter adds would have another scale in eval, and a copy
    would be rescaled itself."""
    for name, module in [item for item in named if type(item[1]).__name__ in _RESCALING]:
        for host_name in host_names if _rescales(module) else ():
            if f"{host_name}.".startswith(f"{name}.".lstrip(".")) or f"{name}.".startswith(f"{host_name}.".lstrip(".")):
                every, _ = _RESCALING[type(module).__name__]
                raise AdapterError(
                    f"{host_name or 'the root'}: {type(module).__name__} rescales weights in place in eval, and back "
                    f"in training, which adapters do not follow. Set config.{every} = 0 before its first call, then "
                    "inject."
                )


def _rescales(module: Any) -> bool:
    """Up to so many blocks the factor is one."""
    every, blocks = _RESCALING[type(module).__name__]
    return 0 < getattr(module.config, every, 0) < len(getattr(module, blocks))


# The attribute in which modules of timm keep, in eval mode, what they made of a parameter.
_CACHE_OF_WEIGHTS = "attention_bias_cache"


def cache_of_weights(module: nn.Module) -> str | None:
    """The attribute in which a module keeps values of its weights from call to call: they would outlive an adapter that
    is switched off or changed."""
    return _CACHE_OF_WEIGHTS if isinstance(module.__dict__.get(_CACHE_OF_WEIGHTS), dict) else None


_entries: weakref.WeakKeyDictionary[type, str | None] = weakref.WeakKeyDictionary()


def other_entry(cls: type[nn.Module]) -> str | None:
    """A method, beside forward, by which a layer derived from one of torch's runs torch's forward: what calls it passes
    an adapter by, and not a merged weight. (ProphetNet's positions have such a one.)"""
    if cls not in _entries:
        _entries[cls] = _other_entry(cls)
    return _entries[cls]


def _other_entry(cls: type[nn.Module]) -> str | None:
    above = [base for base in cls.__mro__ if issubclass(base, nn.Module)]
    own = list(itertools.takewhile(lambda base: not base.__module__.startswith("torch."), above))
    if len(own) == len(above) or above[len(own)] is nn.Module:
        return None
    methods = ((name, item) for base in own for name, item in vars(base).items() if inspect.isfunction(item))
    return next((name for name, item in methods if name != "forward" and "super().forward(" in _source(item)), None)


def _source(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""


# Classes whose forward moves buffers in training, and one of these buffers.
STATISTICS: dict[type[nn.Module], str] = {_NormBase: "running_mean", _SpectralNorm: "_u"}


def statistics_in(cls: type) -> str | None:
    """The name of a buffer that modules of this class move in training."""
    return next((leaf for base, leaf in STATISTICS.items() if issubclass(cls, base)), None)


def keeps_statistics(module: nn.Module) -> bool:
    leaf = statistics_in(type(module)) if module._buffers else None
    return leaf is not None and module._buffers.get(leaf) is not None


# The keyword under which a model of transformers takes its cache: up to 5.23 and since, and that of state-space models.
_CACHES = ("past_key_values", "cache", "cache_params")


def tokens_in_cache(arguments: Mapping[str, Any]) -> int | None:
    """How many tokens came before: 0 where none did, None where some did and their state does not say how many."""
    for name, item in arguments.items():
        if name not in _CACHES and hasattr(item, "get_seq_length"):
            raise AdapterError(
                f"{name}={type(item).__name__}: a cache under a keyword that is not known here, so what it holds would "
                f"be counted wrongly. Known are {', '.join(_CACHES)}; call the model without a cache."
            )
    caches = [arguments[name] for name in _CACHES if arguments.get(name) is not None]
    for cache in caches:
        if not hasattr(cache, "get_seq_length") and not hasattr(cache, "has_previous_state"):
            raise AdapterError(
                f"{type(cache).__name__}: this cache does not say how many tokens it holds, so they would be counted "
                "wrongly. Call the model with use_cache=False."
            )
    length = max([0, *[int(_asked(cache, "get_seq_length")) for cache in caches]])
    return None if not length and any(_asked(cache, "has_previous_state") for cache in caches) else length


def _asked(cache: Any, method: str) -> Any:
    """Of layers of attention there is a length, of layers with a recurrent state whether there is one; a cache refuses
    the question that none of its layers can answer."""
    try:
        return getattr(cache, method)()
    except (AttributeError, ValueError):
        return 0


# Under which name a config of transformers keeps the attention that was chosen, and which names the forward of an
# attention reads from its own file: the registry, and how its own eager function ends.
ATTENTION = "_attn_implementation"
_REGISTRY, _EAGER = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"


def attention_of(module: nn.Module) -> str | None:
    """The name of the attention that a module of transformers is to compute with."""
    name = getattr(getattr(module, "config", None), ATTENTION, None)
    return name if isinstance(name, str) else None


def attention_registry(cls: Any) -> tuple[Any, Any]:
    """The registry, and the eager function, that the forward of this class takes its attention from; or None twice."""
    forward = inspect.unwrap(cls.forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    eager = next((name for name in names if name.endswith(_EAGER)), "")
    if _REGISTRY not in names or not eager:
        return None, None
    return forward.__globals__[_REGISTRY], forward.__globals__[eager]


def fast_paths_around(modules: Iterable[nn.Module], adapted: set[int]) -> list[nn.Module]:
    """Of these modules those that could run around an adapted module inside them."""
    fast = [module for module in modules if isinstance(module, tuple(FAST_PATHS))]
    return [module for module in fast if any(id(inner) in adapted for inner in module.modules())]


def is_bound(function: Any, host: Any, cls: Any) -> bool:
    """Whether this is `host.forward` as the class has it."""
    bound = isinstance(function, types.MethodType) and function.__self__ is host
    return bound and function.__func__ is cls.forward


def place_of_forward(host: Any) -> str | None:
    """The attribute of the host itself under which a hook, or one that is gone, keeps the class's forward.

    Adapters go there, inside the hook: it moves weights and inputs to where the host computes."""
    places = (place for place in ("_old_forward", "forward") if place in host.__dict__)
    return next((place for place in places if is_bound(host.__dict__[place], host, type(host))), None)


def hook_of(module: nn.Module) -> Any:
    return module.__dict__.get("_hf_hook")


@contextlib.contextmanager
def present(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Has the weights that are kept in memory or on disk between calls where they are during one."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            if _offloading(module):
                hook_of(module).pre_forward(module)
                stack.callback(hook_of(module).post_forward, module, None)
        yield


def is_offloaded(host: nn.Module) -> bool:
    return any(map(is_offloading, host.modules()))


def is_offloading(module: nn.Module) -> bool:
    return "_hf_hook" in module.__dict__ and bool(_offloading(module))


def device_of(host: nn.Module) -> torch.device:
    """Where the host computes."""
    offloading = (hook for module in host.modules() for hook in _offloading(module))
    device = next((hook.execution_device for hook in offloading if hook.execution_device is not None), None)
    if device is None:
        return next((parameter.device for parameter in host.parameters()), torch.device("cpu"))
    return torch.device(device)


def _offloading(module: nn.Module) -> list[Any]:
    hooks = getattr(hook_of(module), "hooks", (hook_of(module),))
    return [hook for hook in hooks if getattr(hook, "offload", False)]


_backward_now: Any = getattr(torch._C, "_current_graph_task_id", None)  # private: the number of a backward pass, or -1


def is_in_backward() -> bool:
    """Whether this thread is inside a backward pass, where only what is checkpointed calls a module again."""
    if _backward_now is None:
        raise AdapterError(
            f"torch {torch.__version__} does not say whether a call is computed again in backward, where dropout with "
            "seed= needs the mask of the first time, and routed modules their rows. Install an older torch."
        )
    return _backward_now() != -1


# Whether `torch.fx.symbolic_trace` is under way, which calls modules with symbols in the place of tensors.
is_symbolic = is_fx_symbolic_tracing


def node_in_graph(host: nn.Module, found: str, args: Any, kwargs: Any) -> Proxy | None:
    """The call of an adapted module as one node of fx's graph, for what adapters do depends on types and shapes; None
    where no argument is a symbol."""
    if isinstance(args, Proxy):
        raise AdapterError(
            f"torch.fx: the root, {found}, is adapted itself, and fx asks the root's own code for its arguments. "
            "Trace a module that holds it, torch.nn.Sequential(model) for one."
        )
    symbols = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Proxy)]
    if not symbols:
        return None
    tracer: Any = symbols[0].tracer
    name = tracer.path_of_module(host)
    if host._forward_hooks or host._forward_pre_hooks or hook_of(host) is not None:
        raise AdapterError(
            f"{name}: this {found} is adapted and has hooks, which would run while torch.fx traces and again in the "
            "graph. Take the hooks off first, or make it a leaf in a Tracer of your own (is_leaf_module)."
        )
    return symbols[0].tracer.create_proxy("call_module", name, args, kwargs)
