"""The Triton kernels. Importing this needs Triton; ``ops/triton.py`` launches them and says what they compute.

A program takes ROWS rows and walks their edges DEG at a time, over BF of the F channels: tiles of (ROWS, DEG, BF). Sums
over edges are loops in the order of the row, so nothing is atomic. ``pq``, ``w_e`` and ``table`` may be stored in
bfloat16; everything is computed and added up in float32. A row of a node array is addressed in 64 bits. An index that
leaves its array makes its row NaN; it is never followed.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def log2_1p(t):
    """log2(1 + t) for t in [0, 1], relative error 3e-8 before rounding; lg2.approx(1 + t) would lose small t."""
    p = 7.549182125e-03 * t - 4.256706190e-02
    p = p * t + 1.128561932e-01
    p = p * t - 1.971189698e-01
    p = p * t + 2.756414122e-01
    p = p * t - 3.584084724e-01
    p = p * t + 4.806929573e-01
    p = p * t - 7.213402080e-01
    p = p * t + 1.442694997e00
    return p * t


@triton.jit
def softplus2(c2):
    """softplus(c) / ln 2 from c2 = c log2(e)."""
    return tl.maximum(c2, 0.0) + log2_1p(tl.exp2(-tl.abs(c2)))


@triton.jit
def at_most_126(x):
    """NaN stays NaN, which a plain minimum takes for 126."""
    return tl.minimum(x, 126.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def gate2(f2, c2):
    """sigmoid(f) softplus(c) / ln 2 from f2 = -f log2(e), c2 = c log2(e)."""
    return softplus2(c2) / (1.0 + tl.exp2(at_most_126(f2)))


@triton.jit
def gate_gradient2(f2, c2):
    """d/df and d/dc of sigmoid(f) softplus(c); 1 - sigmoid without cancellation."""
    u = tl.exp2(at_most_126(f2))
    s = 1.0 / (1.0 + u)
    t = tl.exp2(-tl.abs(c2))
    softplus = (tl.maximum(c2, 0.0) + log2_1p(t)) * LN2
    r = 1.0 / (1.0 + t)
    return s * softplus * (u * s), s * tl.where(c2 >= 0, r, t * r)


@triton.jit
def edge_range(row_ptr, rows, n_rows, n_edges):
    """First and last edge of each row, and whether they leave the array."""
    ok = rows < n_rows
    begin = tl.load(row_ptr + rows, mask=ok, other=0)
    end = tl.load(row_ptr + rows + 1, mask=ok, other=0)
    bad = (begin < 0) | (end < begin) | (end > n_edges)
    return tl.where(bad, 0, begin), tl.where(bad, 0, end), bad


@triton.jit
def other_end(index, at, live, n_rows):
    """The row at the other end of each edge, whether it may be read, and NaN where it should but may not."""
    row = tl.load(index + at, mask=live, other=0)
    outside = (row < 0) | (row >= n_rows)
    poison = tl.where(outside, float("nan"), 0.0)
    return tl.where(outside, 0, row).to(tl.int64), live & (row >= 0) & (row < n_rows), poison


@triton.jit
def edge_term(w_e, table, distance, e, live, poison, cols, cols_ok, dmin, inverse_step, F: tl.constexpr,
              K: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """r = e(d) w_e for a tile of edges, both halves: from the WINDOW nearest Gaussians (0: from all of them, by
    ``tl.dot``), or ``table``'s row of each."""
    r_f = poison[:, :, None] + (cols * 0).to(tl.float32)
    r_c = r_f
    if table is not None:
        at = table + e.to(tl.int64)[:, :, None] * (2 * F) + cols
        ok = live[:, :, None] & cols_ok
        r_f += tl.load(at, mask=ok, other=0.0).to(tl.float32)
        r_c += tl.load(at + F, mask=ok, other=0.0).to(tl.float32)
    elif WINDOW > 0:
        u = (tl.load(distance + e, mask=live, other=0.0) - dmin) * inverse_step
        first = tl.floor(u + 0.5).to(tl.int32) - WINDOW // 2
        first = tl.minimum(tl.maximum(first, 0), K - WINDOW)  # whole numbers: a NaN distance reads inside the array too
        for t in tl.static_range(WINDOW):
            x = u - (first + t).to(tl.float32)
            a = tl.exp2(x * x * -LOG2E)[:, :, None]
            w = w_e + (first + t)[:, :, None] * (2 * F) + cols
            r_f += a * tl.load(w, mask=cols_ok, other=0.0).to(tl.float32)
            r_c += a * tl.load(w + F, mask=cols_ok, other=0.0).to(tl.float32)
    else:
        EDGES: tl.constexpr = e.shape[0] * e.shape[1]
        BF: tl.constexpr = cols.shape[2]
        u = (tl.load(distance + e, mask=live, other=0.0) - dmin) * inverse_step
        u = tl.reshape(u, [EDGES])[:, None]
        flat, flat_ok = tl.reshape(cols, [1, BF]), tl.reshape(cols_ok, [1, BF])
        dot_f = tl.zeros([EDGES, BF], tl.float32)
        dot_c = tl.zeros([EDGES, BF], tl.float32)
        for k in tl.static_range(0, K, 16):
            ks = k + tl.arange(0, 16)
            x = u - ks.to(tl.float32)[None, :]
            a = tl.exp2(x * x * -LOG2E)
            w, ok = w_e + ks[:, None] * (2 * F) + flat, (ks < K)[:, None] & flat_ok
            w_f = tl.load(w, mask=ok, other=0.0).to(tl.float32)
            w_c = tl.load(w + F, mask=ok, other=0.0).to(tl.float32)
            dot_f = tl.dot(a, w_f, dot_f, input_precision=PRECISION)
            dot_c = tl.dot(a, w_c, dot_c, input_precision=PRECISION)
        r_f += tl.reshape(dot_f, [e.shape[0], e.shape[1], BF])
        r_c += tl.reshape(dot_c, [e.shape[0], e.shape[1], BF])
    return r_f, r_c


