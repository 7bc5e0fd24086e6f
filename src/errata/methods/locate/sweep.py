"""Go up the critical layers once: the keys at each, and what is still missing at the last, with every write so far in place.

What is written at layer i changes nothing below layer i + 1, so each look resumes there instead of starting at the bottom again, and no
token behind the subject's last one can matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from errata.lm.capture import add_to_output, capture, submodule
from errata.lm.resume import from_layer, run_to

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel
    from errata.lm.tokens import Encoded
    from errata.methods.locate.contexts import Request


@dataclass(frozen=True, slots=True)
class Reached:
    """What the search for a value takes from a sweep, or from several beside one another; see `Sweep`."""

    reached: Tensor
    outputs: Tensor


class Sweep:
    """F facts in C contexts each, at one critical layer after the other.

    layers: the critical layers, from low to high. Attributes, always as the model is with what has been written so far:
    index: of the layer that is written to next, in `layers`.
    keys [F, C, d_in]: input of its down-projection at the subject's last token. before: layer -> keys before anything was written.
    reached [F, d]: the state at the subject's last token of the bare prompt behind the last critical layer; in post-norm models, where
        a norm stands between, the output of that layer's down-projection.
    outputs [F, C, d]: output of the last critical layer's down-projection, as at the start.
    """

    def __init__(self, lm: LanguageModel, requests: Sequence[Request], layers: Sequence[int]) -> None:
        self.lm, self.layers = lm, tuple(layers)
        self._facts = len(requests)
        # No token behind the subject's last one has a say in its states.
        texts = [_cut(context) for request in requests for context in request.contexts]
        self._batch = lm.batch(texts)
        self._rows = torch.arange(len(texts), device=lm.device)
        self._writes: list[tuple[int, Callable[[Tensor], Tensor]]] = []
        self._states: Tensor | None = None
        self.index = 0
        with capture(lm.model, {str(layer): lm.anatomy.mlp_down[layer] for layer in layers}, inputs=True) as before:
            self._look()
        self.before = {layer: self._at_subject(before[str(layer)]) for layer in layers}
        self.outputs = self._outputs

    def write(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put a change into the current layer, keys [.., d_in] -> what is added to its output [.., d], and go on to the next layer."""
        self._writes.append((self.layers[self.index], change))
        self.index += 1
        if self.index < len(self.layers):
            self._look()

    @torch.no_grad()
    def _look(self) -> None:
        """Run from the layer written to last (from the bottom at first) to the last critical one."""
        lm, current, last = self.lm, self.layers[self.index], self.layers[-1]
        down = lm.anatomy.mlp_down
        resumed = from_layer(lm, self._writes[-1][0], self._states) if self._states is not None else nullcontext()
        with ExitStack() as stack:
            stack.enter_context(resumed)
            ins = stack.enter_context(capture(lm.model, {"k": down[current], "s": lm.anatomy.layers[current]}, inputs=True))
            for layer, change in self._writes[-1:]:  # the writes below are in the states already
                fed = stack.enter_context(capture(lm.model, {"k": down[layer]}, inputs=True))
                stack.enter_context(add_to_output(submodule(lm.model, down[layer]), _then(fed, change)))
            outs = stack.enter_context(capture(lm.model, {"m": down[last], "h": lm.anatomy.layers[last]}))
            run_to(lm, self._batch, last)
        self._states = ins["s"]
        self.keys = self._at_subject(ins["k"])
        self._outputs = self._at_subject(outs["m"])
        site = outs["h"] if lm.anatomy.writes_straight else outs["m"]
        self.reached = self._at_subject(site)[:, 0]

    def _at_subject(self, values: Tensor) -> Tensor:
        """[F·C, T, w] (flattened in OPT) -> [F, C, w]."""
        values = values.reshape(*self._batch.input_ids.shape, -1)
        taken: Tensor = values[self._rows, self._batch.subject_last]
        # What follows are differences of states and means of keys: in half precision they would be lost.
        taken = taken.to(torch.promote_types(taken.dtype, torch.float32))
        return taken.view(self._facts, -1, taken.shape[-1])


def _then(fed: dict[str, Tensor], change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda output: change(fed["k"]).reshape(output.shape)


def _cut(text: Encoded) -> Encoded:
    end = int(text.subject_last or 0) + 1
    return replace(text, ids=text.ids[:end], prompt_length=end)
