"""Run only the layers from L on, exactly: an edit of layer L cannot change what comes before it, so compute that once.

The model itself is called as usual, with the same ids and mask, so that masks, positions, layer types and soft caps stay its own
business. Only, while the context lasts, the layers below L hand on what they are given and layer L takes the cached states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from errata.lm.capture import first, submodule, with_first
from errata.lm.errors import ModelError
from errata.lm.tokens import Batch, Encoded

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel


def states_at(lm: LanguageModel, batch: Batch, layer: int) -> Tensor:
    """The hidden states that enter layer `layer` [B, T, d], without a graph. Only the layers below it run, and no head.

    Raises ModelError if there is no such layer.
    """
    layers = _layers(lm, layer)
    with torch.no_grad(), ExitStack() as stack:
        seen = stack.enter_context(entering(layers[layer]))
        for module in layers[layer:]:
            stack.enter_context(_skipped(module, lm.anatomy.layer_outputs))
        batch = batch.to(lm.device)
        lm.model.get_decoder()(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return seen[0].detach()


@torch.no_grad()
def run_to(lm: LanguageModel, batch: Batch, layer: int) -> None:
    """Run the layers up to and with `layer`, none above it, and no head; what is wanted is taken with `capture`.

    Inside `from_layer` it begins there. Raises ModelError if there is no such layer.
    """
    layers = _layers(lm, layer)
    with ExitStack() as stack:
        for module in layers[layer + 1 :]:
            stack.enter_context(_skipped(module, lm.anatomy.layer_outputs))
        batch = batch.to(lm.device)
        lm.model.get_decoder()(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)


@contextmanager
def from_layer(lm: LanguageModel, layer: int, states: Tensor) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """While it lasts, `lm.target_logits` and `lm.model` with the batch of `states` run only the layers >= `layer`.

    Yields a function: `with whole(): …` runs all layers again, with any batch.

    states: [B, T, d] from `states_at(lm, batch, layer)`; they may carry a graph. Call the model with `use_cache=False`.
    Raises ModelError if there is no such layer, for a model whose later layers read earlier ones, and for a batch of another shape.
    """
    layers = resumable(lm, layer)

    def swap(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cached = _of_this_batch(states, args[0] if args else kwargs["hidden_states"])
        return ((cached, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": cached})

    def begin(stack: ExitStack) -> None:
        for module in layers[:layer]:
            stack.enter_context(_skipped(module, lm.anatomy.layer_outputs))
        stack.callback(layers[layer].register_forward_pre_hook(swap, with_kwargs=True).remove)

    with ExitStack() as stack:

        @contextmanager
        def whole() -> Iterator[None]:
            stack.close()
            try:
                yield
            finally:
                begin(stack)

        begin(stack)
        yield whole


class Below:
    """What runs before an edit can be felt, kept for texts that have run once: the next time they run from there on.

    layer: the lowest that is changed. down: nothing of it is changed but its MLP's down-projection, so what that one is given is kept, if
        the MLP writes straight into the residual stream; elsewhere what enters the layer.
    room: bytes that may be kept; texts beyond it run whole.

    Nothing else may change meanwhile, and nothing may stand in front of a text that did not before.
    Raises ModelError as `from_layer` does.
    """

    def __init__(self, lm: LanguageModel, layer: int, down: bool = False, room: float = math.inf) -> None:
        self._lm, self.layer, self._room = lm, layer, room
        self._layers = resumable(lm, layer)
        self._down = submodule(lm.model, lm.anatomy.mlp_down[layer]) if down and lm.anatomy.writes_straight else None
        self._known: dict[tuple[int, ...], list[Tensor]] = {}  # ids -> [T, ..] each
        self.nbytes = 0

    def running(self, texts: Sequence[Encoded]) -> AbstractContextManager[object]:
        """To be entered while `lm.batch(texts).without_last()` runs, once, without a graph and with `use_cache=False`; behind what adds to
        the down-projection through a hook."""
        known = [self._known[text.ids] for text in texts if text.ids in self._known]
        if len(known) < len(texts):
            return self._learning(texts)
        parts = [pad_sequence(list(part), batch_first=True) for part in zip(*known, strict=True)]
        return from_layer(self._lm, self.layer, *parts) if self._down is None else self._from_down(self._down, *parts)

    @contextmanager
    def _learning(self, texts: Sequence[Encoded]) -> Iterator[None]:
        layer = self._layers[self.layer]
        with entering(layer) if self._down is None else _apart_from(layer, self._down) as parts:
            yield
        for row, text in enumerate(texts):
            if text.ids not in self._known and self.nbytes < self._room:
                self._known[text.ids] = own = [part[row, : len(text.ids) - 1] for part in parts]
                self.nbytes += sum(part.nbytes for part in own)

    @contextmanager
    def _from_down(self, down: nn.Module, others: Tensor, keys: Tensor) -> Iterator[None]:
        """others [B, T, d]: what the layer makes without its MLP; keys [B, T, d_in]: what the down-projection is given."""
        outputs = self._lm.anatomy.layer_outputs

        def made(given: Tensor) -> Tensor:
            values: Tensor = down(keys)
            return _of_this_batch(others, given) + values

        with ExitStack() as stack:
            for module in self._layers[: self.layer]:
                stack.enter_context(_skipped(module, outputs))
            stack.enter_context(_skipped(self._layers[self.layer], outputs, made))
            yield


@contextmanager
def _apart_from(layer: nn.Module, down: nn.Module) -> Iterator[list[Tensor]]:
    """While a layer runs once, the list becomes [what it makes without the down-projection of its MLP, what that one is given].

    The values are held back and added behind the layer: to take them from its output afterwards would leave nothing where they are huge.
    """
    parts: list[Tensor] = []
    held: list[Tensor] = []  # keys and values, flattened in OPT

    def hold(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        held[:] = args[0].clone(), first(output)
        return with_first(output, torch.zeros_like(held[1]))

    def add(_: nn.Module, __: Any, output: Any) -> Any:
        others = first(output)
        keys, values = (part.view(*others.shape[:2], -1) for part in held)
        parts[:] = others, keys
        return with_first(output, others + values)

    with ExitStack() as stack:
        stack.callback(down.register_forward_hook(hold).remove)
        stack.callback(layer.register_forward_hook(add, prepend=True).remove)  # whoever looks at the layer sees all of it
        yield parts


@contextmanager
def entering(module: nn.Module) -> Iterator[list[Tensor]]:
    """While it lasts, the list that is yielded grows by the hidden states that enter a layer, at each call.

    They are copies, taken before the layer runs: some add to what they are given in place.
    """
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def resumable(lm: LanguageModel, layer: int) -> list[nn.Module]:
    """All layers of the model.

    Raises ModelError if `layer` is none of them, and for a model whose later layers read keys and values of earlier ones (Gemma 3n).
    """
    layers = _layers(lm, layer)
    if not can_resume(lm):
        raise ModelError(f"later layers of {lm.name} read keys and values of earlier ones; run the whole model, not from layer {layer} on")
    return layers


def can_resume(lm: LanguageModel) -> bool:
    """Whether a layer sees nothing of the ones below but the hidden states."""
    return not getattr(lm.model.config.get_text_config(), "num_kv_shared_layers", 0)


def _of_this_batch(cached: Tensor, given: Tensor) -> Tensor:
    """What is cached, where the batch that runs is. Raises ModelError if it is another batch's."""
    if given.shape != cached.shape:
        raise ModelError(
            f"the cached states are {list(cached.shape)} but the batch gives {list(given.shape)}; call with the batch they came from"
        )
    return cached.to(given.device)


def _layers(lm: LanguageModel, layer: int) -> list[nn.Module]:
    paths = lm.anatomy.layers
    if not 0 <= layer < len(paths):
        raise ModelError(f"{lm.name} has layers 0 to {len(paths) - 1}, not {layer}; choose one of these")
    return [submodule(lm.model, path) for path in paths]


@contextmanager
def _skipped(module: nn.Module, outputs: int, made: Callable[[Tensor], Tensor] | None = None) -> Iterator[None]:
    """`module` hands on its hidden states, or what is `made` of them, in its output's own form: a tensor (0), or a tuple of so many."""

    def hand_on(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        if made is not None:
            hidden_states = made(hidden_states)
        return (hidden_states, *[None] * (outputs - 1)) if outputs else hidden_states

    before: Callable[..., Any] | None = module.__dict__.get("forward")  # accelerate, for one, puts its own there
    module.forward = hand_on
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
