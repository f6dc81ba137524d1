"""Reward models: trained on pairs, read by plain transformers, and judges of replies."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_runs
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from tiny_runs import Fit
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from minigpt.__main__ import main
from minigpt.cli.trainer import run
from minigpt.data import tokenizer as tokenizers
from minigpt.data.formats import Message
from minigpt.errors import ConfigError, ModelError
from minigpt.evaluate.reward_model import RewardScorer, best_of
from minigpt.infer.engine import Engine, Sampling
from minigpt.model.pretrained import save_model


@pytest.fixture(scope="module")
def reward(world: Path) -> Path:
    """A finished run of a reward model, with checkpoints of steps 3 and 6."""
    run_config = config(world, world / "reward")
    run(tiny_runs.arguments("fit", run_config))
    return world / "reward"


def config(world: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    options = {
        "trainer__max_steps": 6,
        "trainer__val_check_interval": 3,
        "checkpoint": {"every": 3, "keep": "all"},
        "model__init_args__centering": 0.01,
    }
    return tiny_runs.config(world, "reward", run_dir, **{**options, **changes})


def rows(world: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (world / "dpo_val.jsonl").read_text().splitlines()]


def texts(scorer: RewardScorer, world: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and answers of the held-out pairs, in ids as training has them."""
    engine = Engine.load(world / "sft")
    end = tokenizers.TURN_END
    prompts, answers = [], []
    for row in rows(world):
        for name in ("chosen", "rejected"):
            prompts.append(engine.encode([Message("user", row["prompt"])]))
            answers.append(engine.encode(f"{row[name]}{end}"))
    return prompts, answers


