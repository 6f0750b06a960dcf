"""Inputs for a model that nobody described: found from its signature, its configuration, and what it complains of."""

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_BATCH, _TOKENS = 2, 8
_ATTEMPTS = 6


def sizes(config: Any, *names: str) -> list[int]:
    """Every whole number under one of these names in a configuration and those inside it; the names in order."""
    found = [getattr(part, name, None) for name in names for part in _parts(config)]
    flat = [one for value in found for one in (value if isinstance(value, (list, tuple)) else [value])]
    return [one for one in flat if type(one) is int and one > 0]


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for value in vars(config).values():
        if hasattr(value, "model_type"):
            yield from _parts(value)


def size(config: Any, default: int, *names: str) -> int:
    return next(iter(sizes(config, *names)), default)


def _ids(config: Any, length: int = _TOKENS) -> Tensor:
    return torch.randint(5, min(size(config, 96, "vocab_size"), 70), (_BATCH, length))


def _images(config: Any) -> list[Tensor]:
    channels = size(config, 3, "num_channels", "in_channels", "in_chans")
    channels = channels if channels <= 4 else 3
    sides = dict.fromkeys([*sizes(config, "image_size", "img_size", "crop_size")[:1], 64, 32, 224])
    return [torch.randn(_BATCH, channels, side, side) for side in sides]


def _videos(config: Any) -> list[Tensor]:
    frames = size(config, 4, "num_frames", "frames_per_clip", "max_num_frames")
    return [image.unsqueeze(1).repeat(1, frames, 1, 1, 1) for image in _images(config)]


def _patches(config: Any) -> list[Tensor]:
    temporal, patch = size(config, 1, "temporal_patch_size"), size(config, 8, "patch_size")
    return [torch.randn(16, 3 * temporal * patch * patch)]


def _pixels(config: Any) -> list[Tensor]:
    """Images, videos, and the flat patches that some models are given."""
    return [
        *_images(config),
        *_patches(config),
        *(image.unsqueeze(1) for image in _images(config)[:1]),
        *_videos(config),
    ]


def _sounds(config: Any) -> list[Tensor]:
    mel, frames = size(config, 80, "num_mel_bins"), size(config, 64, "max_length", "spec_size")
    wave = torch.randn(_BATCH, 4000)
    return [wave, wave.unsqueeze(1), torch.randn(_BATCH, frames, mel), torch.randn(_BATCH, 1, frames, mel)]


def _features(config: Any) -> list[Tensor]:
    bins = sizes(
        config, "num_mel_bins", "feature_size", "input_dim", "input_feat_per_channel", "feature_projection_input_dim"
    )
    frames = 2 * size(config, 32, "max_source_positions")
    mels = dict.fromkeys([*bins, 128, 80])
    made = [torch.randn(_BATCH, *shape) for mel in mels for shape in ((mel, frames), (64, mel))]
    return [*made, torch.randn(_BATCH, 1, 1001, 64)]


def _ones(config: Any) -> list[Tensor]:
    return [torch.ones(_BATCH, _TOKENS, dtype=torch.long)]


def _series(config: Any) -> list[Tensor]:
    length = size(config, 32, "context_length")
    lags = max(sizes(config, "lags_sequence"), default=0)
    channels = size(config, 1, "num_input_channels")
    return [torch.randn(_BATCH, length, channels), torch.randn(_BATCH, length + lags), torch.randn(_BATCH, length)]


