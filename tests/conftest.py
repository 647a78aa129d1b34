"""One thread, so that sums are taken in one order and the suite's time says something; how many networks are drawn."""

import torch
from hypothesis import HealthCheck, Phase, settings

torch.set_num_threads(1)

settings.register_profile(
    "short",
    max_examples=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
)
settings.register_profile("long", settings.get_profile("short"), max_examples=5000, derandomize=False)
settings.load_profile("short")
