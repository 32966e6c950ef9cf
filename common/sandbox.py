"""Takes from a process what decoding does not need: programs, sockets, other processes. The kernel enforces it (seccomp)."""

import ctypes
import errno
import platform
import struct

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF: load a word, compare it, end
_OFFSET_OF_NUMBER, _OFFSET_OF_ARCHITECTURE = 0, 4
_ALLOW, _DENY, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000

_DENIED = {
    # execve, execveat, socket, connect, bind, listen, ptrace, process_vm_readv, process_vm_writev, kill, tkill, tgkill, bpf,
    # io_uring_setup, pidfd_open, pidfd_getfd, unshare, mount, keyctl
    "x86_64": (0xC000003E, (59, 322, 41, 42, 49, 50, 101, 310, 311, 62, 200, 234, 321, 425, 434, 438, 272, 165, 250)),
    "aarch64": (0xC00000B7, (221, 281, 198, 203, 200, 201, 117, 270, 271, 129, 130, 131, 280, 425, 434, 438, 97, 40, 219)),
}
"""By machine: its identifier for the kernel's audit, and the numbers of system calls that fail with EPERM."""


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def confine() -> bool:
    """Deny this process, and all of its threads to come, to start programs, open sockets and signal processes.

    Returns: whether the kernel enforces it; False on machines for which there is no list of system calls, or without seccomp.
    """
    if platform.machine() not in _DENIED:
        return False
    instructions = _instructions(*_DENIED[platform.machine()])
    program = _Program(len(instructions) // 8, instructions)
    prctl = ctypes.CDLL(None).prctl
    return bool(
        prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
        and prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) == 0
    )


def _instructions(architecture: int, denied: tuple[int, ...]) -> bytes:
    """Return the filter: calls of another architecture end the process, those of the list fail."""
    steps = [
        (_LOAD, 0, 0, _OFFSET_OF_ARCHITECTURE),
        (_JUMP_IF_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _OFFSET_OF_NUMBER),
        *((_JUMP_IF_EQUAL, len(denied) - i, 0, number) for i, number in enumerate(denied)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _DENY),
    ]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
