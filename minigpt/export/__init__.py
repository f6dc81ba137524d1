"""Models for other engines: transformers directories, peft adapters and GGUF files, each checked."""
