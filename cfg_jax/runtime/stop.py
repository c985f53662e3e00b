"""Leaving between steps when told to, by a signal or by the cluster."""

import signal
import threading

import jax

from cfg_jax.runtime import checkpoint


class Stop:
    """Whether to leave between steps: a SIGTERM here, or, of several processes, to any of them.

    A context: the signal is heard inside it, and a second one does not wait.
    """

    def __enter__(self):
        self._told, self._before = False, None
        # With several processes it is JAX's preemption service that hears the signal; and only the
        # main thread may listen.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *_):
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _hear(self, *_) -> None:
        self._told = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def __call__(self, step: int, checkpoints: checkpoint.Checkpoints) -> bool:
        return self._told or checkpoints.preempted(step)
