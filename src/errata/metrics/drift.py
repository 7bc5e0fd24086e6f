"""How far the hidden states of other facts have moved (DeltaEdit §5.5, Figures 4b and 8; EVALUATION §4): numbers, and a picture's points.

    before = states(lm, prompts)    # the unedited model
    …                               # edits
    after = states(lm, prompts)
    measure(before, after)

The paper takes 1,000 factual prompts and says neither which layer nor which token. Here it is the prompt's last token, from which the
answer is predicted, and unless said otherwise the output of the last layer (before the final norm): whatever an edit did, in whichever
layer or beside the weights, has arrived there. t-SNE shows neighbourhoods and no distances, so that two clouds which look alike may be
far apart, and the other way round; hence the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from errata.lm import LanguageModel, ModelError, encode
from errata.lm.capture import capture
from errata.lm.resume import run_to
from errata.metrics.teacher_forced import BATCH_SIZE, batches

PROMPTS = 1000
"""So many prompts as in the paper."""
RESAMPLES = 1000
PERPLEXITY = 30.0
"""t-SNE's own default; a third of the points where there are few."""
NUMBERS = ("cosine", "relative_l2", "relative_l2_whole", "cka")
_NOTHING = 1e-10
"""What is left of a sum of squares when all that cancels has cancelled, in its own size."""

Floats = np.typing.NDArray[np.float64]


@torch.no_grad()
def states(lm: LanguageModel, prompts: Sequence[str], layer: int | None = None, batch_size: int = BATCH_SIZE) -> Tensor:
    """What layer `layer` (None: the last) gives at each prompt's last token [N, d], of the model as it is, edits included.

    On the CPU, in float32 (float64 for a model in float64). The layers above do not run. The same prompts make the same batches, so a model
    that has not moved gives the same bits.
    Raises ValueError if there are no prompts, or for one without tokens; ModelError for one that is too long, or a layer that is not there.
    """
    if not prompts:
        raise ValueError("there are no prompts to take hidden states of; give at least one")
    if layer is None:
        layer = len(lm.anatomy.layers) - 1
    if not 0 <= layer < len(lm.anatomy.layers):
        raise ModelError(f"{lm.name} has layers 0 to {len(lm.anatomy.layers) - 1}, not {layer}; choose one of these")
    encoded = [encode(lm.tokenizer, prompt) for prompt in prompts]
    rows: dict[int, Tensor] = {}
    for chosen in batches(lm, encoded, batch_size):
        batch = lm.batch([encoded[i] for i in chosen])
        with capture(lm.model, {"state": lm.anatomy.layers[layer]}) as seen:
            run_to(lm, batch, layer)
        state = seen["state"]  # [B, T, d]
        last = batch.attention_mask.sum(-1).to(state.device) - 1  # not the prompt's length: a memory may have put a text in front
        picked = state[torch.arange(len(chosen), device=state.device), last]
        rows |= zip(chosen, picked.to(torch.promote_types(picked.dtype, torch.float32)).cpu(), strict=True)
    return torch.stack([rows[i] for i in range(len(prompts))])


def compare(before: Tensor, after: Tensor) -> dict[str, Any]:
    """How far the states of N prompts [N, d] have moved, in float64; JSON-ready, to six decimals.

    prompts: over how many. left_out: how many are not, because a state of theirs is not finite, or was 0 before.
    cosine: the mean over the prompts of the cosine between a prompt's two states. The states of most models share one large component,
        which keeps it near 1 whatever happens.
    relative_l2: the mean over the prompts of ‖after − before‖ / ‖before‖.
    relative_l2_whole: the same of all prompts as one vector, √Σ‖after − before‖² / √Σ‖before‖²; prompts with large states weigh more.
    cka: linear centred kernel alignment (Kornblith et al. 2019, §3), ‖BᵀA‖² / (‖AᵀA‖ ‖BᵀB‖) in Frobenius norms, columns centred: is the
        prompts' arrangement the same, up to turning, moving and scaling all of them together? 1: it is. None where all states are the
        same. Where the prompts are fewer than d it is large for anything (two random clouds: about N / (N + d)).
    intervals: name -> [low, high] of 95 %, by bootstrap over the prompts (percentiles; cka's are moved by the resamples' own bias, as
        prompts that occur twice make it larger). Resampled with a seed of its own: the same states give the same interval.

    A number without data is None, and so are the ends of its interval. Raises ValueError for two shapes.
    """
    old, new = _paired(before, after)
    kept = _usable(old, new)
    left_out = int((~kept).sum())
    old, new = old[kept], new[kept]
    n = len(old)
    nothing: dict[str, Any] = {name: None for name in NUMBERS}
    if not n:
        return {"prompts": 0, "left_out": left_out, **nothing, "intervals": {name: [None, None] for name in NUMBERS}}
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float64)  # [R, N] how often each prompt
    once = np.ones((1, n))
    found = dict(zip(NUMBERS, zip(_numbers(old, new, once), _numbers(old, new, drawn), strict=True), strict=True))
    numbers: dict[str, float | None] = {}
    intervals: dict[str, list[float | None]] = {}
    for name, ((value,), resampled) in found.items():
        there = resampled[~np.isnan(resampled)]
        if np.isnan(value) or not len(there):
            numbers[name], intervals[name] = None, [None, None]
            continue
        ends = np.percentile(there, [2.5, 97.5])
        if name == "cka":
            ends = np.clip(ends + value - there.mean(), 0.0, 1.0)
        numbers[name], intervals[name] = round(float(value), 6), [round(float(end), 6) for end in ends]
    return {"prompts": n, "left_out": left_out, **numbers, "intervals": intervals}


