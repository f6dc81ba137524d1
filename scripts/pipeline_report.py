"""The pipeline's own section of its report: exams stage by stage, checks, times and machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline import GENERAL, REWARDED

from minigpt.evaluate.scores import Score, wilson
from minigpt.report.build import Document, bars
from minigpt.report.runs import is_number, lookup

# Stage, exam, path of the score before, path of the one after, files whose items were counted.
EXAMS = (
    ("SFT", "general exam", "sft exam_before", "sft exam_after", GENERAL),
    *(("", f"  {f.replace('_', ' ')}", "", f"sft families {f}", (f,)) for f in GENERAL),
    ("DPO", "reward accuracy, held out", "", "dpo reward_accuracy", ("dpo_val",)),
    ("", "preferred style", "dpo preferred_style_before", "dpo preferred_style_after", ("style",)),
    ("", "  with the right tip", "dpo right_advice_before", "dpo right_advice_after", ("advice",)),
    ("", "general exam", "sft exam_after", "dpo exam_after", GENERAL),
    ("reward model", "accuracy, held-out pairs", "", "reward accuracy", ("dpo_val",)),
    ("", "  by length alone", "", "reward accuracy_by_length", ("dpo_val",)),
    ("", "  by words alone", "", "reward accuracy_by_words", ("dpo_val",)),
    ("GRPO", "rewarded skills", "grpo skills_before", "grpo skills_after", REWARDED),
    *(
        (
            "",
            f"  {f.replace('_', ' ')}",
            f"grpo families_before {f}",
            f"grpo families_after {f}",
            (f,),
        )
        for f in REWARDED
    ),
    ("", "general exam", "dpo exam_after", "grpo exam_after", GENERAL),
    ("", "preferred style", "dpo preferred_style_after", "grpo preferred_style_after", ("style",)),
    ("LoRA", "domain exam", "lora domain_before", "lora domain_after", ("medical",)),
    ("", "general exam", "sft exam_after", "lora exam_after", GENERAL),
)
CHECKS = {
    "merged_equals_adapter": "Merged adapter gives the same answers",
    "adapter_off_equals_base": "Adapter off equals the base",
}


def add_pipeline(document: Document, report: dict[str, Any]) -> None:
    """Add the section.

    Args:
        document: is added to.
        report: what report.json holds.
    """
    document.heading("Pipeline")
    bits = [lookup(report, f"stages pretrain {k}") for k in ("val_bpb_untrained", "val_bpb")]
    rows = [
        ("pretrain", "bits per byte, held out", *(f"{b:.3f}" if is_number(b) else "" for b in bits))
    ]
    by_exam: dict[str, dict[str, Score]] = {}
    stage = ""
    for name, exam, before, after, files in EXAMS:
        stage = name or stage
        scores = [score_of(report, path, files) for path in (before, after)]
        rows.append((name, exam, *map(percent, scores)))
        for label, score in zip((f"before {stage}", stage), scores, strict=True):
            if score and not (label.startswith("before") and exam in by_exam):
                by_exam.setdefault(exam, {})[label] = score
    document.table(("stage", "exam", "before", "after"), rows)
    if report.get("items"):
        document.note("In brackets: 95% intervals (Wilson).")
    document.figures([bars(exam.strip(), s) for exam, s in by_exam.items() if len(s) > 1])
    for key, check in CHECKS.items():
        document.note(f"{check}: {lookup(report, f'stages lora {key}')}.")
    document.table(("stage", "seconds"), list(report["seconds"].items()))
    document.note("Machine: " + ", ".join(f"{k} {v}" for k, v in report["machine"].items()))


def score_of(report: dict[str, Any], path: str, files: Sequence[str]) -> Score | None:
    """Return a share of the report, with its interval where the items were counted."""
    value = lookup(report, f"stages {path}") if path else None
    if not is_number(value):
        return None
    n = sum(lookup(report, f"items {file}", int) or 0 for file in files)
    return Score(value, n, *wilson(value * n, n)) if n else Score(value)


def percent(score: Score | None) -> str:
    """Write a share in percent; nothing where there is none."""
    if score is None:
        return ""
    return str(score) if score.n else f"{100 * score.value:.1f}%"
