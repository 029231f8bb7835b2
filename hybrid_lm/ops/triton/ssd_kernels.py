"""SSD in Triton: the kernels. `ssd.py` calls them; importing this file imports triton.

Formulas and letters as in `ops/ssd_torch.py`: chunks of Q tokens, s_i the sum of dt A up to token i, S the
state before a chunk, gS the gradient of the state after it. The state is a tile (p n) in float32 on chip.
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
def documents(reset, base, rows, inside, RESET: tl.constexpr, Q: tl.constexpr):
    """For every token of a chunk how many documents have started in it, and whether one starts here."""
    if RESET:
        starts = tl.load(reset + base + rows, mask=inside, other=0).to(tl.int32)
        return tl.cumsum(starts, 0), starts
    none = tl.zeros((Q,), tl.int32)
    return none, none


@triton.jit
def box(rows, columns, WHOLE: tl.constexpr):
    """Where a tile is inside its tensor; WHOLE: everywhere, which the compiler then knows."""
    if WHOLE:
        return tl.full((rows.shape[0], columns.shape[0]), True, tl.int1)
    return rows[:, None] & columns[None, :]


@triton.jit
def decays(steps, plane, document, Q: tl.constexpr, HAS_RESET: tl.constexpr, EXACT: tl.constexpr):
    """L (j i): the decay from token j to token i; 0 where i < j and across documents."""
    q = tl.arange(0, Q)
    s = tl.load(steps + plane + q)
    exponent = s[None, :] - s[:, None]
    if EXACT:
        rest = tl.load(steps + 4 * plane + q)
        exponent += rest[None, :] - rest[:, None]
    seen = q[:, None] <= q[None, :]
    if HAS_RESET:
        mine = tl.load(document + q)
        seen &= mine[:, None] == mine[None, :]
    return tl.exp2(tl.where(seen, exponent, float("-inf")))


@triton.jit
def add_product(total, a, b, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """total + a b, where b is exact in the type of the operands and a, which is wider, counts in two parts:
    rounded once, the state would be as coarse as the inputs."""
    if OPERAND == tl.bfloat16:  # noqa: SIM300
        # cut off, not rounded: the tensor cores' type is the upper half of a float32
        high = (a.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
        total = tl.dot(high.to(OPERAND), b, total, input_precision=PRECISION, out_dtype=total.dtype)
        return tl.dot((a - high).to(OPERAND), b, total, input_precision=PRECISION, out_dtype=total.dtype)
    return tl.dot(a.to(OPERAND), b, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def convolved(
    x, taps, bias, window, documents, rows, inside, ps, p, xt, width,
    HAS_CBIAS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_RESET: tl.constexpr, W: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """silu of the causal convolution of a chunk of x (Q BP), rounded to x's type as if it had been stored.

    x, taps (w width), bias and documents (starts so far, of every token) begin at this sequence and head, and
    so does window (w-1 width), the inputs before the first token.
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
        total += v.to(WIDE) * tl.load(taps + k * width + ps, mask=ps < p, other=0.0).to(WIDE)[None, :]
    return (total / (1.0 + tl.exp2(-total * LOG2E))).to(x.dtype.element_ty)


