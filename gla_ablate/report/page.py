"""The report as a document: what `report.md` and `report.html` hold, the answer first."""

from __future__ import annotations

from collections.abc import Sequence

from gla_ablate.report import tables
from gla_ablate.report.baselines import baseline_text
from gla_ablate.report.document import (
    PLOTS,
    Block,
    Bullets,
    Column,
    Heading,
    Image,
    Link,
    Mono,
    Paragraph,
    Shell,
    Table,
    Words,
    text,
)
from gla_ablate.report.equality import check
from gla_ablate.report.findings import ALL_PAIRS, Findings
from gla_ablate.report.labels import identity
from gla_ablate.report.lengths import measured, row_length
from gla_ablate.report.provenance import WORDS, provenance, shares
from gla_ablate.report.words import answer, at_best, chosen_names, left_out, notes, question

ROWS = 100  # of a table, before the rest is left to the CSV files
MATRIX = 8  # points that are few enough for all pairs side by side


def document(found: Findings, images: Sequence[Image]) -> list[Block]:
    experiment = found.experiment
    blocks: list[Block] = [Heading(experiment.name, 1), Paragraph(question(found), "question")]
    held = check(found)
    if held:
        blocks.append(Paragraph((held.text,), held.verdict))
    blocks += [Paragraph((answer(found),), "answer"), *(Paragraph((note,), "note") for note in notes(found))]
    blocks += results(found)
    blocks += best_values(found) + other_lengths(found) + effects(found) + differences(found)
    if images:
        blocks += [PLOTS, *images]
    if tables.leftovers(experiment):
        blocks += [Heading("Trials that don't count", 2), *limited(tables.unfinished(found), "trials.csv")]
    ran = provenance(experiment.trials)
    if any(ran.values()):
        items = [f"{WORDS[aspect][0]}: {shares(texts)}" for aspect, texts in ran.items()]
        blocks += [Heading("How the trials ran", 2), Bullets(items)]
    if experiment.command:
        blocks += [Heading("Reproduce", 2), Shell(experiment.command)]
    return blocks


def results(found: Findings) -> list[Block]:
    settings, labels = found.experiment.settings, found.labels
    columns = tables.results(found)
    meanings = {
        "Δ": f"difference to the one point with {baseline_text(settings)} and all else the same"
        f"{', each' * bool(found.variants)}{at_best(found)}, seed by seed",
        "95 %": "confidence interval of Δ; a tie where it contains 0",
        "state": "numbers in the recurrent state of all layers for one sequence",
        "FLOPs/token": "forward and backward, counted from the shapes",
        "tokens/s": "median over a trial's training steps, mean over seeds",
        "peak MB": "largest over seeds",
    }
    shown = {column.header for column in columns}
    items = [f"{settings.metric}: the {settings.pick} value of each trial; mean ± sample std over n seeds"]
    items += [f"{header}: {meaning}" for header, meaning in meanings.items() if header in shown]
    if labels.constants():
        items.append(f"the same everywhere: {', '.join(labels.constants())}")
    file = "best.csv" if found.variants else "results.csv"
    files: list[str | Link] = ["In full precision: ", Link(file), ", ", Link("trials.csv")]
    if found.variants:
        same = chosen_names(found)
        files += ["; and every point, its difference to the baseline at the same ", same, ", ", Link("results.csv")]
    return [Heading("Results", 2), *limited(columns, file), Bullets(items), text(*files, ".")]


def best_values(found: Findings) -> list[Block]:
    """What each variant's best value was chosen from; nothing without `best_over`."""
    if not found.variants:
        return []
    name, metric = chosen_names(found), Mono(found.experiment.settings.metric)
    said = text(
        f"All else in this report is about each variant at its best {name}. The best of several values is chosen by "
        "the same ",
        metric,
        " that is reported, which flatters every variant, and one with more values the most.",
    )
    return [Heading(f"Best {name} for each variant", 2), said, *limited(tables.best_of(found), "results.csv")]


def other_lengths(found: Findings) -> list[Block]:
    """The table of `eval.lengths`; nothing without them."""
    columns = tables.at_lengths(found)
    if not columns:
        return []
    trained = sorted({n for point in found.shown if (n := row_length(point, 1)) is not None})
    length = f"{trained[0]} tokens" if len(trained) == 1 else "the length that the point trained on"
    what = "nats a token" if measured(found) == "loss" else "the share of targets that come out right"
    said = text(
        f"Evaluation of the trained models, {what}, on rows so many times as long as in training: 1× is {length}. "
        "On text all lengths are judged on the same tokens, which are other ones than val/loss's where that reads only "
        "a part of the text. Mean ± sample std over the seeds that count. In full precision: ",
        Link("lengths.csv"),
        "; by position in a row, each trial's positions.csv.",
    )
    return [Heading("At other lengths than trained on", 2), said, *limited(columns, "lengths.csv")]


