"""What tests ask about processes that others started."""

import psutil


def is_gone(pid: int) -> bool:
    """Also where it has ended and nobody waits for it: init does so in its own time, or never."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
