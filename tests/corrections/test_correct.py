"""From requests to a ledger: what is known, contradicted, turned down or replaced; stopped and gone on with; computed anew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from errata.corrections import Limits, Outcome, correct, rebase
from errata.edits import DenseDelta, EditError, Stack
from errata.edits.ledger import Ledger
from errata.facts import EditCase, Fact, Probe
from errata.lm.asking import has_memory
from errata.lm.suffix import is_exact
from errata.methods.base import Session
from errata.metrics.teacher_forced import predict
from tests.families import language_model
from tests.methods.test_contract import AGAIN, FACT, OTHER, method, same, weights

OPEN = {"fact": 0.5, "batch": 0.0, "rephrasings": 0.0, "locality": 0.0, "locality_drop": 1.0, "perplexity": 1e9}
ELSE = Fact(FACT.prompt, FACT.subject, "Warsaw")


def limits(**changes: Any) -> Limits:
    return Limits(**{**vars(Limits.read()), **OPEN, **changes})


def cases(*facts: Fact) -> list[EditCase]:
    return [EditCase(str(i), (fact,)) for i, fact in enumerate(facts)]


def done(lm: Any, folder: Path, *facts: Fact, name: str = "ft-m", settings: dict[str, Any] | None = None, **options: Any) -> list[Outcome]:
    with Ledger.write(folder, lm) as ledger:
        editor = method(name, **({"steps": 60} if name == "ft-m" else {}) | (settings or {}))
        found = correct(lm, ledger, cases(*facts), editor, **{"limits": limits(), **options})
        assert not Stack.of(lm).active and ledger.verify(lm) == []
    return found


def told(outcomes: list[Outcome]) -> list[tuple[str, int | None]]:
    return [(one.status, one.number) for one in outcomes]


def now(lm: Any, folder: Path) -> dict[str, torch.Tensor]:
    with Ledger.open(folder) as ledger:
        ledger.apply(lm)
    found = weights(lm)
    Stack.of(lm).clear()
    return found


def holds(lm: Any, folder: Path, *facts: Fact) -> bool:
    with Ledger.open(folder) as ledger:
        ledger.apply(lm)
    found = all(one.accuracy == 1 for one in predict(lm, [(fact.text, fact.target) for fact in facts]))
    Stack.of(lm).clear()
    return found


def test_an_edit_is_measured_and_kept(tmp_path: Path) -> None:
    lm = language_model("llama")
    before = weights(lm)
    (one,) = done(lm, tmp_path / "l", FACT, note="asked for by Ann", seed=3)
    assert (one.status, one.number, one.reason) == ("made", 1, None)
    assert one.to_dict() == {"facts": [str(FACT)], "status": "made", "number": 1, "reason": None}
    assert same(weights(lm), before), "the model is left as it was"
    with Ledger.open(tmp_path / "l") as ledger:
        (entry,) = ledger.entries()
        assert entry.note == "asked for by Ann" and entry.seed == 3 and entry.metrics is not None
        assert entry.metrics["before"]["fact"] < entry.metrics["after"]["fact"] == 1
        assert entry.metrics["before"]["locality"] == entry.metrics["before"]["perplexity"] == 1
    assert holds(lm, tmp_path / "l", FACT)


def test_what_is_known_already_is_skipped_unless_forced(tmp_path: Path) -> None:
    lm = language_model("llama")
    done(lm, tmp_path / "l", FACT)
    again = Fact("  the capital OF {} is", "France", "Tokyo")
    (skipped,) = done(lm, tmp_path / "l", again)
    assert told([skipped]) == [("skipped", 1)] and skipped.reason == "edit 1 says so already", "case and space make no other prompt"


def own_answers(lm: Any) -> Iterator[Fact]:
    """What the model says of itself; not every token that it says is read again as the same one."""
    for subject in ("France", "Japan", "Spain", "Lyon", "Warsaw", "Marie Curie"):
        for prompt in ("The capital of {} is", "{} lies in", "The river of {} is"):
            if said := lm.generate([Fact(prompt, subject, "x").text], 1)[0].strip():
                yield Fact(prompt, subject, said)


def test_the_model_s_own_knowledge_is_skipped(tmp_path: Path) -> None:
    lm = language_model("llama")
    known = next(fact for fact in own_answers(lm) if predict(lm, [(fact.text, fact.target)])[0].accuracy == 1)
    (skipped,) = done(lm, tmp_path / "l", known)
    assert told([skipped]) == [("skipped", None)] and skipped.reason == "the model says so already"
    (forced,) = done(lm, tmp_path / "l", known, force=True)
    assert told([forced]) == [("made", 1)]


def test_a_contradiction_is_rejected_or_replaces(tmp_path: Path) -> None:
    lm, folder = language_model("llama"), tmp_path / "l"
    done(lm, folder, FACT, AGAIN)
    (no,) = done(lm, folder, ELSE)
    assert told([no]) == [("rejected", 1)] and no.reason == "edit 1 says 'Tokyo' about the same; undo it, or replace it"
    (yes,) = done(lm, folder, ELSE, replace=True)
    assert yes.reason == "in the place of edit 1" and told([yes]) == [("made", 3)] and holds(lm, folder, ELSE)
    with Ledger.open(folder) as ledger:
        assert [entry.active for entry in ledger.entries()] == [False, True, True]
        assert [(event.action, event.edit) for event in ledger.events()] == [("made", 1), ("made", 2), ("replaced", 1), ("made", 3)]
        assert ledger.built_on([2]) == [3] and ledger.built_on([1]) == [2]
    found = now(lm, folder)
    other = language_model("llama")
    done(other, tmp_path / "other", FACT, AGAIN)
    with Ledger.write(tmp_path / "other", other) as ledger:
        ledger.undo(1)
    done(other, tmp_path / "other", ELSE)
    assert same(found, now(other, tmp_path / "other")), "as if it had been undone before"


def test_an_edit_that_cannot_replace_leaves_the_old_one(tmp_path: Path) -> None:
    lm, folder = language_model("llama"), tmp_path / "l"
    done(lm, folder, FACT)
    found = now(lm, folder)
    (no, more) = done(lm, folder, ELSE, AGAIN, replace=True, limits=limits(perplexity=0.0))
    assert no.status == more.status == "rejected" and "perplexity" in str(no.reason)
    assert same(found, now(lm, folder)) and holds(lm, folder, FACT)


def test_a_broken_limit_takes_the_edit_out_and_is_remembered(tmp_path: Path) -> None:
    lm, folder = language_model("llama"), tmp_path / "l"
    strict = limits(perplexity=0.0)
    first, second = done(lm, folder, FACT, OTHER, limits=strict)
    assert first.status == second.status == "rejected" and str(first.reason).startswith("perplexity ")
    with Ledger.open(folder) as ledger:
        assert ledger.entries() == []
        no = ledger.rejections()[0]
        assert no.facts == (FACT,) and no.reason == first.reason and no.metrics and no.metrics["after"]["fact"] == 1
    again, _ = done(lm, folder, FACT, OTHER, limits=strict)
    assert again.status == "rejected" and again.reason == f"before: {first.reason}; force it to try again"
    forced, _ = done(lm, folder, FACT, OTHER, limits=strict, force=True)
    assert forced.status == "rejected" and forced.reason == first.reason, "tried again, and measured again"
    for change in ({"settings": {"steps": 50}, "limits": limits(perplexity=1e8)}, {"limits": limits(fact=0.4)}):
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        other, _ = done(lm, place, FACT, OTHER, limits=strict)
        changed, _ = done(lm, place, FACT, OTHER, **change)
        assert (other.status, changed.status) == ("rejected", "made"), "asked for in another way it is another request"


def test_what_was_turned_down_is_tried_again_once_the_model_is_another(tmp_path: Path) -> None:
    lm, folder = language_model("llama"), tmp_path / "l"
    done(lm, folder, FACT)
    assert done(lm, folder, OTHER, limits=limits(perplexity=0.0))[0].status == "rejected"
    assert str(done(lm, folder, OTHER, limits=limits(perplexity=0.0))[0].reason).startswith("before: ")
    with Ledger.write(folder) as ledger:
        ledger.undo(1)
    assert str(done(lm, folder, OTHER, limits=limits(perplexity=0.0))[0].reason).startswith("perplexity ")


def test_requests_that_cannot_be_are_rejected_one_by_one(tmp_path: Path) -> None:
    lm, folder = language_model("llama"), tmp_path / "l"
    absent = Fact("The capital of France is", "Bordeaux", "Lyon")
    long = Fact("Paris " * 100 + "{} is", "France", "Lyon")
    outcomes = done(lm, folder, absent, long, FACT)
    assert [one.status for one in outcomes] == ["rejected", "rejected", "made"]
    assert "Bordeaux" in str(outcomes[0].reason) and "tokens" in str(outcomes[1].reason)
    with Ledger.open(folder) as ledger:
        assert [one.reason for one in ledger.rejections()] == [one.reason for one in outcomes[:2]]


def test_an_edit_that_breaks_the_weights_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = language_model("llama")
    monkeypatch.setattr("errata.methods.ft.DenseDelta", lambda path, tensor: DenseDelta(path, tensor / 0))
    before = weights(lm)
    (no,) = done(lm, tmp_path / "l", FACT, limits=None)
    assert no.status == "rejected" and "finite" in str(no.reason) and same(weights(lm), before)


def test_rephrasings_are_asked(tmp_path: Path) -> None:
    lm = language_model("llama")
    case = EditCase("0", (FACT,), (Probe("Spain lies in", (FACT.target,)), Probe("Lyon is", (FACT.target,))))
    with Ledger.write(tmp_path / "l", lm) as ledger:
        (no,) = correct(lm, ledger, [case], method("ft-m"), limits=limits(rephrasings=1.1))
    assert no.status == "rejected" and str(no.reason).startswith("rephrasings ")


@pytest.mark.parametrize("name", ["ft-m", "lora", "locft", "deltaedit", "alphaedit", "melo", "wise", "retrieval"])
def test_stopped_and_gone_on_with_ends_at_the_same_weights(name: str, tmp_path: Path) -> None:
    facts = [FACT, AGAIN, OTHER]
    for folder, parts in (("whole", [facts]), ("cut", [facts[:1], facts[:2], facts])):
        for part in parts:
            done(language_model("llama"), tmp_path / folder, *part, name=name, limits=None, seed=1)
    lm = language_model("llama")
    with Ledger.open(tmp_path / "whole") as whole, Ledger.open(tmp_path / "cut") as cut:
        assert whole.checksum == cut.checksum and len(cut.entries()) == 3
    assert same(now(lm, tmp_path / "whole"), now(lm, tmp_path / "cut"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_found_of_a_model_with_a_memory_holds_for_that_memory(dtype: torch.dtype, tmp_path: Path) -> None:
    """A new process takes up a ledger with MELO's blocks in it, and looks for a value: whether cached prefixes are exact is found out with
    them beside the weights, and not kept for the model without."""
    lm = language_model("gpt2", dtype=dtype)
    done(lm, tmp_path / "l", FACT, OTHER, name="melo", settings={"steps": 2}, limits=None, force=True)
    fresh, last = language_model("gpt2", dtype=dtype), Fact("The capital of {} is", "Japan", "Paris")
    assert told(done(fresh, tmp_path / "l", last, name="memit", settings={"steps": 2}, limits=None, force=True)) == [("made", 3)]
    assert fresh.anatomy == language_model("gpt2", dtype=dtype).anatomy
    with Ledger.open(tmp_path / "l") as ledger:
        ledger.apply(fresh)
        assert has_memory(fresh)
        is_exact(fresh, 1)
        assert not vars(fresh.model).get("errata_suffix"), "what was found holds for this memory alone"
    Stack.of(fresh).clear()
    assert not has_memory(fresh)


@pytest.mark.parametrize("name", ["alphaedit", "deltaedit", "ft-m"])
def test_stopped_around_a_replacement_it_ends_at_the_same_weights(name: str, tmp_path: Path) -> None:
    """The third request takes the place of the first, with the second made on top of it: what stays in the sums must not depend on who
    saw it happen."""
    lm, asked, more = language_model("llama"), (ELSE, AGAIN), Fact("{} was born in", "Marie Curie", "Lyon")
    checksums, found = set(), []
    for stop in range(3):
        for part in ((FACT, OTHER), asked[:stop], (*asked[stop:], more)):  # without the gate: a few steps do not make them true
            done(lm, tmp_path / str(stop), *part, name=name, settings={"steps": 3}, limits=None, replace=True)
        with Ledger.open(tmp_path / str(stop)) as ledger:
            checksums.add(ledger.checksum)
            assert [(event.action, event.edit) for event in ledger.events()][2:4] == [("replaced", 1), ("made", 3)]
        found.append(now(lm, tmp_path / str(stop)))
    assert len(checksums) == 1 and all(same(one, found[0]) for one in found)


STEPS = ["alphaedit", "deltaedit", "ft-m", "melo", "undo", "redo"]


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.sampled_from(STEPS), min_size=3, max_size=6), batch=st.sampled_from([1, 2]), draw=st.randoms())
def test_who_saw_it_all_and_who_saw_each_alone(steps: list[str], batch: int, draw: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Calls of several methods, with edits undone and redone in between: one model that lives through all of it, whole calls; against a
    new one for every batch of requests."""
    place, stays = tmp_path_factory.mktemp("steps"), language_model("llama")
    facts = [Fact("{} lies in", subject, target) for subject in ("Lyon", "Zürich", "Warsaw") for target in ("Japan", "Russia")]
    for number, step in enumerate(steps):
        asked, pick = draw.sample(facts, 4), draw.random()
        for folder, whole in ((place / "whole", True), (place / "parts", False)):
            if step in ("undo", "redo"):
                with Ledger.write(folder, stays) as ledger, suppress(EditError):  # what a memory holds on to, or contradicts
                    there = [entry.number for entry in ledger.entries(active=step == "undo")]
                    getattr(ledger, step)(there[int(pick * len(there))] if there else 1)
                continue
            for part in [asked] if whole else [asked[:batch], asked]:
                lm = stays if whole else language_model("llama")
                done(lm, folder, *part, name=step, settings={"steps": 2}, limits=None, replace=True, batch=batch, seed=number % 2)
    with Ledger.open(place / "whole") as one, Ledger.open(place / "parts") as other:
        assert one.checksum == other.checksum and len(one.entries()) == len(other.entries())
    assert same(now(stays, place / "whole"), now(language_model("llama"), place / "parts"))


