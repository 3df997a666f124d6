"""The graphs of a deployed explainer, written over networks that are ONNX already; no torch.

The explainer is one loop. An image waits for a stage (its own scores, the predicate's verdict on a mask, or the
certificate); every turn asks a wave of evaluations for each image, in one batch of the classifier, and moves on the
images whose stage is decided. It is the search of `minexp.repair` and the certificate of `minexp.certify`, as data.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx

from ..families import FROM_IMAGE, POOL, RANDOM
from .ops import Value, argument, build, call, constant, loop, pad_columns, where
from .plan import DEFAULT, Check, Plan

# What an image waits for; a bisection is BISECT + its number.
IMAGE, FIRST, WHOLE, GROW, CERTIFY, DONE, BISECT = range(7)


@dataclass(frozen=True, eq=False)
class Pictures:
    """The backgrounds of a job as an explainer carries them.

    colour: [C] in [0,1], what removed pixels become by default. drawn: uint8 [N,C,H,W]; first: where the draws of
    (purpose, family) begin in it. blur: matrices [POOL,H,H] and [POOL,W,W] that blur rows and columns, one pair a
    draw. empty: class probabilities [K] of the default background alone.
    """

    colour: npt.NDArray[np.float32]
    drawn: npt.NDArray[np.uint8]
    first: dict[tuple[str, str], int]
    blur: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
    empty: npt.NDArray[np.float32]


def masker_graph(masker: onnx.ModelProto, channels: int, threshold: float) -> onnx.ModelProto:
    """image uint8 [batch,height,width,C] → prob [batch,height,width], mask_bits, explanation (removed pixels black)."""
    image = argument(np.uint8, "batch", "height", "width", channels)
    prob = call(masker, pixels(image)).sigmoid().squeeze(1)
    kept = prob > threshold
    outputs = {"prob": prob, "mask_bits": packed(kept.reshape(0, -1))}
    outputs["explanation"] = where(kept.unsqueeze(3), image, 0)
    shapes = {"prob": ("height", "width"), "mask_bits": ("bytes",)}
    return build({"image": image}, outputs, shapes | {"explanation": ("height", "width", channels)})


def explainer_graph(
    masker: onnx.ModelProto,
    classifier: onnx.ModelProto,
    plan: Plan,
    pictures: Pictures,
    size: tuple[int, int],
) -> onnx.ModelProto:
    """image uint8 [batch,H,W,C] → mask and certificate; the outputs are listed in docs/deploy.md."""
    channels = len(pictures.colour)
    image = argument(np.uint8, "batch", *size, channels)
    outputs = _Explainer(masker, classifier, plan, pictures, size, image).outputs()
    shapes = {"kept_on": (len(plan.families) * plan.fresh,), "mask_bits": (-(-size[0] * size[1] // 8),)}
    return build({"image": image}, outputs, shapes | {"prob": size, "explanation": (*size, channels)})


def pixels(image: Value) -> Value:
    """uint8 [B,H,W,C] → float [B,C,H,W] in [0,1], divided as torch divides."""
    return image.transpose(0, 3, 1, 2).cast(np.float32) / 255


def packed(mask: Value) -> Value:
    """Bits of masks [B,N] from the most significant on: uint8 [B, ⌈N/8⌉]."""
    bits = pad_columns(mask.cast(np.float32), 8).reshape(0, -1, 8)
    return (bits @ constant(2.0 ** np.arange(7, -1, -1, dtype=np.float32))).cast(np.uint8)


class _Table:
    """The plan's checks as columns: what each shows, and where its background lies."""

    def __init__(self, plan: Plan, pictures: Pictures) -> None:
        self.image, self.kept = 0, 1  # columns: the whole image; the mask on the default background
        self.checks = (Check("image"), *plan.predicate, *plan.certificate)
        self.certificate = 1 + len(plan.predicate)
        self.drawn = self.certificate + 3
        self.predicate = range(1, self.certificate)
        self.draws = range(2, self.certificate)
        fresh = [n >= self.certificate for n in range(len(self.checks))]
        self.fresh = np.array(
            [f and c.background != DEFAULT for f, c in zip(fresh, self.checks, strict=True)]
        )
        purposes = ["certificate" if f else "predicate" for f in fresh]
        self.row = np.array(
            [pictures.first.get((p, c.background), 0) for p, c in zip(purposes, self.checks, strict=True)]
        )
        self.number = np.array([check.number for check in self.checks])

    def where(self, **wanted: str) -> npt.NDArray[np.bool_]:
        """Which columns have these fields."""
        return np.array([all(getattr(c, k) == v for k, v in wanted.items()) for c in self.checks])

    def only(self, columns: range) -> npt.NDArray[np.bool_]:
        mask = np.zeros(len(self.checks), bool)
        mask[columns.start : columns.stop] = True
        return mask


