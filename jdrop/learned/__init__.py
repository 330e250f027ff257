"""Dropout with learned rates: concrete dropout, and variational dropout with a variance for each weight.

Both add a term to the loss: a Kullback-Leibler divergence, divided by the number of training examples for a mean loss.
"""

from jdrop.learned._concrete import concrete_dropout as concrete_dropout
from jdrop.learned._concrete import concrete_regularizer as concrete_regularizer
from jdrop.learned._variational import variational_dense as variational_dense
from jdrop.learned._variational import variational_keep as variational_keep
from jdrop.learned._variational import variational_kl as variational_kl

__all__ = ["concrete_dropout", "concrete_regularizer", "variational_dense", "variational_keep", "variational_kl"]
