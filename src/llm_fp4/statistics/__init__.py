"""What calibration gathers of the inputs of linears, for the search."""

from llm_fp4.statistics.gram import Gram
from llm_fp4.statistics.site import Importance, SiteStatistics
from llm_fp4.statistics.tokens import CHUNK, FloatRows, TokenStore

__all__ = ["CHUNK", "FloatRows", "Gram", "Importance", "SiteStatistics", "TokenStore"]
