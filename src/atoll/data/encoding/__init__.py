"""What the columns of a table become, agreed between sites, and kept as readable JSON."""

from atoll.data.encoding.agreement import agree
from atoll.data.encoding.encoding import Encoding
from atoll.data.encoding.summary import Summary, summarize

__all__ = ["Encoding", "Summary", "agree", "summarize"]
