"""Second moments against the plain definition, and what happens to a collection that is stopped, added, cached or misused."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from errata.lm import LanguageModel
from errata.lm.capture import submodule
from errata.statistics import Corpus, Moments, StatisticsError, collect, moments_for, second_moments, texts
from errata.statistics.moments import part_of
from tests.families import FAMILIES, SENTENCES, language_model

TEXTS = [f"{a} {b}" for a in SENTENCES for b in SENTENCES]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "statistics"


@pytest.fixture
def lm() -> LanguageModel:
    return language_model("llama")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("\n\n".join(TEXTS), encoding="utf-8")
    return path


def ids_of(lm: LanguageModel, text: str) -> list[int]:
    return list(lm.tokenizer(text)["input_ids"])[:96]  # the tiny models' window


def reference(lm: LanguageModel, rows: list[list[int]], layer: int) -> torch.Tensor:
    """One text at a time through the whole model, the outer product of every key, one by one."""
    total = torch.zeros(lm.anatomy.key_size, lm.anatomy.key_size, dtype=torch.float64)
    count = 0

    def add(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal count
        for key in args[0].reshape(-1, args[0].shape[-1]).double():
            total.add_(torch.outer(key, key))
            count += 1

    handle = submodule(lm.model, lm.anatomy.mlp_down[layer]).register_forward_pre_hook(add)
    with torch.no_grad():
        for ids in rows:
            lm.model(input_ids=torch.tensor([ids]))
    handle.remove()
    return total / count


def equal(a: Moments, b: Moments) -> bool:
    return a.count == b.count and a.layers == b.layers and all(torch.equal(a.sums[i], b.sums[i]) for i in a.layers)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gemma2"}))  # Gemma 2 in float64 has NaN at padding
def test_streaming_equals_the_definition(family: str) -> None:
    lm = language_model(family, bos=family == "llama", dtype=torch.float64)
    few = TEXTS[:5]
    for layers in ([0, 2], [3]):
        made = collect(lm, few, layers, tokens=10**6, batch_size=3)
        plain = second_moments(lm, iter(few), layers, batch_size=2)
        for layer in layers:
            wanted = reference(lm, [ids_of(lm, text) for text in few], layer)
            torch.testing.assert_close(made.mean(layer), wanted, rtol=1e-10, atol=1e-10 * wanted.abs().max().item())
            torch.testing.assert_close(plain[layer], wanted, rtol=1e-10, atol=1e-10 * wanted.abs().max().item())


def test_exactly_so_many_tokens_the_first_ones(lm: LanguageModel) -> None:
    made = collect(lm, TEXTS, [1], tokens=333, batch_size=3)
    rows, left = [], 333
    for text in TEXTS:
        rows.append(ids_of(lm, text)[:left])
        left -= len(rows[-1])
        if not left:
            break
    assert made.count == 333 == sum(map(len, rows))
    torch.testing.assert_close(made.mean(1), reference(lm, rows, 1), rtol=1e-4, atol=1e-6)
    assert collect(lm, TEXTS * 9, [1]).count == 10 * lm.anatomy.key_size


def test_long_and_blank_texts(lm: LanguageModel) -> None:
    long = " ".join(SENTENCES) * 200
    made = collect(lm, ["", " \n", long, SENTENCES[0]], [0], tokens=10**6)
    wanted = reference(lm, [ids_of(lm, long), ids_of(lm, SENTENCES[0])], 0)
    assert made.count == 96 + len(ids_of(lm, SENTENCES[0]))
    torch.testing.assert_close(made.mean(0), wanted, rtol=1e-4, atol=1e-6)
    for empty in ([], ["", "\n"]):
        with pytest.raises(StatisticsError, match="hold no tokens"):
            collect(lm, empty, [0])
        with pytest.raises(ValueError, match="hold no tokens"):
            second_moments(lm, empty, [0])


def test_only_the_layers_that_are_needed_run(lm: LanguageModel) -> None:
    ran = []
    for i, path in enumerate(lm.anatomy.mlp_down):
        submodule(lm.model, path).register_forward_hook(lambda *_, i=i: ran.append(i))
    submodule(lm.model, lm.anatomy.head).register_forward_hook(lambda *_: ran.append("head"))
    collect(lm, TEXTS, [0, 1], tokens=50)
    assert set(ran) == {0, 1}


def test_halves_add_up_to_the_whole() -> None:
    """Up to the order of the additions, in a model whose keys do not depend on what else is in the batch."""
    lm = language_model("llama", dtype=torch.float64)
    whole = collect(lm, TEXTS, [0, 3], tokens=10**6)
    first = collect(lm, TEXTS[:20], [0, 3], tokens=10**6, corpus="first")
    second = collect(lm, TEXTS[20:], [0, 3], tokens=10**6, corpus="second")
    before = {layer: first.sums[layer].clone() for layer in first.layers}
    both = first.merge(second)
    assert both.count == whole.count and both.corpus == "first + second" and len(both.pieces) == 2
    for layer in (0, 3):
        assert torch.equal(first.sums[layer], before[layer]), "what is merged stays as it was"
        assert torch.equal(both.sums[layer], first.sums[layer] + second.sums[layer])
        torch.testing.assert_close(both.mean(layer), whole.mean(layer), rtol=1e-12, atol=1e-12 * whole.mean(layer).abs().max().item())
    with pytest.raises(StatisticsError, match="count twice"):
        both.merge(second)
    with pytest.raises(StatisticsError, match="layers"):
        first.merge(second.only([0]))
    with pytest.raises(StatisticsError, match="two models"):
        first.merge(collect(language_model("llama"), TEXTS[20:], [0, 3], tokens=50))
    assert first.merge() is not first and equal(first.merge(), first)


def test_a_file_brings_back_everything(lm: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "stats.safetensors"
    made = collect(lm, TEXTS, [2, 0], tokens=200, corpus="notes")
    made.save(path)
    read = Moments.load(path)
    assert equal(read, made) and read.layers == (0, 2) and read.width == lm.anatomy.key_size
    assert (read.model, read.fingerprint, read.corpus, read.pieces) == ("llama", lm.fingerprint, "notes", made.pieces)
    assert Moments.load(path, [2]).layers == (2,) and [p.name for p in path.parent.iterdir()] == ["stats.safetensors"]
    with pytest.raises(StatisticsError, match=r"holds layers \[0, 2\]"):
        Moments.load(path, [0, 1])
    with pytest.raises(StatisticsError, match="not for \\[1\\]"):
        read.mean(1)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(StatisticsError, match="damaged"):
        Moments.load(path)
    with pytest.raises(StatisticsError, match="there is no file"):
        Moments.load(tmp_path / "nothing")


def test_a_wrong_model_is_refused(lm: LanguageModel) -> None:
    made = collect(lm, TEXTS, [0], tokens=50)
    made.check(lm)
    made.check(LanguageModel(lm.model, lm.tokenizer, "again"))
    for other in (language_model("llama", seed=1), language_model("llama", dtype=torch.bfloat16)):
        assert made.matches(lm) and not made.matches(other)
        with pytest.raises(StatisticsError, match="load that model in the same dtype"):
            made.check(other)


def test_an_edited_model_is_not_filed_under_the_unedited_one(lm: LanguageModel) -> None:
    _ = lm.fingerprint
    with torch.no_grad():
        submodule(lm.model, lm.anatomy.mlp_down[0]).weight.add_(0.01)
    with pytest.raises(StatisticsError, match="revert the edits"):
        collect(lm, TEXTS, [0], tokens=50)


def test_overflowing_keys_are_reported(lm: LanguageModel) -> None:
    with torch.no_grad():
        lm.model.get_input_embeddings().weight.fill_(torch.inf)
    with pytest.raises(StatisticsError, match="layer 1 are not finite"):
        collect(lm, TEXTS, [1], tokens=50)


class Killed(BaseException):
    """As abrupt as a signal: nothing catches it."""


@pytest.mark.parametrize("after", [1, 16, 30])
def test_killed_and_resumed_gives_identical_sums(lm: LanguageModel, corpus: Path, tmp_path: Path, after: int) -> None:
    """A batch is one text here, a chunk a dozen of them; the state is written after every chunk."""
    notes = texts(corpus)
    source = Corpus(notes.name, notes.digest, lambda: iter(TEXTS * 9))
    other = Corpus(notes.name, notes.digest, lambda: iter(TEXTS[1:] * 9))
    path = tmp_path / "stats.safetensors"

    def go_on(layers: list[int], source: Corpus, **more: Any) -> Moments:
        return collect(lm, source, layers, tokens=1500, batch_size=1, every=0.0, **more)

    undisturbed = go_on([0, 2], source)
    counts: list[int] = []

    def progress(count: int, of: int, what: str) -> None:
        assert of == 1500 and what == "tokens of notes.txt"
        counts.append(count)
        if len(counts) == after:
            raise Killed

    with pytest.raises(Killed):
        go_on([0, 2], source, path=path, progress=progress)
    assert not path.exists() and part_of(path).exists() == (after > 1)
    if after > 1:
        with pytest.raises(StatisticsError, match="--resume"):
            go_on([0, 2], source, path=path)
        with pytest.raises(StatisticsError, match="layers was"):
            go_on([0, 1], source, path=path, resume=True)
        with pytest.raises(StatisticsError, match="not those that the collection began with"):
            go_on([0, 2], other, path=path, resume=True)
    later: list[int] = []
    resumed = go_on([0, 2], source, path=path, resume=True, progress=lambda count, *_: later.append(count))
    assert equal(resumed, undisturbed) and resumed.pieces == undisturbed.pieces
    assert later[-1] == 1500 and (later[0] > counts[0]) == (after > 1), "it went on, and did not begin anew"
    assert [p.name for p in tmp_path.glob("*stats*")] == ["stats.safetensors"]
    later.clear()
    read = go_on([0, 2], source, path=path, resume=True, progress=lambda count, *_: later.append(count))
    assert equal(read, undisturbed) and not later, "a finished one is read"
    with pytest.raises(StatisticsError, match="exists already"):
        go_on([0, 2], source, path=path)


def fresh(lm: LanguageModel) -> LanguageModel:
    """As in the next process: nothing in memory."""
    vars(lm.model).pop("errata_statistics", None)
    return LanguageModel(lm.model, lm.tokenizer, lm.name)


def test_the_cache_spares_the_model(lm: LanguageModel, corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = moments_for(lm, [2, 0], corpus, tokens=100)
    assert made.layers == (0, 2) and made.count == 100 and made.corpus == "notes.txt"
    assert len(list(cache.rglob("*.safetensors"))) == 1 and not list(cache.rglob("*.part"))

    def asleep(*_: object, **__: object) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr("errata.statistics.moments.advance", asleep)
    assert moments_for(lm, [0, 2], str(corpus), tokens=100).sums[0] is made.sums[0], "from memory"
    assert moments_for(lm, [2], str(corpus), tokens=100).layers == (2,)
    again = fresh(lm)
    assert equal(moments_for(again, [0], corpus, tokens=100), made.only([0])), "from a file, of which more layers would be had"
    assert equal(moments_for(again, [0, 2], corpus, tokens=100), made)
    with pytest.raises(AssertionError, match="the model ran"):
        moments_for(again, [0, 2], corpus, tokens=101)
    with pytest.raises(AssertionError, match="the model ran"):
        moments_for(again, [1], corpus, tokens=100)
    corpus.write_text("Another text.")
    with pytest.raises(AssertionError, match="the model ran"):
        moments_for(fresh(lm), [0], corpus, tokens=100)


@pytest.mark.parametrize("damage", [b"", b"no safetensors at all", None])
def test_a_broken_cache_is_collected_anew(lm: LanguageModel, corpus: Path, cache: Path, damage: bytes | None) -> None:
    made = moments_for(lm, [0], corpus, tokens=100)
    (path,) = cache.rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    part_of(path).write_bytes(b"half")
    assert equal(moments_for(fresh(lm), [0], corpus, tokens=100), made)
    assert equal(Moments.load(path), made) and not part_of(path).exists()


def test_a_cache_that_cannot_be_written_is_done_without(
    lm: LanguageModel, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "file"))
    assert moments_for(lm, [0], corpus, tokens=100).count == 100


def test_processes_that_need_them_at_once_collect_them_once(
    lm: LanguageModel, corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that comes while another collects waits, and reads. Two threads with models of their own stand for processes: locks on files
    keep both apart."""
    collected, begun = [], Event()

    def slowly(*args: Any, **options: Any) -> Moments:
        collected.append(begun.set())
        time.sleep(0.3)
        return collect(*args, **options)

    monkeypatch.setattr("errata.statistics.moments.collect", slowly)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(moments_for, lm, [0], corpus, tokens=100)
        assert begun.wait(10)
        second = pool.submit(moments_for, language_model("llama"), [0], corpus, tokens=100)
        assert equal(first.result(), second.result())
    assert len(collected) == 1 and len(list(cache.rglob("*.safetensors"))) == 1


def test_collected_files_are_a_corpus_for_editors(lm: LanguageModel, corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    made = collect(lm, texts(corpus), [0, 1], tokens=70, path=path)
    assert equal(moments_for(lm, [1], str(path)), made.only([1]))
    with pytest.raises(StatisticsError, match="holds layers"):
        moments_for(lm, [1, 2], path)
    with pytest.raises(StatisticsError, match="of the model 'llama'"):
        moments_for(language_model("llama", seed=1), [1], path)


@pytest.mark.parametrize("layers", [[], [4], [-1]])
def test_layers_that_do_not_exist(lm: LanguageModel, layers: list[int]) -> None:
    for call in (lambda: collect(lm, TEXTS, layers), lambda: moments_for(lm, layers, "bundled"), lambda: second_moments(lm, TEXTS, layers)):
        with pytest.raises(StatisticsError, match="layers 0 to 3"):
            call()
