"""What the trials that count ran on: code, data, device, op backend and versions, and where they differ."""

from __future__ import annotations

from collections import Counter
from typing import Any

from gla_ablate.report.trials import Trial

WORDS = {  # aspect → (its name in a report, the warning where trials differ in it)
    "data": ("data", "Trials did not all see the same data"),
    "code": ("code", "Trials did not all run the same code"),
    "device": ("device", "Trials did not all run on the same device"),
    "backend": ("backend of the op", "Trials did not all use the same backend of the op"),
    "versions": ("versions", "Trials did not all run with the same versions"),
}


def provenance(trials: list[Trial]) -> dict[str, Counter[str]]:
    """Aspect → how many of the trials that count have which text for it."""
    stamps = [trial.stamp for trial in trials if trial.counts]
    return {aspect: Counter(describe(aspect, stamp) for stamp in stamps) for aspect in WORDS}


def differences(found: dict[str, Counter[str]]) -> list[str]:
    """A sentence for each aspect in which the trials differ."""
    return [f"{WORDS[aspect][1]}: {shares(texts)}." for aspect, texts in found.items() if len(texts) > 1]


def shares(texts: Counter[str]) -> str:
    """The only text, or each with its number of trials."""
    if len(texts) == 1:
        return next(iter(texts))
    return "; ".join(f"{text} ({count} trial{'s' * (count > 1)})" for text, count in texts.most_common())


def describe(aspect: str, stamp: dict[str, Any]) -> str:
    """One aspect of a stamp in words; trials are alike in it exactly if these are equal."""
    known = stamp.get(aspect if aspect != "code" else "git")
    if not known:
        return "unknown"
    if aspect == "data":
        size = f", {known['bytes'] / 1e6:.1f} MB" if known.get("bytes") else ""
        checksum = f", sha256 {known['sha256'][:12]}" if known.get("sha256") else ""
        return f"{known.get('name', 'unnamed')}{size}{checksum}"
    if aspect == "code":
        kept = f" ({known['diff']})" if known.get("diff") else ""
        changed = f" with uncommitted changes{kept}" if known.get("dirty") else ""
        return f"git {(known.get('sha') or 'unknown')[:10]}{changed}"
    if aspect == "versions":
        return ", ".join(f"{package} {version}" for package, version in known.items() if version)
    return str(known)
