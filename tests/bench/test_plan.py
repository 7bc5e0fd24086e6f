from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errata.bench.plan import Plan, PlanError, Row, configure, hash_cases, parse_settings
from errata.facts import EditCase, Fact

PLAN = Plan(model="atlas", data="atlas", methods=("ft-m", "lora"), objectives=("ce", "overtone"), limit=20, seeds=(0, 1))


@dataclass(frozen=True)
class Knobs:
    lr: float = 1e-3
    steps: int = 25
    layer: int | None = None
    layers: tuple[int, ...] | None = None
    reduction: Literal["sum", "mean"] = "sum"
    clip: bool = True

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")


names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=8)


@given(
    st.builds(
        Plan,
        model=names,
        data=names,
        methods=st.just(("ft-m", "lora")),
        objectives=st.just(("ce",)),
        limit=st.none() | st.integers(1, 10**6),
        split=st.none() | names,
        seeds=st.lists(st.integers(0, 2**31), min_size=1, max_size=3, unique=True).map(tuple),
        settings=st.dictionaries(
            st.sampled_from(["lora", "ce", "ft-m+ce"]),
            st.dictionaries(st.sampled_from("abc"), st.floats(allow_nan=False) | st.integers() | st.booleans() | st.lists(st.integers())),
        ),
        threads=st.none() | st.integers(1, 64),
        versions=st.dictionaries(names, names, max_size=2),
    )
)
def test_yaml_round_trip(plan: Plan) -> None:
    import yaml

    again = Plan.from_dict(yaml.safe_load(plan.dump()))
    again.must_equal(plan, "the folder")
    assert again.rows == plan.rows


def test_rows_are_every_pair_for_every_seed() -> None:
    assert [(row.name, row.seed) for row in PLAN.rows[:5]] == [
        ("ft-m+ce", 0),
        ("ft-m+overtone", 0),
        ("lora+ce", 0),
        ("lora+overtone", 0),
        ("ft-m+ce", 1),
    ]


