"""Preference pairs: which answer a model prefers, KL to a reference, and length bias."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from minigpt.data.chat import refused_texts
from minigpt.data.formats import BadRows, read_records
from minigpt.errors import ModelError
from minigpt.evaluate.likelihood import batch_logits, batches, samples
from minigpt.evaluate.scores import Score, share
from minigpt.infer.engine import Engine
from minigpt.model.losses import sum_by
from minigpt.model.packed_lm import token_logprobs


def prefer(
    engine: Engine, path: str, max_length: int, reference: Engine | None = None, beta: float = 0.1
) -> dict[str, Score]:
    """Measure a model on preference pairs.

    Args:
        engine: the model.
        path: file of the pairs.
        max_length: tokens of a prompt with its longer answer; longer ones are cut.
        reference: the model it started from.
        beta: scale of the rewards, as in DPO.

    Returns:
        ``accuracy`` and ``margin``: of the rewards β(log π - log π_ref) with a reference, else
        of the answers' log-probabilities, in nats; ``KL per token`` of the distributions at the
        answers' tokens, in nats; mean tokens of both answers, accuracy where the better one is
        the shorter and where it is the longer, and the correlation of the margin with the
        difference in length.

    Raises:
        ModelError: when the reference has another vocabulary.
    """
    if reference and _tokens(engine) != _tokens(reference):
        raise ModelError(
            "The reference has other tokens than the model: name the model it started from."
        )
    margins: list[float] = []
    lengths: list[tuple[int, int]] = []
    divergence, tokens = 0.0, 0
    refused = refused_texts(engine.tokenizer, "preference")
    rows = read_records([path], "preference", BadRows(), special_tokens=refused)
    for batch in batches(engine, samples(engine, "preference", rows, max_length)):
        logits = batch_logits(engine, batch)
        rewards = token_logprobs(logits, batch.labels)
        if reference:
            reference_logits = batch_logits(reference, batch)
            divergence += kl_divergence(logits, reference_logits)
            rewards = beta * (rewards - token_logprobs(reference_logits, batch.labels))
        sums = sum_by(rewards, batch.answers, batch.n_answers)
        counts = torch.bincount(batch.answers, minlength=batch.n_answers)
        margins += (sums[0::2] - sums[1::2]).tolist()
        lengths += zip(counts[0::2].tolist(), counts[1::2].tolist(), strict=True)
        tokens += len(batch.labels)
    scores = {"accuracy": share([m > 0 for m in margins], 0.5)}
    scores["margin"] = Score(float(np.mean(margins)), len(margins))
    if reference:
        scores["KL per token"] = Score(divergence / tokens, tokens)
    return scores | length_bias(np.array(margins), np.array(lengths))


def kl_divergence(logits: Tensor, reference: Tensor) -> float:
    """Return the sum over tokens of KL(model, reference), in nats, from their logits [N, V]."""
    logp, reference_logp = (x.float().log_softmax(-1) for x in (logits, reference))
    kl = F.kl_div(reference_logp, logp, reduction="none", log_target=True)
    return float(kl.sum(-1).double().sum())


def _tokens(engine: Engine) -> tuple[dict[str, int], int]:
    return engine.tokenizer.get_vocab(), engine.model.config.vocab_size


def length_bias(margins: np.ndarray, lengths: np.ndarray) -> dict[str, Score]:
    """Measure what length explains of margins.

    Args:
        margins: [P] by how much each pair's better answer is ahead.
        lengths: [P, 2] tokens of the better and the worse answer.
    """
    longer = lengths[:, 0] - lengths[:, 1]
    scores = {
        "tokens of the better answer": Score(float(lengths[:, 0].mean()), len(lengths)),
        "tokens of the worse answer": Score(float(lengths[:, 1].mean()), len(lengths)),
    }
    for name, pairs in (("shorter", longer < 0), ("longer", longer > 0)):
        if pairs.any():
            scores[f"accuracy, better is {name}"] = share((margins[pairs] > 0).tolist(), 0.5)
    if longer.std() > 0 and margins.std() > 0:
        correlation = float(np.corrcoef(margins, longer)[0, 1])
        scores["margin and length"] = Score(correlation, len(margins))
    return scores
