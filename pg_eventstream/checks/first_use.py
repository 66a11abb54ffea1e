"""Says in the log what the system checks find, where no command has run them.

Application servers (uvicorn, gunicorn) run no checks. So they are run with a process's first
request, whatever it asks for, and by a publisher that starts.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from django.core.checks import ERROR

from ..rarely import Rarely
from . import settings as checks

logger = logging.getLogger(__name__)

_is_due = Rarely(math.inf)


def report(**kwargs: Any) -> None:
    """Log what is wrong with the settings, once. Also a receiver of request_started."""
    if not _is_due():
        return
    try:
        found = checks.check_settings()
    except Exception:
        logger.exception("the system checks of pg_eventstream failed")
        return
    for message in found:
        if not message.is_silenced():
            level = logging.ERROR if message.level >= ERROR else logging.WARNING
            logger.log(level, "%s %s (%s)", message.msg, message.hint, message.id)
