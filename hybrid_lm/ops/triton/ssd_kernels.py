"""SSD in Triton: the kernels. `ssd.py` calls them; importing this file imports triton.

Formulas and letters as in `ops/ssd_torch.py`: chunks of Q tokens, s_i the sum of dt A up to token i, S the
state before a chunk, gS the gradient of the state after it. The state is a tile (n p) in float32 on chip.
Every tile has sizes that are powers of two, from 16; rows of dt beyond the sequence are 0, so that they
neither decay nor write.

Offsets that grow with the batch or the sequence are 64-bit; those inside a tile are 32-bit.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOG2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softplus(v):
    """max(v, 0) + log(1 + u), u = exp(-|v|): the logarithm as 2 atanh(u / (2 + u)), precise for small u."""
    u = tl.exp2(-tl.abs(v) * LOG2E)
    z = u / (2.0 + u)
    # z <= 1/3: what follows the last term is below 2 (1/3)^37, under the precision of float64
    square, total = z * z, 0.0 * z
    for k in tl.static_range(17, -1, -1):  # pyright: ignore[reportGeneralTypeIssues]
        total = total * square + 1.0 / (2 * k + 1)
    return tl.maximum(v, 0.0) + 2.0 * z * total


@triton.jit
def step_sizes(
    dt, inside, bias, SOFTPLUS: tl.constexpr, LIMITS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr
):
    """dt as the recurrence uses it, and its derivative with respect to the given one. Both 0 outside."""
    raw = dt + bias
    slope = tl.where(inside, 1.0, 0.0).to(raw.dtype)
    if SOFTPLUS:
        slope = slope / (1.0 + tl.exp2(-raw * LOG2E))
        raw = softplus(raw)
    if LIMITS:
        slope = tl.where((raw >= LOW) & (raw <= HIGH), slope, 0.0)
        raw = tl.minimum(tl.maximum(raw, LOW), HIGH)
    return tl.where(inside, raw, 0.0), slope


@triton.jit
def sums(dt, A, Q: tl.constexpr):
    """s log2(e) in two parts of dt's type: differences of long sums keep the precision of short ones."""
    exact = tl.cumsum(dt.to(tl.float64) * (A.to(tl.float64) * LOG2E), 0)
    high = exact.to(dt.dtype)
    return high, (exact - high.to(tl.float64)).to(dt.dtype)


@triton.jit
def last(v, Q: tl.constexpr):
    """The last element of a vector of Q."""
    return tl.sum(tl.where(tl.arange(0, Q) == Q - 1, v, 0), 0)


@triton.jit
def documents(reset, base, rows, inside, RESET: tl.constexpr, Q: tl.constexpr):
    """For every token of a chunk how many documents have started in it, and whether one starts here."""
    if RESET:
        starts = tl.load(reset + base + rows, mask=inside, other=0).to(tl.int32)
        return tl.cumsum(starts, 0), starts
    none = tl.zeros((Q,), tl.int32)
    return none, none


@triton.jit
def edges(high, low, document, Q: tl.constexpr):
    """Decays from the state before the chunk to each token, from each token to the end, and over all."""
    from_start = tl.where(document == 0, tl.exp2(high + low), 0.0)
    rest = (last(high, Q) - high) + (last(low, Q) - low)
    to_end = tl.where(document == last(document, Q), tl.exp2(rest), 0.0)
    return from_start, to_end, last(from_start, Q)


@triton.jit
def decays(high, low, document, Q: tl.constexpr, OPERAND: tl.constexpr, TURNED: tl.constexpr):
    """L (i j), TURNED (j i): the decay from token j to token i; 0 where i < j and across documents."""
    row, column = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    seen = (row <= column if TURNED else row >= column) & (document[:, None] == document[None, :])
    exponent = high[None, :] - high[:, None] if TURNED else high[:, None] - high[None, :]
    # where the products are coarser than this, registers are worth more
    if OPERAND != tl.bfloat16:  # noqa: SIM300
        exponent += low[None, :] - low[:, None] if TURNED else low[:, None] - low[None, :]
    return tl.exp2(tl.where(seen, exponent, float("-inf")))


