"""Tasks in several processes, each with a model of its own.

A model that is small for its machine leaves most of it idle: its operations are too short to be worth sharing among threads. Processes of
a few threads each share nothing but the list of tasks. What a task yields depends on the task, and on the threads of the process; not on
which process does it, nor when.
"""

from __future__ import annotations

import pickle
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from errata.bench.folder import Record
from errata.bench.plan import PlanError
from errata.bench.tasks import Task, Work


class WorkerError(RuntimeError):
    """A process of the run ended before its task."""


class Workers:
    """`count` processes that begin with `begin` and then do tasks. A context manager: behind it none of them is left.

    begin: what sets a process up; it goes there by pickle, so it is a function of a module, or a partial of one.
    Raises PlanError where it cannot be sent.
    """

    def __init__(self, count: int, begin: Callable[[], Work]) -> None:
        try:
            pickle.dumps(begin)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise PlanError(
                f"each worker loads the model for itself, and what loads it cannot be sent there ({error}); name the model in the plan, or "
                "give `load` as a function of a module"
            ) from error
        context = get_context("spawn")  # a fork of a process whose torch has run threads may hang
        self._processes: dict[Connection, BaseProcess] = {}
        for number in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, begin), name=f"errata worker {number + 1}", daemon=True)
            process.start()
            theirs.close()  # or its end would not be noticed
            self._processes[ours] = process
        self._had: dict[Connection, set[str]] = {connection: set() for connection in self._processes}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for connection, process in self._processes.items():
            process.terminate()
            process.join()
            connection.close()

    def done(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Record]]:
        """Every line of every task, as they come. A process goes on to its next line when the one before has been taken in.

        A task goes to a process that had its cases before, else to the first that is free. Raises what a task raises, and WorkerError
        where a process is gone.
        """
        left = list(tasks)
        busy: dict[Connection, Task] = {}
        for connection in self._processes:
            self._next(connection, left, busy)
        while busy:
            ready = set(wait(list(busy)))
            for connection in [one for one in busy if one in ready]:
                with self._alive(connection):
                    said, what = connection.recv()
                if said == "line":
                    yield busy[connection], what
                    with self._alive(connection):
                        connection.send("go on")
                elif said == "done":
                    del busy[connection]
                    self._next(connection, left, busy)
                else:
                    raise what

    def _next(self, connection: Connection, left: list[Task], busy: dict[Connection, Task]) -> None:
        if not left:
            return
        others = set().union(*(had for other, had in self._had.items() if other is not connection))
        mine = self._had[connection]
        place = min(range(len(left)), key=lambda i: (not left[i].about <= mine, not left[i].about.isdisjoint(others - mine)))
        task = busy[connection] = left.pop(place)
        mine |= task.about
        with self._alive(connection):
            connection.send(task)

    @contextmanager
    def _alive(self, connection: Connection) -> Iterator[None]:
        """Raises WorkerError where the process at the other end is gone."""
        try:
            yield
        except (EOFError, ConnectionError) as error:
            process = self._processes[connection]
            process.join()
            code = process.exitcode or 0
            end = f"was stopped by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            raise WorkerError(
                f"{process.name} {end}, perhaps for want of memory; the lines so far are kept: go on with resume (--resume) and fewer "
                'workers. A script that calls errata with workers does so under `if __name__ == "__main__":`'
            ) from error


def _serve(connection: Connection, begin: Callable[[], Work]) -> None:
    """What a process does: tasks, until nobody is there to give them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the one that asked ends the others
    with suppress(EOFError, ConnectionError):
        try:
            work = begin()
            while True:
                for record in work(connection.recv()):
                    connection.send(("line", record))
                    connection.recv()
                connection.send(("done", None))
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            connection.send(("error", _portable(error)))


def _portable(error: Exception) -> Exception:
    """As it is, where it survives the way to another process."""
    try:
        copy: Any = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = None
    return error if type(copy) is type(error) and str(copy) == str(error) else WorkerError(f"{type(error).__name__}: {error}")
