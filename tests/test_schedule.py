"""Learning rates of every iteration, and the warm-up that must end."""

import pytest
from chainer.serializers import DictionarySerializer, NpzDeserializer

from resnet import schedule
from resnet.schedule import WarmUp


def test_he2015_divides_the_rate_at_32k_and_48k_of_64k():
    plan = schedule.he2015()
    assert plan.iterations == 64_000
    rates = {0: 0.1, 31_999: 0.1, 32_000: 0.01, 47_999: 0.01, 48_000: 0.001, 63_999: 0.001}
    assert {iteration: plan.rate(iteration) for iteration in rates} == rates


def test_report100_drops_with_the_first_batch_of_epochs_40_and_80():
    plan = schedule.report100(50_000, 128)
    assert plan.iterations == 39_063  # the last image of epoch 100 is in batch 39,063
    assert plan.drops == (15_625, 31_250)
    assert (plan.rate(15_624), plan.rate(15_625), plan.rate(31_250)) == (0.1, 0.01, 0.001)


def test_custom_schedule_rounds_up_to_whole_batches():
    plan = schedule.epochs(3, (1.5,), size=100, batchsize=32)
    assert plan.iterations == 10  # 300 images in batches of 32
    assert plan.drops == (5,)


def test_a_shortened_schedule_has_its_drops_at_the_same_parts_and_says_so():
    plan = schedule.he2015().shortened(4)
    assert plan == schedule.Schedule("he2015 / 4", 16_000, (8_000, 12_000))
    assert [plan.rate(i) for i in (7_999, 8_000, 12_000)] == [0.1, 0.01, 0.001]
    quarter = schedule.report100(50_000, 128).shortened(4)
    assert (quarter.iterations, quarter.drops) == (9_766, (3_907, 7_813))  # 25, 10, 20 epochs
    assert schedule.he2015().shortened(1) == schedule.he2015()


def feed(warm_up, errors, start=0):
    for iteration, error in enumerate(errors, start):
        if not warm_up.active:
            break
        warm_up.observe(iteration, error)
    return warm_up


def test_warm_up_ends_when_the_training_error_is_below_80_percent():
    warm_up = feed(WarmUp(True), [0.9] * 300)
    assert warm_up.active
    feed(warm_up, [0.7] * 300, 300)
    # 0.9 and 0.7 average to 0.8 after 50 of each in the window of 100; the 51st is below it.
    assert warm_up.ended_at == 351


def test_one_lucky_batch_does_not_end_the_warm_up():
    assert feed(WarmUp(True), [0.9, 0.1, *[0.9] * 50]).active


def test_warm_up_of_a_net_that_never_learns_ends_all_the_same():
    assert feed(WarmUp(True), [0.9] * 5000).ended_at == 2000


def test_no_warm_up_is_over_from_the_start():
    assert not WarmUp(False).active


@pytest.mark.parametrize("cut", [1, 99, 100, 120, 130, 140])
def test_warm_up_goes_on_after_a_resume_as_if_nothing_had_happened(cut):
    errors = [0.95] * 100 + [0.123456789] * 100
    whole = feed(WarmUp(True), errors)
    first = feed(WarmUp(True), errors[:cut])
    serializer = DictionarySerializer()
    serializer.save(first)
    resumed = WarmUp(True)
    NpzDeserializer(serializer.target).load(resumed)
    feed(resumed, errors[cut:], cut)
    assert resumed.ended_at == whole.ended_at == 119  # 81 * 0.95 + 19 * 0.12 is below 80
