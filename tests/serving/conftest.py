from pathlib import Path

import pytest
from serving.tiny_model import write_model
from threadpoolctl import threadpool_limits


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a small random model and a byte tokenizer."""
    return write_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(autouse=True)
def _one_blas_thread():
    with threadpool_limits(1):
        yield
