"""One thread, so that sums are taken in one order and the suite's time says something."""

import torch

torch.set_num_threads(1)
