"""What `minigpt test` and `minigpt predict` do with a stage: exams, held-out loss, completions."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property

from lightning.pytorch import LightningModule
from transformers import PreTrainedTokenizerFast

from minigpt.data.batch import PackedBatch
from minigpt.data.formats import Prompt
from minigpt.evaluate.exam import Item, ItemResult, accuracies, load_items, run_eval
from minigpt.infer.engine import Engine, Sampling
from minigpt.model.packed_lm import PackedLM
from minigpt.model.parallel import gathered

Completion = tuple[int, dict[str, object], str]  # number of the prompt, its row, the text


class EvaluationHooks(LightningModule):
    """Hooks of `test` and `predict`, which generate with the model as it stands.

    Attributes:
        exam_results: after `test` on an exam, each item with the reply and whether it is correct.
        sampling: temperature, top-p and lengths.
    """

    sampling: Sampling

    @property
    @abstractmethod
    def model(self) -> PackedLM:
        """The model."""

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that travels with the model."""

    @cached_property
    def _engine(self) -> Engine:
        return Engine(self.model.hf, self.tokenizer)

    def engine(self) -> Engine:
        """Return an inference engine over the model as it stands."""
        if self.trainer.state.fn == "fit":  # the weights move, so its copy of them is not cached
            return Engine(self.model.hf, self.tokenizer)
        return self._engine

    def load_exam(self, path: str) -> list[Item]:
        """Return the items of an exam file, for the DataModule to deal out."""
        return load_items(path, "exam")

    def on_test_epoch_start(self) -> None:
        """Start the exam's sums anew."""
        self.on_validation_epoch_start()
        self.exam_results: list[ItemResult] = []

    def test_step(
        self, batch: PackedBatch | list[Item], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Judge the replies to exam items, or add a held-out batch where there is no exam."""
        if isinstance(batch, PackedBatch):
            self.validation_step(batch, batch_idx)
        else:
            self.exam_results += run_eval(self.engine(), batch, self.sampling)

    def on_test_epoch_end(self) -> None:
        """Log each family's share of right replies, and the held-out means if there are any."""
        self.on_validation_epoch_end()
        self.exam_results = gathered(self.exam_results)
        shares = accuracies(self.exam_results)
        values = {f"exam/{family}": share for family, share in shares.items()}
        self.log_dict(values, rank_zero_only=True)

    def predict_step(self, batch: list[Prompt], batch_idx: int) -> list[Completion]:
        """Complete prompts."""
        replies = self.engine().complete([p.content for p in batch], self.sampling)
        return [(p.number, p.row, reply.text) for p, reply in zip(batch, replies, strict=True)]
