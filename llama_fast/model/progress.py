"""Progress bars on stderr."""

from tqdm import tqdm


class ProgressBar(tqdm):
    """tqdm without its monitor: even a disabled bar starts that thread, and a process with threads should not fork."""

    monitor_interval = 0
