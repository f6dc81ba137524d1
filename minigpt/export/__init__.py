"""Models for other engines: transformers, peft, llama.cpp, Ollama; each export is checked."""
