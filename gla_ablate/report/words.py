"""What a report says in sentences: the question, the answer, and what a reader must know before trusting it."""

from __future__ import annotations

import math

from gla_ablate.report.baselines import baseline_note
from gla_ablate.report.best import choice, passed_over
from gla_ablate.report.document import Mono, Words
from gla_ablate.report.effects import Effect
from gla_ablate.report.findings import Findings
from gla_ablate.report.intervals import Interval
from gla_ablate.report.labels import fixed, identity, listed, si, signed
from gla_ablate.report.points import Point, paired
from gla_ablate.report.provenance import differences, provenance
from gla_ablate.report.tables import choice_text, count_text, ends, tally

MISMATCH = 0.01  # share of the parameters from which points are no longer of one size


def question(found: Findings) -> Words:
    settings = found.experiment.settings
    metric = Mono(settings.metric)
    asked = " × ".join(found.labels.headers[factor] for factor in found.labels.varying)
    if not asked:
        return ("What ", metric, f" does it reach{at_best(found)}?")
    return (
        f"Which {asked} gives the {'lowest' if settings.mode == 'min' else 'highest'} ",
        metric,
        f"{at_best(found)}?",
    )


def at_best(found: Findings) -> str:
    return f" at its best {chosen_names(found)}" if found.variants else ""


def chosen_names(found: Findings) -> str:
    """The factors of `best_over`: `lr`, `lr and warmup_steps`."""
    return " and ".join(found.all_labels.headers[factor] for factor in found.experiment.settings.best_over)


def answer(found: Findings) -> str:
    """The best point, how far it is from its baseline and from the next, and whether the seeds tell the two apart."""
    experiment, labels, places = found.experiment, found.labels, found.places
    first, *rest = found.ranked
    if first.mean is None:
        return f"No answer yet: {tally(experiment.trials)}."
    spread = "" if first.std is None else f" ± {first.std:.{places}f}"
    chosen = choice_text(choice(first, experiment.settings), found.all_labels)
    name = labels.point(first.values)
    if chosen:
        name = f"{name} with {chosen}" if labels.varying else chosen
    best = f"Best: {name}, {fixed(first.mean, places)}{spread} over {seeds(first.n)}"
    if first.against is not None and first.baseline is not None and not first.is_baseline:
        judged = trust(first.against, places)
        best += f", {signed(first.against.mean, places)} against {labels.point(first.baseline)} ({judged})"
    sentences = [best]
    if rest and rest[0].mean is not None:
        sentences.append(f"Next: {labels.point(rest[0].values)}, {behind(first, rest[0], found)}")
    unfinished = sum(not trial.counts for trial in experiment.trials)
    if unfinished:
        sentences.append(f"{unfinished} of {len(experiment.trials)} trials don't count (below)")
    return ". ".join(sentences) + "."


def behind(first: Point, second: Point, found: Findings) -> str:
    """How far the second point is behind the first: `0.250 behind (95 % interval 0.241 … 0.259 over 3 seeds)`."""
    if first.mean is None or second.mean is None:
        return ""
    sign = 1 if found.experiment.settings.mode == "min" else -1
    gap = paired(first, second)
    if gap is None:
        return f"{abs(second.mean - first.mean):.{found.places}f} behind (without a seed that both have)"
    gap = gap if sign > 0 else -gap
    where = "behind" if gap.mean >= 0 else "ahead on the seeds that both have"
    return f"{abs(gap.mean):.{found.places}f} {where} ({trust(gap, found.places)})"


def trust(difference: Interval, places: int) -> str:
    """`a tie: −0.012 … 0.034 over 3 seeds`, `95 % interval 0.241 … 0.259 over 3 seeds`."""
    if difference.tie is None:
        return "one seed: no interval"
    return f"{'a tie:' if difference.tie else '95 % interval'} {ends(difference, places)} over {seeds(difference.n)}"


def seeds(n: int) -> str:
    return f"{n} seed{'s' * (n != 1)}"


def notes(found: Findings) -> list[str]:
    """What a reader must know before trusting the table."""
    experiment = found.experiment
    baseline = baseline_note(found.shown, found.labels, experiment.settings)
    candidates = [experiment.hint(), baseline, seed_note(found), parameter_note(found), *choice_notes(found)]
    return [note for note in (*candidates, *differences(provenance(experiment.trials))) if note]