@triton.jit
def add_product(total, a, b, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """total + a b, where a is exact in the type of the operands and b, which is wider, counts in two parts:
    rounded once, the state would be as coarse as the inputs."""
    rounded = b.to(OPERAND)
    total = tl.dot(a, rounded, total, input_precision=PRECISION, out_dtype=total.dtype)
    if OPERAND == tl.bfloat16:  # noqa: SIM300
        rest = (b - rounded.to(b.dtype)).to(OPERAND)
        total = tl.dot(a, rest, total, input_precision=PRECISION, out_dtype=total.dtype)
    return total


@triton.jit
def convolved(
    x, taps, bias, window, documents, rows, inside, ps, p, xt, width,
    HAS_CBIAS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_RESET: tl.constexpr, W: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """silu of the causal convolution of a chunk of x (Q BP), rounded to x's type as if it had been stored.

    x, taps, bias and documents (starts so far, of every token) begin at this sequence and head, and so does
    window (w-1 width), the inputs before the first token.
    """
    total = tl.zeros((rows.shape[0], ps.shape[0]), WIDE)
    if HAS_CBIAS:
        total += tl.load(bias + ps, mask=ps < p, other=0.0).to(WIDE)[None, :]
    mine = tl.zeros_like(rows)
    if HAS_RESET:
        mine = tl.load(documents + rows, mask=inside, other=-1).to(rows.dtype)
    for k in tl.static_range(W):  # pyright: ignore[reportGeneralTypeIssues]
        at = rows - (W - 1 - k)
        seen = inside & (at >= 0)
        if HAS_RESET:
            seen &= tl.load(documents + at, mask=seen, other=-2).to(rows.dtype) == mine
        v = tl.load(x + at[:, None] * xt + ps[None, :], mask=seen[:, None] & (ps[None, :] < p), other=0.0)
        if HAS_WINDOW:
            before = inside & (at < 0) & (mine == 0)
            place = window + (at + (W - 1))[:, None] * width + ps[None, :]
            v = v.to(WIDE) + tl.load(place, mask=before[:, None] & (ps[None, :] < p), other=0.0).to(WIDE)
        total += v.to(WIDE) * tl.load(taps + ps * W + k, mask=ps < p, other=0.0).to(WIDE)[None, :]
    return (total / (1.0 + tl.exp2(-total * LOG2E))).to(x.dtype.element_ty)


@triton.jit
def states_kernel(
    V, U, DT, A, BIAS, RESET, START, KEPT, END, TAPS, CBIAS, WINDOW, DOCUMENTS,
    t, h, p, n, heads, spans, span,
    vb, vt, vh, ub, ut, ug, db, dt_, dh,
    HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr, HAS_START: tl.constexpr,
    SOFTPLUS: tl.constexpr, LIMITS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    REVERSE: tl.constexpr, HAS_CBIAS: tl.constexpr, HAS_WINDOW: tl.constexpr, W: tl.constexpr,
    Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
    WIDE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walks the chunks of one head with a block of its state on chip, and keeps the state at every `span`-th.

    Forward:  S' = decay S + B^T (dt decay x); kept is the state before a chunk.     V = x, U = B
    REVERSE: gS' = decay gS + C^T (decay gy), from the end; kept is gS after it.     V = gy, U = C
    START, END (b h p n); KEPT (b h spans n p).
    """
    bh = tl.program_id(0).to(tl.int64)
    b, head = bh // h, bh % h
    ps = tl.program_id(1) * BP + tl.arange(0, BP)
    ns = tl.program_id(2) * BN + tl.arange(0, BN)
    q = tl.arange(0, Q)
    V += b * vb + head * vh
    U += b * ub + head // heads * ug
    DT += b * db + head * dh
    a = tl.load(A + head).to(WIDE)
    bias = tl.load(BIAS + head).to(WIDE) if HAS_BIAS else 0.0
    tile = (ns[:, None] < n) & (ps[None, :] < p)
    place = bh * p * n + (ps[None, :] * n + ns[:, None])
    S = tl.zeros((BN, BP), WIDE)
    if HAS_START:
        S = tl.load(START + place, mask=tile, other=0.0).to(WIDE)
    v_tile = q[:, None] * vt + ps[None, :]
    u_tile = q[:, None] * ut + ns[None, :]
    chunks = tl.cdiv(t, Q)
    for step in range(chunks):
        k = chunks - 1 - step if REVERSE else step
        if k % span == 0:
            at = KEPT + (bh * spans + k // span) * n * p
            tl.store(at + ns[:, None] * p + ps[None, :], S.to(KEPT.dtype.element_ty), mask=tile)
        begin = tl.cast(k, tl.int64) * Q
        rows = begin + q
        inside = rows < t
        if W > 0:
            v = convolved(
                V, TAPS + head * p * W, CBIAS + head * p if HAS_CBIAS else CBIAS,
                WINDOW + b * (W - 1) * (h * p) + head * p if HAS_WINDOW else WINDOW,
                DOCUMENTS + b * t if HAS_RESET else DOCUMENTS,
                rows, inside, ps, p, vt, h * p, HAS_CBIAS, HAS_WINDOW, HAS_RESET, W, WIDE,
            )  # fmt: skip
        else:
            v = tl.load(V + begin * vt + v_tile, mask=inside[:, None] & (ps[None, :] < p), other=0.0)
        u = tl.load(U + begin * ut + u_tile, mask=inside[:, None] & (ns[None, :] < n), other=0.0)
        d = tl.load(DT + rows * dt_, mask=inside, other=0.0).to(WIDE)
        d, _ = step_sizes(d, inside, bias, SOFTPLUS, LIMITS, LOW, HIGH)
        first, second = sums(d, a, Q)
        document, _ = documents(RESET, b * t, rows, inside, HAS_RESET, Q)
        from_start, to_end, whole = edges(first, second, document, Q)
        weight = from_start if REVERSE else d * to_end
        S = add_product(S * whole, tl.trans(u.to(OPERAND)), v.to(WIDE) * weight[:, None], OPERAND, PRECISION)
    tl.store(END + place, S, mask=tile)


@triton.jit
def outputs_kernel(
    X, DT, A, B, C, D, BIAS, RESET, START, Y, END, TAPS, CBIAS, WINDOW, DOCUMENTS,
    t, h, p, n, heads, spans, span,
    xb, xt, xh, db, dt_, dh, bb, bt, bg, cb, ct, cg,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr, HAS_START: tl.constexpr,
    SOFTPLUS: tl.constexpr, LIMITS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    KEPT: tl.constexpr, HAS_CBIAS: tl.constexpr, HAS_WINDOW: tl.constexpr, W: tl.constexpr,
    Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
    WIDE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of one head and a block of its channels: all tokens, with the state on chip, or (KEPT) `span` chunks
    from a state that `states_kernel` left in START (b h spans n p). Y (b t h p), END (b h p n).
    W > 0: X is what the convolution of W taps starts from."""
    bh = tl.program_id(0).to(tl.int64)
    b, head = bh // h, bh % h
    ps = tl.program_id(1) * BP + tl.arange(0, BP)
    ns = tl.arange(0, BN)
    q = tl.arange(0, Q)
    X += b * xb + head * xh
    Y += (b * t * h + head) * p
    B += b * bb + head // heads * bg
    C += b * cb + head // heads * cg
    DT += b * db + head * dh
    a = tl.load(A + head).to(WIDE)
    bias = tl.load(BIAS + head).to(WIDE) if HAS_BIAS else 0.0
    tile = (ns[:, None] < n) & (ps[None, :] < p)
    place = bh * p * n + (ps[None, :] * n + ns[:, None])
    S = tl.zeros((BN, BP), WIDE)
    if KEPT:
        at = (bh * spans + tl.program_id(2)) * n * p + (ns[:, None] * p + ps[None, :])
        S = tl.load(START + at, mask=tile, other=0.0).to(WIDE)
    elif HAS_START:
        S = tl.load(START + place, mask=tile, other=0.0).to(WIDE)
    x_tile = q[:, None] * xt + ps[None, :]
    b_tile = q[:, None] * bt + ns[None, :]
    c_tile = q[:, None] * ct + ns[None, :]
    y_tile = q[:, None] * (h * p) + ps[None, :]
    # one program has all chunks where the third axis of the grid is 1
    for k in range(tl.program_id(2) * span, tl.minimum((tl.program_id(2) + 1) * span, tl.cdiv(t, Q))):
        begin = tl.cast(k, tl.int64) * Q
        rows = begin + q
        inside = rows < t
        wanted = inside[:, None] & (ps[None, :] < p)
        narrow = inside[:, None] & (ns[None, :] < n)
        if W > 0:
            x = convolved(
                X, TAPS + head * p * W, CBIAS + head * p if HAS_CBIAS else CBIAS,
                WINDOW + b * (W - 1) * (h * p) + head * p if HAS_WINDOW else WINDOW,
                DOCUMENTS + b * t if HAS_RESET else DOCUMENTS,
                rows, inside, ps, p, xt, h * p, HAS_CBIAS, HAS_WINDOW, HAS_RESET, W, WIDE,
            )  # fmt: skip
        else:
            x = tl.load(X + begin * xt + x_tile, mask=wanted, other=0.0)
        u = tl.load(B + begin * bt + b_tile, mask=narrow, other=0.0).to(OPERAND)
        c = tl.load(C + begin * ct + c_tile, mask=narrow, other=0.0).to(OPERAND)
        d = tl.load(DT + rows * dt_, mask=inside, other=0.0).to(WIDE)
        d, _ = step_sizes(d, inside, bias, SOFTPLUS, LIMITS, LOW, HIGH)
        first, second = sums(d, a, Q)
        document, _ = documents(RESET, b * t, rows, inside, HAS_RESET, Q)
        from_start, to_end, whole = edges(first, second, document, Q)
        # 1. what the chunk says to itself, and the state to it
        M = tl.dot(c, tl.trans(u), input_precision=PRECISION, out_dtype=WIDE)
        M = (M * decays(first, second, document, Q, OPERAND, False) * d[None, :]).to(OPERAND)
        y = tl.dot(c, S.to(OPERAND), input_precision=PRECISION, out_dtype=WIDE) * from_start[:, None]
        y = tl.dot(M, x.to(OPERAND), y, input_precision=PRECISION, out_dtype=WIDE)
        if HAS_D:
            y += tl.load(D + head).to(WIDE) * x.to(WIDE)
        tl.store(Y + begin * h * p + y_tile, y.to(Y.dtype.element_ty), mask=wanted)
        # 2. the state after the chunk
        S = add_product(S * whole, tl.trans(u), x.to(WIDE) * (d * to_end)[:, None], OPERAND, PRECISION)
    if not KEPT:
        tl.store(END + place, S, mask=tile)


@triton.jit
def gradients_kernel(
    GY, X, DT, A, B, C, D, BIAS, RESET, STATES, GSTATES, GX, GDT, GB, GC, SUMS,
    t, h, p, n, heads, share,
    yb, yt, yh, xb, xt, xh, db, dt_, dh, bb, bt, bg, cb, ct, cg,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr,
    SOFTPLUS: tl.constexpr, LIMITS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
    WIDE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk for `share` heads of one group, one after the other: what they give to B
    and C adds up on chip.

    STATES (b h k n p) before, GSTATES after each chunk. GX (b t h p); GDT (b t h); GB, GC (parts b t g n),
    a part for each share of a group; SUMS (3 b k h): of A, D and dt_bias.
    """
    k, part = tl.program_id(0), tl.program_id(1)
    parts = tl.cdiv(heads, share)
    slot, g = part % parts, part // parts
    groups = h // heads
    b = tl.program_id(2).to(tl.int64)
    chunks = tl.cdiv(t, Q)
    ps, ns, q = tl.arange(0, BP), tl.arange(0, BN), tl.arange(0, Q)
    begin = tl.cast(k, tl.int64) * Q
    rows = begin + q
    inside = rows < t
    wanted = inside[:, None] & (ps[None, :] < p)
    narrow = inside[:, None] & (ns[None, :] < n)
    tile = (ns[:, None] < n) & (ps[None, :] < p)
    s_tile = ns[:, None] * p + ps[None, :]
    B += b * bb + g * bg + begin * bt
    C += b * cb + g * cg + begin * ct
    b_tile, c_tile = q[:, None] * bt + ns[None, :], q[:, None] * ct + ns[None, :]
    u = tl.load(B + b_tile, mask=narrow, other=0.0).to(OPERAND)
    c = tl.load(C + c_tile, mask=narrow, other=0.0).to(OPERAND)
    document, starts = documents(RESET, b * t, rows, inside, HAS_RESET, Q)
    CB = tl.dot(u, tl.trans(c), input_precision=PRECISION, out_dtype=WIDE)
    gCB = tl.zeros((Q, Q), WIDE)
    gB, gC = tl.zeros((Q, BN), WIDE), tl.zeros((Q, BN), WIDE)
    later = q[:, None] < q[None, :]
    for r in range(slot * share, tl.minimum((slot + 1) * share, heads)):
        head = g * heads + r
        a = tl.load(A + head).to(WIDE)
        bias = tl.load(BIAS + head).to(WIDE) if HAS_BIAS else 0.0
        d = tl.load(DT + b * db + head * dh + rows * dt_, mask=inside, other=0.0).to(WIDE)
        d, slope = step_sizes(d, inside, bias, SOFTPLUS, LIMITS, LOW, HIGH)
        first, second = sums(d, a, Q)
        from_start, to_end, whole = edges(first, second, document, Q)
        L = decays(first, second, document, Q, OPERAND, True)
        x = tl.load(
            X + b * xb + begin * xt + head * xh + q[:, None] * xt + ps[None, :], mask=wanted, other=0.0
        )
        gy = tl.load(
            GY + b * yb + begin * yt + head * yh + q[:, None] * yt + ps[None, :], mask=wanted, other=0.0
        )
        x, gy = x.to(OPERAND), gy.to(OPERAND)
        at = ((b * h + head) * chunks + k) * n * p
        S = tl.load(STATES + at + s_tile, mask=tile, other=0.0).to(OPERAND)
        gS = tl.load(GSTATES + at + s_tile, mask=tile, other=0.0).to(OPERAND)
        kept = tl.sum(S.to(WIDE) * gS.to(WIDE)) * whole
        sum_gy_x = tl.sum(gy.to(WIDE) * x.to(WIDE))
        # 1. C.B^T, and what the decays inside the chunk get: s_i enters y_i with +, y of later tokens with -;
        # the two parts of the diagonal cancel, and are left out rather than to rounding. All of it (j i)
        gM = tl.dot(x, tl.trans(gy), input_precision=PRECISION, out_dtype=WIDE) * L
        gCB += gM * d[:, None]
        gM *= CB
        said = tl.sum(gM, 1)
        gM = tl.where(later, gM * d[:, None], 0.0)
        gs = tl.sum(gM, 0) - tl.sum(gM, 1)
        # 2. x through the chunk, and through the state after it
        gX = tl.dot((CB * L).to(OPERAND), gy, input_precision=PRECISION, out_dtype=WIDE)
        # read again for every head: they are in the cache, and would not fit in registers beside the sums
        u = tl.load(B + b_tile, mask=narrow, other=0.0).to(OPERAND)
        through = tl.dot(u, gS, input_precision=PRECISION, out_dtype=WIDE) * to_end[:, None]
        from_state = tl.sum(through * x.to(WIDE), 1)
        gX = (gX + through) * d[:, None]
        if HAS_D:
            gX += tl.load(D + head).to(WIDE) * gy.to(WIDE)
        place = GX + ((b * t + begin) * h + head) * p + q[:, None] * (h * p) + ps[None, :]
        tl.store(place, gX.to(GX.dtype.element_ty), mask=wanted)
        # 3. s_i enters S' of this chunk with -, and of the one before with +
        c = tl.load(C + c_tile, mask=narrow, other=0.0).to(OPERAND)
        asked = tl.dot(c, S, input_precision=PRECISION, out_dtype=WIDE) * from_start[:, None]
        gs += tl.sum(asked * gy.to(WIDE), 1) - from_state * d
        gs += tl.where(q == Q - 1, tl.sum(from_state * d, 0) + kept, 0.0)
        # 4. the state's part in B and C
        gy_start = (gy.to(WIDE) * from_start[:, None]).to(OPERAND)
        gC = tl.dot(gy_start, tl.trans(S), gC, input_precision=PRECISION, out_dtype=WIDE)
        X_end = (x.to(WIDE) * (d * to_end)[:, None]).to(OPERAND)
        gB = tl.dot(X_end, tl.trans(gS), gB, input_precision=PRECISION, out_dtype=WIDE)
        gdecay = tl.where(starts != 0, 0.0, tl.cumsum(gs, 0, reverse=True))
        gdt = (gdecay * a + said + from_state) * slope
        tl.store(GDT + (b * t + rows) * h + head, gdt.to(GDT.dtype.element_ty), mask=inside)
        size = tl.num_programs(2).to(tl.int64) * chunks * h
        place = SUMS + (b * chunks + k) * h + head
        tl.store(place, tl.sum(gdecay * d, 0))
        tl.store(place + size, sum_gy_x)
        tl.store(place + 2 * size, tl.sum(gdt, 0))
    u = tl.load(B + b_tile, mask=narrow, other=0.0).to(OPERAND)
    c = tl.load(C + c_tile, mask=narrow, other=0.0).to(OPERAND)
    coarse = gCB.to(OPERAND)
    gC = tl.dot(tl.trans(coarse), u, gC, input_precision=PRECISION, out_dtype=WIDE)
    gB = tl.dot(coarse, c, gB, input_precision=PRECISION, out_dtype=WIDE)
    at = (((slot * tl.num_programs(2) + b) * t + begin) * groups + g) * n
    at += q[:, None] * (groups * n) + ns[None, :]
    tl.store(GB + at, gB.to(GB.dtype.element_ty), mask=narrow)
    tl.store(GC + at, gC.to(GC.dtype.element_ty), mask=narrow)


@triton.jit
def step_kernel(
    X, DT, A, B, C, D, BIAS, RESET, STATE, Y,
    h, p, n, heads,
    xb, xh, db, dh, bb, bg, cb, cg,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr,
    SOFTPLUS: tl.constexpr, LIMITS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    BN: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One token (decoding): the recurrence as it stands, on a block of channels; STATE (b h p n) in place."""
    bh = tl.program_id(0).to(tl.int64)
    b, head = bh // h, bh % h
    ps = tl.program_id(1) * BP + tl.arange(0, BP)
    ns = tl.arange(0, BN)
    bias = tl.load(BIAS + head).to(WIDE) if HAS_BIAS else 0.0
    d = tl.load(DT + b * db + head * dh + tl.zeros((1,), tl.int32)).to(WIDE)
    d, _ = step_sizes(d, d == d, bias, SOFTPLUS, LIMITS, LOW, HIGH)
    decay = tl.exp2(d * (tl.load(A + head).to(WIDE) * LOG2E))
    if HAS_RESET:
        decay = tl.where(tl.load(RESET + b) != 0, 0.0, decay)
    x = tl.load(X + b * xb + head * xh + ps, mask=ps < p, other=0.0).to(WIDE)
    u = tl.load(B + b * bb + head // heads * bg + ns, mask=ns < n, other=0.0).to(WIDE)
    c = tl.load(C + b * cb + head // heads * cg + ns, mask=ns < n, other=0.0).to(WIDE)
    tile = (ps[:, None] < p) & (ns[None, :] < n)
    place = STATE + bh * p * n + ps[:, None] * n + ns[None, :]
    S = tl.load(place, mask=tile, other=0.0)
    S = S * decay[:, None] + (d * x)[:, None] * u[None, :]
    tl.store(place, S, mask=tile)
    y = tl.sum(S * c[None, :], 1)
    if HAS_D:
        y += tl.load(D + head).to(WIDE) * x
    tl.store(Y + bh * p + ps, y.to(Y.dtype.element_ty), mask=ps < p)
