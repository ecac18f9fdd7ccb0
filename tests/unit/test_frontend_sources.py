"""What the front end takes from the Python definitions is up to date."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FRONTEND = Path(__file__).parent.parent.parent / "frontend"


def load_generator() -> ModuleType:
    """``frontend/generate.py``, which is no part of any package."""
    spec = importlib.util.spec_from_file_location("generate", FRONTEND / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["protocol.ts", "strings.ts"])
def test_generated_sources_are_up_to_date(name: str) -> None:
    expected = load_generator().FILES[name]()
    assert (FRONTEND / "src" / name).read_text(encoding="utf-8") == expected, "run: python frontend/generate.py"
