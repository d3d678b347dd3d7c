"""Checks whether a process has ended."""

import psutil


def is_gone(pid: int) -> bool:
    """Returns whether the process has ended, even if nobody has waited for it yet."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
