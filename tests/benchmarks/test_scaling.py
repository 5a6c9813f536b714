"""The tables of docs/scaling.md are those that the script computes, and its sums are right at a size told by hand."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import scaling

from gla_ablate.model import build_model

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"


def test_the_page_has_the_tables_as_they_are_computed(capsys):
    scaling.main()
    printed = [line for line in capsys.readouterr().out.splitlines() if line]
    page = PAGE.read_text(encoding="utf-8").splitlines()
    assert [line for line in printed if line not in page] == []


def test_parameters_are_those_of_the_model():
    small = scaling.size("small", 1, dim=64, layers=3, heads=2)
    model = build_model(small.model, scaling.VOCABULARY)
    assert small.parameters == sum(p.numel() for p in model.parameters())
    assert small.block == sum(p.numel() for p in model.blocks[1].parameters())
    assert small.root == small.parameters - 3 * small.block


def test_what_is_held_and_sent_by_hand():
    small = scaling.size("small", 1, dim=64, layers=3, heads=2)
    P, P_r, P_b = small.parameters, small.root, small.block
    assert small.weights("ddp", 8) == 18 * P
    assert small.weights("fsdp", 8) == pytest.approx(2 * P + 4 * P_r + 10 * P_b)
    assert small.sent("ddp", 2) == 4 * P and small.sent("ddp", 1) == small.sent("fsdp", 1) == 0
    assert small.sent("fsdp", 4) == pytest.approx(0.75 * (12 * P_b + 2 * P_r + 4 * P))
    assert scaling.sending(50e9, 8) == pytest.approx(1 / 9) and scaling.sending(50e9, 16) == 1
    assert small.activations > 0
