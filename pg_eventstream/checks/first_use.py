"""Logs the results of the checks in processes where no command runs them.

Application servers (uvicorn, gunicorn) run no checks. So the checks run with the first request of
a process, for any URL, and when a publisher starts.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from django.core.checks import ERROR

from ..rarely import Rarely
from . import settings as checks

logger = logging.getLogger("pg_eventstream.first_use")

_is_due = Rarely(math.inf)


def report(**kwargs: Any) -> None:
    """Log what is wrong with the settings, once per process. A receiver of request_started."""
    if not _is_due():
        return
    try:
        messages = checks.check_settings()
    except Exception:
        logger.exception(
            "the system checks of pg_eventstream failed",
            extra={"event": "unexpected-error", "part": "checks"},
        )
        return
    for message in messages:
        if not message.is_silenced():
            level = logging.ERROR if message.level >= ERROR else logging.WARNING
            logger.log(
                level,
                "%s %s (%s)",
                message.msg,
                message.hint,
                message.id,
                extra={"event": "check-failed", "check": message.id},
            )
