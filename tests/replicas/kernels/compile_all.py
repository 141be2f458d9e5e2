"""Compiles the kernels for sm_90 as the published models need them; prints names and shared memory, bytes."""

from collections.abc import Mapping

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from replicas.kernels import adapter, attention, confidence, rms_norm, store_kv, swiglu, verify

TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {
    "bf16": "qkv queries output x y residual weight gate_up logits down up query_norm key_norm",
    "fp32": "partial log_sums phases query_scale scales largest_parts total_parts probs temperatures "
    "uniforms block_sums parts",
    "i32": "tiles segments page_table positions slots rows token_parts first_rows "
    "drafts first_drafts num_drafts",
    "i64": "tokens counts bonus",
}
POINTER_TYPES = {name: f"*{kind}" for kind, names in POINTERS.items() for name in names.split()}
FLOATS = ("eps", "softmax_scale")


def compile_kernel(
    label: str,
    kernel: triton.JITFunction,
    constants: Mapping[str, object],
    cache: str = "bf16",
    **options: int,
) -> None:
    """Arguments that are no constants have the type that their name says."""
    types = {**POINTER_TYPES, "cache": f"*{cache}", "log_sums": "*fp32"}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "fp32" if name in FLOATS else "i32")
        for name in kernel.arg_names
    }
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=aligned)
    compiled = triton.compile(source, target=TARGET, options=options)
    print(label, compiled.metadata.shared)


def main() -> None:
    heads = {"NUM_HEADS": 32, "NUM_KV_HEADS": 8, "HEAD_DIM": 128}
    for shape in attention.TILE_SHAPES:
        for scales, cache in ((True, "fp8e4nv"), (False, "bf16")):
            constants = heads | {
                "PAGE_SIZE": 64, "BLOCK_M": shape.block_m, "BLOCK_N": shape.block_n, "BLOCK_D": 128,
                "NUM_SPLITS": 4, "MIN_SPLIT_BLOCKS": 2, "DOT_DTYPE": tl.bfloat16,
            }  # fmt: skip
            if not scales:
                constants["scales"] = None
            compile_kernel(
                f"attend {shape.block_m} {cache}", attention._attend, constants, cache,
                num_warps=shape.num_warps, num_stages=shape.num_stages,
            )  # fmt: skip
    compile_kernel(
        "merge_splits", attention._merge_splits, heads | {"BLOCK_M": 16, "BLOCK_D": 128, "NUM_SPLITS": 32}
    )
    block = {"PAGE_SIZE": 64, "BLOCK_HEADS": 8, "BLOCK_D": 128}
    compile_kernel("store_kv", store_kv._store_kv, heads | block, "fp8e4nv")
    compile_kernel("rms_norm", rms_norm._rms_norm, {"SIZE": 5120, "BLOCK": 8192}, num_warps=16)
    compile_kernel("swiglu", swiglu._swiglu, {"SIZE": 14336, "BLOCK": 1024})
    vocabulary = {"VOCAB": 131072, "BLOCK": 4096}
    compile_kernel(
        "scan", confidence._scan, vocabulary | {"NUM_SPLITS": 4, "BLOCKS_PER_SPLIT": 8}, num_warps=8
    )
    compile_kernel("sum_blocks", verify._sum_blocks, vocabulary, num_warps=8)
    compile_kernel("invert", verify._invert, vocabulary | {"MAX_BLOCKS": 32}, num_warps=8)
    compile_kernel("accept", verify._accept, {"BLOCK": 64}, num_warps=1)
    blocks = {"RANK": 128, "BLOCK_ROWS": 16, "BLOCK_RANK": 64, "DOT_DTYPE": tl.bfloat16}
    inner = {"SIZE_IN": 4096, "BLOCKS_PER_SPLIT": 2, "BLOCK_IN": 128}
    compile_kernel("project_down", adapter._project_down, blocks | inner)
    compile_kernel(
        "project_up", adapter._project_up, blocks | {"SIZE_OUT": 4096, "NUM_SPLITS": 16, "BLOCK_OUT": 128}
    )


if __name__ == "__main__":
    main()
