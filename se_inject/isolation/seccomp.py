"""Filter the system calls that Landlock does not cover: sockets, other processes, owners and modes of files.

The filter is a small program (classic BPF) that the kernel runs at every system call. It refuses, with "not
permitted", a list of calls that no network needs; everything else is let through. Linux on x86-64 and ARM64.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the tables below, and the kernel's number of the architecture."""

_REFUSED = {
    # the network
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202),
    "accept4": (288, 242), "socketpair": (53, 199),  # a datagram of one can go to any socket in the file system
    # other programs and processes
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272), "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
    # what processes share, which is found by small numbers or by name
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190), "semop": (65, 193),
    "semctl": (66, 191), "semtimedop": (220, 192), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188),
    "msgctl": (71, 187), "mq_open": (240, 180), "mq_unlink": (241, 181), "mq_timedsend": (242, 182),
    "mq_timedreceive": (243, 183), "mq_notify": (244, 184), "mq_getsetattr": (245, 185),
    # how others run, and what happens in folders
    "setpriority": (141, 140), "ioprio_set": (251, 30), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "process_mrelease": (448, 448), "inotify_init": (253, None), "inotify_init1": (294, 26), "inotify_add_watch": (254, 27),
    # owners, modes, times and attributes of files, which Landlock leaves free
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "setxattrat": (463, 463), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "removexattrat": (466, 466),
    # the machine, and parts of the kernel that attackers like
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224),
    "swapoff": (168, 225), "acct": (163, 89), "quotactl": (179, 60), "syslog": (103, 116),
    "sethostname": (170, 161), "setdomainname": (171, 162), "iopl": (172, None), "ioperm": (173, None),
    "modify_ldt": (154, None), "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262), "personality": (135, 92), "vhangup": (153, 58), "memfd_secret": (447, 447),
    "io_setup": (206, 0), "file_setattr": (469, 469), "quotactl_fd": (443, 443),
}  # fmt: skip
_MEMORY_FILE = {"memfd_create": (319, 279)}
"""Memory that no limit counts, as is what ``_SHARED`` and ``_GROWING`` say of a mapping. Drivers of graphics processors need it."""
_CLONE, _CLONE3, _IOCTL, _FCNTL, _MMAP = (56, 220), (435, 435), (16, 29), (72, 25), (9, 222)
_ONLY_ITSELF = {
    "kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261), "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274), "setpgid": (109, 154),
}  # fmt: skip
"""Allowed where the first argument is the process itself, or 0: for the threads that libraries bind to processors, no more."""
_CLONE_THREAD = 0x10000
_DEVICE_COMMANDS = (0x5412, 0x541C, 0x8901, 0x8902)
"""TIOCSTI and TIOCLINUX type into the terminal that the command was started in; the others are ``F_SETOWN`` again."""
_FILE_COMMANDS = (8, 10, 15, 1024, 1026)
"""F_SETOWN, F_SETSIG and F_SETOWN_EX send any signal to another process; F_SETLEASE and F_NOTIFY hold others up, or watch them."""
_ANONYMOUS, _SHARED, _GROWING = 0x20, 0x01, 0x0100
"""Flags of a mapping: of no file; shared, which limits of memory don't count; growing down, which counts as a stack."""

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000
_NUMBER, _ARCHITECTURE, _FIRST, _SECOND, _FOURTH = 0, 4, 16, 24, 40
"""Offsets in what the filter sees of a call; the lower half of an argument comes first."""
_EPERM, _ENOSYS = 1, 38
_X32 = 0x40000000
_SET_SECCOMP, _FILTER_MODE = 22, 2

_Instruction = tuple[int, int, int, int]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def has_seccomp() -> bool:
    """Return whether filters of system calls can be set here."""
    if not sys.platform.startswith("linux") or platform.machine() not in _MACHINES or sys.byteorder != "little":
        return False
    return int(ctypes.CDLL(None, use_errno=True).prctl(21, 0, 0, 0, 0)) >= 0  # PR_GET_SECCOMP


def refuse_calls(*, gpu: bool = False) -> None:
    """Refuse this thread, and what it starts, the system calls of the lists above. Cannot be undone.

    Threads can still be started, other processes not. Set "no new privileges" first.

    Args:
        gpu: allow memory that no limit counts.

    Raises:
        OSError: the kernel refused, or can't filter.
    """
    if not has_seccomp():
        raise OSError("no filter of system calls for this system")
    code = b"".join(struct.pack("<HBBI", *line) for line in _filter(os.getpid(), gpu))
    program = _Program(len(code) // 8, code)
    if ctypes.CDLL(None, use_errno=True).prctl(_SET_SECCOMP, _FILTER_MODE, ctypes.byref(program), 0, 0):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def _filter(process: int, gpu: bool) -> list[_Instruction]:
    column, architecture = _MACHINES[platform.machine()]
    lines: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        _error(_EPERM),
        (_EQUAL, 0, 1, _CLONE3[column]),
        _error(_ENOSYS),  # its flags can't be seen here; C libraries then use clone
        *_where(_CLONE[column], [(_LOAD, 0, 0, _FIRST), (_ANY_BIT, 1, 0, _CLONE_THREAD), _error(_EPERM)]),
    ]
    for call, commands in ((_IOCTL, _DEVICE_COMMANDS), (_FCNTL, _FILE_COMMANDS)):
        for command in commands:
            lines += _where(call[column], [(_LOAD, 0, 0, _SECOND), (_EQUAL, 0, 1, command), _error(_EPERM)])
    if not gpu:
        uncounted = [(_ANY_BIT, 0, 2, _ANONYMOUS), (_ANY_BIT, 0, 1, _SHARED | _GROWING), _error(_EPERM)]
        lines += _where(_MMAP[column], [(_LOAD, 0, 0, _FOURTH), *uncounted])
    for numbers in _ONLY_ITSELF.values():
        own = [(_LOAD, 0, 0, _FIRST), (_EQUAL, 2, 0, process), (_EQUAL, 1, 0, 0), _error(_EPERM)]
        lines += _where(numbers[column], own)
    for columns in (_REFUSED if gpu else _REFUSED | _MEMORY_FILE).values():
        number = columns[column]
        if number is not None:
            lines += [(_EQUAL, 0, 1, number), _error(_EPERM)]
    return [*lines, (_RETURN, 0, 0, _ALLOW)]


def _where(number: int | None, lines: list[_Instruction]) -> list[_Instruction]:
    """Restrict these lines to one system call; the call's number is loaded again behind them."""
    if number is None:
        return []
    return [(_EQUAL, 0, len(lines) + 1, number), *lines, (_LOAD, 0, 0, _NUMBER)]


def _error(code: int) -> _Instruction:
    return (_RETURN, 0, 0, 0x00050000 | code)
