"""Multiple choice and minimal pairs: which of several texts a model finds likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice, takewhile

from minigpt.errors import ConfigError
from minigpt.evaluate.exam import Item
from minigpt.evaluate.likelihood import Continuation, continuation, score
from minigpt.evaluate.scores import Score, share
from minigpt.infer.engine import Engine


def _alternatives(engine: Engine, item: Item) -> list[Continuation]:
    """Return each choice as a continuation of its context, in ids."""
    if isinstance(item.prompt, str) and item.prompt:
        return [continuation(engine, item.prompt, choice) for choice in item.choices]
    if item.prompt:
        if engine.codec is None:
            raise ConfigError("This model has no chat template: give 'prompt', not 'messages'.")
        start, choices = engine.codec.encode_answers(item.prompt, item.choices)
        return [(start, ids) for ids in choices]
    texts = [engine.encode(choice) for choice in item.choices]
    common = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*texts, strict=False)))
    common = min(common, min(map(len, texts)) - 1)  # so that no continuation is empty
    # The common beginning decides nothing, so it is the context; without one, an end of text is.
    return [(ids[:common] or engine.encode(""), ids[common:]) for ids in texts]


def choose(engine: Engine, items: Sequence[Item], source: str) -> dict[str, Score]:
    """Let a model choose by likelihood.

    Args:
        engine: the model.
        items: questions with choices, or minimal pairs.
        source: the file they come from, for errors.

    Returns:
        ``accuracy``, by the log-likelihood per byte of the choice; ``accuracy (sum)``, by the
        sum; for minimal pairs ``accuracy`` alone, by the sum. Then each family's.
    """
    alternatives = chain.from_iterable(_alternatives(engine, item) for item in items)
    logps = (logp for logp, _ in score(engine, list(alternatives), source))
    scored = [(item, list(islice(logps, len(item.choices)))) for item in items]
    with_prompts = any(item.prompt for item in items)
    scores = {"accuracy": _accuracy(scored, per_byte=with_prompts)}
    if with_prompts:
        scores["accuracy (sum)"] = _accuracy(scored, per_byte=False)
    families = list(dict.fromkeys(item.family for item in items))
    for family in families if len(families) > 1 else []:
        members = [entry for entry in scored if entry[0].family == family]
        scores[family] = _accuracy(members, with_prompts)
    return scores


def _accuracy(scored: Sequence[tuple[Item, list[float]]], per_byte: bool) -> Score:
    """Return the share of items whose answer has the highest log-probability of the choices."""
    correct = []
    for item, logps in scored:
        sizes = [len(choice.encode()) if per_byte else 1 for choice in item.choices]
        means = [logp / size for logp, size in zip(logps, sizes, strict=True)]
        correct.append(item.choices[means.index(max(means))] == item.answer)
    return share(correct, sum(1 / len(item.choices) for item, _ in scored) / len(scored))
