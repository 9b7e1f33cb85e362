"""advance, spelled out row by row in Python: what each implementation is compared with."""

import random
from types import SimpleNamespace

import torch

VOCAB, MAX_PAGES, SPARE = 37, 5, 90
FIELDS = ("token_ids", "slots", "seq_lens", "limits", "done", "page_table", "stop_mask", "output_counts")


def make_rows(num_rows, seed, device="cpu"):
    """Rows in every state: fresh, just below their limit, at rest."""
    draw = random.Random(seed)
    done = [int(draw.random() < 0.25) for _ in range(num_rows)]
    slots = [0 if rests else draw.choice([0, 1, 7, 63, 64, 2**33]) for rests in done]
    limits = [slot + draw.choice([2, 3, 50]) for slot in slots]
    table = [[draw.randrange(SPARE) for _ in range(MAX_PAGES)] for _ in range(num_rows)]
    for row, rests in enumerate(done):
        if rests:
            table[row][0] = SPARE
    rows = SimpleNamespace(
        token_ids=torch.tensor([0 if rests else draw.randrange(VOCAB) for rests in done]),
        slots=torch.tensor(slots),
        seq_lens=torch.tensor([slot + 1 for slot in slots]),
        limits=torch.tensor(limits),
        done=torch.tensor(done),
        page_table=torch.tensor(table),
        stop_mask=torch.rand(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) < 0.3,
        output_counts=torch.randint(0, 5, (num_rows, VOCAB), dtype=torch.int32),
        every=torch.arange(num_rows + 1),
        spare_page=SPARE,
        kept={},
    )
    for name, value in vars(rows).items():
        if isinstance(value, torch.Tensor):
            setattr(rows, name, value.to(device))
    return rows


def expected(tokens, indices, rows, counted):
    """What `advance` returns, and every field afterwards, as lists."""
    state = {name: getattr(rows, name).tolist() for name in FIELDS}
    out = []
    for place, token in enumerate(tokens.tolist()):
        row = place if indices is None else indices.tolist()[place]
        if state["done"][row]:
            out.append(-2)
            continue
        out.append(token)
        length = state["seq_lens"][row]
        if counted and token >= 0:
            state["output_counts"][row][token] += 1
        if token < 0 or state["stop_mask"][row][token] or length + 1 >= state["limits"][row]:
            state["token_ids"][row], state["slots"][row], state["seq_lens"][row], state["done"][row] = 0, 0, 1, 1
            state["page_table"][row][0] = SPARE
        else:
            state["token_ids"][row], state["slots"][row], state["seq_lens"][row] = token, length, length + 1
    return out, state


def check(advance, num_rows, count, chosen, counted, seed, device="cpu"):
    """One call on random rows against the loop; `chosen`: rows by index, in any order, instead of the first ones."""
    draw = random.Random(seed)
    rows = make_rows(num_rows, seed, device)
    tokens = torch.tensor([draw.choice([-1, draw.randrange(VOCAB)]) for _ in range(count)], dtype=torch.int64)
    indices = torch.tensor(draw.sample(range(num_rows), count), dtype=torch.int64) if chosen else None
    out, state = expected(tokens, indices, rows, counted)
    got = advance(tokens.to(device), None if indices is None else indices.to(device), rows, counted)
    assert got.dtype == torch.int64 and got.tolist() == out
    assert {name: getattr(rows, name).tolist() for name in FIELDS} == state
