"""Concept relevances of zennit-crp (arXiv 2206.03208) as node scores: a peer of the circuits' own ways to rank.

Optional: `pip install zennit-crp`. Layer-wise relevance propagation, EpsilonPlusFlat, BatchNorm folded; sums share
relevance among their inputs in the scenes' and torchvision's residual blocks, elsewhere they hand it to each.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minexp.circuit.ablation import Ablation
from minexp.circuit.ranking import Ranking
from minexp.classifier import Classifier
from minexp.data.subjects import Block
from minexp.zoos import library

NAME = "zennit-crp"


def installed() -> bool:
    """Whether zennit-crp can be imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("crp", "zennit"))


def rank_by_relevance(classifier: Classifier, ablation: Ablation) -> Ranking:
    """All nodes by their share of the class's relevance in their layer, as in zennit-crp's attribution graphs.

    Raises KeyError for a network whose nodes are not the outputs of modules, such as attention heads.
    """
    library("torchvision")  # which zennit imports, whatever torch it was built for
    from crp.attribution import CondAttribution
    from crp.concepts import ChannelConcept
    from zennit.composites import EpsilonPlusFlat

    sites = ablation.net.ablated
    with classifier.frozen() as model, torch.enable_grad():
        found = CondAttribution(model, no_param_grad=False)(
            classifier._normalise(ablation.x).detach().requires_grad_(True),
            [{"y": [label]} for label in ablation.label.tolist()],
            EpsilonPlusFlat(canonizers=[_canonizer()]),
            record_layer=[site.name for site in sites],
        )
    concept = ChannelConcept()
    scores = [concept.attribute(site.split(found.relevances[site.name]).contiguous()) for site in sites]
    together = torch.cat(scores, 1).to(ablation.x)
    return Ranking("relevance", together, together)


def _canonizer() -> Any:
    from zennit.canonizers import AttributeCanonizer, CompositeCanonizer
    from zennit.layer import Sum
    from zennit.torchvision import ResNetCanonizer

    def with_sum(name: str, module: Any) -> dict[str, Any] | None:
        if not isinstance(module, Block):
            return None
        total = Sum()

        def forward(x: Tensor) -> Tensor:
            y = module.bn2(module.conv2(F.relu(module.bn1(module.conv1(x)))))
            return F.relu(total(torch.stack([module.shortcut(x), y], -1)))

        return {"forward": forward, "canonizer_sum": total}

    return CompositeCanonizer([ResNetCanonizer(), AttributeCanonizer(with_sum)])
