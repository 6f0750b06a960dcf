"""The hosts of the laws: one row for each way in which a module holds a weight."""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from transformers.pytorch_utils import Conv1D

from support import reference
from support.reference import Layout, columns, rows, stack, transposed_kernel

Weights = Mapping[str, Mapping[str, Layout]]


@dataclass(frozen=True, eq=False)
class Host:
    """A model, what it is called with, and which of its weights an adapter changes, by host and by name on the host."""

    name: str
    module: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    weights: Weights | None = None
    keywords: Callable[[], dict[str, Any]] = dict
    target: Any = "host"
    full_target: Any = None
    lora: Mapping[str, Any] = field(default_factory=dict)
    no_lora: str = ""
    no_merge: str = ""
    no_full_merge: str = ""
    own_input: bool = False
    shows_input: bool = False
    train: bool = True
    plain: Callable[[nn.Module], Any] | None = None
    fast_path: bool = False
    settles: bool = False
    no_pickle: str = ""
    pins: bool = False

    def model(self, dtype: torch.dtype = torch.float32, seed: int = 1) -> nn.Module:
        torch.manual_seed(seed)
        made = self.module().to(dtype).train(self.train)
        if self.settles:  # a hook computes the weight at each call: at the first one in this dtype
            with torch.no_grad():
                made(*self.arguments(dtype)[0])
        return made

    def base(self, dtype: torch.dtype = torch.float32, training: bool | None = None) -> nn.Module:
        """The function that adapters stand around: running statistics are held, as in eval mode."""
        made = self.model(dtype)
        return statistics_held(made.train(made.training if training is None else training))

    def arguments(
        self, dtype: torch.dtype = torch.float32, track: bool = False
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional floating-point tensors are leaves that may track gradients; keywords never do."""
        torch.manual_seed(2)
        positional, keywords = converted((self.inputs(), self.keywords()), dtype)
        for leaf in torch.utils._pytree.tree_leaves(positional):
            leaf.requires_grad_(track and leaf.is_floating_point())
        return positional, keywords

    def base_path(self) -> contextlib.AbstractContextManager[None]:
        """Where torch has fused kernels for the base alone, the base is compared without them: they round otherwise,
        and give zeros at padded positions."""
        return without_fast_path() if self.fast_path else contextlib.nullcontext()


def statistics_held(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.eval()
    return model


@contextlib.contextmanager
def without_fast_path():
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def converted(values: Any, dtype: torch.dtype) -> Any:
    """Every floating-point tensor of a structure in this dtype."""

    def convert(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return torch.utils._pytree.tree_map_only(Tensor, convert, values)


class Around(nn.Module):
    """The host as a child, so that it has a name."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.host(*args, **kwargs)


class Experts(nn.Module):
    """Parameters of its own, read in its forward: two stacks of matrices and a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 4) / 2)
        self.down = nn.Parameter(torch.randn(3, 4, 6) / 2)
        self.gate = nn.Parameter(torch.randn(3, 4) / 2)
        self.offset = nn.Parameter(torch.randn(4) / 2)

    def forward(self, x: Tensor) -> Tensor:
        shares = (x @ self.gate.T).softmax(-1)  # [tokens, experts]
        hidden = torch.tanh(torch.einsum("ti,eoi->teo", x, self.up))
        return torch.einsum("te,teh,eoh->to", shares, hidden, self.down) + self.offset


class Reading(nn.Module):
    """Reads the weights of its children; the first of them it calls as well."""

    def __init__(self) -> None:
        super().__init__()
        self.fc: Any = nn.Linear(6, 6)
        self.table: Any = nn.Embedding(5, 6)
        self.conv: Any = nn.Conv1d(6, 6, 3, groups=3)
        self.up: Any = nn.ConvTranspose1d(6, 4, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(torch.tanh(self.fc(x + self.table.weight)), self.fc.weight)
        x = F.conv1d(x.mT, self.conv.weight, self.conv.bias, padding=1, groups=3)
        return F.conv_transpose1d(x, self.up.weight, self.up.bias, groups=2).mT


class ScaledLinear(nn.Linear):
    """More than its weight: the result is scaled, so a term beside the call would be wrong."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2.5


class ScaledEmbedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * math.sqrt(self.embedding_dim)


class Twice(nn.Module):
    """One module under two names, called under both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Tied(nn.Module):
    """A language model's embedding and head: one parameter of two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)))


def _attention_weights(*names: str) -> Weights:
    return {"host": dict.fromkeys(names, rows)}


def _recurrent_weights(module: nn.Module) -> Weights:
    return {"host": {name: rows for name, _ in module.named_parameters() if name.startswith("weight")}}


def _conv(name: str, make: Callable[[], nn.Module], *shape: int, layout: Layout = rows, **rest: Any) -> Host:
    weights: Weights = {"host": {"weight": layout}}
    return Host(name, lambda: Around(make()), lambda: (torch.randn(*shape),), weights, own_input=True, **rest)


def _transposed(name: str, make: Callable[[], nn.Module], *shape: int, **rest: Any) -> Host:
    return _conv(name, make, *shape, layout=transposed_kernel, **rest)


def _lookup(name: str, make: Callable[[], nn.Module], inputs: Callable[[], tuple[Any, ...]], **rest: Any) -> Host:
    return Host(name, lambda: Around(make()), inputs, {"host": {"weight": columns}}, **rest)


def _tokens(*shape: int, entries: int = 9) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randint(0, entries, shape),)


