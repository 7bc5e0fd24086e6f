"""Run the end of a model only at the places that are asked for: behind the last attention no token looks at another."""

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
def only_at(lm: LanguageModel, rows: Tensor, columns: Tensor, spare: bool = False) -> Iterator[None]:
    """While it lasts, the head runs at these places [N] of the B texts alone: its output is [1, N, V].

    spare: so does the last layer's MLP, as far as nothing but the head can tell; it gives zeros elsewhere. An MLP that is no module of its
        own, or that has been given a hook, runs everywhere.
    """

    def pick(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_picked(args[0], rows, columns)[None], *args[1:])

    with ExitStack() as stack:
        stack.callback(submodule(lm.model, lm.anatomy.head).register_forward_pre_hook(pick).remove)
        if spare and not _watched(lm) and lm.last_mlp is not None:
            stack.enter_context(_apart(submodule(lm.model, lm.last_mlp), rows, columns))
        yield


@contextmanager
def _apart(mlp: nn.Module, rows: Tensor, columns: Tensor) -> Iterator[None]:
    # Each place once: FT-L asks several times of the same, and what is put there twice has its gradient twice.
    rows, columns = torch.stack([rows, columns]).unique(dim=1)
    shape: list[torch.Size] = []

    def gather(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        shape[:] = [args[0].shape]
        return (_picked(args[0], rows, columns)[None],)

    def scatter(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output.new_zeros(shape[0]).index_put((rows.to(output.device), columns.to(output.device)), output[0])

    with ExitStack() as stack:
        stack.callback(mlp.register_forward_pre_hook(gather).remove)
        stack.callback(mlp.register_forward_hook(scatter).remove)
        yield


def _picked(hidden: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[B, T, d] -> [N, d]."""
    return hidden[rows.to(hidden.device), columns.to(hidden.device)]


@torch.no_grad()
def find_last_mlp(lm: LanguageModel) -> str | None:
    """Path of the last layer's MLP, if it is a module that makes [B, T, d] of [B, T, d] token by token: tried out on three tokens."""
    path = _parent(lm.anatomy.mlp_down[-1])
    if _parent(path) != lm.anatomy.layers[-1]:  # OPT's is the layer itself
        return None
    mlp = submodule(lm.model, path)
    weight: Tensor = submodule(lm.model, lm.anatomy.mlp_down[-1]).weight  # type: ignore[assignment]
    tokens = torch.arange(3 * lm.anatomy.hidden_size, device=weight.device).sin().view(1, 3, -1).to(lm.dtype)
    try:
        together, alone = mlp(tokens), torch.cat([mlp(token) for token in tokens.split(1, dim=1)], 1)
    except Exception:  # one that needs more than the hidden states (BLOOM's adds the residual)
        return None
    rounding = torch.finfo(lm.dtype).eps ** 0.5
    same = isinstance(together, Tensor) and together.shape == tokens.shape and bool((together - alone).norm() <= rounding * alone.norm())
    return path if same else None


def _watched(lm: LanguageModel) -> bool:
    """Whether someone looks at, or adds to, what comes out of a part of the last layer, or goes into its MLP or the norm behind.

    Hooks of transformers stay where they once were needed; nobody reads what they collect of a call that only the head is asked of.
    """
    layer, norm = submodule(lm.model, lm.anatomy.layers[-1]), lm.anatomy.final_norm
    end = [*submodule(lm.model, _parent(lm.anatomy.mlp_down[-1])).modules(), *([submodule(lm.model, norm)] if norm else [])]
    hooks = [hook for module in (*layer.modules(), *end) for hook in module._forward_hooks.values()]
    hooks += [hook for module in end for hook in module._forward_pre_hooks.values()]
    return any(not getattr(hook, "__module__", "").startswith("transformers.") for hook in hooks)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]
