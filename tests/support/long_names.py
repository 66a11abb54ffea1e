"""Channels with names of the maximum length."""

from __future__ import annotations

import random
from typing import Any

from pg_eventstream.channelmanager import DefaultChannelManager

SHAPES = {
    "short": "x",
    "letters": "abcdefghijklmnopqrstuvwxyz0123456789-",
    "one letter": "a",
    "Japanese": "".join(map(chr, range(0x4E00, 0x9000))),
    "emoji": "".join(map(chr, range(0x1F300, 0x1F5FF))),
    "percent": "%",
    "commas": ",:; /",
}


def names(shape: str, run: str, count: int = 19, length: int = 255) -> list[str]:
    """Channel names of the maximum length that do not compress."""
    length = 10 if shape == "short" else length
    choose = random.Random(shape)
    tail = length - len(run) - 3
    return [f"{run}{n:02} " + "".join(choose.choices(SHAPES[shape], k=tail)) for n in range(count)]


class ByShape(DefaultChannelManager):
    """Names channels as a URLconf could, according to the request header X-Names."""

    def get_channels_for_request(self, request: Any, view_kwargs: Any) -> Any:
        if "X-Names" not in request.headers:
            return super().get_channels_for_request(request, view_kwargs)
        shape, run, length = request.headers["X-Names"].split(",")
        return names(shape, run, length=int(length))


SETTINGS = {
    "EVENTSTREAM_CHANNEL_LIMIT": 19,
    "EVENTSTREAM_CHANNELMANAGER_CLASS": "tests.support.long_names.ByShape",
}
