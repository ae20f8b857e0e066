"""Plain references: what the design says, written a second time, as slow as it likes.

The model in float64 NumPy (SPEC section 3), Muon (section 4), GPTQ by its definition, the
artifact's bytes (section 5), the four conditions of a legal score, Witten-Bell by dictionaries,
the segmenter of SCYLLA.md section 4, and capitals as marks (FRONTIER.md section 4). Nothing here
uses train_gpt.py or retokenize_scylla.py.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import json
import lzma
import math
import random
import re
import struct
import unicodedata
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import harness as h
import train_gpt as t


def norm(x: np.ndarray) -> np.ndarray:
    """RMSNorm without weights, epsilon of float32."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.finfo(np.float32).eps)


def bigram_rows(ids: np.ndarray, boundary: np.ndarray, rows: int) -> np.ndarray:
    """Bigram rows in Python integers, wrapped to int32 by hand."""
    wrap = lambda n: (n + 2**31) % 2**32 - 2**31  # noqa: E731
    out = np.full(ids.shape, rows - 1)
    for b, i in np.ndindex(ids.shape):
        if i > 0 and not boundary[ids[b, i]]:
            pair = wrap(36313 * int(ids[b, i])) ^ wrap(27191 * int(ids[b, i - 1]))
            out[b, i] = pair % (rows - 1)
    return out


