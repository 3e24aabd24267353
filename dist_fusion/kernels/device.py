"""The Triton kernels: what runs on the GPU, and nothing of how it is started.

One head of one pair is a row of tiles, student's and teacher's beside each other. Scores are in base 2 (`exp2` is what
the hardware has) and in fp32 whatever the inputs are; a row's loss and slopes come out in nats. Padding is never read:
masked rows are masked in the load. Formulas: with s, t the scores of student and teacher, p, r their softmaxes over the
valid keys, and L_S, L_T the logarithms of the softmaxes' sums,

    KL(S || T) = e - L_S + L_T          slope  p (s - t - e)     e = sum p (s - t)
    KL(T || S) = sum r (t - s) - L_T + L_S     slope  p - r

Where all keys fit into one tile a single launch gives loss and both gradients. Where they do not, rows are read twice:
once for their sums (streaming softmax, arXiv:2205.14135, with one cross term more), once for the slopes.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-1.0e30)
"""In place of minus infinity, whose differences are not numbers."""


@triton.jit
def _load(start, row_stride, rows, live, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows of queries or keys, [rows, PADDED]; zeros where not `live` and beyond WIDTH."""
    columns = tl.arange(0, PADDED)
    places = start + rows[:, None] * row_stride + columns[None, :]
    if WIDTH == PADDED:
        return tl.load(places, mask=live[:, None], other=0.0)
    else:
        return tl.load(places, mask=live[:, None] & (columns[None, :] < WIDTH), other=0.0)