def effects(found: Findings) -> list[Block]:
    if not any(level.mean is not None for effect in found.effects for level in effect.levels):
        return []
    said: list[str | Link] = [
        "The main effect of a value is its difference to the reference with all else the same, averaged over the "
        "settings of the other factors, seed by seed; all values of a factor at the same settings and with the same "
        "seeds. Its interval speaks of these settings, not of others. In full precision: ",
        Link("effects.csv"),
        ".",
    ]
    blocks: list[Block] = [Heading("What each factor does", 2), text(*said)]
    for effect in found.effects:
        together = " (they vary together)" if len(effect.factors) > 1 else ""
        heading = ", ".join(found.labels.headers[factor] for factor in effect.factors) + together
        blocks.append(Heading(heading, 3))
        if sum(level.mean is not None for level in effect.levels) > 1 or any(level.effect for level in effect.levels):
            blocks += limited(tables.effect_of(effect, found), "effects.csv")
        if all(level.effect is None for level in effect.levels):
            blocks.append(text("No value of it meets the reference with all else, and the seed, the same."))
        else:
            blocks += [text(sentence) for sentence in left_out(effect, found)]
    return blocks


def differences(found: Findings) -> list[Block]:
    if not found.pairs:
        return []
    best, *rest = [point for point in found.ranked if point.mean is not None]
    name = found.labels.point(best.values)
    blocks: list[Block] = [Heading("Which points differ", 2), text(*how_far_to_trust(found))]
    if 2 < len(rest) + 1 <= MATRIX:
        blocks += [Heading("All pairs", 3), *limited(tables.matrix(found), "pairs.csv")]
    blocks += [
        Heading(f"Against the best, {name}", 3),
        *limited(tables.against([(point, best) for point in rest], found, ""), "pairs.csv"),
    ]
    by_values = {identity(point.values): point for point in found.shown}
    held = [(p, by_values[identity(p.baseline)]) for p in [best, *rest] if p.baseline and not p.is_baseline]
    several = len({identity(other.values) for _, other in held}) > 1
    if several or (held and held[0][1] is not best):
        heading = (
            "Against its baseline" if several else f"Against the baseline, {found.labels.point(held[0][1].values)}"
        )
        columns = tables.against(held, found, "baseline" if several else "")
        blocks += [Heading(heading, 3), *limited(columns, "pairs.csv")]
    return blocks


def how_far_to_trust(found: Findings) -> Words:
    """What the intervals are, and what they can't say."""
    judged = [pair for pair in found.pairs if pair.difference is not None and pair.difference.tie is not None]
    ties = sum(pair.verdict == "tie" for pair in judged)
    count = len(judged)
    if not judged:
        said = "No two points have two seeds in common, so that nothing tells their differences from chance. "
    else:
        said = (
            "Each difference is taken seed by seed, with Student's 95 % confidence interval; a tie where it contains 0 "
            f"({ties} of {count} pair{'s' * (count != 1)}). "
            "Few seeds make wide intervals: 9.0 standard deviations of the seeds' differences to each side with 2 "
            "seeds, 2.5 with 3, 1.2 with 5. "
        )
    if count > 1:
        said += (
            "An interval speaks of one comparison: where nothing differs, about 1 in 20 misses 0 all the same, "
            f"here {count / 20:.1f} of {count}; and the best point was picked for being it, which flatters it. "
        )
    which = "All pairs, as point − other: "
    if sum(point.mean is not None for point in found.shown) > ALL_PAIRS:
        baselines = " and with its baseline" if found.experiment.settings.baseline else ""
        which = f"More than {ALL_PAIRS} points: each is compared with the best one{baselines}. As point − other: "
    return (said + which, Link("pairs.csv"), ".")


def limited(columns: list[Column], file: str) -> list[Block]:
    """A table, the first `ROWS` of its rows if it is longer."""
    count = len(columns[0].cells) if columns else 0
    if count <= ROWS:
        return [Table(columns)] if count else []
    cut = [column._replace(cells=column.cells[:ROWS]) for column in columns]
    return [Table(cut), text(f"The first {ROWS} of {count:,} rows; all are in ", Link(file), ".")]