def model_input(p: dict, c: t.Config, boundary: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """SPEC section 3, Input."""
    x = p["embed.weight"][ids]
    if c.bigram_vocab_size:
        rows = bigram_rows(ids, boundary, c.bigram_vocab_size)
        x = x + p["bigram.scale"] * (p["bigram.table.weight"][rows] @ p["bigram.proj.weight"].T)
    x = norm(x)
    if not c.smear_enabled:
        return x
    gate, out = 1 / (1 + np.exp(-p["smear.gate"])), x.copy()
    for b, i in np.ndindex(ids.shape):
        if i > 0 and not boundary[ids[b, i]]:
            out[b, i] = (1 - gate) * x[b, i] + gate * x[b, i - 1]
    return out


def rope(x: np.ndarray, c: t.Config) -> np.ndarray:
    """Rotate-half on the first ROPE_DIMS of each head; x (B, T, heads, K)."""
    half, out = c.rope_dims // 2, x.copy()
    for i in range(x.shape[1]):
        for j in range(half):
            angle = i * c.rope_base ** (-2 * j / c.rope_dims)
            a, b = x[:, i, :, j], x[:, i, :, j + half]
            out[:, i, :, j] = a * math.cos(angle) - b * math.sin(angle)
            out[:, i, :, j + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def attention(p: dict, c: t.Config, i: int, x: np.ndarray, value, seen: np.ndarray) -> np.ndarray:
    """SPEC section 3, Attention of layer i; `seen` (B, T, T) are the keys that a query sees."""
    w = {n: p[f"blocks.{i}.attn.{n}.weight"] for n in ("q", "k", "v", "out")}
    B, T, D = x.shape
    H, G = c.num_heads, c.num_kv_heads
    K = D // H
    q, k, v = x @ w["q"].T, x @ w["k"].T, x @ w["v"].T
    v = v if value is None else v + value
    q, k, v = q.reshape(B, T, H, K), k.reshape(B, T, G, K), v.reshape(B, T, G, K)
    q = rope(norm(q), c) * p[f"blocks.{i}.attn.q_gain"][:, None]
    k = rope(norm(k), c)
    y = np.zeros((B, T, H, K))
    for head in range(H):
        kv = head // (H // G)
        scores = q[:, :, head] @ k[:, :, kv].swapaxes(1, 2) / math.sqrt(K)
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        y[:, :, head] = weights / weights.sum(-1, keepdims=True) @ v[:, :, kv]
        if i >= c.num_layers - c.xsa_last_n:
            own = v[:, :, kv] / np.linalg.norm(v[:, :, kv], axis=-1, keepdims=True)
            y[:, :, head] -= (y[:, :, head] * own).sum(-1, keepdims=True) * own
        if c.attn_gate_dims:  # FRONTIER section 2, as are skip gates, softcaps and documents
            gate = x[:, :, : c.attn_gate_dims] @ p[f"blocks.{i}.attn.gate"][head]
            y[:, :, head] /= 1 + np.exp(-0.5 * gate)[:, :, None]
    return y.reshape(B, T, D) @ w["out"].T


def mlp(p: dict, c: t.Config, prefix: str, x: np.ndarray) -> np.ndarray:
    """SPEC section 3, MLP."""
    z = x @ p[f"{prefix}.up.weight"].T
    z = np.where(z > 0, z, c.activation_neg_slope * z)
    return (z * z) @ p[f"{prefix}.down.weight"].T


def logits(model: t.GPT, ids: torch.Tensor, recur: bool) -> np.ndarray:
    """Logits of a model in one of its phases, by `scores`."""
    p = {n: x.detach().double().numpy() for n, x in model.named_parameters()}
    return scores(p, model.config, model.is_boundary.numpy(), ids.numpy(), recur)


def scores(p: dict, c, boundary: np.ndarray, ids: np.ndarray, recur: bool) -> np.ndarray:
    """SPEC section 3 from ids to logits in float64 NumPy; p: arrays by name, c: the settings."""
    x0 = model_input(p, c, boundary, ids)
    order = [(i, None) for i in range(c.num_layers)]
    if recur and c.recur_layers:
        after, count = order.index((c.recur_layers[-1], None)) + 1, len(c.recur_layers)
        order[after:after] = [(i, (again - 1) * count + n) for again in range(1, c.recur_passes)
                              for n, i in enumerate(c.recur_layers)]
    seen = np.tri(ids.shape[1], dtype=bool) & (ids >= 0)[:, :, None]
    if c.doc_attention:
        for b, query, key in np.argwhere(seen):
            seen[b, query, key] = not boundary[ids[b, key + 1 : query + 1]].any()
    half, stored, a_lane, m_lane = c.num_layers // 2, [], x0, x0
    for i, again in order:
        pre, scale = f"blocks.{i}.", (i + 1) ** -0.5 if c.ln_scale else 1.0
        if again is None and half <= i < 2 * half:
            skip = p["skip_weights"][i - half] * stored.pop()
            if c.skip_gate:
                skip = skip / (1 + np.exp(-p["skip_gates"][i - half]))
            a_lane, m_lane = a_lane + skip, m_lane + skip
        value = None
        if c.ve_enabled and i in c.ve_layers:
            value = p["value.table.weight"][ids] @ p["value.proj.weight"].T
            value = value * p["value.scale"] * p["value.layer_scale"][c.ve_layers.index(i)]
        owner = pre + "mlp" if again is None or not c.recur_untie_mlp else f"repeat_mlps.{again}"
        mix_a = p[pre + "resid_mix"]
        if i < c.parallel_start_layer:
            x = mix_a[0] * a_lane + mix_a[1] * x0
            x = x + p[pre + "attn_scale"] * attention(p, c, i, norm(x) * scale, value, seen)
            x = x + p[pre + "mlp_scale"] * mlp(p, c, owner, norm(x) * scale)
            a_lane = m_lane = x
        else:
            mix_m, r = p[pre + "resid_mix_mlp"], p[pre + "route"]
            a = norm(mix_a[0] * a_lane + mix_a[1] * x0) * scale
            m = norm(mix_m[0] * m_lane + mix_m[1] * x0) * scale
            a = p[pre + "attn_scale"] * attention(p, c, i, a, value, seen)
            m = p[pre + "mlp_scale"] * mlp(p, c, owner, m)
            a_lane, m_lane = a_lane + r[0] * a + r[2] * m, m_lane + r[1] * a + r[3] * m
        if again is None and i < half:
            stored.append(a_lane)
    w = p.get("lane_merge", 0.5)
    hidden = norm(w * a_lane + (1 - w) * m_lane)
    z = hidden @ p["embed.weight" if c.tie_embeddings else "head.weight"].T
    above, below = p["softcap"] if c.asym_softcap else 2 * [c.logit_softcap]
    return np.where(z > 0, above * np.tanh(z / above), below * np.tanh(z / below))


def muon(weights, grads, lr, momentum, wd, triples, row_norm) -> list[np.ndarray]:
    """Muon as SPEC section 4 writes it, float64, one matrix after the other."""
    out = []
    for w, history in zip(weights, grads, strict=True):
        w, buf = w.astype(np.float64), np.zeros(w.shape)
        for g in history:
            buf = momentum * buf + g
            x = g + momentum * buf
            x = x / np.linalg.norm(x, axis=1, keepdims=True) if row_norm else x
            x = x / np.linalg.norm(x)
            x = x.T if w.shape[0] > w.shape[1] else x
            for first, third, fifth in triples:
                a = x @ x.T
                x = first * x + third * a @ x + fifth * a @ a @ x
            x = x.T if w.shape[0] > w.shape[1] else x
            w = w * (1 - lr * wd) - lr * math.sqrt(max(1, w.shape[0] / w.shape[1])) * x
        out.append(w)
    return out


def softmax_attention(q, k, v, starts=None):
    """Explicit causal grouped-query attention, (B, T, heads, K), scale 1 / sqrt(K).

    With `starts` (B, T) a query sees no key before the last start up to itself.
    """
    group = q.size(2) // k.size(2)
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.size(-1))
    T = q.size(1)
    scores = scores.masked_fill(~torch.ones(T, T).tril().bool(), -math.inf)
    for b, place in starts.nonzero().tolist() if starts is not None else ():
        scores[b, :, place:, :place] = -math.inf
    return torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v)