def test_seed_of_a_case_depends_on_method_seed_and_case_only() -> None:
    row = Row("lora", "ce", 0)
    assert row.case_seed("a") == Row("lora", "overtone", 0).case_seed("a"), "objectives are compared in pairs"
    others = {row.case_seed("b"), Row("lora", "ce", 1).case_seed("a"), Row("ft-m", "ce", 0).case_seed("a")}
    assert row.case_seed("a") not in others and len(others) == 3
    assert row.case_seed("a") == 1035913004, "written down: it may not change with the interpreter or the release"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": []}, "'methods' is missing"),
        ({"methods": ["ft-m", "ft-m"]}, "ft-m stands there twice"),
        ({"protocol": "parallel"}, "unknown protocol 'parallel'"),
        ({"protocol": "sequential"}, r"'sequential' needs a number of edits, for instance sequential:500"),
        ({"protocol": "sequential:0", "limit": None}, "needs a number of edits"),
        ({"protocol": "sequential:-3", "limit": None}, "needs a number of edits"),
        ({"protocol": "single:3"}, "'single' takes no number"),
        ({"protocol": "sequential:9"}, "leave out limit"),
        ({"protocol": "sequential:9", "limit": None, "checkpoints": [3, 10]}, r"must rise from 1 or more to 9 or less \(got \[3, 10\]\)"),
        ({"protocol": "sequential:9", "limit": None, "checkpoints": [6, 3]}, "checkpoints must rise"),
        ({"protocol": "sequential:9", "limit": None, "checkpoints": ["3"]}, "checkpoints must be a list of int"),
        ({"protocol": "sequential:9", "limit": None, "checkpoints": [4], "batch": 3}, "after 4 edits there is no checkpoint"),
        ({"protocol": "sequential:9", "limit": None, "measure": "after"}, "unknown measure 'after'; did you mean 'after-"),
        ({"protocol": "sequential:9", "limit": None, "batch": -1}, "batch must be at least 1"),
        ({"protocol": "sequential:9", "limit": None, "batch": None}, "batch must be a whole number"),
        ({"checkpoints": [3]}, "checkpoints belongs to a sequence"),
        ({"batch": 2, "curves": True}, "made one by one"),
        ({"measure": "both"}, "measure belongs to a sequence"),
        ({"transcripts": ["The capital of"]}, "transcripts belongs to a sequence"),
        ({"methods": ["ft-m@", "lora"]}, "cannot read the method 'ft-m@'; write a label as method@label"),
        ({"methods": ["ft-m@a", "ft-m@a", "lora"]}, "ft-m@a stands there twice"),
        ({"settings": {"ft-m@slow": {"lr": 1.0}}}, "settings for 'ft-m@slow', which is not used here"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"limit": "many"}, "limit must be a whole number"),
        ({"seeds": ["zero"]}, "seeds must be a list of int"),
        ({"method": ["ft-m"]}, "unknown field 'method'; did you mean 'methods'"),
        ({"settings": {"lorra": {"lr": 1.0}}}, "settings for 'lorra', which is not used here; did you mean 'lora'"),
        ({"settings": ["lora.lr=1"]}, "settings must be a mapping"),
    ],
)
def test_a_wrong_plan_says_what_is_wrong(change: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_dict({**PLAN.to_dict(), **change})


def test_a_file_that_is_no_plan(tmp_path: Path) -> None:
    for number, text in enumerate(["{", "- a\n- b", "\x00"]):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        with pytest.raises(PlanError, match=path.name):
            Plan.read(path)


def test_exponents_in_yaml_are_numbers(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-3 as text."""
    path = tmp_path / "plan.yaml"
    path.write_text("model: atlas\ndata: atlas\nmethods: lora\nsettings: {lora: {lr: 1e-3}}\n")
    assert Plan.read(path).settings == {"lora": {"lr": 1e-3}}


def test_the_differing_field_is_named() -> None:
    with pytest.raises(PlanError, match=r"RUN was started with another plan: limit was 20 and is now 30"):
        replace(PLAN, limit=30).must_equal(PLAN, "RUN")


def test_settings_from_the_command_line() -> None:
    read = parse_settings(["lora.lr=1e-3", "lora.r=12", "ft-m.layers=[1, 2]", "ft-m+overtone.clip=False", "ft-m.variant=l", "ft-m.l=none"])
    assert read == {
        "lora": {"lr": 1e-3, "r": 12},
        "ft-m": {"layers": [1, 2], "variant": "l", "l": None},
        "ft-m+overtone": {"clip": False},
    }
    for broken in ("lora.lr", "lr=1", ".lr=1", "lora.=1"):
        with pytest.raises(PlanError, match=r"write it as method\.name=value"):
            parse_settings([broken])


def test_lists_of_names_are_written_as_everywhere() -> None:
    @dataclass(frozen=True)
    class Named:
        tasks: tuple[str, ...] = ("a",)

    for written in ("b, c", ["b", "c"]):
        assert configure(Named(), {"tasks": written}, "ability") == Named(("b", "c"))
    assert configure(Named(), {"tasks": "b"}, "ability") == Named(("b",))


def test_configure() -> None:
    made = configure(Knobs(), {"lr": 1, "layer": 3, "layers": [1, 2], "reduction": "mean", "clip": False}, "lora")
    assert made == Knobs(1.0, 25, 3, (1, 2), "mean", False)
    for settings, message in [
        ({"learning_rate": 1.0}, "lora has no setting 'learning_rate'"),
        ({"stepz": 3}, "did you mean 'steps'"),
        ({"steps": 2.5}, r"lora\.steps cannot be 2\.5: it is int"),
        ({"steps": True}, "cannot be True"),
        ({"lr": "fast"}, "cannot be 'fast': it is float"),
        ({"reduction": "max"}, "'sum' or 'mean'"),
        ({"lr": -1.0}, "lora: lr must be positive"),
    ]:
        with pytest.raises(PlanError, match=message):
            configure(Knobs(), settings, "lora")


def test_hash_of_cases_sees_content_and_order() -> None:
    one, two = (EditCase(name, (Fact("The capital of {} is", name, "Lyon"),)) for name in "ab")
    assert hash_cases([one, two]) == hash_cases([EditCase.from_dict(one.to_dict()), two])
    assert len({hash_cases(cases) for cases in ([one], [one, two], [two, one])}) == 3


def test_each_seed_draws_its_own_cases() -> None:
    cases = [EditCase(str(i), (Fact("The capital of {} is", "France", "Rome"),)) for i in range(50)]
    plan = Plan("atlas", "atlas", ("ft-m",), limit=20)
    drawn = {seed: [case.id for case in plan.draw(cases, seed)] for seed in (0, 1)}
    assert drawn[0] != drawn[1] and all(len(set(ids)) == 20 and ids == sorted(ids, key=int) for ids in drawn.values())
    assert plan.draw(cases, 0) == plan.draw(cases, 0)
    assert replace(plan, limit=None).draw(cases, 0) == replace(plan, limit=50).draw(cases, 1) == cases


SEQUENCE = replace(PLAN, limit=None, protocol="sequential:50")


def test_checkpoints_end_with_the_sequence() -> None:
    assert SEQUENCE.marks == (10, 20, 30, 40, 50)
    assert replace(SEQUENCE, checkpoints=(7, 20)).marks == (7, 20, 50) == replace(SEQUENCE, checkpoints=(7, 20, 50)).marks
    assert replace(SEQUENCE, protocol="sequential:3").marks == (1, 2, 3)
    assert replace(SEQUENCE, batch=7).marks == (14, 21, 35, 42, 50), "where a step ends"
    assert (SEQUENCE.sequence, PLAN.sequence) == (50, None)
    with pytest.raises(PlanError, match="'single' has no checkpoints"):
        _ = PLAN.marks


def test_a_seed_draws_an_order_too() -> None:
    cases = [EditCase(str(i), (Fact("The capital of {} is", "France", "Rome"),)) for i in range(50)]
    drawn = {seed: [case.id for case in SEQUENCE.draw(cases, seed)] for seed in (0, 1)}
    assert drawn[0] != drawn[1] and sorted(drawn[0]) == sorted(drawn[1]) == sorted(case.id for case in cases)
    assert SEQUENCE.draw(cases, 0) == SEQUENCE.draw(cases, 0)
    with pytest.raises(PlanError, match="a sequence of 50 needs as many cases; atlas has 49"):
        SEQUENCE.draw(cases[1:], 0)


def test_a_label_has_no_part_in_the_seed_but_in_the_name() -> None:
    """A sweep is a paired comparison."""
    plain, labelled = Row("lora", "ce", 0), Row("lora@r=4", "ce", 0)
    assert plain.case_seed("a") == labelled.case_seed("a") and plain.name != labelled.name == "lora@r=4+ce"


def test_settings_of_labels_from_the_command_line() -> None:
    read = parse_settings(["deltaedit@eta=0.5.eta=0.5", "deltaedit.eta=2", "lora@big+ce.lr=1"])
    assert read == {"deltaedit@eta=0.5": {"eta": 0.5}, "deltaedit": {"eta": 2}, "lora@big+ce": {"lr": 1}}
    plan = Plan("m", "d", ("deltaedit@eta=0.5", "lora@big"), settings=read)
    assert Plan.from_dict(plan.to_dict()) == plan
