"""A host's call by rows: each group runs through its own adapters, and the results come back in the batch's order."""

import functools
from collections.abc import Callable
from threading import get_ident
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

from .._errors import AdapterError
from .adapter import Adapter
from .foreign import is_in_backward
from .row_groups import Groups, Names, Rows
from .row_layout import Layout


def by_rows(host: Any, rows: Rows, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What the host returns, each row through its own adapters."""
    thread = 0 if is_compiling() else get_ident()
    now = _rows_now(host, rows, thread)
    if is_compiling():
        done = _by_table(host, now, call, args, kwargs)
        if done is not NotImplemented:
            return done
    plan = _plan_of(host, now)
    if plan.together is not None:
        done = plan.together(host, call, *args, **kwargs)
        if done is not NotImplemented:
            return done
    if len(plan.groups.each) == 1:
        return _nested(host, plan.acting, plan.groups.each[0].names, call)(*args, **kwargs)
    layout = Layout(host, plan.groups, rows)
    if plan.follows:
        return _on_outputs(host, plan, layout, call, args, kwargs)
    layout.require_one_weight()
    return layout.join_outputs(
        [
            _inside(rows, thread, group.rows, _nested(host, plan.acting, group.names, call), own_args, own_kwargs)
            for group, (own_args, own_kwargs) in zip(plan.groups.each, layout.split_inputs(args, kwargs), strict=True)
        ]
    )


def _by_table(host: Any, rows: Rows, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """In a graph for which it is data which row goes through what, if the type of the host's adapters has one. Without
    gradients it holds all adapters, so that it serves every batch; with them those that have rows, for an adapter
    without any gets None and no zeros. Nothing else of the rows may be read here: the graph would be theirs alone."""
    adapters: Any = host._modules["adapters"]._modules
    groups = rows.groups(tuple(adapters))
    for table in (groups.used,) if torch.is_grad_enabled() else (groups.known, groups.used):
        by_choice = [[one for one in adapters.values() if one.name in names] for names in table.choices]
        kinds = {type(one) for own in by_choice for one in own}
        if len(kinds) == 1 and groups.dim == 0:
            serve = kinds.pop().in_one_graph(host, table, by_choice)
            done = NotImplemented if serve is None else serve(call, *args, **kwargs)
            if done is not NotImplemented:
                return done
    return NotImplemented


class Plan:
    """What is the same in every call of a host while its rows are routed: the groups, the adapters that some of them
    go through, whether all of these only change what one call gives, and what serves all rows at once, if anything: in
    place of the call, or behind it."""

    def __init__(self, host: Any, groups: Groups) -> None:
        adapters: list[Adapter] = list(host._modules["adapters"]._modules.values())
        named = {name for group in groups.each for name in group.names}
        self.groups = groups
        self.acting = [adapter for adapter in adapters if adapter.name in named]
        self.follows = all(adapter.follows_call(host) for adapter in self.acting)
        self.together: Callable[..., Any] | None = None
        self.behind: Callable[..., Any] | None = None
        kinds = {type(adapter) for adapter in self.acting}
        if len(kinds) == 1 and len(groups.each) > 1:
            by_group = [[a for a in self.acting if a.name in group.names] for group in groups.each]
            kind = kinds.pop()
            self.together = kind.together(host, groups, by_group)
            self.behind = kind.together_behind(host, groups, by_group) if self.follows else None


def _plan_of(host: Any, rows: Rows) -> Plan:
    plan = None if is_compiling() else rows.plans.get(id(host))
    if plan is None:
        plan = Plan(host, rows.groups(tuple(host._modules["adapters"]._modules)))
        if not is_compiling():
            rows.plans[id(host)] = plan  # no host leaves or joins the model while its rows are routed
    return plan


def _rows_now(host: Any, rows: Rows, thread: int) -> Rows:
    """The batch's rows, or those of the group that a host around this one is running for."""
    if thread in rows.within:
        if not is_compiling():
            rows.inside.add(id(host))
        return rows.within[thread]
    rows.require_apart()
    if rows.inside and not is_compiling() and id(host) in rows.inside and is_in_backward():
        raise AdapterError(
            f"route: {rows.name_of(host)} is computed again in backward without the module around it, which gave it "
            "the rows of one adapter. Checkpoint that module whole, or do without checkpointing inside it."
        )
    return rows


def _inside(rows: Rows, thread: int, own: Rows, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The call for one group: hosts inside it see the rows of that group alone."""
    around = rows.within.get(thread)
    rows.within[thread] = own
    try:
        return call(*args, **kwargs)
    finally:
        if around is None:
            del rows.within[thread]
        else:
            rows.within[thread] = around


def _on_outputs(host: Any, plan: Plan, layout: Layout, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The host's own call once over all rows, and the adapters of each group on what it gave them."""
    output = call(*args, **kwargs)
    done = NotImplemented if plan.behind is None else plan.behind(output, *args, **kwargs)
    if done is not NotImplemented:
        return done
    inputs = layout.split_inputs(args, kwargs, objects=True)
    outputs = layout.split_outputs(output)
    return layout.join_outputs(
        [
            _nested(host, plan.acting, group.names, functools.partial(_given, output))(*own_args, **own_kwargs)
            for group, output, (own_args, own_kwargs) in zip(plan.groups.each, outputs, inputs, strict=True)
        ]
    )


def _given(output: Any, *_: Any, **__: Any) -> Any:
    return output


def _nested(host: nn.Module, adapters: Any, names: Names, call: Callable[..., Any]) -> Callable[..., Any]:
    """The call with the adapters of these names around it, in the order in which they nest."""
    for adapter in adapters:
        if adapter.name in names:
            call = functools.partial(adapter, host, call)
    return call
