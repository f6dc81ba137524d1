"""Write MiniGPT's bundled sample data: an invented bilingual world for every stage.

The files depend on nothing but the seed: `python scripts/make_sample_data.py` rewrites
`data/` exactly as it is committed. A file with the same rows as an earlier one is a symbolic link
to it. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from sample_world import medical, security
from sample_world.chats import (
    dpo_rows,
    dpo_val_rows,
    kto_rows,
    replay_rows,
    sft_rows,
    sft_val_rows,
)
from sample_world.common import Row
from sample_world.evaluation import minimal_pairs, multiple_choice
from sample_world.exam import exams
from sample_world.pretrain import documents
from sample_world.reinforce import grpo_rows, grpo_val_rows, sft_skill_rows

MINI_ROWS = 1000
STAGES = ("pretrain", "sft", "dpo", "lora_medical")


def build(seed: int) -> dict[str, list[Row]]:
    """Return the rows of every file, keyed by the path inside the output folder."""
    training = documents(seed, "pretrain", 1.0)
    texts = {row["text"] for row in training}  # some documents are a sentence or two
    validation = documents(seed, "pretrain val", 0.04)
    files = {
        "pretrain": training,
        "pretrain_val": [row for row in validation if row["text"] not in texts],
        "sft": sft_rows(seed),
        "sft_val": sft_val_rows(seed),
        "sft_skills": sft_skill_rows(seed),
        "dpo": dpo_rows(seed),
        "dpo_val": dpo_val_rows(seed),
        "replay": replay_rows(seed),
        "grpo": grpo_rows(seed),
        "grpo_val": grpo_val_rows(seed),
        "kto": kto_rows(dpo_rows(seed)),
        "kto_val": kto_rows(dpo_val_rows(seed)),
        "grpo_hard": grpo_rows(seed, of_demo=False),
        "grpo_hard_val": grpo_val_rows(seed, of_demo=False),
        "lora_medical": medical.medical_rows(seed, medical.ASK),
        "lora_medical_val": medical.medical_rows(seed, medical.ASK_DEV),
        "lora/security": security.security_rows(seed),
        "lora/security_val": security.security_val_rows(seed),
        "security_dpo": security.security_dpo_rows(seed),
        "security_dpo_val": security.security_dpo_val_rows(seed),
    }
    for split in ("", "_val"):
        files["lora/medical" + split] = files["lora_medical" + split]
        for stage in STAGES:
            files[f"mini/{stage}{split}"] = files[stage + split][:MINI_ROWS]
    files.update({f"exam/{family}": rows for family, rows in exams(seed).items()})
    files |= {"eval/choices": multiple_choice(seed), "eval/pairs": minimal_pairs(seed)}
    return files


def write(files: dict[str, list[Row]], directory: Path) -> None:
    """Write one JSON object a line, in UTF-8; link files with the rows of an earlier one to it."""
    written: dict[str, Path] = {}
    for name, rows in files.items():
        path = directory / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # a link that is written to would change another file
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if text in written:
            path.symlink_to(os.path.relpath(written[text], path.parent))
        else:
            path.write_text(text, encoding="utf-8", newline="\n")
            written[text] = path


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and write every file."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0],
        epilog="example: python scripts/make_sample_data.py --output_dir data --seed 1",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("data"), help="folder to write")
    parser.add_argument("--seed", type=int, default=1, help="seed of the invented world")
    args = parser.parse_args(argv)
    files = build(args.seed)
    write(files, args.output_dir)
    print(f"{sum(map(len, files.values()))} rows in {len(files)} files under {args.output_dir}")


if __name__ == "__main__":
    main()