def first_rune(text: bytes) -> tuple[str, int]:
    """First character and its size, by section 4.2."""
    if not text:
        return "\ufffd", 0
    for size in (1, 2, 3, 4):
        try:
            return text[:size].decode(), size if len(text) >= size else 1
        except UnicodeDecodeError:
            pass
    return "\ufffd", 1


def last_rune(text: bytes) -> str:
    """Last character: the decoding from some start that ends exactly at the end."""
    for size in (1, 2, 3, 4):
        if size <= len(text):
            char, used = first_rune(text[-size:])
            if used == size and (char != "\ufffd" or text[-size:] == b"\xef\xbf\xbd"):
                return char
    return "\ufffd"


def is_letter(char: str) -> bool:  # noqa: N802
    return unicodedata.category(char) in ("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me")


def is_number(char: str) -> bool:  # noqa: N802
    return unicodedata.category(char) in ("Nd", "Nl", "No")


def is_space(char: str) -> bool:  # noqa: N802
    return char.isspace() and char not in "\x1c\x1d\x1e\x1f"


class Segmenter:
    """Section 4 of SCYLLA.md, line by line, as slow as it likes."""

    def __init__(self, entries: list[bytes]):
        self.id_of = {}
        for k, token in enumerate(entries):
            if 0 < len(token) <= 40:
                self.id_of[token] = k
        self.longest_length = max(map(len, self.id_of))
        self.fields = {token: self.make_fields(token) for token in self.id_of}

    def make_fields(self, t: bytes) -> dict:
        chars, rest = [], t
        while rest:
            char, size = first_rune(rest)
            chars.append(char)
            rest = rest[size:]
        r, r2 = chars[0], chars[1] if len(chars) > 1 else "\ufffd"
        words, lo, space, starts, oneword = 0, 1, False, False, False
        if r == " ":
            space = True
            if is_letter(r2) or is_number(r2):
                words, lo = 1, 2
        elif is_letter(r):
            starts = True
        for p, q in zip(chars[1:], chars[2:], strict=False):
            words += p == " " and (is_letter(q) or is_number(q))
        letters, digits, punct = self.make_kinds(t, r, r2, chars[2:])
        z = last_rune(t)
        if lo == 2 and is_letter(z) and letters and words == 1:
            oneword = True
        if lo == 2 and words <= 1:
            lo = 1
        return {"words": words, "space": space, "starts": starts, "ends": is_letter(z),
                "oneword": oneword, "same": letters or digits or punct,
                "alternatives": self.make_alternatives(t, lo)}

    @staticmethod
    def make_kinds(t: bytes, r: str, r2: str, further: list[str]) -> tuple[bool, bool, bool]:
        letters = digits = punct = False
        if len(t) == 1:
            punct = True
        elif (r == " " or is_letter(r)) and is_letter(r2):
            letters = True
        elif (r == " " or is_number(r)) and is_number(r2):
            digits = True
        elif not any(is_letter(char) or is_number(char) for char in (r, r2)):
            punct = True
        for q in further:
            if is_letter(q):
                punct = digits = False
            elif is_number(q):
                punct = letters = False
            elif q != " ":
                letters = digits = False
        return letters, digits, punct

    def make_alternatives(self, t: bytes, lo: int) -> list[bytes]:
        a, b = (0, 0, b""), (0, 0, b"")
        for k in range(len(t) - 1, lo - 1, -1):
            if t[:k] not in self.id_of:
                continue
            priority = self.priority(t, k)
            if a[0] < b[0] or (a[0] == b[0] and a[1] <= b[1]):
                a = (priority, k, t[:k]) if a[0] < priority else a
            else:
                b = (priority, k, t[:k]) if b[0] < priority else b
        if b[2] and (b[0] > a[0] or (b[0] == a[0] and b[1] > a[1])):
            a, b = b, a
        return [slot[2] for slot in (a, b) if slot[2]]

    @staticmethod
    def priority(t: bytes, k: int) -> int:
        x, y = last_rune(t[:k]), first_rune(t[k:])[0]
        after = first_rune(t[k + 1:])[0]
        if k <= len(t) - 2 and t[k:k + 1] == b" " and (is_letter(after) or is_number(after)):
            return 10
        if (not is_letter(x) and x != "_" and (is_letter(y) or y == "_")) or (
                not is_number(x) and is_number(y)):
            return 9
        if ((is_letter(x) or x == "_") and not is_letter(y) and y != "_") or (
                is_number(x) and not is_number(y)):
            return 9
        if is_space(x) and not is_space(y):
            return 7
        return 8 if not is_space(x) and is_space(y) else 1

    @functools.cache  # noqa: B019
    def byte_class(self, value: int) -> int:
        counts = {1: 0, 12: 0, 10: 0, 0: 0}
        for token in self.id_of:
            if token[0] == value:
                r = first_rune(token)[0]
                counts[12 if r == " " else 1 if is_letter(r) else 0 if is_number(r) else 10] += 1
        for kind, count in counts.items():
            if count > 2 and 2 * count > sum(counts.values()):
                return kind
        return 0

    def longest(self, data: bytes) -> bytes:
        return next((data[:k] for k in range(min(self.longest_length, len(data)), 0, -1)
                     if data[:k] in self.id_of), b"")

    def value(self, t: bytes, c: bytes, data: bytes) -> int | None:
        """Score of candidate c for the longest token t, data beginning at both."""
        s = self.longest(data[len(c):])
        if not s:
            return None
        q = len(c) + len(s)
        nb = self.byte_class(data[q]) if q < len(data) else 0
        f, g = self.fields[c], self.fields[s]
        v = (len(c) + len(s) + f["same"] + g["same"] + max(0, f["words"] - 1)
             + max(0, g["words"] - 1) + g["space"] + (nb == 12)
             + 100 * (f["words"] + g["words"] + (nb in (10, 12)))
             - 103 * (f["ends"] and g["starts"]) - 3 * (g["ends"] and nb == 1))
        if c != t:
            v -= 100 if q < len(t) else 10000 if q == len(t) else 0
        return v

    def encode(self, data: bytes) -> list[int]:
        ids = []
        while data:
            t = choice = self.longest(data)
            f = self.fields[t]
            rest = data[len(t):]
            if rest and not (f["oneword"] and self.byte_class(rest[0]) == 12):
                best = -1000000
                for c in [t, *f["alternatives"]]:
                    v = self.value(t, c, data)
                    if v is not None and v > best:
                        best, choice = v, c
            ids.append(self.id_of[choice])
            data = data[len(choice):]
        return ids


