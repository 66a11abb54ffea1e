"""Consumers of the test project, as the environment says: see `tests.support.consumers`."""

import json
import os

from pg_eventstream.consumers import Retry, consumer
from tests.support import handlers

for _declaration in json.loads(os.environ.get("PG_EVENTSTREAM_TEST_CONSUMERS", "[]")):
    _handler = getattr(handlers, _declaration.pop("handler"))
    if "retry" in _declaration:
        _declaration["retry"] = Retry(**_declaration["retry"])
    consumer(**_declaration)(handlers.named(_handler, _declaration["name"]))
