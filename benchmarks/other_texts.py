"""What does a stored form do to texts that its expert was not made for?

    python benchmarks/heavy.py --out heavy --part train --kind python --kind german --kind reasoning
    python benchmarks/other_texts.py --texts heavy --expert experts/chain_sum --expert heavy/python

Every expert reads held-out text of three kinds, but for that of its own kind, and so do its stored forms: a form may keep
a task and still be far from its expert elsewhere. Nats per token are those that a text loses, so fewer are better. Rows are
written one by one to results/other-texts.json, and those that are there are not measured again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import heavy_texts
import record
import torch
from baselines import load
from heavy import held_out
from stored_forms import Change, forms
from transformers import AutoModelForCausalLM, AutoTokenizer

NAME, KINDS = "other-texts", ("python", "german", "reasoning")
FORMS = "ours 0.15,random signs 0.03,random signs 0.1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, required=True, help="the --out of heavy.py")
    parser.add_argument("--expert", type=Path, action="append", required=True, help="a folder")
    parser.add_argument("--forms", default=FORMS, help="that begin like these, with commas")
    parser.add_argument("--rows", type=int, default=8, help="of held-out text of a kind")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    base = load(args.texts / "base")
    tokenizer = AutoTokenizer.from_pretrained(args.texts / "base")
    model = AutoModelForCausalLM.from_pretrained(args.texts / "base", dtype=torch.float32).eval()
    nats = {
        kind: held_out(
            model,
            heavy_texts.rows(kind, tokenizer, 0, args.texts / "texts", [])[1][: args.rows],
            "cpu",
        )
        for kind in KINDS
    }
    of_base = {kind: -read(base) for kind, read in nats.items()}
    rows: list[dict[str, Any]] = record.read(NAME)["rows"] if record.exists(NAME) else []
    known = {(row["expert"], row["form"], row["text"]) for row in rows}
    for folder in args.expert:
        others = [kind for kind in KINDS if kind != folder.name]
        change = Change(base, load(folder))
        for form, store in {"exact": lambda c: (c.expert, 16.0), **forms(args.forms)}.items():
            missing = [kind for kind in others if (folder.name, form, kind) not in known]
            weights, bits = store(change) if missing else ({}, 0.0)
            for kind in missing:
                rows.append(
                    {
                        "expert": folder.name,
                        "form": form,
                        "bits_per_parameter": round(bits, 4),
                        "text": kind,
                        "base_nats": round(of_base[kind], 4),
                        "nats": round(-nats[kind](weights), 4),
                    }
                )
                record.write(NAME, {"text_rows": args.rows, "rows": rows}, {})
                print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
