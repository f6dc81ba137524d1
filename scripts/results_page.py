"""Write docs/results.md from the records of scripts/results.py."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
CHAT_ARMS = {
    "base": "before",
    "sft": "SFT",
    "sft-plain": "SFT, plain",
    "lora": "LoRA",
    "lora-plain": "LoRA, plain",
    "dpo": "DPO",
    "dpo-plain": "DPO, plain",
    "grpo": "GRPO",
}
COST = {
    "minutes": "minutes",
    "steps": "steps",
    "tokens_seen": "tokens",
    "useful_tokens_per_s": "tokens/s",
    "peak_rss_mb": "peak MB",
}
VERSE = {
    "regular": "lines of 5 or of 7 characters, an even number of them",
    "rhymed of regular": "of these, second and fourth line rhyme",
    "regular and rhymed": "both, of all",
    "judged of regular": "line ends that the table of finals has",
}
COMMAND = """```bash
export OMP_NUM_THREADS={threads}
python scripts/results.py --output_dir outputs/results --poems $DATA/poems_zh_train.jsonl \\
  --poems_val $DATA/poems_zh_val.jsonl --model $MODEL --chats $DATA/lf_alpaca_en_demo.json{minutes}
python scripts/results.py --output_dir outputs/results --page
```"""


def write_page(directory: Path, file: Path, note: str = "") -> None:
    """Write the page; arms without a record are left out.

    Args:
        directory: of the records.
        file: the page.
        note: a sentence about the conditions of the runs.

    Raises:
        ConfigError: when there is no record at all.
    """
    from minigpt.errors import ConfigError
    from minigpt.files import write_text

    records = {path.stem: json.loads(path.read_text()) for path in directory.glob("*.json")}
    records = {name: r for name, r in records.items() if "arm_seconds" in r}
    if not records:
        raise ConfigError(f"{directory} has no records. Run the arms first.")
    write_text(file, render(records, note))
    print(f"{file} is written.")


def render(records: Mapping[str, Record], note: str = "") -> str:
    """Return the page, with a sentence about the conditions of the runs."""
    minutes: dict[str, float] = {}  # the fewest, where arms differ: `note` names the others
    for name, record in records.items():
        option = "--poems_minutes" if name.startswith("poems") else "--minutes"
        minutes[option] = min(minutes.get(option, math.inf), record["budget_minutes"])
    parts = [introduction(next(iter(records.values()))["machine"], minutes, note)]
    if poems := {name: records[name] for name in ("poems", "poems-plain") if name in records}:
        parts += poem_sections(poems)
    if chat := {name: records[name] for name in CHAT_ARMS if name in records}:
        parts += chat_sections(chat, records.get("pairs"))
    return "\n\n".join(parts) + "\n"


def introduction(machine: Record, minutes: Mapping[str, float], note: str) -> str:
    """Return the beginning: what was run, on what, and for how many minutes by which option."""
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    options = "".join(f" \\\n  {name} {value:g}" for name, value in sorted(minutes.items()))
    command = COMMAND.format(threads=machine["threads"], minutes=options)
    return f"""# Results on real data

What the recipes reach in given minutes, beside the plain loop of transformers and peft
(`scripts/bench/baseline.py`) with the same minutes, threads and data. {machine["date"]},
{threads}, {machine["processor"]}; {versions}.{" " * bool(note)}{note}

{command}

