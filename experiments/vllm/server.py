"""A vLLM server of one variant on the loopback interface, which is stopped whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
LOG_LINES = 15
_STOPPING_SECONDS = 30.0
_POLLING_SECONDS = 0.5


class ServerError(RuntimeError):
    """The server did not become ready, or is gone."""


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Args:
        url: without a path.
        log: the file of its output.
        process: vLLM's front end, the leader of the group of all its processes.
    """

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def encoder_seconds(self) -> float | None:
        """Seconds spent in the vision encoder since the last question, of the slowest worker; None where not told."""
        try:
            answer = _post(f"{self.url}/collective_rpc", {"method": "encoder_seconds"})
        except (OSError, ValueError):
            return None
        return max((float(worker["seconds"]) for worker in answer["results"]), default=None)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return int(sock.getsockname()[1])


def check_port(port: int) -> None:
    """Raises OSError where somebody listens on this port of the loopback interface."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((HOST, port))
        except OSError as error:
            raise OSError(f"--port: got {port}, expected one that nothing uses: {error.strerror}") from error


@contextlib.contextmanager
def serving(
    command: Sequence[str], *, port: int, log: Path, variables: Mapping[str, str], timeout: float
) -> Iterator[Server]:
    """Run a server for the duration of the block.

    Args:
        command: starts it, `--host` and `--port` excluded.
        port: on the loopback interface.
        log: gets what it prints.
        variables: its environment.
        timeout: seconds until it must be ready.

    Raises:
        ServerError: it ended before it was ready, or was not ready in time; the message has the end of its log.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", HOST, "--port", str(port)],
            env=dict(variables), stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        server = Server(f"http://{HOST}:{port}", log, process)
        _wait_until_ready(server, timeout)
        yield server
    finally:
        _stop(process)


def vllm_command(*arguments: str) -> list[str]:
    """The command line of vLLM in this environment."""
    return [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", *arguments]


def end_of(log: Path) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])


def _wait_until_ready(server: Server, timeout: float) -> None:
    start = time.monotonic()
    while time.monotonic() - start < timeout:
        if (status := server.process.poll()) is not None:
            raise ServerError(f"the server ended with status {status} before it was ready:\n{end_of(server.log)}")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{server.url}/health", timeout=5):
            return
        time.sleep(_POLLING_SECONDS)
    raise ServerError(f"the server was not ready after {timeout:.0f} s:\n{end_of(server.log)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the whole group: asked first, killed when it does not listen or leaves processes behind."""
    for number, seconds in ((signal.SIGTERM, _STOPPING_SECONDS), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


def _post(url: str, body: dict[str, Any]) -> Any:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)