def marked(text: bytes) -> bytes:
    """Capitals as marks, by words: FF, and FE for two or more capitals at the end of a run."""
    def one(match: re.Match) -> bytes:
        space, head, tail = match[1], *re.fullmatch(b"(.*?)([A-Z]{2,}|)", match[2]).groups()
        word = re.sub(b"([A-Z])", b"\xff\\1", head) + b"\xfe" * bool(tail) + tail
        return re.sub(b"^ ([\xfe\xff])", b"\\1 ", space + word).lower()

    return re.sub(b"( ?)([A-Za-z]+)", one, text)


def restored(text: bytes) -> bytes:
    """The text whose marked form this is."""
    return re.sub(b"\xff( ?[a-z])|\xfe( ?[a-z]+)", lambda m: (m[1] or m[2]).upper(), text)


ATOMS = [b" ", b"  ", b"a", b"b", b"Z", b"the", b" a", b"1", b"23", b".", b",", b"_", b"'",
         b"\n", b"\t", "\u00e9".encode(), "\u0301".encode(), "\u4e2d".encode(), b"\xe4\xb8",
         b"\xff",
         b"\x80", "\u00a0".encode(), "\u0663".encode(), b"\xed\xa0\x80", b"\xc0\xaf",
         "\U0001f600".encode(), b"\xef\xbf\xbd", b"\x1c"]


