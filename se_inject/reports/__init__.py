"""Write one HTML file that says where the blocks are, what they cost, whether they are right, and which could go.

In: a plan and what was found out about it (cost, checks, files, latency, gates). Out: a file that opens offline.
Must not know: how any of it was found out, or the command line.
"""

from se_inject.reports.writer import check_report, report, report_html

__all__ = [
    "check_report",
    "report",
    "report_html",
]
