"""Reinforcement learning from a model's answers to prompts, scored by rewards."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from minigpt.data.batch import AttentionPlan, PackedBatch
from minigpt.data.datamodule import JSONLDataModule
from minigpt.data.formats import BatchKind
from minigpt.data.rollouts import (
    EncodedPrompt,
    GRPODataModule,
    PromptBatch,
    RolloutBatch,
    targets_of,
)
from minigpt.errors import ConfigError
from minigpt.evaluate.reward_model import RewardScorer
from minigpt.model.architecture import disable_dropout
from minigpt.model.packed_lm import PackedLM
from minigpt.model.parallel import gathered, is_sharded
from minigpt.model.policy_losses import (
    Advantage,
    Normalisation,
    PolicyLossKind,
    group_advantages,
    kl_k3,
    normalised,
    policy_loss,
)
from minigpt.stages.base import LossSums
from minigpt.stages.collapse import Collapse, CollapseWatch
from minigpt.stages.reference import ReferenceModule
from minigpt.stages.rewards import Reward, Rewards
from minigpt.stages.rollouts import (
    Answers,
    RolloutSampler,
    means_by_name,
    pack_answers,
    rollout_means,
)
from minigpt.stages.step import Sums, to_floats

SAMPLES_LOGGED = 4  # prompts whose answers are logged as text
LoggedAnswer = tuple[str, str, float]  # question, answer, reward


class GRPOModule(ReferenceModule):
    """Make answers likelier that rewards prefer to other answers to the same prompt.

    Before an optimizer step, the model in training answers the step's prompts several times.
    Rewards score the answers, and each is compared with the others to its prompt. Then the step
    learns from them as from any packed batch; a prompt is computed once for all of its answers.
    There is no dropout, in an adapter neither: answers are sampled without it, and the ratio of a
    probability to the sampled one is 1 until the weights move.

    Args:
        rewards: what is summed to an answer's reward. See docs/grpo.md.
        beta: weight of the KL to the model as the run started; 0 keeps no copy of it.
        temperature: at which answers are sampled; log-probs are those of that distribution.
        advantage: how an answer is compared with its group: mean_std (GRPO), mean (Dr. GRPO) or
            leave_one_out (RLOO).
        loss: token (PPO), sequence (GSPO) or cispo.
        clip_low: how far below 1 the ratio of a target's probability to the sampled one counts.
        clip_high: how far above 1 it does.
        normalisation: the loss is a mean over sequences, over all tokens of the step, or over
            sequences with sums over tokens divided by `max_completion_length` (constant).
        mask_cut_off: leave out answers that were cut off at the longest length.
        redraws: how often a group whose answers all have the same reward is sampled again, by other
            random numbers.
        success: the reward from which an answer counts as right in validation.
        collapse: what to do when answers repeat themselves, or do not end.
        kwargs: see `BaseModule`. `compile_layers` is off by default: micro-batches are of any size
            that answers have, and layers would be compiled for the largest.
    """

    learns_from: ClassVar[tuple[BatchKind, ...]] = ("prompt",)

    def __init__(
        self,
        rewards: list[Reward],
        beta: float = 0.0,
        temperature: float = 1.0,
        advantage: Advantage = "mean_std",
        loss: PolicyLossKind = "token",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        normalisation: Normalisation = "token",
        mask_cut_off: bool = False,
        redraws: int = 0,
        success: float = 1.0,
        collapse: Collapse = Collapse(),  # noqa: B008  (frozen)
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 < temperature < float("inf"):
            raise ConfigError(f"model.temperature must be above 0, but is {temperature}.")
        if not 0 <= beta < float("inf"):
            raise ConfigError(f"model.beta must be at least 0, but is {beta}.")
        if redraws < 0:
            raise ConfigError(f"model.redraws must be at least 0, but is {redraws}.")
        if not 0 < clip_low <= 1 or not 0 < clip_high < float("inf"):
            raise ConfigError(
                "model.clip_low lies in 0 to 1 and model.clip_high is above 0, but they are "
                f"{clip_low} and {clip_high}."
            )
        filters = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
        for name, off in filters.items():
            if getattr(self.sampling, name) != off:
                raise ConfigError(
                    f"model.sampling.{name}: the answers of training and validation are drawn from "
                    "the model's whole distribution, whose log-probs are trained: leave it out."
                )
        if self.loss_watch.spike.action != "off":
            raise ConfigError(
                "model.spike compares with the mean loss, but a policy's is around 0: leave it out."
            )
        self.compiled = bool(self.compiled)
        self.reward_options = rewards
        self.beta = beta
        self.temperature = temperature
        self.advantage: Advantage = advantage
        self.loss: PolicyLossKind = loss
        self.clip = (clip_low, clip_high)
        self.normalisation: Normalisation = normalisation
        self.mask_cut_off = mask_cut_off
        self.redraws = redraws
        self.success = success
        self.collapse_watch = CollapseWatch(collapse)
        self.rollout: list[RolloutBatch] = []  # what is learnt from now
        self.rollout_metrics: dict[str, float] = {}
        self.train_samples: list[LoggedAnswer] = []  # of the last rollout
        self.val_samples: list[LoggedAnswer] = []
        self.update_started = 0.0

    @property
    def needs_reference(self) -> bool:
        """Whether the loss has a KL to the reference."""
        return self.beta > 0

    @property
    def data(self) -> GRPODataModule:
        """The DataModule in use."""
        data = super().data
        assert isinstance(data, GRPODataModule)
        return data

    def check_data(self, data: JSONLDataModule) -> None:
        """Refuse another kind of data, and groups in which nothing can be compared."""
        super().check_data(data)
        if isinstance(data, GRPODataModule) and data.num_generations < 2:
            raise ConfigError(
                "data.num_generations must be at least 2: an answer is compared with the others "
                "to its prompt."
            )

    def prepare_data(self) -> None:
        """Check, before anything is written, that each prompt has what the rewards need."""
        if self.trainer.state.fn not in ("fit", "validate"):
            return
        for prompt in self.data.all_prompts():
            self.rewards.check_fields(prompt.fields, *prompt.record.source)

    @cached_property
    def rewards(self) -> Rewards:
        """What scores answers."""
        return Rewards(self.reward_options, self._load_reward_model)

    def _load_reward_model(self, path: str) -> RewardScorer:
        """Load a reward model that reads the longest prompt with its answer.

        Raises:
            ConfigError: when it reads less.
        """
        scorer = RewardScorer.load(path, self.trainer.strategy.root_device, self.tokenizer)
        longest, limit = self.data.limits.max_length, scorer.context
        if longest > limit:
            raise ConfigError(
                f"data.init_args.max_length is {longest}, but the reward model at {path} reads at "
                f"most {limit} tokens. Set it to {limit}, or take one that reads longer texts."
            )
        return scorer

    def configure_model(self) -> None:
        """Build the model, without dropout.

        Raises:
            ConfigError: for a strategy that shards the model, which answers while it trains.
        """
        if is_sharded(self.trainer.strategy):
            raise ConfigError(
                "trainer.strategy: GRPOModule samples answers by the weights in training, which "
                "each process needs whole: use ddp."
            )
        super().configure_model()
        disable_dropout(self.model)

    # From prompts to packed batches

    def training_step(self, batch: PackedBatch | PromptBatch, batch_idx: int) -> Tensor:
        """Answer the prompts, unless that was done before, and learn from the answers."""
        assert isinstance(batch, PromptBatch)
        if batch.rollout:
            self.rollout = self.roll_out(batch.rollout)
        if batch.number % self.trainer.accumulate_grad_batches == 0:
            self.update_started = time.monotonic()
        packed = self.rollout[batch.number % len(self.rollout)].to(self.device)
        return super().training_step(replace(packed, resume_at=batch.resume_at), batch_idx)

    @torch.no_grad()
    def roll_out(self, batches: Sequence[Sequence[EncodedPrompt]]) -> list[RolloutBatch]:
        """Answer the prompts of micro-batches, score the answers, and pack them."""
        started = time.monotonic()
        prompts = [prompt for batch in batches for prompt in batch]
        stream = self.trainer.global_step + 1  # 0 is validation's
        answers = self.sampler().sample(prompts, self.data.num_generations, stream, self.redraws)
        self._measure(answers, time.monotonic() - started)
        self.train_samples = first_answers(answers)
        packed = self._pack(answers, [len(batch) for batch in batches])
        torch.clear_autocast_cache()  # else weights that were cast here would get no gradients
        return packed

    def sampler(self) -> RolloutSampler:
        """Return what samples answers with the weights as they stand."""
        return RolloutSampler(
            self.engine(),
            self.rewards,
            self.temperature,
            self.data.max_completion_length,
            self.data.seed,
            (self.trainer.global_step, self.total_steps()),
        )

    def _pack(self, answers: Answers, sizes: Sequence[int]) -> list[RolloutBatch]:
        """Pack the answers to the prompts of each micro-batch, with its part of the replay.

        Args:
            answers: to the prompts of all micro-batches.
            sizes: how many prompts each micro-batch has.
        """
        data, accumulate = self.data, self.trainer.accumulate_grad_batches
        advantages = group_advantages(answers.rewards, self.advantage)
        included = ~answers.rewards.isnan()
        if self.mask_cut_off:
            included &= answers.ended
        starts = [0, *np.cumsum(sizes).tolist()]
        packed = []
        for number in range(len(sizes)):
            minibatch, position = divmod(number, accumulate)
            if position == 0:  # the first micro-batch of an optimizer step
                of_step = slice(starts[number], starts[number + accumulate])
                targets, terms = self._counts(answers.lengths[of_step], included[of_step])
                replay = data.replay_samples(self.trainer.global_step + minibatch, targets)
                replayed = sum(map(targets_of, replay))
            batch = pack_answers(
                answers,
                slice(starts[number], starts[number + 1]),
                advantages,
                included,
                replay[data.rank + position * data.world_size :: accumulate * data.world_size],
            )
            # The step's sum is divided by its terms; the replay's is to be a mean of its own.
            batch.replay_weight = max(1, terms) / max(1, replayed)
            if data.minibatches * data.passes > 1:  # the weights will move before the last update
                batch.old_logprobs = self._logprobs(self.model, batch.to(self.device)).cpu()
            packed.append(batch)
        return packed

    def _counts(self, lengths: Tensor, included: Tensor) -> tuple[int, int]:
        """Return a step's targets, and what its loss is divided by, over all processes.

        Args:
            lengths, included: [P, G] of this process's answers.
        """
        targets = int((lengths * included).sum())
        terms = targets if self.normalisation == "token" else int(included.sum())
        counts = np.array(gathered([(targets, terms)])).sum(0)
        return int(counts[0]), int(counts[1])

    def _logprobs(self, lm: PackedLM, batch: RolloutBatch) -> Tensor:
        """Return the targets' log-probs [N], of answers at the temperature of sampling, in nats."""
        temperature = None
        if self.temperature != 1:
            is_replay = batch.is_replay[batch.answers]
            temperature = torch.where(is_replay, 1.0, self.temperature)
        logprobs: Tensor = lm(batch, per_target=True, temperature=temperature)
        return logprobs

    def _measure(self, answers: Answers, seconds: float) -> None:
        """Note what is logged of a rollout, over all processes, and watch for collapse."""
        sums = answers.sums(self.rewards.names)
        total = Sums()
        total.add({**sums, "seconds": seconds / self.trainer.world_size}, self.device)
        self.rollout_metrics = rollout_means(to_floats(total.all_reduced()))
        logged = means_by_name(gathered([answers.metrics]))
        self.rollout_metrics |= {f"reward/metrics/{name}": value for name, value in logged.items()}
        repeated = self.rollout_metrics["rollout/repeated"]
        self.collapse_watch.observe(repeated, self.rollout_metrics["rollout/cut_off"])

    # The loss

    def compute_loss(self, batch: PackedBatch) -> LossSums:
        """Return the loss of the policy, with beta times the KL, and of the replay, as sums."""
        assert isinstance(batch, RolloutBatch)
        logps = self._logprobs(self.model, batch)
        is_replay = batch.is_replay[batch.answers]
        old = logps.detach() if batch.old_logprobs is None else batch.old_logprobs
        terms = policy_loss(logps, old, batch.advantages, batch.answers, self.loss, *self.clip)
        losses = terms.losses
        if self.needs_reference:
            kl = kl_k3(logps, self.by_reference(lambda lm: self._logprobs(lm, batch)))
            losses = losses + self.beta * kl
        longest = self.data.max_completion_length
        policy, count = normalised(
            losses, batch.answers, batch.included, self.normalisation, longest
        )
        replay = -torch.where(is_replay, logps, 0.0).sum()
        counted = batch.included[batch.answers]
        gaps = (old - batch.sampled_logprobs).abs()
        metrics: dict[str, Tensor | float] = {
            "targets": counted.sum(),
            "clip/low": (terms.clipped_low & counted).sum(),
            "clip/high": (terms.clipped_high & counted).sum(),
            "entropy": -torch.where(counted, logps, 0.0).sum(),
            "logprob_gap": torch.where(counted, gaps, 0.0).sum(),
            "kl": torch.where(counted, kl.detach(), 0.0).sum() if self.needs_reference else 0.0,
            "replay/loss": replay,
            "replay/targets": is_replay.sum(),
        }
        return LossSums(policy + batch.replay_weight * replay, int(count), metrics)

    def metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """Turn sums into what is logged: means over the targets of answers, and of the replay."""
        targets, replayed = totals["targets"], totals["replay/targets"]
        values = {"loss": totals["loss"] / max(1.0, totals["count"])}
        names = ["clip/low", "clip/high", "entropy"]
        if self.needs_reference:
            names.append("kl")
        values |= {name: totals[name] / max(1.0, targets) for name in names}
        if replayed:
            values["replay/loss"] = totals["replay/loss"] / replayed
            values["replay/share"] = replayed / (replayed + targets)
        return values

    def log_step(self, totals: dict[str, float]) -> None:
        """Add what was measured of the rollout and of the update, and some answers."""
        super().log_step(totals)
        if (self.trainer.global_step + 1) % self.log_every:
            return
        update = {
            "rollout/logprob_gap": totals["logprob_gap"] / max(1.0, totals["targets"]),
            "update/seconds": time.monotonic() - self.update_started,
        }
        self.log_dict(self.rollout_metrics | update, rank_zero_only=True)
        self._log_text("rollouts/training", self.train_samples)

    # Validation: the same rewards on held-out prompts

    def on_validation_epoch_start(self) -> None:
        """Start the held-out sums and samples anew."""
        super().on_validation_epoch_start()
        self.val_samples = []

    def validation_step(self, batch: PackedBatch | PromptBatch, batch_idx: int) -> None:
        """Answer held-out prompts, greedily and by sampling, and score the answers."""
        assert isinstance(batch, PromptBatch)
        size, sampler = self.data.num_generations, self.sampler()
        greedy = sampler.greedy(batch.prompts)
        rewards = greedy.rewards[:, 0]
        sampled = sampler.sample(batch.prompts, size, 0).rewards
        right, scored = sampled >= self.success, (~sampled.isnan()).sum(1)  # NaN is not right
        sums: dict[str, Tensor | float] = {
            "prompts": float(len(batch.prompts)),
            "scored": (~rewards.isnan()).sum(),
            "groups": (scored > 0).sum(),  # of which an answer could be scored
            "reward": rewards.nan_to_num(0.0).sum(),
            "accuracy": (rewards >= self.success).sum(),
            "pass_at_1": (right.sum(1) / scored.clamp(min=1)).sum(),
            f"pass_at_{size}": right.any(1).sum(),
            "cut_off": (~greedy.ended).sum(),
        }
        self.validation_sums.add(sums, self.device)
        self.val_samples += first_answers(greedy)

    def on_validation_epoch_end(self) -> None:
        """Log the held-out means over all processes, and some answers with their rewards.

        Means of rewards are over what could be scored; without any there is none.
        """
        if not self.validation_sums.values:
            return
        totals = to_floats(self.validation_sums.all_reduced())
        prompts, scored, groups = (totals.pop(name) for name in ("prompts", "scored", "groups"))
        counts = dict.fromkeys(totals, groups)  # of pass@1 and pass@k
        counts |= {"reward": scored, "accuracy": scored, "cut_off": prompts}
        values = {f"val/{name}": totals[name] / count for name, count in counts.items() if count}
        values["val/not_scored"] = 1 - scored / prompts
        self.log_dict(values, rank_zero_only=True)
        self._log_text("rollouts/held_out", self.val_samples)

    def _log_text(self, name: str, samples: Sequence[LoggedAnswer]) -> None:
        text = "\n\n".join(
            f"**{question}**\n\n> {answer}\n\nreward {reward:g}"
            for question, answer, reward in samples[:SAMPLES_LOGGED]
        )
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text(name, text, self.trainer.global_step)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the collapse watch, and the rollout if further steps learn from it."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["collapse"] = self.collapse_watch.state_dict()
        checkpoint["rollout_metrics"] = self.rollout_metrics
        _, done = self.data.position
        if done % (self.data.rollout_size * self.data.passes):
            per_process = gathered([[_as_state(batch) for batch in self.rollout]])
            in_order = zip(*per_process, strict=True)  # as micro-batches are dealt to processes
            checkpoint["rollout"] = [state for states in in_order for state in states]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue with the collapse watch and the rollout."""
        super().on_load_checkpoint(checkpoint)
        self.collapse_watch.load_state_dict(checkpoint["collapse"])
        self.rollout_metrics = checkpoint["rollout_metrics"]
        states = checkpoint.get("rollout", [])[self.data.rank :: self.data.world_size]
        self.rollout = [_from_state(state) for state in states]


def first_answers(answers: Answers) -> list[LoggedAnswer]:
    """Return each prompt's question with its first answer and that answer's reward."""
    rewards = answers.rewards[:, 0].tolist()
    texts = [texts[0] for texts in answers.texts]
    return list(zip((p.question for p in answers.prompts), texts, rewards, strict=True))


def _as_state(batch: RolloutBatch) -> dict[str, Any]:
    """Return a batch as tensors and plain values, which a checkpoint can hold."""
    return {**vars(batch), "plan": vars(batch.plan)}


def _from_state(state: dict[str, Any]) -> RolloutBatch:
    return RolloutBatch(**{**state, "plan": AttentionPlan(**state["plan"])})
