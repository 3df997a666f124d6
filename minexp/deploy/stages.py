"""The explainer's graph: one loop over waves of evaluations, with the whole search and certificate inside.

An image waits for a stage (its own scores, the predicate's verdict on a mask, or the certificate); every turn asks a
wave of evaluations for each image, in one batch of the classifier, and moves on the images whose stage is decided. It
is `minexp.search` and `minexp.certify`, as data.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx

from ..families import FROM_IMAGE, POOL, RANDOM
from .checks import Table, Verdict
from .ops import Value, call, choose, constant, loop, where
from .pictures import Pictures, area, draw_numbers, local_order, packed, pixels
from .plan import DEFAULT, Plan

# What an image waits for; a bisection is BISECT + its number.
IMAGE, FIRST, WHOLE, GROW, CERTIFY, DONE, BISECT = range(7)


class _State:
    """What the loop carries, one value an image where nothing else is said."""

    stage: Value
    turn: Value  # of the stage
    attempt: Value
    low: Value  # a size that fails
    high: Value  # a size that holds
    size: Value  # of the mask that is tried
    label: Value
    holds: Value
    certified: Value
    threshold: Value
    spent: Value
    kept_top: Value  # class and probability of what the mask accepted last keeps
    kept_prob: Value
    mask: Value  # [B,HW]
    order: Value  # [B,HW], in which pixels join the mask
    ranked: Value  # the same, sorted
    outcome: Value  # [B,columns]: -1 not asked, 0 the class was lost, 1 it was kept
    top: Value  # [B,columns]
    prob: Value  # [B,columns], of the image's class
    hints: Value  # [B,columns]: the larger, the sooner asked

    def __init__(self, values: dict[str, Value]) -> None:
        for name in self.__annotations__:
            setattr(self, name, values[name])

    @classmethod
    def of(cls, values: list[Value]) -> _State:
        return cls(dict(zip(cls.__annotations__, values, strict=True)))

    def values(self) -> list[Value]:
        return [getattr(self, name) for name in self.__annotations__]


class Stages:
    """The explanation of image, uint8 [B,H,W,C]: what its graph computes, and its outputs."""

    def __init__(
        self,
        masker: onnx.ModelProto,
        classifier: onnx.ModelProto,
        plan: Plan,
        pictures: Pictures,
        size: tuple[int, int],
        image: Value,
    ) -> None:
        self.plan, self.pictures, self.size, self.image = plan, pictures, size, image
        self.classifier = classifier
        self.table = Table(plan, pictures)
        self.x = pixels(image)
        self.p = call(masker, self.x).sigmoid()
        self.start = draw_numbers(image, size[0] * size[1] * len(pictures.colour))
        self.blurred = self._blurred() if self.table.where(background=FROM_IMAGE[0]).any() else None

    def outputs(self) -> dict[str, Value]:
        h, w = self.size
        last = _State.of(loop(self._turn, self._begin().values(), self._bound))
        first = self.table.certificate
        kept = last.mask.reshape(0, h, w)
        drawn = last.outcome.columns(self.table.fresh_draws, len(self.table)).equals(1)
        colour = np.round(self.pictures.colour * 255).astype(np.uint8)
        return {
            "label": last.label,
            "conf": last.prob.take(self.table.image, axis=1),
            "label_masked": last.kept_top,
            "conf_masked": last.kept_prob,
            "conf_complement": last.prob.take(first, axis=1),
            "conf_empty": constant(self.pictures.empty).take(last.label),
            "dilation_kept": last.outcome.take(first + 1, axis=1).equals(1),
            "robust_train": self._share(drawn, [f for f in self.plan.families if f in RANDOM]),
            "kept_on": drawn,
            "area": last.mask.cast(np.float32).sum(1) / (h * w),
            "holds": last.holds,
            "certified": last.certified,
            "attempt": last.attempt,
            "threshold": last.threshold,
            "evaluations": last.spent,
            "mask_bits": packed(last.mask),
            "prob": self.p.squeeze(1),
            "explanation": where(kept.unsqueeze(3), self.image, constant(colour)),
        }

    def _share(self, drawn: Value, families: list[str]) -> Value:
        picked = [f in families for f in self.plan.families for _ in range(self.plan.fresh)]
        weights = np.array(picked, np.float32)[:, None] / np.float32(sum(picked))
        return (drawn.cast(np.float32) @ constant(weights)).squeeze(1)

    @property
    def _bound(self) -> int:
        """Turns after which the slowest image is done: no search tries more masks than sizes it can grow through."""
        masks = (
            int(np.log(self.size[0] * self.size[1]) / np.log(self.plan.growth)) + self.plan.bisections + 32
        )
        waves = 3 + -(-len(self.table) // self.plan.wave)
        return 1 + len(self.plan.sets) * (masks + 1) * waves

    def _begin(self) -> _State:
        zero = self.start * 0
        flag, real = zero > 0, zero.cast(np.float32)
        table = zero.unsqueeze(1) + constant(np.zeros((1, len(self.table)), np.int64))
        order = local_order(self.p, self.plan.threshold, self.size).reshape(-1, self.size[0] * self.size[1])
        names = ("stage", "turn", "attempt", "low", "high", "size", "label", "spent", "kept_top")
        values = dict.fromkeys(names, zero) | {"holds": ~flag, "certified": flag}
        values |= {"threshold": real, "kept_prob": real, "mask": order > self.plan.threshold, "order": order}
        values |= {
            "ranked": order.sort_descending(self.size[0] * self.size[1]),
            "outcome": table - 1,
            "top": table,
        }
        return _State(values | dict.fromkeys(("prob", "hints"), table.cast(np.float32)))

    # ------------------------------------------------------------ one turn

    def _turn(self, *carried: Value) -> tuple[Value, list[Value]]:
        state = _State.of(list(carried))
        asked = self._asked(state)
        self._evaluate(state, asked)
        verdict = Verdict(self.plan, self.table, state.outcome, state.attempt)
        known = ~self._open(state, verdict).any(1).squeeze(1) & ~state.stage.equals(DONE)
        state.turn = where(known, 0, state.turn + 1)
        self._move_on(state, known, verdict)
        return (~state.stage.equals(DONE)).any(0), state.values()

    def _open(self, state: _State, verdict: Verdict) -> Value:
        """Which checks [B,columns] can still decide the stage an image is in."""
        table, stage = self.table, state.stage.unsqueeze(1)
        searching = ~(stage.equals(IMAGE) | stage.equals(CERTIFY) | stage.equals(DONE))
        image, certificate = table.only(0, 1), table.only(table.certificate, len(table))
        mine = (stage.equals(IMAGE) & constant(image[None])) | (
            stage.equals(CERTIFY) & constant(certificate[None])
        )
        return (mine & (state.outcome < 0)) | (searching & verdict.open)

    def _asked(self, state: _State) -> Value:
        """The wave's (image, check) pairs [n,2]: of each image the most urgent open checks."""
        plan, count = self.plan, min(self.plan.wave, len(self.table))
        stage = state.stage
        verdict = Verdict(plan, self.table, state.outcome, state.attempt)
        open_ = self._open(state, verdict)
        # in their order, from the mask on the default background on
        order = constant(Table.kept - np.arange(len(self.table), dtype=np.float32)[None])
        hinted = (stage.equals(GROW) | (stage >= BISECT)) & constant(np.array([plan.hints]))
        urgency = where(hinted.unsqueeze(1), state.hints + order * 1e-6, order)
        places = where(open_, urgency, -np.inf).largest(count)
        # many masks fail at once: one check alone, and with hints another
        alone = (state.turn < where(hinted, constant(np.array([2])), 1)) & (
            stage.equals(FIRST) | stage.equals(WHOLE) | hinted
        )
        rank = constant(np.arange(count)[None])
        chosen = open_.take_along(places) & ((rank < 1) | ~alone.unsqueeze(1))
        state.spent = state.spent + chosen.cast(np.int64).sum(1)
        which = chosen.nonzero()
        return _pairs(which.take(0, axis=1), places.at(which))

    def _evaluate(self, state: _State, asked: Value) -> None:
        """Ask the classifier about (image, check) pairs [n,2] and note the answers."""
        table = self.table
        image, check = asked.take(0, axis=1), asked.take(1, axis=1)
        scores = call(self.classifier, self._shown(state, image, check))
        top = scores.argmax(1)
        label = where(check.equals(table.image), top, state.label.take(image))
        prob = scores.softmax(1).take_along(label.unsqueeze(1)).squeeze(1)
        passed = top.equals(label)
        if self.plan.kind == "score":
            predicate = constant(table.only(1, table.certificate)).take(check)
            passed = (predicate & (prob >= self.plan.tau)) | (~predicate & passed)
        state.outcome = state.outcome.put(asked, passed.cast(np.int64))
        state.top, state.prob = state.top.put(asked, top), state.prob.put(asked, prob)
        named = state.stage.equals(IMAGE)
        state.label = where(named, state.top.take(table.image, axis=1), state.label)

    def _shown(self, state: _State, image: Value, check: Value) -> Value:
        """What the classifier is shown for pairs of image [n] and check [n]: [n,C,H,W]."""
        table, (h, w) = self.table, self.size

        def column(values: npt.NDArray) -> Value:
            return constant(values).take(check)

        number = state.attempt.take(image) * self.plan.fresh + column(table.number)
        drawn = where(column(table.fresh), (self.start.take(image) + number) % POOL, column(table.number))
        pictures = constant(self.pictures.drawn).take(column(table.row) + drawn).cast(np.float32) / 255
        masks = state.mask.reshape(-1, 1, h, w)

        def usual() -> list[Value]:
            return [masks.take(image), pictures]

        def special() -> list[Value]:
            """Checks on the plain colour or a blurred image, or that show something else than the mask: few."""
            shown = masks.take(image)
            wide = (masks.cast(np.float32).max_pool(3) > 0).take(image)
            for value, other in (("dilated", wide), ("complement", ~shown), ("image", shown | ~shown)):
                shown = where(column(table.where(shown=value)).reshape(-1, 1, 1, 1), other, shown)
            plain = column(table.where(background=DEFAULT)).reshape(-1, 1, 1, 1)
            background = where(plain, constant(self.pictures.colour.reshape(1, -1, 1, 1)), pictures)
            if self.blurred is None:
                return [shown, background]
            blur = column(table.where(background=FROM_IMAGE[0]))
            blurred = self.blurred.at(_pairs(image, where(blur, number, 0)))
            return [shown, where(blur.reshape(-1, 1, 1, 1), blurred, background)]

        rare = table.where(background=DEFAULT) | table.where(background=FROM_IMAGE[0])
        shown, background = choose(column(rare).any(0), special, usual)
        kept, rest = shown.cast(np.float32), (~shown).cast(np.float32)
        # products with 0 and 1 are exact, and faster than a choice
        return self.x.take(image) * kept + background * rest

    # ------------------------------------------------------------ from stage to stage

    def _move_on(self, state: _State, known: Value, verdict: Verdict) -> None:
        """Take images whose stage is decided to the next: the next mask to try, the certificate, or the end."""
        plan, pixels_ = self.plan, self.size[0] * self.size[1]
        stage, ok = state.stage, known & verdict.good.squeeze(1)
        certain = plan.kind != "score"  # the whole image keeps its class, if not its probability

        def at(value: int) -> Value:
            return known & stage.equals(value)

        begun, tested = at(IMAGE), at(FIRST)
        tried = tested | at(GROW) | (known & (stage >= BISECT))
        state.high = where(tried & ok, state.size, where(tested, pixels_, state.high))
        state.low = where(tried & ~ok, state.size, state.low)
        self._learn(state, tried, tested)
        accepted = (tried & ok) | at(WHOLE) | tested
        self._accept(state, accepted, state.top.take(Table.kept, axis=1), state.prob.take(Table.kept, axis=1))
        hopeless = at(WHOLE) & ~ok
        state.holds = state.holds & ~hopeless
        # the first verdict is the search's end where it is good
        whole = at(DONE) if certain else tested & ~ok
        grow = ((tested & ~ok & ~whole) | (at(WHOLE) & ok)) | (at(GROW) & ~ok)
        larger = (state.low.cast(np.float32) * plan.growth).ceil().cast(np.int64).clip(state.low + 1)
        stuck = grow & (larger >= pixels_)
        grow = grow & ~stuck
        bisect = stuck | (at(GROW) & ok) | (known & (stage >= BISECT))
        rounds = where(stage >= BISECT, stage + 1, BISECT + 1)
        bisect_on = bisect & (rounds <= BISECT + plan.bisections) & (state.high > state.low + 1)
        product = state.low.clip(1).cast(np.float64) * state.high.cast(np.float64)
        middle = product.sqrt().round().cast(np.int64).clip(state.low + 1, state.high - 1)
        settled = bisect & ~bisect_on
        if certain:  # what the whole image keeps is asked once more, and known
            full = settled & (state.high >= pixels_)
            state.spent = state.spent + full.cast(np.int64)
            self._accept(state, full, state.label, state.prob.take(Table.image, axis=1))
        end = (tested & ok) | hopeless | settled
        # the certificate: good, or enlarged and tried again while attempts are left
        measured = at(CERTIFY)
        state.certified = where(measured, self._confirmed(state), state.certified)
        again = measured & state.holds & ~state.certified & (state.attempt < len(plan.sets) - 1)
        done = measured & ~again
        state.attempt = where(again, state.attempt + 1, state.attempt)
        self._prefer_mask(state, again)
        above = (self.p > plan.threshold).reshape(0, -1)
        least = self._grown(above, plan.start) if plan.start != 1 else area(above)

        size = where(grow, larger, state.size)
        size = where(bisect_on, middle, size)
        size = where(settled, state.high, size)
        size = where(whole | hopeless, pixels_, size)
        size = where(again, self._grown(state.mask, plan.enlarge), size)
        size = where(begun, least, size)
        moved = grow | bisect_on | settled | whole | hopeless | again | begun
        level = state.ranked.take_along((size - 1).clip(0).unsqueeze(1))
        mask = (state.order >= level) & (size > 0).unsqueeze(1)
        state.mask = where(moved.unsqueeze(1), mask, state.mask)
        state.size = where(begun | again, area(state.mask), size)
        reached = level.squeeze(1)
        if plan.start == 1:  # the masker's own mask
            own = tested & ok & state.attempt.equals(0)
            reached = where(own, constant(np.float32(plan.threshold)), reached)
        state.threshold = where(end, reached, state.threshold)

        nexts = ((begun | again, FIRST), (whole, WHOLE), (grow, GROW), (end, CERTIFY), (done, DONE))
        for chosen, value in nexts:
            state.stage = where(chosen, value, state.stage)
        state.stage = where(bisect_on, rounds, state.stage)
        reset = constant(self.table.only(1, len(self.table))[None]) & (known & ~done).unsqueeze(1)
        state.outcome = where(reset, -1, state.outcome)

    def _grown(self, mask: Value, factor: float) -> Value:
        """Pixels [B] that a mask [B,HW] of at least one has after growing by a factor."""
        larger = (area(mask).cast(np.float32) * factor).ceil().cast(np.int64)
        return larger.clip(1, self.size[0] * self.size[1])

    def _accept(self, state: _State, chosen: Value, top: Value, prob: Value) -> None:
        state.kept_top = where(chosen, top, state.kept_top)
        state.kept_prob = where(chosen, prob, state.kept_prob)

    def _learn(self, state: _State, tried: Value, tested: Value) -> None:
        """Checks that a mask failed, or passed by little, are asked of the next one first (`minexp.judge.harder`)."""
        passed = state.outcome.equals(1)
        if self.plan.kind == "score":
            hints = where(passed, constant(np.float32(-1)), 1.0)
        else:
            hints = where(passed, state.prob.clip(1e-6) * -1, (state.prob * -1 + 1).clip(1e-6))
        before = where(tested.unsqueeze(1), constant(np.float32(0)), state.hints)
        learnt = where(state.outcome >= 0, hints, before)
        state.hints = where(tried.unsqueeze(1), learnt, state.hints)

    def _prefer_mask(self, state: _State, again: Value) -> None:
        """Images whose mask is enlarged keep it: its pixels come first in the order from now on."""

        sides = self.size[0] * self.size[1]

        def preferred() -> list[Value]:
            inside = state.mask & again.unsqueeze(1)
            order = where(inside, state.order + 1, state.order)
            return [order, order.sort_descending(sides)]

        order, ranked = choose(again.any(0), preferred, lambda: [state.order, state.ranked])
        state.order, state.ranked = order.reshape(-1, sides), ranked.reshape(-1, sides)

    def _confirmed(self, state: _State) -> Value:
        """Does the predicate hold, and do the fresh draws of the training families not contradict it?"""
        counted = self.table.only(self.table.fresh_draws, len(self.table))
        counted &= np.array([check.background in RANDOM for check in self.table.checks])
        hits = (constant(counted[None]) & state.outcome.equals(1)).cast(np.int64).sum(1)
        return state.holds & (hits >= self.plan.needed)

    def _blurred(self) -> Value:
        """The image under every blur its certificates may ask for: [B,draws,C,H,W]."""
        slots = constant(np.arange(self.plan.fresh * len(self.plan.sets))[None])
        picks = (self.start.unsqueeze(1) + slots) % POOL
        rows, columns = (constant(matrix).take(picks).unsqueeze(2) for matrix in self.pictures.blur)
        return rows @ self.x.unsqueeze(1) @ columns.transpose(0, 1, 2, 4, 3)


def _pairs(first: Value, second: Value) -> Value:
    """[n,2] of two [n]; numpy's stack."""
    weights = np.array([[1, 0]]), np.array([[0, 1]])
    return first.unsqueeze(1) * constant(weights[0]) + second.unsqueeze(1) * constant(weights[1])
