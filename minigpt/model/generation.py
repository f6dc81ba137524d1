"""The generation config of saved models, which tells any engine the tokens that end a reply."""

from __future__ import annotations

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from minigpt.data.chat import end_tokens

# Set first, because whether other fields are valid depends on these.
FIRST = ("do_sample", "num_beams", "use_cache", "return_dict_in_generate")


def reply_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids that end a model's replies, in ascending order."""
    return end_tokens(tokenizer, getattr(model.generation_config, "eos_token_id", None))


def generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> GenerationConfig:
    """Return the model's own config with all tokens that end a reply.

    Published configs hold fields that contradict each other, which transformers does not
    save (a temperature without sampling): those are left out.
    """
    original: GenerationConfig | None = model.generation_config
    ends = reply_ends(model, tokenizer)
    pads = (tokenizer.pad_token_id, getattr(original, "pad_token_id", None), *ends[:1])
    pad = next((token for token in pads if token is not None and token >= 0), None)
    config = GenerationConfig(eos_token_id=ends or None, pad_token_id=pad)
    fields = {} if original is None else original.to_diff_dict()
    skipped = {"eos_token_id", "pad_token_id", "transformers_version"}
    names = [name for name in fields if name not in skipped and not name.startswith("_")]
    for name in sorted(names, key=lambda name: name not in FIRST):
        before = getattr(config, name, None)
        setattr(config, name, getattr(original, name))
        try:
            config.validate(strict=True)
        except ValueError:
            setattr(config, name, before)
    return config
