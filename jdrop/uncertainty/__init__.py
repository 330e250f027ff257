"""Monte Carlo dropout: samples of a network, each under its own key, and what they say about uncertainty.

A network with dropout, ``fn(key, *args)``, is one sampled network for each key. What its keys and axes share decides
what is sampled:

- The same sampled network for all inputs: a function that can be evaluated anywhere, as Thompson sampling and BatchBALD
  need. Share decisions over the batch with ``shared_axes=0``, or write the network for one example and map it over
  examples with ``jax.vmap``, with the same key for all.
- A mask for each example: independent draws, as in training. Let ``fn`` drop a batch as usual.

Dropout stays on because ``fn`` passes ``train=True`` to it. Nothing else has a mode: BatchNorm can evaluate meanwhile.
"""

from jdrop.uncertainty._decomposition import expected_entropy as expected_entropy
from jdrop.uncertainty._decomposition import mutual_information as mutual_information
from jdrop.uncertainty._decomposition import predictive_entropy as predictive_entropy
from jdrop.uncertainty._decomposition import variance_split as variance_split
from jdrop.uncertainty._monte_carlo import mc_moments as mc_moments
from jdrop.uncertainty._monte_carlo import mc_samples as mc_samples

__all__ = ["expected_entropy", "mc_moments", "mc_samples", "mutual_information", "predictive_entropy", "variance_split"]