@triton.jit
def _store(start, row_stride, rows, inside, values, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Write [rows, PADDED] in the type of the pointer."""
    columns = tl.arange(0, PADDED)
    places = start + rows[:, None] * row_stride + columns[None, :]
    values = values.to(start.dtype.element_ty)
    if WIDTH == PADDED:
        tl.store(places, values, mask=inside[:, None])
    else:
        tl.store(places, values, mask=inside[:, None] & (columns[None, :] < WIDTH))


@triton.jit
def _live(mask, mask_stride, pair, rows, length, MASKED: tl.constexpr):
    """Which of `rows` exist and are valid."""
    inside = rows < length
    if MASKED:
        inside = inside & (tl.load(mask + pair * mask_stride + rows, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _dot(a, b, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter multiplies the bits of bf16 as if they were integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _heads(heads, head_map, MAPPED: tl.constexpr):
    """This program's pair, its head, and the teacher's: 64-bit, for a large batch has more than 2^31 numbers."""
    program = tl.program_id(0)
    pair, head = (program // heads).to(tl.int64), (program % heads).to(tl.int64)
    teacher_head = head
    if MAPPED:
        teacher_head = tl.load(head_map + head).to(tl.int64)
    return program, pair, head, teacher_head


@triton.jit
def _whole_rows(s, t, live, TOWARDS_TEACHER: tl.constexpr):
    """Rows with all their keys in the tile -> the KL of each, and the slopes."""
    s_max = tl.max(tl.where(live[None, :], s, FLOOR), 1)
    t_max = tl.max(tl.where(live[None, :], t, FLOOR), 1)
    s = tl.where(live[None, :], s - s_max[:, None], FLOOR)
    t = tl.where(live[None, :], t - t_max[:, None], FLOOR)
    p, r = tl.exp2(s), tl.exp2(t)
    # At least 1, the largest key's own; less only where there is no key, and then nothing may be divided by 0.
    s_sum, t_sum = tl.maximum(tl.sum(p, 1), 1.0), tl.maximum(tl.sum(r, 1), 1.0)
    ratio = tl.where(live[None, :], (s - t) * LN2, 0.0)
    sums = (tl.log2(s_sum) - tl.log2(t_sum)) * LN2
    p = p / s_sum[:, None]
    if TOWARDS_TEACHER:
        e = tl.sum(p * ratio, 1)
        return e - sums, tl.where(live[None, :], p * (ratio - e[:, None]), 0.0)
    else:
        r = r / t_sum[:, None]
        return sums - tl.sum(r * ratio, 1), tl.where(live[None, :], p - r, 0.0)


@triton.jit
def _more_keys(s_max, s_sum, t_max, t_sum, cross, s, t, live, TOWARDS_TEACHER: tl.constexpr):
    """One more block of keys: both running maxima and sums, and the cross term about them."""
    s, t = tl.where(live[None, :], s, FLOOR), tl.where(live[None, :], t, FLOOR)
    s_new, t_new = tl.maximum(s_max, tl.max(s, 1)), tl.maximum(t_max, tl.max(t, 1))
    s_kept, t_kept = tl.exp2(s_max - s_new), tl.exp2(t_max - t_new)
    s, t = s - s_new[:, None], t - t_new[:, None]
    p = tl.where(live[None, :], tl.exp2(s), 0.0)
    r = tl.where(live[None, :], tl.exp2(t), 0.0)
    ratio = tl.where(live[None, :], s - t, 0.0)
    # How far the maxima moved apart; nothing to move before the first valid key.
    moved = tl.where(s_sum > 0, (s_max - s_new) - (t_max - t_new), 0.0)
    if TOWARDS_TEACHER:
        cross = s_kept * (cross + s_sum * moved) + tl.sum(p * ratio, 1)
    else:
        cross = t_kept * (cross - t_sum * moved) - tl.sum(r * ratio, 1)
    return s_new, s_kept * s_sum + tl.sum(p, 1), t_new, t_kept * t_sum + tl.sum(r, 1), cross


@triton.jit
def _row_sums(s_max, s_sum, t_max, t_sum, cross, TOWARDS_TEACHER: tl.constexpr):
    """After the last block: the KL of each row, and in base 2 the two numbers that its slopes need."""
    s_sum, t_sum = tl.where(s_sum > 0, s_sum, 1.0), tl.where(t_sum > 0, t_sum, 1.0)
    sums = tl.log2(s_sum) - tl.log2(t_sum)
    if TOWARDS_TEACHER:
        e = cross / s_sum
        return (e - sums) * LN2, s_max + tl.log2(s_sum), e + s_max - t_max
    else:
        return (cross / t_sum + sums) * LN2, s_max + tl.log2(s_sum), t_max + tl.log2(t_sum)


@triton.jit
def _slopes(s, t, s_log, other, live, TOWARDS_TEACHER: tl.constexpr):
    """Slopes of a block of keys, from `_row_sums`."""
    p = tl.exp2(s - s_log[:, None])
    if TOWARDS_TEACHER:
        slopes = p * (s - t - other[:, None]) * LN2
    else:
        slopes = p - tl.exp2(t - other[:, None])
    return tl.where(live, slopes, 0.0)


@triton.jit
def short_keys(
    SQ, SK, TQ, TK, QM, KM, HM, COEF, SLOPE, LOSS, DQ, DK,
    sq_p, sq_h, sq_m, sk_p, sk_h, sk_n, tq_p, tq_h, tq_m, tk_p, tk_h, tk_n,
    dq_p, dq_h, dq_m, dk_p, dk_h, dk_n, qm_p, km_p, heads, queries, keys, s_scale, t_scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, T_WIDTH: tl.constexpr, T_PADDED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, TOWARDS_TEACHER: tl.constexpr, GRADIENTS: tl.constexpr,
    Q_MASKED: tl.constexpr, K_MASKED: tl.constexpr, MAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """All keys in one tile: loss and both gradients in one pass over the queries. A program a (pair, head)."""
    program, pair, head, teacher_head = _heads(heads, HM, MAPPED)
    n = tl.arange(0, KEYS)
    k_live = _live(KM, km_p, pair, n, keys, K_MASKED)
    sk = _load(SK + pair * sk_p + head * sk_h, sk_n, n, k_live, WIDTH, PADDED)
    tk = _load(TK + pair * tk_p + teacher_head * tk_h, tk_n, n, k_live, T_WIDTH, T_PADDED)
    slope = tl.load(SLOPE + pair) * (s_scale * LN2)
    dk = tl.zeros([KEYS, PADDED], tl.float32)
    loss = tl.zeros([QUERIES], tl.float32)
    for start in range(0, queries, QUERIES):
        m = start + tl.arange(0, QUERIES)
        q_live = _live(QM, qm_p, pair, m, queries, Q_MASKED)
        sq = _load(SQ + pair * sq_p + head * sq_h, sq_m, m, q_live, WIDTH, PADDED)
        tq = _load(TQ + pair * tq_p + teacher_head * tq_h, tq_m, m, q_live, T_WIDTH, T_PADDED)
        s = _dot(sq, tl.trans(sk), UPCAST) * s_scale
        t = _dot(tq, tl.trans(tk), UPCAST) * t_scale
        row, slopes = _whole_rows(s, t, k_live, TOWARDS_TEACHER)
        loss += tl.where(q_live, row, 0.0)
        if GRADIENTS:
            slopes = tl.where(q_live[:, None], slopes, 0.0).to(sk.dtype)
            dq = _dot(slopes, sk, UPCAST) * slope
            _store(DQ + pair * dq_p + head * dq_h, dq_m, m, m < queries, dq, WIDTH, PADDED)
            dk += _dot(tl.trans(slopes), sq, UPCAST)
    if GRADIENTS:
        _store(DK + pair * dk_p + head * dk_h, dk_n, n, n < keys, dk * slope, WIDTH, PADDED)
    tl.store(LOSS + program, tl.sum(loss, 0) * tl.load(COEF + pair))


@triton.jit
def short_queries(
    SQ, SK, TQ, TK, QM, KM, HM, COEF, SLOPE, LOSS, DQ, DK,
    sq_p, sq_h, sq_m, sk_p, sk_h, sk_n, tq_p, tq_h, tq_m, tk_p, tk_h, tk_n,
    dq_p, dq_h, dq_m, dk_p, dk_h, dk_n, qm_p, km_p, heads, queries, keys, s_scale, t_scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, T_WIDTH: tl.constexpr, T_PADDED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, TOWARDS_TEACHER: tl.constexpr, GRADIENTS: tl.constexpr,
    Q_MASKED: tl.constexpr, K_MASKED: tl.constexpr, MAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """All queries in one tile, two passes over the keys: row sums, then slopes. A program a (pair, head)."""
    program, pair, head, teacher_head = _heads(heads, HM, MAPPED)
    m = tl.arange(0, QUERIES)
    q_live = _live(QM, qm_p, pair, m, queries, Q_MASKED)
    sq = _load(SQ + pair * sq_p + head * sq_h, sq_m, m, q_live, WIDTH, PADDED)
    tq = _load(TQ + pair * tq_p + teacher_head * tq_h, tq_m, m, q_live, T_WIDTH, T_PADDED)
    s_max, t_max = tl.full([QUERIES], FLOOR, tl.float32), tl.full([QUERIES], FLOOR, tl.float32)
    s_sum, t_sum = tl.zeros([QUERIES], tl.float32), tl.zeros([QUERIES], tl.float32)
    cross = tl.zeros([QUERIES], tl.float32)
    for start in range(0, keys, KEYS):
        n = start + tl.arange(0, KEYS)
        k_live = _live(KM, km_p, pair, n, keys, K_MASKED)
        sk = _load(SK + pair * sk_p + head * sk_h, sk_n, n, k_live, WIDTH, PADDED)
        tk = _load(TK + pair * tk_p + teacher_head * tk_h, tk_n, n, k_live, T_WIDTH, T_PADDED)
        s = _dot(sq, tl.trans(sk), UPCAST) * s_scale
        t = _dot(tq, tl.trans(tk), UPCAST) * t_scale
        s_max, s_sum, t_max, t_sum, cross = _more_keys(s_max, s_sum, t_max, t_sum, cross, s, t, k_live, TOWARDS_TEACHER)
    row, s_log, other = _row_sums(s_max, s_sum, t_max, t_sum, cross, TOWARDS_TEACHER)
    q_live = q_live & (s_sum > 0)
    tl.store(LOSS + program, tl.sum(tl.where(q_live, row, 0.0), 0) * tl.load(COEF + pair))
    if GRADIENTS:
        slope = tl.load(SLOPE + pair) * (s_scale * LN2)
        dq = tl.zeros([QUERIES, PADDED], tl.float32)
        for start in range(0, keys, KEYS):
            n = start + tl.arange(0, KEYS)
            k_live = _live(KM, km_p, pair, n, keys, K_MASKED)
            sk = _load(SK + pair * sk_p + head * sk_h, sk_n, n, k_live, WIDTH, PADDED)
            tk = _load(TK + pair * tk_p + teacher_head * tk_h, tk_n, n, k_live, T_WIDTH, T_PADDED)
            s = _dot(sq, tl.trans(sk), UPCAST) * s_scale
            t = _dot(tq, tl.trans(tk), UPCAST) * t_scale
            live = q_live[:, None] & k_live[None, :]
            slopes = _slopes(s, t, s_log, other, live, TOWARDS_TEACHER).to(sk.dtype)
            dq += _dot(slopes, sk, UPCAST)
            dk = _dot(tl.trans(slopes), sq, UPCAST) * slope
            _store(DK + pair * dk_p + head * dk_h, dk_n, n, n < keys, dk, WIDTH, PADDED)
        _store(DQ + pair * dq_p + head * dq_h, dq_m, m, m < queries, dq * slope, WIDTH, PADDED)


@triton.jit
def row_sums(
    SQ, SK, TQ, TK, QM, KM, HM, COEF, LOSS, S_LOG, OTHER,
    sq_p, sq_h, sq_m, sk_p, sk_h, sk_n, tq_p, tq_h, tq_m, tk_p, tk_h, tk_n,
    qm_p, km_p, heads, queries, keys, s_scale, t_scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, T_WIDTH: tl.constexpr, T_PADDED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, TOWARDS_TEACHER: tl.constexpr,
    Q_MASKED: tl.constexpr, K_MASKED: tl.constexpr, MAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Both sides long: the loss, and two numbers a row. A program a (pair, head) and block of queries."""
    program, pair, head, teacher_head = _heads(heads, HM, MAPPED)
    m = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    q_live = _live(QM, qm_p, pair, m, queries, Q_MASKED)
    sq = _load(SQ + pair * sq_p + head * sq_h, sq_m, m, q_live, WIDTH, PADDED)
    tq = _load(TQ + pair * tq_p + teacher_head * tq_h, tq_m, m, q_live, T_WIDTH, T_PADDED)
    s_max, t_max = tl.full([QUERIES], FLOOR, tl.float32), tl.full([QUERIES], FLOOR, tl.float32)
    s_sum, t_sum = tl.zeros([QUERIES], tl.float32), tl.zeros([QUERIES], tl.float32)
    cross = tl.zeros([QUERIES], tl.float32)
    for start in range(0, keys, KEYS):
        n = start + tl.arange(0, KEYS)
        k_live = _live(KM, km_p, pair, n, keys, K_MASKED)
        sk = _load(SK + pair * sk_p + head * sk_h, sk_n, n, k_live, WIDTH, PADDED)
        tk = _load(TK + pair * tk_p + teacher_head * tk_h, tk_n, n, k_live, T_WIDTH, T_PADDED)
        s = _dot(sq, tl.trans(sk), UPCAST) * s_scale
        t = _dot(tq, tl.trans(tk), UPCAST) * t_scale
        s_max, s_sum, t_max, t_sum, cross = _more_keys(s_max, s_sum, t_max, t_sum, cross, s, t, k_live, TOWARDS_TEACHER)
    row, s_log, other = _row_sums(s_max, s_sum, t_max, t_sum, cross, TOWARDS_TEACHER)
    q_live = q_live & (s_sum > 0)
    # A row that is none says so by a sum so large that nothing is left of its softmax.
    tl.store(S_LOG + program.to(tl.int64) * queries + m, tl.where(q_live, s_log, -FLOOR), mask=m < queries)
    tl.store(OTHER + program.to(tl.int64) * queries + m, tl.where(q_live, other, 0.0), mask=m < queries)
    loss = tl.sum(tl.where(q_live, row, 0.0), 0) * tl.load(COEF + pair)
    tl.store(LOSS + program * tl.num_programs(1) + tl.program_id(1), loss)


@triton.jit
def query_gradients(
    SQ, SK, TQ, TK, KM, HM, SLOPE, S_LOG, OTHER, DQ,
    sq_p, sq_h, sq_m, sk_p, sk_h, sk_n, tq_p, tq_h, tq_m, tk_p, tk_h, tk_n,
    dq_p, dq_h, dq_m, km_p, heads, queries, keys, s_scale, t_scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, T_WIDTH: tl.constexpr, T_PADDED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, TOWARDS_TEACHER: tl.constexpr,
    K_MASKED: tl.constexpr, MAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Both sides long: the gradient of a block of queries, from `row_sums`."""
    program, pair, head, teacher_head = _heads(heads, HM, MAPPED)
    m = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    s_log = tl.load(S_LOG + program.to(tl.int64) * queries + m, mask=m < queries, other=1.0e30)
    other = tl.load(OTHER + program.to(tl.int64) * queries + m, mask=m < queries, other=0.0)
    q_live = s_log < 1.0e29
    sq = _load(SQ + pair * sq_p + head * sq_h, sq_m, m, q_live, WIDTH, PADDED)
    tq = _load(TQ + pair * tq_p + teacher_head * tq_h, tq_m, m, q_live, T_WIDTH, T_PADDED)
    dq = tl.zeros([QUERIES, PADDED], tl.float32)
    for start in range(0, keys, KEYS):
        n = start + tl.arange(0, KEYS)
        k_live = _live(KM, km_p, pair, n, keys, K_MASKED)
        sk = _load(SK + pair * sk_p + head * sk_h, sk_n, n, k_live, WIDTH, PADDED)
        tk = _load(TK + pair * tk_p + teacher_head * tk_h, tk_n, n, k_live, T_WIDTH, T_PADDED)
        s = _dot(sq, tl.trans(sk), UPCAST) * s_scale
        t = _dot(tq, tl.trans(tk), UPCAST) * t_scale
        live = q_live[:, None] & k_live[None, :]
        dq += _dot(_slopes(s, t, s_log, other, live, TOWARDS_TEACHER).to(sk.dtype), sk, UPCAST)
    slope = tl.load(SLOPE + pair) * (s_scale * LN2)
    _store(DQ + pair * dq_p + head * dq_h, dq_m, m, m < queries, dq * slope, WIDTH, PADDED)


@triton.jit
def key_gradients(
    SQ, SK, TQ, TK, KM, HM, SLOPE, S_LOG, OTHER, DK,
    sq_p, sq_h, sq_m, sk_p, sk_h, sk_n, tq_p, tq_h, tq_m, tk_p, tk_h, tk_n,
    dk_p, dk_h, dk_n, km_p, heads, queries, keys, s_scale, t_scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, T_WIDTH: tl.constexpr, T_PADDED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, TOWARDS_TEACHER: tl.constexpr,
    K_MASKED: tl.constexpr, MAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Both sides long: the gradient of a block of keys, from `row_sums`."""
    program, pair, head, teacher_head = _heads(heads, HM, MAPPED)
    n = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    k_live = _live(KM, km_p, pair, n, keys, K_MASKED)
    sk = _load(SK + pair * sk_p + head * sk_h, sk_n, n, k_live, WIDTH, PADDED)
    tk = _load(TK + pair * tk_p + teacher_head * tk_h, tk_n, n, k_live, T_WIDTH, T_PADDED)
    dk = tl.zeros([KEYS, PADDED], tl.float32)
    for start in range(0, queries, QUERIES):
        m = start + tl.arange(0, QUERIES)
        s_log = tl.load(S_LOG + program.to(tl.int64) * queries + m, mask=m < queries, other=1.0e30)
        other = tl.load(OTHER + program.to(tl.int64) * queries + m, mask=m < queries, other=0.0)
        q_live = s_log < 1.0e29
        sq = _load(SQ + pair * sq_p + head * sq_h, sq_m, m, q_live, WIDTH, PADDED)
        tq = _load(TQ + pair * tq_p + teacher_head * tq_h, tq_m, m, q_live, T_WIDTH, T_PADDED)
        s = _dot(sq, tl.trans(sk), UPCAST) * s_scale
        t = _dot(tq, tl.trans(tk), UPCAST) * t_scale
        live = q_live[:, None] & k_live[None, :]
        slopes = _slopes(s, t, s_log, other, live, TOWARDS_TEACHER).to(sk.dtype)
        dk += _dot(tl.trans(slopes), sq, UPCAST)
    slope = tl.load(SLOPE + pair) * (s_scale * LN2)
    _store(DK + pair * dk_p + head * dk_h, dk_n, n, n < keys, dk * slope, WIDTH, PADDED)


@triton.jit
def rows(
    S, T, G, QM, KM, COEF, LOSS, qm_p, km_p, heads, queries, keys, s_scale, t_scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, TOWARDS_TEACHER: tl.constexpr, GRADIENTS: tl.constexpr,
    Q_MASKED: tl.constexpr, K_MASKED: tl.constexpr,
):  # fmt: skip
    """No product in here: raw scores S and T [P * H, M, N] in, slopes G out. For fp32, and GPUs before sm_80."""
    program = tl.program_id(0).to(tl.int64)
    pair = program // heads
    m, n = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES), tl.arange(0, KEYS)
    q_live = _live(QM, qm_p, pair, m, queries, Q_MASKED)
    k_live = _live(KM, km_p, pair, n, keys, K_MASKED)
    places = program * queries * keys + m[:, None] * keys + n[None, :]
    inside = (m < queries)[:, None] & (n < keys)[None, :]
    s = tl.load(S + places, mask=inside, other=0.0).to(tl.float32) * s_scale
    t = tl.load(T + places, mask=inside, other=0.0).to(tl.float32) * t_scale
    row, slopes = _whole_rows(s, t, k_live, TOWARDS_TEACHER)
    if GRADIENTS:
        slopes = tl.where(q_live[:, None], slopes, 0.0)
        tl.store(G + places, slopes.to(G.dtype.element_ty), mask=inside)
    loss = tl.sum(tl.where(q_live, row, 0.0), 0) * tl.load(COEF + pair)
    tl.store(LOSS + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), loss)


@triton.jit
def scaled(X, FACTOR, size, BLOCK: tl.constexpr):
    """Multiply in place by a factor on the device; where it is 1 nothing is read or written."""
    factor = tl.load(FACTOR)
    if factor != 1.0:
        places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = places < size
        x = tl.load(X + places, mask=inside, other=0.0)
        tl.store(X + places, (x.to(tl.float32) * factor).to(X.dtype.element_ty), mask=inside)
