"""Damaged GGUF files, given to llama.cpp: it may end, and we do not."""

from __future__ import annotations

from pathlib import Path

import damage
import pytest
from hypothesis import strategies as st

from minigpt.export import gguf
from minigpt.export.card import Card
from minigpt.infer.engine import Engine, Sampling
from minigpt.infer.gguf import Gguf


@pytest.mark.faults
@damage.few
def test_damaged_files_end_llamacpp_at_most(world: Path, tmp_path: Path, count: int) -> None:
    file = tmp_path / "a.gguf"
    gguf.write(Engine.load(world / "sft"), file, "f16", "qwen2", Card("tiny", "tiny"))
    sound = file.read_bytes()
    size = sound.index(b"token_embd.weight")

    def read(content: bytes) -> None:
        file.write_bytes(content)
        llama = Gguf(file)
        try:
            llama.complete(["the cat"], Sampling(3))
        finally:
            llama.llama.close()

    numbers = st.builds(
        lambda at, new: sound[:at] + new + sound[at + len(new) :],
        st.integers(24, size),
        st.sampled_from([b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\x01\0\0\0", b"\xff" * 4]),
    )
    damage.assert_read_or_refused(count, st.one_of(numbers, damage.damaged_bytes(sound)), read)
