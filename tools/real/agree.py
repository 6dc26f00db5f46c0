#!/usr/bin/env python3
"""Text in, text out as transformers has it: both answer prompts greedily from one checkpoint, compared token for token.

Both compute in float32, so that rounding alone can tell them apart. Where answers part, the last column says by how much
this project's logits prefer its own token: if rounding did it, by next to nothing. Asked are ten chats, then problems of
HumanEval and MBPP in turns, as the evaluation words them. transformers has a Python of its own:
  python -m venv peer && peer/bin/pip install torch==2.13.0 transformers==4.57.1

exit code  0 all answers are the same, 3 some are not, 2 the request cannot be done
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # the rooms import each other from the root

from ms_pangu_quant.errors import PanguQuantError, RequestError
from ms_pangu_quant.evaluation import prompts as worded
from ms_pangu_quant.evaluation.tasks import load_tasks
from ms_pangu_quant.job.arguments import Parser
from tools.peers.compare import markdown
from tools.peers.quantizers import give_back_tokenizer, python_command, write_source

CHATS = """\
What is the capital of France?
Write a Python function that reverses a list.
Explain in two sentences why the sky is blue.
List three uses of baking soda.
Translate to Chinese: Good morning, my friend.
def fibonacci(n):  # complete this function
What is 17 * 23? Think step by step.
用一句话介绍北京。
Write a haiku about the sea 🌊.
What does `git rebase -i` do?
"""
PROGRAM = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(SOURCE)
model = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32).eval()
for text in json.loads(PROMPTS):
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=int(TOKENS))
    answer = made[0, ids.shape[1]:].tolist()
    record = {"prompt": ids[0].tolist(), "answer": answer, "text": tokenizer.decode(answer, skip_special_tokens=True)}
    print("ANSWER", json.dumps(record), flush=True)
"""


def messages() -> dict[str, str]:
    """What a message is called -> the user's message."""
    benchmarks = load_tasks(("humaneval", "mbpp"), {}).values()
    problems = chain.from_iterable(zip(*(each.by_id.values() for each in benchmarks), strict=False))
    wording = worded.PROMPTS["zero_shot_instruct"]
    asked = {problem.task_id: wording.render(problem)[0]["content"] for problem in problems}
    return {**{chat: chat for chat in CHATS.splitlines()}, **asked}


def theirs(python: str, source: Path, prompts: Sequence[str], tokens: int) -> list[dict[str, Any]]:
    """Of each prompt its ids, the answer's ids, with the one that ends it, and the answer. Raises RequestError."""
    command = python_command(python, PROGRAM, SOURCE=source, PROMPTS=json.dumps(prompts), TOKENS=tokens)
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise RequestError(f"--python {python}: {error.strerror}") from None
    if done.returncode:
        raise RequestError(f"--python {python}: {(done.stderr.splitlines() or ['no output'])[-1]}")
    return [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("ANSWER ")]


def answers(model: Any, prompts: Sequence[str], others: Sequence[dict[str, Any]], tokens: int) -> list[list[str]]:
    """A row of the table for each prompt; the second cell says "same" or what differs."""
    rows = []
    for prompt, ours, other in zip(prompts, model.generate(prompts, tokens), others, strict=True):
        ids, ends = model.tokenizer.encode_chat([{"role": "user", "content": prompt}]), model.tokenizer.end_ids
        mine, yours = list(ours.token_ids), [token for token in other["answer"] if token not in ends]
        found, margin = "same", ""
        if ids != other["prompt"]:
            found = "other prompt"
        elif mine != yours:
            mine, yours = [*mine, model.tokenizer.eos_id], [*yours, model.tokenizer.eos_id]
            at = next(place for place, pair in enumerate(zip(mine, yours, strict=False)) if len(set(pair)) == 2)
            logits = model.logits([*ids, *mine[:at]])[-1]
            found, margin = f"part at {at}", f"{logits[mine[at]] - logits[yours[at]]:.2e}"
        elif ours.answer != other["text"]:
            found = "other text"
        rows.append([prompt, found, str(len(ours.token_ids)), margin])
    return rows


def compare(chosen: argparse.Namespace, source: Path) -> list[list[str]]:
    from ms_pangu_quant.inference.model import load

    known = messages()
    if chosen.prompts:
        known = {line: line for line in chosen.prompts.read_text(encoding="utf-8").splitlines()}
    asked = dict(islice(known.items(), chosen.count))
    prompts = [*asked.values()]
    write_source(chosen.checkpoint, source)
    give_back_tokenizer(chosen.checkpoint, source)
    others = theirs(chosen.python, source, prompts, chosen.tokens)
    rows = answers(load(source), prompts, others, chosen.tokens)
    return [[name, *row[1:]] for name, row in zip(asked, rows, strict=True)]


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, example="python tools/real/agree.py real/smollm2 --python peer/bin/python")
    parser.add_argument("checkpoint", type=Path, help="float, with a tokenizer that transformers reads")
    parser.add_argument("--python", required=True, help="interpreter that has torch and transformers")
    parser.add_argument("--prompts", type=Path, help="file with a user message in each line (default: see above)")
    parser.add_argument("--count", type=int, default=40, help="of prompts (default: 40)")
    parser.add_argument("--tokens", type=int, default=64, help="that an answer may have (default: 64)")
    chosen = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = compare(chosen, Path(folder))
    except PanguQuantError as error:
        print(f"agree: {error}", file=sys.stderr)
        return 2
    same = sum(row[1] == "same" for row in rows)
    print(markdown([["prompt", "answers", "tokens", "margin"], ["---", "---", "---:", "---:"], *rows]))
    print(f"\n{same} of {len(rows)} answers are the same, token for token")
    return 0 if same == len(rows) else 3


if __name__ == "__main__":
    sys.exit(main())
