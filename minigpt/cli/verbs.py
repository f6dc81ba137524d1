"""All verbs, with what each does."""

TRAINER_VERBS = {
    "fit": "train a stage from a config",
    "validate": "measure the held-out loss of a trained stage",
    "test": "sit the stage's exam",
    "predict": "complete a JSONL of prompts or chats",
}
COMMANDS = {
    "init": "write the configs and the sample data into a folder",
    "tokenizer": "train a tokenizer",
    "data": "check, measure, look at and fetch data",
    "generate": "complete prompts",
    "chat": "talk with a model in the terminal",
    "evaluate": "measure models side by side",
    "export": "write a model for transformers, peft, llama.cpp and Ollama",
    "serve": "serve models: an OpenAI-compatible API and a web chat",
    "report": "write a page about runs",
    "schema": "print a JSON Schema of the configs, for editors",
    "completion": "print a script by which a shell completes verbs and options",
}
