"""Every test starts from the same random state, on one thread, in a folder of its own when it asks for one."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    # pytest-xdist runs one process for each core: more threads than that would only fight.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_seed():
    torch.manual_seed(0)