@triton.jit
def steps_kernel(
    DT, A, BIAS, RESET, STEPS, DOCUMENT,
    t, h, plane,
    db, dt_, dh,
    HAS_BIAS: tl.constexpr, HAS_RESET: tl.constexpr,
    SOFTPLUS: tl.constexpr, LIMITS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    PLANES: tl.constexpr, Q: tl.constexpr, BH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What dt says, once for all kernels: STEPS (PLANES b h chunks*Q), padded with steps of 0.

    0  dt as the recurrence uses it
    1  s log2(e), and 4 what its type cuts off: differences of long sums keep the precision of short ones
    2  the decay from the state before the chunk
    3  dt times the decay to the end of the chunk
    5  the derivative of dt with respect to the given one
    6  the decay to the end of the chunk
    DOCUMENT (b chunks*Q): how many documents have started in this chunk.
    """
    k, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    q = tl.arange(0, Q)
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    known = heads < h
    rows = tl.cast(k, tl.int64) * Q + q
    inside = rows < t
    wanted = inside[:, None] & known[None, :]
    a = tl.load(A + heads, mask=known, other=0.0).to(WIDE)
    bias = tl.load(BIAS + heads, mask=known, other=0.0).to(WIDE)[None, :] if HAS_BIAS else 0.0
    raw = tl.load(DT + b * db + rows[:, None] * dt_ + heads[None, :] * dh, mask=wanted, other=0.0).to(WIDE)
    d, slope = step_sizes(  # pyright: ignore[reportGeneralTypeIssues]
        raw, inside[:, None], bias, SOFTPLUS, LIMITS, LOW, HIGH
    )
    exact = tl.cumsum(d.to(tl.float64) * (a.to(tl.float64) * LOG2E)[None, :], 0)
    document, _ = documents(RESET, b * t, rows, inside, HAS_RESET, Q)
    length = tl.num_programs(0) * Q
    if HAS_RESET:
        tl.store(DOCUMENT + b * length + rows, document)
    final = tl.sum(tl.where(q[:, None] == Q - 1, exact, 0.0), 0)[None, :]
    at_end = tl.max(document, 0)
    from_start = tl.where(document[:, None] == 0, tl.exp2(exact.to(WIDE)), 0.0)
    to_end = tl.where(document[:, None] == at_end, tl.exp2((final - exact).to(WIDE)), 0.0)
    high = exact.to(WIDE)
    plane = tl.cast(plane, tl.int64)
    place = STEPS + (b * h + heads[None, :]) * length + rows[:, None]
    tl.store(place, d, mask=known[None, :])
    tl.store(place + plane, high, mask=known[None, :])
    tl.store(place + 2 * plane, from_start, mask=known[None, :])
    tl.store(place + 3 * plane, d * to_end, mask=known[None, :])
    if PLANES > 4:
        tl.store(place + 4 * plane, (exact - high.to(tl.float64)).to(WIDE), mask=known[None, :])
    if PLANES > 5:
        tl.store(place + 5 * plane, slope, mask=known[None, :])
        tl.store(place + 6 * plane, to_end, mask=known[None, :])


@triton.jit
def states_kernel(
    V, U, STEPS, START, KEPT, END, TAPS, CBIAS, WINDOW, DOCUMENTS,
    t, h, p, n, heads, spans, span, plane,
    vb, vt, vh, ub, ut, ug,
    HAS_START: tl.constexpr, HAS_RESET: tl.constexpr,
    REVERSE: tl.constexpr, HAS_CBIAS: tl.constexpr, HAS_WINDOW: tl.constexpr, W: tl.constexpr,
    WHOLE: tl.constexpr, Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
    WIDE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walks the chunks of one head with a block of its state on chip, and keeps the state at every `span`-th.

    Forward:  S' = decay S + (dt decay x)^T B; kept is the state before a chunk.     V = x, U = B
    REVERSE: gS' = decay gS + (decay gy)^T C, from the end; kept is gS after it.     V = gy, U = C
    START, END (b h p n); KEPT (b h spans p n).
    """
    bh = tl.program_id(0).to(tl.int64)
    b, head = bh // h, bh % h
    ps = tl.program_id(1) * BP + tl.arange(0, BP)
    ns = tl.program_id(2) * BN + tl.arange(0, BN)
    q = tl.arange(0, Q)
    chunks = tl.cdiv(t, Q)
    plane = tl.cast(plane, tl.int64)
    V += b * vb + head * vh
    U += b * ub + head // heads * ug
    STEPS += bh * (chunks * Q)
    tile = box(ps < p, ns < n, WHOLE)
    place = ps[:, None] * n + ns[None, :]
    S = tl.zeros((BP, BN), WIDE)
    if HAS_START:
        S = tl.load(START + bh * p * n + place, mask=tile, other=0.0).to(WIDE)
    v_tile = q[:, None] * vt + ps[None, :]
    u_tile = q[:, None] * ut + ns[None, :]
    for step in range(chunks):
        k = chunks - 1 - step if REVERSE else step
        if k % span == 0:
            at = KEPT + (bh * spans + k // span) * p * n
            tl.store(at + place, S.to(KEPT.dtype.element_ty), mask=tile)
        begin = tl.cast(k, tl.int64) * Q
        rows = begin + q
        inside = rows < t
        if W > 0:
            v = convolved(
                V, TAPS + head * p, CBIAS + head * p if HAS_CBIAS else CBIAS,
                WINDOW + b * (W - 1) * (h * p) + head * p if HAS_WINDOW else WINDOW,
                DOCUMENTS + b * t if HAS_RESET else DOCUMENTS,
                rows, inside, ps, p, vt, h * p, HAS_CBIAS, HAS_WINDOW, HAS_RESET, W, WIDE,
            )  # fmt: skip
        else:
            v = tl.load(V + begin * vt + v_tile, mask=box(inside, ps < p, WHOLE), other=0.0)
        u = tl.load(U + begin * ut + u_tile, mask=box(inside, ns < n, WHOLE), other=0.0).to(OPERAND)
        weight = tl.load(STEPS + (2 if REVERSE else 3) * plane + begin + q)
        whole = tl.load(STEPS + 2 * plane + begin + Q - 1)
        weighed = tl.trans(v).to(WIDE) * weight[None, :]
        S = add_product(S * whole, weighed, u, OPERAND, PRECISION)
    tl.store(END + bh * p * n + place, S, mask=tile)


@triton.jit
def outputs_kernel(
    X, STEPS, DOCUMENT, B, C, D, START, Y, END, TAPS, CBIAS, WINDOW, DOCUMENTS,
    t, h, p, n, heads, spans, span, plane,
    xb, xt, xh, bb, bt, bg, cb, ct, cg,
    HAS_D: tl.constexpr, HAS_RESET: tl.constexpr, HAS_START: tl.constexpr, KEPT: tl.constexpr,
    HAS_CBIAS: tl.constexpr, HAS_WINDOW: tl.constexpr, W: tl.constexpr,
    WHOLE: tl.constexpr, Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
    WIDE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of one head and a block of its channels: all tokens, with the state on chip, or (KEPT) `span` chunks
    from a state that `states_kernel` left in START (b h spans p n). Y (b t h p), END (b h p n).
    W > 0: X is what the convolution of W taps starts from.

    Everything is transposed, channels before tokens: the state goes to the tensor cores from registers.
    """
    bh = tl.program_id(0).to(tl.int64)
    b, head = bh // h, bh % h
    ps = tl.program_id(1) * BP + tl.arange(0, BP)
    ns = tl.arange(0, BN)
    q = tl.arange(0, Q)
    chunks = tl.cdiv(t, Q)
    plane = tl.cast(plane, tl.int64)
    X += b * xb + head * xh
    Y += (b * t * h + head) * p
    B += b * bb + head // heads * bg
    C += b * cb + head // heads * cg
    STEPS += bh * (chunks * Q)
    DOCUMENT += b * (chunks * Q)
    tile = box(ps < p, ns < n, WHOLE)
    place = ps[:, None] * n + ns[None, :]
    S = tl.zeros((BP, BN), WIDE)
    if KEPT:
        S = tl.load(START + (bh * spans + tl.program_id(2)) * p * n + place, mask=tile, other=0.0).to(WIDE)
    elif HAS_START:
        S = tl.load(START + bh * p * n + place, mask=tile, other=0.0).to(WIDE)
    x_tile = q[:, None] * xt + ps[None, :]
    b_tile = q[:, None] * bt + ns[None, :]
    c_tile = q[:, None] * ct + ns[None, :]
    y_tile = q[:, None] * (h * p) + ps[None, :]
    # one program has all chunks where the third axis of the grid is 1
    for k in range(tl.program_id(2) * span, tl.minimum((tl.program_id(2) + 1) * span, chunks)):
        begin = tl.cast(k, tl.int64) * Q
        rows = begin + q
        inside = rows < t
        wanted = box(inside, ps < p, WHOLE)
        narrow = box(inside, ns < n, WHOLE)
        if W > 0:
            x = convolved(
                X, TAPS + head * p, CBIAS + head * p if HAS_CBIAS else CBIAS,
                WINDOW + b * (W - 1) * (h * p) + head * p if HAS_WINDOW else WINDOW,
                DOCUMENTS + b * t if HAS_RESET else DOCUMENTS,
                rows, inside, ps, p, xt, h * p, HAS_CBIAS, HAS_WINDOW, HAS_RESET, W, WIDE,
            )  # fmt: skip
        else:
            x = tl.load(X + begin * xt + x_tile, mask=wanted, other=0.0)
        u = tl.load(B + begin * bt + b_tile, mask=narrow, other=0.0).to(OPERAND)
        c = tl.load(C + begin * ct + c_tile, mask=narrow, other=0.0).to(OPERAND)
        steps = STEPS + begin
        d = tl.load(steps + q)
        from_start = tl.load(steps + 2 * plane + q)
        to_end = tl.load(steps + 3 * plane + q)
        whole = tl.load(steps + 2 * plane + Q - 1)
        # 1. what the chunk says to itself (j i), and the state to it; y is (p i)
        M = tl.dot(u, tl.trans(c), input_precision=PRECISION, out_dtype=WIDE)
        L = decays(steps, plane, DOCUMENT + begin, Q, HAS_RESET, OPERAND != tl.bfloat16)  # noqa: SIM300
        M = (M * (L * d[:, None])).to(OPERAND)
        y = (
            tl.dot(S.to(OPERAND), tl.trans(c), input_precision=PRECISION, out_dtype=WIDE)
            * from_start[None, :]
        )
        x = tl.trans(x)
        y = tl.dot(x.to(OPERAND), M, y, input_precision=PRECISION, out_dtype=WIDE)
        if HAS_D:
            y += tl.load(D + head).to(WIDE) * x.to(WIDE)
        tl.store(Y + begin * h * p + y_tile, tl.trans(y.to(Y.dtype.element_ty)), mask=wanted)
        # 2. the state after the chunk
        S = add_product(S * whole, x.to(WIDE) * to_end[None, :], u, OPERAND, PRECISION)
    if not KEPT:
        tl.store(END + bh * p * n + place, S, mask=tile)


@triton.jit
def gradients_kernel(
    GY, X, B, C, D, STEPS, DOCUMENT, STATES, GSTATES, GX, GB, GC, ROWS, INNER,
    t, h, p, n, heads, share, plane,
    yb, yt, yh, xb, xt, xh, bb, bt, bg, cb, ct, cg,
    HAS_D: tl.constexpr, HAS_RESET: tl.constexpr,
    WHOLE: tl.constexpr, Q: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
    WIDE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk but those of the steps for `share` heads of one group, one after the other:
    what they give to B and C adds up on chip.

    STATES (b h k p n) before, GSTATES after each chunk. GX (b t h p); GB, GC (parts b t g n), a part for each
    share of a group. What `finish_kernel` makes the gradients of the steps of: INNER (b h k BP), the rows of
    <S, gS>; and ROWS, first (b h k*Q), what s_i gets from the products inside the chunk that end at i, then
    (b h k*Q 4)
    0  the rest of what s gets     1  what dt gets beside that
    2  x gy                        3  what x dt gets through the state after the chunk
    """
    k, part = tl.program_id(0), tl.program_id(1)
    parts = tl.cdiv(heads, share)
    slot, g = part % parts, part // parts
    groups = h // heads
    b = tl.program_id(2).to(tl.int64)
    chunks = tl.cdiv(t, Q)
    plane = tl.cast(plane, tl.int64)
    ps, ns, q = tl.arange(0, BP), tl.arange(0, BN), tl.arange(0, Q)
    begin = tl.cast(k, tl.int64) * Q
    rows = begin + q
    inside = rows < t
    wanted = box(inside, ps < p, WHOLE)
    narrow = box(inside, ns < n, WHOLE)
    tile = box(ps < p, ns < n, WHOLE)
    place = ps[:, None] * n + ns[None, :]
    later = q[:, None] < q[None, :]
    pairs = tl.arange(0, 2)[None, :, None] + 2 * tl.arange(0, 2)[None, None, :]
    u = tl.load(B + b * bb + g * bg + begin * bt + (q[:, None] * bt + ns[None, :]), mask=narrow, other=0.0)
    c = tl.load(C + b * cb + g * cg + begin * ct + (q[:, None] * ct + ns[None, :]), mask=narrow, other=0.0)
    u, c = u.to(OPERAND), c.to(OPERAND)
    # a loop of one turn: the compiler lays out what enters another product by the way, each warp with rows of
    # its own, and with these sizes that is everything twice
    CB = tl.zeros((Q, Q), WIDE)
    for _ in tl.range(0, n, BN, num_stages=1):
        CB = tl.dot(u, tl.trans(c), CB, input_precision=PRECISION, out_dtype=WIDE)
    diagonal = tl.sum(tl.where(q[:, None] == q[None, :], CB, 0.0), 1)
    gCB = tl.zeros((Q, Q), WIDE)
    gB, gC = tl.zeros((Q, BN), WIDE), tl.zeros((Q, BN), WIDE)
    for r in range(slot * share, tl.minimum((slot + 1) * share, heads)):
        head = g * heads + r
        bh = b * h + head
        steps = STEPS + bh * (chunks * Q) + begin
        at = (bh * chunks + k) * p * n + place
        S = tl.load(STATES + at, mask=tile, other=0.0).to(OPERAND)
        gS = tl.load(GSTATES + at, mask=tile, other=0.0).to(OPERAND)
        x_tile = b * xb + begin * xt + head * xh + (q[:, None] * xt + ps[None, :])
        y_tile = b * yb + begin * yt + head * yh + (q[:, None] * yt + ps[None, :])
        x = tl.load(X + x_tile, mask=wanted, other=0.0).to(OPERAND)
        gy = tl.load(GY + y_tile, mask=wanted, other=0.0).to(OPERAND)
        d = tl.load(steps + q)
        from_start = tl.load(steps + 2 * plane + q)
        to_end = tl.load(steps + 6 * plane + q)
        L = decays(steps, plane, DOCUMENT + b * (chunks * Q) + begin, Q, HAS_RESET, OPERAND != tl.bfloat16)  # noqa: SIM300
        whole = tl.load(steps + 2 * plane + Q - 1)
        # first, while they are in registers; stored last, for no load may pass a store
        both = tl.sum(S.to(WIDE) * gS.to(WIDE), 1) * whole
        # 1. C.B^T, and what the decays inside the chunk get: s_i enters y_i with +, y of later tokens with -;
        # the two parts of the diagonal cancel, and are left out rather than to rounding. All of it (j i)
        gM = tl.dot(x, tl.trans(gy), input_precision=PRECISION, out_dtype=WIDE) * L
        gCB += gM * d[:, None]
        gM = tl.where(later, gM * CB, 0.0)
        said = tl.sum(gM, 1)
        ends_here = tl.sum(gM * d[:, None], 0)
        # 2. x through the chunk, and through the state after it
        gX = tl.dot((CB * L).to(OPERAND), gy, input_precision=PRECISION, out_dtype=WIDE)
        through = tl.dot(u, tl.trans(gS), input_precision=PRECISION, out_dtype=WIDE)
        # two sums at once: half the barriers
        pair = tl.sum(tl.join(through * x.to(WIDE), x.to(WIDE) * gy.to(WIDE)), 1)
        from_state, x_gy = tl.split(pair)
        from_state *= to_end
        # not (gX + through to_end) d, for the reason above
        gX = gX * d[:, None] + through * (to_end * d)[:, None]
        if HAS_D:
            gX += tl.load(D + head).to(WIDE) * gy.to(WIDE)
        out = GX + ((b * t + begin) * h + head) * p + (q[:, None] * (h * p) + ps[None, :])
        tl.store(out, gX.to(GX.dtype.element_ty), mask=wanted)
        # 3. s_i enters S' of this chunk with -, and of the one before with +
        asked = tl.dot(c, tl.trans(S), input_precision=PRECISION, out_dtype=WIDE)
        asked = tl.sum(asked * gy.to(WIDE), 1) * from_start
        row = (bh * (chunks * Q) + begin) + q
        four = tl.join(
            tl.join(asked - (said + from_state) * d, said + diagonal * x_gy + from_state),
            tl.join(x_gy, from_state * d),
        )
        tl.store(ROWS + plane + (row[:, None, None] * 4 + pairs), four)
        tl.store(ROWS + row, ends_here)
        tl.store(INNER + (bh * chunks + k) * BP + ps, both)
        # 4. the state's part in B and C
        gC += tl.dot(gy, S, input_precision=PRECISION, out_dtype=WIDE) * from_start[:, None]
        gB += tl.dot(x, gS, input_precision=PRECISION, out_dtype=WIDE) * (to_end * d)[:, None]
    coarse = gCB.to(OPERAND)
    # not coarse^T u: on Hopper, Triton 3.4 to 3.7 get the product of a transposed accumulator wrong
    # (triton#6124, flash-linear-attention#640)
    gC += tl.trans(tl.dot(tl.trans(u), coarse, input_precision=PRECISION, out_dtype=WIDE))
    gB = tl.dot(coarse, c, gB, input_precision=PRECISION, out_dtype=WIDE)
    at = (((slot * tl.num_programs(2) + b) * t + begin) * groups + g) * n
    at += q[:, None] * (groups * n) + ns[None, :]
    tl.store(GB + at, gB.to(GB.dtype.element_ty), mask=narrow)
    tl.store(GC + at, gC.to(GC.dtype.element_ty), mask=narrow)


@triton.jit
def finish_kernel(
    A, RESET, STEPS, ROWS, INNER, GDT, SUMS,
    t, h, plane,
    HAS_RESET: tl.constexpr, Q: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradients of the steps of one chunk: GDT (b t h), and SUMS (3 b k h) over the chunk's tokens: of A,
    D and dt_bias."""
    k, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    chunks = tl.num_programs(0)
    q = tl.arange(0, Q)
    heads = tl.program_id(1) * BH + tl.arange(0, BH)
    known = heads < h
    rows = tl.cast(k, tl.int64) * Q + q
    inside = rows < t
    plane = tl.cast(plane, tl.int64)
    at = (b * h + heads[None, :]) * (chunks * Q) + rows[:, None]
    mask = known[None, :]
    four = ROWS + plane + at * 4
    gs = tl.load(ROWS + at, mask=mask, other=0.0) + tl.load(four, mask=mask, other=0.0)
    # the whole chunk's decay is the last token's
    at_end = tl.sum(tl.load(four + 3, mask=mask, other=0.0), 0)
    inner = (b * h + heads[None, :]) * (chunks * BP) + k * BP + tl.arange(0, BP)[:, None]
    at_end += tl.sum(tl.load(INNER + inner, mask=mask, other=0.0), 0)
    gs += tl.where(q[:, None] == Q - 1, at_end[None, :], 0.0)
    _, starts = documents(RESET, b * t, rows, inside, HAS_RESET, Q)
    gdecay = tl.where(starts[:, None] != 0, 0.0, tl.cumsum(gs, 0, reverse=True))
    a = tl.load(A + heads, mask=known, other=0.0).to(WIDE)
    gdt = gdecay * a[None, :] + tl.load(four + 1, mask=mask, other=0.0)
    gdt *= tl.load(STEPS + 5 * plane + at, mask=mask, other=0.0)
    place = GDT + (b * t + rows[:, None]) * h + heads[None, :]
    tl.store(place, gdt.to(GDT.dtype.element_ty), mask=inside[:, None] & mask)
    size = tl.num_programs(2).to(tl.int64) * chunks * h
    place = SUMS + (b * chunks + k) * h + heads
    tl.store(place, tl.sum(gdecay * tl.load(STEPS + at, mask=mask, other=0.0), 0), mask=known)
    tl.store(place + size, tl.sum(tl.load(four + 2, mask=mask, other=0.0), 0), mask=known)
    tl.store(place + 2 * size, tl.sum(gdt, 0), mask=known)


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
