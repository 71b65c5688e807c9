"""Log lines: their form, what cannot be forged in them, and a reader that does not read."""

import asyncio
import json
import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from structlog.contextvars import bound_contextvars

from server import logs

ROOT = Path(__file__).resolve().parents[2]
NASTY = [
    "a\nb",
    "a\r\nb",
    "\x1b[2J\x1b[H",
    "a\u2028b\u2029c",
    "\x85",
    "\x7f\x00",
    "\u202egnp.exe",
    "\udcff",
    '"}\n{"level":"',
]
log = logging.getLogger("onebase.test")
request = logs.request_logger()


@contextmanager
def written(folder: Path, form: str = "json", level: str = "info") -> Iterator[list[str]]:
    """The lines that are logged inside, once it is over."""
    found: list[str] = []
    with (folder / "log").open("w+") as file:
        with logs.writing(file, form, level):
            yield found
        file.seek(0)
        found += file.read().split("\n")[:-1]


def test_a_line_of_the_standard_library_and_one_of_a_request_have_one_form(tmp_path):
    with written(tmp_path) as lines:
        log.warning("%d of %s", 3, ["x"])
        request.info("request", tenant="acme", ttft_ms=1.5, finish_reasons=["stop"], cold=False)
    plain, asked = map(json.loads, lines)
    assert plain.pop("timestamp") <= asked.pop("timestamp")
    assert plain == {"level": "warning", "logger": "onebase.test", "event": "3 of ['x']"}
    assert asked == {
        "level": "info",
        "logger": "onebase.request",
        "event": "request",
        "tenant": "acme",
        "ttft_ms": 1.5,
        "finish_reasons": ["stop"],
        "cold": False,
    }


def test_auto_is_json_but_on_a_terminal(tmp_path):
    with written(tmp_path, "auto") as lines:
        log.info("hello")
    assert json.loads(lines[0])["event"] == "hello"
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal, logs.writing(terminal, "auto", "info"):
        log.info("hello")
    shown = os.read(ours, 1000).decode()
    os.close(ours)
    assert "hello" in shown
    assert "\x1b[" in shown, "in colours"
    assert "{" not in shown


