"""Parents that read a child's weights without calling the child: the one place that knows them by name."""

from torch import nn

from .._errors import AdapterError

# Children that torch's own parents read: adapted from the parent, by a dotted path.
_READ_BY_TORCH: dict[type[nn.Module], frozenset[str]] = {nn.MultiheadAttention: frozenset({"out_proj"})}

# Parents of other libraries whose fused kernels read these children: (class name, children, what to do).
_READ_BY_OTHERS = {
    "MambaMixer": frozenset({"conv1d", "x_proj", "dt_proj", "out_proj"}),
    "FalconMambaMixer": frozenset({"conv1d", "x_proj", "dt_proj", "out_proj"}),
    "Mamba2Mixer": frozenset({"conv1d", "out_proj"}),
}

# Classes whose forward has a path around their children's forward, and the attribute that switches it off.
FAST_PATHS: dict[type[nn.Module], tuple[str, object]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}


def reader_of(model: nn.Module, name: str, module: nn.Module) -> tuple[str, nn.Module, str]:
    """Where to adapt `module`: `(host_name, host, path of the module inside the host)`, the path empty for itself."""
    parent_name, _, leaf = name.rpartition(".")
    if not name:
        return name, module, ""
    parent = model.get_submodule(parent_name)
    if any(isinstance(parent, reader) and leaf in children for reader, children in _READ_BY_TORCH.items()):
        return parent_name, parent, leaf
    for reader in type(parent).__mro__:
        if leaf in _READ_BY_OTHERS.get(reader.__name__, ()):
            raise AdapterError(
                f"{name}: {reader.__name__} reads this child's weight in its fused kernels without calling it, so an "
                "adapter here would be skipped there. Exclude it and target in_proj."
            )
    return name, module, ""


def fast_paths_around(model: nn.Module, adapted: set[int]) -> list[nn.Module]:
    """The modules that could run around an adapted module inside them."""
    fast = [module for module in model.modules() if isinstance(module, tuple(FAST_PATHS))]
    return [module for module in fast if any(id(inner) in adapted for inner in module.modules())]
