"""`make demo`: starts a server with AUTH on and the shipped adapters; two tenants ask them and the base the same
questions over HTTP. Shows what each answer costs and what each tenant owes, which must be the same."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import httpx
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from server.demoview import Answers, answers_table, bill_table
from server.settings import Settings

ADAPTERS = Path(__file__).resolve().parent.parent / "adapters"
BASE = "smollm2-135m"  # what the shipped adapters were trained for, whatever ONEBASE_BASE says
START_SECONDS = 300.0  # the first start converts the base
ANSWER_SECONDS = 300.0
STOP_SECONDS = 20.0
LOG_LINES = 30
TENANTS = ("acme", "globex")
SCOPES = ["generate", "usage:read"]
START = time.time()
WIDTH = 120  # of the table where there is no terminal
_ADMIN_KEY = re.compile(r"^(ob_\S+)$", re.MULTILINE)
_LISTENING = re.compile(r"running on (http://\S+)")


class DemoFailed(Exception):
    """The demo cannot go on; the text says why. `log` is what the server wrote until then."""

    log = ""


@dataclass(frozen=True)
class Question:
    """What one adapter is for, from its `demo.json`; `body` is the request without the adapter's name."""

    adapter: str
    body: dict[str, Any]

    @property
    def text(self) -> str:
        """The last message of the conversation."""
        return str(self.body["messages"][-1]["content"])


class Server:
    """An `onebase serve` of our own on a port that the system chooses. Its log goes to a file."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path):
        self.process, self._log = process, log
        self.url = ""

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """Returns once /readyz answers 200. Raises DemoFailed when the server ends or takes longer."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise DemoFailed(f"the server ended with status {self.process.returncode} before it was ready")
            # The server's own word on its port: a port that we chose could be another process's by now.
            found = _LISTENING.search(self.log())
            if found and _is_ready(found[1]):
                self.url = found[1]
                return
            time.sleep(0.1)
        raise DemoFailed(f"the server was not ready after {seconds:.0f} s")

    def log(self) -> str:
        """Everything that the server has written."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def stop(self) -> None:
        """SIGTERM, as an operator would; SIGKILL only if that does not help."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def server(*flags: str) -> Iterator[Server]:
    """A started server with a data directory of its own that shares the converted models; stopped on exit."""
    models = _data_dir() / "models"
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="onebase-demo-") as folder:
        data = Path(folder) / "data"
        data.mkdir(mode=0o700)
        (data / "models").symlink_to(models)  # converted once; the demo's adapters stay out of the real store
        command = [sys.executable, "-m", "server.cli", "serve", "--base", BASE, "--data-dir", str(data)]
        command += ["--host", "127.0.0.1", "--port", "0", "--log-format", "text", *flags]
        log = Path(folder) / "server.log"
        with log.open("wb") as out:
            # Our own directory as the working directory: `server` is found without being installed.
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ADAPTERS.parent)
        running = Server(process, log)
        try:
            yield running
        except DemoFailed as fault:
            fault.log = running.log()
            raise
        finally:
            running.stop()


def questions(folder: Path = ADAPTERS) -> list[Question]:
    """One a `demo.json`, in the order of the adapters' names. Raises DemoFailed when there is none."""
    found = []
    for path in sorted(folder.glob("*/demo.json")):
        demo = json.loads(path.read_text(encoding="utf-8"))
        found.append(Question(path.parent.name, {"messages": demo["messages"], "max_tokens": demo["max_tokens"]}))
    if not found:
        raise DemoFailed("there is no adapters/*/demo.json to ask")
    return found


def admin_of(running: Server) -> httpx.Client:
    """A client with the admin key that the server showed at its first start."""
    found = _ADMIN_KEY.search(running.log())
    if not found:
        raise DemoFailed("the server showed no admin key")
    return client(running.url, found[1])


def client(url: str, token: str) -> httpx.Client:
    """A client that sends this key."""
    return httpx.Client(base_url=url, timeout=ANSWER_SECONDS, headers={"Authorization": f"Bearer {token}"})


def call(http: httpx.Client, method: str, path: str, **more: Any) -> Any:
    """The answer's JSON. Raises DemoFailed when it is none or a refusal."""
    try:
        response = http.request(method, path, **more)
    except httpx.HTTPError as fault:
        raise DemoFailed(f"no answer to {method} {path}: {fault}") from fault
    if not response.is_success:
        raise DemoFailed(f"{method} {path} was answered {response.status_code}: {response.text[:300]}")
    return response.json()


