"""Log lines: one JSON object each for machines, or text for people, written by a thread of their own.

Whoever logs never waits for whoever reads: records lie in a bounded queue, and what finds it full is counted and left
out. Nothing in a record, a name or a message of a fault, can begin a line of its own.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import queue
import select
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener
from typing import Any, TextIO

import structlog
from structlog.contextvars import get_contextvars
from structlog.stdlib import ProcessorFormatter

QUEUED = 10_000  # records that may wait to be written
STOP_SECONDS = 2.0  # how long the end waits for a reader
_OWN = ("onebase", "server")
_NOISY = ("httpx", "huggingface_hub", "urllib3")  # what they say of each call is nobody's business
_taking: list[_Taker] = []


def dropped() -> int:
    """Lines that were not written, since the start: the queue was full, or the file could not be written."""
    return sum(one.dropped + one.writer.lost for one in _taking)


def request_logger() -> Any:
    """Where lines of requests go: a structlog logger whose events every handler of the standard library can take."""
    return structlog.wrap_logger(
        logging.getLogger("onebase.request"),
        processors=[ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
    )


@contextlib.contextmanager
def writing(stream: TextIO, form: str, level: str) -> Iterator[None]:
    """Inside, all that is logged goes to `stream`: as `form`, which is json, text or auto (text where the stream is a
    terminal), and from `level` on. Other libraries are heard from info on at most: what they say below that shows what
    they were given."""
    root, least = logging.getLogger(), logging.getLevelNamesMapping()[level.upper()]
    terminal = stream.isatty()
    as_text = terminal if form == "auto" else form == "text"
    formatter = _formatter(as_text=as_text, colours=terminal and not os.environ.get("NO_COLOR"))
    taker = _Taker(_Writer(_out(stream), formatter), QUEUED)
    levels = {root: max(least, logging.INFO)}
    levels |= {logging.getLogger(name): least for name in _OWN}
    levels |= {logging.getLogger(name): max(least, logging.WARNING) for name in _NOISY}
    before = {logger: logger.level for logger in levels}
    for logger, wanted in levels.items():
        logger.setLevel(wanted)
    root.addHandler(taker)
    _taking.append(taker)
    logging.captureWarnings(True)
    taker.writer.start()
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(taker)
        taker.writer.stop()
        _taking.remove(taker)
        for logger, was in before.items():
            logger.setLevel(was)


class _Taker(QueueHandler):
    """Takes records on whatever thread logs, without waiting."""

    def __init__(self, writer: _Writer, most: int):
        super().__init__(writer.records)
        self.writer, self.dropped, self._most = writer, 0, most
        writer.taker = self

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """The record with its message made, holding nothing that may change, or that should be freed, meanwhile."""
        if isinstance(record.msg, dict):
            return record
        made = copy.copy(record)
        made.msg, made.args = record.getMessage(), None
        if record.exc_info:
            made.exc_text, made.exc_info = "".join(traceback.format_exception(*record.exc_info)).rstrip(), None
        made.context = get_contextvars()
        return made

    def enqueue(self, record: logging.LogRecord) -> None:
        """Called under the handler's lock, so the bound holds."""
        if self.writer.records.qsize() >= self._most:
            self.dropped += 1
        else:
            self.writer.records.put_nowait(record)


class _Writer(QueueListener):
    """Writes lines on a thread of its own. It has no lock that the process could wait for at its end while a reader
    does not read."""

    taker: _Taker

    def __init__(self, write: Callable[[bytes], None], formatter: logging.Formatter):
        self.records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
        super().__init__(self.records)
        self._write, self._formatter = write, formatter
        self.lost = 0
        self._told = 0

    def handle(self, record: logging.LogRecord) -> None:
        """One record, and how many did not fit before it."""
        self._line(record)
        missing = self.taker.dropped - self._told
        if missing:
            self._told += missing
            text = f"{missing} log lines were dropped: nobody reads them as fast as they come"
            self._line(logging.LogRecord("onebase.logs", logging.WARNING, __file__, 0, text, None, None))

    def stop(self) -> None:
        """Ends after what is queued, or after a while if nobody reads."""
        if self._thread is not None:
            self.enqueue_sentinel()
            self._thread.join(STOP_SECONDS)

    def _line(self, record: logging.LogRecord) -> None:
        try:
            self._write(f"{self._formatter.format(record)}\n".encode(errors="backslashreplace"))
        except Exception:  # there is nowhere left to say so
            self.lost += 1


def _out(stream: TextIO) -> Callable[[bytes], None]:
    """Writes to the stream's file past its buffer, whose lock would be waited for when the process ends."""
    try:
        file = stream.fileno()
    except (OSError, ValueError):  # a stream in memory
        return lambda line: print(line.decode(), end="", file=stream, flush=True)

    def write(line: bytes) -> None:
        while line:
            try:
                line = line[os.write(file, line) :]
            except BlockingIOError:  # whoever gave us the file has made it so
                select.select([], [file], [])

    return write


def _formatter(*, as_text: bool, colours: bool) -> logging.Formatter:
    chain: list[Any] = [_head, ProcessorFormatter.remove_processors_meta]
    if as_text:  # with `repr` for values: it escapes what is not printable, and shows where a value with spaces ends
        render = structlog.dev.ConsoleRenderer(colors=colours, repr_native_str=True, sort_keys=False, pad_event_to=0)
        chain += [_plain, render]
    else:
        chain += [structlog.processors.JSONRenderer()]  # in ASCII: no separator of lines stays in it
    before: list[Any] = [_of_record]
    return ProcessorFormatter(foreign_pre_chain=before, processors=chain)


def _of_record(logger: Any, name: str, event: dict[str, Any]) -> dict[str, Any]:
    """What a record of the standard library has beside its message."""
    record = event["_record"]
    event |= getattr(record, "context", {})
    if record.exc_text:
        event["exception"] = record.exc_text
    return event


def _head(logger: Any, name: str, event: dict[str, Any]) -> dict[str, Any]:
    record = event["_record"]
    when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    return {"timestamp": when, "level": record.levelname.lower(), "logger": record.name, **event}


def _plain(logger: Any, name: str, event: dict[str, Any]) -> dict[str, Any]:
    """What the text's renderer prints as it is, without control characters; a traceback's lines are set in."""
    event["event"] = _printable(str(event["event"]))
    if "exception" in event:
        event["exception"] = "\n".join(f"    {_printable(line)}" for line in event["exception"].split("\n"))
    return event


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)
