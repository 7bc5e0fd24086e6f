"""What the bundled model knows, and whether its facts are where locate-then-edit editors look for them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from errata.data import atlas
from errata.data.atlas.corpus import Corpus, prose
from errata.data.atlas.world import World, build
from errata.facts import EditCase, Fact
from errata.lm.capture import add_to_output, capture, submodule
from errata.lm.tokens import Batch, Encoded, encode
from errata.methods.locate.contexts import encode_fact, request
from errata.methods.locate.sweep import Sweep
from errata.methods.locate.value import Search, at_subject, find_values
from errata.objectives import CrossEntropy
from errata.statistics.moments import second_moments

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel

#: A change of the model that lasts while a batch is run; the slice says which of the edits the batch's rows belong to.
Change = Callable[[Batch, slice], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Knowledge:
    """Shares between 0 and 1; `facts` is the number of facts in the world, `edits` of the edits tried in `layer`.

    seen, unseen, alias, two_hop: questions answered exactly, the full stop behind the answer included (see `atlas.questions`).
    locatable: edits for which some δ at the subject's last token, ‖δ‖ ≤ 4‖v₀‖, 25 steps, brings p(new object) above 0.9.
    locatable_transfer: of all edits, those whose δ makes the model give the new object in another wording too.
    written, written_rephrased: edits whose one rank-one write (ROME) gives the new object on the edit prompt, and on a wording with the
        subject in another place. neighbours: probes of other subjects whose answer that write leaves as it was.
    """

    seen: float
    unseen: float
    alias: float
    two_hop: float
    locatable: float
    locatable_transfer: float
    written: float
    written_rephrased: float
    neighbours: float
    layer: int
    edits: int
    facts: int


def measure(
    lm: LanguageModel,
    layer: int = 0,
    edits: int = 200,
    facts: int | None = None,
    split: atlas.Split = "test",
    lr: float = 1.0,
    contexts: int = 3,
    seed: int = 0,
) -> Knowledge:
    """Ask `lm` about the atlas world, and try so many independent edits of its `layer`.

    facts: so many questions of each kind, None for all. lr, contexts: see `find_values`; one context is the bare prompt, the others
    have a sentence of prose before it.
    """
    world = build()
    shares = {}
    for kind in ("seen", "unseen", "alias", "two_hop"):
        asked = atlas.questions(kind, world)
        asked = asked if facts is None else random.Random(seed).sample(asked, min(facts, len(asked)))
        shares[kind] = _share(exact(lm, [encode(lm.tokenizer, q.prompt, f"{q.answer}.") for q in asked]))
    tried = _edits(lm, world, atlas.cases(split)[:edits], layer, lr, contexts, seed)
    return Knowledge(**shares, **tried, layer=layer, edits=edits, facts=len(world.statements))


def exact(
    lm: LanguageModel, encoded: Sequence[Encoded], change: Change = lambda batch, rows: nullcontext(), batch_size: int = 128
) -> Tensor:
    """[N] bool: every token of the target is the arg-max."""
    return answers(lm, encoded, change, batch_size)[1]


def answers(
    lm: LanguageModel, encoded: Sequence[Encoded], change: Change = lambda batch, rows: nullcontext(), batch_size: int = 128
) -> tuple[list[tuple[int, ...]], Tensor]:
    """The arg-max tokens at the target's positions, and whether they all are the target's [N]."""
    said: list[tuple[int, ...]] = []
    right = []
    for start in range(0, len(encoded), batch_size):
        rows = slice(start, start + batch_size)
        batch = lm.batch(encoded[rows])
        with torch.no_grad(), change(batch, rows):
            top = lm.target_logits(batch).argmax(-1)
        right.append(((top == batch.targets) | ~batch.mask).all(-1))
        said += [tuple(row[mask].tolist()) for row, mask in zip(top, batch.mask, strict=True)]
    return said, torch.cat(right)


def _share(right: Tensor) -> float:
    return round(right.double().mean().item(), 4)


def _edits(lm: LanguageModel, world: World, cases: Sequence[EditCase], layer: int, lr: float, contexts: int, seed: int) -> dict[str, float]:
    rng = random.Random(seed)
    prefixes = tuple(prose(rng) + " " for _ in range(contexts - 1))
    facts = [case.facts[0] for case in cases]
    requests = [request(lm, fact, prefixes) for fact in facts]
    sweep = Sweep(lm, requests, [layer])
    base, keys = sweep.outputs[:, 0], sweep.keys.mean(1)
    # Summed over tokens: p > 0.9 is asked of the whole target, however many tokens it has.
    found = find_values(lm, layer, requests, base, Search(steps=25, lr=lr, decay=1e-3, clamp=4.0, stop=2e-2), CrossEntropy(reduction="sum"))
    plain = [encode_fact(lm, fact) for fact in facts]
    other = [encode_fact(lm, Fact(case.rephrases[0].prompt, fact.subject, fact.target)) for case, fact in zip(cases, facts, strict=True)]

    def placed(batch: Batch, rows: slice) -> AbstractContextManager[None]:
        return at_subject(lm, layer, batch, lambda _: found.delta[rows])

    corpus = Corpus(world, seed)
    texts = ("\n".join(f"{line.prompt} {line.answer}." for line in corpus.document()) for _ in range(1200))
    moment = second_moments(lm, texts, [layer])[layer].to(lm.device)
    left, right = rank_one(lm, layer, keys, base + found.delta, moment)

    def written(batch: Batch, rows: slice) -> AbstractContextManager[None]:
        return own_write(lm, layer, batch, left[rows], right[rows])

    near = [
        (i, encode(lm.tokenizer, p.prompt, p.answers[0]))
        for i, c in enumerate(cases)
        for p in (*c.neighbourhood, *c.locality["Other_Subjects"])
    ]
    owner, asked = torch.tensor([i for i, _ in near]), [e for _, e in near]

    def written_near(batch: Batch, rows: slice) -> AbstractContextManager[None]:
        return own_write(lm, layer, batch, left[owner[rows]], right[owner[rows]])

    before, after = answers(lm, asked)[0], answers(lm, asked, written_near)[0]
    return {
        "locatable": _share(found.probability > 0.9),
        "locatable_transfer": _share(exact(lm, other, placed)),
        "written": _share(exact(lm, plain, written)),
        "written_rephrased": _share(exact(lm, other, written)),
        "neighbours": _share(torch.tensor([a == b for a, b in zip(before, after, strict=True)])),
    }


def rank_one(lm: LanguageModel, layer: int, keys: Tensor, values: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """ROME's write (eq. 2) for F independent edits: Δ_f = left_f right_fᵀ with right = C⁻¹k / (kᵀC⁻¹k), left = v* − W k.

    keys k [F, d_in], values v* [F, d], moment C [d_in, d_in] float64. Returns left [F, d], right [F, d_in].
    """
    wide = keys.double()
    whitened = torch.linalg.solve(moment, wide.T).T  # [F, d_in]
    right = (whitened / (whitened * wide).sum(-1, keepdim=True)).to(keys.dtype)
    with torch.no_grad():
        left = values - submodule(lm.model, lm.anatomy.mlp_down[layer])(keys)
    return left, right


@contextmanager
def own_write(lm: LanguageModel, layer: int, batch: Batch, left: Tensor, right: Tensor) -> Iterator[None]:
    """Every row of the batch runs with its own Δ = left rightᵀ at the layer's down-projection."""
    path = lm.anatomy.mlp_down[layer]
    with capture(lm.model, {"k": path}, inputs=True) as seen:

        def delta(output: Tensor) -> Tensor:
            strength = (seen["k"] * right.unsqueeze(1)).sum(-1, keepdim=True)  # [B, T, 1]
            return (strength * left.unsqueeze(1)).reshape(output.shape)

        with add_to_output(submodule(lm.model, path), delta):
            yield
