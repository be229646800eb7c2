"""PyTorch's CUDA caching allocator, simulated: a stream of requests -> the bytes it would reserve.

What a training step needs and what the allocator takes from the device differ: it rounds, keeps two
pools, splits blocks, and keeps what was freed. That difference (fragmentation) does not follow a
line in the batch size, so it is not fitted: the forecast requests are played through this model of
the allocator. The rules are those of `c10/cuda/CUDACachingAllocator.cpp` in torch 2.4 to 2.13:

- a request is rounded up to a multiple of 512 B;
- up to 1 MiB it is served from the small pool, whose segments are 2 MiB; above from the large pool,
  whose segments are 20 MiB for requests under 10 MiB and else the request rounded up to 2 MiB;
- the smallest cached block that fits is taken (lowest address among equals), and split where 512 B
  or more remain (small pool, expandable segments) or more than 1 MiB (large pool);
- a freed block joins its free neighbours in its segment;
- where the limit would be passed, all whole cached segments go back to the device, and the request
  is tried once more (torch counts a retry);
- expandable segments: one long address range per stream and pool, mapped in pages of 2 MiB (small)
  or 20 MiB (large); a free block before unmapped addresses grows in place;
- `roundup_power2_divisions`: a request is rounded up to a part of the power of two below it instead;
- `max_split_size_mb`: a large block from that size on is neither split nor given to a smaller request, nor to one that
  is more than 20 MiB smaller; at the limit such blocks go back to the device first.

Assumed, since the driver decides it: a new segment lies at a higher address than the older ones.
Not modelled, and refused by name in `unsupported`: `garbage_collection_threshold`, a changed large segment size, a
reserve of expandable segments, other backends, private pools of CUDA graphs.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from autoaccum.units import MIB, format_bytes

__all__ = [
    "Block",
    "CachingAllocator",
    "Segment",
    "Setup",
    "SimulatedOutOfMemory",
    "rounded",
    "segment_size",
    "setup_of",
    "unsupported",
]

MIN_BLOCK = 512
SMALL_REQUEST = MIB
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
MIN_LARGE = 10 * MIB
LARGE_ROUNDING = 2 * MIB
OVERSIZE_ROUNDING = 20 * MIB  # by which a block that is not split may be larger (max_non_split_rounding)
_ADDRESS_SPACE = LARGE_SEGMENT * 2**24  # one segment's range, larger than any device; whole pages of both sizes


class SimulatedOutOfMemory(Exception):
    """The simulated allocator could not serve a request under its limit."""


class Setup(NamedTuple):
    """How an allocator is set up.

    Attributes:
        expandable: segments grow in place.
        max_split: bytes from which on a block is not split; None: any is.
        divisions: parts into which a power of two is divided, for requests below 2 MiB, 4 MiB and so on; none or 0 and
            1: requests are rounded up to 512 bytes alone.
    """

    expandable: bool = False
    max_split: int | None = None
    divisions: tuple[int, ...] = ()


class Segment(NamedTuple):
    """A stretch that the allocator holds at the start: its blocks in address order as (bytes, in use)."""

    stream: int
    small: bool
    blocks: tuple[tuple[int, bool], ...]
    expandable: bool = False


@dataclass(eq=False)
class Block:
    """A stretch of one segment; `previous` and `next` are its neighbours there."""

    pool: _Pool
    address: int
    size: int
    allocated: bool = False
    mapped: bool = True
    expandable: bool = False
    previous: Block | None = None
    next: Block | None = None

    @property
    def room(self) -> int:
        """The size this free block could grow to without moving."""
        return self.size + (self.next.size if self.next is not None and not self.next.mapped else 0)


class _Pool:
    """The free blocks of one stream and size class, each after what it is sorted by."""

    def __init__(self, small: bool) -> None:
        self.small = small
        self.page = SMALL_SEGMENT if small else LARGE_SEGMENT
        self.cached: list[tuple[int, int, Block]] = []  # by size, then address
        self.unmapped: list[tuple[int, int, Block]] = []  # by address alone

    def insert(self, block: Block) -> None:
        listed, size = self._place(block)
        insort(listed, (size, block.address, block))

    def remove(self, block: Block) -> None:
        listed, size = self._place(block)
        del listed[bisect_left(listed, (size, block.address))]

    def _place(self, block: Block) -> tuple[list[tuple[int, int, Block]], int]:
        return (self.cached, block.size) if block.mapped else (self.unmapped, 0)

    def best_fit(self, size: int, max_split: int | None = None) -> Block | None:
        """The smallest cached block of at least `size`; where blocks can grow, the one that could grow least."""
        at = bisect_left(self.cached, (size, 0))
        if at == len(self.cached):
            return None
        best = self.cached[at][2]
        if max_split is not None and not best.expandable and best.size >= max_split:
            return best if size >= max_split and best.size < size + OVERSIZE_ROUNDING else None
        while best.expandable and at + 1 < len(self.cached):
            at += 1
            following = self.cached[at][2]
            if following.room >= best.room:
                break
            best = following
        return best


class CachingAllocator:
    """The allocator of one device. Sizes are bytes.

    It holds `segments` at the start, whose blocks in use stay so (nobody here can free them). `limit` is the most it
    may reserve (what `set_per_process_memory_fraction` caps); None: no limit. `reserved`, its peak, and `retries` may
    be read at any time.
    """

    def __init__(
        self, segments: Sequence[Segment] = (), *, limit: int | None = None, setup: Setup | None = None
    ) -> None:
        self.limit = limit
        self.expandable, self._max_split, self._divisions = setup or Setup()
        self.reserved = self.peak_reserved = self.retries = 0
        self._pools: dict[tuple[int, bool], _Pool] = {}
        self._next_address = _ADDRESS_SPACE
        for segment in segments:
            self._adopt(segment)

    def allocate(self, request: int, stream: int = 0) -> Block:
        """A block for `request` bytes on `stream`.

        Raises:
            SimulatedOutOfMemory: it does not fit under the limit, even with all cached segments given back.
        """
        size = rounded(request, self._divisions)
        pool = self._pool(stream, size <= SMALL_REQUEST)
        block = pool.best_fit(size, self._max_split)
        if block is not None:
            pool.remove(block)
        else:
            block = self._new_block(pool, size)
        if self._splits(block, size):
            pool.insert(_divided(block, size))
        block.allocated = True
        return block

    def _splits(self, block: Block, size: int) -> bool:
        remaining = block.size - size
        if block.pool.small or self.expandable:
            return remaining >= MIN_BLOCK
        return remaining > SMALL_REQUEST and (self._max_split is None or size < self._max_split)

    def free(self, block: Block) -> None:
        """Give a block back to its pool, joined with its free neighbours."""
        block.allocated = False
        _settle(block)

    def release_cached(self) -> None:
        """Give whole free segments (or free pages of expandable ones) back to the device: `empty_cache`."""
        for pool in self._pools.values():
            for *_, block in list(pool.cached):
                if block.expandable:
                    self._unmap(block)
                elif block.previous is None and block.next is None:
                    self._give_back(block)

    def _release_unsplit(self, pool: _Pool, size: int) -> bool:
        """Gives as much of the blocks that are not split back as the request needs; False where they are too few."""
        if self._max_split is None:
            return False
        needed, released = max(size, self._max_split), 0
        blocks = [block for *_, block in pool.cached if block.size >= self._max_split and not block.expandable]
        enough = [block for block in blocks if block.size >= needed][:1]
        for block in enough or reversed(blocks):
            if released < needed:
                released += block.size
                self._give_back(block)
        return released >= needed

    def _give_back(self, block: Block) -> None:
        block.pool.remove(block)
        self.reserved -= block.size

    def _pool(self, stream: int, small: bool) -> _Pool:
        pool = self._pools.get((stream, small))
        if pool is None:
            pool = self._pools[stream, small] = _Pool(small)
        return pool

    def _new_block(self, pool: _Pool, size: int) -> Block:
        """A block that was not in the cache, of at least `size` bytes, in no pool's list."""
        block = self._reserve(pool, size)
        if block is None and self._release_unsplit(pool, size):
            block = self._reserve(pool, size)
        if block is None:
            self.release_cached()
            self.retries += 1
            block = self._reserve(pool, size)
        if block is None:
            limit = format_bytes(self.limit or 0)
            raise SimulatedOutOfMemory(
                f"{format_bytes(size)} more do not fit: {format_bytes(self.reserved)} of {limit} are reserved"
            )
        return block

    def _reserve(self, pool: _Pool, size: int) -> Block | None:
        wanted = segment_size(size)
        if self.limit is not None and self.reserved + wanted > self.limit:
            return None
        if self.expandable:
            return self._expand(pool, size)
        self._grow(wanted)
        return Block(pool, self._fresh_address(), wanted)

    def _grow(self, size: int) -> None:
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _fresh_address(self) -> int:
        self._next_address += _ADDRESS_SPACE
        return self._next_address

    def _expand(self, pool: _Pool, size: int) -> Block:
        """Map pages until some free block before unmapped addresses has `size` bytes; returns it, out of the cache."""
        block = self._expandable_start(pool, size)
        if not block.mapped:
            self._map(block, size)
        while block.size < size:
            grown = block.next
            assert grown is not None, "the address range of a simulated segment has an end"
            self._map(grown, size - block.size)
            block = grown
        pool.remove(block)
        return block

    def _expandable_start(self, pool: _Pool, size: int) -> Block:
        for *_, unmapped in pool.unmapped:  # lowest address first
            before = unmapped.previous
            start = before if before is not None and not before.allocated else unmapped
            if _free_from(start) >= size:
                return start
        fresh = Block(pool, self._fresh_address(), _ADDRESS_SPACE // 2, mapped=False, expandable=True)
        pool.insert(fresh)
        return fresh

    def _map(self, block: Block, size: int) -> None:
        """Back the first `size` bytes of an unmapped block with whole pages; it joins its free neighbours."""
        block.pool.remove(block)
        mapped = min(_up(min(size, block.size), block.pool.page), block.size)
        if mapped < block.size:
            block.pool.insert(_divided(block, mapped))
        block.mapped = True
        _settle(block)
        self._grow(mapped)

    def _unmap(self, block: Block) -> None:
        """Give back the whole pages inside a free expandable block; its ends stay cached."""
        pool, end = block.pool, block.address + block.size
        first, last = _up(block.address, pool.page), end // pool.page * pool.page
        if first >= last:
            return
        pool.remove(block)
        if block.address < first:
            head, block = block, _divided(block, first - block.address)
            pool.insert(head)
        if last < end:
            pool.insert(_divided(block, last - first))
        block.mapped = False
        _settle(block)
        self.reserved -= last - first

    def _adopt(self, segment: Segment) -> None:
        pool, address = self._pool(segment.stream, segment.small), self._fresh_address()
        stretches = [(size, allocated, True) for size, allocated in segment.blocks]
        if segment.expandable:
            stretches.append((_ADDRESS_SPACE // 2, False, False))
        before: Block | None = None
        for size, allocated, mapped in stretches:
            block = Block(pool, address, size, allocated, mapped, segment.expandable)
            _link(before, block)
            if not allocated:
                pool.insert(block)
            before, address = block, address + size
        self._grow(sum(size for size, _ in segment.blocks))


def rounded(request: int, divisions: Sequence[int] = ()) -> int:
    """The bytes of the block that serves a request: the next multiple of 512, at least 512; or by `divisions`."""
    parts = divisions[min(max(request.bit_length() - MIB.bit_length(), 0), len(divisions) - 1)] if divisions else 0
    if parts < 2 or request <= MIN_BLOCK * parts:
        return max(MIN_BLOCK, _up(request, MIN_BLOCK))
    below = 1 << (request.bit_length() - 1)
    part = below >> (parts.bit_length() - 1)
    return request if request == below else _up(request, part) if part else 2 * below


def segment_size(size: int) -> int:
    """The bytes asked from the device for a rounded request that no cached block can serve."""
    if size <= SMALL_REQUEST:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if size < MIN_LARGE else _up(size, LARGE_ROUNDING)


def setup_of(settings: Mapping[str, Any]) -> Setup:
    """What of the allocator's settings (`_snapshot()["allocator_settings"]`) is simulated."""
    max_split = int(settings.get("max_split_size", -1))
    divisions = settings.get("roundup_power2_divisions") or {}
    return Setup(
        bool(settings.get("expandable_segments", False)),
        max_split if 0 < max_split < 2**60 else None,  # unlimited is -1, or the largest size_t
        tuple(int(divisions[at]) for at in sorted(divisions, key=int)) if any(map(int, divisions.values())) else (),
    )


def unsupported(
    settings: Mapping[str, Any], backend: str = "native", segments: Sequence[Mapping[str, Any]] = ()
) -> str | None:
    """What in the allocator's settings, or in the `segments` of a snapshot, is not simulated, or None."""
    if backend != "native":
        return f"the allocator backend {backend!r}"
    if float(settings.get("garbage_collection_threshold", 0.0)) > 0:
        return "garbage_collection_threshold"
    # The variable was renamed from PYTORCH_CUDA_ALLOC_CONF to PYTORCH_ALLOC_CONF.
    texts = [str(value) for name, value in settings.items() if name.endswith("ALLOC_CONF")]
    names = {"large_segment_size": "large_segment_size_mb", "segments_reserve": "expandable_segments_reserve"}
    for part, name in names.items():
        if any(part in text for text in texts):
            return name
    if any(tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0) for segment in segments):
        return "private pools of CUDA graphs"
    return None


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _link(first: Block | None, second: Block | None) -> None:
    """Makes them neighbours; None: the other one is at an end of its segment."""
    if first is not None:
        first.next = second
    if second is not None:
        second.previous = first


def _divided(block: Block, size: int) -> Block:
    """Keeps the first `size` bytes in `block`; the rest is a block of its own, in no pool's list."""
    rest = Block(block.pool, block.address + size, block.size - size, False, block.mapped, block.expandable)
    block.size = size
    _link(rest, block.next)
    _link(block, rest)
    return rest


def _settle(block: Block) -> None:
    """Takes the neighbours of a free block into it that are free and of the same kind, and lists it in its pool."""
    for neighbour in (block.previous, block.next):
        if neighbour is None or neighbour.allocated or neighbour.mapped != block.mapped:
            continue
        block.pool.remove(neighbour)
        block.size += neighbour.size
        if block.previous is neighbour:
            block.address = neighbour.address
            _link(neighbour.previous, block)
        else:
            _link(block, neighbour.next)
    block.pool.insert(block)


def _free_from(block: Block | None) -> int:
    """The bytes of the free blocks, mapped or not, that follow each other from `block` on."""
    found = 0
    while block is not None and not block.allocated:
        found, block = found + block.size, block.next
    return found
