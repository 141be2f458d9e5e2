"""GPUs that kernels are compiled for: what a block may have, and how many of them an SM holds."""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

_REGISTERS_PER_SM = 65536
_TENSOR_MEMORY_COLUMNS = 512


@dataclass(frozen=True, slots=True)
class Device:
    """The limits of a block and of an SM (on AMD a compute unit), from the vendors' tables."""

    name: str
    target: GPUTarget
    num_sms: int
    block_shared_bytes: int
    sm_shared_bytes: int
    max_warps: int
    max_blocks: int

    @property
    def has_fp8(self) -> bool:
        """True if the runner accepts fp8 K/V on it (replicas.model.cuda.runner)."""
        return self.target.backend != "cuda" or int(self.target.arch) >= 89

    @property
    def has_dependent_launch(self) -> bool:
        """True if kernels begin there before the one before them has ended (replicas.kernels.launch)."""
        return self.target.backend == "cuda" and int(self.target.arch) >= 90

    def num_resident(self, registers: int, shared_bytes: int, num_warps: int, tensor_memory: int) -> int:
        """The blocks that an SM holds at once; 0 if one alone is too large.

        registers: a thread's; tensor_memory: columns, on Blackwell
        """
        if shared_bytes > self.block_shared_bytes:
            return 0
        limits = [self.max_warps // num_warps, self.max_blocks]
        if self.target.backend == "cuda":
            registers_per_warp = -(-max(registers, 1) * 32 // 256) * 256
            limits.append(_REGISTERS_PER_SM // (registers_per_warp * num_warps))
            limits.append(self.sm_shared_bytes // (-(-(shared_bytes + 1024) // 128) * 128))
            if tensor_memory:
                limits.append(_TENSOR_MEMORY_COLUMNS // tensor_memory)
        else:  # 4 SIMDs of 512 registers a lane, 8 wavefronts each at most
            limits.append(4 * min(8, 512 // (-(-max(registers, 1) // 8) * 8)) // num_warps)
            if shared_bytes:
                limits.append(self.sm_shared_bytes // shared_bytes)
        return max(0, min(limits))


DEVICES = {
    "sm_80": Device("A100", GPUTarget("cuda", 80, 32), 108, 163 << 10, 164 << 10, 64, 32),
    "sm_90": Device("H100, H200", GPUTarget("cuda", 90, 32), 132, 227 << 10, 228 << 10, 64, 32),
    "sm_100": Device("B200", GPUTarget("cuda", 100, 32), 148, 227 << 10, 228 << 10, 64, 32),
    "sm_120": Device("RTX PRO 6000", GPUTarget("cuda", 120, 32), 188, 99 << 10, 100 << 10, 48, 24),
    "gfx942": Device("MI300X", GPUTarget("hip", "gfx942", 64), 304, 64 << 10, 64 << 10, 32, 32),
}
