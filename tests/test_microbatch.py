"""Micro-batches: the same answers whatever they are, and smaller ones where memory does not suffice."""

import gc

import pytest
import torch
from tiny_models import filters, noise_images, one_thread  # noqa: F401
from torch import Tensor, nn

from minexp.certify import Predicate
from minexp.classifier import Classifier
from minexp.errors import MinexpError, RequestError
from minexp.explanation import explain
from minexp.microbatch import MicroBatch, out_of_memory
from minexp.refine import Refinement
from minexp.training import fit


def small_memory(limit: int, log: list[int], error: type[Exception] = torch.OutOfMemoryError) -> nn.Module:
    """A classifier on a device that holds so many images; keeps a log of the batches it was given."""

    def refuse(module: nn.Module, inputs: tuple[Tensor]) -> None:
        log.append(len(inputs[0]))
        if len(inputs[0]) > limit:
            raise error("CUDA out of memory. Tried to allocate 2.00 GiB")

    model = filters().model
    model.register_forward_pre_hook(refuse)
    return model


def test_slices_cover_every_image_once_and_in_order() -> None:
    values, more = torch.arange(10), torch.arange(10) * 2
    for size, times in ((1, 1), (3, 1), (7, 2), (100, 1), (2, 5)):
        parts = list(MicroBatch(size).run(lambda a, b: torch.stack([a, b]), values, more, times=times))
        assert torch.equal(torch.cat(parts, 1), torch.stack([values, more]))
        assert max(part.shape[1] for part in parts) == min(10, max(1, size // times))


def test_halved_until_it_fits_and_for_good() -> None:
    tried: list[int] = []

    def call(x: Tensor) -> Tensor:
        tried.append(len(x))
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return x + 1

    micro = MicroBatch(16)
    with pytest.warns(UserWarning, match="8 images at a time"):
        got = torch.cat(list(micro.run(call, torch.arange(20))))
    assert torch.equal(got, torch.arange(20) + 1)
    assert tried == [16, 8, 4, *[2] * 10] and micro.size == 2
    tried.clear()
    list(micro.run(call, torch.arange(4)))
    assert tried == [2, 2]


def test_what_a_failed_call_allocated_is_gone_before_the_next() -> None:
    class Big:
        pass

    alive: list[int] = []

    def call(x: Tensor) -> Tensor:
        held = Big()
        alive.append(sum(isinstance(thing, Big) for thing in gc.get_objects()))
        if len(x) > 1:
            raise MemoryError
        del held
        return x

    with pytest.warns(UserWarning, match="images at a time"):
        list(MicroBatch(8).run(call, torch.arange(8)))
    assert set(alive) == {1}


def test_other_errors_and_a_single_image_too_many_are_raised() -> None:
    def broken(x: Tensor) -> Tensor:
        raise ValueError("shape")

    def hungry(x: Tensor) -> Tensor:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"
        )

    with pytest.raises(ValueError, match="shape"):
        list(MicroBatch(4).run(broken, torch.arange(4)))
    with (
        pytest.raises(MinexpError, match="not enough memory for a single image.*smaller --size"),
        pytest.warns(),
    ):
        list(MicroBatch(4).run(hungry, torch.arange(4)))
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert not out_of_memory(RuntimeError("expected scalar type Float")) and not out_of_memory(
        KeyError("out of memory")
    )


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_an_explanation_on_a_small_device_is_the_same(error: type[Exception]) -> None:
    x, settings = (
        noise_images(12),
        {"refinement": Refinement(steps=6, check=2), "predicate": Predicate(draws=8)},
    )
    whole = explain(filters(), x, **settings)
    log: list[int] = []
    model = small_memory(10**6, log)
    classifier = Classifier(model, size=16, taps=["conv", "act"])
    model._forward_pre_hooks.clear()
    refusing = small_memory(9, log, error)
    model._forward_pre_hooks.update(refusing._forward_pre_hooks)
    with pytest.warns(UserWarning, match="out of memory"):
        small = explain(classifier, x, **settings)
    assert torch.equal(small.masks, whole.masks)
    assert [c.certified for c in small.certificates] == [c.certified for c in whole.certificates]
    assert classifier.micro_batch.size <= 9
    failures = sum(size > 9 for size in log)
    log.clear()
    again = explain(classifier, x, **settings)  # nothing is tried in vain a second time
    assert torch.equal(again.masks, whole.masks) and failures > 0 and max(log) <= 9


def test_a_fit_that_does_not_fit_says_which_batch_to_give() -> None:
    log: list[int] = []
    model = small_memory(8, log)
    classifier = Classifier(model, size=16, taps=["conv", "act"])
    with pytest.raises(RequestError, match="memory for a step on 12 images; give --batch 6"):
        fit(classifier, noise_images(12), steps=2, batch=12, progress=False)


def test_sizes_fit_the_image_and_the_device() -> None:
    sizes = [MicroBatch.for_input((3, side, side), "cpu").size for side in (16, 64, 224, 1024)]
    assert sizes == sorted(sizes, reverse=True) and sizes[2] == 8 and sizes[0] <= 128
    assert MicroBatch.for_input((3, 224, 224), "cuda").size > sizes[2]
    classifier = filters()
    classifier.micro_batch.size = 5
    assert classifier.micro_batch.size == 5
    assert classifier.to("cpu").micro_batch.size == 128
