"""What the training libraries of others need to keep injected blocks; one module each, which imports its library late.

In: a plan. Out: what the library takes: a trainer class.
Must not know: the command line, or any library but its own.
"""

from se_inject.integrations import ultralytics as ultralytics

__all__ = ["ultralytics"]