`$DATA` holds public files (chinese-poetry; LLaMA-Factory's English demo). `$MODEL` is
SmolLM2-135M-Instruct widened from a public Q4_1 file; the hub's own weights differ slightly. An arm
that is cut off is run again, finished ones are not. Minutes of the recipes are those of `minigpt
fit` from its start to its end, validations included; those of the plain loop are of its training
alone. Samples are the first ones, as they came; those that the limit of tokens cut
off are marked."""


def poem_sections(records: Mapping[str, Record]) -> Iterator[str]:
    """Yield the sections about poems."""
    yield (
        "## Poems from random weights\n\n"
        "[configs/recipes/poems.yaml](../configs/recipes/poems.yaml): a tokenizer of 6,400 tokens "
        "and 6.1M parameters. Poems are written under the titles and authors of the first "
        f"{next(iter(records.values()))['verse']['poems']} held-out ones (temperature 0.7, min_p "
        "0.05). Many titles are those of 詞, whose lines differ in length: held-out poems under "
        "the same titles are counted, too."
    )
    titles = {"poems": "recipe", "poems-plain": "plain loop"}
    head = ["", *(titles[name] for name in records), "held-out poems"]
    rows = [[title, *(r.get(key) for r in records.values()), ""] for key, title in COST.items()]
    rows.append(["bits per character", *(r["bits_per_character"] for r in records.values()), ""])
    held_out = next(iter(records.values()))["verse_held_out"]
    for key, title in VERSE.items():
        shares = [record["verse"][key] for record in records.values()]
        rows.append([title, *map(percent, [*shares, held_out[key]])])
    yield table(head, rows)
    curves = {
        titles[name]: [(x, y * r["bits_per_character_per_nat"]) for x, y in r["curve"]]
        for name, r in records.items()
    }
    yield curve_table("Held-out bits per character over the minutes", curves)
    for name, record in records.items():
        poems = record["poems"] if name == "poems" else record["poems"][:5]
        written = "\n\n".join(poem.strip() for poem in poems)
        yield f"### {len(poems)} poems of the {titles[name]}\n\n````text\n{written}\n````"


def grpo_text(record: Record) -> str:
    """Return what GRPO's answers were rewarded for, and the validations at both ends of its run."""
    greedy, any_of_8 = (
        f"{percent(record['before'][name])} before and {percent(record['final'][name])} after"
        for name in ("val/accuracy", "val/pass_at_8")
    )
    return (
        "GRPO: the model answers the questions of the pairs, 8 answers to each of 8 questions a "
        "step, and is rewarded for the form; chats are replayed (a fifth of the targets). Of the "
        f"questions that are held out, {greedy} have the form in greedy answers, {any_of_8} in one "
        "of 8. What it forgot would show in the held-out loss of the chats."
    )


def chat_sections(records: Mapping[str, Record], pairs: Record | None) -> Iterator[str]:
    """Yield the sections about the chat model."""
    yield (
        "## A chat model of 135M parameters\n\n"
        "SFT and LoRA learn from nine tenths of the chats; the loss on the others is in nats per "
        "target. Forms: 64 questions that ask for a form of the reply, greedy, at most 128 tokens; "
        "a reply counts if it has the form by a checker and ends by itself."
    )
    if pairs:
        yield (
            f"Pairs: the model answered other questions in other wordings, {pairs['answers']} "
            f"answers drawn at temperature 0.9, of which {pairs['obeyed']} had the form. Of the "
            "answers to a question, one that has the form is better than one that has not: "
            f"{pairs['pairs']} pairs, and {pairs['held_out']} about questions that are held out. "
            "Preference accuracy is the share of those whose better answer is likelier."
        )
    if "grpo" in records:
        yield grpo_text(records["grpo"])
    head = ["", *COST.values(), "held-out loss", "forms", "preferences"]
    rows = [
        [
            CHAT_ARMS[name],
            *(record.get(key) for key in COST),
            f"{record['held_out']:.3f}",
            percent(record["following"]["all"]),
            percent(record.get("accuracy")),
        ]
        for name, record in records.items()
    ]
    if not pairs:
        head, rows = head[:-1], [row[:-1] for row in rows]
    yield table(head, rows)
    forms = [name for name in next(iter(records.values()))["following"] if name != "all"]
    shares = [
        [form, *(percent(record["following"][form]) for record in records.values())]
        for form in forms
    ]
    yield table(["form", *(CHAT_ARMS[name] for name in records)], shares)
    curves = {
        CHAT_ARMS[name]: record["curve"]
        for name, record in records.items()
        if name.startswith(("sft", "lora"))
    }
    yield curve_table("Held-out loss over the minutes", curves)
    yield from replies(records)


def replies(records: Mapping[str, Record], questions: int = 8) -> Iterator[str]:
    """Yield the replies of our own runs to the first of some questions in each form."""
    yield "### Replies"
    ours = {name: r for name, r in records.items() if not name.endswith("-plain")}
    for at in range(0, len(next(iter(ours.values()))["replies"]), questions):
        prompt = next(iter(ours.values()))["replies"][at]["prompt"]
        written = (
            f"[{CHAT_ARMS[name]}] {shown(record['replies'][at])}" for name, record in ours.items()
        )
        yield f"**{prompt}**\n\n````text\n" + "\n".join(written) + "\n````"


def shown(reply: Record) -> str:
    """Return a reply as it came, with a mark where it did not end by itself."""
    has_ended = reply.get("ended", reply["reply"] != "")  # older records keep no text of the others
    return str(reply["reply"] if has_ended else f"{reply['reply']} (did not end)".lstrip())


def curve_table(title: str, curves: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Return a curve's points, minute and value, a row for each of several runs."""
    longest = max((len(points) for points in curves.values()), default=0)
    rows = []
    for name, points in curves.items():
        cells = [f"{value:.3f} ({minute:.1f})" for minute, value in points]
        rows.append([name, *cells, *[""] * (longest - len(cells))])
    head = ["value (minute)", *(str(i + 1) for i in range(longest))]
    return f"**{title}**\n\n{table(head, rows)}" if longest else ""


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [list(head), ["---"] * len(head), *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: object) -> str:
    """Return a number as it is read, and nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def percent(share: float | None) -> str:
    """Return a share in percent."""
    return "" if share is None else f"{share:.0%}"
