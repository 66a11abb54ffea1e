"""Pages in a real Chromium."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from playwright import async_api

from tests.support.programs import installed

_T = TypeVar("_T")


class Browser:
    """A headless Chromium: by default its headless shell, or ``chromium`` where there is none.

    The shell is the same engine without the rest of the browser. A page costs a fifth of the
    processor time there, but a page that is left is not kept for its return.

    Playwright's event loop runs on a separate thread. Its synchronous interface would leave a loop
    marked as running on the thread of the tests, where asyncio.run() and Django's ORM would then
    refuse to work.
    """

    def __init__(self, program: str | None = None) -> None:
        self._program = program or shutil.which("chromium-headless-shell") or "chromium"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Browser:
        self._thread.start()
        self._playwright = self.run(async_api.async_playwright().start())
        self._browser = self.run(
            self._playwright.chromium.launch(
                executable_path=installed(self._program),
                args=["--no-sandbox"],
                # As in a user's browser: a page that is left is frozen and restored unchanged.
                ignore_default_args=["--disable-back-forward-cache"],
            )
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.run(self._browser.close())
        self.run(self._playwright.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def new_page(self) -> Page:
        """A page with separate cookies and storage."""
        return self.run(self._new_page())

    async def _new_page(self) -> Page:
        context = await self._browser.new_context()
        return Page(self, context, await context.new_page())

    def run(self, work: Coroutine[Any, Any, _T], timeout: float = 60) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)


class Page:
    """A page, with its log and its requests."""

    def __init__(
        self, browser: Browser, context: async_api.BrowserContext, page: async_api.Page
    ) -> None:
        self._browser = browser
        self._context = context
        self._page = page
        self.console: list[str] = []
        """The messages that the page logged, and its uncaught errors."""
        self.requests: list[str] = []
        """The URLs that it requested."""
        page.on("console", lambda message: self.console.append(message.text))
        page.on("pageerror", lambda error: self.console.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def goto(self, url: str) -> None:
        self._browser.run(self._page.goto(url))

    def go_back(self) -> None:
        self._browser.run(self._page.go_back(wait_until="commit"))

    def evaluate(self, expression: str, argument: Any = None) -> Any:
        """The value of an expression, or the result of a function called with the argument."""
        return self._browser.run(self._page.evaluate(expression, argument))

    def wait_for(self, expression: str, argument: Any = None, timeout: float = 30) -> None:
        """Wait until the expression is true in the page. Raises after ``timeout`` seconds."""
        self._browser.run(
            self._page.wait_for_function(
                expression, arg=argument, timeout=timeout * 1000, polling=20
            ),
            timeout + 30,
        )

    def set_offline(self, offline: bool) -> None:
        self._browser.run(self._context.set_offline(offline))

    def add_cookie(self, url: str, name: str, value: str) -> None:
        self._browser.run(self._context.add_cookies([{"url": url, "name": name, "value": value}]))

    def screenshot(self, path: Path) -> None:
        self._browser.run(self._page.screenshot(path=path))

    def close(self) -> None:
        self._browser.run(self._context.close())
