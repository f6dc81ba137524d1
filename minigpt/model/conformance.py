"""A proof, before a model is used, that its kind computes what its authors' code computes.

A tiny random model of the same config (`shrink`) reads two texts and a preference, packed. Each
target's log-probability is compared with what the model gives, by its own eager attention, to the
sample alone; and no sample's loss may change when another sample does. What is not exact packed is
tried with each sample in a row of its own. Then texts are decoded together, token by token: the
fastest mode is taken whose logits are those of each text read at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from minigpt import accel
from minigpt.data.batch import PackedBatch, Sample, collate
from minigpt.errors import ModelError
from minigpt.files import atomic_file, cache_dir, is_private, make_private
from minigpt.model import cached, packed_lm, rope, shrink
from minigpt.model.cached import MODES, PADDED, TransformersDecoder
from minigpt.model.packed_lm import (
    PACKED,
    forward_rows,
    target_logits,
    token_logprobs,
    use_attention,
)
from minigpt.model.rope import compute_by_text, shared_prompt_limit

log = logging.getLogger(__name__)

TOLERANCE = 5e-4  # of log-probabilities in fp32, relative to the largest of them
# Fields of a config on which exactness does not depend: a proof holds whatever they are.
IGNORED = {"architectures", "dtype", "torch_dtype", "transformers_version", "vocab_size"}
IGNORED |= {"use_cache", "id2label", "label2id"}
# A rounding error may make a model pick other experts, and so fail with one seed: hardly with both.
SEEDS = (0, 1)
# Two texts and a preference: tokens of the prompt and of each answer. The long ones are longer than
# the windows of tiny models.
LENGTHS = ((0, 23), (0, 14), (5, 9, 16))
STEPS = 4  # tokens that are decoded


@dataclass(frozen=True)
class Conformance:
    """Ways to compute a kind of model whose results are those of its authors' code.

    Attributes:
        training: attention function for batches: `PACKED`, or "sdpa" or "eager" with each sample
            in a row of its own; empty where none is exact.
        decoding: attention function for one sequence: "sdpa" or "eager"; empty where its own
            forward does not work.
        decoding_mode: for many texts, one of `cached.MODES`; empty where none is exact.
        problem: why samples are not packed, or the model is not computed at all.
    """

    training: str
    decoding: str
    decoding_mode: str = ""
    problem: str = ""

    @property
    def packed(self) -> bool:
        """Whether a batch is read all at once."""
        return self.training == PACKED


def require_conformance(model: PreTrainedModel, training: bool) -> Conformance:
    """Return how a model is to be computed, by the proof of its kind.

    Args:
        model: on any device; where no tiny model of its config can be built, it is tried itself.
        training: whether batches are to be read, or else only texts continued.

    Raises:
        ModelError: when it cannot be computed exactly, with what was found.
    """
    conformance = conformance_of(model.config)
    if conformance is None:
        conformance = _PROVEN[_digest(model.config)] = prove(model)
    _check(model.config, conformance, training)
    return conformance


def check_kind(config: PreTrainedConfig, training: bool) -> None:
    """Refuse, before any weights are read, a config whose kind cannot be computed exactly.

    Where no tiny model of it can be built, `require_conformance` tries the model itself.

    Raises:
        ModelError: with what was found.
    """
    conformance = conformance_of(config)
    if conformance is not None:
        _check(config, conformance, training)


def _check(config: PreTrainedConfig, conformance: Conformance, training: bool) -> None:
    if not (conformance.training if training else conformance.decoding_mode):
        problem = conformance.problem or "no mode of decoding gives what its own forward does"
        raise ModelError(_refusal(config, problem))


def _refusal(config: PreTrainedConfig, problem: str) -> str:
    name = f"The model at {config._name_or_path}" if config._name_or_path else "The model"
    return (
        f"{name} is refused, for results of its kind ({config.model_type}) would be wrong: "
        f"{problem}. Take a model of another family; docs/models.md lists which are exact."
    )


def conformance_of(config: PreTrainedConfig) -> Conformance | None:
    """Return how models of a config are to be computed; proven once, then read from the cache.

    Returns:
        None where no tiny model of the config can be built, so that `prove` must try the model.
    """
    digest = _digest(config)
    if digest in _PROVEN:
        return _PROVEN[digest]
    conformance = _load_proof(digest)
    if conformance is None:
        conformance = _by_tiny_models(config)
        if conformance is not None:
            _save_proof(digest, conformance)
    _PROVEN[digest] = conformance
    return conformance


_PROVEN: dict[str, Conformance | None] = {}


def _proof_file(digest: str) -> Path:
    return cache_dir() / "conformance" / f"{digest}.json"


def _load_proof(digest: str) -> Conformance | None:
    file = _proof_file(digest)
    if not is_private(file):  # not there, or another user may have written it
        return None
    try:
        return Conformance(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):  # damaged: it is proven anew
        return None


def _save_proof(digest: str, conformance: Conformance) -> None:
    try:
        with atomic_file(_proof_file(digest)) as partial:
            partial.write_text(json.dumps(asdict(conformance)), encoding="utf-8")
            make_private(partial)
    except OSError as error:  # without the file, each process proves it in about a second
        log.debug("The proof is not saved: %s", error)


@cache
def _code_digest() -> str:
    """Return a digest of the code that a proof depends on, ours and that of libraries."""
    modules = (cached, packed_lm, rope, shrink)
    files = [Path(__file__), *(Path(str(module.__file__)) for module in modules)]
    if accel.ENABLED:
        files += sorted(Path(accel.__file__).parent.glob("*.py"))
    sources = [file.read_text(encoding="utf-8") for file in files]
    versions = [transformers.__version__, torch.__version__]
    return hashlib.sha256("\0".join([*versions, *sources]).encode()).hexdigest()


def _digest(config: PreTrainedConfig) -> str:
    values = {k: v for k, v in config.to_dict().items() if k not in IGNORED and k[0] != "_"}
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(f"{_code_digest()}\0{text}".encode()).hexdigest()[:24]


def _by_tiny_models(config: PreTrainedConfig) -> Conformance | None:
    """Prove a config by tiny models of two seeds, of which the better result counts."""
    best: Conformance | None = None
    for seed in SEEDS:
        new = _by_tiny_model(config, seed)
        if new is None:
            break
        if best is None or _rank(new) > _rank(best):
            best = new
        if best.packed and best.decoding_mode == PADDED:
            break
    return best


def _rank(conformance: Conformance) -> tuple[bool, bool, int]:
    slowness = (*MODES, "").index(conformance.decoding_mode)
    return conformance.packed, bool(conformance.training), -slowness


def _by_tiny_model(config: PreTrainedConfig, seed: int) -> Conformance | None:
    with shrink.quiet():
        try:
            for model in shrink.tiny_models(config, seed):
                compute_by_text(model)  # as in models that are loaded
                with suppress(ModelError):  # a smaller size may be one that its code cannot take
                    return prove(model)
        except Exception as error:
            log.debug("No tiny model of %s: %s", config.model_type, describe(error))
    return None


def describe(error: BaseException) -> str:
    """Return an exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0].rstrip(".") if lines else ""
    return f"{type(error).__name__}: {first}"[:300] if first else type(error).__name__


