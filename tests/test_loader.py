import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meamtm.config import DataConfig
from meamtm.data import shards
from meamtm.data.cache import open_clips
from meamtm.data.clips import Clips
from meamtm.data.loader import Batch, Loader
from meamtm.data.pack import pack
from meamtm.data.stream import KEPT_ROW_GROUPS, StreamedWaveforms
from meamtm.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def streams(sounds: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Clips]:
    """The same sounds without a cache, by the number of clips in a row group."""
    opened = {}
    with pytest.MonkeyPatch.context() as patch:
        for row_group in (3, 16):
            folder = tmp_path_factory.mktemp("streams")
            patch.setattr(shards, "ROW_GROUP_CLIPS", row_group)
            patch.setattr(shards, "SHARD_BYTES", 120_000)
            pack(sounds, folder / "set")
            opened[row_group] = open_clips(DataConfig(path=str(folder / "set"), cache="none"), 8_000)
    return opened


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory, sounds: Path) -> Clips:
    """Clips of 0.5, 0.25 and 1.7 s, whose samples count from one."""
    import soundfile

    folder = tmp_path_factory.mktemp("uneven")
    for label in ("a", "b"):
        (folder / "in" / label).mkdir(parents=True)
        for name, num_samples in {"short": 2_000, "whole": 4_000, "long": 13_600}.items():
            ramp = np.arange(1, num_samples + 1, dtype=np.int16)
            soundfile.write(folder / "in" / label / f"{name}.wav", ramp, 8_000)
    pack(folder / "in", folder / "out")
    return open_clips(DataConfig(path=str(folder / "out"), cache_dir=str(folder / "cache")), 8_000)


def make(clips: Clips, num_clips: int = 100, batch_size: int = 16, **others) -> Loader:
    return Loader(clips, np.arange(num_clips), 4_000, batch_size, **{"seed": 0, "train": True, **others})


def copies(loader: Loader, epoch: int = 0, start: int = 0) -> list[Batch]:
    return list(loader.epoch(epoch, start))


def heard(loader: Loader, epoch: int = 0) -> list[list[int]]:
    return [batch.index.tolist() for batch in loader.epoch(epoch)]


def assert_equal(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left.index, right.index)
        np.testing.assert_array_equal(left.waveform, right.waveform)
        np.testing.assert_array_equal(left.target, right.target)
        assert left.num_global == right.num_global


sizes = st.tuples(st.integers(1, 100), st.integers(1, 40), st.integers(1, 6))


