"""Models for other engines: transformers, peft, llama.cpp, Ollama; each export is checked."""

# Types of the matrices in a GGUF file.
DTYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
