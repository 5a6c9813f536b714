"""A factor that is expected to change no curve: what passes, what fails, and what can't be told."""

from __future__ import annotations

import math

import pytest
from rich.console import Console

from gla_ablate.report import write_report
from gla_ablate.report.equality import check
from gla_ablate.report.findings import find
from gla_ablate.report.trials import load

SIZE, GATE = "model.chunk_size", "model.gate.name"
EXPECTED = {"expect_equal": {"over": SIZE, "tolerance": 0.01}}


def filled(folder, curves, report=None, status="finished"):
    """`curves`: (gate, chunk size, seed) → validation losses; a status in place of them for one that has none."""
    for (gate, size, seed), curve in curves.items():
        given = {"status": curve} if isinstance(curve, str) else {"curves": {"val/loss": curve}, "status": status}
        folder.add({GATE: gate, SIZE: size}, seed, **given)
    return folder.save(EXPECTED | (report or {}))


def checked(folder, curves, report=None):
    return check(find(load(filled(folder, curves, report))))


def test_curves_within_the_tolerance_pass_and_the_seeds_spread_stands_beside(folder):
    found = checked(
        folder,
        {("a", 16, 0): [4.0, 2.0], ("a", 64, 0): [4.02, 2.001], ("a", 16, 1): [4.0, 2.2], ("a", 64, 1): [4.0, 2.2]},
    )
    assert found.verdict == "passed"
    assert found.text == (
        "Check passed: equal over chunk_size. In 2 pairs of trials that differ in it alone val/loss differs by 0.5 % "
        "at most (chunk_size 64 against 16, seed 0 at step 10), of 1 % allowed. "
        "The std over the seeds of a point is 6.7 %."
    )


def test_one_curve_beyond_the_tolerance_fails_even_where_it_ends_the_same(folder):
    curves = {("a", 16, 0): [4.0, 3.0, 2.0], ("a", 32, 0): [4.0, 3.0, 2.0], ("a", 64, 0): [4.0, 3.1, 2.0]}
    curves |= {(gate.replace("a", "b"), size, seed): curve[:2] for (gate, size, seed), curve in curves.items()}
    curves["b", 64, 0] = [4.0, 3.0]
    found = checked(folder, curves)
    assert found.verdict == "failed"
    assert found.text.startswith("CHECK FAILED: not equal over chunk_size. In 1 of 4 pairs")
    assert "val/loss differs by 3.2 % at most (a, chunk_size 64 against 16, seed 0 at step 20)" in found.text


def test_the_baselines_value_is_what_the_others_are_held_against(folder):
    curves = {("a", 16, 0): [2.0], ("a", 32, 0): [2.015], ("a", 64, 0): [2.03]}
    assert checked(folder, curves, {"baseline": {SIZE: 32}}).verdict == "passed"


def test_the_baseline_may_be_nested(folder):
    curves = {("a", 16, 0): [2.0], ("a", 32, 0): [2.015], ("a", 64, 0): [2.03]}
    baseline = {"model": {"chunk_size": 32, "gate": {"name": "a"}}}
    assert checked(folder, curves, {"baseline": baseline}).verdict == "passed"


def test_without_it_the_first_is_the_reference(folder):
    assert checked(folder, {("a", 16, 0): [2.0], ("a", 32, 0): [2.015], ("a", 64, 0): [2.03]}).verdict == "failed"


def test_trials_of_other_gates_or_seeds_are_never_compared(folder):
    found = checked(folder, {("a", 16, 0): [1.0], ("b", 16, 0): [2.0], ("a", 16, 1): [3.0]})
    assert (found.verdict, found.text) == (
        "open",
        "Check not made: equal over chunk_size: all trials here have the same.",
    )


@pytest.mark.parametrize("status", ["failed", "running", "queued"])
def test_trials_that_do_not_count_leave_the_check_open(folder, status):
    found = checked(folder, {("a", 16, 0): [2.0], ("a", 32, 0): [2.0], ("a", 64, 0): status})
    assert found.verdict == "open"
    assert found.text.startswith("Check not complete: equal over chunk_size. 1 more can't be compared yet; in 1 pair ")


def test_nothing_finished_is_said(folder):
    assert "no two trials that differ in it alone have finished" in (
        checked(folder, {("a", 16, 0): "failed", ("a", 32, 0): [2.0]}).text
    )


@pytest.mark.parametrize("which", [16, 32])
def test_one_that_diverges_while_its_twin_does_not_fails(folder, which):
    found = checked(folder, {("a", size, 0): "diverged" if size == which else [2.0] for size in (16, 32)})
    assert found.verdict == "failed"
    assert "val/loss leaves the finite numbers" in found.text


def test_a_hole_in_a_curve_is_no_equality(folder):
    assert checked(folder, {("a", 16, 0): [4.0, 2.0], ("a", 32, 0): [math.nan, 2.0]}).verdict == "failed"


def test_equal_zeros_are_equal(folder):
    assert checked(folder, {("a", 16, 0): [0.0, 2.0], ("a", 32, 0): [0.0, 2.0]}).verdict == "passed"


def test_a_tolerance_as_wide_as_the_seeds_spread_is_called_weak(folder):
    curves = {("a", size, seed): [2.0 + seed * 0.01] for size in (16, 32) for seed in (0, 1)}
    found = checked(folder, curves)
    assert found.verdict == "passed"
    assert found.text.endswith(
        "The std over the seeds of a point is 0.35 %. Any change smaller than that passes: a weak check."
    )


def test_the_report_and_the_terminal_say_it(folder):
    path = filled(folder, {("a", 16, 0): [2.0], ("a", 32, 0): [3.0]})
    console = Console(record=True, width=200)
    write_report(path, console)
    said = "CHECK FAILED: not equal over chunk_size."
    assert said in console.export_text()
    assert f"> **{said}" in (path / "report/report.md").read_text()
    assert f'<p class="failed">{said}' in (path / "report/report.html").read_text()


def test_without_an_expectation_nothing_is_said(folder):
    assert checked(folder, {("a", 16, 0): [2.0], ("a", 32, 0): [3.0]}, {"expect_equal": {"over": ""}}) is None
