"""Sophia: the second-order optimizer of arXiv 2305.14342 as a one-line drop-in for AdamW in PyTorch.

    opt = Sophia(model, lr=6e-4)

The equation is in ``sophia.update_rule``, the optimizer in ``sophia.optimizer``, the estimators in
``sophia.curvature``. The lab (``sophia.lab``, command ``sophia``) needs ``pip install 'torch-sophia[lab]'``.
"""

from sophia import curvature, likelihoods
from sophia.checks import SophiaWarning
from sophia.diagnostics import advice
from sophia.optimizer import Sophia

__version__ = "0.1.0"

__all__ = ["Sophia", "SophiaWarning", "__version__", "advice", "curvature", "likelihoods"]
