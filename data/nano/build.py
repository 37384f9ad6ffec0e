"""Builds what the nano model is made from: `python -m data.nano.build [--phase=N] [--out=DIR]`.

Writes into DIR (default runs/nano_data): tokenizer.model and phase<N>.jsonl (the training text);
and, with --ship, into data/nano: problems.jsonl (validation and test problems), starts.jsonl and
parents.jsonl (start workflows for the search, and other held-out parents for the comparison
before/after). All of it is a function of the seeds below.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
from collections.abc import Iterable

import sentencepiece

from data.nano import corpus, families

HERE = pathlib.Path(__file__).parent
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"


def train_tokenizer(pairs: Iterable[tuple[str, str]], prefix: pathlib.Path) -> None:
  """SentencePiece BPE: 1,200 pieces, byte fallback, single digits, pieces may cross white space."""
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=(CHAT.format(p, r) for p, r in pairs),
    model_prefix=str(prefix),
    vocab_size=1200,
    model_type="bpe",
    byte_fallback=True,
    split_digits=True,
    split_by_whitespace=False,
    split_by_unicode_script=False,
    allow_whitespace_only_pieces=True,
    max_sentencepiece_length=24,
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    normalization_rule_name="identity",
    user_defined_symbols=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    max_sentence_length=20000,
    character_coverage=1.0,
    unk_id=0,
    bos_id=-1,
    eos_id=-1,
    pad_id=-1,
    num_threads=1,
    minloglevel=2,
  )
  prefix.with_suffix(".vocab").unlink()


def write_lines(path: pathlib.Path, rows: Iterable[dict]) -> int:
  count = 0
  with path.open("w", encoding="utf-8") as file:
    for row in rows:
      file.write(json.dumps(row, ensure_ascii=False) + "\n")
      count += 1
  return count


def ship(folder: pathlib.Path) -> None:
  """Writes the problems and workflows that the project ships."""
  sets = corpus.problem_sets()
  write_lines(
    folder / "problems.jsonl",
    (
      {"id": f"{item.family}-{split}-{i % families.SIZES[split]}", "problem": item.question,
       "answer": str(item.answer),
       "family": item.family, "split": split}
      for split in ("validation", "test") for i, item in enumerate(sets[split])
    ),
  )  # fmt: skip
  sources = corpus.held_out_parents(120, seed=77)
  rows = [{"graph": s.graph, "prompt": s.prompt} for s in sources]
  write_lines(folder / "parents.jsonl", rows[:24])
  write_lines(folder / "starts.jsonl", rows[24:])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/nano_data"))
  parser.add_argument("--phase", type=int, default=1, choices=sorted(corpus.PHASES))
  parser.add_argument("--ship", action="store_true")
  args = parser.parse_args()
  if args.ship:
    ship(HERE)
    return
  args.out.mkdir(parents=True, exist_ok=True)
  pairs = corpus.make_corpus(args.phase)
  first = list(itertools.islice(pairs, 5000))
  if args.phase == 1:
    train_tokenizer(first, args.out / "tokenizer")
  path = args.out / f"phase{args.phase}.jsonl"
  rows = ({"prompt": p, "response": r} for p, r in itertools.chain(first, pairs))
  print(json.dumps({"examples": write_lines(path, rows), "path": str(path)}))


if __name__ == "__main__":
  main()
