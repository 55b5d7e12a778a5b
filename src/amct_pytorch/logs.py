"""Where the toolkit's log lines go: the console, and a file for flows that write files."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

LOGGER_NAME = "amct_pytorch"
LOG_FILE = Path("amct_log") / "amct_pytorch.log"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
FORMAT = "%(asctime)s %(levelname)s [amct_pytorch] %(message)s"

logger = logging.getLogger(LOGGER_NAME)


class _Console(logging.StreamHandler):
    """Writes to whatever sys.stderr is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _FileOnly(logging.Filter):
    """Keeps lines below the console's level in our file, away from the application's handlers."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= _level("AMCT_LOG_LEVEL", "WARNING"):
            return True
        for handler in logger.handlers:
            if getattr(handler, "amct", False) and record.levelno >= handler.level:
                handler.handle(record)
        return False


def start_logging(*, to_file: bool) -> None:
    """Sets up console and file logging; called by each flow, never at import.

    The console shows AMCT_LOG_LEVEL (default WARNING) and above, the file
    ``amct_log/amct_pytorch.log`` in the working directory AMCT_LOG_FILE_LEVEL (default INFO)
    and above. Handlers that the application gave the logger itself are left alone.

    Args:
        to_file: whether the flow writes other files too, so that a log file may be made.
    """
    ours = [h for h in logger.handlers if getattr(h, "amct", False)]
    console = next((h for h in ours if not isinstance(h, logging.FileHandler)), None)
    if console is None and not logger.handlers and not logging.root.handlers:
        console = _Console()
        _adopt(console)
    if console is not None:
        console.setLevel(_level("AMCT_LOG_LEVEL", "WARNING"))
    if to_file:
        _log_to(LOG_FILE.absolute())
    if not any(isinstance(f, _FileOnly) for f in logger.filters):
        logger.addFilter(_FileOnly())
    logger.setLevel(logging.DEBUG)


def _log_to(path: Path) -> None:
    for handler in list(logger.handlers):
        if isinstance(handler, logging.FileHandler) and getattr(handler, "amct", False):
            if Path(handler.baseFilename) == path and path.exists():
                handler.setLevel(_level("AMCT_LOG_FILE_LEVEL", "INFO"))
                return
            logger.removeHandler(handler)
            handler.close()
    try:
        path.parent.mkdir(exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        logger.warning("no log file: cannot write %s: %s", path, error.strerror or error)
        return
    handler.setLevel(_level("AMCT_LOG_FILE_LEVEL", "INFO"))
    _adopt(handler)


def _adopt(handler: logging.Handler) -> None:
    handler.amct = True  # type: ignore[attr-defined]
    handler.setFormatter(logging.Formatter(FORMAT))
    logger.addHandler(handler)


def _level(variable: str, default: str) -> int:
    wanted = os.environ.get(variable, default).upper()
    if wanted not in LEVELS:
        logger.warning("%s is %r; allowed are %s; using %s", variable, wanted, LEVELS, default)
        wanted = default
    return int(getattr(logging, wanted))