def drawn(rng: random.Random, pieces: list[bytes], most: int) -> bytes:
    """A few random pieces in a row."""
    return b"".join(rng.choices(pieces, k=rng.randint(1, most)))


def condition_1(score, ids, places):
    """Altering all tokens after a place, boundaries kept, changes no score up to it by a bit."""
    before, random = score(ids)[0], np.random.default_rng(1)
    for place in places:
        other, boundary = ids.copy(), ids == h.SHORT_VOCAB - 1
        new = (ids + random.integers(1, h.SHORT_VOCAB - 1, len(ids))) % (
            h.SHORT_VOCAB - 1)  # never the same
        other[place + 1 :] = np.where(boundary, ids, new)[place + 1 :]
        after = score(other)[0]  # target k is ids[k + 1]
        assert after[:place].tobytes() == before[:place].tobytes(), f"condition 1 at {place}"
        assert not np.array_equal(after, before)  # else nothing was altered


def condition_2(score, ids, places):
    """exp(-nats) over every id put in as the target sums to 1."""
    for place in places:
        total = 0.0
        for v in range(h.SHORT_VOCAB):
            other = ids.copy()
            other[place] = v
            total += math.exp(-float(score(other)[0][place - 1]))
        assert abs(total - 1) < 1e-4, f"condition 2 at {place}: {total}"