Maker = Callable[[Any], list[Any]]
MAKERS: dict[str, Maker] = {
    "input_ids": lambda c: [_ids(c)],
    "decoder_input_ids": lambda c: [_ids(c, 5), _ids(c, 5).unsqueeze(1).repeat(1, size(c, 1, "num_codebooks"), 1)],
    "encoder_input_ids": lambda c: [_ids(c)],
    "attention_mask": _ones,
    "pixel_values": _pixels,
    "pixel_values_videos": _videos,
    "input_values": _sounds,
    "input_features": _features,
    "audio_values": _sounds,
    "past_values": _series,
    "past_time_features": lambda c: [torch.randn(_BATCH, 64, size(c, 1, "num_time_features"))],
    "past_observed_mask": lambda c: [torch.ones_like(values) for values in _series(c)],
    "future_values": lambda c: [torch.randn(_BATCH, size(c, 8, "prediction_length"))],
    "bbox": lambda c: [torch.tensor([1, 2, 5, 9]).expand(_BATCH, _TOKENS, 4)],
    "inputs_embeds": lambda c: [torch.randn(_BATCH, _TOKENS, size(c, 32, "hidden_size", "d_model"))],
    "hidden_states": lambda c: [
        torch.randn(_BATCH, _TOKENS, size(c, 32, "hidden_size", "d_model", "dim")),
        *_patches(c),
    ],
    "encoder_hidden_states": lambda c: [
        torch.randn(_BATCH, _TOKENS, width)
        for width in dict.fromkeys(
            sizes(c, "encoder_hidden_size", "cross_attention_hidden_size", "hidden_size", "d_model")
        )
    ],
    "query_embeds": lambda c: [torch.randn(_BATCH, 4, size(c, 32, "hidden_size"))],
    "input_features_mask": lambda c: [torch.ones(_BATCH, 64, dtype=torch.long)],
    "feature_attention_mask": lambda c: [torch.ones(_BATCH, 64, dtype=torch.long)],
    "image_grid_thw": lambda c: [torch.tensor([[1, 4, 4]])],
    "merge_sizes": lambda c: [torch.tensor([1])],
    "pixel_mask": lambda c: [torch.ones(image.shape[0], *image.shape[2:], dtype=torch.long) for image in _images(c)],
    "image_embeds": lambda c: [torch.randn(_BATCH, 4, size(c, 32, "hidden_size"))],
    "image_embeds_position_mask": lambda c: [torch.tensor([0, 1, 1, 1, 1, 0, 0, 0]).expand(_BATCH, -1)],
    "grid_thw": lambda c: [torch.tensor([[1, 4, 4]])],
    "visual_feats": lambda c: [torch.randn(_BATCH, 4, size(c, 2048, "visual_feat_dim"))],
    "visual_pos": lambda c: [torch.rand(_BATCH, 4, size(c, 4, "visual_pos_dim"))],
    "padding_mask": lambda c: [torch.ones(_BATCH, 4000, dtype=torch.long)],
    "audio_codes": lambda c: [
        torch.randint(0, 8, (_BATCH, size(c, 4, "num_quantizers", "num_codebooks", "n_codebooks"), 10))
    ],
    "spectrogram": lambda c: [torch.randn(_BATCH, 20, size(c, 80, "num_mel_bins", "model_in_dim"))],
    "decoder_input_values": lambda c: [torch.randn(_BATCH, 6, size(c, 80, "num_mel_bins"))],
    "states": lambda c: [torch.randn(_BATCH, 4, size(c, 17, "state_dim"))],
    "actions": lambda c: [torch.randn(_BATCH, 4, size(c, 4, "act_dim"))],
    "rewards": lambda c: [torch.randn(_BATCH, 4, 1)],
    "returns_to_go": lambda c: [torch.randn(_BATCH, 4, 1)],
    "timesteps": lambda c: [torch.arange(4).expand(_BATCH, 4)],
    "task_inputs": lambda c: [torch.randint(5, 60, (_BATCH, 77))],
    "entity_ids": lambda c: [torch.randint(1, 20, (_BATCH, 3))],
    "token_type_ids": lambda c: [torch.zeros(_BATCH, _TOKENS, dtype=torch.long)],
    "position_ids": lambda c: [torch.arange(_TOKENS).expand(_BATCH, -1)],
}


def found(model: nn.Module) -> dict[str, Any]:
    """Keywords with which the model runs; raises what the most promising attempt raised where none does."""
    first: Exception | None = None
    for attempt in _attempts(model):
        try:
            return _repaired(model, attempt)
        except Exception as error:  # anything may be wrong with a guess
            first = first or error
    raise first or RuntimeError("no input is known under a name of its signature")


def _attempts(model: Any) -> Iterator[dict[str, Any]]:
    parameters = _parameters(model)
    main = getattr(model, "main_input_name", "input_ids")
    names = [name for name in dict.fromkeys([main, *MAKERS]) if name in parameters and name in MAKERS]
    required = [name for name, p in parameters.items() if p.default is p.empty and name in MAKERS]
    for name in names[:3]:
        for value in MAKERS[name](model.config):
            others = {other: MAKERS[other](model.config)[0] for other in required if other != name}
            yield {name: value, **others}


def _parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    every = inspect.signature(model.forward).parameters
    return {name: p for name, p in every.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def _repaired(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Adds what an error names and the signature has, as long as that helps; decoders want their own input."""
    for _ in range(_ATTEMPTS):
        try:
            _run(model, given)
            return given
        except Exception as error:
            named = _named_in(str(error), model, given)
            if not named:
                raise
            given = {**given, named: MAKERS[named](model.config)[0]}
    raise RuntimeError(f"does not run with {', '.join(given)}")


def _named_in(message: str, model: Any, given: dict[str, Any]) -> str | None:
    words = re.findall(r"\w+", message)
    known = [name for name in _parameters(model) if name in MAKERS and name not in given]
    return next((name for name in known if name in words), None)


def _run(model: Any, given: dict[str, Any]) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(**given)
    floating = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not any(leaf.numel() for leaf in floating):
        raise RuntimeError("its output holds no floating-point tensor")