def _bag(per_sample: bool = False) -> Callable[[], tuple[Any, ...]]:
    tokens, offsets = torch.tensor([3, 1, 4, 1, 5, 8, 2, 6]), torch.tensor([0, 3, 3, 5])
    return lambda: (tokens, offsets, torch.randn(8)) if per_sample else (tokens, offsets)


def _norm(name: str, make: Callable[[], nn.Module], *shape: int, **rest: Any) -> Host:
    refusal = "(LoRA|DoRA).*matrix"
    return Host(name, lambda: Around(make()), lambda: (torch.randn(*shape),), no_lora=refusal, **rest)


def _recurrent(name: str, make: Callable[[], nn.Module], inputs: Callable[[], tuple[Any, ...]]) -> Host:
    return Host(name, lambda: Around(make()), inputs, _recurrent_weights(make()))


def _attention(name: str, *inputs: tuple[int, ...], weights: tuple[str, ...], **rest: Any) -> Host:
    make = rest.pop("make", {})
    return Host(
        name,
        lambda: Around(nn.MultiheadAttention(8, 2, **make)),
        lambda: _same(inputs),
        _attention_weights(*weights),
        **rest,
    )


def _same(shapes: tuple[tuple[int, ...], ...]) -> tuple[Any, ...]:
    """One shape means self-attention: the same tensor thrice, as the fast path asks."""
    made = [torch.randn(*shape) for shape in shapes]
    return tuple(made * 3 if len(made) == 1 else made)


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 2)


_ENCODER_TARGETS = ["self_attn", "out_proj", "linear1", "linear2"]
_ENCODER_WEIGHTS: Weights = {
    name: weights
    for layer in ("layers.0", "layers.1")
    for name, weights in (
        (f"{layer}.self_attn", {"in_proj_weight": rows, "out_proj.weight": rows}),
        (f"{layer}.linear1", {"weight": rows}),
        (f"{layer}.linear2", {"weight": rows}),
    )
}


def _encoders(name: str, **rest: Any) -> Host:
    return Host(
        name, _encoder, lambda: (torch.randn(3, 5, 8),), _ENCODER_WEIGHTS, target=_ENCODER_TARGETS,
        full_target=["self_attn", "linear1", "norm2"], fast_path=True, **rest,
    )  # fmt: skip


def _padding() -> dict[str, Any]:
    return {"src_key_padding_mask": torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()}


