"""Keep injected blocks in the trainers of other libraries; one module a library, which imports it when it is used.

In: a plan. Out: what the library takes: a trainer class.
Must not know: the command line, or any library but its own.
"""

from se_inject.integrations import ultralytics as ultralytics

__all__ = ["ultralytics"]
