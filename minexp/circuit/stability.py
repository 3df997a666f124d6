"""How much a circuit of a set of images owes to the choice of the images."""

from __future__ import annotations

import torch

from .ablation import generator
from .circuit import Interval
from .ranking import Ranking

RESAMPLES = 100


def stability(own: Ranking, count: int, seed: int) -> Interval:
    """Jaccard index between the circuit of all images and that of a bootstrap sample of them: mean, 95 % interval.

    own: the images' own rankings; count: nodes of the circuit.
    """
    circuit = own.together().keep(count)[0]
    rng, found = generator(seed), []
    for _ in range(RESAMPLES):
        sample = torch.randint(len(own.key), (len(own.key),), generator=rng).to(own.key.device)
        other = Ranking(own.by, own.scores[sample], own.key[sample]).together().keep(count)[0]
        found.append(int((circuit & other).sum()) / int((circuit | other).sum()))
    low, high = torch.tensor(found).quantile(torch.tensor([0.025, 0.975])).tolist()
    return Interval(sum(found) / len(found), low, high, len(found))