def _blind() -> dict[str, Any]:
    padded = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()
    return {"attn_mask": torch.triu(torch.ones(5, 5), 1).bool(), "key_padding_mask": padded}


_PACKED, _BOTH = ("in_proj_weight",), ("in_proj_weight", "out_proj.weight")
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_COMPUTED = "weight.*computed"


def _weight_norm_new(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Around(nn.utils.parametrizations.weight_norm(make()))


def _weight_norm_old(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Around(reference.old_weight_norm(make()))


def _drop_parametrization(model: Any) -> None:
    nn.utils.parametrize.remove_parametrizations(model.host, "weight")


def _drop_hook(model: Any) -> None:
    nn.utils.remove_weight_norm(model.host)


HOSTS = [
    _conv("linear", lambda: nn.Linear(5, 3), 4, 7, 5),
    _conv("linear-no-bias", lambda: nn.Linear(5, 3, bias=False), 5),
    Host(
        "linear-root",
        lambda: nn.Linear(5, 3),
        lambda: (torch.randn(4, 5),),
        {"": {"weight": rows}},
        target=nn.Linear,
        own_input=True,
    ),
    _conv("linear-keyword", lambda: nn.Linear(5, 3), 4, 5),
    _conv("conv1d", lambda: nn.Conv1d(4, 6, 3), 2, 4, 9),
    _conv("conv1d-grouped-unbatched", lambda: nn.Conv1d(4, 6, 3, groups=2, padding="same"), 4, 9),
    _conv("conv1d-depthwise", lambda: nn.Conv1d(4, 8, 3, groups=4, bias=False), 2, 4, 9),
    _conv("conv1d-replicate", lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="replicate"), 2, 4, 9),
    _conv("conv2d", lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), 2, 4, 7, 8),
    _conv("conv2d-grouped-dilated", lambda: nn.Conv2d(4, 6, (3, 2), dilation=2, groups=2), 2, 4, 7, 8),
    _conv("conv2d-reflect", lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), 2, 4, 5, 6),
    _conv("conv2d-circular", lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular", groups=2), 2, 4, 5, 6),
    _conv("conv2d-unbatched", lambda: nn.Conv2d(4, 6, 3, padding="valid"), 4, 5, 6),
    _conv("conv3d", lambda: nn.Conv3d(2, 4, 2, stride=(1, 2, 1), groups=2, padding=1), 2, 2, 4, 5, 3),
    _transposed("transposed1d", lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), 2, 4, 5),
    _transposed("transposed1d-unbatched", lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), 4, 5),
    _transposed(
        "transposed2d-grouped", lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=2, groups=2, dilation=2), 2, 4, 4, 3
    ),
    _transposed(
        "transposed2d-output-size",
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1),
        2,
        4,
        4,
        3,
        keywords=lambda: {"output_size": [8, 6]},
    ),
    _transposed("transposed3d", lambda: nn.ConvTranspose3d(2, 4, 2, stride=2, groups=2, bias=False), 2, 2, 3, 2, 3),
    _lookup("embedding", lambda: nn.Embedding(9, 6), _tokens(4, 5)),
    _lookup(
        "embedding-padding", lambda: nn.Embedding(9, 6, padding_idx=2), lambda: (torch.tensor([[2, 3, 2], [8, 2, 0]]),)
    ),
    _lookup("embedding-max-norm", lambda: nn.Embedding(9, 6, max_norm=1.0), _tokens(4, 5)),
    _lookup("embedding-frequency", lambda: nn.Embedding(9, 6, scale_grad_by_freq=True), _tokens(4, 5)),
    _lookup("bag-sum", lambda: nn.EmbeddingBag(9, 6, mode="sum"), _bag()),
    _lookup("bag-mean", lambda: nn.EmbeddingBag(9, 6), _tokens(4, 3)),
    _lookup("bag-mean-padding", lambda: nn.EmbeddingBag(9, 6, padding_idx=1), _bag()),
    _lookup("bag-max", lambda: nn.EmbeddingBag(9, 6, mode="max"), _bag()),
    _lookup("bag-per-sample", lambda: nn.EmbeddingBag(9, 6, mode="sum"), _bag(per_sample=True)),
    _lookup("bag-frequency", lambda: nn.EmbeddingBag(9, 6, mode="sum", scale_grad_by_freq=True), _tokens(4, 3)),
    _lookup(
        "bag-last-offset",
        lambda: nn.EmbeddingBag(9, 6, mode="sum", include_last_offset=True),
        lambda: (torch.tensor([3, 1, 4, 1]), torch.tensor([0, 1, 4])),
    ),
    Host(
        "bilinear",
        lambda: Around(nn.Bilinear(4, 5, 3)),
        lambda: (torch.randn(6, 4), torch.randn(6, 5)),
        {"host": {"weight": rows}},
    ),
    Host(
        "hf-conv1d",
        lambda: Around(Conv1D(6, 4)),
        lambda: (torch.randn(2, 3, 4),),
        {"host": {"weight": columns}},
        own_input=True,
    ),
    _norm("layer-norm", lambda: nn.LayerNorm(4), 5, 3, 4),
    _norm("rms-norm", lambda: nn.RMSNorm(4), 5, 4),
    _norm("group-norm", lambda: nn.GroupNorm(2, 4), 3, 4, 5),
    _norm("batch-norm", lambda: nn.BatchNorm1d(4), 6, 4),
    _norm("batch-norm-eval", lambda: nn.BatchNorm2d(4), 6, 4, 2, 2, train=False),
    _attention("attention-packed", (5, 3, 8), weights=_PACKED),
    _attention(
        "attention-both",
        (3, 5, 8),
        weights=_BOTH,
        target=["host", "out_proj"],
        full_target="host",
        make={"batch_first": True},
        fast_path=True,
    ),
    _attention(
        "attention-out",
        (3, 5, 8),
        weights=("out_proj.weight",),
        target="out_proj",
        pins=True,
        make={"batch_first": True, "bias": False},
    ),
    _attention("attention-separate", (4, 3, 8), (5, 3, 6), (5, 3, 4), weights=_SEPARATE, make={"kdim": 6, "vdim": 4}),
    _attention(
        "attention-masks",
        (3, 5, 8),
        weights=_BOTH,
        target=["host", "out_proj"],
        full_target="host",
        make={"batch_first": True},
        keywords=_blind,
        fast_path=True,
    ),
    _attention(
        "attention-extra-keys",
        (5, 8),
        weights=_BOTH,
        target=["host", "out_proj"],
        full_target="host",
        make={"add_bias_kv": True, "add_zero_attn": True},
    ),
    _attention(
        "attention-eval",
        (3, 5, 8),
        weights=_BOTH,
        target=["host", "out_proj"],
        full_target="host",
        make={"batch_first": True},
        keywords=lambda: {"need_weights": False},
        train=False,
        fast_path=True,
    ),
    _recurrent("lstm", lambda: nn.LSTM(4, 5, 2, bidirectional=True), lambda: (torch.randn(6, 2, 4),)),
    _recurrent(
        "lstm-projected",
        lambda: nn.LSTM(4, 5, proj_size=3, batch_first=True),
        lambda: (torch.randn(2, 6, 4), (torch.randn(1, 2, 3), torch.randn(1, 2, 5))),
    ),
    _recurrent("gru", lambda: nn.GRU(4, 5, 2, bias=False), lambda: (torch.randn(6, 2, 4), torch.randn(2, 2, 5))),
    _recurrent("rnn", lambda: nn.RNN(4, 5, bidirectional=True), lambda: (torch.randn(6, 4),)),
    _recurrent(
        "lstm-cell", lambda: nn.LSTMCell(4, 5), lambda: (torch.randn(3, 4), (torch.randn(3, 5), torch.randn(3, 5)))
    ),
    _recurrent("gru-cell", lambda: nn.GRUCell(4, 5, bias=False), lambda: (torch.randn(3, 4), torch.randn(3, 5))),
    Host(
        "experts",
        lambda: Around(Experts()),
        lambda: (torch.randn(7, 4),),
        {"host": {"up": stack, "down": stack}},
        lora={"param": ["up", "down"]},
        shows_input=True,
    ),
    Host(
        "raw-matrix",
        lambda: Around(Experts()),
        lambda: (torch.randn(7, 4),),
        {"host": {"gate": rows}},
        lora={"param": "gate"},
        shows_input=True,
    ),
    Host(
        "children-read",
        lambda: Around(Reading()),
        lambda: (torch.randn(3, 5, 6),),
        {
            "host": {
                "fc.weight": rows,
                "table.weight": columns,
                "conv.weight": rows,
                "up.weight": transposed_kernel,
            }
        },
        target=["fc", "table", "conv", "up"],
    ),
    Host("two-names", Twice, lambda: (torch.randn(4, 5),), {"first": {"weight": rows}}, target="first", own_input=True),
    Host(
        "tied-head",
        Tied,
        _tokens(3, 4, entries=7),
        {"head": {"weight": rows}},
        target="head",
        own_input=True,
        no_merge=r"head\.weight.*embedding\.weight",
        no_full_merge=r"head\.weight.*embedding\.weight",
    ),
    Host(
        "tied-embedding",
        Tied,
        _tokens(3, 4, entries=7),
        {"embedding": {"weight": columns}},
        target="embedding",
        no_merge=r"embedding\.weight.*head\.weight",
        no_full_merge=r"embedding\.weight.*head\.weight",
    ),
    Host(
        "weight-norm",
        _weight_norm_new(lambda: nn.Linear(5, 3)),
        lambda: (torch.randn(4, 5),),
        {"host": {"weight": rows}},
        own_input=True,
        no_merge=_COMPUTED,
        plain=_drop_parametrization,
        no_pickle="parametrized",
    ),
    Host(
        "weight-norm-attention-like",
        _weight_norm_new(lambda: ScaledLinear(5, 3)),
        lambda: (torch.randn(4, 5),),
        {"host": {"weight": rows}},
        shows_input=True,
        no_merge=_COMPUTED,
        plain=_drop_parametrization,
        no_pickle="parametrized",
    ),
    Host(
        "weight-norm-hook",
        _weight_norm_old(lambda: nn.Conv1d(4, 6, 3)),
        lambda: (torch.randn(2, 4, 9),),
        {"host": {"weight": rows}},
        own_input=True,
        no_merge=_COMPUTED,
        plain=_drop_hook,
        settles=True,
    ),
    Host(
        "weight-norm-hook-scaled",
        _weight_norm_old(lambda: ScaledLinear(5, 3)),
        lambda: (torch.randn(4, 5),),
        {"host": {"weight": rows}},
        shows_input=True,
        no_merge=_COMPUTED,
        plain=_drop_hook,
        settles=True,
    ),
    Host(
        "scaled-linear",
        lambda: Around(ScaledLinear(5, 3)),
        lambda: (torch.randn(4, 5),),
        {"host": {"weight": rows}},
        shows_input=True,
    ),
    _lookup("scaled-embedding", lambda: ScaledEmbedding(9, 6, padding_idx=0), _tokens(4, 5)),
    _encoders("encoder-train"),
    _encoders("encoder-eval", train=False),
    _encoders("encoder-eval-padded", train=False, keywords=_padding),
    Host(
        "encoder-eval-linear1",
        _encoder,
        lambda: (torch.randn(3, 5, 8),),
        {f"layers.{n}.linear1": {"weight": rows} for n in (0, 1)},
        target="linear1",
        own_input=True,
        train=False,
        fast_path=True,
    ),
]
