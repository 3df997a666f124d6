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
from .ops import Value, call, choose, concat, constant, loop, setting, where
from .pictures import Pictures, area, draw_numbers, local_order, masked, packed, pixels, probabilities
from .plan import DEFAULT, Number, Plan

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
        self.settings = {name: setting(name, value) for name, value in plan.settings.items()}
        self.threshold = self.settings["minexp.threshold"]
        self.table = Table(plan, pictures)
        self.x = pixels(image)
        self.p = probabilities(masker, image, self.x)
        self.start = draw_numbers(image, (len(pictures.colour), *size))

    def outputs(self) -> dict[str, Value]:
        h, w = self.size
        last = _State.of(loop(self._turn, self._begin().values(), self._bound))
        first = self.table.certificate
        whole, number = last.prob.take(self.table.image, axis=1), self.plan.number
        same = last.kept_top.equals(last.label)
        kept = same if number is None else _stays(number, whole, last.kept_prob)
        drawn = last.outcome.columns(self.table.fresh_draws, len(self.table)).equals(1)
        colour = np.round(self.pictures.colour * 255).astype(np.uint8)
        return {
            "label": last.label,
            "conf": whole,
            "label_masked": last.kept_top,
            "conf_masked": last.kept_prob,
            "kept": kept,
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
            "explanation": masked(last.mask.reshape(0, h, w), self.image, colour),
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
        order = local_order(self.p, self.threshold, self.size).reshape(-1, self.size[0] * self.size[1])
        names = ("stage", "turn", "attempt", "low", "high", "size", "label", "spent", "kept_top")
        values = dict.fromkeys(names, zero) | {"holds": ~flag, "certified": flag}
        values |= {"threshold": real, "kept_prob": real, "mask": order > self.threshold, "order": order}
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
        verdict = self._verdict(state)
        known = ~self._open(state, verdict).any(1).squeeze(1) & ~state.stage.equals(DONE)
        state.turn = where(known, 0, state.turn + 1)
        self._move_on(state, known, verdict)
        return (~state.stage.equals(DONE)).any(0), state.values()

    def _verdict(self, state: _State) -> Verdict:
        allowed = self.settings.get("minexp.misses")
        return Verdict(self.plan, self.table, state.outcome, state.attempt, allowed)

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
        verdict = self._verdict(state)
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
        asked, shown = self._shown(state, asked)
        image, check = asked.take(0, axis=1), asked.take(1, axis=1)
        scores = call(self.classifier, shown)
        if self.plan.number is None:
            top = scores.argmax(1)
            label = where(check.equals(table.image), top, state.label.take(image))
            prob = scores.softmax(1).take_along(label.unsqueeze(1)).squeeze(1)
            passed = top.equals(label)
        else:
            number = self.plan.number
            values = {
                "softmax": lambda: scores.softmax(1),
                "sigmoid": scores.sigmoid,
                "scores": lambda: scores,
            }
            prob, top = values[number.of]().take(number.column, axis=1), image * 0 + number.column
            passed = _stays(number, state.prob.take(table.image, axis=1).take(image), prob)
        if self.plan.kind == "score":
            predicate = constant(table.only(1, table.certificate)).take(check)
            passed = (predicate & (prob >= self.settings["minexp.tau"])) | (~predicate & passed)
        state.outcome = state.outcome.put(asked, passed.cast(np.int64))
        state.top, state.prob = state.top.put(asked, top), state.prob.put(asked, prob)
        named = state.stage.equals(IMAGE)
        state.label = where(named, state.top.take(table.image, axis=1), state.label)

    def _shown(self, state: _State, asked: Value) -> tuple[Value, Value]:
        """Pairs of image and check [n,2] in another order, and what the classifier is shown for each: [n,C,H,W].

        Pairs go together by what their background takes: the plain colour, a blur of the image, or a picture.
        """
        h, w = self.size
        mask = state.mask.cast(np.float32).reshape(-1, 1, h, w)
        # products with 0 and 1 are exact, and faster than a choice
        kept, rest = self.x * mask, (mask * -1 + 1) / 255

        def plain(pairs: Value) -> Value:
            """Few: the only ones that show anything but the mask."""
            image, own = pairs.take(0, axis=1), mask.take(pairs.take(0, axis=1))
            part = self._column(pairs, self.table.where(shown="mask"))
            shown = own * part + own.max_pool(3) * self._column(pairs, self.table.where(shown="dilated"))
            shown = shown + self._column(pairs, self.table.where(shown="image"))
            shown = shown + (own * -1 + 1) * self._column(pairs, self.table.where(shown="complement"))
            colour = constant(self.pictures.colour.reshape(1, -1, 1, 1))
            return self.x.take(image) * shown + colour * (shown * -1 + 1)

        def blurred(pairs: Value) -> Value:
            image = pairs.take(0, axis=1)
            rows, columns = (
                constant(matrix).take(self._drawn(state, pairs)).unsqueeze(1) for matrix in self.pictures.blur
            )
            background = rows @ self.x.take(image) @ columns.transpose(0, 1, 3, 2)
            return kept.take(image) + background * (mask * -1 + 1).take(image)

        def pictured(pairs: Value) -> Value:
            image, row = pairs.take(0, axis=1), constant(self.table.row).take(pairs.take(1, axis=1))
            picture = constant(self.pictures.drawn).take(row + self._drawn(state, pairs))
            return kept.take(image) + picture.cast(np.float32) * rest.take(image)

        colour, blur = (self.table.where(background=name) for name in (DEFAULT, FROM_IMAGE[0]))
        groups = ((colour, plain), (blur, blurred), (~(colour | blur), pictured))
        none = np.zeros((0, *self.pictures.drawn.shape[1:]), np.float32)
        ordered, parts = [], []
        for members, show in groups:
            chosen = constant(members).take(asked.take(1, axis=1))
            pairs = asked.at(chosen.nonzero())
            ordered.append(pairs)
            parts += choose(chosen.any(0), lambda: [show(pairs)], lambda: [constant(none)])  # noqa: B023
        return concat(ordered), concat(parts)

    def _column(self, pairs: Value, members: npt.NDArray[np.bool_]) -> Value:
        """[n,1,1,1]: 1 where the pair's check is one of these columns, else 0."""
        return constant(members.astype(np.float32)).take(pairs.take(1, axis=1)).reshape(-1, 1, 1, 1)

    def _drawn(self, state: _State, pairs: Value) -> Value:
        """Which draw [n] of its family each pair's check asks for."""
        image, check = pairs.take(0, axis=1), pairs.take(1, axis=1)
        number = constant(self.table.number).take(check)
        fresh = (self.start.take(image) + state.attempt.take(image) * self.plan.fresh + number) % POOL
        return where(constant(self.table.fresh).take(check), fresh, number)

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
        above = (self.p > self.threshold).reshape(0, -1)
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
            reached = where(own, self.threshold, reached)
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
        needed = self.settings.get("minexp.needed")
        return state.holds if needed is None else state.holds & (hits >= needed)


def _stays(number: Number, whole: Value, value: Value) -> Value:
    """Is the value [n] still that of the whole image, as the target means it?"""
    if number.tolerance is None:
        size = where(whole >= 0, whole, whole * -1)
        slack = size * (1 - number.keep)
    else:
        slack = whole * 0 + number.tolerance
    if not number.both_ways:
        return value >= whole - slack
    difference = value - whole
    return where(difference >= 0, difference, difference * -1) <= slack


def _pairs(first: Value, second: Value) -> Value:
    """[n,2] of two [n]; numpy's stack."""
    weights = np.array([[1, 0]]), np.array([[0, 1]])
    return first.unsqueeze(1) * constant(weights[0]) + second.unsqueeze(1) * constant(weights[1])
