"""What Sophia says in a run."""

import warnings
from collections.abc import Callable
from typing import Any

from sophia import SophiaWarning


def said(run: Callable[[], Any]) -> list[str]:
    """The SophiaWarnings of a run; other warnings stay errors, but for those that pytest ignores."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")  # torch's compiler looks at all
        warnings.simplefilter("always", SophiaWarning)
        run()
    return [str(w.message) for w in heard]
