"""Secrets in URLs, and the whole text of an error that must not hold them."""

from __future__ import annotations

import traceback

from hypothesis import strategies as st

delimiters = st.sampled_from(
    [*"/?#@:%[]&=. \n\t", "::", "%4", "%FF", "%00", "%40", "é", "ß", "\udcff", "heartbeat=", "99"]
)


SECRET = "s3cr3t"


def text_of(error: BaseException) -> str:
    """All that a traceback or an error reporter may show of an error, chained ones included."""
    chained = [error]
    while chained[-1].__cause__ or chained[-1].__context__:
        chained.append(chained[-1].__cause__ or chained[-1].__context__ or error)
    shown = [repr(exc) + repr(vars(exc)) for exc in chained]
    # The last line of each only: those above quote the source.
    return "".join(
        shown + [line for exc in chained for line in traceback.format_exception_only(exc)]
    )
