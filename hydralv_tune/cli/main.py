"""The command line: one table of commands, and one place where errors become exit codes."""

from __future__ import annotations

import codecs
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper
from typing import Any

import typer

from hydralv_tune.cli.console import say
from hydralv_tune.config.errors import HydraLVError, InputError
from hydralv_tune.config.secrets import mask_passwords

# Typer carries its own copy of Click; this is the base of its usage errors, whichever copy it is.
ClickError: type[Any] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)

EXIT_WORK_FAILED = 1
EXIT_WRONG_INPUT = 2
EXIT_INTERRUPTED = 130
TRACEBACK_VARIABLE = "HYDRALV_TUNE_TRACEBACK"
ASCII_ERRORS = "hydralv_tune.in_ascii"
IN_ASCII = {
    "–": "-", "−": "-", "…": "...", "×": "x", "·": "*", "→": "->", "≤": "<=", "≥": ">=",
    "±": "+-", "μ": "u", "µ": "u", "“": '"', "”": '"', "‘": "'", "’": "'",
}  # fmt: skip
HIDDEN_WORDS_VARIABLE = "HYDRALV_TUNE_HIDDEN_WORDS"

COMMANDS: dict[str, dict[str, str]] = {
    "Data": {
        "phantom": "data:phantom",
        "inspect": "data:inspect",
        "score": "data:score",
        "decode": "data:decode",
        "sweep": "data:sweep",
    },
    "Configurations": {
        "check": "configurations:check",
        "list": "configurations:list_",
        "import": "importing:import_",
    },
    "One candidate": {
        "train": "candidates:train",
        "predict": "candidates:predict",
        "segment": "candidates:segment",
    },
    "Studies": {
        "run": "studies:run",
        "status": "studies:status",
        "ensemble": "studies:ensemble",
        "export": "studies:export",
        "report": "studies:report",
        "dashboard": "studies:dashboard",
        "enqueue": "studies:enqueue",
        "recover": "studies:recover",
        "demo": "studies:demo",
        "doctor": "studies:doctor",
    },
}
"""The function of each command, as `module:name` in this folder, by the panel of the help."""


def command_function(address: str) -> Callable[..., None]:
    """Return the function of a command, imported now."""
    module, _, name = address.partition(":")
    function: Callable[..., None] = getattr(import_module(f"hydralv_tune.cli.{module}"), name)
    return function


def command_line(words: Sequence[str]) -> typer.Typer:
    """Return the program with the one command that is asked for, since each costs time to build.

    Help, completion and a misspelt name need all of them.

    Args:
        words: The words after the program's name.
    """
    app = typer.Typer(
        name="hydralv-tune",
        help="Search training configurations and decoding thresholds for 3D vesicle segmentation.",
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_options)
    known = {name for panel in COMMANDS.values() for name in panel}
    asked = set(words[:1]) & known or known
    for panel, commands in COMMANDS.items():
        for name in filter(asked.__contains__, commands):
            app.command(name, rich_help_panel=panel)(command_function(commands[name]))
    return app


def _version(value: bool) -> None:
    """Print the version and leave."""
    if value:
        from hydralv_tune import __version__

        print(__version__)
        raise typer.Exit


def _options(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Search training configurations and decoding thresholds for 3D vesicle segmentation."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def exit_code(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code, with every error told as the contract says.

    Args:
        arguments: The words after the program's name; those of this process by default.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        os.getcwd()
    except FileNotFoundError:
        say("error: the folder that you are in was removed. Change to one that exists: cd")
        return EXIT_WRONG_INPUT
    try:
        code = command_line(words)(args=words, standalone_mode=False)
    except ClickError as error:
        # What a parser of ours refuses is wrapped by a library that says so first.
        say(f"error: {error.format_message().replace(': Value error, ', ': ', 1)}")
        return EXIT_WRONG_INPUT
    except InputError as error:
        say(f"error: {error}")
        return EXIT_WRONG_INPUT
    except HydraLVError as error:
        code = getattr(error, "exit_code", EXIT_WORK_FAILED)
        say(str(error) if code == EXIT_INTERRUPTED else f"error: {error}")
        return int(code)
    except (KeyboardInterrupt, typer.Abort):
        say("Interrupted.")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read stdout has seen enough (`| head`); nothing more can be written there.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 0
    except MemoryError as error:
        say(
            f"error: not enough memory. {error} Take a smaller volume or batch, or another machine."
        )
        return EXIT_WORK_FAILED
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        say(
            f"error: {error.strerror or error}{place}. Check the path, its permissions and the "
            "free space."
        )
        return EXIT_WORK_FAILED
    except Exception as error:
        _tell_unexpected(error)
        return EXIT_WORK_FAILED
    return code if isinstance(code, int) else 0


def _tell_unexpected(error: Exception) -> None:
    """Say in one line what should not have happened, and how to see where it did."""
    if os.environ.get(TRACEBACK_VARIABLE):
        traceback.print_exception(error)
    lines = str(error).strip().splitlines() or ["no message"]
    say(
        f"error: {type(error).__name__}: {lines[0]} This is a fault of hydralv-tune, not of your "
        f"input. Set {TRACEBACK_VARIABLE}=1 to see where it happened, and report it."
    )


def _interrupt(number: int, frame: object) -> None:
    """End as Ctrl-C ends, so that half-written files are removed."""
    raise KeyboardInterrupt


def _tell_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Say a warning of a library in one line, without the place in its code."""
    say(f"warning: {message}")


def _words() -> list[str]:
    """Return the words after the program's name, with no password left in the process's title.

    Every user of a machine can read the command line of a process, and its owner alone the
    environment. So a process that finds passwords among its words starts itself again under the
    same number, masked, and takes them from the environment, which no child inherits.
    """
    words, number = sys.argv[1:], os.getpid()
    hidden = json.loads(os.environ.pop(HIDDEN_WORDS_VARIABLE, "{}"))
    if hidden.get("process") == number:
        return [hidden["words"].get(str(index), word) for index, word in enumerate(words)]
    found = {index: word for index, word in enumerate(words) if mask_passwords(word) != word}
    if found:
        os.environ[HIDDEN_WORDS_VARIABLE] = json.dumps({"process": number, "words": found})
        with suppress(OSError):
            os.execv(sys.executable, [sys.executable, *map(mask_passwords, sys.orig_argv[1:])])
        del os.environ[HIDDEN_WORDS_VARIABLE]
    return words


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """Return what stands for characters that the terminal's encoding does not have."""
    assert isinstance(error, UnicodeEncodeError)
    lost = error.object[error.start : error.end]
    return "".join(IN_ASCII.get(character, "?") for character in lost), error.end


def main() -> None:
    """Run the command line of this process and exit."""
    codecs.register_error(ASCII_ERRORS, _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=ASCII_ERRORS)
    words = _words()
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as `nohup` has it
        signal.signal(signal.SIGHUP, _interrupt)
    warnings.showwarning = _tell_warning
    sys.exit(exit_code(words))
