"""`chorus serve RUN...`: an ensemble behind OpenAI's protocol."""

import argparse
import os
import signal
import socket
import sys
from collections.abc import Sequence

from chorus.errors import SIGNALS, InputError
from chorus.progress import IMPORTING, announced

API_KEY = "CHORUS_API_KEY"
LONGEST = 4096  # default limit on a text's tokens: every KV cache is that long
TEXTS = {"cuda": 32, "cpu": 8}

EPILOG = """examples:
  chorus serve runs/default --port 8000
  CHORUS_API_KEY=secret chorus serve runs/default --host 0.0.0.0

  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "mixture", "messages": [{"role": "user", "content": "Ada has 2 apples and ..."}]}'

RUN is an output folder, a checkpoint, or PEFT LoRA folders. The models are mixture, agent_0, ... and base.
SIGTERM or Ctrl-C: no request is taken any more, those that were are finished."""


def main(arguments: Sequence[str]) -> None:
    """Load, then answer until a signal comes.

    Raises:
        InputError: the paths hold no ensemble, or the address cannot be used.
    """
    from chorus.commands.options import Parser, add_place_options, at_least_1

    parser = Parser(
        "chorus serve",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Serve an ensemble.",
        epilog=EPILOG,
    )
    about = "an output folder, a checkpoint, or PEFT LoRA folders"
    parser.add_argument("run", metavar="RUN", nargs="+", help=about)
    parser.add_argument("--host", default="127.0.0.1", help="127.0.0.1: this machine alone")
    parser.add_argument("--port", type=_port, default=8000, help="8000; 0 takes a free one")
    parser.add_argument("--api-key", metavar="KEY", help=f"asked of every client; better set {API_KEY}")
    parser.add_argument(
        "--max-length",
        metavar="N",
        type=at_least_1,
        help=f"tokens of a text, with its prompt; up to {LONGEST}",
    )
    parser.add_argument(
        "--max-texts", metavar="N", type=at_least_1, help="answered at a time: 32 on a GPU, 8 on a CPU"
    )
    parser.add_argument(
        "--max-waiting", metavar="N", type=at_least_1, default=256, help="requests that may wait: 256"
    )
    add_place_options(parser)
    options = parser.parse_intermixed_args(arguments)
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(
            f"chorus serve: the package {error.name} is missing; pip install 'chorus[serve]'"
        ) from None
    api_key = options.api_key or os.environ.get(API_KEY) or None
    with _listening(options.host, options.port) as listener:
        _serve(options, listener, api_key)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 65535")
    return int(text)


def _listening(host: str, port: int) -> socket.socket:
    """A socket on the address, opened before the seconds of loading.

    Raises:
        InputError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise InputError(f"--host {host} --port {port}: {error.strerror or error}; choose another") from None
    return listener


def _serve(options: argparse.Namespace, listener: socket.socket, api_key: str | None) -> None:
    with announced(IMPORTING):
        import uvicorn

        from chorus.ensemble.decoding_batch import steps_at_a_time
        from chorus.monitoring.run_log import quiet_libraries
        from chorus.serving.app import build_app
        from chorus.serving.opened import open_ensemble
        from chorus.serving.scheduler import Scheduler

    quiet_libraries()
    opened = open_ensemble(options.run, options.model, options.precision, options.device, options.form)
    agents = opened.ensemble.agents
    device = next(agents.parameters()).device
    beyond = steps_at_a_time(device)  # the last steps of a text may reach beyond its end
    most = opened.positions - beyond
    length = options.max_length or min(most, LONGEST)
    if length > most:
        raise InputError(
            f"--max-length {length}: the base has {opened.positions} positions, of which {beyond} stay free; "
            f"name at most {most}"
        )
    max_texts = options.max_texts or TEXTS[device.type]
    scheduler = Scheduler(agents, opened.answerers, length + beyond, max_texts, options.max_waiting)
    server = uvicorn.Server(uvicorn.Config(build_app(opened, scheduler, api_key), log_level="warning"))
    host, port, *_ = listener.getsockname()
    is_open = host not in ("127.0.0.1", "::1") and api_key is None
    warning = f"; anyone who reaches {host} may ask: set {API_KEY}" if is_open else ""
    url = f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
    print(f"serving {', '.join(opened.names)} at {url}{warning}", file=sys.stderr, flush=True)
    # uvicorn raises the signal again at its end, which would change the exit code.
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: None)
    server.run(sockets=[listener])