def prove(model: PreTrainedModel) -> Conformance:
    """Find out in which ways a model is exact, in fp32 on the device where it is.

    Raises:
        ModelError: when its own forward fails on plain text, or gives numbers that are not finite.
    """
    samples = _samples(model)
    with _fp32_eval(model):
        try:
            expected = _reference_logprobs(model, samples)
        except Exception as error:
            problem = f"its own forward does not read plain text: {describe(error)}"
            raise ModelError(_refusal(model.config, problem)) from error
        if not expected.isfinite().all():
            problem = "its own forward gives numbers that are not finite"
            raise ModelError(_refusal(model.config, problem))
        if not _is_causal(model, samples):
            problem = "a token's logits depend on the tokens after it, as it is built"
            return Conformance("", "", problem=problem)
        packed_problem = _problem(model, samples, expected, PACKED)
        sdpa_is_exact = model._supports_sdpa and not _problem(model, samples, expected, "sdpa")
        decoding = "sdpa" if sdpa_is_exact else "eager"
        mode = _decoding_mode(model, samples, decoding)
        if not packed_problem:
            return Conformance(PACKED, decoding, mode)
        rows_problem = _problem(model, samples, expected, decoding)
        if rows_problem:
            return Conformance("", decoding, mode, rows_problem)
        return Conformance(decoding, decoding, mode, packed_problem)


@contextmanager
def _fp32_eval(model: PreTrainedModel) -> Iterator[None]:
    training, before = model.training, model.config._attn_implementation
    device, dtype = next(model.parameters()).device, torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    model.eval()
    try:
        with torch.no_grad(), torch.device(device), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(dtype)
        model.train(training)
        model.config._attn_implementation = before


