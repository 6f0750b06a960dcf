"""The one exception: a refusal that says where, what was found, and what to do."""


class AdapterError(Exception):
    """Raised when peftlib refuses; the model is then exactly as it was before the call.

    The message has three parts: where, what was found, what to do. Wrong Python arguments (a missing one,
    say) raise `TypeError` or `ValueError` as everywhere else.

    Example:
        >>> import torch, peftlib
        >>> try:
        ...     peftlib.inject(torch.nn.Linear(4, 4), "q_porj", peftlib.LoRA)
        ... except peftlib.AdapterError as error:
        ...     print(error)
        targets: no module matches 'q_porj'. The model has no named submodules. Pass a type or a predicate.
    """
