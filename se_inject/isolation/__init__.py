"""Work in a process that is confined before it opens a stranger's file, and watched.

In: a function, what its process may still do, and the files it may write. Out: its exit code, its outputs moved
into place, or an error that names the step at which the process died.
Must not know: torch (it is imported afterwards, in the child), networks, or the command line.
"""

from se_inject.isolation.confinement import Confinement, code_beside, confine, default_memory, protections
from se_inject.isolation.spawn import call_isolated
from se_inject.isolation.worker import Display, Interrupted, can_fork, clean_end, run_in_worker

__all__ = [
    "Confinement",
    "Display",
    "Interrupted",
    "call_isolated",
    "can_fork",
    "clean_end",
    "code_beside",
    "confine",
    "default_memory",
    "protections",
    "run_in_worker",
]