def _samples(model: PreTrainedModel) -> list[Sample]:
    """Return samples of ids that are neither special nor beyond the vocabulary."""
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    head = cast(nn.Linear | None, model.get_output_embeddings()) or embedding
    rows = min(len(embedding.weight), len(head.weight))
    rng = np.random.default_rng(0)
    first_id = min(shrink.SPECIAL, rows // 2)
    samples = []
    for prompt, *answers in LENGTHS:  # as short as `check_length` demands of preferences
        limit = max(1, shared_prompt_limit(model.config) - prompt) if prompt else max(answers)
        lengths = tuple(min(length, limit) for length in answers)
        ids = rng.integers(first_id, rows, prompt + sum(lengths))
        samples.append(Sample(ids, prompt, lengths, None, ("", 0)))
    return samples


def _logprobs(model: PreTrainedModel, batch: PackedBatch, name: str) -> Tensor:
    """Return the targets' log-probabilities [N]."""
    with use_attention(model, name):
        return token_logprobs(target_logits(model, batch, packed=name == PACKED), batch.labels)


def _reference_logprobs(model: PreTrainedModel, samples: list[Sample]) -> Tensor:
    """Return what the model itself gives each text, and each answer after its prompt, [N]."""
    logprobs = []
    device = next(model.parameters()).device
    with use_attention(model, "eager"):
        for sample in samples:
            prompt = sample.ids[: sample.prompt]
            for answer in np.split(sample.ids[sample.prompt :], np.cumsum(sample.answers)):
                if len(answer):
                    ids = torch.tensor(np.concatenate([prompt, answer]), device=device)
                    # The last one is a target only.
                    logp = token_logprobs(forward_rows(model, ids[None, :-1])[0], ids[1:])
                    logprobs.append(logp[max(len(prompt) - 1, 0) :])
    return torch.cat(logprobs)


def _is_causal(model: PreTrainedModel, samples: list[Sample]) -> bool:
    ids = torch.tensor(samples[0].ids, device=next(model.parameters()).device)[None]
    other = ids.clone()
    other[:, -4:] = ids[:, :4]
    with use_attention(model, "eager"):
        before, after = (forward_rows(model, x)[0, :-4] for x in (ids, other))
    return close(after.float(), before.float())


def _problem(model: PreTrainedModel, samples: list[Sample], expected: Tensor, name: str) -> str:
    """Return what is wrong when samples are read with an attention function; empty if nothing."""
    changed = replace(samples[0], ids=samples[0].ids[::-1].copy())
    device = next(model.parameters()).device
    try:
        before, after = (
            _logprobs(model, collate(batch).to(device), name)
            for batch in (samples, [changed, *samples[1:]])
        )
    except Exception as error:
        return describe(error)
    changed_targets = LENGTHS[0][1] - 1  # all tokens of the first text but its first
    if not close(after[changed_targets:], before[changed_targets:]):
        return "a sample's loss moves when another one, packed with it, changes"
    if not close(before, expected):
        worst = float((before - expected).abs().max())
        return f"log-probabilities differ by up to {worst:.2g} from those of its own forward"
    return ""


def _decoding_mode(model: PreTrainedModel, samples: list[Sample], name: str) -> str:
    """Return the fastest mode of decoding that gives what each text gives alone; empty if none."""
    # The angles of longer texts may change while they grow. Two texts are of one length.
    limit = min(LENGTHS[0][1], shared_prompt_limit(model.config))
    texts = [sample.ids[:limit].tolist() for sample in samples]
    device = next(model.parameters()).device
    with use_attention(model, "eager"):
        expected = [forward_rows(model, torch.tensor([t], device=device))[0].float() for t in texts]
    for mode in cached.decoding_modes(model):
        with use_attention(model, name):
            if _decodes(TransformersDecoder(model, mode), texts, expected):
                return mode
    return ""


def _decodes(decoder: TransformersDecoder, texts: list[list[int]], expected: list[Tensor]) -> bool:
    """Whether texts decoded together get the logits of each alone, [L, V]; one leaves halfway."""
    texts, expected = list(texts), list(expected)
    try:
        logits = decoder.admit([text[:-STEPS] for text in texts])
        for remaining in range(STEPS, 0, -1):
            if not close(logits.float(), torch.stack([rows[-remaining - 1] for rows in expected])):
                return False
            if remaining == STEPS // 2:
                decoder.drop(0)
                texts[0], expected[0] = texts.pop(), expected.pop()
            logits = decoder.step([text[-remaining] for text in texts])
    except Exception as error:
        log.debug("Decoding, %s: %s", decoder.mode, describe(error))
        return False
    return close(logits.float(), torch.stack([rows[-1] for rows in expected]))


def close(result: Tensor, expected: Tensor) -> bool:
    """Whether numbers are equal up to the tolerance of fp32."""
    bound = TOLERANCE * max(1.0, float(expected.abs().max()))
    return result.shape == expected.shape and bool((result - expected).abs().max() <= bound)
