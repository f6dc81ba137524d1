"""An OpenAI-compatible server and a web chat over the inference engine."""
