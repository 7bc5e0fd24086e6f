"""Let modules that treat every token for itself run on the tokens that matter, and on no others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from errata.lm.capture import submodule

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel


@contextmanager
def packed(lm: LanguageModel, layers: dict[int, Tensor], shape: tuple[int, int]) -> Iterator[None]:
    """While it lasts, these layers' MLPs and attention output projections run on some of the tokens only, and give 0 for the others.

    layers: layer -> its tokens, indices [N] into the B·S of a batch. shape: (B, S).
    """
    with ExitStack() as stack:
        for layer, rows in layers.items():
            if len(rows) < shape[0] * shape[1]:
                for module in _per_token(lm, layer):
                    stack.enter_context(_packed(module, rows, shape))
        yield


def _per_token(lm: LanguageModel, layer: int) -> list[nn.Module]:
    """The MLP, or its matrices where the layer has no module for it (OPT), and the attention output projection."""
    parent = lm.anatomy.mlp_down[layer].rpartition(".")[0]
    mlp = submodule(lm.model, parent)
    if parent != lm.anatomy.layers[layer]:
        return [mlp, submodule(lm.model, lm.anatomy.attn_out[layer])]
    matrices = [module for module in mlp.children() if getattr(getattr(module, "weight", None), "ndim", 0) == 2]
    return [*matrices, submodule(lm.model, lm.anatomy.attn_out[layer])]


@contextmanager
def _packed(module: nn.Module, rows: Tensor, shape: tuple[int, int]) -> Iterator[None]:
    """Every tensor that goes in, [B, S, w] or [B·S, w], is [1, N, w] or [N, w] inside; what comes out is spread over the batch again."""
    count = shape[0] * shape[1]

    def pick(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        taken = value.reshape(count, -1).index_select(0, rows.to(value.device))
        return taken if value.ndim == 2 else taken[None]

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(map(pick, args)), {name: pick(value) for name, value in kwargs.items()}

    def after(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        spread = output.new_zeros(count, output.shape[-1]).index_copy(0, rows.to(output.device), output.reshape(len(rows), -1))
        return spread if output.ndim == 2 else spread.unflatten(0, shape)

    with ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(after).remove)
        yield
