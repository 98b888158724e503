"""The live page: a federation or a run to watch in a browser, without internet and read-only."""

from atoll.errors import require

require("starlette", "atoll[page]", "the live page")

from atoll.view.page.app import Page, asgi  # noqa: E402
from atoll.view.page.folders import FolderSource  # noqa: E402
from atoll.view.page.source import Source, Unknown  # noqa: E402

__all__ = ["FolderSource", "Page", "Source", "Unknown", "asgi"]
