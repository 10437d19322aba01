"""Extraction into pydantic models. The metric is an LM that judges whether the order says what the mail says.

There is no expected output in the trainset: the judge reads mail and order. The judge is a DSPy program of its own, its
calls are counted, and OPRO does not rewrite it. `Metric(lm)` gives it a better LM than the program's. Run
`python examples/extraction.py --help`.

Known answers for the mails measure the judge: how often it agrees with them. A judge that says yes to everything leaves
nothing to search for. A small model is such a judge: SmolLM2 called six wrong orders of six faithful.
"""

from __future__ import annotations

from typing import Any

import dspy
from flags import parse
from pydantic import BaseModel

from dspy_opro import OPROTeleprompter


class Order(BaseModel):
    item: str
    quantity: int
    city: str


MAILS = [
    ("Please send 3 lamps to Lund.", Order(item="lamp", quantity=3, city="Lund")),
    ("We need 12 chairs at our office in Graz, thank you!", Order(item="chair", quantity=12, city="Graz")),
    ("One desk to Porto, please.", Order(item="desk", quantity=1, city="Porto")),
    ("Last time I had 2 clocks. Now make it 5, to Bern again.", Order(item="clock", quantity=5, city="Bern")),
    ("Could 7 shelves be in Riga by Monday?", Order(item="shelf", quantity=7, city="Riga")),
    ("I live in Ghent and would like 4 mirrors.", Order(item="mirror", quantity=4, city="Ghent")),
    ("Two dozen pens for the school in Turku.", Order(item="pen", quantity=24, city="Turku")),
    ("Not 6 but 8 stools, please, delivered to Nantes.", Order(item="stool", quantity=8, city="Nantes")),
    ("My sister in Cork wants a rug. I pay.", Order(item="rug", quantity=1, city="Cork")),
    ("10 vases, from your shop in Rome to mine in Pisa.", Order(item="vase", quantity=10, city="Pisa")),
    ("Send 15 plates and no cups to Split.", Order(item="plate", quantity=15, city="Split")),
    ("A pair of curtains for Leeds.", Order(item="curtain", quantity=2, city="Leeds")),
]


class Judge(dspy.Signature):
    """Does the order say exactly what the mail asks for? Check item, quantity and city."""

    mail: str = dspy.InputField()
    order: Order = dspy.InputField()
    is_faithful: bool = dspy.OutputField()
    problem: str = dspy.OutputField(desc="what is wrong, or nothing")


class Metric:
    """Scores an order by what the judge says. What is wrong goes into the meta-prompt as feedback."""

    def __init__(self, lm: Any = None) -> None:
        self.judge = dspy.Predict(Judge)
        self.judge.lm = lm

    def __call__(
        self, example: dspy.Example, prediction: dspy.Prediction, trace: Any = None
    ) -> dict[str, Any]:
        verdict = self.judge(mail=example.mail, order=prediction.order)
        return {"score": verdict.is_faithful, "feedback": "" if verdict.is_faithful else verdict.problem}


class Extract(dspy.Signature):
    """Extract the order."""

    mail: str = dspy.InputField()
    order: Order = dspy.OutputField()


def is_same(order: Order, known: Order) -> bool:
    """Equal up to capitals and a plural."""
    same_item = order.item.lower().startswith(known.item[:4])
    return same_item and order.quantity == known.quantity and order.city.lower() == known.city.lower()


def main() -> None:
    flags = parse(__doc__, max_metric_calls=60)
    metric = Metric()
    trainset = [dspy.Example(mail=mail).with_inputs("mail") for mail, _ in MAILS]
    teleprompter = OPROTeleprompter(
        metric=metric,
        proposer=flags.proposer,
        max_metric_calls=flags.max_metric_calls,
        num_threads=flags.num_threads,
        seed=flags.seed,
    )
    student = dspy.Predict(Extract)
    program = teleprompter.compile(student, trainset=trainset)
    print(program.opro_result.summary())
    print(f"instruction: {program.signature.instructions!r}")
    for name, module in (("before", student), ("after", program)):
        predictions = [module(mail=mail) for mail, _ in MAILS]
        right = [is_same(p.order, known) for p, (_, known) in zip(predictions, MAILS, strict=True)]
        said = [bool(metric(e, p)["score"]) for e, p in zip(trainset, predictions, strict=True)]
        agreed = sum(a == b for a, b in zip(right, said, strict=True))
        print(f"{name}: {sum(right)} of {len(MAILS)} right, the judge agrees on {agreed}")


if __name__ == "__main__":
    main()
