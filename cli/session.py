"""One run of the command line: its flags, its log file, its clock, and how it ends."""

from __future__ import annotations

import logging
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from medvision._version import __version__
from medvision.cli.console import is_live, print_json, print_summary, show_progress, stop_on_signals
from medvision.cli.errors import (
    as_document,
    as_medvision_error,
    complain,
    format_traceback,
    is_usage_error,
    render,
)
from medvision.errors import Interrupted
from medvision.progress import ProgressCallback, StopCallback

LOG_NAME = "log.txt"
_CODES_WORTH_A_LOG = (1, 5)


class Session:
    """Keep what every command shares; ``arguments`` are those of the command line.

    The flags are looked up in the raw arguments, because a usage error comes before any parsing.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self.json = "--json" in arguments
        self.debug = "--debug" in arguments
        self.quiet = "--quiet" in arguments
        self._command_line = shlex.join(["medvision", *arguments])
        self._started = time.monotonic()
        self._folder: Path | None = None
        self._log_name = LOG_NAME
        self._unwritten: list[str] = []
        self.log(f"medvision {__version__}, Python {platform.python_version()}")
        self.log(self._command_line)

    def start(self, *, json: bool, quiet: bool, debug: bool) -> None:
        """Take the flags as parsed, whichever side of the command's name they stood on."""
        self.json, self.quiet, self.debug = (
            self.json or json,
            self.quiet or quiet,
            self.debug or debug,
        )

    @property
    def seconds(self) -> float:
        """Seconds since the command started."""
        return time.monotonic() - self._started

    @property
    def log_path(self) -> Path | None:
        """The log file, if there is an output folder that it is in."""
        if self._folder is None or not self._folder.is_dir():
            return None
        return self._folder / self._log_name

    def log_in(self, folder: Path, name: str = LOG_NAME) -> None:
        """Keep the log in ``folder``, from the moment that it exists."""
        self._folder, self._log_name = folder, name

    def log(self, text: str) -> None:
        """Add a line with the time to the log; a log that cannot be written stops no work."""
        self._unwritten.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        if self.log_path is not None:
            self._write_log(self.log_path)

    @contextmanager
    def work(self) -> Iterator[tuple[ProgressCallback, StopCallback]]:
        """Show progress and catch signals while the library works."""
        with (
            _library_log(self.log),
            stop_on_signals() as should_stop,
            show_progress(quiet=self.quiet, log=self.log) as on_progress,
        ):
            try:
                yield on_progress, should_stop
            except KeyboardInterrupt as error:
                raise Interrupted("Interrupted.", do="Run the same command again.") from error

    def finish(
        self,
        title: str,
        facts: Mapping[str, object],
        document: Mapping[str, object],
        *,
        exit_code: int = 0,
    ) -> int:
        """Print the summary, or ``document`` with ``--json``; return the exit code."""
        seconds = round(self.seconds, 1)
        self.log(f"{title} ({seconds} s, exit code {exit_code})")
        if self.json:
            print_json({**document, "seconds": seconds, "exit_code": exit_code})
        else:
            shown = dict(facts)
            following = shown.pop("next", None)
            print_summary(title, {**shown, "seconds": seconds, "next": following})
        return exit_code

    def fail(self, error: BaseException) -> int:
        """Print what went wrong, in at most six lines, and return the exit code."""
        if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help page
            complain([str(error)])
            return 2
        known = as_medvision_error(error)
        log = None if is_usage_error(error) else self._log_failure(error, known.exit_code)
        if self.debug and not is_usage_error(error):
            complain([format_traceback(error)])
        on_terminal = sys.stderr.isatty()
        width = shutil.get_terminal_size().columns if on_terminal else 10_000
        complain([render(known, log=log, color=is_live(sys.stderr), width=width)])
        if self.json:
            print_json(as_document(known, log))
        return known.exit_code

    def _log_failure(self, error: BaseException, exit_code: int) -> Path | None:
        """Put the traceback into the log; without an output folder, into the temporary folder."""
        self._unwritten.append(format_traceback(error))
        path = self.log_path
        if path is None and exit_code in _CODES_WORTH_A_LOG:
            path = Path(tempfile.gettempdir()) / f"medvision-{os.getpid()}.log"
        return path if path is not None and self._write_log(path) else None

    def _write_log(self, path: Path) -> bool:
        try:
            with path.open("a", encoding="utf-8") as stream:
                stream.writelines(self._unwritten)
        except OSError:
            return False
        self._unwritten.clear()
        return True


@contextmanager
def _library_log(log: Callable[[str], object]) -> Iterator[None]:
    """Send medvision's own log records, and where warnings came from, to the log file.

    The texts of other packages' warnings are left out: pydicom's quote values, and so patient data.
    """
    handler = _Forward(log)
    logger = logging.getLogger("medvision")
    logger.addHandler(handler)

    def keep_place(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        log(f"warning: {category.__name__} in {filename}:{lineno}")

    with warnings.catch_warnings():
        warnings.showwarning = keep_place
        try:
            yield
        finally:
            logger.removeHandler(handler)


class _Forward(logging.Handler):
    def __init__(self, write: Callable[[str], object]) -> None:
        super().__init__(logging.INFO)
        self.write = write

    def emit(self, record: logging.LogRecord) -> None:
        """Pass one record on."""
        self.write(f"{record.levelname.lower()}: {record.getMessage()}")