def condition_3(ranks, length, targets):
    """No weight or count sees a target before its final score; `ranks`: (nats, events) of each.

    The final score is the one that the first forward pass over a target gave.
    """
    updates = max(sum(event[0] == "update" for event in events) for _, events in ranks)
    first, mixed = {}, any(event[0] == "read" for _, events in ranks for event in events)
    for _, events in ranks:
        assert sum(event[0] == "update" for event in events) == updates, "condition 3: ranks"
    for number in range(updates + 1):  # weights change when all ranks have come to the update
        scored, trained = set(), set()
        for _, events in ranks:
            seen = 0
            for event in events:
                seen += event[0] == "update"
                if seen > number:
                    break
                if event[0] == "score":
                    for start, row in zip(event[1], event[2], strict=True):
                        for place, value in enumerate(row):
                            first.setdefault(start + place, (value, number))
                            scored.add(start + place)
                if event[0] == "train":
                    trained |= {s + i for s in event[1] for i in range(length)}
        assert trained <= scored, f"condition 3: trained on {sorted(trained - scored)} too early"
    for nats, events in ranks:
        assert mixed or len(ranks) > 1 or all(
            nats[target] == first[target][0] for target in range(targets)), "condition 3: replaced"
        for event in events:  # counts hold what was read before, and never more
            assert event[0] != "read" or event[2] <= event[1][0], "condition 3: counted too early"


def condition_4(ranks, targets):
    """Each target is scored exactly once, left to right."""
    for _, events in ranks:
        windows = next(event[1] for event in events if event[0] == "plan")
        length = len(next(event[2] for event in events if event[0] == "score")[0])
        scored = [place for start, first in windows.tolist()
                  for place in range(start + first, start + length)]
        assert scored == list(range(targets)), "condition 4: not each target once, in order"
        starts = dict.fromkeys(s for event in events if event[0] == "score" for s in event[1])
        assert list(starts) == sorted(starts), "condition 4: not from left to right"
        read = [target for event in events if event[0] == "read" for target in event[1]]
        assert read in ([], list(range(targets))), "condition 4: cache"


def documents(ids):
    """(first id, targets) of the documents of a stream, as FRONTIER.md section 3 cuts them."""
    last = h.SHORT_VOCAB - 1
    starts = [0, *(i for i in range(1, len(ids) - 1) if ids[i] == last)]
    return list(zip(starts, np.diff([*starts, len(ids) - 1]).tolist(), strict=True))


def chunks_of(ids, c):
    """(document, chunk): what may be read, the targets, and where these are in the stream."""
    found = {}
    for d, (begin, length) in enumerate(documents(ids)):
        for n, first in enumerate(range(0, length, c.ttt_doc_chunk)):
            end = min(first + c.ttt_doc_chunk, length)
            start = max(0, first + c.ttt_doc_chunk - c.eval_seq_len)
            found[d, n] = (ids[begin + start : begin + end].tolist(),
                           ids[begin + first + 1 : begin + end + 1].tolist(),
                           range(begin + first, begin + end), start)
    return found


def conditions_of_documents(ranks, ids, c):
    """Conditions 3 and 4 of document TTT, by what the model was given; `ranks`: (nats, events).

    Every chunk is scored once, after those before it in its document, given nothing after it. The
    score is final. Adapters are new for a document, and make a step after each chunk but the last.
    """
    wanted, scored = chunks_of(ids, c), []
    for nats, events in ranks:
        done = documents_of_rank(nats, events, ids, wanted)
        scored += done
        phase = [i for i, (kind, *_) in enumerate(events) if kind in ("train", "update")]
        order = [i for i, (kind, *_) in enumerate(events) if kind == "chunk"]
        if phase:  # in one piece, after the first documents and before the others
            assert not [i for i in order if phase[0] < i < phase[-1]], "condition 3: global phase"
            early = [d < c.ttt_global_docs for d, _ in done]
            rows = [len(rows) for rows in rows_of(events, ids, wanted)]
            before = sum(rows[: sum(i < phase[0] for i in order)])
            assert early == [True] * before + [False] * (len(done) - before), (
                "condition 3: global phase")
    assert sorted(scored) == sorted(wanted), "condition 4: not each chunk once"