@triton.jit
def edge_vector(features, distance, e, live, ks, dmin, inverse_step, K: tl.constexpr):
    """e(d) for a tile of edges, (ROWS, DEG, BK); zero for edges and numbers that do not exist."""
    ok = live[:, :, None] & (ks < K)[None, None, :]
    if features is None:
        u = (tl.load(distance + e, mask=live, other=0.0) - dmin) * inverse_step
        x = u[:, :, None] - ks.to(tl.float32)[None, None, :]
        return tl.where(ok, tl.exp2(x * x * -LOG2E), 0.0)
    else:
        return tl.load(features + e.to(tl.int64)[:, :, None] * K + ks[None, None, :], mask=ok, other=0.0)


@triton.jit
def order_layer(of_rows, of_edges, shift, rstd1, a1, scale2, shift2, rstd2, weight, bias, mean1, var1, gamma1, mean2,
                var2, gamma2, beta2, eps1, eps2, F: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
                BF: tl.constexpr):  # fmt: skip
    """What a convolution's parameters amount to: W / std as rows, (F, 4F), and edges, (K, 2F), are multiplied with it,
    and the rows' shift (4F); 1 / std and gamma / std of the first norm, scale, shift and 1 / std of the second."""
    c = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x = tl.program_id(1) * BF + tl.arange(0, BF)
    c_ok = c < 2 * F
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.load(var1 + c, mask=c_ok, other=1.0) + eps1))
    ok = c_ok[:, None] & (x < 2 * F + K)[None, :]
    w = tl.load(weight + c[:, None] * (2 * F + K) + x[None, :], mask=ok, other=0.0) * scale[:, None]
    row = tl.where(x < F, x * (4 * F), (x - F) * (4 * F) + 2 * F)
    tl.store(of_rows + row[None, :] + c[:, None], w, mask=ok & (x < 2 * F)[None, :])
    tl.store(of_edges + (x - 2 * F)[None, :] * (2 * F) + c[:, None], w, mask=ok & (x >= 2 * F)[None, :])
    if tl.program_id(1) == 0:
        less = -tl.load(mean1 + c, mask=c_ok, other=0.0)
        if bias is not None:
            less += tl.load(bias + c, mask=c_ok, other=0.0)
        tl.store(shift + c, less * scale, mask=c_ok)
        tl.store(shift + 2 * F + c, less * 0.0, mask=c_ok)
        tl.store(rstd1 + c, scale, mask=c_ok)
        tl.store(a1 + c, tl.load(gamma1 + c, mask=c_ok, other=0.0) * scale, mask=c_ok)
        f_ok = c < F
        second = tl.div_rn(1.0, tl.sqrt_rn(tl.load(var2 + c, mask=f_ok, other=1.0) + eps2))
        factor = tl.load(gamma2 + c, mask=f_ok, other=0.0) * second
        tl.store(rstd2 + c, second, mask=f_ok)
        tl.store(scale2 + c, factor, mask=f_ok)
        less = tl.load(mean2 + c, mask=f_ok, other=0.0) * factor
        tl.store(shift2 + c, tl.load(beta2 + c, mask=f_ok, other=0.0) - less, mask=f_ok)