def _paired(before: Tensor, after: Tensor) -> tuple[Floats, Floats]:
    if before.shape != after.shape or before.ndim != 2:
        raise ValueError(
            f"states before are {list(before.shape)} and after {list(after.shape)}; take both with states(lm, prompts, layer), "
            "of the same prompts and layer"
        )
    return before.double().numpy(force=True), after.double().numpy(force=True)


def _usable(old: Floats, new: Floats) -> np.typing.NDArray[np.bool_]:
    there: np.typing.NDArray[np.bool_] = np.logical_and.reduce([np.isfinite(old).all(1), np.isfinite(new).all(1), old.any(1)])
    return there


def _numbers(old: Floats, new: Floats, counts: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """The NUMBERS [R] each, in their order, over prompts that occur so often (counts [R, N])."""
    size, moved, now = (np.square(x).sum(1) for x in (old, new - old, new))  # [N] each
    total = counts.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = np.where(now > 0, (old * new).sum(1) / np.sqrt(size * now), 0.0)  # a state that has become 0 points nowhere
        return (
            counts @ cosines / total,
            counts @ np.sqrt(moved / size) / total,
            np.sqrt(counts @ moved / (counts @ size)),
            _cka(old, new, counts),
        )


def _cka(old: Floats, new: Floats, counts: Floats) -> Floats:
    """Linear CKA [R] of states of prompts that occur so often, through the N × N products of states, which are the same for all R."""
    one, other = ((x - x.mean(0)) / (np.abs(x).max() or 1.0) for x in (old, new))
    k, l = one @ one.T, other @ other.T  # noqa: E741  # [N, N], as in the literature
    both, first, second = (_alignment(*pair, counts) for pair in ((k, l), (k, k), (l, l)))
    ratio: Floats = both / np.sqrt(first * second)
    return ratio


def _alignment(k: Floats, l: Floats, counts: Floats) -> Floats:  # noqa: E741
    """‖BᵀA‖² [R] of columns that are centred anew for each row w of counts: tr(K W' L W'), W' = diag(w) − w wᵀ / Σw. NaN where it is 0."""
    n = counts.sum(1)
    kw, lw = counts @ k, counts @ l  # [R, N]
    plain = ((counts @ (k * l)) * counts).sum(1)
    centred = plain - 2 / n * (counts * kw * lw).sum(1) + (kw * counts).sum(1) * (lw * counts).sum(1) / n**2
    scale = ((counts @ np.abs(k * l)) * counts).sum(1)
    found: Floats = np.where(centred > _NOTHING * scale, centred, np.nan) if k is l else np.maximum(centred, 0.0)
    return found


def embed(before: Tensor, after: Tensor, seed: int = 0) -> tuple[Floats, Floats]:
    """Both clouds [N, d] in the plane, [N, 2] each, by one t-SNE of all 2 N states; see `embed_together`."""
    old, new = embed_together(before, {"after": after}, seed)
    return old, new["after"]


def embed_together(before: Tensor, after: Mapping[str, Tensor], seed: int = 0) -> tuple[Floats, dict[str, Floats]]:
    """The states before and those after each of several methods [N, d], by one t-SNE: the points [N, 2], and label -> points [N, 2].

    Begun at the principal components, and run by one thread, so that the same states and seed give the same points on the same machine.
    (Another machine rounds otherwise, and t-SNE magnifies that.) 1,000 prompts before and after take about half a minute, and time grows a
    little faster than the number of points.

    Raises ValueError for fewer than two prompts, other shapes, or states that are not finite; ImportError without scikit-learn.
    """
    try:
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ImportError("t-SNE needs scikit-learn; install errata[plots]") from error
    clouds = [_paired(before, cloud)[1] for cloud in after.values()]
    whole = np.concatenate([before.double().numpy(force=True), *clouds])
    n = len(before)
    if n < 2 or not clouds:
        raise ValueError(f"t-SNE needs the states of at least two prompts, before and after; got {n} prompts, {len(clouds)} times after")
    if not np.isfinite(whole).all():
        raise ValueError("some states are not finite, the model is broken there; leave these prompts out (`measure` does)")
    perplexity = min(PERPLEXITY, (len(whole) - 1) / 3)
    with threadpool_limits(limits=1):  # sums keep their order
        points = TSNE(2, init="pca", perplexity=perplexity, random_state=seed).fit_transform(whole.astype(np.float32)).astype(np.float64)
    parts = np.split(points, len(clouds) + 1)
    return parts[0], dict(zip(after, parts[1:], strict=True))


def measure(before: Tensor, after: Tensor, seed: int = 0) -> dict[str, Any]:
    """What `compare` gives, and the points that `errata.report.drift` draws; see `measure_together`."""
    return measure_together(before, {"after": after}, seed)["after"]


def measure_together(before: Tensor, after: Mapping[str, Tensor], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Label -> what `compare` gives, with points: {before, after: [[x, y], …]}, all labels' in one plane, where they can be compared.

    JSON-ready. A prompt is in the picture if all its states are finite. points: None where fewer than two are.
    Raises what `embed_together` raises, and ValueError for two shapes.
    """
    pairs = {label: _paired(before, cloud) for label, cloud in after.items()}
    finite = np.logical_and.reduce([np.isfinite(old).all(1) & np.isfinite(new).all(1) for old, new in pairs.values()])
    kept = torch.from_numpy(np.flatnonzero(finite))
    found = {label: compare(before, cloud) for label, cloud in after.items()}
    if len(kept) < 2:
        return {label: {**numbers, "points": None} for label, numbers in found.items()}
    old, new = embed_together(before.cpu()[kept], {label: cloud.cpu()[kept] for label, cloud in after.items()}, seed)
    points = {label: {"before": old.round(2).tolist(), "after": cloud.round(2).tolist()} for label, cloud in new.items()}
    return {label: {**numbers, "points": points[label]} for label, numbers in found.items()}