def rows_of(events, ids, wanted):
    """For every step of documents: {slot: (document, chunk)}, told by what the model was given."""
    done, steps = set(), []
    for _, read, targets, *_ in (event for event in events if event[0] == "chunk"):
        steps.append({})
        for row, (text, goals) in enumerate(zip(read.tolist(), targets.tolist(), strict=True)):
            keys = [key for key, (known, wished, _, _) in wanted.items()
                    if text == known + [0] * (len(text) - len(known))
                    and goals == wished + [0] * (len(goals) - len(wished))]
            if not keys:  # a free slot
                assert not any(text) and not any(goals), "condition 4: no such chunk"
                continue
            new = [(d, n) for d, n in keys if (d, n) not in done  # documents may be alike
                   and (n == 0 or (d, n - 1) in done)]
            assert new, f"condition 4: {keys} again, or too early"
            done.add(new[0])
            steps[-1][row] = new[0]
    return steps


def documents_of_rank(nats, events, ids, wanted):
    """(document, chunk) of what a rank scores, in order; conditions 3 and 4 as far as that goes."""
    first_a, steps, done = None, 0, []
    places = [i for i, event in enumerate(events) if event[0] == "chunk"]
    for i, rows in zip(places, rows_of(events, ids, wanted), strict=True):
        _, _, _, where, a, b, scores = events[i]
        for row, (d, n) in rows.items():
            _, goals, targets, start = wanted[d, n]
            begin = documents(ids)[d][0]
            assert where[row, : len(goals)].tolist() == [k - begin - start for k in targets]
            assert nats[targets.start : targets.stop].tolist() == scores[
                row, : len(goals)].tolist(), "condition 3: replaced"
            if n == 0:
                first_a = a[row] if first_a is None else first_a
                assert not b[row].any() and torch.equal(a[row], first_a), "condition 3: not new"
        trained = {row for row, (d, n) in rows.items() if (d, n + 1) in wanted}
        for kind, *rates in events[i + 1 : i + 3] if trained else []:  # A's step and B's
            assert kind == "adapt", "condition 3: no step follows"
            assert {row for row, rate in enumerate(rates[0]) if rate} == trained, "condition 3"
            steps += 1
        done += rows.values()
    assert sum(kind == "adapt" for kind, *_ in events) == steps, "condition 3: a step too many"
    return done


def witten_bell(ids, boundary, order, chunk, vocab):
    """Probability of each target by dictionaries, one target at a time."""
    counts, out = {}, []
    for target in range(len(ids) - 1):
        if target % chunk == 0:  # all before this chunk have been scored
            for done in range(max(0, target - chunk), target):
                for context in contexts(ids, boundary, done, order):
                    counts.setdefault(context, Counter())[int(ids[done + 1])] += 1
        p = 1 / vocab
        for context in contexts(ids, boundary, target, order):
            seen = counts.get(context, Counter())
            if seen:
                n, kinds = sum(seen.values()), len(seen)
                p = (seen[int(ids[target + 1])] + kinds * p) / (n + kinds)
        out.append(p)
    return np.array(out)


def contexts(ids, boundary, target, order):
    """Contexts of a target, the empty one first; none reaches over a boundary."""
    for k in range(order):
        context = tuple(int(i) for i in ids[max(0, target + 1 - k) : target + 1])
        if len(context) < k or any(boundary[i] for i in context[1:]):
            return
        yield context


