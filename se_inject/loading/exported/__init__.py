"""Read exported programs (``.pt2``) and make ordinary modules of them.

In: a checked zip archive. Out: a network whose forwards are program lines. Must not know: other formats, zoos.
"""
