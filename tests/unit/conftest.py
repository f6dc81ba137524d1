"""What the unit tests share."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Two threads would wait for each other longer than tiny models compute."""
    import torch

    torch.set_num_threads(1)
