"""Logits as rules change them before the choice: penalties, biases, and masks of what may come.

A rule of one token makes of its logit x

    y = (x / scale if x > 0 else x * scale) - taken_off + added

in float32, each operation rounded; then all that the row's mask does not allow becomes -inf. A row's rules
are two lists: one that other rows may share, and its own, which holds instead of the shared one for the
tokens in both. The model's own logits stay as they are.
"""

import torch
import triton
import triton.language as tl

RULE_FIELDS = tl.constexpr(4)
"""Of a rule of one token: its id, and the bits of scale, taken_off and added, which are float32."""
ROW_FIELDS = tl.constexpr(6)
"""Of a row with rules: the row (-1: none), where its shared rules begin and how many they are, the same of
its own, and where its mask begins, a bit a token, the least first (-1: none). Places are of `words`."""
_BLOCK = 4096
_BLOCK_RULES = 256


def apply_rules(
    logits: torch.Tensor, ruled: torch.Tensor, words: torch.Tensor, mask_token_id: int | None
) -> torch.Tensor:
    """The logits [S, vocab] float32 of the rows that have rules, in their order in `ruled`.

    logits: [R, vocab], rows contiguous
    ruled: [S, 6] int32 (ROW_FIELDS); lines of padding are left as they are
    words: [N] int32, rules and masks; a mask has a bit for each token of the vocabulary
    """
    vocab = logits.shape[1]
    assert logits.stride(1) == 1
    lines = torch.empty(len(ruled), vocab, dtype=torch.float32, device=logits.device)
    if len(ruled):
        block = min(_BLOCK, triton.next_power_of_2(vocab))
        _apply_rules[(len(ruled), triton.cdiv(vocab, block))](
            logits, lines, ruled, words, logits.stride(0), -1 if mask_token_id is None else mask_token_id,
            VOCAB=vocab, BLOCK=block, BLOCK_RULES=_BLOCK_RULES, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return lines


@triton.jit
def _apply_rules(
    logits,
    lines,
    ruled,
    words,
    stride,
    mask_token_id,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_RULES: tl.constexpr,
):
    """Makes one block of one line. Its threads wait for each other between writes to the same place."""
    slot = tl.program_id(0).to(tl.int64)
    fields = ruled + slot * ROW_FIELDS
    row = tl.load(fields).to(tl.int64)
    if row < 0:
        return
    start = tl.program_id(1) * BLOCK
    token = start + tl.arange(0, BLOCK)
    line = lines + slot * VOCAB
    x = tl.load(logits + row * stride + token, mask=token < VOCAB, other=0.0).to(tl.float32)
    tl.store(line + token, tl.where(token == mask_token_id, float("-inf"), x), mask=token < VOCAB)
    tl.debug_barrier()
    for kind in tl.static_range(2):
        first = tl.load(fields + 1 + 2 * kind)
        count = tl.load(fields + 2 + 2 * kind)
        for done in range(0, count, BLOCK_RULES):
            number = done + tl.arange(0, BLOCK_RULES)
            at = words + first + number * RULE_FIELDS
            is_rule = number < count
            rule_token = tl.load(at, mask=is_rule, other=-1)
            is_rule = (rule_token >= start) & (rule_token < start + BLOCK) & (rule_token != mask_token_id)
            scale = tl.load(at + 1, mask=is_rule, other=1).to(tl.float32, bitcast=True)
            taken_off = tl.load(at + 2, mask=is_rule, other=0).to(tl.float32, bitcast=True)
            added = tl.load(at + 3, mask=is_rule, other=0).to(tl.float32, bitcast=True)
            y = tl.load(logits + row * stride + rule_token, mask=is_rule, other=0.0).to(tl.float32)
            y = tl.where(y > 0, tl.div_rn(y, scale), y * scale) - taken_off + added
            tl.store(line + rule_token, y, mask=is_rule)
        tl.debug_barrier()
    allowed = tl.load(fields + 5)
    if allowed >= 0:
        bits = tl.load(words + allowed + token // 32, mask=token < VOCAB, other=0)
        is_allowed = (bits >> (token % 32)) & 1 != 0
        tl.store(line + token, float("-inf"), mask=(token < VOCAB) & (is_allowed == 0))


def apply_rules_reference(
    logits: torch.Tensor, ruled: torch.Tensor, words: torch.Tensor, mask_token_id: int | None
) -> torch.Tensor:
    """The same by the definition, a rule at a time."""
    vocab = logits.shape[1]
    lines = torch.full((len(ruled), vocab), torch.nan, device=logits.device)
    for line, (row, *lists, allowed) in zip(lines, ruled.tolist(), strict=True):
        if row < 0:
            continue
        line.copy_(logits[row])
        for first, count in (lists[:2], lists[2:]):
            rules = words[first : first + count * RULE_FIELDS.value].view(-1, RULE_FIELDS.value)
            for token, (scale, taken_off, added) in zip(
                rules[:, 0].tolist(), rules[:, 1:].contiguous().view(torch.float32), strict=True
            ):
                x = logits[row, token].float()
                line[token] = (x / scale if x > 0 else x * scale) - taken_off + added
        if mask_token_id is not None:
            line[mask_token_id] = -torch.inf
        if allowed >= 0:
            for token in range(vocab):
                if not int(words[allowed + token // 32]) >> token % 32 & 1:
                    line[token] = -torch.inf
    return lines
