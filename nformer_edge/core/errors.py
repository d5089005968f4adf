"""What can go wrong, in a few kinds. Each error says what was got, what was expected and what to do."""

from __future__ import annotations


class Error(Exception):
    """Root of every error that this package raises on purpose.

    Args:
        subject: what the error is about, such as a path or an argument's name.
        got: what was found.
        expected: what should have been there.
        hint: one imperative sentence that says what to do.

    The message reads ``subject: got X, expected Y. Hint.`` with absent parts left out.
    """

    exit_code = 2

    def __init__(self, subject: str, got: object = None, expected: object = None, hint: str = "") -> None:
        facts = [f"{word} {value}" for word, value in (("got", got), ("expected", expected)) if value is not None]
        message = f"{subject}: {', '.join(facts)}" if facts else subject
        if hint:
            message = f"{message.rstrip('.')}. {hint}"
        super().__init__(message)
        self.subject = subject
        self.got = got
        self.expected = expected
        self.hint = hint


class UsageError(Error):
    """An argument, flag or configuration value that cannot be used."""


class DataError(Error):
    """Images, labels or features that cannot be used."""


class ArtifactError(Error):
    """A checkpoint, bundle, engine or report that is missing, damaged or of another version."""


class BackendError(Error):
    """A backend that is not installed here, or that refused the work."""


class GateError(Error):
    """A parity gate that does not hold. The command's exit code is 1, not 2."""

    exit_code = 1
