"""Pages in blocks: memory that grows without copying what is already sealed."""

import torch
from torch import Tensor

from kvcc.errors import CapacityError


class PagePool:
    """Fixed-size page records of one layer, shared by all sequences, found by page id.

    Pages live in blocks that are never moved; `addresses[id]` is the address of a record, for kernels.
    """

    def __init__(self, page_bytes: int, device: torch.device) -> None:
        self.page_bytes = page_bytes
        self.device = device
        self.blocks: list[Tensor] = []  # each uint8 [pages, page_bytes]
        self.addresses = torch.empty(0, dtype=torch.int64, device=device)
        self._free: list[int] = []
        self._more: dict[int, int] = {}  # pages that several sequences have: how many besides the first

    @property
    def capacity(self) -> int:
        """Pages allocated."""
        return len(self.addresses)

    @property
    def growth(self) -> int:
        """Pages in the next block that nobody reserved: few blocks, and under 2 % of them idle."""
        return max(1, self.capacity // 64)

    @property
    def spare(self) -> int:
        """Pages allocated and free."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages holding a sealed page."""
        return self.capacity - len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.capacity * self.page_bytes

    def reserve(self, pages: int) -> None:
        """Make room for `pages` more pages in one block. Raises CapacityError when memory is short."""
        missing = pages - len(self._free)
        if missing <= 0:
            return
        try:
            block = torch.empty(missing, self.page_bytes, dtype=torch.uint8, device=self.device)
        except (
            RuntimeError
        ) as error:  # torch's allocators raise RuntimeError or its subclass OutOfMemoryError
            raise CapacityError(
                f"{missing} more cache pages ({missing * self.page_bytes / 2**20:.0f} MiB) do not fit in memory; "
                "use a smaller batch or a shorter context"
            ) from error
        first = self.capacity
        rows = torch.arange(missing, dtype=torch.int64, device=self.device) * self.page_bytes
        self.addresses = torch.cat([self.addresses, block.data_ptr() + rows])
        self.blocks.append(block)
        self._free.extend(reversed(range(first, first + missing)))

    def take(self, pages: int) -> list[int]:
        """Page ids for `pages` new pages."""
        if pages > len(self._free):
            self.reserve(max(pages, self.growth))
        return [self._free.pop() for _ in range(pages)]

    def share(self, ids: list[int]) -> None:
        """One more sequence has these pages: each is free only when all have given it back."""
        for page in ids:
            self._more[page] = self._more.get(page, 0) + 1

    def give_back(self, ids: list[int]) -> None:
        """Return pages for reuse; their memory stays allocated."""
        for page in ids:
            more = self._more.pop(page, 0)
            if more > 1:
                self._more[page] = more - 1
            if not more:
                self._free.append(page)

    def read(self, ids: Tensor) -> Tensor:
        """Records of `ids` ([N] int64), copied: uint8 [N, page_bytes]. For the reference backend and tests."""
        out = torch.empty(len(ids), self.page_bytes, dtype=torch.uint8, device=self.device)
        for first, block in self._spans():
            here = (ids >= first) & (ids < first + len(block))
            out[here] = block[ids[here] - first]
        return out

    def write(self, ids: Tensor, records: Tensor) -> None:
        """Store `records` (uint8 [N, page_bytes]) as pages `ids` ([N] int64)."""
        for first, block in self._spans():
            here = (ids >= first) & (ids < first + len(block))
            block[ids[here] - first] = records[here]

    def _spans(self) -> list[tuple[int, Tensor]]:
        spans, first = [], 0
        for block in self.blocks:
            spans.append((first, block))
            first += len(block)
        return spans
