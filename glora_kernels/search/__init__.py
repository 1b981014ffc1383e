"""Structure search: which configuration every layer gets, under a limit on parameters."""

from glora_kernels.search.search import Search
from glora_kernels.search.space import Candidate, LayerShape, SearchSpace, parameters_of
from glora_kernels.search.supernet import Supernet

__all__ = ["Candidate", "LayerShape", "Search", "SearchSpace", "Supernet", "parameters_of"]