@given(sizes, st.booleans(), st.sampled_from([None, 3, 16]))
def test_each_clip_is_heard_once_by_one_rank(clips, streams, size, train, row_group) -> None:
    num_clips, batch_size, world_size = size
    source = clips if row_group is None else streams[row_group]
    try:
        loaders = [
            make(source, num_clips, batch_size, train=train, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
    except (ConfigError, DataError):
        assert num_clips // -(-num_clips // batch_size) < world_size
        return
    deals = [[indices for indices, _ in plan(loader, epoch=num_clips)] for loader in loaders]
    assert sorted(itertools.chain(*itertools.chain(*deals))) == list(range(num_clips))
    assert {len(deal) for deal in deals} == {-(-num_clips // batch_size)}
    for parts in zip(*deals, strict=True):
        lengths = [len(part) for part in parts]
        assert 1 <= max(lengths) <= min(lengths) + 1
        assert sum(lengths) <= batch_size
    global_sizes = [sum(map(len, parts)) for parts in zip(*deals, strict=True)]
    assert max(global_sizes) <= min(global_sizes) + 1


def plan(loader: Loader, epoch: int) -> list[tuple[list[int], int]]:
    """Clips and global size of each batch, without reading a sound."""
    return [(indices.tolist(), num_global) for indices, _, num_global in loader.plan(epoch)]


@given(sizes, st.sampled_from([None, 3, 16]), st.integers(0, 5))
def test_the_order_does_not_depend_on_the_number_of_ranks(clips, streams, size, row_group, epoch) -> None:
    num_clips, batch_size, world_size = size
    source = clips if row_group is None else streams[row_group]
    alone = plan(make(source, num_clips, batch_size), epoch)
    if num_clips // len(alone) < world_size:
        return
    dealt = [
        plan(make(source, num_clips, batch_size, rank=rank, world_size=world_size), epoch) for rank in range(world_size)
    ]
    for whole, *parts in zip(alone, *dealt, strict=True):
        together = [clip for clips in itertools.zip_longest(*(part[0] for part in parts)) for clip in clips]
        assert [clip for clip in together if clip is not None] == whole[0]
        assert {part[1] for part in parts} == {whole[1]} == {len(whole[0])}


@given(st.integers(0, 6), st.integers(0, 3), st.booleans())
def test_resuming_in_mid_epoch_continues_exactly(clips: Clips, start: int, epoch: int, train: bool) -> None:
    assert_equal(copies(make(clips, train=train), epoch, start), copies(make(clips, train=train), epoch)[start:])


def test_a_batch_is_what_its_index_says(clips: Clips) -> None:
    for batch in make(clips).epoch(0):
        assert batch.waveform.dtype == np.int16
        assert batch.num_global == len(batch.index)
        for row, clip in enumerate(batch.index.tolist()):
            np.testing.assert_array_equal(batch.waveform[row], clips.waveform(clip))
            np.testing.assert_array_equal(batch.target[row], clips.targets[clip])


def test_epochs_and_seeds_differ_and_repeat(clips: Clips) -> None:
    orders = [heard(make(clips, seed=seed), epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(one != other for one, other in itertools.combinations(orders, 2))
    assert heard(make(clips, seed=1), 1) == orders[3]


def test_only_the_clips_asked_for_are_heard(clips: Clips) -> None:
    chosen = np.flatnonzero(clips.folds == 2)
    loader = Loader(clips, chosen, 4_000, 8, seed=3, train=True)
    assert sorted(itertools.chain(*heard(loader))) == chosen.tolist()


def test_evaluation_keeps_the_order(clips: Clips) -> None:
    assert list(itertools.chain(*heard(make(clips, train=False), 7))) == list(range(100))


def test_streamed_batches_are_the_same_sounds(clips: Clips, streams: dict[int, Clips]) -> None:
    for batch in make(streams[3]).epoch(0):
        for row, clip in enumerate(batch.index.tolist()):
            np.testing.assert_array_equal(batch.waveform[row], clips.waveform(clip))


def test_streaming_mixes_clips_of_several_row_groups_and_reads_few_at_a_time(streams: dict[int, Clips]) -> None:
    order = list(itertools.chain(*heard(make(streams[3]))))
    pools = [clip // 3 for clip in order]
    assert len(set(pools[:24])) <= 8  # 8 row groups of 3 clips are mixed
    assert sum(one != other for one, other in itertools.pairwise(pools)) > 60
    assert set(pools[:24]).isdisjoint(pools[24:96])


def test_an_epoch_reads_each_streamed_row_group_about_once(streams: dict[int, Clips]) -> None:
    waveforms = streams[3].waveforms
    assert isinstance(waveforms, StreamedWaveforms)
    waveforms._sounds.cache_clear()
    loaders = [make(streams[3], batch_size=8, seed=5, rank=rank, world_size=2) for rank in range(2)]
    for _ in zip(*(loader.epoch(0) for loader in loaders), strict=True):
        pass
    assert waveforms._sounds.cache_info().maxsize == KEPT_ROW_GROUPS
    assert 34 <= waveforms._sounds.cache_info().misses <= 1.5 * 34


# Lengths


def test_short_clips_are_padded_at_the_end(uneven: Clips) -> None:
    for batch in make(uneven, 6, 6).epoch(0):
        for row, clip in enumerate(batch.index.tolist()):
            num_heard = min(uneven.num_samples[clip], 4_000)
            assert (batch.waveform[row, :num_heard] > 0).all()
            assert not batch.waveform[row, num_heard:].any()


def test_crops_of_long_clips_are_random_but_the_same_for_any_number_of_ranks(uneven: Clips) -> None:
    def starts(epoch: int, world_size: int = 1) -> dict[int, int]:
        loaders = [make(uneven, 6, 6, rank=rank, world_size=world_size) for rank in range(world_size)]
        batches = [batch for loader in loaders for batch in loader.epoch(epoch)]
        return {c: int(w[0]) for batch in batches for c, w in zip(batch.index.tolist(), batch.waveform, strict=True)}

    long = np.flatnonzero(uneven.num_samples > 4_000).tolist()
    seen = {clip: [starts(epoch)[clip] for epoch in range(30)] for clip in long}
    for clip in long:
        assert 1 <= min(seen[clip]) < 3_000
        assert 6_000 < max(seen[clip]) <= 9_601
        assert len(set(seen[clip])) > 20
    assert seen[long[0]] != seen[long[1]]
    assert starts(4, world_size=3) == starts(4)


def test_evaluation_covers_a_long_clip_with_even_windows(uneven: Clips) -> None:
    batches = copies(make(uneven, 6, 4, train=False))
    index = np.concatenate([batch.index for batch in batches])
    first = np.concatenate([batch.waveform[:, 0] for batch in batches])
    for clip in np.flatnonzero(uneven.num_samples > 4_000):
        assert first[index == clip].tolist() == [1, 3_201, 6_401, 9_601]  # 1.7 s in windows of 0.5 s
    assert [(index == clip).sum() for clip in np.flatnonzero(uneven.num_samples <= 4_000)] == [1, 1, 1, 1]


@given(st.integers(1, 20_000), st.sampled_from([8, None]))
def test_windows_are_eight_at_most_and_miss_a_tenth_of_one_at_most(
    uneven: Clips, clip_samples: int, most: int | None
) -> None:
    loader = Loader(uneven, np.array([0]), clip_samples, 64, seed=0, train=False, most_windows=most)  # a/long, 13,600
    starts = np.concatenate([starts for _, starts, _ in loader.plan(0)])
    length = uneven.num_samples[0]
    assert 1 <= len(starts) <= (most or length)
    assert (np.diff(starts) > 0).all()
    assert starts[0] >= 0
    assert starts[-1] + clip_samples <= max(length, clip_samples)
    if len(starts) != most:
        gaps = np.diff(np.concatenate([[-clip_samples], starts, [length]])) - clip_samples
        assert gaps.max() <= 0.1 * clip_samples


# Memory


def test_a_batch_that_is_kept_stays_as_it_is(clips: Clips) -> None:
    loader = make(clips, batch_size=8)
    kept = [(batch, batch.waveform.copy()) for epoch in range(2) for batch in loader.epoch(epoch)]
    for batch, waveform in kept:
        np.testing.assert_array_equal(batch.waveform, waveform)


def test_tensors_and_slices_of_a_batch_keep_it_too(clips: Clips) -> None:
    loader = make(clips, batch_size=8)
    tensors = [torch.from_numpy(batch.waveform)[:3] for batch in loader.epoch(0)]
    slices = [batch.waveform[1:] for batch in loader.epoch(0)]
    again = list(make(clips, batch_size=8).epoch(0))
    for tensor, part, batch in zip(tensors, slices, again, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), batch.waveform[:3])
        np.testing.assert_array_equal(part, batch.waveform[1:])


def test_memory_is_reused_when_nobody_keeps_a_batch(clips: Clips) -> None:
    loader = make(clips, batch_size=8)
    places = {batch.waveform.ctypes.data for epoch in range(5) for batch in loader.epoch(epoch)}
    assert len(places) <= 3


# Bad input


def test_too_few_clips_or_too_small_a_batch_for_the_workers_is_refused(clips: Clips) -> None:
    with pytest.raises(
        DataError, match=r"3 clips cannot be dealt to scale\.workers=4; add clips or lower scale\.workers"
    ):
        make(clips, 3, 16, world_size=4)
    message = r"train\.batch_size=2 makes batches of 2 clips, fewer than scale\.workers=4; raise train\.batch_size"
    with pytest.raises(ConfigError, match=message):
        make(clips, 100, 2, world_size=4)
    with pytest.raises(DataError, match=r"no clip is left to be heard; check data\.test_fold"):
        make(clips, 0)


def test_fewer_clips_than_ranks_are_evaluated_all_the_same(clips: Clips) -> None:
    loaders = [Loader(clips, np.arange(3), 4_000, 2, seed=0, train=False, rank=rank, world_size=4) for rank in range(4)]
    heard = [index for loader in loaders for batch in loader.epoch(0) for index in batch.index.tolist()]
    assert sorted(heard) == [0, 1, 2]


# --- few clips, many batches


@given(
    num_clips=st.integers(1, 100),
    batch_size=st.integers(1, 40),
    least_batches=st.integers(1, 30),
    world_size=st.integers(1, 3),
)
def test_few_clips_are_heard_equally_often_pass_after_pass(
    clips: Clips, num_clips: int, batch_size: int, least_batches: int, world_size: int
) -> None:
    num_clips, batch_size = max(num_clips, 2 * world_size), max(batch_size, 2 * world_size)  # no batch lacks a rank's
    options = {"least_batches": least_batches, "world_size": world_size}
    loaders = [make(clips, num_clips, batch_size, rank=rank, **options) for rank in range(world_size)]
    num_passes = loaders[0].num_heard // num_clips
    assert loaders[0].num_batches >= least_batches
    assert num_passes == 1 or -(-(num_passes - 1) * num_clips // batch_size) < least_batches, "no more than it takes"
    whole = [indices for indices, _, _ in make(clips, num_clips, batch_size, least_batches=least_batches).plan(3)]
    for parts in zip(*(loader.plan(3) for loader in loaders), strict=True):
        shares = [indices for indices, _, _ in parts]
        assert sorted(np.concatenate(shares)) == sorted(whole.pop(0))
    order = np.concatenate(
        [batch for batch, _, _ in make(clips, num_clips, batch_size, **options | {"world_size": 1}).plan(3)]
    )
    for part in order.reshape(num_passes, num_clips):
        assert sorted(part) == list(range(num_clips))


def test_a_loader_of_enough_clips_is_what_it_was(clips: Clips) -> None:
    for ours, plain in zip(make(clips, least_batches=7).plan(2), make(clips).plan(2), strict=True):
        assert all(np.array_equal(mine, others) for mine, others in zip(ours, plain, strict=True))


def test_each_pass_crops_a_long_clip_anew(uneven: Clips) -> None:
    loader = Loader(uneven, np.arange(len(uneven)), 4_000, 2, seed=0, train=True, least_batches=60)
    starts: dict[int, list[int]] = {}
    for indices, firsts, _ in loader.plan(0):
        for clip, first in zip(indices.tolist(), firsts.tolist(), strict=True):
            starts.setdefault(clip, []).append(first)
    for clip, found in starts.items():
        assert len(found) == 20
        assert (len(set(found)) > 10) == (uneven.num_samples[clip] > 4_000)
