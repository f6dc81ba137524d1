"""What recipes reach on real data in given minutes, beside plain transformers: docs/results.md.

    python scripts/results.py --output_dir outputs/results --poems poems_train.jsonl \\
        --poems_val poems_val.jsonl --model MODEL --chats chats.json
    python scripts/results.py --output_dir outputs/results --page

Each arm leaves a record in the output directory, and an arm with a record is not run again, so a
run that was cut off goes on with the arm it was in. `--page` writes docs/results.md from them.

poems: a tokenizer and a model from random weights, by configs/recipes/poems.yaml.
sft, lora: a chat model (a local directory) trained on chats, a tenth of them held out.
pairs, dpo: the model answers questions that ask for a form (scripts/measures/formats.py). Of its
answers to a question, one that has the form is better than one that has not; DPO learns from that.
grpo: the model answers the same questions and is rewarded for replies of the form asked for.
*-plain: scripts/bench/baseline.py, plain transformers and peft, for the same minutes.
base: what the chat model does before that.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "scripts", ROOT / "scripts" / "bench"):
    sys.path.insert(0, str(folder))

from measures import formats, verse  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from minigpt.data.formats import Kind
    from minigpt.data.store import TokenStore
    from minigpt.infer.engine import Engine, Reply

VOCABULARY = 6400
REPLY = 128  # tokens of a reply about a form
LONGEST = 512  # tokens of a poem, a chat, or a pair's longer answer with its prompt
POEMS = 200  # that are generated
SAMPLES = 20  # that the page shows
VALIDATIONS = 4  # within a run, besides the first and the last
PROBE_STEPS = {"pretrain": 20}  # of the short run that is timed; 3 for the others
PLANNED_SHARE = 0.9  # of the minutes: the steps are chosen to take so long
PAIR_SHARE = 0.5  # of the minutes, in which answers for pairs are generated
ANSWERS = 4  # to each question, to make pairs of
HELD_OUT = 10  # every so many-th chat is held out
LEAST_PAIRS = 16  # to learn from, and held out; for fewer, generating takes longer
MOST_OVERTIME = 3  # times as long, at most
SHOWN_PAIRS = 2  # on the page
COMPILED = 5  # minutes from which on layers are compiled, in the short run as well
FOREVER = 100_000  # steps
# Recipe, what differs from it, and the plain loop's learning rate. SFT and LoRA on 135M parameters
# take the rates of docs/log.md (2026-11-28); a run of minutes takes small steps.
STAGES: dict[str, tuple[str, dict[str, Any], float]] = {
    "pretrain": ("poems", {}, 2e-3),
    "sft": ("hub_sft", {"lr": 1e-4}, 1e-4),
    "lora": ("hub_lora", {"lr": 1e-3}, 1e-3),
    "dpo": ("chat_dpo", {"lr": 5e-6}, 5e-6),
    "grpo": ("../grpo", {"name": "adamw", "lr": 2e-5}, 0.0),
}
KINDS: dict[str, Kind] = {"pretrain": "text", "sft": "chat", "lora": "chat", "dpo": "preference"}
STEP_TOKENS = 2048
Record = dict[str, Any]


class Arms:
    """The arms and what they share.

    Args:
        args: the options of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.directory = Path(args.output_dir).resolve()
        self.by_name: dict[str, Callable[[], Record]] = {
            "poems": self.poems,
            "poems-plain": self.poems_plain,
            "pairs": self.make_pairs,
            "base": lambda: self.measure_chat(Path(args.model)),
            "sft": lambda: self.chat_arm("sft"),
            "sft-plain": lambda: self.chat_arm_plain("sft"),
            "lora": lambda: self.chat_arm("lora"),
            "lora-plain": lambda: self.chat_arm_plain("lora"),
            "dpo": lambda: self.chat_arm("dpo"),
            "dpo-plain": lambda: self.chat_arm_plain("dpo"),
            "grpo": self.grpo_arm,
        }

    def run(self, names: Sequence[str]) -> None:
        """Run the arms that have no record, in their order."""
        from measure import surroundings

        from minigpt.files import write_json

        self.directory.mkdir(parents=True, exist_ok=True)
        for name in (name for name in self.by_name if name in names):
            file = self.directory / f"{name}.json"
            if file.is_file():
                print(f"[{name}] done before", flush=True)
                continue
            print(f"[{name}]", flush=True)
            started = time.time()
            record = self.by_name[name]()
            seconds = round(time.time() - started, 1)
            budget = self.args.poems_minutes if name.startswith("poems") else self.args.minutes
            record |= {"budget_minutes": budget, "arm_seconds": seconds}
            write_json(file, record | {"machine": surroundings()})
            print(f"[{name}] {seconds:.0f} s", flush=True)

    def poems(self) -> Record:
        """Train a tokenizer and a model by the recipe, and let it write."""
        from minigpt.cli.tokenizer import train_to

        tokenizer = self.directory / "tokenizer"
        if not (tokenizer / "tokenizer.json").is_file():
            train_to(tokenizer, [self.args.poems], VOCABULARY, overwrite=True)
        changes = {
            "model": {"init_args": {"tokenizer": str(tokenizer)}},
            "data": data_options([self.args.poems], self.args.poems_val),
        }
        record = self.fit("poems", "pretrain", self.args.poems_minutes, changes)
        return record | self.measure_poems(self.directory / "poems" / "hf")

    def poems_plain(self) -> Record:
        """Train the same architecture with the same tokenizer in the plain loop."""
        from measure import architecture

        from minigpt.data import tokenizer as tokenizers
        from minigpt.model.architecture import Architecture, build_native
        from minigpt.model.pretrained import save_model

        sizes = architecture(str(self.recipe("pretrain")))
        tokenizer = tokenizers.load(self.directory / "tokenizer")
        start = self.directory / "poems-random"
        save_model(build_native(Architecture(**sizes), tokenizer), tokenizer, start)
        files = (self.args.poems, self.args.poems_val)
        record = self.plain_loop("poems-plain", "pretrain", start, files, self.args.poems_minutes)
        return record | self.measure_poems(self.directory / "poems-plain")

    def measure_poems(self, model: Path) -> Record:
        """Measure bits per character, and the poems that a model writes under held-out titles."""
        from minigpt.evaluate.likelihood import bits_per_byte
        from minigpt.infer.engine import Engine, Sampling

        engine = Engine.load(model)
        texts = [row["text"] for row in rows_of(self.args.poems_val)]
        heads, poems = zip(*(split_poem(text) for text in texts[:POEMS]), strict=True)
        samplings = [
            Sampling(LONGEST // 2, temperature=0.7, min_p=0.05, seed=seed, stop=("\n",))
            for seed in range(len(heads))
        ]
        written = [reply.text for reply in engine.complete(list(heads), samplings)]
        scores = bits_per_byte(engine, self.args.poems_val, LONGEST)
        size = sum(len(text.encode()) for text in texts) / sum(map(len, texts))  # bytes a character
        bits = scores["bits_per_byte"].value * size
        ours, theirs = verse.measure(written), verse.measure(poems)
        return {
            "bits_per_character": bits,
            "bits_per_character_per_nat": bits / scores["loss"].value,
            "verse": asdict(ours) | ours.shares(),
            "verse_held_out": asdict(theirs) | theirs.shares(),
            "poems": [a + b for a, b in zip(heads, written, strict=True)][:SAMPLES],
        }

    def chat_arm(self, stage: str) -> Record:
        """Train the chat model by a recipe, and measure it."""
        train, val = self.files(stage)
        changes = {
            "model": {"init_args": {"init_from": str(Path(self.args.model).resolve())}},
            "data": data_options([str(train)], str(val)),
        }
        if stage == "dpo":
            changes["model"]["init_args"] |= {"beta": 0.1}
            changes["data"]["init_args"] |= {"max_prompt_length": LONGEST // 2}
        record = self.fit(stage, stage, self.args.minutes, changes)
        return record | self.measure_chat(self.directory / stage / "hf")

    def chat_arm_plain(self, stage: str) -> Record:
        """Train the chat model in the plain loop, and measure it."""
        files = tuple(map(str, self.files(stage)))
        name, start = f"{stage}-plain", Path(self.args.model).resolve()
        record = self.plain_loop(name, stage, start, (files[0], files[1]), self.args.minutes)
        return record | self.measure_chat(self.directory / name)

    def grpo_arm(self) -> Record:
        """Let the chat model answer questions, reward the forms that are asked for, measure it."""
        prompts = formats.pair_prompts()
        for name, held_out in (("grpo.jsonl", False), ("grpo_val.jsonl", True)):
            rows = [
                {"messages": [{"role": "user", "content": prompt.text}], "form": prompt.form}
                for prompt in prompts
                if prompt.held_out == held_out
            ]
            write_rows(self.directory / name, rows)
        reward = f"{ROOT / 'scripts' / 'measures' / 'formats.py'}:obeys"
        train, val = (str(self.directory / name) for name in ("grpo.jsonl", "grpo_val.jsonl"))
        changes: Record = {
            "model": {
                "init_args": {
                    "init_from": str(Path(self.args.model).resolve()),
                    "rewards": [{"kind": "function", "function": reward}],
                    "optimizer": STAGES["grpo"][1],
                }
            },
            "data": {
                "init_args": {
                    "train": train,
                    "val": val,
                    "exam": [],
                    "replay": {str(self.files("sft")[0]): 0.2},
                    "prompts_per_batch": 8,
                    "max_completion_length": formats.LONGEST_REPLY,
                    "max_length": LONGEST,
                }
            },
        }
        changes["validate"] = {"every": FOREVER}  # a validation takes as long as some steps
        record = self.fit("grpo", "grpo", self.args.minutes, changes)
        return record | self.measure_chat(self.directory / "grpo" / "hf")

    def files(self, stage: str) -> tuple[Path, Path]:
        """Return the training and the held-out rows of a stage; the first call splits the chats."""
        if stage == "dpo":
            return self.directory / "pairs.jsonl", self.directory / "pairs_val.jsonl"
        train, val = self.directory / "chats.jsonl", self.directory / "chats_val.jsonl"
        if not val.is_file():
            rows = rows_of(self.args.chats)
            write_rows(train, [row for i, row in enumerate(rows) if i % HELD_OUT])
            write_rows(val, rows[::HELD_OUT])
        return train, val

    def measure_chat(self, model: Path) -> Record:
        """Measure held-out chats, forms, and preferences if there are pairs."""
        from minigpt.infer.engine import Engine

        engine = Engine.load(model)
        record = {"held_out": self.held_out(engine)}
        prompts = formats.test_prompts()
        replies = answer(engine, [prompt.text for prompt in prompts])
        record["following"] = formats.following(prompts, ended(replies))
        record["replies"] = [
            {"prompt": prompt.text, "reply": reply.text, "ended": reply.ended_by is not None}
            for prompt, reply in zip(prompts, replies, strict=True)
        ]
        return record | self.preferences(engine)

    def held_out(self, engine: Engine) -> float:
        """Return the loss on held-out chats in nats per target, by plain transformers."""
        from baseline import held_out

        store = open_rows(self.files("sft")[1], "sft", engine.tokenizer)
        return held_out(engine.model, store.path, batch_size=8)

    def preferences(self, engine: Engine) -> Record:
        """Return how often the better one of held-out pairs is likelier than the worse one."""
        from minigpt.evaluate.preferences import prefer

        pairs = self.files("dpo")[1]
        if not pairs.is_file():
            return {}
        scores = prefer(engine, str(pairs), LONGEST)
        return {name: scores[name].value for name in ("accuracy", "margin")}

    def make_pairs(self) -> Record:
        """Let the model answer, and make pairs of its better and its worse answers."""
        from minigpt.errors import MiniGPTError
        from minigpt.infer.engine import Engine

        engine = Engine.load(self.args.model)
        train: list[Record] = []
        val: list[Record] = []
        asked = obeyed = 0
        started = time.time()
        planned = PAIR_SHARE * self.args.minutes * 60
        prompts = formats.pair_prompts()
        for start in range(0, len(prompts), 8):
            block = [prompt for prompt in prompts[start : start + 8] for _ in range(ANSWERS)]
            texts = [prompt.text for prompt in block]
            replies = ended(answer(engine, texts, temperature=0.9, seed=start * ANSWERS))
            asked += len(block)
            obeyed += sum(p.obeyed(r) for p, r in zip(block, replies, strict=True))
            for i in range(0, len(block), ANSWERS):
                pairs = formats.pairs(block[i], replies[i : i + ANSWERS])
                (val if block[i].held_out else train).extend(pairs)
            fewest = min(len(train), len(val))
            allowed = planned if fewest >= LEAST_PAIRS else MOST_OVERTIME * planned
            if fewest and time.time() - started > allowed:
                break
        if not (train and val):
            raise MiniGPTError(f"Of {asked} answers none makes a pair: take a better --model.")
        write_rows(self.directory / "pairs.jsonl", train)
        write_rows(self.directory / "pairs_val.jsonl", val)
        counts = {"answers": asked, "obeyed": obeyed, "pairs": len(train), "held_out": len(val)}
        return counts | {"examples": train[:SHOWN_PAIRS]}

    def recipe(self, stage: str) -> Path:
        """Return the recipe of a stage."""
        return Path(self.args.recipes) / f"{STAGES[stage][0]}.yaml"

    def fit(self, name: str, stage: str, minutes: float, changes: Record) -> Record:
        """Run a recipe for so many minutes; a short run before tells how many steps they are."""
        compiles = minutes > COMPILED and stage != "grpo"  # whose micro-batches are of any size
        compiled = {"model": {"init_args": {"compile_layers": compiles}}}
        changes = merged(changes, compiled)
        probe = PROBE_STEPS.get(stage, 3)
        trainer = {"limit_val_batches": 0.0, "num_sanity_val_steps": 0}
        seconds, rows = self.run_fit("probe", stage, probe, changes, trainer)
        times = [row["time"] for row in rows if "tokens_seen" in row]
        step = (times[-1] - times[0]) / (len(times) - 1)
        planned = minutes * 60 * PLANNED_SHARE - (seconds - probe * step)
        steps = max(3, int(planned / step))
        limit = {"max_time": {"seconds": round(minutes * 60)}}
        seconds, rows = self.run_fit(name, stage, steps, changes, limit)
        summary = json.loads((self.directory / name / "summary.json").read_text())
        names = ("steps", "tokens_seen", "peak_rss_mb", "before", "final", "useful_tokens_per_s")
        return {
            "minutes": seconds / 60,
            "settings": {"recipe": self.recipe(stage).name, "planned_steps": steps},
            "curve": curve(rows),
            **{name: summary[name] for name in names},
        }

    def run_fit(
        self, name: str, stage: str, steps: int, changes: Record, trainer: Record
    ) -> tuple[float, list[Record]]:
        """Run `minigpt fit` in a process; return its seconds and the rows of metrics.jsonl."""
        from measure import spawn

        overlay = merged(
            {
                "run_dir": str(self.directory / name),
                "model": {"init_args": {"sample_prompts": None}},
                "trainer": {"max_steps": steps, "accelerator": "cpu", "devices": 1},
                "validate": {"every": max(1, -(-steps // (VALIDATIONS + 1)))},
                "checkpoint": {"every": FOREVER},
            },
            changes,
        )
        if stage not in ("pretrain", "grpo"):
            rates = {"optimizer": STAGES[stage][1]}
            step = {"tokens_per_batch": STEP_TOKENS, "tokens_per_step": STEP_TOKENS}
            overlay = merged(overlay, {"model": {"init_args": rates}, "data": {"init_args": step}})
        quiet = {"enable_progress_bar": False, "log_every_n_steps": 1 if name == "probe" else 10}
        overlay["trainer"] |= quiet | trainer
        file = self.directory / f"{name}.yaml"
        file.write_text(json.dumps(overlay))  # JSON is YAML
        configs = ["--config", str(self.recipe(stage)), "--config", str(file)]
        started = spawn(["-m", "minigpt", "fit", *configs, "--overwrite", "true"], f"fit {name}")
        lines = (self.directory / name / "metrics.jsonl").read_text().splitlines()
        return time.time() - started, list(map(json.loads, lines))

    def plain_loop(
        self, name: str, stage: str, start: Path, files: tuple[str, str], minutes: float
    ) -> Record:
        """Run the plain loop for so many minutes; it leaves its model in the output directory."""
        from baseline import LoopConfig
        from measure import spawn

        from minigpt.cli.settings import choose_precision
        from minigpt.data import tokenizer as tokenizers

        tokenizer = tokenizers.load(start)
        train, val = (open_rows(file, stage, tokenizer) for file in files)
        mean = train.meta["tokens"] / len(train)
        batch = STEP_TOKENS // LONGEST if stage == "pretrain" else max(1, round(STEP_TOKENS / mean))
        loop = LoopConfig(
            stage=stage,
            model=str(start),
            stores=(str(train.path), None if stage == "dpo" else str(val.path)),
            batch_size=batch,
            max_length=LONGEST,
            tokens_per_batch=STEP_TOKENS,
            precision=choose_precision(None, "cpu", "auto"),
            device="cpu",
            steps=FOREVER,
            seconds=minutes * 60 * PLANNED_SHARE,
            lr=STAGES[stage][2],
            decay=True,
            rank=8,
            curve=0 if stage == "dpo" else VALIDATIONS,
            save=str(self.directory / name),
        )
        config, result = (self.directory / f"{name}.loop-{end}.json" for end in ("in", "out"))
        config.write_text(json.dumps(asdict(loop)))
        spawn([str(ROOT / "scripts/bench/baseline.py"), str(config), str(result)], name)
        figures: Record = json.loads(result.read_text())
        points = [(at / 60, loss) for at, loss in figures.get("curve", [])]
        if "held_out" in figures:
            points.append((figures["seconds"] / 60, figures["held_out"]))
        return {
            "minutes": figures["seconds"] / 60,
            "settings": {"lr": loop.lr, "batch_size": batch, "optimizer": "adamw"},
            "curve": points,
            "steps": figures["steps"],
            "tokens_seen": figures["tokens"],
            "peak_rss_mb": figures["peak_rss_mb"],
            "useful_tokens_per_s": figures["tokens"] / figures["seconds"],
        }


def answer(
    engine: Engine, prompts: Sequence[str], temperature: float = 0.0, seed: int = 0
) -> list[Reply]:
    """Return replies to chats of one message."""
    from minigpt.data.formats import Message
    from minigpt.infer.engine import Sampling

    chats = [(Message("user", prompt),) for prompt in prompts]
    samplings = [Sampling(REPLY, temperature, min_p=0.05, seed=seed + i) for i in range(len(chats))]
    return engine.complete(chats, samplings)


def ended(replies: Sequence[Reply]) -> list[str]:
    """Return the texts of replies; those that do not end by themselves are empty."""
    return [reply.text if reply.ended_by is not None else "" for reply in replies]


def curve(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Return (minutes since the first row, held-out loss) from rows of metrics.jsonl.

    For GRPO it is the share of held-out prompts that are answered right in place of the loss.
    """
    first = rows[0]["time"] if rows else 0.0
    name = "val/loss" if any("val/loss" in row for row in rows) else "val/accuracy"
    return [((row["time"] - first) / 60, row[name]) for row in rows if name in row]


def split_poem(text: str) -> tuple[str, str]:
    """Cut a row of the poems into title and author, with the line's end, and the poem."""
    title, author, poem = text.split("\n", 2)
    return f"{title}\n{author}\n", poem


def merged(base: Record, changes: Record) -> Record:
    """Return nested options with changes, none of which changes the arguments."""
    result = dict(base)
    for name, value in changes.items():
        old = result.get(name)
        nested = isinstance(old, dict) and isinstance(value, dict)
        result[name] = merged(old, value) if nested else value
    return result


def data_options(train: list[str], val: str) -> Record:
    """Return the options of a DataModule on such files."""
    return {"init_args": {"train": train, "val": val, "max_length": LONGEST}}


def rows_of(file: str | Path) -> list[Record]:
    """Read all rows of a data file."""
    from minigpt.data.formats import iter_rows

    return [row for _, row in iter_rows(file)]


def write_rows(file: Path, rows: Sequence[Record]) -> None:
    """Write rows as JSONL."""
    from minigpt.files import write_text

    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def open_rows(file: str | Path, stage: str, tokenizer: PreTrainedTokenizerFast) -> TokenStore:
    """Return the token store of a stage's data file."""
    from minigpt.data.store import Limits, open_store

    return open_store(str(file), KINDS[stage], tokenizer, Limits(LONGEST, on_bad_row="skip"))


def main(arguments: list[str]) -> None:
    """Parse the command line, run the arms, or write the page."""
    from minigpt.cli.options import CommandParser
    from minigpt.errors import ConfigError

    parser = CommandParser(prog="scripts/results.py", description=__doc__)
    add = parser.add_argument
    add("--output_dir", default="outputs/results", help="records, models (outputs/results)")
    add("--arms", nargs="+", help="which ones to run; all by default")
    add("--minutes", type=float, default=20.0, help="of training, for each arm (20)")
    add("--poems_minutes", type=float, help="for those of the poems (--minutes, twice)")
    add("--poems", help="JSONL of texts: title, author, poem, each on its line")
    add("--poems_val", help="the same, held out")
    add("--model", help="directory of a chat model")
    add("--chats", help="file of chats")
    add("--recipes", default=str(ROOT / "configs" / "recipes"), help="folder of the recipes")
    add("--page", action="store_true", help="write docs/results.md from the records")
    add("--note", default="", help="a sentence for the page about the conditions of the runs")
    args = parser.parse_args(arguments)
    args.poems_minutes = args.poems_minutes or 2 * args.minutes
    if args.page:
        from results_page import write_page

        return write_page(Path(args.output_dir), ROOT / "docs" / "results.md", args.note)
    arms = Arms(args)
    names = args.arms or list(arms.by_name)
    if unknown := set(names) - set(arms.by_name):
        raise ConfigError(f"--arms: there is no {', '.join(sorted(unknown))}.")
    for option in {option for name in names for option in needed(name)}:
        if not getattr(args, option):
            raise ConfigError(f"--{option} is needed for these arms.")
    return arms.run(names)


def needed(arm: str) -> tuple[str, ...]:
    """Return the options without which an arm cannot run."""
    return ("poems", "poems_val") if arm.startswith("poems") else ("model", "chats")


if __name__ == "__main__":
    from measure import run

    logging.getLogger("minigpt").setLevel(logging.INFO)
    sys.exit(run(main))
