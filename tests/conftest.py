"""Every test runs on one thread: two spinning OpenMP threads are slower here and not repeatable."""

import torch

torch.set_num_threads(1)

collect_ignore = ["contract"]  # those need their hosts: `make test-contract`