def transformers_scores(
    model: PreTrainedModel, directory: Path, prompts: list[list[int]], answers: list[list[int]]
) -> list[float]:
    """What plain transformers gives a padded batch."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    sequences = [[*p, *a] for p, a in zip(prompts, answers, strict=True)]
    batch = tokenizer.pad({"input_ids": sequences}, return_tensors="pt")
    assert (batch["attention_mask"] == 0).any()
    with torch.no_grad():
        logits = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert logits.shape == (len(sequences), 1)
    return [float(score) for score in logits[:, 0]]


def test_plain_transformers_gives_the_scores_that_were_trained(world: Path, reward: Path) -> None:
    scorer = RewardScorer.load(reward, "cpu")
    prompts, answers = texts(scorer, world)
    ours = scorer.scores(prompts, answers)
    model = AutoModelForSequenceClassification.from_pretrained(reward / "hf")
    assert type(model).__name__ == "Qwen3ForSequenceClassification"
    theirs = transformers_scores(model, reward / "hf", prompts, answers)
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert max(ours) - min(ours) > 0.1
    margins = torch.tensor(ours[0::2]) - torch.tensor(ours[1::2])
    final = json.loads((reward / "summary.json").read_text())["final"]
    assert final["val/rewards/margin"] == pytest.approx(float(margins.mean()), abs=1e-4)
    assert final["val/rewards/accuracy"] == pytest.approx(float((margins > 0).float().mean()))


def test_it_learns_beside_what_length_and_words_tell(world: Path, reward: Path) -> None:
    """Rejected answers of these data are longer, and end with a word of their own."""
    losses = tiny_runs.metrics(reward)
    assert losses[0] == pytest.approx(math.log(2), abs=0.05)
    assert losses[-1] < losses[0] - 0.1
    assert len(tiny_runs.metrics(reward, "val/rewards/accuracy")) == 3
    answers = texts(RewardScorer.load(reward, "cpu"), world)[1]
    lengths = list(zip(map(len, answers[0::2]), map(len, answers[1::2]), strict=True))
    shorter = sum((c < r) + (c == r) / 2 for c, r in lengths) / len(lengths)
    by_length = tiny_runs.metrics(reward, "val/accuracy_by_length")
    assert by_length == pytest.approx([shorter] * 3)
    by_words = tiny_runs.metrics(reward, "val/accuracy_by_words")
    assert by_words == pytest.approx([by_words[0]] * 3)
    assert by_words[0] > shorter


def test_answers_to_one_prompt_are_scored_together_or_alone_alike(
    world: Path, reward: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = RewardScorer.load(reward, "cpu")
    prompts, answers = texts(scorer, world)
    one_prompt = [prompts[0]] * len(answers)
    together = scorer.scores(one_prompt, answers)
    alone = [scorer.scores([prompts[0]], [answer])[0] for answer in answers]
    assert together == pytest.approx(alone, abs=1e-5)
    monkeypatch.setattr("minigpt.evaluate.reward_model.BATCH_TOKENS", 50)
    assert scorer.scores(one_prompt, answers) == pytest.approx(alone, abs=1e-5)
    monkeypatch.setattr("minigpt.evaluate.reward_model.shared_prompt_limit", lambda config: 8)
    assert scorer.scores(one_prompt, answers) == pytest.approx(alone, abs=1e-5)
    with pytest.raises(ValueError, match="without tokens"):
        scorer.scores([prompts[0]], [[]])


def test_a_margin_raises_the_loss_of_its_pair(world: Path, tmp_path: Path) -> None:
    """At first all scores are near 0, so that the loss is -log σ(-margin)."""
    tiny_runs.write_jsonl(tmp_path / "far.jsonl", [{**row, "margin": 2.0} for row in rows(world)])
    options = {"data__init_args__train": str(tmp_path / "far.jsonl"), "trainer__max_steps": 2}
    run(tiny_runs.arguments("fit", config(world, tmp_path / "run", **options)))
    loss = tiny_runs.metrics(tmp_path / "run")[0]
    assert loss == pytest.approx(math.log1p(math.exp(2)), abs=0.1)


def test_an_adapter_brings_its_score_head(world: Path, tmp_path: Path) -> None:
    run_config = config(world, tmp_path / "run", model__init_args__lora={"r": 4, "dropout": 0.0})
    run(tiny_runs.arguments("fit", run_config))
    scorer = RewardScorer.load(tmp_path / "run", "cpu")
    prompts, answers = texts(scorer, world)
    ours = scorer.scores(prompts, answers)
    hf = tmp_path / "run" / "hf"
    plain = AutoPeftModelForSequenceClassification.from_pretrained(hf, num_labels=1)
    assert ours == pytest.approx(transformers_scores(plain, hf, prompts, answers), abs=1e-5)
    final = json.loads((tmp_path / "run" / "summary.json").read_text())["final"]
    measured = run(tiny_runs.arguments("validate", run_config)).trainer.callback_metrics
    for name in ("val/loss", "val/rewards/margin", "val/accuracy_by_words"):
        assert float(measured[name]) == pytest.approx(final[name], rel=1e-3, abs=1e-5)
    with pytest.raises(ModelError, match="made for the task SEQ_CLS"):
        Engine.load(tmp_path / "run")


def test_a_run_goes_on_as_if_nothing_had_happened(
    world: Path, reward: Path, tmp_path: Path
) -> None:
    shutil.copytree(reward / "checkpoints" / "step=3", tmp_path / "run" / "checkpoints" / "step=3")
    run_config = config(world, tmp_path / "run")
    run(tiny_runs.arguments("fit", run_config, "--ckpt_path", "auto"))
    again, before = (
        load_file(where / "hf" / "model.safetensors") for where in (tmp_path / "run", reward)
    )
    assert again.keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in again.items())
    at_step_3 = load_file(reward / "checkpoints" / "step=3" / "hf" / "model.safetensors")
    assert not torch.equal(at_step_3["score.weight"], before["score.weight"])


def test_a_reward_model_goes_on_from_a_reward_model(reward: Path, tmp_path: Path, fit: Fit) -> None:
    """Its head is trained further, not drawn anew."""
    fit("reward", model__init_args__init_from=str(reward), trainer__max_steps=2)
    final = json.loads((reward / "summary.json").read_text())["final"]
    first = tiny_runs.metrics(tmp_path / "run", "val/rewards/margin")[0]
    assert first == pytest.approx(final["val/rewards/margin"], rel=1e-3)


def test_families_without_a_class_are_refused_before_anything_is_written(
    world: Path, tmp_path: Path, fit: Fit
) -> None:
    save_model(tiny.model("granite"), tokenizers.load(world / "tokenizer"), tmp_path / "granite")
    with pytest.raises(ModelError, match=r"granite cannot become a reward model.*family granite"):
        fit("reward", model__init_args__init_from=str(tmp_path / "granite"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("verb", "changes", "message"),
    [
        ("fit", {"model__init_args__sample_prompts": ["the cat"]}, "leave model.sample_prompts"),
        ("fit", {"model__init_args__centering": -1.0}, "model.centering must be at least 0"),
        ("test", {"data__init_args__exam": ["exam.jsonl"]}, "leave data.exam out"),
        ("predict", {"data__init_args__predict": "prompts.jsonl"}, "--best_of N"),
    ],
)
def test_what_only_models_that_write_can_do_is_refused(
    verb: str,
    changes: dict[str, Any],
    message: str,
    world: Path,
    reward: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(world)
    run_dir = world / "refused" if verb == "fit" else reward
    run_config = config(world, run_dir, **changes)
    assert main(tiny_runs.arguments(verb, run_config)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in last
    assert not (reward / "predictions.jsonl").exists()


def test_a_reward_model_is_no_model_that_writes(reward: Path, fit: Fit) -> None:
    for load in (Engine.load, lambda path: fit("sft", model__init_args__init_from=str(path))):
        with pytest.raises(ModelError, match="is a reward model: it gives answers scores"):
            load(reward)


def test_models_that_cannot_judge_are_refused(world: Path, reward: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no reward model: it writes text"):
        RewardScorer.load(world / "sft")
    other = tokenizers.load(tiny.tokenizer(tmp_path / "other"))
    with pytest.raises(ModelError, match="has another tokenizer"):
        RewardScorer.load(reward, "cpu", other)
    assert RewardScorer.load(reward, "cpu", tokenizers.load(world / "tokenizer"))


# The judge of replies


def test_the_best_reply_is_the_one_with_the_highest_score(world: Path, reward: Path) -> None:
    scorer, engine = RewardScorer.load(reward, "cpu"), Engine.load(world / "sft", device="cpu")
    sampling = Sampling(max_new_tokens=6, temperature=1.5, seed=3)
    chats = [[Message("user", text)] for text in ("the cat", "a dog")]
    best = list(best_of(scorer, engine, chats, sampling, 4))
    for chat, reply in zip(chats, best, strict=True):
        drawn = [
            engine.complete([chat], Sampling(max_new_tokens=6, temperature=1.5, seed=seed))[0]
            for seed in range(3, 7)
        ]
        ends = [[] if one.ended_by is None else [one.ended_by] for one in drawn]
        answers = [one.ids + end for one, end in zip(drawn, ends, strict=True)]
        scores = scorer.scores([engine.encode(chat)] * 4, answers)
        assert reply.ids == drawn[scores.index(max(scores))].ids
        assert len({tuple(one.ids) for one in drawn}) > 1


def _refuse(self: RewardScorer, tokenizer: object) -> None:
    raise ModelError("another tokenizer")


def test_a_reward_model_scores_the_answers_of_grpo(
    world: Path, reward: Path, tmp_path: Path, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = {"model__init_args__rewards": [{"kind": "reward_model", "model": str(reward)}]}
    scored: list[float] = []
    scores = RewardScorer.scores

    def spy(self: RewardScorer, prompts: Any, answers: Any) -> list[float]:
        scored[:] = scores(self, prompts, answers)
        return scored

    monkeypatch.setattr(RewardScorer, "scores", spy)
    fit("grpo", **judge, trainer__max_steps=2, trainer__limit_val_batches=0)
    mean = tiny_runs.metrics(tmp_path / "run", "reward/reward_model")[-1]
    assert mean == pytest.approx(sum(scored) / len(scored), abs=1e-5)
    monkeypatch.setattr(RewardScorer, "check_tokenizer", _refuse)
    with pytest.raises(ModelError, match="another tokenizer"):
        fit("grpo", "other", **judge)


def test_a_reward_model_must_read_all_that_is_sampled(
    reward: Path, tmp_path: Path, fit: Fit
) -> None:
    short = shutil.copytree(reward / "hf", tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 63}))
    rewards = [{"kind": "reward_model", "model": str(short)}]
    with pytest.raises(ConfigError, match=r"max_length is 64, but the reward model .* most 63"):
        fit("grpo", model__init_args__rewards=rewards)
    assert not (tmp_path / "run" / "config.yaml").exists()
    scorer = RewardScorer.load(short, "cpu")
    assert scorer.scores([[1] * 60], [[2] * 3])
    with pytest.raises(ModelError, match=r"have 64 tokens together, and the reward .* most 63"):
        scorer.scores([[1] * 60], [[2] * 4])


def test_generate_prints_the_best_reply(
    world: Path, reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(world / "sft"), "--max_new_tokens", "6"]
    judge = ["--best_of", "4", "--reward_model", str(reward), "--temperature", "1.5"]
    tiny_runs.write_jsonl(tmp_path / "two.jsonl", [{"prompt": "the cat"}, {"prompt": "a dog"}])
    scorer, engine = RewardScorer.load(reward), Engine.load(world / "sft")
    sampling = Sampling(max_new_tokens=6, temperature=1.5)
    chats = [[Message("user", text)] for text in ("the cat", "a dog")]
    expected = [reply.text for reply in best_of(scorer, engine, chats, sampling, 4)]
    assert main(["generate", *options, *judge, "--prompt", "the cat"]) == 0
    assert capsys.readouterr().out == f"{expected[0]}\n"
    assert main(["generate", *options, *judge, "--file", str(tmp_path / "two.jsonl")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["completion"] for line in lines] == expected
    for wrong, message in (
        (judge[:2], "go together"),
        (judge[2:4], "go together"),
        (judge[:4], "at --temperature 0 are all the same"),
    ):
        assert main(["generate", *options, *wrong, "--prompt", "the cat"]) == 2
        assert message in capsys.readouterr().err


def test_evaluate_ranks_answers_and_scores_replies(
    world: Path, reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    choices = [
        {"prompt": row["prompt"], "choices": [row["rejected"], row["chosen"]], "answer": 1}
        for row in rows(world)
    ]
    tiny_runs.write_jsonl(tmp_path / "choices.jsonl", choices)
    files = ["--preferences", str(world / "dpo_val.jsonl"), "--json", str(tmp_path / "s.json")]
    files += ["--choices", str(tmp_path / "choices.jsonl"), "--max_length", "64"]
    judge = ["--reward_model", str(reward)]
    assert main(["evaluate", *judge, *files]) == 0
    results = json.loads((tmp_path / "s.json").read_text())["models"][str(reward)]
    pairs, ranked = results.values()
    final = json.loads((reward / "summary.json").read_text())["final"]
    assert pairs["accuracy"]["value"] == pytest.approx(final["val/rewards/accuracy"])
    assert pairs["margin"]["value"] == pytest.approx(final["val/rewards/margin"], abs=1e-4)
    assert {"accuracy by length", "accuracy by words", "margin and length"} <= pairs.keys()
    assert ranked["accuracy"]["value"] == pairs["accuracy"]["value"]
    assert ranked["rank of the right one"]["value"] == 2 - pairs["accuracy"]["value"]
    capsys.readouterr()
    prompts = ["--prompts", str(world / "prompts.jsonl"), "--max_new_tokens", "4"]
    assert main(["evaluate", *judge, "--model", str(world / "sft"), *prompts]) == 0
    assert "  reward  " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--text", "t.jsonl"], "--model is missing"),
        (["--reward_model", "r", "--text", "t.jsonl"], "--model is missing"),
        (["--reward_model", "r", "--model", "m", "--text", "t"], "has nothing to score"),
        (["--reward_model", "r", "--model", "r", "--prompts", "p"], "name the same model"),
        (["--reward_model", "r", "--preferences", "p", "--reference", "x"], "--reference is what"),
    ],
)
def test_options_of_evaluate_that_do_not_go_together(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *args]) == 2
    assert message in capsys.readouterr().err
