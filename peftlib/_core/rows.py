"""A host's call by rows: each group runs through its own adapters, and the results come back in the batch's order."""

import functools
from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any

from torch import nn
from torch._C import _current_graph_task_id
from torch.compiler import is_compiling

from .._errors import AdapterError
from .adapter import Adapter
from .row_groups import Groups, Names, Rows
from .row_layout import Layout


def by_rows(host: Any, rows: Rows, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What the host returns, each row through its own adapters."""
    adapters: dict[str, Adapter] = host._modules["adapters"]._modules
    thread = 0 if is_compiling() else get_ident()
    now = _rows_now(host, rows, thread)
    groups = now.groups(tuple(adapters))
    if len(groups.each) == 1:
        return nested(host, adapters.values(), groups.each[0].names, call)(*args, **kwargs)
    named = {name for group in groups.each for name in group.names}
    acting = [adapter for adapter in adapters.values() if adapter.name in named]
    layout = Layout(host, groups, rows)
    if all(adapter.follows_call(host) for adapter in acting):
        return _beside(host, acting, groups, layout, call, args, kwargs)
    layout.require_one_weight()

    def run(names: Names, own: Rows, own_args: Any, own_kwargs: Any) -> Any:
        rows.within[thread] = own
        try:
            return nested(host, acting, names, call)(*own_args, **own_kwargs)
        finally:
            if now is rows:
                del rows.within[thread]
            else:
                rows.within[thread] = now

    inputs = layout.split_inputs(args, kwargs)
    return layout.join_outputs(
        [run(group.names, group.rows, *own) for group, own in zip(groups.each, inputs, strict=True)]
    )


def _rows_now(host: Any, rows: Rows, thread: int) -> Rows:
    """The batch's rows, or those of the group that a host around this one is running for."""
    if thread in rows.within:
        if not is_compiling():
            rows.inside.add(id(host))
        return rows.within[thread]
    rows.require_apart()
    if rows.inside and not is_compiling() and id(host) in rows.inside and _current_graph_task_id() != -1:
        raise AdapterError(
            f"route: {rows.name_of(host)} is computed again in backward without the module around it, which gave it "
            "the rows of one adapter. Checkpoint that module whole, or do without checkpointing inside it."
        )
    return rows


def _beside(
    host: Any,
    acting: Sequence[Adapter],
    groups: Groups,
    layout: Layout,
    call: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> Any:
    """The host's own call once over all rows, and the adapters of each group on what it gave them."""
    inputs = layout.split_inputs(args, kwargs, objects=True)
    outputs = layout.split_outputs(call(*args, **kwargs))
    return layout.join_outputs(
        [
            nested(host, acting, group.names, functools.partial(_given, output))(*own_args, **own_kwargs)
            for group, output, (own_args, own_kwargs) in zip(groups.each, outputs, inputs, strict=True)
        ]
    )


def _given(output: Any, *_: Any, **__: Any) -> Any:
    return output


def nested(host: nn.Module, adapters: Any, names: Names, call: Callable[..., Any]) -> Callable[..., Any]:
    """The call with the adapters of these names around it, in the order in which they nest."""
    for adapter in adapters:
        if adapter.name in names:
            call = functools.partial(adapter, host, call)
    return call