class _State:
    """What the loop carries: [B] each, but mask [B,HW], outcome and its like [B,columns]."""

    names = (
        *("stage", "attempt", "low", "high", "size", "label", "holds", "certified", "threshold", "spent"),
        *("mask", "outcome", "top", "prob"),
    )

    def __init__(self, **values: Value) -> None:
        for name in self.names:
            setattr(self, name, values[name])

    stage: Value
    attempt: Value
    low: Value
    high: Value
    size: Value
    label: Value
    holds: Value
    certified: Value
    threshold: Value
    spent: Value
    mask: Value
    outcome: Value  # -1 not asked, 0 the class was lost, 1 it was kept
    top: Value
    prob: Value

    def values(self) -> list[Value]:
        return [getattr(self, name) for name in self.names]


class _Explainer:
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
        self.table = _Table(plan, pictures)
        self.x = pixels(image)
        self.p = call(masker, self.x).sigmoid()
        self.order = _local_order(self.p, plan.threshold, size).reshape(0, -1)
        self.ranked = self.order.sort_descending()
        self.start = _draw_numbers(image, size[0] * size[1] * len(pictures.colour))
        self.blurred = self._blurred() if self.table.where(background=FROM_IMAGE[0]).any() else None

    def outputs(self) -> dict[str, Value]:
        h, w = self.size
        last = _State(**dict(zip(_State.names, loop(self._turn, self._begin(), self._bound), strict=True)))
        prob, top = last.prob, last.top
        first = self.table.certificate
        kept = last.mask.reshape(0, h, w)
        drawn = last.outcome.columns(self.table.drawn, len(self.table.checks)).equals(1)
        colour = np.round(self.pictures.colour * 255).astype(np.uint8)
        return {
            "label": last.label,
            "conf": prob.take(self.table.image, axis=1),
            "label_masked": top.take(first, axis=1),
            "conf_masked": prob.take(first, axis=1),
            "conf_complement": prob.take(first + 1, axis=1),
            "conf_empty": constant(self.pictures.empty).take(last.label),
            "dilation_kept": last.outcome.take(first + 2, axis=1).equals(1),
            "robust_train": self._share(drawn, [f for f in self.plan.families if f in RANDOM]),
            "kept_on": drawn,
            "area": last.mask.cast(np.float32).sum(1) / (h * w),
            "holds": last.holds,
            "certified": last.certified,
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
        masks = int(np.log(self.size[0] * self.size[1]) / np.log(self.plan.growth)) + 40
        waves = 2 + -(-len(self.table.checks) // self.plan.wave)
        return 1 + len(self.plan.draws) * (masks * waves + waves)

    def _begin(self) -> list[Value]:
        zero = self.start * 0
        flag = zero > 0
        columns = constant(np.zeros((1, len(self.table.checks)), np.int64))
        table = zero.unsqueeze(1) + columns
        values = dict.fromkeys(("stage", "attempt", "low", "high", "size", "label", "spent"), zero)
        values |= {"holds": ~flag, "certified": flag, "threshold": zero.cast(np.float32)}
        values |= {"mask": self.order > self.plan.threshold, "outcome": table - 1, "top": table}
        return _State(**values, prob=table.cast(np.float32)).values()

    # ------------------------------------------------------------ one turn

    def _turn(self, *carried: Value) -> tuple[Value, list[Value]]:
        state = _State(**dict(zip(_State.names, carried, strict=True)))
        asked = self._useful(state)
        asked = asked & (asked.cast(np.int64).cumsum(1) <= self.plan.wave)
        state.spent = state.spent + asked.cast(np.int64).sum(1)
        self._evaluate(state, asked.nonzero())
        known = ~self._useful(state).any(1).squeeze(1)
        self._move_on(state, known & ~state.stage.equals(DONE))
        return (~state.stage.equals(DONE)).any(0), state.values()

    def _useful(self, state: _State) -> Value:
        """Which checks [B,columns] can still decide the stage an image is in."""
        table = self.table
        stage = state.stage.unsqueeze(1)
        searching = (stage > IMAGE) & (~stage.equals(CERTIFY)) & (~stage.equals(DONE))
        failed, passed = self._default_verdict(state)
        limit = constant(np.array(self.plan.draws, np.int64)).take(state.attempt).unsqueeze(1)
        numbers = constant(np.arange(len(table.checks), dtype=np.int64)[None] - table.draws.start)
        draws = constant(table.only(table.draws)[None]) & (numbers < limit) & passed & (~failed)
        plain = constant(table.only(range(1, 2))[None])
        mine = (stage.equals(IMAGE) & constant(table.only(range(1))[None])) | (
            stage.equals(CERTIFY) & constant(table.only(range(table.certificate, len(table.checks)))[None])
        )
        return (mine | (searching & (plain | draws))) & (state.outcome < 0)

    def _default_verdict(self, state: _State) -> tuple[Value, Value]:
        """[B,1] each: has the predicate failed by what was asked so far; does the class stay on the default?"""
        plain = state.outcome.columns(1, 2)
        draws = constant(self.table.only(self.table.draws)[None]) & state.outcome.equals(0)
        missed = draws.cast(np.int64).sum(1, keep=True)
        allowed = constant(np.array(self.plan.misses, np.int64)).take(state.attempt).unsqueeze(1)
        return plain.equals(0) | (missed > allowed), plain.equals(1)

    def _evaluate(self, state: _State, asked: Value) -> None:
        """Ask the classifier about (image, check) pairs [n,2] and note the answers."""
        table, (h, w) = self.table, self.size
        image, check = asked.take(0, axis=1), asked.take(1, axis=1)

        def column(values: npt.NDArray) -> Value:
            return constant(values).take(check)

        grid = state.mask.reshape(-1, 1, h, w)
        wide = (grid.cast(np.float32).max_pool(3) > 0).take(image)
        shown = grid.take(image)
        for value, other in (("dilated", wide), ("complement", ~shown), ("image", shown | ~shown)):
            shown = where(column(table.where(shown=value)).reshape(-1, 1, 1, 1), other, shown)
        number = state.attempt.take(image) * self.plan.fresh + column(table.number)
        fresh = column(table.fresh)
        drawn = where(fresh, (self.start.take(image) + number) % POOL, column(table.number))
        background = constant(self.pictures.drawn).take(column(table.row) + drawn).cast(np.float32) / 255
        if self.blurred is not None:
            slot = where(column(table.where(background=FROM_IMAGE[0])), number, 0)
            blurred = self.blurred.at(_pairs(image, slot))
            background = where(
                column(table.where(background=FROM_IMAGE[0])).reshape(-1, 1, 1, 1), blurred, background
            )
        colour = constant(self.pictures.colour.reshape(1, -1, 1, 1))
        default = column(table.where(background=DEFAULT)).reshape(-1, 1, 1, 1)
        background = where(default, colour, background)
        scores = call(self.classifier, where(shown, self.x.take(image), background))
        top = scores.argmax(1)
        first = check.equals(table.image)
        label = where(first, top, state.label.take(image))
        prob = scores.softmax(1).take_along(label.unsqueeze(1)).squeeze(1)
        passed = top.equals(label)
        if self.plan.kind == "score":
            predicate = column(table.only(table.predicate))
            passed = (predicate & (prob >= self.plan.tau)) | (~predicate & passed)
        state.outcome = state.outcome.put(asked, passed.cast(np.int64))
        state.top, state.prob = state.top.put(asked, top), state.prob.put(asked, prob)
        named = state.stage.equals(IMAGE)
        state.label = where(named, state.top.take(table.image, axis=1), state.label)

    def _move_on(self, state: _State, known: Value) -> None:
        """Take images whose stage is decided to the next: the next mask to try, the certificate, or the end."""
        plan, pixels_ = self.plan, self.size[0] * self.size[1]
        stage, failed = state.stage, self._default_verdict(state)[0].squeeze(1)
        ok = known & ~failed

        def at(value: int) -> Value:
            return known & stage.equals(value)

        tried = at(FIRST) | at(GROW) | (known & (stage >= BISECT))
        state.high = where(tried & ok, state.size, where(at(FIRST), pixels_, state.high))
        state.low = where(tried & ~ok, state.size, state.low)
        hopeless = at(WHOLE) & ~ok
        state.holds = state.holds & ~hopeless
        # the first verdict is the search's end where it is good
        end = (at(FIRST) & ok) | hopeless
        whole = at(FIRST) & ~ok if plan.kind == "score" else at(DONE)
        grow = ((at(FIRST) & ~ok & ~whole) | (at(WHOLE) & ok)) | (at(GROW) & ~ok)
        larger = (state.low.cast(np.float32) * plan.growth).ceil().cast(np.int64).clip(state.low + 1)
        stuck = grow & (larger >= pixels_)
        grow = grow & ~stuck
        bisect = stuck | (at(GROW) & ok) | (known & (stage >= BISECT))
        rounds = where(stage >= BISECT, stage + 1, BISECT + 1)
        bisect_on = bisect & (rounds <= BISECT + plan.bisections) & (state.high > state.low + 1)
        product = state.low.clip(1).cast(np.float64) * state.high.cast(np.float64)
        middle = product.sqrt().round().cast(np.int64).clip(state.low + 1, state.high - 1)
        settled = bisect & ~bisect_on
        end = end | settled
        # the certificate: good, or enlarged and tried again while attempts are left
        measured = at(CERTIFY)
        state.certified = where(measured, self._confirmed(state), state.certified)
        again = measured & state.holds & ~state.certified & (state.attempt < len(plan.draws) - 1)
        enlarged = (_area(state.mask).cast(np.float32) * plan.enlarge).ceil().cast(np.int64)
        done = measured & ~again
        state.attempt = where(again, state.attempt + 1, state.attempt)
        begin = at(IMAGE) | again

        size = where(grow, larger, state.size)
        size = where(bisect_on, middle, size)
        size = where(settled, state.high, size)
        size = where(whole | hopeless, pixels_, size)
        size = where(again, enlarged.clip(1, pixels_), size)
        moved = grow | bisect_on | settled | whole | hopeless | again
        level = self.ranked.take_along((size - 1).clip(0).unsqueeze(1))
        state.mask = where(moved.unsqueeze(1), (self.order >= level) & (size > 0).unsqueeze(1), state.mask)
        state.size = where(begin, _area(state.mask), size)
        level = level.squeeze(1)
        reached = where(at(FIRST) & ok & state.attempt.equals(0), constant(np.float32(plan.threshold)), level)
        state.threshold = where(end, reached, state.threshold)

        for chosen, value in ((begin, FIRST), (whole, WHOLE), (grow, GROW), (end, CERTIFY), (done, DONE)):
            state.stage = where(chosen, value, state.stage)
        state.stage = where(bisect_on, rounds, state.stage)
        reset = constant(self.table.only(range(1, len(self.table.checks)))[None]) & (known & ~done).unsqueeze(
            1
        )
        state.outcome = where(reset, -1, state.outcome)

    def _confirmed(self, state: _State) -> Value:
        """Does the predicate hold, and do the fresh draws of the training families not contradict it?"""
        counted = self.table.only(range(self.table.drawn, len(self.table.checks)))
        counted &= np.array([check.background in RANDOM for check in self.table.checks])
        hits = (constant(counted[None]) & state.outcome.equals(1)).cast(np.int64).sum(1)
        return state.holds & (hits >= self.plan.needed)

    def _blurred(self) -> Value:
        """The image under every blur its certificates may ask for: [B,draws,C,H,W]."""
        slots = constant(np.arange(self.plan.fresh * len(self.plan.draws))[None])
        picks = (self.start.unsqueeze(1) + slots) % POOL
        rows, columns = (constant(matrix).take(picks).unsqueeze(2) for matrix in self.pictures.blur)
        return rows @ self.x.unsqueeze(1) @ columns.transpose(0, 1, 2, 4, 3)


def _area(mask: Value) -> Value:
    """Pixels [B] of masks [B,HW], counted in floats, which are exact so far and faster."""
    return mask.cast(np.float32).sum(1).cast(np.int64)


def _pairs(first: Value, second: Value) -> Value:
    """[n,2] of two [n]; numpy's stack."""
    weights = np.array([[1, 0]]), np.array([[0, 1]])
    return first.unsqueeze(1) * constant(weights[0]) + second.unsqueeze(1) * constant(weights[1])


def _draw_numbers(image: Value, count: int) -> Value:
    """An image's own first draw [B], as in `minexp.backgrounds.draw_numbers`."""
    values = image.transpose(0, 3, 1, 2).cast(np.int64).reshape(0, -1)
    return (values * constant(np.arange(count) * 40503 % 65521)).sum(1) % 2**31


def _local_order(p: Value, threshold: float, size: tuple[int, int]) -> Value:
    """`minexp.repair.local_order`, its moving average as two matrix products: far fewer operations on large images."""
    side = 2 * max(1, min(size) // 8) + 1
    rows, columns = (_average(n, side) for n in size)
    around = p
    for _ in range(2):
        around = constant(rows) @ around @ constant(columns.T.copy())
    return where(p > threshold, p, (p + around) * threshold / (1 + threshold))


def _average(n: int, side: int) -> npt.NDArray[np.float32]:
    """[n,n]: mean over the window of ``side`` values around each of n, cut at the ends."""
    near = np.abs(np.arange(n)[:, None] - np.arange(n)) <= side // 2
    return (near / near.sum(1, keepdims=True)).astype(np.float32)