def settle_in(admin: httpx.Client, asked: list[Question]) -> dict[str, httpx.Client]:
    """Two tenants, each with a key and with some of the questions: clients by the questions' adapters."""
    clients: dict[str, httpx.Client] = {}
    for at, name in enumerate(TENANTS):
        call(admin, "POST", "/admin/tenants", json={"id": name})
        made = call(admin, "POST", f"/admin/tenants/{name}/keys", json={"scopes": SCOPES})
        http = client(str(admin.base_url), made["token"])
        clients |= {question.adapter: http for question in asked[at :: len(TENANTS)]}
    return clients


def ask(http: httpx.Client, question: Question, adapter: str | None) -> dict[str, Any]:
    """The answer of `adapter`, or of the base (None). Raises DemoFailed when there is none."""
    body: dict[str, Any] = call(http, "POST", "/v1/generate", json=question.body | {"adapter": adapter})
    if body["adapter"]["name"] != adapter or not body["choices"][0]["text"].strip():
        raise DemoFailed(f"{adapter or 'the base'} gave no usable answer: {json.dumps(body)[:300]}")
    return body


def ask_all(clients: dict[str, httpx.Client], asked: list[Question], progress: Progress) -> Answers:
    """Every question to its adapter and to the base, all at once: they share the server's batch."""
    wanted = [(question, adapter) for question in asked for adapter in (None, question.adapter)]
    task = progress.add_task(f"answers: 0 of {len(wanted)}", total=len(wanted))
    answers = {}
    with ThreadPoolExecutor(len(wanted)) as threads:
        jobs = {
            threads.submit(ask, clients[one.adapter], one, adapter): (one.adapter, adapter) for one, adapter in wanted
        }
        for job in as_completed(jobs):
            answers[jobs[job]] = job.result()
            progress.update(task, advance=1, description=f"answers: {len(answers)} of {len(wanted)}")
    return answers


def bills(clients: dict[str, httpx.Client], answers: Answers) -> list[dict[str, Any]]:
    """Every tenant's bills of the months in which its answers were made. Raises DemoFailed where they do not add up to
    what the answers said that they cost."""
    found = []
    for http in dict.fromkeys(clients.values()):
        mine = [answer for (adapter, _), answer in answers.items() if clients[adapter] is http]
        said = sum(answer["usage"]["cost_microusd"] for answer in mine)
        months = sorted({time.strftime("%Y-%m", time.gmtime(moment)) for moment in (START, time.time())})
        invoices = [call(http, "GET", f"/v1/invoices/{month}") for month in months]
        lines = [line for invoice in invoices for line in invoice["lines"] if line["unit"] == "tokens"]
        billed = sum(line["amount_microusd"] for line in lines)
        if billed != said:
            raise DemoFailed(f"{invoices[0]['tenant']}'s answers cost {said} micro-dollars, its bill says {billed}")
        found += [invoice for invoice in invoices if invoice["lines"]]
    return found


def main() -> int:
    """The exit status: 0 only if every answer came and the bills are what the answers cost."""
    signal.signal(signal.SIGTERM, _leave)  # so that the server is stopped too
    out, errors = Console(), Console(stderr=True, highlight=False, markup=False)
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out = Console(width=WIDTH)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    progress = Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal)
    try:
        asked = questions()
        with server("--auth", "on", "--preload", str(ADAPTERS)) as running, progress:
            starting = progress.add_task("starting the server (the first start converts the base)", total=None)
            running.wait_ready()
            progress.remove_task(starting)
            clients = settle_in(admin_of(running), asked)
            answers = ask_all(clients, asked, progress)
            owed = bills(clients, answers)
    except DemoFailed as fault:
        errors.print(f"the demo failed: {fault}", style="red", soft_wrap=True)
        if fault.log:
            lines = fault.log.splitlines()[-LOG_LINES:]
            errors.print("\n".join(["the server's last lines:", *lines]), soft_wrap=True)
        return 1
    whose = {question.adapter: TENANTS[at % len(TENANTS)] for at, question in enumerate(asked)}
    out.print(answers_table([(one.adapter, one.text) for one in asked], answers, whose))
    for invoice in owed:
        out.print(bill_table(invoice))
    return 0


def _data_dir() -> Path:
    """The data directory that `onebase serve` would use."""
    given: dict[str, Any] = {"base": BASE, "host": "127.0.0.1"}
    try:
        return Settings(**given).data_dir
    except ValidationError as fault:
        raise DemoFailed(f"the ONEBASE_ variables are not valid: {fault}") from fault


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def _leave(*_: object) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
