"""Eight prompts of different length, answered together by the engine: what was said, and the depth of every token.

make demo && python examples/engine.py
"""

from looplm import Engine, SamplingParams
from looplm.model.loading import load_model

prompts = [
    "The state of the Union",
    "Peace",
    "Fellow citizens,",
    "In the year that has passed, our trade with other nations",
    "The Congress of the United States",
    "It is the duty of every government to see that",
    "We must",
    "The army, the navy, the courts of law and the schools of every State are",
]
model, tokenizer = load_model("runs/demo/model")
engine = Engine(model, tokenizer)
answers = engine.generate(prompts, SamplingParams(max_tokens=12, exit_threshold=0.5))
for prompt, answer in zip(prompts, answers, strict=True):
    print(f"{prompt} | {answer.text!r}: {answer.mean_depth:.2f} loops a token, {answer.exit_depths}")