def seed_note(found: Findings) -> str:
    """Of what comes out best over fewer seeds than the grid has: the point, or with `best_over` each such variant."""
    rows = found.ranked if found.variants else found.ranked[:1]
    fewer = [f"{count_text(p)} of {found.labels.point(p.values)}" for p in rows if 0 < p.n < len(p.trials)]
    if not fewer:
        return ""
    where = f", each{at_best(found)}" if found.variants else ", the best point"
    return f"Fewer seeds count than the grid has: {listed(fewer)}{where}. The missing ones may change what is best."


def parameter_note(found: Findings) -> str:
    """Of points that are compared and differ in size: each with its baseline, or without one all with each other."""
    sized = [point for point in found.shown if point.params]
    by_values = {identity(point.values): point for point in sized}
    if any(point.baseline for point in found.shown):
        pairs = [(p, by_values.get(identity(p.baseline))) for p in sized if p.baseline and not p.is_baseline]
    else:
        smallest = min(sized, key=size, default=None)
        pairs = [(point, smallest) for point in sized]
    uneven = [(p, other) for p, other in pairs if other and abs(size(p) - size(other)) > MISMATCH * size(other)]
    if not uneven:
        return ""
    point, other = max(uneven, key=lambda pair: abs(math.log(size(pair[0]) / size(pair[1]))))
    share = size(point) / size(other) - 1
    most = f"{found.labels.point(point.values)} has {abs(share):.1%} ".replace("%", " %")
    most += f"{'more' if share > 0 else 'fewer'} parameters than {found.labels.point(other.values)}"
    sizes = f"({si(point.params, 4)} and {si(other.params, 4)})"
    rest = f", the largest of {len(uneven)} such differences" if len(uneven) > 1 else ""
    return f"{most} {sizes}{rest}: what they differ by may be the parameters' doing (match: params evens them out)."


def size(point: Point) -> int:
    return point.params or 0


def choice_notes(found: Findings) -> list[str]:
    """Of `best_over`: whether there was a choice at all, what fewer seeds kept out of it, and which variants are best
    at the end of what was tried."""
    settings = found.experiment.settings
    if found.variants and all(len(variant.tried) == 1 for variant in found.variants):
        return [f"Each variant has one {chosen_names(found)}: there was none to choose."]
    at_end: dict[tuple[str, str], list[str]] = {}
    better: list[str] = []  # but over fewer seeds
    for variant in found.variants:
        name = found.labels.point(variant.best.values)
        for point in passed_over(variant, settings):
            chosen = choice_text(choice(point, settings), found.all_labels)
            better.append(f"{chosen}{f' of {name}' if len(found.variants) > 1 else ''} ({count_text(point)})")
        for factor in settings.best_over:
            if end := variant.edge(factor):
                at_end.setdefault((factor, end), []).append(name)
    said = []
    if better:
        said.append(f"Better by the mean, but over fewer seeds and so not chosen: {listed(better)}.")
    for (factor, end), names in at_end.items():
        whose = f" of {listed(names)}" if len(found.variants) > 1 else ""
        best = f"The best {found.all_labels.headers[factor]}{whose}"
        said.append(f"{best} is the {end} tried: a better one may lie beyond.")
    return said


def left_out(effect: Effect, found: Findings) -> list[str]:
    """Beneath a factor's table: what its values are compared over, where that isn't all that the grid has."""
    said = []
    apart = listed([found.labels.point(level.values) for level in effect.levels if level.apart])
    held = listed([found.labels.point(level.values) for level in effect.levels if level.apart and level.effect])
    alone = listed([found.labels.point(level.values) for level in effect.levels if level.apart and not level.effect])
    if effect.without or effect.without_seeds:
        count = effect.settings - len(effect.without)
        kept = [f"{count} of {effect.settings} settings of the other factors"] if effect.settings > 1 else []
        kept.append(f"{effect.seeds - len(effect.without_seeds)} of {seeds(effect.seeds)}")
        gone = [listed([found.labels.point(setting) for setting in effect.without])] if effect.without else []
        gone += [f"seed {listed([str(seed) for seed in effect.without_seeds])}"] if effect.without_seeds else []
        trials = f"; {effect.unused} trial{'s' * (effect.unused != 1)} that would count" if effect.unused else ""
        some_empty = any(level.mean is None and not level.apart for level in effect.levels)
        all_values = f"all values{' with trials' * some_empty}{f' but {apart}' * bool(apart)}"
        said.append(f"Over {' and '.join(kept)}, which {all_values} have. Left out: {'; '.join(gone)}{trials}.")
    if held:
        said.append(f"Too little in common with the rest for a mean, and held against the reference alone: {held}.")
    if alone:
        said.append(f"Never beside the reference with all else, and the seed, the same: {alone}.")
    return said
