"""Takes from a process what decoding does not need: programs, sockets, other processes.

The kernel enforces it: seccomp denies system calls. Landlock denies what they cannot tell apart, such as to read the
environment of another process, or to write its memory, in `/proc`.
"""

import ctypes
import errno
import os
import platform
import struct

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # BPF: load a word, compare it, end
_OFFSET_OF_NUMBER, _OFFSET_OF_ARCHITECTURE = 0, 4
_ALLOW, _DENY, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000

_X32 = 0x40000000
"""Bit of the numbers of x86-64's second set of system calls, which has the same identifier."""

_DENIED = {
    # execve, execveat, socket, connect, bind, listen, ptrace, process_vm_readv, process_vm_writev, kill, tkill, tgkill,
    # rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd_send_signal, bpf, io_uring_setup, pidfd_open, pidfd_getfd, unshare, mount,
    # keyctl
    "x86_64": (
        0xC000003E,
        (59, 322, 41, 42, 49, 50, 101, 310, 311, 62, 200, 234, 129, 297, 424, 321, 425, 434, 438, 272, 165, 250),
    ),
    "aarch64": (
        0xC00000B7,
        (221, 281, 198, 203, 200, 201, 117, 270, 271, 129, 130, 131, 138, 240, 424, 280, 425, 434, 438, 97, 40, 219),
    ),
}
"""By machine: its identifier for the kernel's audit, and the numbers of system calls that fail with EPERM."""


_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446  # on every machine
_LANDLOCK_VERSION = 1
_LANDLOCK_DENIED = 0x1FF3
"""Landlock's first 13 rights of files without those to read files and folders: libraries are loaded when they are needed."""


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def confine() -> bool:
    """Deny this process, and all of its threads to come, to start programs, open sockets, signal and inspect processes.

    Landlock also denies it to open files for writing, where the kernel has it (`has_landlock`).

    Returns: whether seccomp is in force; False on machines for which there is no list of system calls, or without seccomp.
    """
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _restrict_files(libc)
    if platform.machine() not in _DENIED:
        return False
    instructions = _instructions(*_DENIED[platform.machine()])
    program = _Program(len(instructions) // 8, instructions)
    return bool(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) == 0)


def has_landlock() -> bool:
    """Return whether the kernel has Landlock, and uses it."""
    return int(ctypes.CDLL(None).syscall(_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_VERSION)) > 0


def _restrict_files(libc: ctypes.CDLL) -> None:
    """Enter a Landlock domain: processes outside of it cannot be inspected from inside."""
    rights = ctypes.c_uint64(_LANDLOCK_DENIED)
    rules = libc.syscall(_LANDLOCK_CREATE_RULESET, ctypes.byref(rights), ctypes.c_size_t(ctypes.sizeof(rights)), 0)
    if rules >= 0:
        libc.syscall(_LANDLOCK_RESTRICT_SELF, rules, 0)
        os.close(rules)


def _instructions(architecture: int, denied: tuple[int, ...]) -> bytes:
    """Return the filter: calls of another architecture end the process, those of the list fail."""
    steps = [
        (_LOAD, 0, 0, _OFFSET_OF_ARCHITECTURE),
        (_JUMP_IF_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _OFFSET_OF_NUMBER),
        (_JUMP_IF_AT_LEAST, len(denied) + 1, 0, _X32),
        *((_JUMP_IF_EQUAL, len(denied) - i, 0, number) for i, number in enumerate(denied)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _DENY),
    ]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
