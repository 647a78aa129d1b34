"""Give up access to files, TCP ports and other processes for good, by Linux's Landlock: three system calls.

A ruleset names the kinds of access that are refused from now on, and rules allow them again beneath single
paths. What a kernel knows is its ABI version (1: files, Linux 5.13; 2: moving between folders; 3: truncating;
4: TCP; 5: device commands; 6: signals and abstract sockets); kinds of access it doesn't know are left out.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import sys
from collections.abc import Iterable

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
"""The same on every architecture."""
_VERSION_FLAG = 1
_PATH_BENEATH = 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE_CHAR, _MAKE_BLOCK = 1 << 6, 1 << 11
_REFER, _TRUNCATE, _IOCTL_DEVICE = 1 << 13, 1 << 14, 1 << 15
_FILES_OF_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
_ALL_FILES = (1 << 16) - 1
_OF_FILES_ALONE = EXECUTE | WRITE_FILE | READ_FILE | _TRUNCATE | _IOCTL_DEVICE
_TCP = 0b11
_SCOPES = 0b11

READ = READ_FILE | READ_DIR
WRITE = _ALL_FILES & ~(EXECUTE | _MAKE_CHAR | _MAKE_BLOCK | _IOCTL_DEVICE)
DEVICE = READ_FILE | WRITE_FILE | READ_DIR | _IOCTL_DEVICE


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("tcp", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


class _PathRule(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed", ctypes.c_uint64), ("descriptor", ctypes.c_int32))


def landlock_version() -> int:
    """Ask the kernel for its ABI version; 0 if it has no Landlock, or it is switched off."""
    if not sys.platform.startswith("linux"):
        return 0
    return max(0, int(ctypes.CDLL(None).syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION_FLAG)))


def restrict(rules: Iterable[tuple[str, int]]) -> int:
    """Refuse this thread, and what it starts, every file but these, all TCP, and signals to other processes.

    Cannot be undone. Paths that don't exist are left out. Set "no new privileges" first.

    Args:
        rules: paths, each with what is allowed beneath it: ``READ``, ``WRITE``, ``DEVICE`` or a sum of them.

    Returns:
        the ABI version that was used.

    Raises:
        OSError: the kernel refused, or has no Landlock.
    """
    version = landlock_version()
    if not version:
        raise OSError("this system has no Landlock")
    handled = _FILES_OF_ABI.get(version, _ALL_FILES)
    ruleset = _Ruleset(handled, _TCP if version >= 4 else 0, _SCOPES if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    descriptor = _call(_CREATE_RULESET, ctypes.byref(ruleset), ctypes.c_size_t(size), 0)
    try:
        for path, allowed in rules:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                _allow(descriptor, path, allowed & handled)
        _call(_RESTRICT_SELF, descriptor, 0)
    finally:
        os.close(descriptor)
    return version


def _allow(ruleset: int, path: str, allowed: int) -> None:
    target = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(target).st_mode):
            allowed &= _OF_FILES_ALONE
        _call(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(_PathRule(allowed, target)), 0)
    finally:
        os.close(target)


def _call(number: int, *arguments: object) -> int:
    result = int(ctypes.CDLL(None, use_errno=True).syscall(number, *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
