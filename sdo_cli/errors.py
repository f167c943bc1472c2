"""Errors by whose fault they are. Each carries what went wrong and what to do about it."""

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
# stopped on a signal or before a time limit, saved: start it again (sysexits' EX_TEMPFAIL)
EXIT_REQUEUE = 75


class SdoError(Exception):
    """Something the user can act on.

    Args:
        message: one sentence, the cause.
        remedy: what to do, or the next command to type.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message, self.remedy = message, remedy
        if remedy:
            # tracebacks show it, also in notebooks
            self.add_note(remedy)


class RecipeFault(SdoError):
    """The recipe, an override or a command-line value; ``problems`` holds every one that was found."""

    def __init__(self, problems: list[str], *, what: str = "recipe") -> None:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in the {what}"
        super().__init__(count + ":\n" + "\n".join(f"  {line}" for line in problems))
        self.problems = problems


class EnvironmentFault(SdoError):
    """Something missing or broken on this machine: weights, a package, a folder."""


class TrainingFault(SdoError):
    """Training went wrong in a way only other settings can mend."""


class Interrupted(SdoError):
    """The user pressed Ctrl-C."""

    exit_code = EXIT_INTERRUPTED


class CheckpointFault(SdoError):
    """A checkpoint that is damaged, missing, or of another run."""


class Preempted(SdoError):
    """The run was told to stop, saved what it had, and can be started again with the same command."""

    exit_code = EXIT_REQUEUE


class SolverFault(SdoError):
    """A solver that does not keep the affine identity, or is unknown."""


class PluginFault(SdoError):
    """A file given with --plugin, or a rule it brought, does not do what it should."""


def is_out_of_memory(fault: BaseException) -> bool:
    """Of a GPU, or of the machine itself, as torch and Python raise it."""
    return (
        type(fault).__name__ == "OutOfMemoryError"
        or isinstance(fault, MemoryError)
        or "can't allocate memory" in str(fault)
    )


def first_line(fault: BaseException) -> str:
    """The first line of its text that says something; its class where none does."""
    return next((line for line in str(fault).splitlines() if line.strip("=- ")), type(fault).__name__)


class Stopped(Exception):
    """Raised at a safe point, in all processes of a job; ``reason`` is a signal's name or ``time limit``."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