def rans_bytes(data, size):
    """The bytes that a rANS stream stands for, one symbol after the other.

    Lanes of about 16,384 bytes lie side by side. A table, under zlib: for each of up to four models
    the shares of the 256 bytes in 2^14, then the model of every 2,048 bytes of every lane. The
    states of the lanes follow, then the words that refill states under 2^16, in order of use.
    """
    lanes = max(1, size // 16384)
    steps = max(1, math.ceil(size / lanes))
    models, length = struct.unpack_from("<BI", data)
    table = zlib.decompress(data[5 : 5 + length])
    shares = [struct.unpack_from("<256H", table, 512 * model) for model in range(models)]
    starts = [[0, *itertools.accumulate(row)] for row in shares]
    assert all(row[-1] == 1 << 14 for row in starts)
    states = list(struct.unpack_from(f"<{lanes}I", data, 5 + length))
    at, out = 5 + length + 4 * lanes, [bytearray() for _ in range(lanes)]
    for step, lane in itertools.product(range(steps), range(lanes)):
        model = table[512 * models + step // 2048 * lanes + lane]
        whole, place = divmod(states[lane], 1 << 14)
        symbol = bisect.bisect_right(starts[model], place) - 1  # the share that holds the place
        state = shares[model][symbol] * whole + place - starts[model][symbol]
        if state < 1 << 16:
            state, at = state << 16 | int.from_bytes(data[at : at + 2], "little"), at + 2
        states[lane] = state
        out[lane].append(symbol)
    assert at == len(data) and set(states) == {1 << 16}  # as the encoder began
    return b"".join(out)[:size]


def read_artifact(path):
    """(settings as text, ids of the vocabulary, {name: float64 array}) from the container's bytes.

    Written from SPEC section 5 and the layout: magic, digest, size of the header, header, streams.
    """
    data = Path(path).read_bytes()
    at = 46 + struct.unpack_from("<I", data, 42)[0]
    assert data[:10] == b"PROTEUS 4\n"
    header, seen = json.loads(zlib.decompress(data[46:at])), hashlib.sha256(data[42:])
    filters = [dict(id=lzma.FILTER_LZMA2, preset=9 | lzma.PRESET_EXTREME, lc=0, lp=0, pb=0)]
    streams = {}
    for name, codec, length, size, crc in header["streams"]:
        body, at = data[at : at + length], at + length
        assert zlib.crc32(body) == crc
        if codec == "lzma":
            streams[name] = lzma.decompress(body, lzma.FORMAT_RAW, filters=filters)
        elif codec == "zlib":
            streams[name] = zlib.decompress(body, -15)
        elif codec == "rans":
            streams[name] = rans_bytes(body, size)
        else:
            streams[name] = pytest.importorskip("zstandard").ZstdDecompressor().stream_reader(
                body).read()
        assert len(streams[name]) == size
        seen.update(streams[name])
    assert at == len(data) and seen.digest() == data[10:42]
    used, tensors = Counter(), {}

    def take(stream, kind, shape):
        width, count = np.dtype(kind).itemsize, math.prod(shape)
        planes = np.frombuffer(streams[stream], np.uint8).reshape(width, -1)
        begin = used[stream]
        used[stream] += count
        return np.frombuffer(planes[:, begin : begin + count].T.tobytes(), kind).astype(
            np.float64).reshape(shape)

    for name, kind, bits, shape in header["tensors"]:
        if bits > 8:
            tensors[name] = take(f"{kind}.fp{bits}", f"<f{bits // 8}", shape)
        else:
            tensors[name] = take(f"{kind}.int{bits}", "i1", shape) * take(
                "scales", "<f2", shape[:1])[:, None]
    return header["model"], header["vocab_size"], tensors


def obq(weight, hessian, scale, bits):
    """Codes of one matrix by the definition: one column, then the optimal update of the rest."""
    hess = hessian.double()
    hess = hess / hess.diagonal().mean() + 0.01 * torch.eye(len(hess))
    order = hess.diagonal().argsort(descending=True, stable=True)
    hess, w = hess[order][:, order], weight.double()[:, order].clone()
    codes, largest = torch.zeros_like(w), 2 ** (bits - 1) - 1
    for i in range(len(hess)):
        inverse = torch.linalg.inv(hess[i:, i:])
        codes[:, i] = (w[:, i] / scale[:, 0]).round().clamp(-largest, largest)
        error = (w[:, i] - codes[:, i] * scale[:, 0]) / inverse[0, 0]
        w[:, i:] -= error[:, None] * inverse[0]
    return torch.empty_like(codes).index_copy_(1, order, codes)
