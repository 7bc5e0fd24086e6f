"""The house itself: which room may know which, what importing costs, and what the package carries."""

from __future__ import annotations

import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import errata

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "peft", "numpy")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_arrows_point_down() -> None:
    done = python("import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "doing",
    [
        "import errata",
        "import errata; errata.Fact.parse('The capital of {France} is -> Lyon')",
        "from errata.cli import call; call(['--help'])",
        "from errata.cli import call; call(['bench', '--help'])",
        "from errata.cli import call; call(['list', 'models'])",
    ],
)
def test_torch_is_left_alone(doing: str) -> None:
    done = python(f"{doing}\nimport sys\nprint(*[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)")
    assert done.returncode == 0, done.stderr
    heavy = done.stderr.split()
    assert "torch" not in heavy and "transformers" not in heavy and "peft" not in heavy
    if doing == "import errata":
        assert not heavy, "a bare import must cost nothing"


def test_every_public_name_is_there() -> None:
    for name in errata.__all__:
        assert getattr(errata, name) is not None
    assert set(errata.__all__) <= set(dir(errata))
    with pytest.raises(AttributeError, match="has no attribute 'Overtones'"):
        _ = errata.Overtones


def test_version_is_the_distribution_s() -> None:
    from importlib.metadata import version

    assert errata.__version__ == version("errata")


def test_package_is_typed() -> None:
    assert (resources.files("errata") / "py.typed").is_file()


def test_torch_is_pinned_without_a_build() -> None:
    """'+cpu' in a pin is found on one index only; a missing pin brings gigabytes."""
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert [pin for pin in pins if pin.startswith("torch==")] == ["torch==2.13.0"]
    assert not [pin for pin in pins if "+" in pin or " @ " in pin or pin.startswith("-e")]