def test_a_terminal_without_colours(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal, logs.writing(terminal, "auto", "info"):
        request.info("request", adapter="a b")
    shown = os.read(ours, 1000).decode()
    os.close(ours)
    assert "\x1b" not in shown
    assert "adapter='a b'" in shown


@pytest.mark.parametrize("form", ["json", "text"])
@example(text="\n".join(NASTY))
@given(text=st.text(max_size=60) | st.sampled_from(NASTY))
def test_no_name_forges_a_line(form, text, tmp_path_factory):
    with written(tmp_path_factory.mktemp("log"), form) as lines:
        log.info("adapter %s is served", text)
        request.info("request", adapter=text, reasons=[text], inner={text: text})
    assert len(lines) == 2
    for line in lines:
        assert len(line.splitlines()) == 1
        assert line.isprintable() or (form == "json" and "\x7f" in line)
    if form == "json":
        assert json.loads(lines[1])["adapter"] == text.encode("utf-16", "surrogatepass").decode(
            "utf-16", "surrogatepass"
        )


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_traceback_begins_no_line_of_its_own(form, tmp_path):
    with written(tmp_path, form) as lines:
        try:
            raise ValueError("bad name x\n2026-01-01T00:00:00 [info ] forged\x1b[2J")
        except ValueError:
            log.exception("it failed")
    if form == "json":
        (line,) = lines
        assert "ValueError: bad name x\n2026" in json.loads(line)["exception"]
    else:
        assert len(lines) > 2
        assert "it failed" in lines[0]
        assert all(line.startswith("    ") for line in lines[1:])
        assert all(line.isprintable() for line in lines)


def test_levels(tmp_path):
    before = logging.getLogger("onebase").level
    with written(tmp_path, level="debug") as lines:
        log.debug("ours")
        logging.getLogger("aiosqlite").debug("theirs, with what they were given")
        logging.getLogger("httpx").info("each of their calls")
    assert [json.loads(line)["event"] for line in lines] == ["ours"]
    with written(tmp_path, level="error") as lines:
        log.warning("ours")
        logging.getLogger("uvicorn.error").warning("theirs")
        log.error("bad")
    assert [json.loads(line)["event"] for line in lines] == ["bad"]
    assert logging.getLogger("onebase").level == before, "what was changed is as it was"


def test_warnings_are_lines_too(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with written(tmp_path) as lines:
            warnings.warn("soon gone", DeprecationWarning, stacklevel=1)
    assert "soon gone" in json.loads(lines[0])["event"]


def test_lines_of_a_request_s_task_say_which(tmp_path):
    async def serve(name: str) -> None:
        with bound_contextvars(request_id=name):
            await asyncio.sleep(0)
            log.info("in %s", name)

    async def both() -> None:
        await asyncio.gather(serve("r1"), serve("r2"))

    with written(tmp_path) as lines:
        asyncio.run(both())
        log.info("outside")
    found = [json.loads(line) for line in lines]
    assert [(one["event"], one.get("request_id")) for one in found] == [
        ("in r1", "r1"),
        ("in r2", "r2"),
        ("outside", None),
    ]


def test_a_record_holds_no_traceback_while_it_waits(tmp_path):
    """Else what a failed step computed with could not be freed."""
    try:
        raise ValueError("of a step")
    except ValueError:
        record = logging.LogRecord("onebase", logging.ERROR, "", 0, "%s", ({"a": 1},), sys.exc_info())
    with written(tmp_path):
        (taker,) = logs._taking
        prepared = taker.prepare(record)
    assert (prepared.exc_info, prepared.args, prepared.getMessage()) == (None, None, "{'a': 1}")
    assert prepared.exc_text.endswith("ValueError: of a step")
    assert record.exc_info is not None, "other handlers have the record as it was"


def test_nobody_waits_for_a_reader_and_what_is_dropped_is_said(monkeypatch):
    monkeypatch.setattr(logs, "QUEUED", 100)
    ours, theirs = os.pipe()
    text, total = "x" * 1000, 2000
    received = bytearray()

    def read() -> None:
        while part := os.read(ours, 65536):
            received.extend(part)

    with os.fdopen(theirs, "w") as pipe, logs.writing(pipe, "json", "info"):
        for number in range(total):  # far more than a pipe holds
            log.info("%d %s", number, text)
        lost = logs.dropped()
        reader = threading.Thread(target=read)
        reader.start()
    reader.join(30)
    os.close(ours)
    events = [json.loads(line)["event"] for line in received.decode().splitlines()]
    notes = [event for event in events if "were dropped" in event]
    numbers = [int(event.split()[0]) for event in events if event.endswith(text)]
    assert lost >= total - 100 - 200, "all but what the queue and the pipe hold"
    assert numbers == sorted(set(numbers)), "in order, once"
    assert len(numbers) + lost == total
    assert sum(int(note.split()[0]) for note in notes) == lost


def test_a_file_that_cannot_be_written_is_counted(tmp_path):
    ours, theirs = os.pipe()
    os.close(ours)  # the reader is gone for good
    with os.fdopen(theirs, "w") as pipe, logs.writing(pipe, "json", "info"):
        (taker,) = logs._taking
        log.info("lost")
        taker.writer.stop()
        assert logs.dropped() == 1


def test_a_file_that_does_not_block_gets_whole_lines():
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    received = bytearray()

    def read() -> None:
        while part := os.read(ours, 65536):
            received.extend(part)

    with os.fdopen(theirs, "w") as pipe, logs.writing(pipe, "json", "info"):
        for _ in range(200):
            log.info("y" * 1000)
        reader = threading.Thread(target=read)
        reader.start()
    reader.join(30)
    os.close(ours)
    assert [json.loads(line)["event"] for line in received.decode().splitlines()] == ["y" * 1000] * 200


def test_the_process_ends_though_nobody_reads():
    script = """
import logging, sys
from server import logs
with logs.writing(sys.stderr, "json", "info"):
    for number in range(5000):
        logging.getLogger("onebase").info("%d %s", number, "x" * 100)
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE)
    assert process.wait(60) == 0
    assert process.stderr
    first = process.stderr.readline()
    process.stderr.close()
    assert json.loads(first)["event"].startswith("0 ")