@triton.jit
def gate_sum(m, out, pq, h, w_e, table, gamma1, beta1, scale2, shift2, distance, sender, row_ptr, n_rows, n_edges,
             dmin, inverse_step, F: tl.constexpr, K: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr,
             DEG: tl.constexpr, BF: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """m_i = sum_j sigmoid(y[:F]) softplus(y[F:]), y_ij = gamma1 (p_i + q_j + r_ij) + beta1, and
    out_i = softplus(h_i + scale2 m_i + shift2). ``m`` or ``out`` may be None."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BF + tl.arange(0, BF)
    rows_ok, cols_ok = rows < n_rows, cols < F
    ok = rows_ok[:, None] & cols_ok[None, :]
    gf = tl.load(gamma1 + cols, mask=cols_ok, other=0.0) * -LOG2E
    gc = tl.load(gamma1 + F + cols, mask=cols_ok, other=0.0) * LOG2E
    bf = tl.load(beta1 + cols, mask=cols_ok, other=0.0) * -LOG2E
    bc = tl.load(beta1 + F + cols, mask=cols_ok, other=0.0) * LOG2E
    at = rows.to(tl.int64)[:, None] * (4 * F) + cols[None, :]
    p_f = tl.load(pq + at, mask=ok, other=0.0).to(tl.float32)
    p_c = tl.load(pq + at + F, mask=ok, other=0.0).to(tl.float32)
    begin, end, bad = edge_range(row_ptr, rows, n_rows, n_edges)
    total = tl.where(bad, float("nan"), 0.0)[:, None] + tl.zeros([ROWS, BF], tl.float32)
    wide, wide_ok = cols[None, None, :], cols_ok[None, None, :]
    for k in range(0, tl.max(end - begin, axis=0), DEG):
        e = begin[:, None] + (k + tl.arange(0, DEG))[None, :]
        live = e < end[:, None]
        j, good, poison = other_end(sender, e, live, n_rows)
        r_f, r_c = edge_term(w_e, table, distance, e, live, poison, wide, wide_ok, dmin, inverse_step, F, K, WINDOW,
                             PRECISION)  # fmt: skip
        q = pq + j[:, :, None] * (4 * F) + 2 * F + wide
        ok3 = good[:, :, None] & wide_ok
        x_f = p_f[:, None, :] + (tl.load(q, mask=ok3, other=0.0).to(tl.float32) + r_f)
        x_c = p_c[:, None, :] + (tl.load(q + F, mask=ok3, other=0.0).to(tl.float32) + r_c)
        y = gate2(x_f * gf[None, None, :] + bf[None, None, :], x_c * gc[None, None, :] + bc[None, None, :])
        total += tl.sum(tl.where(live[:, :, None], y, 0.0), axis=1)
    total *= LN2
    at = rows.to(tl.int64)[:, None] * F + cols[None, :]
    if m is not None:
        tl.store(m + at, total, mask=ok)
    if out is not None:
        scale = tl.load(scale2 + cols, mask=cols_ok, other=0.0)[None, :]
        shift = tl.load(shift2 + cols, mask=cols_ok, other=0.0)[None, :]
        u = tl.load(h + at, mask=ok, other=0.0) + (total * scale + shift)
        tl.store(out + at, softplus2(u * LOG2E) * LN2, mask=ok)


@triton.jit
def finish(out, h, m, scale2, shift2, n_rows, F: tl.constexpr, ROWS: tl.constexpr, BF: tl.constexpr):
    """out = softplus(h + scale2 m + shift2), (N, F)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BF + tl.arange(0, BF)
    cols_ok = cols < F
    ok = (rows < n_rows)[:, None] & cols_ok[None, :]
    at = rows.to(tl.int64)[:, None] * F + cols[None, :]
    scale = tl.load(scale2 + cols, mask=cols_ok, other=0.0)[None, :]
    shift = tl.load(shift2 + cols, mask=cols_ok, other=0.0)[None, :]
    u = tl.load(h + at, mask=ok, other=0.0) + (tl.load(m + at, mask=ok, other=0.0) * scale + shift)
    tl.store(out + at, softplus2(u * LOG2E) * LN2, mask=ok)


@triton.jit
def backward_rows(d_rows, x_rows, d_gamma, d_filter, d_edge, pq, d_m, w_e, table, features, gamma1, beta1, distance,
                  sender, row_ptr, n_rows, n_edges, dmin, inverse_step, F: tl.constexpr, K: tl.constexpr,
                  WINDOW: tl.constexpr, ROWS: tl.constexpr, DEG: tl.constexpr, BF: tl.constexpr, BK: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """With dy the gradient at y and x = p_i + q_j + r_ij: sum_j dy (rows of 4F), sum_j x (2F, or None), and of each
    program sum dy x (2F) and sum e dy (K, 2F). ``d_edge`` (E, 2F), or None, takes dy itself."""
    first_cols, first_ks = tl.program_id(1) * BF, tl.program_id(2) * BK
    cols, ks = first_cols + tl.arange(0, BF), first_ks + tl.arange(0, BK)
    cols_ok = cols < F
    wide, wide_ok = cols[None, None, :], cols_ok[None, None, :]
    gamma_f = tl.load(gamma1 + cols, mask=cols_ok, other=0.0)[None, None, :] * -LOG2E
    gamma_c = tl.load(gamma1 + F + cols, mask=cols_ok, other=0.0)[None, None, :] * LOG2E
    beta_f = tl.load(beta1 + cols, mask=cols_ok, other=0.0)[None, None, :] * -LOG2E
    beta_c = tl.load(beta1 + F + cols, mask=cols_ok, other=0.0)[None, None, :] * LOG2E
    dg_f = tl.zeros([ROWS, BF], tl.float32)
    dg_c = tl.zeros([ROWS, BF], tl.float32)
    dw_f = tl.zeros([BK, BF], tl.float32)
    dw_c = tl.zeros([BK, BF], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.num_programs(0)):
        rows = block * ROWS + tl.arange(0, ROWS)
        ok = (rows < n_rows)[:, None] & cols_ok[None, :]
        row = rows.to(tl.int64)[:, None]
        p_f = tl.load(pq + row * (4 * F) + cols[None, :], mask=ok, other=0.0).to(tl.float32)
        p_c = tl.load(pq + row * (4 * F) + F + cols[None, :], mask=ok, other=0.0).to(tl.float32)
        g = tl.load(d_m + row * F + cols[None, :], mask=ok, other=0.0)[:, None, :]
        begin, end, bad = edge_range(row_ptr, rows, n_rows, n_edges)
        dp_f = tl.where(bad, float("nan"), 0.0)[:, None] + tl.zeros([ROWS, BF], tl.float32)
        dp_c = dp_f
        sx_f = tl.zeros([ROWS, BF], tl.float32)
        sx_c = tl.zeros([ROWS, BF], tl.float32)
        for k in range(0, tl.max(end - begin, axis=0), DEG):
            e = begin[:, None] + (k + tl.arange(0, DEG))[None, :]
            live = e < end[:, None]
            live3 = live[:, :, None]
            j, good, poison = other_end(sender, e, live, n_rows)
            r_f, r_c = edge_term(w_e, table, distance, e, live, poison, wide, wide_ok, dmin, inverse_step, F, K, WINDOW,
                                 PRECISION)  # fmt: skip
            q = pq + j[:, :, None] * (4 * F) + 2 * F + wide
            ok3 = good[:, :, None] & wide_ok
            x_f = p_f[:, None, :] + (tl.load(q, mask=ok3, other=0.0).to(tl.float32) + r_f)
            x_c = p_c[:, None, :] + (tl.load(q + F, mask=ok3, other=0.0).to(tl.float32) + r_c)
            dy_f, dy_c = gate_gradient2(x_f * gamma_f + beta_f, x_c * gamma_c + beta_c)
            dy_f = tl.where(live3, g * dy_f, 0.0)
            dy_c = tl.where(live3, g * dy_c, 0.0)
            dp_f += tl.sum(dy_f, axis=1)
            dp_c += tl.sum(dy_c, axis=1)
            dg_f += tl.sum(dy_f * x_f, axis=1)
            dg_c += tl.sum(dy_c * x_c, axis=1)
            if x_rows is not None:
                sx_f += tl.sum(tl.where(live3, x_f, 0.0), axis=1)
                sx_c += tl.sum(tl.where(live3, x_c, 0.0), axis=1)
            if d_edge is not None:
                at = d_edge + e.to(tl.int64)[:, :, None] * (2 * F) + wide
                tl.store(at, dy_f, mask=live3 & wide_ok)
                tl.store(at + F, dy_c, mask=live3 & wide_ok)
            v = tl.trans(tl.reshape(edge_vector(features, distance, e, live, ks, dmin, inverse_step, K),
                                    [ROWS * DEG, BK]))  # fmt: skip
            dw_f = tl.dot(v, tl.reshape(dy_f, [ROWS * DEG, BF]), dw_f, input_precision=PRECISION)
            dw_c = tl.dot(v, tl.reshape(dy_c, [ROWS * DEG, BF]), dw_c, input_precision=PRECISION)
        tl.store(d_rows + row * (4 * F) + cols[None, :], dp_f, mask=ok)  # every block of K writes the same
        tl.store(d_rows + row * (4 * F) + F + cols[None, :], dp_c, mask=ok)
        if x_rows is not None:
            tl.store(x_rows + row * (2 * F) + cols[None, :], sx_f, mask=ok)
            tl.store(x_rows + row * (2 * F) + F + cols[None, :], sx_c, mask=ok)
    part = d_gamma + tl.program_id(0) * (2 * F) + cols
    tl.store(part, tl.sum(dg_f, axis=0), mask=cols_ok)
    tl.store(part + F, tl.sum(dg_c, axis=0), mask=cols_ok)
    at = (tl.program_id(0) * K + ks)[:, None] * (2 * F) + cols[None, :]
    ok = (ks < K)[:, None] & cols_ok[None, :]
    tl.store(d_filter + at, dw_f, mask=ok)
    tl.store(d_filter + at + F, dw_c, mask=ok)


@triton.jit
def backward_senders(dq, pq, d_m, w_e, table, gamma1, beta1, a1, c1, c2, row_weight, in_degree, distance, receiver,
                     edge, col_ptr, n_rows, n_edges, dmin, inverse_step, F: tl.constexpr, K: tl.constexpr,
                     WINDOW: tl.constexpr, ROWS: tl.constexpr, DEG: tl.constexpr, BF: tl.constexpr,
                     PRECISION: tl.constexpr):  # fmt: skip
    """a1 (sum_i dy_ij - in_degree_j c1 - c2 sum_i w_i x_ij) into the third and fourth quarter of the rows of 4F.

    Edges by sender: number ``t`` of the sorted list is ``edge[t]`` and comes from ``receiver[t]``. ``row_weight`` None:
    the statistics are fixed, and c1 and c2 are zero.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BF + tl.arange(0, BF)
    rows_ok, cols_ok = rows < n_rows, cols < F
    ok = rows_ok[:, None] & cols_ok[None, :]
    wide, wide_ok = cols[None, None, :], cols_ok[None, None, :]
    gamma_f = tl.load(gamma1 + cols, mask=cols_ok, other=0.0)[None, None, :] * -LOG2E
    gamma_c = tl.load(gamma1 + F + cols, mask=cols_ok, other=0.0)[None, None, :] * LOG2E
    beta_f = tl.load(beta1 + cols, mask=cols_ok, other=0.0)[None, None, :] * -LOG2E
    beta_c = tl.load(beta1 + F + cols, mask=cols_ok, other=0.0)[None, None, :] * LOG2E
    at = rows.to(tl.int64)[:, None] * (4 * F) + 2 * F + cols[None, :]
    q_f = tl.load(pq + at, mask=ok, other=0.0).to(tl.float32)
    q_c = tl.load(pq + at + F, mask=ok, other=0.0).to(tl.float32)
    begin, end, bad = edge_range(col_ptr, rows, n_rows, n_edges)
    dq_f = tl.where(bad, float("nan"), 0.0)[:, None] + tl.zeros([ROWS, BF], tl.float32)
    dq_c = dq_f
    sx_f = tl.zeros([ROWS, BF], tl.float32)
    sx_c = tl.zeros([ROWS, BF], tl.float32)
    for k in range(0, tl.max(end - begin, axis=0), DEG):
        t = begin[:, None] + (k + tl.arange(0, DEG))[None, :]
        live = t < end[:, None]
        live3 = live[:, :, None]
        i, good, poison = other_end(receiver, t, live, n_rows)
        e = tl.load(edge + t, mask=live, other=0)
        r_f, r_c = edge_term(w_e, table, distance, e, live, poison, wide, wide_ok, dmin, inverse_step, F, K, WINDOW,
                             PRECISION)  # fmt: skip
        ok3 = good[:, :, None] & wide_ok
        p = pq + i[:, :, None] * (4 * F) + wide
        x_f = q_f[:, None, :] + (tl.load(p, mask=ok3, other=0.0).to(tl.float32) + r_f)
        x_c = q_c[:, None, :] + (tl.load(p + F, mask=ok3, other=0.0).to(tl.float32) + r_c)
        g = tl.load(d_m + i[:, :, None] * F + wide, mask=ok3, other=0.0)
        dy_f, dy_c = gate_gradient2(x_f * gamma_f + beta_f, x_c * gamma_c + beta_c)
        dq_f += tl.sum(tl.where(live3, g * dy_f, 0.0), axis=1)
        dq_c += tl.sum(tl.where(live3, g * dy_c, 0.0), axis=1)
        if row_weight is not None:
            w = tl.load(row_weight + i, mask=good, other=0.0)[:, :, None]
            sx_f += tl.sum(tl.where(live3, w * x_f, 0.0), axis=1)
            sx_c += tl.sum(tl.where(live3, w * x_c, 0.0), axis=1)
    if row_weight is not None:
        degree = tl.load(in_degree + rows, mask=rows_ok, other=0.0)[:, None]
        dq_f -= degree * tl.load(c1 + cols, mask=cols_ok, other=0.0)[None, :]
        dq_c -= degree * tl.load(c1 + F + cols, mask=cols_ok, other=0.0)[None, :]
        dq_f -= sx_f * tl.load(c2 + cols, mask=cols_ok, other=0.0)[None, :]
        dq_c -= sx_c * tl.load(c2 + F + cols, mask=cols_ok, other=0.0)[None, :]
    tl.store(dq + at, dq_f * tl.load(a1 + cols, mask=cols_ok, other=0.0)[None, :], mask=ok)
    tl.store(dq + at + F, dq_c * tl.load(a1 + F + cols, mask=cols_ok, other=0.0)[None, :], mask=ok)


@triton.jit
def sum_of_parts(parts, n_parts, stride, cols, ok, ROWS: tl.constexpr):
    """In float64."""
    total = tl.zeros([ROWS, cols.shape[0]], tl.float64)
    for k in range(0, n_parts, ROWS):
        part = k + tl.arange(0, ROWS)
        there = (part < n_parts)[:, None] & ok[None, :]
        total += tl.load(parts + part[:, None] * stride + cols[None, :], mask=there, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def norm_gradients(d_beta, d_gamma, c1, c2, of_beta, of_gamma, count, n_beta, n_gamma, C: tl.constexpr,
                   STRIDE: tl.constexpr, ROWS: tl.constexpr, BF: tl.constexpr):  # fmt: skip
    """Sums of the parts of both gradients, with rows of STRIDE, and, of statistics of the batch (else None), these over
    ``count``."""
    cols = tl.program_id(1) * BF + tl.arange(0, BF)
    ok = cols < C
    beta = sum_of_parts(of_beta, n_beta, STRIDE, cols, ok, ROWS)
    gamma = sum_of_parts(of_gamma, n_gamma, STRIDE, cols, ok, ROWS)
    tl.store(d_beta + cols, beta.to(tl.float32), mask=ok)
    tl.store(d_gamma + cols, gamma.to(tl.float32), mask=ok)
    if c1 is not None:
        total = tl.load(count).to(tl.float64)
        tl.store(c1 + cols, (beta / total).to(tl.float32), mask=ok)
        tl.store(c2 + cols, (gamma / total).to(tl.float32), mask=ok)


@triton.jit
def filter_gradient(d_weight, d_filter, upper, lower, gram, e_sum, count, weight, rstd1, a1, c1, c2, F: tl.constexpr,
                    K: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """The edges' part of the weights' gradient, of channel c: a1 (sum e dy - sum w e (c1 + c2 x)), x = (z - mean) /
    std, the second sum from the Gram matrix of :func:`edge_statistics`. c1 None: fixed statistics."""
    c = tl.program_id(0)
    ks = tl.program_id(1) * BK + tl.arange(0, BK)
    ok = ks < K
    value = tl.load(d_filter + ks * (2 * F) + c, mask=ok, other=0.0).to(tl.float64)
    if c1 is not None:
        of_row = weight + c * (2 * F + K)
        total = tl.zeros([BK], tl.float64)
        for f in range(0, F, ROWS):
            rows = f + tl.arange(0, ROWS)
            there = (rows < F)[:, None] & ok[None, :]
            x = tl.load(upper + rows[:, None] * (2 * F + K) + 2 * F + ks[None, :], mask=there, other=0.0)
            w = tl.load(of_row + rows, mask=rows < F, other=0.0).to(tl.float64)
            total += tl.sum(x.to(tl.float64) * w[:, None], axis=0)
            x = tl.load(lower + rows[:, None] * (F + K) + F + ks[None, :], mask=there, other=0.0)
            w = tl.load(of_row + F + rows, mask=rows < F, other=0.0).to(tl.float64)
            total += tl.sum(x.to(tl.float64) * w[:, None], axis=0)
        edges = tl.load(count)
        vectors = tl.load(e_sum + ks, mask=ok, other=0.0)
        for b in range(0, K, ROWS):
            rows = b + tl.arange(0, ROWS)
            there = (rows < K)[:, None] & ok[None, :]
            x = tl.load(gram + rows[:, None] * K + ks[None, :], mask=there, other=0.0)
            x -= tl.load(e_sum + rows, mask=rows < K, other=0.0)[:, None] * (vectors / edges)[None, :]
            w = tl.load(of_row + 2 * F + rows, mask=rows < K, other=0.0).to(tl.float64)
            total += tl.sum(x * w[:, None], axis=0)
        value -= vectors * tl.load(c1 + c) + total * tl.load(rstd1 + c) * tl.load(c2 + c)
    value = value * tl.load(a1 + c)
    tl.store(d_weight + c * (2 * F + K) + 2 * F + ks, value.to(tl.float32), mask=ok)


@triton.jit
def backward_finish(du, parts, grad, h, m, scale2, shift2, mean2, rstd2, n_rows, F: tl.constexpr,
                    ROWS: tl.constexpr, BF: tl.constexpr):  # fmt: skip
    """du = grad softplus'(u), u = h + scale2 m + shift2, and of each program sum du and sum du (m - mean2) rstd2."""
    cols = tl.program_id(1) * BF + tl.arange(0, BF)
    cols_ok = cols < F
    scale = tl.load(scale2 + cols, mask=cols_ok, other=0.0)[None, :]
    shift = tl.load(shift2 + cols, mask=cols_ok, other=0.0)[None, :]
    mean = tl.load(mean2 + cols, mask=cols_ok, other=0.0)[None, :]
    rstd = tl.load(rstd2 + cols, mask=cols_ok, other=0.0)[None, :]
    by_shift = tl.zeros([ROWS, BF], tl.float32)
    by_scale = tl.zeros([ROWS, BF], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.num_programs(0)):
        rows = block * ROWS + tl.arange(0, ROWS)
        ok = (rows < n_rows)[:, None] & cols_ok[None, :]
        at = rows.to(tl.int64)[:, None] * F + cols[None, :]
        x = tl.load(m + at, mask=ok, other=0.0)
        u = tl.load(h + at, mask=ok, other=0.0) + (x * scale + shift)
        t = tl.exp2(tl.abs(u) * -LOG2E)
        r = 1.0 / (1.0 + t)
        d = tl.load(grad + at, mask=ok, other=0.0) * tl.where(u >= 0, r, t * r)
        tl.store(du + at, d, mask=ok)
        by_shift += d
        by_scale += tl.where(ok, d * ((x - mean) * rstd), 0.0)
    part = parts + tl.program_id(0) * (2 * F) + cols
    tl.store(part, tl.sum(by_shift, axis=0), mask=cols_ok)
    tl.store(part + F, tl.sum(by_scale, axis=0), mask=cols_ok)


@triton.jit
def correct_rows(out, d, x, row_ptr, row_weight, a, c1, c2, mean, rstd, n_rows, STRIDE: tl.constexpr,
                 C: tl.constexpr, ROWS: tl.constexpr, BF: tl.constexpr):  # fmt: skip
    """out = a (d - w (edges c1 + c2 (x - mean) rstd)) row by row: what batch statistics take off a gradient.

    ``row_ptr`` None: 1 in place of the number of a row's edges. ``mean`` None: x is normalised already. ``out`` and
    ``d`` have rows of STRIDE, x of C.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BF + tl.arange(0, BF)
    rows_ok, cols_ok = rows < n_rows, cols < C
    ok = rows_ok[:, None] & cols_ok[None, :]
    row = rows.to(tl.int64)[:, None]
    v = tl.load(x + row * C + cols[None, :], mask=ok, other=0.0)
    if mean is not None:
        v = (v - tl.load(mean + cols, mask=cols_ok, other=0.0)) * tl.load(rstd + cols, mask=cols_ok, other=0.0)
    w = tl.load(row_weight + rows, mask=rows_ok, other=0.0)[:, None]
    v = v * tl.load(c2 + cols, mask=cols_ok, other=0.0)[None, :]
    first = tl.load(c1 + cols, mask=cols_ok, other=0.0)[None, :]
    if row_ptr is not None:
        begin = tl.load(row_ptr + rows, mask=rows_ok, other=0)
        end = tl.load(row_ptr + rows + 1, mask=rows_ok, other=0)
        first = first * (end - begin).to(tl.float32)[:, None]
    at = row * STRIDE + cols[None, :]
    got = tl.load(d + at, mask=ok, other=0.0) - w * (first + v)
    tl.store(out + at, tl.load(a + cols, mask=cols_ok, other=0.0)[None, :] * got, mask=ok)


@triton.jit
def neighbor_sum(out, sums, h, sender, row_weight, in_degree, row_ptr, n_rows, n_edges, F: tl.constexpr,
                 ROWS: tl.constexpr, DEG: tl.constexpr, BF: tl.constexpr):  # fmt: skip
    """out_i = sum_j h_j, (N, F), and of each program the sums over its rows of w_i d_i (h_i - h_0) and of in_degree_i
    (h_i - h_0), (2, F), and of w_i d_i, d_i the number of its edges."""
    cols = tl.program_id(1) * BF + tl.arange(0, BF)
    cols_ok = cols < F
    first = tl.load(h + cols, mask=cols_ok, other=0.0)[None, :]
    own = tl.zeros([ROWS, BF], tl.float32)
    other = tl.zeros([ROWS, BF], tl.float32)
    count = tl.zeros([ROWS], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.num_programs(0)):
        rows = block * ROWS + tl.arange(0, ROWS)
        rows_ok = rows < n_rows
        ok = rows_ok[:, None] & cols_ok[None, :]
        begin, end, bad = edge_range(row_ptr, rows, n_rows, n_edges)
        total = tl.where(bad, float("nan"), 0.0)[:, None] + tl.zeros([ROWS, BF], tl.float32)
        for k in range(0, tl.max(end - begin, axis=0), DEG):
            e = begin[:, None] + (k + tl.arange(0, DEG))[None, :]
            j, good, poison = other_end(sender, e, e < end[:, None], n_rows)
            at = j[:, :, None] * F + cols[None, None, :]
            x = tl.load(h + at, mask=good[:, :, None] & cols_ok[None, None, :], other=0.0)
            total += tl.sum(x + poison[:, :, None], axis=1)
        at = rows.to(tl.int64)[:, None] * F + cols[None, :]
        tl.store(out + at, total, mask=ok)
        x = tl.where(ok, tl.load(h + at, mask=ok, other=0.0) - first, 0.0)
        weight = tl.load(row_weight + rows, mask=rows_ok, other=0.0) * (end - begin).to(tl.float32)
        own += weight[:, None] * x
        other += tl.load(in_degree + rows, mask=rows_ok, other=0.0)[:, None] * x
        count += weight
    part = sums + tl.program_id(0) * (2 * F + 1)
    tl.store(part + cols, tl.sum(own, axis=0), mask=cols_ok)
    tl.store(part + F + cols, tl.sum(other, axis=0), mask=cols_ok)
    tl.store(part + 2 * F, tl.sum(count, axis=0))  # every block of F writes the same


@triton.jit
def edge_means(means, count, h, sums, parts, F: tl.constexpr, ROWS: tl.constexpr, BF: tl.constexpr):
    """Means over the edges of the rows at either end, (2, F), and the number of edges, from :func:`neighbor_sum`."""
    cols = tl.program_id(1) * BF + tl.arange(0, BF)
    cols_ok = cols < F
    first = tl.load(h + cols, mask=cols_ok, other=0.0).to(tl.float64)
    own = tl.zeros([ROWS, BF], tl.float64)
    other = tl.zeros([ROWS, BF], tl.float64)
    edges = tl.zeros([ROWS], tl.float64)
    for k in range(0, parts, ROWS):
        part = k + tl.arange(0, ROWS)
        ok = (part < parts)[:, None] & cols_ok[None, :]
        at = sums + part[:, None] * (2 * F + 1) + cols[None, :]
        own += tl.load(at, mask=ok, other=0.0).to(tl.float64)
        other += tl.load(at + F, mask=ok, other=0.0).to(tl.float64)
        edges += tl.load(sums + part * (2 * F + 1) + 2 * F, mask=part < parts, other=0.0).to(tl.float64)
    total = tl.sum(edges, axis=0)
    tl.store(means + cols, first + tl.sum(own, axis=0) / total, mask=cols_ok)
    tl.store(means + F + cols, first + tl.sum(other, axis=0) / total, mask=cols_ok)
    tl.store(count, total)


@triton.jit
def centred_rows(receiving, sending, receivers, senders, h, neighbors, by_receiver, by_sender, means, e_sum, count,
                 row_weight, in_degree, row_ptr, n_rows, n_edges, F: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
                 BF: tl.constexpr):  # fmt: skip
    """The rows about the means of the edges' two ends, (N, F) each, and what these are multiplied with for the Gram
    matrix: about their means, sums of [h_i, h_j, e_ij] over the edges of a row, (N, 2F + K), and of [h_j, e_ij] over
    those that it sends, (N, F + K); weighted."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows_ok = rows < n_rows
    row = rows.to(tl.int64)[:, None]
    begin, end, bad = edge_range(row_ptr, rows, n_rows, n_edges)
    degree = tl.where(bad, float("nan"), (end - begin).to(tl.float32))[:, None]
    weight = tl.load(row_weight + rows, mask=rows_ok, other=0.0)[:, None]
    into = tl.load(in_degree + rows, mask=rows_ok, other=0.0)[:, None]
    blocks: tl.constexpr = (F + BF - 1) // BF
    if tl.program_id(1) < blocks:
        cols = tl.program_id(1) * BF + tl.arange(0, BF)
        cols_ok = cols < F
        ok = rows_ok[:, None] & cols_ok[None, :]
        at = row * F + cols[None, :]
        x = tl.load(h + at, mask=ok, other=0.0)
        around = tl.load(means + F + cols, mask=cols_ok, other=0.0).to(tl.float32)[None, :]
        own = x - tl.load(means + cols, mask=cols_ok, other=0.0).to(tl.float32)[None, :]
        other = x - around
        near = tl.load(neighbors + at, mask=ok, other=0.0) - degree * around
        tl.store(receiving + at, own, mask=ok)
        tl.store(sending + at, other, mask=ok)
        to = receivers + row * (2 * F + K) + cols[None, :]
        tl.store(to, weight * degree * own, mask=ok)
        tl.store(to + F, weight * near, mask=ok)
        tl.store(senders + row * (F + K) + cols[None, :], into * other, mask=ok)
    else:
        ks = (tl.program_id(1) - blocks) * BF + tl.arange(0, BF)
        ks_ok = ks < K
        ok = rows_ok[:, None] & ks_ok[None, :]
        mean = tl.load(e_sum + ks, mask=ks_ok, other=0.0) / tl.load(count)
        mean = mean.to(tl.float32)[None, :]
        e = tl.load(by_receiver + row * K + ks[None, :], mask=ok, other=0.0) - degree * mean
        tl.store(receivers + row * (2 * F + K) + 2 * F + ks[None, :], weight * e, mask=ok)
        e = tl.load(by_sender + row * K + ks[None, :], mask=ok, other=0.0) - into * mean
        tl.store(senders + row * (F + K) + F + ks[None, :], e, mask=ok)


@triton.jit
def quadratic(matrix, stride, left, n_left, right, n_right, ROWS: tl.constexpr, BF: tl.constexpr):
    """left^T M right in float64; M (n_left, n_right) with rows of ``stride``."""
    total = tl.zeros([ROWS], tl.float64)
    for a in range(0, n_left, ROWS):
        rows = a + tl.arange(0, ROWS)
        dot = tl.zeros([ROWS], tl.float64)
        for b in range(0, n_right, BF):
            cols = b + tl.arange(0, BF)
            ok = (rows < n_left)[:, None] & (cols < n_right)[None, :]
            x = tl.load(matrix + rows[:, None] * stride + cols[None, :], mask=ok, other=0.0).to(tl.float64)
            y = tl.load(right + cols, mask=cols < n_right, other=0.0).to(tl.float64)
            dot += tl.sum(x * y[None, :], axis=1)
        total += dot * tl.load(left + rows, mask=rows < n_left, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def move(running, ok, value, momentum):
    """As torch.lerp_, both of whose ends are exact."""
    old = tl.load(running, mask=ok, other=0.0)
    new = value.to(old.dtype)
    change = new - old
    tl.store(running, tl.where(momentum < 0.5, old + momentum * change, new - change * (1.0 - momentum)), mask=ok)


@triton.jit
def edge_statistics(mean, var, running_mean, running_var, upper, lower, gram, e_sum, count, means, weight, bias,
                    momentum, F: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BF: tl.constexpr):  # fmt: skip
    """Mean and biased variance of channel c of z = [h_i, h_j, e_ij] W^T over the edges, and running statistics moved
    by them (with the bias); ``upper`` (F, 2F + K), ``lower`` (F, F + K) and ``gram`` (K, K) are the Gram matrix."""
    c = tl.program_id(0)
    of_own = weight + c * (2 * F + K)
    of_other, of_edge = of_own + F, of_own + 2 * F
    edges = tl.load(count)
    at_row = tl.zeros([BF], tl.float64)
    for b in tl.static_range(0, F, BF):
        cols = b + tl.arange(0, BF)
        ok = cols < F
        for k in tl.static_range(2):
            w = tl.load(of_own + k * F + cols, mask=ok, other=0.0).to(tl.float64)
            at_row += w * tl.load(means + k * F + cols, mask=ok, other=0.0)
    at_edge = tl.zeros([BF], tl.float64)
    for b in tl.static_range(0, K, BF):
        ks = b + tl.arange(0, BF)
        w = tl.load(of_edge + ks, mask=ks < K, other=0.0).to(tl.float64)
        at_edge += w * (tl.load(e_sum + ks, mask=ks < K, other=0.0) / edges)
    edge_mean = tl.sum(at_edge, axis=0)
    first = tl.sum(at_row, axis=0) + edge_mean
    second = quadratic(upper, 2 * F + K, of_own, F, of_own, F, ROWS, BF)
    second += 2.0 * quadratic(upper + F, 2 * F + K, of_own, F, of_other, F + K, ROWS, BF)
    second += quadratic(lower, F + K, of_other, F, of_other, F, ROWS, BF)
    second += 2.0 * quadratic(lower + F, F + K, of_other, F, of_edge, K, ROWS, BF)
    second += quadratic(gram, K, of_edge, K, of_edge, K, ROWS, BF) - edges * edge_mean * edge_mean
    second = second / edges
    second = tl.where(second < 0, 0.0, second)  # of which a NaN is none
    tl.store(mean + c, first.to(tl.float32))
    tl.store(var + c, second.to(tl.float32))
    if running_mean is not None:
        shifted = first if bias is None else first + tl.load(bias + c).to(tl.float64)
        move(running_mean + c, c >= 0, shifted, momentum)
        move(running_var + c, c >= 0, second * (edges / (edges - 1.0)), momentum)


@triton.jit
def message_sums(parts, m, row_weight, n_rows, F: tl.constexpr, ROWS: tl.constexpr, BF: tl.constexpr):
    """Of each program sum w over its rows, a number near the mean, what the mean is beyond it, and sum w (m - mean)^2,
    (4, F); gradients through a batch norm feel how the mean is rounded."""
    cols = tl.program_id(1) * BF + tl.arange(0, BF)
    cols_ok = cols < F
    count = tl.zeros([BF], tl.float32)
    near = tl.zeros([BF], tl.float32)
    beyond = tl.zeros([BF], tl.float32)
    squares = tl.zeros([BF], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.num_programs(0)):
        rows = block * ROWS + tl.arange(0, ROWS)
        ok = (rows < n_rows)[:, None] & cols_ok[None, :]
        w = tl.load(row_weight + rows, mask=rows < n_rows, other=0.0)[:, None] + tl.zeros([ROWS, BF], tl.float32)
        x = tl.load(m + rows.to(tl.int64)[:, None] * F + cols[None, :], mask=ok, other=0.0)
        here = tl.sum(w, axis=0)
        least = tl.where(here == 0, 1.0, here)
        around = tl.sum(w * x, axis=0) / least
        near = tl.where(count == 0, around, near)
        x = x - around[None, :]
        change = (around - near) + tl.sum(w * x, axis=0) / least - beyond
        total = count + here
        share = here / tl.where(total == 0, 1.0, total)
        squares += tl.sum(w * x * x, axis=0) + change * change * (count * share)
        beyond += change * share
        count = total
    part = parts + tl.program_id(0) * (4 * F) + cols
    tl.store(part, count, mask=cols_ok)
    tl.store(part + F, near, mask=cols_ok)
    tl.store(part + 2 * F, beyond, mask=cols_ok)
    tl.store(part + 3 * F, squares, mask=cols_ok)


@triton.jit
def mean_of_part(at, there, F: tl.constexpr):
    near = tl.load(at + F, mask=there, other=0.0).to(tl.float64)
    return near + tl.load(at + 2 * F, mask=there, other=0.0).to(tl.float64)


@triton.jit
def message_statistics(mean, var, running_mean, running_var, scale, shift, count, parts, gamma2, beta2, eps, momentum,
                       n_parts, F: tl.constexpr, ROWS: tl.constexpr, BF: tl.constexpr):  # fmt: skip
    """Mean and biased variance of m over the rows from :func:`message_sums`, running statistics moved by them, and the
    scale and shift that the norm amounts to."""
    cols = tl.program_id(1) * BF + tl.arange(0, BF)
    ok = cols < F
    counts = tl.zeros([ROWS, BF], tl.float64)
    sums = tl.zeros([ROWS, BF], tl.float64)
    for k in range(0, n_parts, ROWS):
        part = k + tl.arange(0, ROWS)
        there = (part < n_parts)[:, None] & ok[None, :]
        at = parts + part[:, None] * (4 * F) + cols[None, :]
        n = tl.load(at, mask=there, other=0.0).to(tl.float64)
        counts += n
        sums += n * mean_of_part(at, there, F)
    atoms = tl.sum(counts, axis=0)
    tl.store(count + cols, atoms, mask=cols == 0)
    first = tl.sum(sums, axis=0) / atoms
    squares = tl.zeros([ROWS, BF], tl.float64)
    for k in range(0, n_parts, ROWS):
        part = k + tl.arange(0, ROWS)
        there = (part < n_parts)[:, None] & ok[None, :]
        at = parts + part[:, None] * (4 * F) + cols[None, :]
        off = mean_of_part(at, there, F) - first[None, :]
        n = tl.load(at, mask=there, other=0.0).to(tl.float64)
        squares += tl.load(at + 3 * F, mask=there, other=0.0).to(tl.float64) + n * off * off
    second = tl.sum(squares, axis=0) / atoms
    tl.store(mean + cols, first.to(tl.float32), mask=ok)
    tl.store(var + cols, second.to(tl.float32), mask=ok)
    rstd = 1.0 / tl.sqrt(second + eps)
    factor = tl.load(gamma2 + cols, mask=ok, other=0.0).to(tl.float64) * rstd
    tl.store(scale + cols, factor.to(tl.float32), mask=ok)
    beta = tl.load(beta2 + cols, mask=ok, other=0.0).to(tl.float64)
    tl.store(shift + cols, (beta - first * factor).to(tl.float32), mask=ok)
    if running_mean is not None:
        move(running_mean + cols, ok, first, momentum)
        move(running_var + cols, ok, second * (atoms / (atoms - 1.0)), momentum)


@triton.jit
def edge_sum(out, degree, features, distance, row_weight, receiver, edge, row_ptr, n_rows, n_edges, dmin, inverse_step,
             K: tl.constexpr, ROWS: tl.constexpr, DEG: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """out = sum of the edge vectors of a row, (N, K); with ``edge`` and ``receiver``, by sender, each times its
    receiver's weight, and those weights' sum into ``degree``."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ks = tl.program_id(1) * BK + tl.arange(0, BK)
    rows_ok = rows < n_rows
    begin, end, bad = edge_range(row_ptr, rows, n_rows, n_edges)
    poison = tl.where(bad, float("nan"), 0.0)
    total = poison[:, None] + tl.zeros([ROWS, BK], tl.float32)
    weights = poison
    for k in range(0, tl.max(end - begin, axis=0), DEG):
        t = begin[:, None] + (k + tl.arange(0, DEG))[None, :]
        live = t < end[:, None]
        if edge is None:
            total += tl.sum(edge_vector(features, distance, t, live, ks, dmin, inverse_step, K), axis=1)
        else:
            i, good, _ = other_end(receiver, t, live, n_rows)
            w = tl.load(row_weight + i, mask=good, other=0.0)
            e = tl.load(edge + t, mask=live, other=0)
            v = edge_vector(features, distance, e, live, ks, dmin, inverse_step, K)
            total += tl.sum(w[:, :, None] * v, axis=1)
            weights += tl.sum(w, axis=1)
    ok = rows_ok[:, None] & (ks < K)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * K + ks[None, :], total, mask=ok)
    if degree is not None:
        tl.store(degree + rows, weights, mask=rows_ok)  # every block of K writes the same


@triton.jit
def edge_gram(gram, features, distance, row_weight, row_ptr, n_rows, n_edges, dmin, inverse_step, K: tl.constexpr,
              ROWS: tl.constexpr, DEG: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Of each program sum w_i e^T e over its edges, (K, K)."""
    left, right = tl.program_id(1) * BK + tl.arange(0, BK), tl.program_id(2) * BK + tl.arange(0, BK)
    total = tl.zeros([BK, BK], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.num_programs(0)):
        rows = block * ROWS + tl.arange(0, ROWS)
        w = tl.load(row_weight + rows, mask=rows < n_rows, other=0.0)[:, None, None]
        begin, end, _ = edge_range(row_ptr, rows, n_rows, n_edges)
        for k in range(0, tl.max(end - begin, axis=0), DEG):
            e = begin[:, None] + (k + tl.arange(0, DEG))[None, :]
            live = e < end[:, None]
            a = edge_vector(features, distance, e, live, left, dmin, inverse_step, K)
            b = edge_vector(features, distance, e, live, right, dmin, inverse_step, K) * w
            a, b = tl.trans(tl.reshape(a, [ROWS * DEG, BK])), tl.reshape(b, [ROWS * DEG, BK])
            total = tl.dot(a, b, total, input_precision=PRECISION)
    at = (tl.program_id(0) * K + left)[:, None] * K + right[None, :]
    tl.store(gram + at, total, mask=(left < K)[:, None] & (right < K)[None, :])