def test_the_model_that_edits_is_the_one_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folded while editing, taken up from the disk afterwards: the same bits at every edit."""
    lm, seen = language_model("llama"), []
    remember = Session.remember

    def look(self: Any, edit: Any) -> None:
        remember(self, edit)
        seen.append(weights(lm))

    monkeypatch.setattr(Session, "remember", look)
    done(lm, tmp_path / "l", FACT, AGAIN, OTHER, limits=None)
    for number in (3, 2, 1):
        assert same(seen[number - 1], now(language_model("llama"), tmp_path / "l"))
        with Ledger.write(tmp_path / "l") as ledger:
            ledger.undo(number)


def test_a_batch_is_one_edit(tmp_path: Path) -> None:
    lm, folder = language_model("llama"), tmp_path / "l"
    outcomes = done(lm, folder, FACT, FACT, ELSE, AGAIN, OTHER, name="locft", batch=4)
    assert [one.status for one in outcomes] == ["made", "skipped", "rejected", "made", "made"]
    assert [one.number for one in outcomes] == [1, None, None, 1, 2]
    assert outcomes[1].reason == "another request says so already"
    assert outcomes[2].reason == "another request says 'Tokyo' about the same; ask for one of them"
    with Ledger.open(folder) as ledger:
        first, second = ledger.entries()
        assert (len(first.facts), len(second.facts)) == (2, 1)
        assert "batch" in (first.metrics or {})["after"] and "fact" in (second.metrics or {})["after"]


def test_what_of_a_batch_did_not_take_is_named(tmp_path: Path) -> None:
    outcomes = done(language_model("llama"), tmp_path / "l", FACT, OTHER, settings={"steps": 1}, batch=2)
    assert all(one.status == "made" for one in outcomes)
    assert any(one.reason and "of its tokens are said by edit 1" in one.reason for one in outcomes)
    strict = limits(fact=1.0, batch=1.0)
    no, _ = done(language_model("llama"), tmp_path / "2", FACT, OTHER, settings={"steps": 1}, batch=2, limits=strict)
    assert no.status == "rejected" and "batch 0" in str(no.reason)


@pytest.mark.parametrize("name", ["ft-m", "deltaedit", "melo"])
def test_rebase_is_computing_without_it(name: str, tmp_path: Path) -> None:
    lm = language_model("llama")
    done(lm, tmp_path / "l", FACT, AGAIN, OTHER, name=name, limits=None, seed=2, note="Ann")
    before = weights(lm)
    with Ledger.write(tmp_path / "l") as ledger:
        new = rebase(lm, ledger, [1], reason="was wrong")
        assert ("made", 4, "edit 2, made again without 1") in [(one.action, one.edit, one.reason) for one in ledger.events()]
        assert [entry.number for entry in new] == [4, 5] and [entry.number for entry in ledger.entries(active=True)] == [4, 5]
        assert [entry.facts for entry in new] == [(AGAIN,), (OTHER,)] and new[0].note == "Ann"
        assert ledger.verify(lm) == [] and same(weights(lm), before)
        assert ledger.built_on([4]) == [5]
        with pytest.raises(EditError, match="undone already"):
            rebase(lm, ledger, [1])
    done(lm, tmp_path / "never", AGAIN, OTHER, name=name, limits=None, seed=2)
    with Ledger.open(tmp_path / "l") as ledger, Ledger.open(tmp_path / "never") as never:
        assert ledger.checksum == never.checksum
    assert same(now(lm, tmp_path / "l"), now(lm, tmp_path / "never"))


def test_a_rebase_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = language_model("llama")
    done(lm, tmp_path / "l", FACT, AGAIN, OTHER, limits=None)
    found = now(lm, tmp_path / "l")

    def fail(self: Any, facts: Any) -> Any:
        if facts == [OTHER]:
            raise FloatingPointError("no number")
        return propose(self, facts)

    propose = Session.propose
    monkeypatch.setattr(Session, "propose", fail)
    with Ledger.write(tmp_path / "l") as ledger, pytest.raises(EditError, match="edit 3 cannot be made again: no number"):
        rebase(lm, ledger, [1])
    assert same(found, now(lm, tmp_path / "l"))


def test_a_rebase_is_measured(tmp_path: Path) -> None:
    """With the rephrasings and locality prompts that were asked for then."""
    lm, folder = language_model("llama"), tmp_path / "l"
    case = EditCase("0", (AGAIN,), (Probe("Spain lies in", (AGAIN.target,)),), meta={"locality": ("Lyon lies in",)})
    with Ledger.write(folder, lm) as ledger:
        correct(lm, ledger, [*cases(FACT), case], method("ft-m", steps=60), limits=limits())
        with pytest.raises(EditError, match=r"edit 2 cannot be made again: rephrasings 0\.00, at least 1; nothing was changed"):
            rebase(lm, ledger, [1], limits=limits(rephrasings=1.0))
        assert [entry.number for entry in ledger.entries(active=True)] == [1, 2]
        (new,) = rebase(lm, ledger, [1], limits=limits())
        assert new.metrics and new.metrics["after"].keys() == {"fact", "rephrasings", "locality", "perplexity"}
        assert new.cases[0].meta == case.meta and ledger.verify(lm) == []


def test_a_fact_of_several_cannot_be_replaced_alone(tmp_path: Path) -> None:
    lm, folder = language_model("llama"), tmp_path / "l"
    done(lm, folder, FACT, AGAIN, OTHER, batch=3, limits=None, name="memit")
    (no,) = done(lm, folder, ELSE, replace=True, limits=None)
    assert told([no]) == [("rejected", 1)] and str(no.reason).startswith("edit 1 answers 2 more requests, which would be lost with it")
    with Ledger.open(folder) as ledger:
        assert len(ledger.entries(active=True)) == 1


def test_a_memory_that_others_hold_on_to_cannot_be_replaced(tmp_path: Path) -> None:
    lm, folder = language_model("llama"), tmp_path / "l"
    done(lm, folder, FACT, AGAIN, name="melo", limits=None)
    no, yes = done(lm, folder, ELSE, OTHER, name="melo", limits=None, replace=True)
    assert no.status == "rejected" and "would not stand behind these" in str(no.reason) and told([yes]) == [("made", 3)]


def test_a_memory_behind_another_method_s_replacement(tmp_path: Path) -> None:
    lm, folder = language_model("llama"), tmp_path / "l"
    done(lm, folder, FACT, AGAIN, name="melo", limits=None)
    no, yes = done(lm, folder, ELSE, OTHER, limits=None, replace=True)
    assert no.status == "rejected" and told([yes]) == [("made", 3)], "and what comes after it is made"


def test_what_was_made_and_is_not_said_is_named_and_can_be_forced(tmp_path: Path) -> None:
    lm, folder = language_model("llama"), tmp_path / "l"
    done(lm, folder, OTHER, settings={"steps": 1}, limits=None)
    (skipped,) = done(lm, folder, OTHER, limits=None)
    assert told([skipped]) == [("skipped", 1)]
    assert skipped.reason == "edit 1 was made for it, and the model does not say it now; force it to try again"
    (forced,) = done(lm, folder, OTHER, limits=None, force=True)
    assert told([forced]) == [("made", 2)] and holds(lm, folder, OTHER)
    with Ledger.open(folder) as ledger:
        assert [entry.active for entry in ledger.entries()] == [False, True], "in its place, not beside it"


def test_a_model_with_edits_is_refused(tmp_path: Path) -> None:
    """Else edits would be computed on what the ledger does not know of."""
    lm, folder = language_model("llama"), tmp_path / "l"
    done(lm, folder, FACT, AGAIN, limits=None)
    with Ledger.write(folder, lm) as ledger:
        (first, _) = ledger.apply(lm)
        before = weights(lm)
        for call in (lambda: rebase(lm, ledger, [1]), lambda: correct(lm, ledger, cases(OTHER), method("ft-m"))):
            with pytest.raises(EditError, match="has edits applied; revert them first"):
                call()
        assert first.applied and same(weights(lm), before)
        Stack.of(lm).clear()
        with pytest.raises(EditError, match="batch must be at least 1"):
            correct(lm, ledger, cases(OTHER), method("ft-m"), batch=0)


def test_what_is_undone_already_can_be_rebased(tmp_path: Path) -> None:
    """And each edit that is made again has the limits that it had."""
    lm = language_model("llama")
    for name, at_once in (("a", True), ("b", False)):
        done(lm, tmp_path / name, FACT, AGAIN, OTHER, limits=limits(perplexity=1e8), seed=2)
        with Ledger.write(tmp_path / name) as ledger:
            if not at_once:
                ledger.undo(1)
            new = rebase(lm, ledger, [1])
            assert [entry.number for entry in new] == [4, 5] and new[0].limits == ledger.entry(2).limits != None  # noqa: E711
            assert [one.reason for one in ledger.events() if one.action == "undone"][-1] == "made again without 1"
            with pytest.raises(EditError, match="is undone already, and no active one was made on top of it"):
                rebase(lm, ledger, [1])
    assert same(now(lm, tmp_path / "a"), now(lm, tmp_path / "b"))


def reworded(fact: Fact, prompt: str) -> EditCase:
    return EditCase("0", (fact,), (Probe(prompt, (fact.target,)),))


def test_rephrasings_contradict_too(tmp_path: Path) -> None:
    lm = language_model("llama")
    for number, (first, second) in enumerate([(reworded(AGAIN, FACT.text), cases(ELSE)[0]), (cases(ELSE)[0], reworded(AGAIN, FACT.text))]):
        with Ledger.write(tmp_path / str(number), lm) as ledger:
            told_now = [correct(lm, ledger, [one], method("ft-m"))[0] for one in (first, second)]
            assert told(told_now) == [("made", 1), ("rejected", 1)] and "about the same" in str(told_now[1].reason)
            (one,) = correct(lm, ledger, [second], method("ft-m"), replace=True)
            if number:
                assert told([one]) == [("made", 2)] and [entry.number for entry in ledger.entries(active=True)] == [2]
            else:  # the river would be lost with the rephrasing that is wrong
                assert told([one]) == [("rejected", 1)] and "answers 1 more request, which would be lost" in str(one.reason)


def test_lines_of_a_call_that_contradict_one_another(tmp_path: Path) -> None:
    """The first one counts, also with `replace`, and as often as the call is made: else they would replace each other for ever."""
    lm, folder = language_model("llama"), tmp_path / "l"
    for replace in (False, True, True):
        outcomes = done(lm, folder, FACT, AGAIN, ELSE, replace=replace)
        assert outcomes[2].status == "rejected" and outcomes[2].reason == "another request says 'Tokyo' about the same; ask for one of them"
        with Ledger.open(folder) as ledger:
            assert len(ledger.entries()) == 2 and len(ledger.rejections()) == 1
    one = EditCase("0", (FACT, ELSE))
    with Ledger.write(folder, lm) as ledger:
        assert correct(lm, ledger, [one], method("ft-m"), replace=True)[0].status == "rejected", "nor can one request say both"


def test_what_was_known_is_not_once_it_was_edited(tmp_path: Path) -> None:
    lm, folder = language_model("llama"), tmp_path / "l"
    known = next(fact for fact in own_answers(lm) if predict(lm, [(fact.text, fact.target)])[0].accuracy == 1)
    other = Fact(known.prompt, known.subject, "Warsaw")
    assert told(done(lm, folder, known)) == [("skipped", None)]
    assert told(done(lm, folder, known)) == [("skipped", None)], "remembered"
    assert told(done(lm, folder, other)) == [("made", 1)]
    (no,) = done(lm, folder, known)
    assert told([no]) == [("rejected", 1)] and "edit 1 says 'Warsaw'" in str(no.reason)
    assert told(done(lm, folder, known, replace=True)) == [("made", 2)]


def test_a_request_is_done_when_all_of_its_facts_are(tmp_path: Path) -> None:
    lm, folder = language_model("llama"), tmp_path / "l"
    with Ledger.write(folder, lm) as ledger:
        for facts, expected in (((FACT,), "made"), ((FACT, AGAIN), "made"), ((AGAIN, FACT), "skipped")):
            (one,) = correct(lm, ledger, [EditCase("0", facts)], method("ft-m", steps=60))
            assert one.status == expected, facts


def test_another_model_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    done(language_model("llama"), tmp_path / "l", FACT, limits=None)
    other = language_model("llama", seed=1)
    with Ledger.write(tmp_path / "l") as ledger, pytest.raises(EditError, match="is about the model"):
        correct(other, ledger, cases(OTHER), method("ft-m"))
    with Ledger.open(tmp_path / "l") as ledger:
        assert len(ledger.entries()) == 1 and ledger.rejections() == []


def test_progress_is_told(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    lm = language_model("llama")
    done(lm, tmp_path / "l", FACT, FACT, Fact("Lyon is", "Paris", "Rome"), progress=lambda *now: seen.append(now))
    assert seen == [(1, 3, "0 rejected"), (2, 3, "0 rejected"), (3, 3, "1 rejected")]
