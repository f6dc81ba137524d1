"""A process for llama.cpp alone, which damaged files may crash, or make take memory and time.

It reads its options as a line of JSON, prints the address that the server listens on, and exits
when its standard input closes, so also when the process that started it is gone.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def serve(options: dict[str, Any]) -> object:
    """Load a GGUF file; return the server, which answers in threads of its own.

    Args:
        options: `file`, `context` in tokens, `exact` (see `infer.gguf.LlamaCpp`), `threads`, and
            the `key` that requests must bring.

    Raises:
        RuntimeError: when llama.cpp refuses the file.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options["file"]
    params.n_ctx = options["context"]
    params.n_parallel = 1
    params.warmup = False
    params.verbosity = 0  # nothing on the terminal
    if options["exact"]:
        params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        disabled = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = disabled
    params.cpuparams.n_threads = options["threads"]
    params.cpuparams_batch.n_threads = options["threads"]
    params.api_keys = [options["key"]]
    return xllamacpp.Server(params)


def main() -> None:
    """Serve until standard input ends."""
    options = json.loads(sys.stdin.readline())
    try:
        server: Any = serve(options)
    except RuntimeError:
        os._exit(2)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)  # a server that has never been asked does not end by itself


if __name__ == "__main__":
    main()
