"""Tasks in several processes, each with a model of its own.

A model that is small for its machine leaves most of it idle: its operations are too short to be worth sharing among threads. Processes of
a few threads each share nothing but the list of tasks. What a task yields depends on the task, and on the threads of the process; not on
which process does it, nor when.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from errata.bench.folder import Record
from errata.bench.plan import PlanError
from errata.bench.tasks import Task, Work

PATIENCE = 10.0
"""Seconds that an idle process has to end."""


class WorkerError(RuntimeError):
    """A process of the run ended before its task."""


def sendable(load: object) -> None:
    """Raises PlanError where what loads the model cannot be pickled, which is how it goes to a worker."""
    try:
        pickle.dumps(load)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise PlanError(
            f"each worker loads the model for itself, and what loads it cannot be sent there ({error}); name the model in the plan, or "
            "give `load` as a function of a module"
        ) from error


class Workers:
    """`count` processes that begin with `begin`, which is pickled, and then do tasks. A context manager: behind it none of them is left."""

    def __init__(self, count: int, begin: Callable[[], Work]) -> None:
        context = get_context("spawn")  # a fork of a process whose torch has run threads may hang
        self._processes: dict[Connection, BaseProcess] = {}
        self._begun: set[Connection] = set()
        with _without_interrupts():
            for number in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, begin), name=f"worker {number + 1}", daemon=True)
                process.start()
                theirs.close()  # or its end would not be noticed
                self._processes[ours] = process

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        for connection, process in self._processes.items():
            connection.close()  # an idle one ends by itself
            if failed:
                process.terminate()
        for process in self._processes.values():
            process.join(PATIENCE)
            process.kill()
            process.join()

    def done(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Record]]:
        """Every line of every task, as they come. A process goes on to its next line when the one before has been taken in.

        Raises what a task raises, and WorkerError where a process is gone.
        """
        shared = _Shared(tasks)
        busy: dict[Connection, Task] = {}

        def give(connection: Connection) -> None:
            if (task := shared.next(connection)) is not None:
                with self._alive(connection):
                    connection.send(task)
                busy[connection] = task

        for connection in self._processes:
            give(connection)
        while busy:
            ready = set(wait(list(busy)))
            for connection in [one for one in busy if one in ready]:
                with self._alive(connection):
                    said, what = connection.recv()
                self._begun.add(connection)
                if said == "line":
                    yield busy[connection], what
                    with self._alive(connection):
                        connection.send("go on")
                elif said == "done":
                    del busy[connection]
                    give(connection)
                elif said == "error":
                    raise what

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
            if connection not in self._begun:
                raise WorkerError(
                    f"{process.name} {end} before it began; what it wrote on stderr says why. Workers import the script that starts them: "
                    'it must be a file, and call errata under `if __name__ == "__main__":`'
                ) from error
            why = ", which is what happens where memory is short" if -code == signal.SIGKILL else ""
            raise WorkerError(f"{process.name} {end}{why}; the lines so far are kept: go on with resume (--resume)") from error


class _Shared:
    """Tasks that are left. One about cases that a process had before goes to that process, which need not ask the unedited model again;
    a process that has none takes new cases, and at last what is left to another."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._new: dict[str, deque[Task]] = {}  # by their first case, in order
        self._taken: dict[Connection, deque[deque[Task]]] = {}
        for task in tasks:
            self._new.setdefault(task.cases[0].id, deque()).append(task)

    def next(self, who: Connection) -> Task | None:
        """None where nothing is left."""
        own = self._taken.setdefault(who, deque())
        if not own:
            if self._new:
                own.append(self._new.pop(next(iter(self._new))))
            else:
                others = [groups for groups in self._taken.values() if groups]
                if not others:
                    return None
                own = max(others, key=len)
        task = own[0].popleft()
        if not own[0]:
            own.popleft()
        return task


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that start meanwhile never see Ctrl-C, which a terminal sends to all: the one that was asked for ends the others."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection, begin: Callable[[], Work]) -> None:
    """What a process does: tasks, until nobody is there to give them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where they cannot be blocked
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, ConnectionError):
        connection.send(("begun", None))
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


def _end_with_parent() -> None:
    """However the parent ended, and whatever this process is at."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _portable(error: Exception) -> Exception:
    """As it is, where it survives the way to another process; with its traceback as a note."""
    try:
        copy: Any = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever an exception's own __reduce__ or __init__ makes of it
        copy = None
    sent = error if type(copy) is type(error) and str(copy) == str(error) else WorkerError(f"{type(error).__name__}: {error}")
    sent.add_note("in a worker:\n" + "".join(traceback.format_exception(error)))
    return sent
