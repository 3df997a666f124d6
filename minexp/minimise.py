"""1-minimality: cells of a mask are removed until the predicate fails without any single one of them.

Delta debugging (Zeller and Hildebrandt 2002) on a grid, from coarse cells to fine ones, many images at once: the cells
that matter least by gradient go together, by bisection, then each remaining one is tried alone, round and round, until
a whole round against the same mask has failed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice

import torch
import torch.nn.functional as F
from torch import Tensor

from .backgrounds import RANDOM
from .judge import GRADIENT, Judge, Verdict, harder
from .repair import Masks

CHECKS = 4  # of the predicate's checks that a draft is held to
FEW = 8  # cells that are tried one by one at once


@dataclass(frozen=True)
class Minimisation:
    """How to minimise: ``cell`` side in pixels, by default one of ``parts`` of the image's shorter side.
    Finer cells give smaller masks that hold on fewer backgrounds not seen.

    levels: grids tried, each with cells twice as wide as the next, the last of side ``cell``.
    max_evals: evaluations an image may spend here; what is left then may not be minimal, and says so. A later call
    on the result goes on from it. ahead: cells of one image tried at once in a round that is likely to fail, by
    default 4 on a GPU, where more are faster, and 1 elsewhere, where they only cost evaluations.
    """

    cell: int | None = None
    parts: int = 4
    levels: int = 1
    max_evals: int | None = None
    ahead: int | None = None

    def lookahead(self, device: torch.device) -> int:
        """Cells of one image tried at once on a device."""
        return (1 if device.type == "cpu" else 4) if self.ahead is None else self.ahead

    def side(self, shape: torch.Size) -> int:
        """The cell's side in pixels for images [..., H, W]."""
        return max(1, min(shape[-2:]) // self.parts) if self.cell is None else self.cell


def minimise(
    judge: Judge, x: Tensor, decision: Tensor, start: Masks, settings: Minimisation = Minimisation()
) -> Masks:
    """Masks within ``start`` that hold, and no single cell of which can go, where ``minimal_at`` says so.

    A mask of ``start`` that does not hold is returned as it is. The answer for an image depends on nothing else.
    """
    side = settings.side(x.shape)
    search = _Search(judge, x, decision, start, settings)
    with judge.classifier.frozen():
        search.probe()
        for level in reversed(range(settings.levels)):
            search.level(side * 2**level)
        search.prove(side)
    return replace(
        start,
        masks=search.masks,
        evaluations=search.spent,
        scores=search.scores,
        margins=None,
        minimal_at=torch.where(search.minimal, side, 0),
    )


def single_cells(masks: Tensor, cell: int) -> list[Tensor]:
    """For each of masks [B,1,H,W] all masks [n,1,H,W] that lack one of its cells: what 1-minimality is about."""
    found = []
    for mask in masks:
        present = _present(mask[None], cell)[0].nonzero().flatten()
        grid = _present(mask[None], cell).shape[1]
        one = torch.zeros(len(present), grid, dtype=torch.bool, device=masks.device)
        one[torch.arange(len(present)), present] = True
        found.append(mask[None] & ~_spread(one, cell, mask.shape[1:]))
    return found


class _Search:
    """The state of all images of a batch; each proceeds as it would alone.

    ``masks`` satisfy the predicate. A draft goes ahead of them on a few checks, those that were passed by least: cells
    leave it one after another (``step`` says when), until it is settled how many of them may.
    """

    def __init__(
        self, judge: Judge, x: Tensor, decision: Tensor, start: Masks, settings: Minimisation
    ) -> None:
        self.judge, self.x, self.decision, self.settings = judge, x, decision, settings
        self.masks, self.scores = start.masks.clone(), start.scores.clone()
        self.spent = start.evaluations.clone()
        self.limit = None if settings.max_evals is None else start.evaluations + settings.max_evals
        self.holds = start.holds
        self.minimal = torch.zeros_like(start.holds)
        self.hints = torch.zeros(len(x), judge.checks, device=x.device)
        self.probed = start.margins is not None and start.margins.shape == self.hints.shape
        if self.probed and start.margins is not None:
            self.hints = -start.margins
        # what the drafts were asked last, and passed
        unasked = torch.full_like(self.hints, torch.nan)
        self.draft = Verdict(self.holds, torch.zeros_like(self.spent), self.scores.clone(), unasked)
        self.fatal = torch.full((len(x), 0), -1, device=x.device)
        self.importance = torch.zeros_like(x[:, :1])

    def affordable(self) -> Tensor:
        """Which images [B] hold and may still spend."""
        return self.holds if self.limit is None else self.holds & (self.spent < self.limit)

    def active(self) -> Tensor:
        return self.affordable().nonzero().flatten()

    def ask(
        self,
        index: Tensor,
        candidates: Tensor,
        checks: Tensor | None = None,
        *,
        first: Tensor | None = None,
        drafts: bool = False,
    ) -> Verdict:
        """Which candidates [n,1,H,W] for the images ``index`` [n] hold, or pass ``checks`` [n,D].

        first [n]: number of a check to begin with, -1 for none. drafts: the candidates are the drafts themselves.
        """
        x, decision, hints = self.x[index], self.decision[index], self.hints[index]
        urgent = hints
        if first is not None:
            urgent = hints.clone()
            urgent[first >= 0, first[first >= 0]] = torch.inf
        if checks is None:
            known = self.draft.of(index) if drafts else None
            found = self.judge.holds(x, decision, candidates, hints=urgent, known=known)
        else:
            found = self.judge.passes(x, decision, candidates, checks, urgent)
            passed = index[found.ok]
            self.draft.margins[passed] = found.margins[found.ok]
            self.draft.scores[passed] = found.scores[found.ok]
        # of an image's candidates, which come one after another
        lead = torch.ones_like(index, dtype=torch.bool)
        lead[1:] = index[1:] != index[:-1]
        self.hints[index[lead]] = harder(found.margins, hints)[lead]
        self.spent.index_add_(0, index, found.spent)
        return found

    def probe(self) -> None:
        """Ask every early check of the masks once, where what passed them did not say by how much."""
        active = self.active()
        if len(active) and not self.probed:
            early = self.judge.early().expand(len(active), -1)
            found = self.judge.passes(
                self.x[active], self.decision[active], self.masks[active], early, self.hints[active]
            )
            self.hints[active] = harder(found.margins, self.hints[active])
            self.spent[active] += found.spent

    def level(self, side: int) -> None:
        """Remove cells of this side on a draft, and keep as much of that as the predicate allows."""
        active = self.active()
        present = _present(self.masks, side)
        self.fatal = torch.full(present.shape, -1, device=active.device)
        if not len(active):
            return
        self.weigh(active[~self._told_apart(active, side)])
        rank, count = self.ranked(active, side)
        step = torch.full_like(rank, -1)  # when a cell left the draft
        hard = self.judge.early() & (
            self.hints[active] >= _kth(self.hints[active], self.judge.early(), CHECKS)
        )
        self.together(active, side, rank, count, step, hard)
        self.singly(active, side, rank, step, hard)
        self.settle(active, side, step, hard)

    def _told_apart(self, index: Tensor, side: int) -> Tensor:
        """Whether the masks ``index`` [n] have few cells, and these hold more or fewer pixels, or have one: [n]."""
        filled = F.avg_pool2d(self.masks[index].float(), side, ceil_mode=True).flatten(1)
        present = filled > 0
        least = filled.masked_fill(~present, torch.inf).amin(1)
        count = present.sum(1)
        return (count <= FEW) & ((least < filled.amax(1)) | (count == 1))

    def together(
        self, active: Tensor, side: int, rank: Tensor, count: Tensor, step: Tensor, hard: Tensor
    ) -> None:
        """The longest run of the least important cells that can leave at once, by bisection."""
        start = self.masks[active]
        # removing low passes; removing high is not tried
        low, high = torch.zeros_like(count), torch.where(count > FEW, count, 1)
        while len(place := ((high - low > 1) & self.affordable()[active]).nonzero().flatten()):
            middle = (low[place] + high[place]) // 2
            candidates = start[place] & ~_spread(rank[place] < middle[:, None], side, start.shape[1:])
            ok = self.ask(active[place], candidates, hard[place]).ok
            low[place] = torch.where(ok, middle, low[place])
            high[place] = torch.where(ok, high[place], middle)
        step[rank < low[:, None]] = 0

    def singly(self, active: Tensor, side: int, rank: Tensor, step: Tensor, hard: Tensor) -> None:
        """Each remaining cell alone, the least important first."""
        start, count = self.masks[active], _present(self.masks[active], side).sum(1)
        for number in range(int(count.max())):
            this = (rank == number) & (step < 0)
            place = (this.any(1) & (number < count) & self.affordable()[active]).nonzero().flatten()
            if not len(place):
                continue
            candidates = start[place] & ~_spread((step[place] >= 0) | this[place], side, start.shape[1:])
            found = self.ask(active[place], candidates, hard[place])
            ok = found.ok
            self.fatal[active[place], this[place].int().argmax(1)] = _failed(found)
            gone = this[place] & ok[:, None]
            step[place] = torch.where(gone, step[place].amax(1, keepdim=True).clamp_min(0) + 1, step[place])

    def settle(self, active: Tensor, side: int, step: Tensor, hard: Tensor) -> None:
        """The most steps of the draft after which the predicate holds: all, or fewer, which pass what more failed."""
        start, hard = self.masks[active], hard.clone()
        low = torch.full_like(step[:, 0], -1)  # after step low it holds
        middle, drafts = step.amax(1), True

        def candidates(place: Tensor) -> Tensor:
            gone = (step[place] >= 0) & (step[place] <= middle[place][:, None])
            return start[place] & ~_spread(gone, side, start.shape[1:])

        while len(place := ((middle > low) & self.affordable()[active]).nonzero().flatten()):
            shown = candidates(place)
            found = self.ask(active[place], shown, drafts=drafts)
            ok, drafts = found.ok, False
            done = active[place[ok]]
            self.masks[done], self.scores[done] = shown[ok], found.scores[ok]
            low[place[ok]] = middle[place[ok]]
            # fewer steps, which pass what these have failed
            hard[place] |= found.margins <= 0
            place = place[~ok]
            passes, fails = low.clone(), middle.clone()
            while len(tried := place[((fails - passes)[place] > 1) & self.affordable()[active[place]]]):
                middle[tried] = (passes[tried] + fails[tried]) // 2
                ok = self.ask(active[tried], candidates(tried), hard[tried]).ok
                passes[tried] = torch.where(ok, middle[tried], passes[tried])
                fails[tried] = torch.where(ok, fails[tried], middle[tried])
            middle[place] = passes[place]

    def prove(self, side: int) -> None:
        """Try each cell alone against the predicate itself, round and round, until all have failed on one mask."""
        active = self.active()
        if not len(active):
            return
        rank, _ = self.ranked(active, side)
        order = rank.argsort(dim=1, stable=True).tolist()
        present = _present(self.masks[active], side)
        pointer, failures = [0] * len(active), [0] * len(active)
        open_ = set(range(len(active)))
        lookahead = self.settings.lookahead(self.x.device)
        while True:
            left = present.sum(1).tolist()
            for row in sorted(open_):
                if failures[row] >= left[row]:
                    self.minimal[active[row]] = True
                    open_.discard(row)
            affordable = self.affordable()
            rows: list[int] = []
            cells: list[int] = []
            for row in sorted(r for r in open_ if affordable[active[r]]):
                ahead = min(lookahead, left[row] - failures[row])
                coming = (c for c in _circular(order[row], pointer[row]) if present[row, c])
                for cell in islice(coming, ahead):
                    rows.append(row)
                    cells.append(cell)
            if not rows:
                return
            where = torch.tensor(rows, device=active.device)
            one = torch.zeros(len(rows), rank.shape[1], dtype=torch.bool, device=active.device)
            tried = active[where], torch.tensor(cells, device=active.device)
            one[torch.arange(len(rows), device=active.device), tried[1]] = True
            candidates = self.masks[tried[0]] & ~_spread(one, side, self.masks.shape[1:])
            found = self.ask(tried[0], candidates, first=self.fatal[tried])
            ok, scores = found.ok, found.scores
            self.fatal[tried] = _failed(found)
            moved: set[int] = set()
            for number, (row, cell) in enumerate(zip(rows, cells, strict=True)):
                if row in moved:
                    continue  # tried against a mask that is no more
                pointer[row] = order[row].index(cell) + 1
                failures[row] += 1
                if ok[number]:
                    moved.add(row)
                    present[row, cell] = False
                    failures[row] = 0
                    image = active[row]
                    self.masks[image], self.scores[image] = candidates[number], scores[number]

    def ranked(self, index: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Place [n,C] of each cell in the order of removal (absent cells come last), and cells present [n]."""
        importance = self.importance[index]
        h, w = importance.shape[2:]
        padded = F.pad(importance, (0, -w % side, 0, -h % side))
        cells = F.avg_pool2d(padded, side).flatten(1)
        present = _present(self.masks[index], side)
        order = cells.masked_fill(~present, math.inf).argsort(dim=1, stable=True)
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order).contiguous()
        )
        return rank, present.sum(1)

    def weigh(self, index: Tensor) -> None:
        """Importance [B,1,H,W]: what the class loses, to first order, when a pixel of the mask goes.

        Averaged over the default background and one random one, for the images ``index`` [n]; for others, each pixel of
        the mask counts alike, for nothing.
        """
        judge = self.judge
        self.importance = self.masks.to(self.x.dtype)
        if not len(index):
            return
        for part in judge.micro_batch.run(lambda part: part, index):
            x, decision, mask = self.x[part], self.decision[part], self.masks[part].float()
            picks = torch.zeros(len(part), 1, dtype=torch.long)
            random = judge.backgrounds.draw(RANDOM[0], x, picks, purpose="minimise")[:, 0]
            total = torch.zeros_like(mask)
            for background in (judge.backgrounds.default(x), random):
                total += judge.slope(x, decision, mask, background) * mask
            self.importance[part] = total
        self.spent[index] += 2 * GRADIENT


def _failed(found: Verdict) -> Tensor:
    """The check [n] that each mask failed by most, -1 where it passed all."""
    worst, check = found.margins.nan_to_num(torch.inf).min(1)
    return torch.where(worst <= 0, check, -1)


def _circular(items: list[int], start: int) -> Iterator[int]:
    return chain(islice(items, start, None), islice(items, start))


def _kth(hints: Tensor, allowed: Tensor, k: int) -> Tensor:
    """The k-th largest of the allowed hints of each image: [B,1]."""
    values = hints.masked_fill(~allowed, -torch.inf)
    return values.topk(min(k, int(allowed.sum())), 1).values[:, -1:]


def _present(masks: Tensor, side: int) -> Tensor:
    """Which cells of side ``side`` have pixels in masks [B,1,H,W]: [B,C]."""
    return F.max_pool2d(masks.float(), side, ceil_mode=True).flatten(1) > 0


def _spread(cells: Tensor, side: int, shape: torch.Size) -> Tensor:
    """Pixels [n,1,H,W] of cells [n,C] on a grid of side ``side``; shape (1,H,W)."""
    h, w = shape[-2:]
    grid = cells.view(len(cells), 1, -(-h // side), -(-w // side))
    return grid.repeat_interleave(side, 2).repeat_interleave(side, 3)[..., :h, :w]
